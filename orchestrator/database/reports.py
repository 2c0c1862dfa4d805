"""What people ask about runs: how far they are, how they ended, which there are. Read only.

The status of a run is asked once a second by whoever watches it, so it never counts all calls: closed windows carry
their counters, and only the few windows that are open are counted live. Single answers are in `records`, money is
in `costs`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from sqlalchemy import Connection, Row, func, literal, or_, select

from orchestrator.database import budgets, costs, speed
from orchestrator.database.engine import clock
from orchestrator.database.runs import OPEN_RUN, RunStatus
from orchestrator.database.tables import CALL_STATES, prompt_executions, windows, workflow_executions
from orchestrator.database.tables import budgets as budget_rows
from orchestrator.database.times import iso, iso_epoch
from orchestrator.errors import RunNotFound
from orchestrator.money import usd, usd_or_none

PRODUCER_SILENT_S = 60.0
"""A producer that stored no items for so long is gone."""
LATEST = "latest"
_MAX_CANDIDATES = 10

_runs = workflow_executions.c
_windows = windows.c
_calls = prompt_executions.c


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run whose steps are all done ends as; `reason` is None when nothing went wrong."""

    status: RunStatus
    reason: str | None


@dataclass(frozen=True, slots=True)
class _Items:
    total: int
    completed: int
    failed: int
    skipped: int


def status(connection: Connection, run: int) -> dict[str, Any]:
    """The status object of a run.

    Calls that will be asked and are not written yet count as pending. While a run goes on, an item counts as completed
    once its last step is over; of a run that has ended, the items add up to the total, and those that a cancelled run
    did not get to count as skipped.

    Returns:
        JSON data: money as decimal strings of US dollars, times as ISO 8601 in UTC. `eta_seconds` is None when nothing
        moves or the run has ended, `bound_by` when nothing in particular limits the speed. `budgets` are those with
        a limit that the run is held to, the one with the least left first; `warnings` name those that are nearly used,
        and tell of a producer that is gone before all items are stored.

    Raises:
        LookupError: the run does not exist.
    """
    row = _run_row(connection, run)
    attempts, tokens, spent = costs.by_outcome(connection, run)
    limits = _budgets(connection, row)
    budget = next((one for one in limits if one.scope == budgets.run_scope(run)), None)
    calls = _calls_by_status(connection, row)
    items = _items(connection, row)
    return {
        "run_id": row.run_id,
        "workflow": row.workflow_id,
        "status": row.status,
        "reason": row.reason,
        "items": {
            "total": items.total,
            "completed": items.completed,
            "failed": items.failed,
            "skipped": items.skipped,
        },
        "calls": calls,
        "attempts": attempts,
        "tokens": tokens,
        "cost_usd": usd(spent["all"]),
        "unconfirmed_usd": usd(spent["unknown"]),
        "reserved_usd": usd(budget.reserved_nusd if budget else 0),
        "budget_usd": usd_or_none(budget.limit_nusd if budget else None),
        "started_at": iso(row.started_at),
        "completed_at": iso(row.completed_at),
        "duration_seconds": _duration(connection, row),
        "eta_seconds": speed.eta_s(connection, row, calls),
        "bound_by": speed.bound_by(connection, row),
        "reason_detail": row.reason_detail,
        "budgets": [_shown(one) for one in limits if one.limit_nusd is not None],
        "warnings": _warnings(connection, row, limits),
    }


def final_status(connection: Connection, run: int) -> dict[str, Any]:
    """The status object as it will be once a run whose steps are all done has ended: for the files it leaves behind."""
    ended = outcome(connection, run)
    present = {"status": ended.status, "reason": ended.reason, "eta_seconds": None, "bound_by": None}
    return status(connection, run) | present | {"completed_at": iso_epoch(clock(connection))}


def outcome(connection: Connection, run: int) -> Outcome:
    """What a run ends as, now that its steps are all done."""
    row = _run_row(connection, run)
    lost_reduce = select(func.count()).where(
        _windows.workflow_execution_id == run, _windows.step.is_not(None), _windows.failed > 0
    )
    if connection.execute(lost_reduce).scalar_one():
        return Outcome("failed", "reduce_failed")
    failed = _failed_items(connection, run)
    if failed and failed == row.items_total:
        return Outcome("failed", "all_items_failed")
    return Outcome("completed", "with_failures" if failed else None)


def item_totals(connection: Connection, run: int) -> dict[str, int]:
    """What has become of a run's items so far, for a reduce step: `items`, `completed`, `failed`, `skipped`.

    Right when no window of items is open, which is when reduce steps ask.
    """
    failed, skipped = _failed_items(connection, run), _skipped_items(connection, run)
    total = connection.execute(select(_runs.items_total).where(_runs.id == run)).scalar_one()
    return {"items": total, "completed": total - failed - skipped, "failed": failed, "skipped": skipped}


def find_runs(connection: Connection, name: str) -> list[tuple[int, str]]:
    """The runs that a name can mean, newest first: `latest`, a whole id, its beginning, or words in it.

    Returns:
        (number, run id); one of them when the name is clear, at most ten when it is not.
    """
    query = select(_runs.id, _runs.run_id).order_by(_runs.id.desc()).limit(_MAX_CANDIDATES)
    if name == LATEST:
        return [(row.id, row.run_id) for row in connection.execute(query.limit(1))]
    exact = [(row.id, row.run_id) for row in connection.execute(query.where(_runs.run_id == name))]
    if exact or not name:
        return exact
    like = or_(_runs.run_id.startswith(name, autoescape=True), _runs.run_id.contains(f"-{name}", autoescape=True))
    return [(row.id, row.run_id) for row in connection.execute(query.where(like))]


def find_run(connection: Connection, name: str) -> tuple[int, str]:
    """The one run of that name, as number and run id.

    Raises:
        RunNotFound: it fits none, or several.
    """
    found = find_runs(connection, name)
    if len(found) != 1:
        raise RunNotFound(name, [run_id for _, run_id in found])
    return found[0]


def list_runs(connection: Connection, limit: int = 20, status_is: RunStatus | None = None) -> list[dict[str, Any]]:
    """Runs, newest first: `run_id`, `workflow`, `project`, `status`, `reason`, `items`, `cost_usd` and times."""
    budget = budget_rows.c
    cost = select(budget.spent_nusd + budget.excess_nusd).where(
        budget.scope == literal("run:") + _runs.id.cast(budget.scope.type)
    )
    query = (
        select(workflow_executions, cost.scalar_subquery().label("cost_nusd")).order_by(_runs.id.desc()).limit(limit)
    )
    if status_is is not None:
        query = query.where(_runs.status == status_is)
    return [
        {
            "run_id": row.run_id,
            "workflow": row.workflow_id,
            "project": row.project_name,
            "status": row.status,
            "reason": row.reason,
            "items": row.items_total,
            "cost_usd": usd(row.cost_nusd or 0),
            "started_at": iso(row.started_at),
            "completed_at": iso(row.completed_at),
            "duration_seconds": row.duration_seconds,
        }
        for row in connection.execute(query)
    ]


def identity(connection: Connection, run: int) -> str:
    """The hash of what a run was asked to do.

    Raises:
        LookupError: the run does not exist.
    """
    return _run_row(connection, run).identity


def _run_row(connection: Connection, run: int) -> Row[Any]:
    row = connection.execute(select(workflow_executions).where(_runs.id == run)).one_or_none()
    if row is None:
        raise LookupError(f"run {run} does not exist")
    return row


def _budgets(connection: Connection, row: Row[Any]) -> list[budgets.Budget]:
    """The budgets that the run's next attempts are held against, the one with the least left first."""
    routes = json.loads(row.spec).get("routes", {})
    providers = sorted({route["provider"] for chosen in routes.values() for route in chosen})
    now_s = clock(connection)
    scopes = {one for name in providers or [""] for one in budgets.scopes_of(row.id, row.workflow_id, name, now_s)}
    return sorted(budgets.find_budgets(connection, scopes), key=_left)


def _left(budget: budgets.Budget) -> tuple[float, int]:
    free = budget.free_nusd()
    return (math.inf if free is None else free, budget.id)


def _shown(budget: budgets.Budget) -> dict[str, Any]:
    return {
        "scope": budget.scope,
        "limit_usd": usd_or_none(budget.limit_nusd),
        "spent_usd": usd(budget.used_nusd()),
        "reserved_usd": usd(budget.reserved_nusd),
        "free_usd": usd_or_none(budget.free_nusd()),
    }


def _warnings(connection: Connection, row: Row[Any], limits: Sequence[budgets.Budget]) -> list[str]:
    told = [_warning(one) for one in limits if one.is_nearly_used()]
    if not row.input_complete and speed.without_producer(connection, PRODUCER_SILENT_S, row.id):
        told.insert(0, "items do not come any more: repeat the `run` command that stores them")
    return told


def _warning(budget: budgets.Budget) -> str:
    limit = budget.limit_nusd or 0
    share = f"{100 * budget.used_nusd() // limit} %" if limit else "all"
    return f"{share} of the budget {budget.scope} is used: ${usd(budget.used_nusd())} of ${usd(limit)}"


def _calls_by_status(connection: Connection, row: Row[Any]) -> dict[str, int]:
    ended = ("completed", "failed", "skipped", "cancelled")
    closed = connection.execute(
        select(*(func.coalesce(func.sum(_windows[name]), 0).label(name) for name in ended)).where(
            _windows.workflow_execution_id == row.id, _windows.status == "closed"
        )
    ).one()
    counts: dict[str, int] = dict.fromkeys(CALL_STATES, 0)
    counts.update({name: int(value) for name, value in zip(ended, closed, strict=True)})
    # Windows that wait for a lane once more, after a retry, hold calls that have ended.
    taken_back = (_windows.status == "pending") & (_windows.round > 0)
    live = (
        select(_calls.status, func.count().label("calls"))
        .join(windows, _windows.id == _calls.window_id)
        .where(_windows.workflow_execution_id == row.id, or_(_windows.status == "open", taken_back))
        .group_by(_calls.status)
    )
    for found in connection.execute(live):
        counts[found.status] += found.calls
    unwritten = _expected_calls(row) - sum(counts.values())
    if unwritten > 0:
        counts["cancelled" if row.status == "cancelled" else "pending"] += unwritten
    return counts


def _expected_calls(row: Row[Any]) -> int:
    """How many calls the run has when all are written; 0 when the run's spec does not tell."""
    steps = json.loads(row.spec).get("steps", [])
    per_item = sum(step["calls"] for step in steps if step["kind"] == "item")
    return row.items_total * per_item + sum(step["calls"] for step in steps if step["kind"] == "reduce")


def _items(connection: Connection, row: Row[Any]) -> _Items:
    failed, skipped = _failed_items(connection, row.id), _skipped_items(connection, row.id)
    if row.phase == "finish":
        return _Items(row.items_total, row.items_total - failed - skipped, failed, skipped)
    completed = max(0, _items_done(connection, row) - failed - skipped)
    if row.status in OPEN_RUN:
        return _Items(row.items_total, completed, failed, skipped)
    return _Items(row.items_total, completed, failed, row.items_total - completed - failed)


def _items_done(connection: Connection, row: Row[Any]) -> int:
    """Items that are through the last segment that asks about items."""
    steps = json.loads(row.spec).get("steps", [])
    last = max((step["segment"] for step in steps if step["kind"] == "item"), default=0)
    query = select(func.coalesce(func.sum(_windows.last_ordinal - _windows.first_ordinal + 1), 0)).where(
        _windows.workflow_execution_id == row.id,
        _windows.segment == last,
        _windows.step.is_(None),
        _windows.status == "closed",
    )
    return int(connection.execute(query).scalar_one())


def _closed_items(run: int) -> Any:
    return (_windows.workflow_execution_id == run) & (_windows.status == "closed") & _windows.step.is_(None)


def _failed_items(connection: Connection, run: int) -> int:
    """Items with a failed call. Only when several segments have some must they be counted one by one."""
    query = (
        select(func.sum(_windows.items_failed))
        .where(_closed_items(run), _windows.items_failed > 0)
        .group_by(_windows.segment)
    )
    by_segment = list(connection.execute(query).scalars())
    if len(by_segment) < 2:
        return int(sum(by_segment))
    distinct = (
        select(func.count(func.distinct(_calls.item_ordinal)))
        .join(windows, _windows.id == _calls.window_id)
        .where(_closed_items(run), _windows.items_failed > 0, _calls.status == "failed")
    )
    return connection.execute(distinct).scalar_one()


def _skipped_items(connection: Connection, run: int) -> int:
    """Items that were skipped in every segment: usually none, because some segment skipped none at all."""
    query = select(func.sum(_windows.items_skipped)).where(_closed_items(run)).group_by(_windows.segment)
    by_segment = [int(skipped) for skipped in connection.execute(query).scalars()]
    if len(by_segment) < 2 or not all(by_segment):
        return min(by_segment, default=0)
    statuses = (
        select(_calls.item_ordinal)
        .join(windows, _windows.id == _calls.window_id)
        .where(_closed_items(run))
        .group_by(_calls.item_ordinal)
        .having(func.min(_calls.status) == "skipped", func.max(_calls.status) == "skipped")
    )
    return connection.execute(select(func.count()).select_from(statuses.subquery())).scalar_one()


def _duration(connection: Connection, row: Row[Any]) -> float:
    if row.duration_seconds is not None:
        return round(row.duration_seconds, 3)
    started = row.started_at.replace(tzinfo=row.started_at.tzinfo or UTC)
    return round(max(0.0, clock(connection) - started.timestamp()), 3)
