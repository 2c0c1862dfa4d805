"""Windows: the slices of a run in which calls are published, and the only writer of their status.

A window is `pending` until a lane is free for it, `open` while its calls are asked, and `closed` when all of them
have ended; then its counters say what they came to, so that a report adds up windows and not calls.

All functions work inside the caller's transaction.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    null,
    or_,
    select,
    update,
)

from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.tables import OPEN_CALL, llm_usage, prompt_executions, windows, workflow_executions

_calls = prompt_executions.c
_windows = windows.c
_NOTE_PROGRESS = update(windows).where(_windows.id.in_(bindparam("ids", expanding=True))).values(progress_at=NOW)
_runs = workflow_executions.c
_usage = llm_usage.c
_LIVE_SUMS = (
    select(
        _usage.status,
        func.count().label("attempts"),
        *(func.sum(one).cast(BigInteger).label(one.name) for one in (_usage.input_tokens, _usage.output_tokens)),
        func.sum(_usage.cached_tokens).cast(BigInteger).label("cached_tokens"),
        func.sum(_usage.cost_nusd).cast(BigInteger).label("cost_nusd"),
    )
    .select_from(windows)
    .join(prompt_executions, _calls.window_id == _windows.id)
    .join(llm_usage, _usage.prompt_execution_id == _calls.id)
    .group_by(_usage.status)
)


@dataclass(frozen=True, slots=True)
class AttemptSums:
    """Attempts of one status: how many, their tokens, and their cost in nano-USD."""

    attempts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_nusd: int = 0

    def plus(self, numbers: Sequence[int]) -> "AttemptSums":
        """With further ones, in the order of the attributes."""
        mine = (self.attempts, self.input_tokens, self.output_tokens, self.cached_tokens, self.cost_nusd)
        return AttemptSums(*(one + more for one, more in zip(mine, numbers, strict=True)))


def find(connection: Connection, window: int) -> AnyRow | None:
    """A window's row; None if it was deleted."""
    return connection.execute(select(windows).where(_windows.id == window)).one_or_none()


def find_reduce(connection: Connection, run: int, segment: int, step: str) -> AnyRow | None:
    """The window of a reduce step; None while it was not asked."""
    query = select(windows).where(
        _windows.workflow_execution_id == run, _windows.segment == segment, _windows.step == step
    )
    return connection.execute(query).one_or_none()


def next_pending(connection: Connection, run: int, segment: int, most: int) -> list[AnyRow]:
    """The next pending windows of items of a segment, in their order."""
    query = (
        select(windows)
        .where(*_of_items(run, segment), _windows.status == "pending")
        .order_by(_windows.number)
        .limit(max(0, most))
    )
    return list(connection.execute(query))


def count_open(connection: Connection, run: int) -> int:
    """How many windows of a run are open."""
    own = _windows.workflow_execution_id == run
    return connection.execute(select(func.count()).where(own, _windows.status == "open")).scalar_one()


def open_calls_by_step(connection: Connection, run: int, segment: int) -> list[tuple[int, dict[str, int]]]:
    """For every open window of items of a segment: how many items it has, and how many calls of each step are open."""
    calls = prompt_executions.c
    query = (
        select(_windows.id, _windows.first_ordinal, _windows.last_ordinal, calls.prompt_name, func.count())
        .join(prompt_executions, calls.window_id == _windows.id)
        .where(*_of_items(run, segment), _windows.status == "open", calls.status.in_(OPEN_CALL))
        .group_by(_windows.id, _windows.first_ordinal, _windows.last_ordinal, calls.prompt_name)
    )
    found: dict[int, tuple[int, dict[str, int]]] = {}
    for window, first, last, step, count in connection.execute(query):
        found.setdefault(window, (last - first + 1, {}))[1][step] = count
    return list(found.values())


def runs_with_pending(connection: Connection) -> list[AnyRow]:
    """Running runs with windows of items that wait for a lane: id, segment, spec."""
    waits = exists().where(
        _windows.workflow_execution_id == _runs.id, _windows.segment == _runs.segment, _windows.status == "pending"
    )
    query = select(_runs.id, _runs.segment, _runs.spec).where(_runs.status == "running", _runs.phase == "items", waits)
    return list(connection.execute(query))


def _of_items(run: int, segment: int) -> tuple[ColumnElement[bool], ...]:
    return _windows.workflow_execution_id == run, _windows.segment == segment, _windows.step.is_(None)


def has_windows(connection: Connection, run: int, segment: int) -> bool:
    """Whether a segment has windows of items: it was begun before."""
    query = select(_windows.id).where(
        _windows.workflow_execution_id == run, _windows.segment == segment, _windows.step.is_(None)
    )
    return connection.execute(query.limit(1)).first() is not None


def has_unclosed(connection: Connection, run: int, segment: int) -> bool:
    """Whether windows of items of a segment are not closed yet."""
    query = select(func.count()).where(
        _windows.workflow_execution_id == run,
        _windows.segment == segment,
        _windows.step.is_(None),
        _windows.status != "closed",
    )
    return connection.execute(query).scalar_one() > 0


def running_before(connection: Connection, run: int) -> int:
    """How many older runs are at work."""
    query = select(func.count()).where(_runs.status == "running", _runs.id < run)
    return connection.execute(query).scalar_one()


def open_of_running_runs(connection: Connection, run: int | None = None) -> list[int]:
    """Open windows of running runs, or of one of them: those of a higher priority first, then in order of coming."""
    query = (
        select(_windows.id)
        .join(workflow_executions, _runs.id == _windows.workflow_execution_id)
        .where(_windows.status == "open", _runs.status == "running")
        .order_by(_runs.priority.desc(), _windows.id)
    )
    if run is not None:
        query = query.where(_windows.workflow_execution_id == run)
    return list(connection.execute(query).scalars())


def open_pending(connection: Connection, window: int, calls: Sequence[dict[str, Any]]) -> None:
    """Opens a pending window and writes its calls, none for a window that was open before.

    The calls exist once, however often this is tried.
    """
    moved = connection.execute(
        update(windows).where(_windows.id == window, _windows.status == "pending").values(status="open")
    )
    if moved.rowcount == 1 and calls:
        connection.execute(insert(prompt_executions).values(status="pending", window_id=window), calls)


def note_published(connection: Connection, window: int) -> int:
    """Counts a round of an open window; returns its number, from 1."""
    statement = (
        update(windows)
        .where(_windows.id == window)
        .values(round=_windows.round + 1, published_at=NOW, wake_at=None)
        .returning(_windows.round)
    )
    return connection.execute(statement).scalar_one()


def wake_in(connection: Connection, window: int, seconds: float) -> None:
    """Asks for another round of an open window after some seconds."""
    statement = update(windows).where(_windows.id == window, _windows.status == "open")
    connection.execute(statement.values(wake_at=NOW + seconds))


def close_done(connection: Connection, window: int) -> bool:
    """Closes an open window without open calls and counts it; False if it was not open any more."""
    moved = connection.execute(
        update(windows)
        .where(_windows.id == window, _windows.status == "open")
        .values(status="closed", wake_at=None, **_counts(window))
    )
    if moved.rowcount == 1:
        # Behind the lock on the row that the first statement took: whoever changes an attempt from here on waits for us
        # and takes the sums away again.
        sums = {row.status: list(row[1:]) for row in connection.execute(_LIVE_SUMS.where(_windows.id == window))}
        text = json.dumps(sums, separators=(",", ":"))
        connection.execute(update(windows).where(_windows.id == window).values(attempts=text))
    return moved.rowcount == 1


def attempt_sums(connection: Connection, run: int) -> dict[str, AttemptSums]:
    """Sums over the attempts of a run by status, exact at any time.

    Windows keep theirs when they close, so that only the attempts of those at work are looked at one by one.
    """
    own = _windows.workflow_execution_id == run
    kept = select(_windows.attempts, *(null().cast(one.type) for one in _LIVE_SUMS.selected_columns))
    live = _LIVE_SUMS.where(own, _windows.attempts.is_(None))
    # One statement sees one state: no window can close between its two halves.
    both = kept.where(own, _windows.attempts.is_not(None)).union_all(
        select(null().cast(_windows.attempts.type), *live.subquery().c)
    )
    found: dict[str, AttemptSums] = {}
    for text, *live_row in connection.execute(both):
        parts = [(live_row[0], live_row[1:])] if text is None else json.loads(text).items()
        for status, numbers in parts:
            found[status] = found.get(status, AttemptSums()).plus(numbers)
    return found


def forget_sums(connection: Connection, window_ids: Iterable[int]) -> None:
    """Takes the kept sums of windows away: an attempt of theirs was settled late.

    Call it behind the change: then a window that closes at the same time is either summed after it or forgotten.
    """
    ids = sorted(set(window_ids))
    if ids:
        connection.execute(update(windows).where(_windows.id.in_(ids)).values(attempts=None))


def _counts(window: int) -> dict[str, Any]:
    of_window = _calls.window_id == window
    counted: dict[str, Any] = {
        status: select(func.count()).where(of_window, _calls.status == status).scalar_subquery()
        for status in ("completed", "failed", "skipped", "cancelled")
    }
    failed = select(func.count(func.distinct(_calls.item_ordinal))).where(
        of_window, _calls.item_ordinal >= 0, _calls.status == "failed"
    )
    asked = prompt_executions.alias()
    untouched = select(func.count(func.distinct(_calls.item_ordinal))).where(
        of_window,
        _calls.item_ordinal >= 0,
        _calls.status == "skipped",
        ~exists().where(
            asked.c.window_id == window,
            asked.c.item_ordinal == _calls.item_ordinal,
            asked.c.status != "skipped",
        ),
    )
    return counted | {"items_failed": failed.scalar_subquery(), "items_skipped": untouched.scalar_subquery()}


def take_back(connection: Connection, run: int, ids: Iterable[int], behind: int) -> None:
    """Makes windows pending again, so that they are opened, and counted, once more when their turn comes.

    Args:
        connection: the caller's transaction, which holds the run's row.
        run: the run they belong to.
        ids: those in which calls were put back; open windows of items stay open.
        behind: segment; of all later ones, open windows are taken back too.
    """
    zero = dict.fromkeys(("completed", "failed", "skipped", "cancelled", "items_failed", "items_skipped"), 0)
    statement = update(windows).values(status="pending", wake_at=None, attempts=None, **zero)
    for some in _pages(ids):
        again = or_(_windows.status == "closed", _windows.step.is_not(None))
        connection.execute(statement.where(_windows.id.in_(some), again))
    later = (_windows.workflow_execution_id == run) & (_windows.segment > behind)
    connection.execute(statement.where(later, _windows.status == "open"))


def _pages(ids: Iterable[int]) -> Iterator[list[int]]:
    iterator = iter(ids)
    while some := list(islice(iterator, 500)):
        yield some


def note_progress(connection: Connection, window_ids: Iterable[int]) -> None:
    """Notes that calls of these windows were settled just now."""
    ids = sorted(set(window_ids))
    if ids:
        connection.execute(_NOTE_PROGRESS, {"ids": ids})


def due_or_silent(connection: Connection, silent_s: float) -> list[AnyRow]:
    """Open windows of running runs that are due, or silent for too long, by priority.

    A window is silent when nothing of it was published or settled for `silent_s` seconds and none of its calls is held.

    Columns: id, run, and silence_s, how long it has been silent; NULL for a window that is due.
    """
    quiet = and_(
        _windows.wake_at.is_(None),
        func.coalesce(_windows.progress_at, 0) < NOW - silent_s,
        func.coalesce(_windows.published_at, 0) < NOW - silent_s,
        ~exists().where(_calls.window_id == _windows.id, _calls.status == "running"),
    )
    progress_at, published_at = func.coalesce(_windows.progress_at, 0), func.coalesce(_windows.published_at, 0)
    last_at = case((progress_at > published_at, progress_at), else_=published_at)
    silence_s = case((_windows.wake_at.is_(None), NOW - last_at)).label("silence_s")
    query = (
        select(_windows.id, _windows.workflow_execution_id.label("run"), silence_s)
        .join(workflow_executions, _runs.id == _windows.workflow_execution_id)
        .where(_runs.status == "running", _windows.status == "open", or_(_windows.wake_at <= NOW, quiet))
        .order_by(_runs.priority.desc(), _windows.id)
    )
    return list(connection.execute(query))


def providers_waited_for(connection: Connection, window: int) -> set[str]:
    """The providers that the pending calls of a window are to be asked of."""
    query = select(_calls.llm_provider).where(_calls.window_id == window, _calls.status == "pending").distinct()
    return set(connection.execute(query).scalars())


def stillness_s(connection: Connection) -> float:
    """Seconds since anything was settled, or seen at work, in any open window of a running run."""
    query = (
        select(NOW - func.coalesce(func.max(_windows.progress_at), 0))
        .join(workflow_executions, _runs.id == _windows.workflow_execution_id)
        .where(_runs.status == "running", _windows.status == "open")
    )
    return connection.execute(query).scalar_one()
