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
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Double,
    Integer,
    String,
    bindparam,
    func,
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
NUSD = 1_000_000_000

AttemptStatus = Literal["reserved", "sent", "ok", "bad_output", "refused", "retryable", "fatal", "unknown", "stale"]
OPEN_ATTEMPT = ("reserved", "sent")
MOST_TOKENS = 100_000_000
"""Of one attempt; a provider that reports more is wrong, and sums must fit into the columns."""
WORKER_LOST = "worker_lost"
"""Error code of an attempt that nobody settled, because its worker died."""


def run_scope(run: int) -> str:
    """The name of the budget of one run."""
    return f"run:{run}"


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit and what has been taken from it, in nano-USD; `limit_nusd` is None when there is no limit."""

    id: int
    scope: str
    limit_nusd: int | None
    spent_nusd: int
    reserved_nusd: int
    excess_nusd: int

    def free_nusd(self) -> int | None:
        """What may still be reserved now; None without a limit. Never negative."""
        if self.limit_nusd is None:
            return None
        return max(0, self.limit_nusd - self.spent_nusd - self.reserved_nusd - self.excess_nusd)

    def can_ever_take(self, worst_nusd: int) -> bool:
        """Whether `worst_nusd` would fit if everything in flight turned out to be free."""
        return self.limit_nusd is None or self.spent_nusd + self.excess_nusd + worst_nusd <= self.limit_nusd


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
    and what is in flight may settle. Safe to repeat.
    """
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    # Two producers may create the global budget at the same time.
    connection.execute(dialect.insert(budgets).values(scope=scope, limit_nusd=limit_nusd).on_conflict_do_nothing())
    row = connection.execute(select(budgets).where(budgets.c.scope == scope).with_for_update()).one()
    kept = limit_nusd if limit_nusd is None else max(limit_nusd, row.spent_nusd + row.reserved_nusd)
    connection.execute(update(budgets).where(budgets.c.scope == scope).values(limit_nusd=kept))
    return find_budget(connection, scope)


def find_budget(connection: Connection, scope: str) -> Budget:
    """The budget of a scope.

    Raises:
        LookupError: there is none.
    """
    row = connection.execute(select(budgets).where(budgets.c.scope == scope)).one_or_none()
    if row is None:
        raise LookupError(f"no budget is called {scope!r}")
    return _budget(row)


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
    for budget in sorted(deltas):
        reserved, spent, excess = deltas[budget]
        connection.execute(_APPLY, {"budget": budget, "reserved": reserved, "spent": spent, "excess": excess})


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


def totals(connection: Connection, run: int) -> dict[str, int]:
    """Sums over the attempts of one run: `cost_nusd`, `unconfirmed_nusd`, `input`, `output`, `cached`."""
    columns = llm_usage.c
    unknown = func.sum(columns.cost_nusd).filter(columns.status == "unknown")
    row = (
        connection.execute(
            select(
                func.coalesce(func.sum(columns.cost_nusd), 0).label("cost_nusd"),
                func.coalesce(unknown, 0).label("unconfirmed_nusd"),
                func.coalesce(func.sum(columns.input_tokens), 0).label("input"),
                func.coalesce(func.sum(columns.output_tokens), 0).label("output"),
                func.coalesce(func.sum(columns.cached_tokens), 0).label("cached"),
            ).where(columns.workflow_execution_id == run)
        )
        .mappings()
        .one()
    )
    return {key: int(value) for key, value in row.items()}
