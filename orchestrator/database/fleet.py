"""The workers that are alive, and the locks that only one of them may hold at a time.

A worker beats its heart by updating its row; one whose last beat is older than its own lease counts as dead, by the
database's clock and nobody else's. Freeing what dead workers held is one transaction: calls go back, attempts that
were sent are booked as unknown at their worst price, and the worker's row goes away, so nobody frees twice.

All functions work inside the caller's transaction.
"""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, Select, delete, insert, literal, literal_column, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator.database import ledger, runs, windows
from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.tables import llm_usage, locks, prompt_executions, workers, workflow_executions

# As text, and not as parameters: only so does SQLite see that the partial index holds these rows. Every heartbeat asks,
# and there may be millions of attempts.
_IS_OPEN = llm_usage.c.status.in_([literal_column(f"'{status}'") for status in ledger.OPEN_ATTEMPT])
FIRST_LOOK_S = 5.0
"""After so many seconds a provider is first asked about an attempt of unknown outcome; each later wait is four times
as long as the one before."""
MOST_LOOKS = 6


@dataclass(frozen=True, slots=True)
class Freed:
    """What dead workers left: how many workers, calls put back, and attempts of unknown outcome."""

    workers: int
    calls: int
    unknown: int


def register(connection: Connection, worker: str, queues: str, version: str, lease_s: float) -> None:
    """Enters a worker; its first heartbeat is now."""
    connection.execute(
        insert(workers).values(
            id=worker,
            queues=queues,
            version=version,
            lease_seconds=lease_s,
            started_at=NOW,
            heartbeat_at=NOW,
        )
    )


def beat(connection: Connection, worker: str, in_flight: int, bound_by: str | None) -> bool:
    """Renews a worker's lease; False when it was taken for dead meanwhile and must register anew."""
    statement = (
        update(workers).where(workers.c.id == worker).values(heartbeat_at=NOW, in_flight=in_flight, bound_by=bound_by)
    )
    return connection.execute(statement).rowcount == 1


def queues_served(connection: Connection) -> set[str]:
    """The queues on which a live worker listens."""
    alive = workers.c.heartbeat_at >= NOW - workers.c.lease_seconds
    served = connection.execute(select(workers.c.queues).where(alive)).scalars()
    return {queue for queues in served for queue in queues.split(",")}


def sign_off(connection: Connection, worker: str) -> Freed:
    """Removes a worker that stops in good order and puts back what it still held."""
    return _free(connection, [worker], lost=False)


def free_dead(connection: Connection, looker: str = "") -> Freed:
    """Frees what dead workers held, and calls whose worker is not known at all.

    Args:
        connection: the caller's transaction.
        looker: the worker that looks: it is alive, however long its database was away from it.
    """
    too_old = workers.c.heartbeat_at < NOW - workers.c.lease_seconds
    dead = select(workers.c.id).where(too_old, workers.c.id != looker)
    gone = list(connection.execute(dead.with_for_update(skip_locked=True)).scalars())
    known = select(workers.c.id)
    orphaned = select(prompt_executions.c.worker_id).where(
        prompt_executions.c.status == "running", prompt_executions.c.worker_id.not_in(known)
    )
    stray = select(llm_usage.c.worker_id).where(_IS_OPEN, llm_usage.c.worker_id.not_in(known))
    gone += [name for name in connection.execute(orphaned.union(stray)).scalars() if name is not None]
    return _free(connection, gone, lost=True) if gone else Freed(0, 0, 0)


def held_calls(connection: Connection, worker: str) -> set[int]:
    """Calls that a worker holds, or of which it has an open attempt."""
    return set(connection.execute(_held([worker]).union(_with_open_attempts([worker]))).scalars())


def free_strays(connection: Connection, worker: str, strays: set[int]) -> Freed:
    """Frees calls that a live worker holds and has forgotten, because something unforeseen ended its work on them."""
    calls = [call for call in runs.hold_calls_of(connection, [worker]) if call in strays]
    return Freed(0, len(calls), _free_calls(connection, [worker], calls, strays, lost=True))


def _free(connection: Connection, gone: list[str], *, lost: bool) -> Freed:
    with_attempts = set(connection.execute(_with_open_attempts(gone)).scalars())
    # All of them at once, in the order of their ids, as everybody locks them.
    runs.lock_calls(connection, {*with_attempts, *connection.execute(_held(gone)).scalars()})
    calls = runs.hold_calls_of(connection, gone)
    unknown = _free_calls(connection, gone, calls, with_attempts, lost=lost)
    connection.execute(delete(workers).where(workers.c.id.in_(gone)))
    return Freed(len(set(gone)), len(calls), unknown)


def _held(holders: list[str]) -> Select[int]:
    calls = prompt_executions.c
    return select(calls.id).where(calls.worker_id.in_(holders), calls.status == "running")


def _with_open_attempts(holders: list[str]) -> Select[int]:
    return select(llm_usage.c.prompt_execution_id).where(llm_usage.c.worker_id.in_(holders), _IS_OPEN)


def _free_calls(
    connection: Connection, holders: list[str], calls: list[int], with_attempts: set[int], *, lost: bool
) -> int:
    rows = runs.lock_calls(connection, with_attempts)
    attempts = ledger.find_attempts(connection, with_attempts).values()
    open_ones = [row for row in attempts if row.status in ledger.OPEN_ATTEMPT and row.worker_id in holders]
    unknown = ledger.book_unknown(connection, open_ones)
    windows.forget_sums(connection, (rows[row.prompt_execution_id].window_id for row in open_ones))
    runs.add_costs(connection, [(row.prompt_execution_id, 0, 0, row.reserved_nusd) for row in open_ones])
    runs.free_calls(connection, calls, lost=lost, uncertain=[row.prompt_execution_id for row in open_ones])
    return unknown


def to_look_up(connection: Connection, providers: Collection[str], most: int) -> list[AnyRow]:
    """Attempts of unknown outcome to ask providers about now; each look is counted, and the next one comes later.

    Columns: run_id, workflow_execution_id, prompt_execution_id, number, step, provider, model.
    """
    columns = llm_usage.c
    waits_s = FIRST_LOOK_S * literal(1).op("<<")(2 * columns.looks)
    due = (columns.status == "unknown") & (columns.looks < MOST_LOOKS) & (columns.settled_at < NOW - waits_s)
    query = (
        select(
            workflow_executions.c.run_id,
            columns.workflow_execution_id,
            columns.prompt_execution_id,
            columns.number,
            columns.step,
            columns.provider,
            columns.model,
            columns.id,
        )
        .join(workflow_executions, workflow_executions.c.id == columns.workflow_execution_id)
        .where(due, columns.provider.in_(providers))
        .order_by(columns.id)
        .limit(most)
    )
    rows = list(connection.execute(query))
    if rows:
        looked = update(llm_usage).where(columns.id.in_([row.id for row in rows]))
        connection.execute(looked.values(looks=columns.looks + 1))
    return rows


def take_lock(connection: Connection, name: str, owner: str, seconds: float) -> bool:
    """Takes or renews a named lock for some seconds; False while somebody else holds it."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(locks).values(name=name, owner=owner, until_at=NOW + seconds)
    statement = statement.on_conflict_do_update(
        index_elements=["name"],
        set_={"owner": statement.excluded.owner, "until_at": statement.excluded.until_at},
        where=or_(locks.c.owner == owner, locks.c.until_at < NOW),
    )
    return connection.execute(statement.returning(locks.c.owner)).scalar_one_or_none() == owner
