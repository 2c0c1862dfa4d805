"""How a run, its items and its windows come into the database.

Items come in batches, each batch with its windows in one transaction, so a run of a million items needs the memory of
one batch, and its first windows can be worked on while the last items are still being read.

All functions work inside the caller's transaction.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from orchestrator.database import budgets
from orchestrator.database.engine import NOW
from orchestrator.database.runs import OPEN_RUN
from orchestrator.database.tables import items, windows, workflow_executions

_runs = workflow_executions.c


def create_run(connection: Connection, values: dict[str, Any], limit_nusd: int | None) -> int:
    """Writes a run and its budget; returns the run's number."""
    statement = insert(workflow_executions).values(**values, producer_at=NOW).returning(_runs.id)
    run = connection.execute(statement).scalar_one()
    budgets.set_limit(connection, budgets.run_scope(run), limit_nusd)
    return run


def set_limits(connection: Connection, limits: Mapping[str, int | None]) -> None:
    """Sets what a configuration says of budgets by scope, in nano-USD; those that it does not limit exist as well."""
    for scope, limit_nusd in limits.items():
        budgets.configure(connection, scope, limit_nusd)


def add_items(connection: Connection, run: int, rows: Sequence[tuple[int, str, str]]) -> None:
    """Stores items as (ordinal, key, JSON text) and counts them. Ordinals continue where the last batch ended."""
    connection.execute(
        insert(items).values(workflow_execution_id=run),
        [{"ordinal": ordinal, "item_key": key, "content": content} for ordinal, key, content in rows],
    )
    statement = update(workflow_executions).where(_runs.id == run)
    connection.execute(statement.values(items_total=rows[-1][0] + 1, producer_at=NOW))


def add_windows(
    connection: Connection, run: int, segment: int, ranges: Iterable[tuple[int, int]], step: str | None = None
) -> list[int]:
    """Adds pending windows behind those that the segment has; returns their ids."""
    own = (windows.c.workflow_execution_id == run) & (windows.c.segment == segment)
    number = connection.execute(select(func.coalesce(func.max(windows.c.number), -1)).where(own)).scalar_one()
    added: list[int] = []
    for first, last in ranges:
        number += 1
        statement = insert(windows).values(
            workflow_execution_id=run,
            segment=segment,
            number=number,
            step=step,
            first_ordinal=first,
            last_ordinal=last,
            status="pending",
        )
        added.append(connection.execute(statement.returning(windows.c.id)).scalar_one())
    return added


def complete_input(connection: Connection, run: int) -> None:
    """Notes that all items are stored."""
    connection.execute(update(workflow_executions).where(_runs.id == run).values(input_complete=True))


def unfinished(connection: Connection, identity: str) -> str | None:
    """Id of the newest run of an identity that has not ended; None if there is none."""
    query = select(_runs.run_id).where(_runs.identity == identity, _runs.status.in_(OPEN_RUN))
    return connection.execute(query.order_by(_runs.id.desc()).limit(1)).scalar_one_or_none()
