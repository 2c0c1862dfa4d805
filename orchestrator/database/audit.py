"""The audit log: who changed what and when, in a chain of hashes that shows any later edit.

A row is appended in the transaction of the change itself, so there is no change without a row and no row without a
change. Each row carries the hash of the one before and a hash over itself; editing, removing, inserting or reordering
rows breaks the chain at the exact place. Rows cut off at the end are missed only by someone who noted an earlier
head, which is why `verify` tells the head and takes one.

All functions work inside the caller's transaction.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, text

from orchestrator.database.engine import NOW
from orchestrator.database.tables import audit_log, storable
from orchestrator.database.times import iso_epoch

FIRST = "0" * 64
"""What stands for the hash of the row before the first one."""
# Any number will do as long as everybody uses the same: appends wait for each other on Postgres.
_APPEND_LOCK = 5_381_772
_PAGE = 1000
_columns = audit_log.c


@dataclass(frozen=True, slots=True)
class Change:
    """What one row tells.

    Attributes:
        actor: who: a person as user@host or under a name given by hand, or a worker.
        action: what, as noun and verb: `run.pause`, `limits.set`.
        run: id of the run; None if it is about no single run.
        subject: what else it is about; None for nothing.
        old: the state before, as JSON data; None if there was none.
        new: the state after.
    """

    actor: str
    action: str
    run: str | None = None
    subject: str | None = None
    old: Any = None
    new: Any = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What checking the chain came to.

    Attributes:
        rows: how many were read.
        head: hash of the last one.
        broken: number of the first row that does not fit; None when all do.
        reason: what is wrong with it, or with the head that was asked for; None when nothing is.
    """

    rows: int
    head: str
    broken: int | None = None
    reason: str | None = None


def append(connection: Connection, change: Change) -> None:
    """Adds a row behind the last one."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _APPEND_LOCK})
    last = connection.execute(select(_columns.hash).order_by(_columns.id.desc()).limit(1)).scalar_one_or_none()
    row: dict[str, Any] = {
        "at": connection.execute(select(NOW)).scalar_one(),
        "actor": storable(change.actor),
        "action": change.action,
        "run": change.run,
        "subject": None if change.subject is None else storable(change.subject),
        "old": None if change.old is None else _canonical(change.old),
        "new": None if change.new is None else _canonical(change.new),
        "prev_hash": last or FIRST,
    }
    connection.execute(insert(audit_log).values(**row, hash=_hash(row)))


def verify(connection: Connection, head: str | None = None) -> Verdict:
    """Follows the whole chain.

    Args:
        connection: the caller's transaction.
        head: a hash noted earlier, which must be found in the chain; None asks for none.
    """
    before, count, is_found = FIRST, 0, head is None
    for row in _rows(connection):
        count += 1
        if row["prev_hash"] != before:
            return Verdict(count, before, row["id"], "a row before it was removed, inserted or moved")
        if row["hash"] != _hash(row):
            return Verdict(count, before, row["id"], "it was edited")
        before = row["hash"]
        is_found = is_found or before == head
    return Verdict(count, before, None, None if is_found else "rows at the end were removed: that head is not there")


def entries(connection: Connection, run: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows as JSON data, newest first: `id`, `at`, `actor`, `action`, `run`, `subject`, `old`, `new`, `hash`.

    Args:
        connection: the caller's transaction.
        run: id of a run, to see its rows only.
        limit: at most so many; None for all.
    """
    query = select(audit_log).order_by(_columns.id.desc()).limit(limit)
    if run is not None:
        query = query.where(_columns.run == run)
    return [
        {
            "id": row.id,
            "at": iso_epoch(row.at),
            "actor": row.actor,
            "action": row.action,
            "run": row.run,
            "subject": row.subject,
            "old": _read(row.old),
            "new": _read(row.new),
            "hash": row.hash,
        }
        for row in connection.execute(query)
    ]


def _rows(connection: Connection) -> Iterator[RowMapping]:
    last = -1
    query = select(audit_log).order_by(_columns.id).limit(_PAGE)
    while page := connection.execute(query.where(_columns.id > last)).mappings().all():
        yield from page
        last = page[-1]["id"]


def _hash(row: Mapping[Any, Any]) -> str:
    told = {name: row[name] for name in ("at", "actor", "action", "run", "subject", "old", "new", "prev_hash")}
    return sha256(_canonical(told).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read(stored: str | None) -> Any:
    """The JSON of a column; as it stands if somebody made something else of it."""
    try:
        return None if stored is None else json.loads(stored)
    except ValueError:
        return stored
