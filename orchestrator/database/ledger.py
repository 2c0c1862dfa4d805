"""The ledger: attempts, from their reservation to their settlement. The only writer of `llm_usage`.

An attempt is one sending of a call. Before it may be sent, the worst price it can have is reserved against every budget
it belongs to; afterwards the reservation becomes what it really cost. An attempt whose outcome nobody knows is booked
at its worst price with the status `unknown`, and is never released by the passing of time.

All functions work inside the caller's transaction.
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
    insert,
    literal,
    select,
    update,
)

from orchestrator.database import budgets
from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.given import Given
from orchestrator.database.tables import llm_usage

NUSD = 1_000_000_000

AttemptStatus = Literal["reserved", "sent", "ok", "bad_output", "refused", "retryable", "fatal", "unknown", "stale"]
OPEN_ATTEMPT = ("reserved", "sent")
MOST_TOKENS = 100_000_000
"""Of one attempt; a provider that reports more is wrong, and sums must fit into the columns."""
WORKER_LOST = "worker_lost"
"""Error code of an attempt that nobody settled, because its worker died."""


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
    budgets.book(connection, deltas)
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


# Built once: making a statement and its key in SQLAlchemy's cache costs more than running it for a few rows.
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
