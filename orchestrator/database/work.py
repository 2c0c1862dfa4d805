"""What a shard needs before it can ask: its calls, their items, and the earlier answers.

Every function reads one range of ordinals of one run with a query that follows an index, so its cost depends on the
size of the shard and not on the size of the run.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select

from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.tables import items, llm_usage, prompt_executions, verdicts, windows, workflow_executions

_calls = prompt_executions.c
# Built once: every shard asks these two.
_PENDING = (
    select(
        _calls.id,
        _calls.item_ordinal,
        _calls.repeat,
        _calls.route_index,
        _calls.route_attempts,
        _calls.attempts,
        _calls.reasks,
        _calls.window_id,
        _calls.error_message,
        _calls.error_code,
    )
    .where(
        _calls.window_id == bindparam("window"),
        _calls.status == "pending",
        _calls.prompt_name == bindparam("step"),
        _calls.llm_provider == bindparam("provider"),
        _calls.item_ordinal.between(bindparam("first"), bindparam("last")),
        or_(_calls.next_at.is_(None), _calls.next_at <= NOW),
    )
    .order_by(_calls.item_ordinal, _calls.judge, _calls.repeat)
)
"""Columns in the order of `PendingCall`."""
_ITEMS = select(items.c.ordinal, items.c.item_key, items.c.content).where(
    items.c.workflow_execution_id == bindparam("run"), items.c.ordinal.between(bindparam("first"), bindparam("last"))
)
ENDED = ("completed", "failed", "skipped", "cancelled")


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A call that may be claimed now. `ordinal` is -1 for a reduce step."""

    id: int
    ordinal: int
    repeat: int
    route_index: int
    route_attempts: int
    attempts: int
    reasks: int
    window_id: int
    error_message: str | None
    error_code: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """A stored item: its key and its fields."""

    key: str
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepAnswers:
    """What the calls of one step about one item have come to.

    Attributes:
        open: calls that are not ended.
        values: answers of completed calls, by repeat.
        ended: statuses of ended calls.
    """

    open: int
    values: tuple[Any, ...]
    ended: tuple[str, ...]


def pending_calls(
    connection: Connection, window: int, step: str, provider: str, first: int, last: int
) -> list[PendingCall]:
    """The claimable calls of a shard: pending, due, and on this provider's route, in the order of their items."""
    chosen = {"window": window, "step": step, "provider": provider, "first": first, "last": last}
    return [PendingCall(*row) for row in connection.execute(_PENDING, chosen)]


def has_answers(connection: Connection, run: int) -> bool:
    """Whether any call of a run was ever answered."""
    answered = select(llm_usage.c.id).where(llm_usage.c.workflow_execution_id == run, llm_usage.c.status == "ok")
    return connection.execute(answered.limit(1)).first() is not None


def load_items(connection: Connection, run: int, first: int, last: int) -> dict[int, Item]:
    """The items of a range, by ordinal."""
    found = connection.execute(_ITEMS, {"run": run, "first": first, "last": last})
    return {row.ordinal: Item(row.item_key, json.loads(row.content)) for row in found}


def load_answers(
    connection: Connection, run: int, steps: Sequence[str], first: int, last: int
) -> dict[int, dict[str, StepAnswers]]:
    """What earlier steps said about a range of items, by ordinal and step. Reduce steps have the ordinal -1."""
    if not steps:
        return {}
    query = (
        select(_calls.item_ordinal, _calls.prompt_name, _calls.status, _calls.result)
        .where(
            _calls.workflow_execution_id == run,
            _calls.prompt_name.in_(steps),
            _calls.item_ordinal.between(first, last),
        )
        .order_by(_calls.item_ordinal, _calls.prompt_name, _calls.judge, _calls.repeat)
    )
    grouped: dict[int, dict[str, list[AnyRow]]] = {}
    for row in connection.execute(query):
        grouped.setdefault(row.item_ordinal, {}).setdefault(row.prompt_name, []).append(row)
    return {
        ordinal: {step: _step_answers(rows) for step, rows in by_step.items()} for ordinal, by_step in grouped.items()
    }


def _step_answers(rows: Sequence[AnyRow]) -> StepAnswers:
    ended = tuple(row.status for row in rows if row.status in ENDED)
    values = tuple(json.loads(row.result) for row in rows if row.status == "completed")
    return StepAnswers(len(rows) - len(ended), values, ended)


def load_verdicts(
    connection: Connection, run: int, steps: Sequence[str], first: int, last: int
) -> dict[int, dict[str, Any]]:
    """Places of the items of a range in rankings: `{"rank", "score"}` by ordinal and step."""
    if not steps:
        return {}
    query = select(verdicts).where(
        verdicts.c.workflow_execution_id == run,
        verdicts.c.step.in_(steps),
        verdicts.c.item_ordinal.between(first, last),
    )
    found: dict[int, dict[str, Any]] = {}
    for row in connection.execute(query):
        found.setdefault(row.item_ordinal, {})[row.step] = {"rank": row.rank, "score": row.score}
    return found


def best(connection: Connection, run: int, ranking: str, top: int) -> list[tuple[int, int, float]]:
    """The best places of a ranking as (ordinal, rank, score), best first."""
    query = (
        select(verdicts.c.item_ordinal, verdicts.c.rank, verdicts.c.score)
        .where(verdicts.c.workflow_execution_id == run, verdicts.c.step == ranking)
        .order_by(verdicts.c.position)
        .limit(top)
    )
    return [(row.item_ordinal, row.rank, row.score) for row in connection.execute(query)]


def count_ranked(connection: Connection, run: int, ranking: str) -> int:
    """How many items a ranking holds."""
    query = select(func.count()).where(verdicts.c.workflow_execution_id == run, verdicts.c.step == ranking)
    return connection.execute(query).scalar_one()


def reduce_totals(connection: Connection, run: int, segment: int, ranking: str | None) -> dict[str, int]:
    """What a reduce step may say about the whole: `items`, `completed`, `failed`, `skipped`, `ranked`.

    Failed and skipped are those of the segment that the step ends; `ranked` is 0 without a ranking.
    """
    query = select(
        func.coalesce(func.sum(windows.c.items_failed), 0).label("failed"),
        func.coalesce(func.sum(windows.c.items_skipped), 0).label("skipped"),
    ).where(windows.c.workflow_execution_id == run, windows.c.segment == segment, windows.c.step.is_(None))
    row = connection.execute(query).one()
    total = run_row(connection, run).items_total
    return {
        "items": total,
        "completed": total - int(row.failed) - int(row.skipped),
        "failed": int(row.failed),
        "skipped": int(row.skipped),
        "ranked": 0 if ranking is None else count_ranked(connection, run, ranking),
    }


def save_ranking(connection: Connection, run: int, step: str, places: Iterable[tuple[int, int, float]]) -> None:
    """Writes a ranking as (ordinal, rank, score), best first; one that was there before is replaced."""
    connection.execute(delete(verdicts).where(verdicts.c.workflow_execution_id == run, verdicts.c.step == step))
    statement = insert(verdicts).values(workflow_execution_id=run, step=step)
    rows = (
        {"position": position, "item_ordinal": ordinal, "rank": rank, "score": score}
        for position, (ordinal, rank, score) in enumerate(places)
    )
    while batch := list(islice(rows, 1000)):
        connection.execute(statement, batch)


def completed_answers(connection: Connection, run: int, step: str) -> Iterator[tuple[int, str, list[Any]]]:
    """All completed answers of an item step, streamed as (ordinal, item key, answers by repeat) in item order."""
    query = (
        select(_calls.item_ordinal, items.c.item_key, _calls.result)
        .join(
            items,
            (items.c.workflow_execution_id == _calls.workflow_execution_id) & (items.c.ordinal == _calls.item_ordinal),
        )
        .where(_calls.workflow_execution_id == run, _calls.prompt_name == step, _calls.status == "completed")
        .order_by(_calls.item_ordinal, _calls.judge, _calls.repeat)
        .execution_options(yield_per=1000)
    )
    last: tuple[int, str, list[Any]] | None = None
    for row in connection.execute(query):
        if last is not None and last[0] == row.item_ordinal:
            last[2].append(json.loads(row.result))
            continue
        if last is not None:
            yield last
        last = (row.item_ordinal, row.item_key, [json.loads(row.result)])
    if last is not None:
        yield last


def run_row(connection: Connection, run: int) -> AnyRow:
    """A run's row without locking it.

    Raises:
        LookupError: the run was deleted.
    """
    row = connection.execute(select(workflow_executions).where(workflow_executions.c.id == run)).one_or_none()
    if row is None:
        raise LookupError(f"run {run} does not exist")
    return row
