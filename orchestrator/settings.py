"""Every setting there is: its name in the file, its unit, its bounds and its default.

The pydantic models describe what a person may write; `Settings` and `LLMProviderConfig` are what the program works
with after all sources were combined. How they are combined is the business of `config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import available_timezones

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.provider_keys import ApiKey
from providers.base import ProviderSettings
from providers.pricing import NUSD_PER_USD, Price

LimitName = Literal["rpm", "tpm", "itpm", "otpm", "rpd", "concurrency"]


def _known_zone(name: str) -> str:
    if name not in available_timezones():
        raise ValueError("no time zone has this name")
    return name


Usd = Annotated[Decimal, Field(strict=False, allow_inf_nan=False, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=2_000)]
TimeZone = Annotated[str, Field(max_length=64), AfterValidator(_known_zone)]
ProviderName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]


def nusd_of(usd: Decimal | None) -> int | None:
    """A limit in nano-USD, rounded down; None stays None."""
    return None if usd is None else int(usd * NUSD_PER_USD)


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ProviderSection(_Section):
    """`[llm_providers.<name>]`. What is left out comes from the catalog's row of that name."""

    enabled: bool = True
    dialect: Text | None = None
    """Wire format; needed only for a name that the catalog does not know."""
    api_key_env: Text | list[Text] | None = None
    """Variable that holds the key, or several of them for a pool; `<VARIABLE>_FILE` may name a file instead."""
    base_url: Text | None = None
    default_model: Text | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    rate_limit_rpm: int | None = Field(default=None, ge=0, le=10_000_000)
    """Requests per minute; 0 pauses the provider."""
    rate_limit_tpm: int | None = Field(default=None, ge=0, le=100_000_000_000)
    """Tokens per minute, input and output together; 0 pauses the provider."""
    rate_limit_itpm: int | None = Field(default=None, ge=1, le=100_000_000_000)
    """Input tokens per minute, those from the prompt cache left out."""
    rate_limit_otpm: int | None = Field(default=None, ge=1, le=100_000_000_000)
    """Output tokens per minute."""
    rate_limit_rpd: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Requests per day."""
    rate_limit_day_zone: TimeZone | None = None
    """IANA name of the time zone at whose midnight the provider begins to count days anew."""
    shared_limits: list[LimitName] | None = None
    """Limits that all models of the account share; each of the others holds for every model by itself."""
    concurrency: int | None = Field(default=None, ge=1, le=100_000)
    """Calls in flight at the same time, over all workers."""
    burst: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests that may be sent at once after a quiet time."""
    cost_per_1k_tokens: Usd | None = Field(default=None, ge=0)
    cost_per_1k_input_tokens: Usd | None = Field(default=None, ge=0)
    cost_per_1k_output_tokens: Usd | None = Field(default=None, ge=0)
    cost_limit_usd: Usd | None = Field(default=None, gt=0)
    """Budget over everything that is asked of this provider; None is no such budget."""
    allow_unpriced: bool = False
    """Send calls although nobody knows the price; they are booked at zero."""
    timeout_seconds: Seconds | None = None
    cli_path: Text | None = None
    project_path: Text | None = None
    simulate: dict[str, object] | None = None
    """Options of a simulator: `latency_s`, `error_rate`, `malformed_rate`, `seed`, ..."""
    options: dict[str, object] | None = None
    """Options of the dialect, on top of the catalog's."""


class GlobalSettings(_Section):
    """`[global]`."""

    default_provider: ProviderName | None = None
    """Without it: the first configured provider, and the simulator when none is configured."""
    fallback_provider: ProviderName | None = None
    max_retries: int = Field(default=3, ge=0, le=100)
    timeout_s: Seconds | None = Field(default=None, alias="timeout_seconds")
    """Deadline of one call; None leaves it to the provider's row in the catalog."""
    cost_limit_usd: Usd | None = Field(default=None, gt=0)
    """Budget over all runs; None is no such budget."""
    daily_cost_limit_usd: Usd | None = Field(default=None, gt=0)
    """Budget of one day, in UTC, over all runs; None is no such budget."""
    min_output_tokens: int = Field(default=64, ge=1, le=10_000_000)
    """Near the end of a budget the cap of an answer shrinks to what fits, and never below this many tokens."""
    retry_unknown: bool = True
    """Send a call again although nobody knows what became of its last attempt, which may have been paid for."""
    enable_streaming: bool = True
    enable_caching: bool = True
    cache_ttl_s: int = Field(default=604_800, alias="cache_ttl_seconds", ge=0, le=315_360_000)

    @property
    def cost_limit_nusd(self) -> int | None:
        """The budget over all runs in nano-USD, rounded down; None is no such budget."""
        return nusd_of(self.cost_limit_usd)

    @property
    def daily_cost_limit_nusd(self) -> int | None:
        """The budget of one day in nano-USD, rounded down; None is no such budget."""
        return nusd_of(self.daily_cost_limit_usd)


class WorkerSettings(_Section):
    """`[worker]`. A lease must outlive three heartbeats, so that one lost beat frees no call that is running."""

    concurrency: int = Field(default=1_000, ge=1, le=100_000)
    """Calls in flight in one worker process."""
    shards: int = Field(default=256, ge=1, le=10_000)
    """Shards that one worker process has not ended at the same time; each of them takes a thread while it lasts, also
    when only its slowest call is still at the provider."""
    heartbeat_s: Seconds = Field(default=5.0, alias="heartbeat_seconds")
    lease_s: Seconds = Field(default=16.0, alias="lease_seconds")
    drain_s: Seconds = Field(default=60.0, alias="drain_seconds")
    """How long calls in flight may go on after SIGTERM."""
    stall_s: Seconds = Field(default=60.0, alias="stall_seconds")
    """Work that waits and does not move for so long is a stall: it is logged, and healed as far as a worker can."""
    outage_s: Seconds = Field(default=3600.0, alias="outage_seconds")
    """How long runs wait for a provider that answers nobody before they are paused."""
    lanes: int = Field(default=4, ge=1, le=1_000)
    """Windows of one run that are busy; one that only waits for its last calls does not count."""
    window_size: int = Field(default=1_000, ge=1, le=100_000)
    """Items per window."""
    shard_size: int = Field(default=50, ge=1, le=1_000)
    """Calls per shard, that is per message."""


class StorageSection(_Section):
    """`[storage]`. Secrets in addresses belong into `DATABASE_URL` and `REDIS_URL`, not into the file."""

    home: Text = "./data"
    database_url: Text | None = None
    """None is SQLite in `<home>/orchestrator.db`."""
    redis_url: Text | None = None
    """None is local mode: a private server is started when it is needed."""
    queue_prefix: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    """Put in front of every queue and key, for several installations that share one Redis."""


class LoggingSettings(_Section):
    """`[logging]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class WorkflowSection(_Section):
    """`[workflows.<name>]`: what this installation wants of a workflow, on top of its own declaration."""

    provider: ProviderName | None = None
    model: Text | None = None
    budget_usd: Usd | None = Field(default=None, gt=0)
    """Budget of one run."""
    total_budget_usd: Usd | None = Field(default=None, gt=0)
    """Budget over all runs of the workflow; None is no such budget."""
    variables: dict[str, object] | None = None


class ConfigDocument(_Section):
    """A whole configuration file."""

    llm_providers: dict[ProviderName, ProviderSection] = Field(default_factory=dict[str, ProviderSection])
    global_: GlobalSettings = Field(default_factory=GlobalSettings, alias="global")
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    storage: StorageSection = Field(default_factory=StorageSection)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    workflows: dict[str, WorkflowSection] = Field(default_factory=dict[str, WorkflowSection])


@dataclass(frozen=True, slots=True)
class LLMProviderConfig:
    """One provider, ready for use: catalog, files and environment combined.

    Attributes:
        name: The configured name; also the name of its queue and of its limits.
        dialect: The wire format.
        api_keys: The pool of keys, in order; empty where the service wants none.
        default_model: None when neither the configuration nor the catalog names one.
        max_tokens: Cap of one answer, in tokens.
        temperature: None is the service's default.
        rate_limit_rpm: Requests per minute; None is no such limit, 0 is paused.
        rate_limit_tpm: Tokens per minute; None is no such limit, 0 is paused.
        concurrency: Calls in flight over all workers; None is no such limit.
        burst: Requests at once after a quiet time; None leaves it to the limiter.
        timeout_s: Deadline of one call.
        local: Prompts never leave machines that the operator runs.
        price: The operator's own price, which wins over every table; None is to look it up.
        allow_unpriced: Calls without a known price may be sent.
        cost_limit_nusd: Budget over everything that is asked of it, nano-USD; None is no such budget.
        options: For the dialect: the catalog's, with the operator's on top.
        rate_limit_itpm: Input tokens per minute; None is no such limit.
        rate_limit_otpm: Output tokens per minute; None is no such limit.
        rate_limit_rpd: Requests per day of `day_zone`; None is no such limit.
        day_zone: IANA name of a time zone.
        shared_limits: Limits that all models of the account share.
    """

    name: str
    dialect: str
    base_url: str | None
    api_keys: tuple[ApiKey, ...]
    default_model: str | None
    max_tokens: int
    temperature: float | None
    rate_limit_rpm: int | None
    rate_limit_tpm: int | None
    concurrency: int | None
    burst: int | None
    timeout_s: float
    local: bool
    price: Price | None
    allow_unpriced: bool
    cli_path: str | None = None
    project_path: str | None = None
    cost_limit_nusd: int | None = None
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    rate_limit_itpm: int | None = None
    rate_limit_otpm: int | None = None
    rate_limit_rpd: int | None = None
    day_zone: str = "UTC"
    shared_limits: tuple[LimitName, ...] = ()

    def provider_settings(self, key: ApiKey | None = None) -> ProviderSettings:
        """What `providers.base.open_provider` needs; `key` picks one of the pool, the first one by default."""
        chosen = key or (self.api_keys[0] if self.api_keys else None)
        return ProviderSettings(
            name=self.name,
            dialect=self.dialect,
            base_url=self.base_url,
            api_key=chosen.secret if chosen else None,
            timeout_s=self.timeout_s,
            options=self.options,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that is configured.

    Attributes:
        home: Absolute directory of all state.
        database_url: SQLAlchemy address; may hold a password, hence not in the repr.
        redis_url: None is local mode; may hold a password, hence not in the repr.
        queue_prefix: Put in front of every queue and key; empty by default.
        providers: The enabled providers by name; the simulator is always among them unless it is disabled.
        default_provider: Where calls go whose workflow asks for nothing else; a key of `providers`.
    """

    home: Path
    database_url: str = field(repr=False)
    redis_url: str | None = field(repr=False)
    queue_prefix: str
    providers: Mapping[str, LLMProviderConfig]
    default_provider: str
    global_: GlobalSettings
    worker: WorkerSettings
    logging: LoggingSettings

    @property
    def is_local(self) -> bool:
        """Whether this installation runs its own private broker."""
        return self.redis_url is None
