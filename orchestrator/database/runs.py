"""The life of a run and of its calls: the only writer of their statuses. Windows have a module of their own.

Every move is one conditional UPDATE: it names the state it starts from, and a move that finds another state changes
nothing. A call that is `running` is held by one worker under one fence; a write that carries an older fence finds
no row, so a worker that was taken for dead cannot overwrite its successor's work.

All functions work inside the caller's transaction.
"""

from collections.abc import Iterable, Sequence
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
    case,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)

from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.given import Given
from orchestrator.database.tables import OPEN_CALL, prompt_executions, windows, workflow_executions

CallStatus = Literal["pending", "running", "completed", "failed", "skipped", "cancelled"]
RunStatus = Literal["pending", "running", "paused", "completed", "failed", "cancelled"]
OPEN_RUN = ("pending", "running", "paused")
UNKNOWN_OUTCOME = "unknown_outcome"  # error code of a call: nobody knows what became of its last attempt
POISON_AFTER = 3
"""Workers that may die holding one call before it counts as the cause."""

_calls = prompt_executions.c
_runs = workflow_executions.c


@dataclass(frozen=True, slots=True)
class CallEnd:
    """What becomes of a call after an attempt, or without one.

    Attributes:
        status: `completed`, `failed` or `skipped` end it; `pending` puts it back; `running` keeps it held.
        result: JSON text of the answer; None unless completed.
        saved_nusd: what the cached answer had cost when it was paid for.
        next_at_s: seconds from now before it may be claimed again; None for at once. Only with `pending`.
        route: place in the fallback chain, provider and model for the next attempt; None leaves the route.
        reask: the next attempt asks again because the answer was bad.
    """

    status: CallStatus
    result: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    quality_score: float | None = None
    cached: bool = False
    saved_nusd: int = 0
    next_at_s: float | None = None
    route: tuple[int, str, str] | None = None
    reask: bool = False


@dataclass(frozen=True, slots=True)
class CallText:
    """What was asked: the rendered prompt and the hash of the request."""

    rendered_prompt: str
    prompt_hash: str


def lock_run(connection: Connection, run: int) -> AnyRow:
    """Locks and returns a run's row: decisions about one run are taken one after the other.

    Raises:
        LookupError: the run was deleted.
    """
    # Attempts of the run may be written meanwhile: their foreign keys take this row with less.
    query = select(workflow_executions).where(_runs.id == run).with_for_update(key_share=True)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise LookupError(f"run {run} does not exist")
    return row


def move_run(
    connection: Connection,
    run: int,
    to: RunStatus,
    reason: str | None,
    *,
    sources: Sequence[RunStatus],
    detail: str | None = None,
) -> bool:
    """Moves a run to another status; True if it was in one of the `sources`. `detail` says more about the reason."""
    values: dict[str, Any] = {"status": to, "reason": reason, "reason_detail": detail and detail[:200]}
    if to in ("completed", "failed", "cancelled"):
        values |= _ended(connection)
    else:
        values |= {"completed_at": None, "duration_seconds": None}
    moved = connection.execute(
        update(workflow_executions).where(_runs.id == run, _runs.status.in_(sources)).values(**values)
    )
    return moved.rowcount == 1


def _ended(connection: Connection) -> dict[str, Any]:
    if connection.dialect.name == "sqlite":
        # CURRENT_TIMESTAMP has whole seconds there, so a short run would end before it began.
        clock = func.strftime("%Y-%m-%d %H:%M:%f000", "now")
        seconds = (func.julianday("now") - func.julianday(_runs.started_at)) * 86400.0
    else:
        clock = func.clock_timestamp()
        seconds = func.extract("epoch", func.clock_timestamp() - _runs.started_at)
    return {"completed_at": clock, "duration_seconds": seconds}


def set_priority(connection: Connection, run: int, priority: int) -> None:
    """Gives a run another priority; higher ones go first."""
    connection.execute(update(workflow_executions).where(_runs.id == run).values(priority=priority))


def priorities(connection: Connection, numbers: Iterable[int]) -> dict[int, int]:
    """Priorities of some runs, by number."""
    query = select(_runs.id, _runs.priority).where(_runs.id.in_(set(numbers)))
    return {row.id: row.priority for row in connection.execute(query)}


def set_stage(connection: Connection, run: int, *, segment: int, phase: str, reduce_index: int) -> None:
    """Notes how far a locked run is."""
    statement = update(workflow_executions).where(_runs.id == run)
    connection.execute(statement.values(segment=segment, phase=phase, reduce_index=reduce_index))


def lock_calls(connection: Connection, ids: Iterable[int]) -> dict[int, AnyRow]:
    """Locks calls in the order of their ids and returns what a claim or a settlement decides on."""
    return {row.id: row for row in connection.execute(_LOCK, {"ids": sorted(set(ids))}).all()}


def flights(connection: Connection, keys: Sequence[str]) -> set[str]:
    """Those of some cache keys for whose answers a call is being asked now."""
    return set(connection.execute(_FLIGHTS, {"keys": keys}).scalars())


def claim_calls(connection: Connection, claims: Sequence[tuple[int, int, str, str | None]]) -> None:
    """Claims locked, pending calls, or counts a further attempt of calls already held.

    Args:
        connection: the caller's transaction.
        claims: (call, new fence, worker, cache key or None); the fence stays as it is when the call is already held.
    """
    if claims:
        keys = ("call", "to_fence", "to_worker", "to_key")
        _claim.execute(connection, _CLAIM, [dict(zip(keys, one, strict=True)) for one in claims])


def end_calls(connection: Connection, ends: Sequence[tuple[int, CallEnd, CallText | None, int, int, int]]) -> None:
    """Writes the outcome of locked calls.

    Args:
        connection: the caller's transaction.
        ends: (call, outcome, text, input tokens, output tokens, cost in nano-USD) of the attempt just settled.
    """
    if ends:
        _outcome.execute(connection, _END, [_end_values(*end) for end in ends])


def add_costs(connection: Connection, costs: Sequence[tuple[int, int, int, int]]) -> None:
    """Adds (call, input tokens, output tokens, nano-USD) of attempts that did not decide how their calls ended."""
    if costs:
        keys = ("call", "tokens_in", "tokens_out", "cost")
        connection.execute(_ADD_COSTS, [dict(zip(keys, one, strict=True)) for one in costs])


def _end_values(
    call: int, end: CallEnd, text: CallText | None, tokens_in: int, tokens_out: int, cost: int
) -> dict[str, Any]:
    route_index, provider, model = end.route or (None, None, None)
    return {
        "call": call,
        "to_status": end.status,
        "to_result": end.result,
        "to_code": end.error_code,
        "to_message": end.error_message,
        "to_quality": end.quality_score,
        "to_cached": end.cached,
        "to_saved": end.saved_nusd,
        "to_prompt": text.rendered_prompt if text else None,
        "to_hash": text.prompt_hash if text else None,
        "to_route": route_index,
        "to_provider": provider,
        "to_model": model,
        "new_reasks": int(end.reask),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "cost": cost,
        "over": end.status not in OPEN_CALL,
        "held": end.status == "running",
        "wait": end.next_at_s,
    }


# Built once: making a statement and its key in SQLAlchemy's cache costs more than running it for a few rows.
_LOCK = (
    select(
        _calls.id,
        _calls.status,
        _calls.fence,
        _calls.worker_id,
        _calls.attempts,
        _calls.window_id,
        _calls.claimed_at,
        _calls.llm_provider,
        or_(_calls.next_at.is_(None), _calls.next_at <= NOW).label("is_due"),
        workflow_executions.c.status.label("run_status"),
    )
    .join(workflow_executions, workflow_executions.c.id == _calls.workflow_execution_id)
    .where(_calls.id.in_(bindparam("ids", expanding=True)))
    .order_by(_calls.id)
    .with_for_update(of=prompt_executions)
)
# The partial index holds calls in flight only, so this costs what there is of them.
_FLIGHTS = select(_calls.prompt_hash).where(
    _calls.status == literal_column("'running'"), _calls.prompt_hash.in_(bindparam("keys", expanding=True))
)
_claim = Given(call=_calls.id.type, to_fence=Integer(), to_worker=String(), to_key=String())
_CLAIM = (
    update(prompt_executions)
    .where(_calls.id == _claim.c.call)
    .values(
        status="running",
        fence=_claim.c.to_fence,
        worker_id=_claim.c.to_worker,
        attempts=_calls.attempts + 1,
        route_attempts=_calls.route_attempts + 1,
        next_at=None,
        claimed_at=func.coalesce(_calls.claimed_at, NOW),
        prompt_hash=func.coalesce(_claim.c.to_key, _calls.prompt_hash),
    )
)
_outcome = Given(
    call=_calls.id.type,
    to_status=String(),
    to_result=_calls.result.type,
    to_code=String(),
    to_message=_calls.error_message.type,
    to_quality=Double(),
    to_cached=Boolean(),
    to_saved=BigInteger(),
    to_prompt=_calls.rendered_prompt.type,
    to_hash=String(),
    to_route=Integer(),
    to_provider=String(),
    to_model=String(),
    new_reasks=Integer(),
    tokens_in=Integer(),
    tokens_out=Integer(),
    cost=BigInteger(),
    over=Boolean(),
    held=Boolean(),
    wait=Double(),
)
_END = (
    update(prompt_executions)
    .where(_calls.id == _outcome.c.call)
    .values(
        status=_outcome.c.to_status,
        result=_outcome.c.to_result,
        error_code=_outcome.c.to_code,
        error_message=_outcome.c.to_message,
        quality_score=_outcome.c.to_quality,
        cached=_outcome.c.to_cached,
        saved_nusd=_outcome.c.to_saved,
        rendered_prompt=func.coalesce(_outcome.c.to_prompt, _calls.rendered_prompt),
        prompt_hash=func.coalesce(_outcome.c.to_hash, _calls.prompt_hash),
        route_index=func.coalesce(_outcome.c.to_route, _calls.route_index),
        route_attempts=case((_outcome.c.to_route.is_(None), _calls.route_attempts), else_=0),
        llm_provider=func.coalesce(_outcome.c.to_provider, _calls.llm_provider),
        llm_model=func.coalesce(_outcome.c.to_model, _calls.llm_model),
        reasks=_calls.reasks + _outcome.c.new_reasks,
        input_tokens=func.coalesce(_calls.input_tokens, 0) + _outcome.c.tokens_in,
        output_tokens=func.coalesce(_calls.output_tokens, 0) + _outcome.c.tokens_out,
        cost_nusd=_calls.cost_nusd + _outcome.c.cost,
        cost_usd=(_calls.cost_nusd + _outcome.c.cost) / 1e9,
        worker_id=case((_outcome.c.held, _calls.worker_id), else_=null()),
        completed_at=case((_outcome.c.over, NOW), else_=null()),
        execution_time_ms=case((_outcome.c.over, (NOW - func.coalesce(_calls.claimed_at, NOW)) * 1000), else_=null()),
        next_at=NOW + _outcome.c.wait,
    )
)


_ADD_COSTS = (
    update(prompt_executions)
    .where(_calls.id == bindparam("call"))
    .values(
        input_tokens=func.coalesce(_calls.input_tokens, 0) + bindparam("tokens_in"),
        output_tokens=func.coalesce(_calls.output_tokens, 0) + bindparam("tokens_out"),
        cost_nusd=_calls.cost_nusd + bindparam("cost"),
        cost_usd=(_calls.cost_nusd + bindparam("cost")) / 1e9,
    )
)


def hold_calls_of(connection: Connection, workers_gone: Sequence[str]) -> list[int]:
    """Locks the running calls of workers and returns their ids."""
    query = (
        select(_calls.id)
        .where(_calls.worker_id.in_(workers_gone), _calls.status == "running")
        .order_by(_calls.id)
        .with_for_update()
    )
    return list(connection.execute(query).scalars())


def free_calls(connection: Connection, ids: Sequence[int], *, lost: bool, uncertain: Sequence[int] = ()) -> None:
    """Puts held calls back; a call that outlived `POISON_AFTER` workers is failed instead.

    Calls of a run that was cancelled end with it.

    Args:
        connection: the caller's transaction, in which the calls are locked.
        ids: the calls.
        lost: their worker died, rather than put them back itself.
        uncertain: those with an attempt of unknown outcome; the error code tells it to whoever takes them up.
    """
    if not ids:
        return
    died = _calls.lost_workers + (1 if lost else 0)
    poison = died >= POISON_AFTER
    cancelled = _calls.workflow_execution_id.in_(select(_runs.id).where(_runs.status == "cancelled"))
    statement = (
        update(prompt_executions)
        .where(_calls.id.in_(ids), _calls.status == "running")
        .values(
            status=case((poison, "failed"), (cancelled, "cancelled"), else_="pending"),
            error_code=case((poison, "poison"), (_calls.id.in_(uncertain), UNKNOWN_OUTCOME), else_=null()),
            error_message=case((poison, f"{POISON_AFTER} workers died while they held this call"), else_=null()),
            completed_at=case((or_(poison, cancelled), NOW), else_=null()),
            worker_id=None,
            lost_workers=died,
        )
    )
    connection.execute(statement)


def cancel_calls(connection: Connection, run: int) -> int:
    """Cancels the pending calls of a run; those in flight may still settle. Returns how many."""
    # Locked in the order of their ids, as claims do it: otherwise the two could wait for each other.
    pending = select(_calls.id).where(_calls.workflow_execution_id == run, _calls.status == "pending")
    ids = pending.order_by(_calls.id).with_for_update()
    statement = update(prompt_executions).where(_calls.id.in_(ids), _calls.status == "pending")
    return connection.execute(statement.values(status="cancelled", completed_at=NOW)).rowcount


def open_calls(connection: Connection, window: int) -> list[AnyRow]:
    """The calls of a window that are not ended, in the order step, item: what another round is made of.

    Columns: id, prompt_name, item_ordinal, llm_provider, status, and waits_s: seconds until `next_at`, where NULL
    and negative numbers mean none.
    """
    query = (
        select(
            _calls.id,
            _calls.prompt_name,
            _calls.item_ordinal,
            _calls.llm_provider,
            _calls.status,
            (_calls.next_at - NOW).label("waits_s"),
        )
        .where(_calls.window_id == window, _calls.status.in_(OPEN_CALL))
        .order_by(_calls.prompt_name, _calls.item_ordinal, _calls.judge, _calls.repeat)
    )
    return list(connection.execute(query))


def idle_runs(connection: Connection) -> list[int]:
    """Running runs without an open window: a process died between deciding and publishing, or is about to publish."""
    at_work = select(windows.c.workflow_execution_id).where(windows.c.status == "open")
    query = select(_runs.id).where(_runs.status == "running", _runs.id.not_in(at_work))
    return list(connection.execute(query).scalars())


def runs_not_running(connection: Connection, numbers: Iterable[int]) -> set[int]:
    """Those of some runs that were paused, cancelled, ended or deleted: their calls must not be sent any more."""
    wanted = set(numbers)
    query = select(_runs.id).where(_runs.id.in_(wanted), _runs.status == "running")
    return wanted - set(connection.execute(query).scalars())
