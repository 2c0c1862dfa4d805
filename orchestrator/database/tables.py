"""Every table, with the unit of every column in its comment.

The four tables that the owner named (`workflow_executions`, `prompt_executions`, `llm_usage`, `result_cache`) keep
their names and columns and carry further ones. Times named `*_at` are seconds since the epoch on the *database's*
clock, so that leases compare equal on every machine; the owner's own time columns are timestamps in UTC.
Money is an integer number of nano-dollars; the owner's `cost_usd` is kept beside it for people who read with SQL.

This module describes. Who may change a status is said in `runs`, who may change money in `ledger`.
"""

import re

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy import Text as SqlText
from sqlalchemy.types import TypeDecorator

RUN_STATES = ("pending", "running", "paused", "completed", "failed", "cancelled")
CALL_STATES = ("pending", "running", "completed", "failed", "skipped", "cancelled")
ATTEMPT_STATES = ("reserved", "sent", "ok", "bad_output", "refused", "retryable", "fatal", "unknown", "stale")
WINDOW_STATES = ("pending", "open", "closed")
OPEN_CALL = ("pending", "running")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# What neither database takes: Postgres has no NUL in text, and no encoding has half of a surrogate pair.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str) -> str:
    """Text as it is stored, the same on both databases: characters that one of them refuses become U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


class Text(TypeDecorator[str]):
    """Text of any length; characters that cannot be stored become U+FFFD.

    They come from models and providers, and one of them must not keep a whole batch of answers that were paid for out
    of the database.
    """

    impl = SqlText
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text as it is stored, the same on both databases."""
        return None if value is None else storable(value)


class ShortText(TypeDecorator[str]):
    """Text that outsiders name, cut at its length, with the same characters replaced."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text as it is stored, the same on both databases."""
        return None if value is None else storable(value)[: self.length]


# SQLite gives automatic row ids to INTEGER keys only; Postgres wants 64 bits.
BigId = BigInteger().with_variant(Integer(), "sqlite")


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


workflow_executions = Table(
    "workflow_executions",
    metadata,
    Column("id", BigId, primary_key=True, comment="number of the run inside this database"),
    Column("run_id", String(64), nullable=False, unique=True, comment="public id: sortable time, then two words"),
    Column("workflow_id", String(200), nullable=False, comment="name of the workflow"),
    Column("project_name", ShortText(200), nullable=False, comment="what is judged: the name of the input"),
    Column("status", String(16), nullable=False),
    Column("reason", String(64), comment="why the status is what it is: budget, user, deadline, ...; NULL if obvious"),
    Column("reason_detail", String(200), comment="more about the reason: the budget that binds; NULL for nothing"),
    Column("started_at", DateTime(timezone=True), nullable=False, comment="UTC"),
    Column("completed_at", DateTime(timezone=True), comment="UTC; NULL until the run has ended"),
    Column("duration_seconds", Double, comment="s, from started_at to completed_at; NULL until then"),
    Column("error_message", Text),
    Column("metadata", Text, comment="JSON: versions, input name and hash, selection, who started it"),
    Column("workflow_version", String(64), nullable=False),
    Column("pack_hash", String(64), nullable=False, comment="sha256 of the pack's files"),
    Column("identity", String(64), nullable=False, comment="sha256 of what was asked: pack, input, variables, routes"),
    Column("spec", Text, nullable=False, comment="JSON: everything a worker needs, pinned when the run began"),
    Column("segment", Integer, nullable=False, server_default="0", comment="number of the segment at work"),
    Column("phase", String(16), nullable=False, server_default="items", comment="items, reduce or finish"),
    Column("reduce_index", Integer, nullable=False, server_default="0", comment="reduce step at work in the segment"),
    Column("items_total", Integer, nullable=False, server_default="0", comment="items stored so far"),
    Column("input_complete", Boolean, nullable=False, server_default=text("false"), comment="all items are stored"),
    Column("producer_at", Double, comment="s since epoch; last sign of life of a producer still storing items"),
    Column(
        "priority", Integer, nullable=False, server_default="0", comment="higher ones first; may change at any time"
    ),
    Column("erased_at", Double, comment="s since epoch; texts about its items are gone; NULL while they are there"),
    _one_of("status", RUN_STATES),
    Index("ix_workflow_executions_identity", "identity"),
    Index("ix_workflow_executions_status", "status"),
)

items = Table(
    "items",
    metadata,
    Column(
        "workflow_execution_id",
        BigId,
        ForeignKey("workflow_executions.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("ordinal", Integer, primary_key=True, autoincrement=False, comment="place in the input, from 0"),
    Column("item_key", String(200), nullable=False, comment="unique in its run"),
    Column("content", Text, nullable=False, comment="JSON object: the fields of the item"),
    UniqueConstraint("workflow_execution_id", "item_key"),
)

windows = Table(
    "windows",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("workflow_execution_id", BigId, ForeignKey("workflow_executions.id", ondelete="CASCADE"), nullable=False),
    Column("segment", Integer, nullable=False),
    Column("number", Integer, nullable=False, comment="from 0; reduce windows follow the windows of items"),
    Column("step", String(100), comment="the reduce step that the window asks; NULL for a window of items"),
    Column("first_ordinal", Integer, nullable=False),
    Column("last_ordinal", Integer, nullable=False, comment="inclusive"),
    Column("status", String(16), nullable=False),
    Column("round", Integer, nullable=False, server_default="0", comment="how often its calls were published"),
    Column("published_at", Double, comment="s since epoch; NULL if never published"),
    Column("progress_at", Double, comment="s since epoch of the last settled call"),
    Column("wake_at", Double, comment="s since epoch: publish another round then; NULL if nothing is waited for"),
    Column("completed", Integer, nullable=False, server_default="0", comment="calls, counted when it closed"),
    Column("failed", Integer, nullable=False, server_default="0", comment="calls, counted when it closed"),
    Column("skipped", Integer, nullable=False, server_default="0", comment="calls, counted when it closed"),
    Column("cancelled", Integer, nullable=False, server_default="0", comment="calls, counted when it closed"),
    Column("items_failed", Integer, nullable=False, server_default="0", comment="items with a failed call"),
    Column("items_skipped", Integer, nullable=False, server_default="0", comment="items of which no call was asked"),
    Column("attempts", Text, comment="JSON: sums over its attempts by status; NULL while they may still change"),
    _one_of("status", WINDOW_STATES),
    UniqueConstraint("workflow_execution_id", "segment", "number"),
    Index("ix_windows_run_status", "workflow_execution_id", "status"),
)

prompt_executions = Table(
    "prompt_executions",
    metadata,
    Column("id", BigId, primary_key=True, comment="number of the call inside this database"),
    Column("workflow_execution_id", BigId, ForeignKey("workflow_executions.id", ondelete="CASCADE"), nullable=False),
    Column("prompt_name", String(100), nullable=False, comment="the step"),
    Column("prompt_template", Text, nullable=False, comment="template file @ first 12 hex digits of its sha256"),
    Column("rendered_prompt", Text, nullable=False, server_default="", comment="empty until the call was rendered"),
    Column("llm_provider", String(100), nullable=False, comment="provider of the route at work"),
    Column("llm_model", String(200), nullable=False, comment="model of the route at work"),
    Column("input_tokens", Integer, comment="tokens, all attempts; NULL until settled"),
    Column("output_tokens", Integer, comment="tokens, all attempts; NULL until settled"),
    Column("cost_usd", Double, comment="USD, all attempts, for people; cost_nusd is the exact one"),
    Column("execution_time_ms", Integer, comment="ms from the first claim to the end"),
    Column("status", String(16), nullable=False),
    Column("result", Text, comment="JSON answer; NULL until completed"),
    Column("error_message", Text),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=text("CURRENT_TIMESTAMP")),
    Column("window_id", BigId, ForeignKey("windows.id", ondelete="CASCADE"), nullable=False),
    Column("item_ordinal", Integer, nullable=False, comment="-1 for a reduce step"),
    Column("judge", Integer, nullable=False, server_default="0", comment="place in the step's list of judges"),
    Column("repeat", Integer, nullable=False, server_default="0", comment="0 for the first asking"),
    Column("route_index", Integer, nullable=False, server_default="0", comment="place in the fallback chain"),
    Column("fence", Integer, nullable=False, server_default="0", comment="grows with every claim"),
    Column("worker_id", String(64), comment="who holds it; NULL unless running"),
    Column("attempts", Integer, nullable=False, server_default="0", comment="attempts reserved so far"),
    Column("route_attempts", Integer, nullable=False, server_default="0", comment="of these, on the route at work"),
    Column("reasks", Integer, nullable=False, server_default="0", comment="times a bad answer was asked again"),
    Column("lost_workers", Integer, nullable=False, server_default="0", comment="workers that died holding it"),
    Column("next_at", Double, comment="s since epoch: not before; NULL if at once"),
    Column("claimed_at", Double, comment="s since epoch of the first claim"),
    Column("completed_at", Double, comment="s since epoch of the end"),
    Column("prompt_hash", String(64), comment="sha256 of the request: also the key of its cached answer"),
    Column("cached", Boolean, nullable=False, server_default=text("false"), comment="answered from the cache"),
    Column("saved_nusd", BigInteger, nullable=False, server_default="0", comment="nano-USD the cached answer had cost"),
    Column("quality_score", Double, comment="0 to 1; NULL until completed"),
    Column("cost_nusd", BigInteger, nullable=False, server_default="0", comment="nano-USD, all attempts"),
    Column("error_code", String(64)),
    _one_of("status", CALL_STATES),
    UniqueConstraint("workflow_execution_id", "prompt_name", "item_ordinal", "judge", "repeat"),
    Index("ix_prompt_executions_window", "window_id", "status"),
    Index(
        "ix_prompt_executions_running",
        "worker_id",
        postgresql_where=text("status = 'running'"),
        sqlite_where=text("status = 'running'"),
    ),
    Index(
        "ix_prompt_executions_flight",
        "prompt_hash",
        postgresql_where=text("status = 'running'"),
        sqlite_where=text("status = 'running'"),
    ),
)

llm_usage = Table(
    "llm_usage",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("provider", String(100), nullable=False),
    Column("model", String(200), nullable=False, comment="the model that was asked"),
    Column("input_tokens", Integer, nullable=False, server_default="0", comment="tokens, cached ones included"),
    Column("output_tokens", Integer, nullable=False, server_default="0", comment="tokens, reasoning included"),
    Column("cost_usd", Double, nullable=False, server_default="0", comment="USD, for people"),
    Column("execution_date", DateTime(timezone=True), nullable=False, server_default=text("CURRENT_TIMESTAMP")),
    Column("workflow_execution_id", BigId, ForeignKey("workflow_executions.id", ondelete="CASCADE"), nullable=False),
    Column("prompt_execution_id", BigId, ForeignKey("prompt_executions.id", ondelete="CASCADE"), nullable=False),
    Column("step", String(100), nullable=False),
    Column("number", Integer, nullable=False, comment="from 1, within the call"),
    Column("token", BigInteger, nullable=False, comment="random; tells a repeated claim from a second one"),
    Column("fence", Integer, nullable=False, comment="fence of the claim it was made under"),
    Column("worker_id", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reserved_nusd", BigInteger, nullable=False, comment="nano-USD held against the budgets: the worst price"),
    Column("budget_ids", Text, nullable=False, comment="comma-separated ids of the budgets it was held against"),
    Column("cost_nusd", BigInteger, nullable=False, server_default="0", comment="nano-USD booked"),
    Column("cached_tokens", Integer, nullable=False, server_default="0", comment="part of input_tokens"),
    Column("estimated", Boolean, nullable=False, server_default=text("false"), comment="tokens are our estimate"),
    Column("reserved_at", Double, nullable=False, comment="s since epoch"),
    Column("sent_at", Double, comment="s since epoch, committed before the first byte left; NULL if never sent"),
    Column("settled_at", Double, comment="s since epoch"),
    Column("looks", Integer, nullable=False, server_default="0", comment="times an unknown outcome was looked up"),
    Column("latency_ms", Integer, comment="ms from send to reply"),
    Column("http_status", Integer),
    Column("request_id", ShortText(200), comment="the provider's own id"),
    Column("model_answered", ShortText(200), comment="the model that the reply names"),
    Column("price_source", String(100), comment="where the price came from"),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("response", Text, comment="the reply's text, capped; NULL if none came or the answer is in the call"),
    _one_of("status", ATTEMPT_STATES),
    UniqueConstraint("prompt_execution_id", "number"),
    Index("ix_llm_usage_run", "workflow_execution_id", "status"),
    Index(
        "ix_llm_usage_open",
        "worker_id",
        postgresql_where=text("status IN ('reserved', 'sent')"),
        sqlite_where=text("status IN ('reserved', 'sent')"),
    ),
    Index(
        "ix_llm_usage_unknown",
        "provider",
        postgresql_where=text("status = 'unknown'"),
        sqlite_where=text("status = 'unknown'"),
    ),
)

result_cache = Table(
    "result_cache",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("cache_key", String(64), nullable=False, unique=True, comment="sha256 of everything that shapes the answer"),
    Column("prompt_hash", String(64), nullable=False, comment="sha256 of the messages alone"),
    Column("result", Text, nullable=False, comment="JSON: answer, model, tokens, cost of the call that was paid"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=text("CURRENT_TIMESTAMP")),
    Column("expires_at", DateTime(timezone=True), nullable=False, comment="UTC"),
    Index("ix_result_cache_expires_at", "expires_at"),
)

budgets = Table(
    "budgets",
    metadata,
    Column("id", BigId, primary_key=True),
    Column(
        "scope",
        String(260),
        nullable=False,
        unique=True,
        comment="global, run:NUMBER, workflow:NAME, provider:NAME or day:YYYY-MM-DD (UTC)",
    ),
    Column("limit_nusd", BigInteger, comment="nano-USD; NULL for no limit"),
    Column("spent_nusd", BigInteger, nullable=False, server_default="0", comment="nano-USD, unconfirmed included"),
    Column("reserved_nusd", BigInteger, nullable=False, server_default="0", comment="nano-USD of attempts in flight"),
    Column(
        "excess_nusd",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="nano-USD that a provider reported beyond the worst price it could have asked by its own price list",
    ),
    Column(
        "overhang_nusd",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="nano-USD already taken beyond a limit when it was lowered; falls as that settles, never rises",
    ),
    Column("warned_at", Double, comment="s since epoch of the warning about this limit; NULL if none was given"),
    Column("configured_nusd", BigInteger, comment="nano-USD that a configuration named last; NULL if it named none"),
    CheckConstraint(
        "limit_nusd IS NULL OR spent_nusd + reserved_nusd <= limit_nusd + overhang_nusd", name="never_overspent"
    ),
    CheckConstraint(
        "spent_nusd >= 0 AND reserved_nusd >= 0 AND excess_nusd >= 0 AND overhang_nusd >= 0", name="not_negative"
    ),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column(
        "workflow_execution_id",
        BigId,
        ForeignKey("workflow_executions.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("step", String(100), primary_key=True, comment="the ranking step"),
    Column("position", Integer, primary_key=True, autoincrement=False, comment="from 0, best first, no ties"),
    Column("item_ordinal", Integer, nullable=False),
    Column("rank", Integer, nullable=False, comment="from 1; equal items share one, the next rank is left out"),
    Column("score", Double, nullable=False, comment="weighted mean, rounded to 6 digits"),
    UniqueConstraint("workflow_execution_id", "step", "item_ordinal"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True, comment="host, process id and a random part"),
    Column("queues", Text, nullable=False, comment="comma-separated"),
    Column("version", String(32), nullable=False),
    Column("started_at", Double, nullable=False, comment="s since epoch"),
    Column("heartbeat_at", Double, nullable=False, comment="s since epoch"),
    Column("lease_seconds", Double, nullable=False, comment="s without a heartbeat after which it counts as dead"),
    Column("in_flight", Integer, nullable=False, server_default="0", comment="calls at the provider"),
    Column("bound_by", String(32), comment="what its calls waited for most in the last beat; NULL for nothing"),
)

locks = Table(
    "locks",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("until_at", Double, nullable=False, comment="s since epoch; free afterwards"),
)

limit_overrides = Table(
    "limit_overrides",
    metadata,
    Column("provider", String(100), primary_key=True, comment="its configured name"),
    Column("rpm", Integer, comment="requests per minute; 0 is paused; NULL leaves it to the configuration"),
    Column("tpm", Integer, comment="tokens per minute; 0 is paused; NULL leaves it to the configuration"),
    Column("concurrency", Integer, comment="calls in flight; 0 is paused; NULL leaves it to the configuration"),
    CheckConstraint("rpm >= 0 AND tpm >= 0 AND concurrency >= 0", name="not_negative"),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("at", Double, nullable=False, comment="s since epoch"),
    Column("actor", Text, nullable=False, comment="who: user@host, a name given by hand, or a worker"),
    Column("action", String(64), nullable=False, comment="what: run.pause, limits.set, ..."),
    Column("run", String(64), comment="id of the run; outlives the run; NULL if it is about no single run"),
    Column("subject", Text, comment="what else it is about: a provider, a budget, a hashed key; NULL for nothing"),
    Column("old", Text, comment="JSON: the state before; NULL if there was none"),
    Column("new", Text, comment="JSON: the state after; NULL if there is none"),
    Column("prev_hash", String(64), nullable=False, comment="hash of the row before; zeros in the first one"),
    Column("hash", String(64), nullable=False, unique=True, comment="sha256 of the other columns as canonical JSON"),
)
