"""What we know about services and models before anyone configured anything.

The facts are rows of `catalog.toml`; this module gives them types and looks them up. Rows are defaults: an operator's
configuration wins over each of them. Prices of hosted services are not here but in `price_data.py`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Sampling = Literal["yes", "no", "without_reasoning"]
SharedLimit = Literal["rpm", "tpm", "itpm", "otpm", "rpd", "concurrency"]

_DATED_SUFFIX = re.compile(r"-20\d{2}-?\d{2}-?\d{2}$")


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PriceRow(_Row):
    """A price in USD per million tokens; `long_above` starts the tier in which input costs double, output 1.5 times."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    write: Decimal | None = None
    long_above: int | None = None


class ProviderEntry(_Row):
    """A service. None means that no such limit is assumed.

    Limits are per minute, `rpd` is per day of `day_zone` (an IANA name). Those in `shared` hold for all models of an
    account together, the others for each of them.
    """

    name: str
    title: str
    dialect: str
    base_url: str | None = None
    key_env: str | None = None
    key_required: bool
    local: bool = False
    free: bool = False
    default_model: str | None = None
    price_book: str | None = None
    price: PriceRow | None = None
    rpm: int | None = None
    tpm: int | None = None
    itpm: int | None = None
    otpm: int | None = None
    rpd: int | None = None
    day_zone: str = "UTC"
    shared: tuple[SharedLimit, ...] = ()
    concurrency: int | None = None
    burst: int | None = None
    timeout_s: float
    options: Mapping[str, object] = Field(default_factory=dict)


class ModelEntry(_Row):
    """A model of one service. `context` is the whole window and `output` the largest cap, both in tokens."""

    name: str
    provider: str
    context: int
    output: int
    sampling: Sampling
    default_effort: str | None = None
    system_role: str | None = None
    cap_field: str | None = None
    json_mode: str | None = None
    price: PriceRow | None = None


class Elsewhere(_Row):
    """What is assumed of a service when its requests go to an address that is not its own."""

    concurrency: int
    options: Mapping[str, object]


class Alias(_Row):
    """Old names of one service, and the model that stands in for them."""

    names: tuple[str, ...]
    provider: str
    model: str


class Catalog(_Row):
    """All rows of `catalog.toml`, in file order."""

    providers: Mapping[str, ProviderEntry]
    elsewhere: Elsewhere
    models: tuple[ModelEntry, ...]
    aliases: tuple[Alias, ...]


@cache
def load_catalog() -> Catalog:
    """Read the packaged catalog once per process."""
    raw = tomllib.loads(files("providers").joinpath("catalog.toml").read_text("utf-8"))
    for name, row in raw["providers"].items():
        row["name"] = name
    return Catalog.model_validate(raw)


def provider_names() -> tuple[str, ...]:
    """Return the names of all known services, in catalog order."""
    return tuple(load_catalog().providers)


def find_provider(name: str) -> ProviderEntry | None:
    """Return the service's row, or None when the catalog does not know the name."""
    return load_catalog().providers.get(name)


def at_address(entry: ProviderEntry, base_url: str | None) -> ProviderEntry:
    """Return the row as it holds for requests that go to `base_url`, which need not be the vendor's own address."""
    own = urlsplit(entry.base_url or "").hostname
    if entry.local or base_url is None or urlsplit(base_url).hostname == own:
        return entry
    elsewhere = load_catalog().elsewhere
    return entry.model_copy(
        update={
            "base_url": base_url,
            "key_required": False,
            "rpm": None,
            "tpm": None,
            "itpm": None,
            "otpm": None,
            "rpd": None,
            "burst": None,
            "concurrency": elsewhere.concurrency,
            "options": elsewhere.options,
        }
    )


def find_model(provider: str, model: str) -> ModelEntry | None:
    """Return the row of a model, matched exactly or without a date at its end, or None."""
    rows = _models_by_name()
    return rows.get((provider, model)) or rows.get((provider, undated(model)))


def resolve_model(provider: str, model: str) -> str:
    """Return today's model for a name that the vendor has shut down, and any other name unchanged."""
    return _aliases_by_name().get((provider, model), model)


def undated(model: str) -> str:
    """Return the model name without a release date at its end (`-2026-09-22` or `-20260922`)."""
    return _DATED_SUFFIX.sub("", model)


@cache
def _models_by_name() -> dict[tuple[str, str], ModelEntry]:
    return {(row.provider, row.name): row for row in load_catalog().models}


@cache
def _aliases_by_name() -> dict[tuple[str, str], str]:
    return {(row.provider, name): row.model for row in load_catalog().aliases for name in row.names}
