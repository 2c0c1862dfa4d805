"""Money: attempts, reservations, budgets and settlements. The only writer of `llm_usage` and `budgets`.

An attempt is one sending of a call. Before it may be sent, the worst price it can have is reserved against every
budget it belongs to; afterwards the reservation becomes what it really cost. The invariant

    spent + reserved <= limit

is a CHECK constraint, so no order of events can break it. An attempt whose outcome nobody knows is booked at its worst
price with the status `unknown`, and is never released by the passing of time.

All functions work inside the caller's transaction. Whoever changes several budgets locks them in the order of their
ids.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Double,
    Integer,
    String,
    bindparam,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.given import Given
from orchestrator.database.tables import budgets, llm_usage

GLOBAL_SCOPE = "global"
DAY_SCOPES = "day:"
NUSD = 1_000_000_000

AttemptStatus = Literal["reserved", "sent", "ok", "bad_output", "refused", "retryable", "fatal", "unknown", "stale"]
OPEN_ATTEMPT = ("reserved", "sent")
MOST_TOKENS = 100_000_000
"""Of one attempt; a provider that reports more is wrong, and sums must fit into the columns."""
WORKER_LOST = "worker_lost"
"""Error code of an attempt that nobody settled, because its worker died."""


WARN_SHARE = (4, 5)
"""Share of a limit, as a fraction of integers, from which a warning is given."""


def run_scope(run: int) -> str:
    """The name of the budget of one run."""
    return f"run:{run}"


def workflow_scope(workflow: str) -> str:
    """The name of the budget of all runs of a workflow."""
    return f"workflow:{workflow}"


def provider_scope(provider: str) -> str:
    """The name of the budget of everything that is asked of a provider."""
    return f"provider:{provider}"


def day_scope(epoch_s: float) -> str:
    """The name of the budget of the day, in UTC, on which a moment lies; in order of time when sorted as text."""
    return f"{DAY_SCOPES}{datetime.fromtimestamp(epoch_s, UTC):%Y-%m-%d}"


def scopes_of(run: int, workflow: str, provider: str, epoch_s: float) -> tuple[str, ...]:
    """The names of all budgets that an attempt is held against; everybody locks the global one first."""
    names = (run_scope(run), workflow_scope(workflow), provider_scope(provider), day_scope(epoch_s))
    return (GLOBAL_SCOPE, *names)


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit and what has been taken from it, in nano-USD; `limit_nusd` is None when there is no limit."""

    id: int
    scope: str
    limit_nusd: int | None
    spent_nusd: int
    reserved_nusd: int
    excess_nusd: int

    def used_nusd(self) -> int:
        """What was spent, the part beyond worst prices included."""
        return self.spent_nusd + self.excess_nusd

    def is_nearly_used(self) -> bool:
        """Whether so much of the limit is used that people should know."""
        part, whole = WARN_SHARE
        return self.limit_nusd is not None and self.used_nusd() * whole >= self.limit_nusd * part

    def free_nusd(self) -> int | None:
        """What may still be reserved now; None without a limit. Never negative."""
        if self.limit_nusd is None:
            return None
        return max(0, self.limit_nusd - self.used_nusd() - self.reserved_nusd)

    def spare_nusd(self) -> int | None:
        """What would be free if everything in flight cost nothing; None without a limit. Never negative."""
        return None if self.limit_nusd is None else max(0, self.limit_nusd - self.used_nusd())


@dataclass(frozen=True, slots=True)
class Usage:
    """What an attempt turned out to be. Tokens count cached input in `input_tokens`; `cost_nusd` is nano-USD."""

    status: AttemptStatus
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False
    cost_nusd: int = 0
    latency_ms: int | None = None
    http_status: int | None = None
    request_id: str | None = None
    model_answered: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    response: str | None = None


def set_limit(connection: Connection, scope: str, limit_nusd: int | None) -> Budget:
    """Creates the budget of a scope, or changes its limit.

    A limit below what is already spent and reserved cannot be kept, so it is raised to that sum: nothing new is sent,
    and what is in flight may settle. Another limit is warned of anew. Safe to repeat.
    """
    _create(connection, scope, limit_nusd)
    row = connection.execute(select(budgets).where(budgets.c.scope == scope).with_for_update()).one()
    kept = limit_nusd if limit_nusd is None else max(limit_nusd, row.spent_nusd + row.reserved_nusd)
    if kept != row.limit_nusd:
        statement = update(budgets).where(budgets.c.scope == scope)
        connection.execute(statement.values(limit_nusd=kept, warned_at=None))
    return find_budget(connection, scope)


def configure(connection: Connection, scope: str, limit_nusd: int | None) -> None:
    """Sets a limit that a configuration names, once: what an operator sets later stands until it names another one."""
    budget = ensure_budgets(connection, (scope,))[scope]
    row = connection.execute(select(budgets.c.configured_nusd).where(budgets.c.id == budget)).one()
    if row.configured_nusd != limit_nusd:
        set_limit(connection, scope, limit_nusd)
        connection.execute(update(budgets).where(budgets.c.id == budget).values(configured_nusd=limit_nusd))


def ensure_budgets(connection: Connection, scopes: Sequence[str]) -> dict[str, int]:
    """Ids of budgets by scope; those that do not exist yet begin without a limit, a new day with that of the last one.

    Safe to repeat, and for several processes at once.
    """
    found = _ids(connection, scopes)
    for scope in (one for one in scopes if one not in found):
        _create(connection, scope, *_limit_to_begin_with(connection, scope))
    return found if len(found) == len(set(scopes)) else _ids(connection, scopes)


def find_budgets(connection: Connection, scopes: Iterable[str]) -> list[Budget]:
    """Those of some budgets that exist, in the order of their ids."""
    query = select(budgets).where(budgets.c.scope.in_(list(scopes))).order_by(budgets.c.id)
    return [_budget(row) for row in connection.execute(query)]


def warn_once(connection: Connection) -> list[Budget]:
    """Budgets of which so much is used that people should know, and did not know yet: once per budget and limit."""
    part, whole = WARN_SHARE
    used = (budgets.c.spent_nusd + budgets.c.excess_nusd) * whole
    due = (budgets.c.warned_at.is_(None)) & budgets.c.limit_nusd.is_not(None) & (used >= budgets.c.limit_nusd * part)
    rows = connection.execute(update(budgets).where(due).values(warned_at=NOW).returning(budgets)).all()
    return [_budget(row) for row in sorted(rows, key=lambda row: row.id)]


def _create(connection: Connection, scope: str, limit_nusd: int | None, configured_nusd: int | None = None) -> None:
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = {"scope": scope, "limit_nusd": limit_nusd, "configured_nusd": configured_nusd}
    # Two processes may create the same budget at the same time.
    connection.execute(dialect.insert(budgets).values(values).on_conflict_do_nothing())


def _ids(connection: Connection, scopes: Sequence[str]) -> dict[str, int]:
    query = select(budgets.c.scope, budgets.c.id).where(budgets.c.scope.in_(scopes))
    return {row.scope: row.id for row in connection.execute(query)}


def _limit_to_begin_with(connection: Connection, scope: str) -> tuple[int | None, int | None]:
    """A day begins with the configured limit, or else with that of the last day; other budgets without one."""
    if not scope.startswith(DAY_SCOPES):
        return None, None
    days = select(budgets).where(budgets.c.scope.startswith(DAY_SCOPES), budgets.c.scope < scope)
    last = connection.execute(days.order_by(budgets.c.scope.desc()).limit(1)).one_or_none()
    if last is None:
        return None, None
    return last.limit_nusd if last.configured_nusd is None else last.configured_nusd, last.configured_nusd


def find_budget(connection: Connection, scope: str) -> Budget:
    """The budget of a scope.

    Raises:
        LookupError: there is none.
    """
    found = find_budgets(connection, (scope,))
    if not found:
        raise LookupError(f"no budget is called {scope!r}")
    return found[0]


def lock_budgets(connection: Connection, ids: Iterable[int]) -> dict[int, Budget]:
    """Locks budgets until the end of the transaction and returns them by id."""
    return {row.id: _budget(row) for row in connection.execute(_LOCK, {"ids": sorted(set(ids))}).all()}


def reserve(connection: Connection, taken_nusd: Mapping[int, int]) -> None:
    """Adds to the reservations of locked budgets. The caller has checked that it fits; the database checks again."""
    _apply(connection, {id_: (amount, 0, 0) for id_, amount in taken_nusd.items()})


def add_attempts(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes new attempts as `sent`: after the commit they may leave, so they may have been paid for.

    Each row holds every column that `llm_usage` demands, but the times. There is no earlier state in the database:
    what is reserved and not yet on its way lives for a few milliseconds inside this transaction only.
    """
    if rows:
        _added.execute(connection, _ADD, rows)


def find_attempts(connection: Connection, calls: Iterable[int]) -> dict[tuple[int, int], AnyRow]:
    """Locks and returns the attempts of some calls, by (call, number)."""
    found = connection.execute(_FIND, {"calls": list(calls)}).all()
    return {(row.prompt_execution_id, row.number): row for row in found}


def settle(connection: Connection, settled: Sequence[tuple[AnyRow, Usage]]) -> None:
    """Turns reservations into what the attempts really cost.

    An attempt that was already booked as `unknown` is corrected by the difference. What a provider reports beyond the
    worst price is kept apart as `excess_nusd`, where it blocks new reservations without breaking the constraint.

    Args:
        connection: the caller's transaction.
        settled: open or unknown ones from `find_attempts`, each with its outcome. A row may stand here once only.
    """
    deltas: dict[int, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    for row, usage in settled:
        booked = row.cost_nusd if row.status == "unknown" else 0
        released = 0 if row.status == "unknown" else row.reserved_nusd
        inside = min(usage.cost_nusd, row.reserved_nusd)
        for budget in split_ids(row.budget_ids):
            reserved, spent, excess = deltas[budget]
            deltas[budget] = (reserved - released, spent + inside - booked, excess + usage.cost_nusd - inside)
    _apply(connection, deltas)
    if settled:
        _settled.execute(connection, _SETTLE, [_settle_values(r, u) for r, u in settled])


def book_unknown(connection: Connection, rows: Sequence[AnyRow]) -> int:
    """Ends the open attempts of a dead worker: nobody knows their outcome, so they are booked at their worst price.

    Returns:
        How many there were.
    """
    settle(
        connection,
        [(row, Usage("unknown", cost_nusd=row.reserved_nusd, estimated=True, error_code=WORKER_LOST)) for row in rows],
    )
    return len(rows)


def split_ids(text: str) -> tuple[int, ...]:
    """Reads `llm_usage.budget_ids`."""
    return tuple(int(part) for part in text.split(",") if part)


def _apply(connection: Connection, deltas: Mapping[int, tuple[int, int, int]]) -> None:
    keys = ("budget", "reserved", "spent", "excess")
    if deltas:
        connection.execute(_APPLY, [dict(zip(keys, (id_, *deltas[id_]), strict=True)) for id_ in sorted(deltas)])


def _budget(row: AnyRow) -> Budget:
    return Budget(row.id, row.scope, row.limit_nusd, row.spent_nusd, row.reserved_nusd, row.excess_nusd)


# Built once: making a statement and its key in SQLAlchemy's cache costs more than running it for a few rows.
_LOCK = (
    select(budgets).where(budgets.c.id.in_(bindparam("ids", expanding=True))).order_by(budgets.c.id).with_for_update()
)
_APPLY = (
    update(budgets)
    .where(budgets.c.id == bindparam("budget"))
    .values(
        reserved_nusd=budgets.c.reserved_nusd + bindparam("reserved"),
        spent_nusd=budgets.c.spent_nusd + bindparam("spent"),
        excess_nusd=budgets.c.excess_nusd + bindparam("excess"),
    )
)
_added = Given(
    provider=String(),
    model=String(),
    workflow_execution_id=BigInteger(),
    prompt_execution_id=BigInteger(),
    step=String(),
    number=Integer(),
    token=BigInteger(),
    fence=Integer(),
    worker_id=String(),
    reserved_nusd=BigInteger(),
    budget_ids=llm_usage.c.budget_ids.type,
    price_source=String(),
)
_ADD = insert(llm_usage).from_select(
    [*_added.c.keys(), "status", "reserved_at", "sent_at"], select(*_added.c, literal("sent"), NOW, NOW)
)
_FIND = (
    select(
        llm_usage.c.prompt_execution_id,
        llm_usage.c.number,
        llm_usage.c.status,
        llm_usage.c.token,
        llm_usage.c.reserved_nusd,
        llm_usage.c.budget_ids,
        llm_usage.c.cost_nusd,
        llm_usage.c.error_code,
        llm_usage.c.worker_id,
    )
    .where(llm_usage.c.prompt_execution_id.in_(bindparam("calls", expanding=True)))
    .with_for_update()
)
_settled = Given(
    call=BigInteger(),
    attempt=Integer(),
    to_status=String(),
    to_input=Integer(),
    to_output=Integer(),
    to_cached=Integer(),
    to_estimated=Boolean(),
    to_cost=BigInteger(),
    to_cost_usd=Double(),
    to_latency=Integer(),
    to_http=Integer(),
    to_request=llm_usage.c.request_id.type,
    to_model=llm_usage.c.model_answered.type,
    to_code=String(),
    to_message=llm_usage.c.error_message.type,
    to_response=llm_usage.c.response.type,
)
_SETTLE = (
    update(llm_usage)
    .where(llm_usage.c.prompt_execution_id == _settled.c.call, llm_usage.c.number == _settled.c.attempt)
    .values(
        status=_settled.c.to_status,
        input_tokens=_settled.c.to_input,
        output_tokens=_settled.c.to_output,
        cached_tokens=_settled.c.to_cached,
        estimated=_settled.c.to_estimated,
        cost_nusd=_settled.c.to_cost,
        cost_usd=_settled.c.to_cost_usd,
        latency_ms=_settled.c.to_latency,
        http_status=_settled.c.to_http,
        request_id=_settled.c.to_request,
        model_answered=_settled.c.to_model,
        error_code=_settled.c.to_code,
        error_message=_settled.c.to_message,
        response=_settled.c.to_response,
        settled_at=NOW,
    )
)


def _settle_values(row: AnyRow, usage: Usage) -> dict[str, Any]:
    return {
        "call": row.prompt_execution_id,
        "attempt": row.number,
        "to_status": usage.status,
        "to_input": min(usage.input_tokens, MOST_TOKENS),
        "to_output": min(usage.output_tokens, MOST_TOKENS),
        "to_cached": min(usage.cached_tokens, MOST_TOKENS),
        "to_estimated": usage.estimated,
        "to_cost": usage.cost_nusd,
        "to_cost_usd": usage.cost_nusd / NUSD,
        "to_latency": usage.latency_ms,
        "to_http": usage.http_status,
        "to_request": usage.request_id,
        "to_model": usage.model_answered,
        "to_code": usage.error_code,
        "to_message": usage.error_message,
        "to_response": usage.response,
    }
