"""How fast a run goes, what limits it, whether its items still come, and which workers are there. Read only."""

from typing import Any

from sqlalchemy import Connection, Row, func, not_, select

from orchestrator.database.engine import NOW, AnyRow, clock
from orchestrator.database.runs import OPEN_RUN
from orchestrator.database.tables import prompt_executions, windows, workers, workflow_executions

RATE_WINDOW_S = 30.0
"""The speed of a run is measured over this many seconds, so that a pause or a slow start is soon forgotten."""

_runs = workflow_executions.c
_windows = windows.c
_calls = prompt_executions.c


def without_producer(connection: Connection, silent_s: float, run: int | None = None) -> list[AnyRow]:
    """Running runs whose items are not all stored, by a producer that gave no sign of life for so many seconds.

    Columns: id, run_id.

    Args:
        connection: of the database.
        silent_s: how long is too long.
        run: asks about this one alone; None is all.
    """
    gone = (_runs.status == "running") & _runs.input_complete.is_(False) & (_runs.producer_at < NOW - silent_s)
    query = select(_runs.id, _runs.run_id).where(gone)
    return list(connection.execute(query if run is None else query.where(_runs.id == run)))


def live_workers(connection: Connection) -> list[dict[str, Any]]:
    """Workers whose lease has not run out: `id`, `queues`, `version`, `in_flight`, `bound_by`, oldest first."""
    alive = workers.c.heartbeat_at >= NOW - workers.c.lease_seconds
    query = select(workers).where(alive).order_by(workers.c.started_at, workers.c.id)
    return [
        {
            "id": row.id,
            "queues": [name for name in row.queues.split(",") if name],
            "version": row.version,
            "in_flight": row.in_flight,
            "bound_by": row.bound_by,
        }
        for row in connection.execute(query)
    ]


def eta_s(connection: Connection, row: Row[Any], calls: dict[str, int]) -> float | None:
    """Seconds that the calls still open take at the present speed."""
    left = calls["pending"] + calls["running"]
    if row.status != "running":
        return None
    begin = clock(connection) - RATE_WINDOW_S
    own = (_windows.workflow_execution_id == row.id) & (_windows.progress_at >= begin)
    # Windows that were opened and closed meanwhile carry their counters: a fast run has many of them.
    whole = (_windows.status == "closed") & (_windows.round == 1) & (_windows.published_at >= begin)
    added = func.coalesce(func.sum(_windows.completed + _windows.failed), 0)
    counted = connection.execute(select(added, func.min(_windows.published_at)).where(own, whole)).one()
    recent = (
        select(func.count(), func.min(_calls.completed_at))
        .select_from(windows)
        .join(prompt_executions, _windows.id == _calls.window_id)
        .where(own, not_(whole), _calls.completed_at >= begin, _calls.status.in_(("completed", "failed")))
    )
    seen = connection.execute(recent).one()
    ended = int(counted[0]) + seen[0]
    first = min(one for one in (counted[1], seen[1], begin + RATE_WINDOW_S) if one is not None)
    if left == 0 or not ended:
        return 0.0 if left == 0 else None
    return round(left * max(1.0, begin + RATE_WINDOW_S - first) / ended, 1)


def bound_by(connection: Connection, row: Row[Any]) -> str | None:
    """What most calls in flight wait for; `workers` when nobody is there to ask, the reason when the run is paused."""
    if row.status not in OPEN_RUN:
        return None
    if row.status == "paused":
        return row.reason or "paused"
    alive = live_workers(connection)
    if not alive:
        return "workers"
    weights: dict[str, int] = {}
    for worker in alive:
        if worker["bound_by"] is not None:
            weights[worker["bound_by"]] = weights.get(worker["bound_by"], 0) + worker["in_flight"] + 1
    if weights:
        return max(sorted(weights), key=weights.__getitem__)
    return "provider" if any(worker["in_flight"] for worker in alive) else None
