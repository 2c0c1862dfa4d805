"""Answers that were paid for once, kept for equal calls in this run and in others.

The key is a hash of everything that shapes the answer (see `workers.client`), so an entry is never wrong, only old.
All functions work inside the caller's transaction.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, String, Table, bindparam, delete, func, select, true
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator.database.given import Given
from orchestrator.database.tables import prompt_executions, result_cache, workflow_executions


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An answer worth keeping for equal calls.

    Attributes:
        key: hash of everything that shapes the answer.
        prompt_hash: hash of the messages alone.
        result: JSON text.
        ttl_s: seconds for which it may be used.
    """

    key: str
    prompt_hash: str
    result: str
    ttl_s: float


def find(connection: Connection, keys: Iterable[str]) -> Mapping[str, str]:
    """The stored results (JSON text) of those keys that are known and not expired, by key."""
    found = connection.execute(_FIND, {"keys": list(keys), "moment": datetime.now(UTC)})
    return {row.cache_key: row.result for row in found}


def store(connection: Connection, entries: Sequence[CacheEntry]) -> None:
    """Keeps results; a newer one replaces an older one of the same key."""
    if not entries:
        return
    started = datetime.now(UTC)
    rows = {
        entry.key: {
            "cache_key": entry.key,
            "prompt_hash": entry.prompt_hash,
            "result": entry.result,
            "created_at": started,
            "expires_at": started + timedelta(seconds=entry.ttl_s),
        }
        for entry in entries
    }
    # Sorted, so that two workers that store the same keys wait for each other instead of deadlocking.
    _kept.execute(connection, _STORE[connection.dialect.name], [rows[key] for key in sorted(rows)])


_kept = Given(
    cache_key=String(),
    prompt_hash=String(),
    result=result_cache.c.result.type,
    created_at=result_cache.c.created_at.type,
    expires_at=result_cache.c.expires_at.type,
)


def _store(make: Callable[[Table], sqlite.Insert | postgresql.Insert]) -> sqlite.Insert | postgresql.Insert:
    # SQLite takes an ON CONFLICT behind a SELECT for a join unless there is a condition in between.
    statement = make(result_cache).from_select(_kept.c.keys(), select(*_kept.c).where(true()))
    newer = {name: statement.excluded[name] for name in ("result", "created_at", "expires_at")}
    return statement.on_conflict_do_update(index_elements=["cache_key"], set_=newer)


_STORE = {"sqlite": _store(sqlite.insert), "postgresql": _store(postgresql.insert)}
_FIND = select(result_cache.c.cache_key, result_cache.c.result).where(
    result_cache.c.cache_key.in_(bindparam("keys", expanding=True)), result_cache.c.expires_at > bindparam("moment")
)


def purge(connection: Connection, *, everything: bool = False, older_than: timedelta | None = None) -> int:
    """Removes expired results, or those kept for longer than a time, or all of them; returns how many."""
    statement = delete(result_cache)
    if older_than is not None:
        statement = statement.where(result_cache.c.created_at <= datetime.now(UTC) - older_than)
    elif not everything:
        statement = statement.where(result_cache.c.expires_at <= datetime.now(UTC))
    return connection.execute(statement).rowcount


def stats(connection: Connection) -> dict[str, int]:
    """How much is kept, and what it was good for.

    Returns:
        `entries`, `expired` ones among them, `bytes` of JSON text; `hits`: calls of all runs that it answered, and
        `saved_nusd`: what these answers had cost.
    """
    columns = result_cache.c
    expired = func.count().filter(columns.expires_at <= datetime.now(UTC))
    size = func.coalesce(func.sum(func.length(columns.result)), 0)
    row = connection.execute(select(func.count(), expired, size)).one()
    saved = savings(connection)
    return {
        "entries": row[0],
        "expired": row[1],
        "bytes": int(row[2]),
        "hits": sum(one.hits for one in saved),
        "saved_nusd": sum(one.saved_nusd for one in saved),
    }


@dataclass(frozen=True, slots=True)
class Savings:
    """What the cache did for one run: calls answered, and the nano-USD that these answers had cost."""

    run_id: str
    hits: int
    saved_nusd: int


def savings(connection: Connection) -> list[Savings]:
    """What the cache did for every run that it answered anything, newest first."""
    calls, runs = prompt_executions.c, workflow_executions.c
    query = (
        select(runs.run_id, func.count(), func.sum(calls.saved_nusd))
        .join(workflow_executions, runs.id == calls.workflow_execution_id)
        .where(calls.cached.is_(True))
        .group_by(runs.id, runs.run_id)
        .order_by(runs.id.desc())
    )
    return [Savings(row[0], row[1], int(row[2])) for row in connection.execute(query)]
