"""Everything durable. The only home of SQLAlchemy and Alembic; SQLite and Postgres behave alike behind it.

`Database` opens connections and carries the owner's five verbs. The modules beside it hold one idea each:

| module | holds |
|---|---|
| `tables` | every table |
| `runs`, `windows` | life of run, call and window: the only writers of a status |
| `ledger` | attempts, reservations, budgets, settlements: the only writer of money |
| `batches` | claim and settlement of many calls in one transaction |
| `intake`, `work` | what a producer writes, what a shard reads |
| `fleet` | live workers and locks |
| `cache`, `reports` | paid answers kept; what people ask afterwards |
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache as once
from importlib import import_module
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from orchestrator.database import batches, cache, costs, intake, revisions
from orchestrator.database.cache import CacheEntry
from orchestrator.database.engine import AnyRow, clock, open_engine, parse_url, reading, writing

__all__ = ["AnyRow", "CacheEntry", "Connection", "Database", "DatabaseUnavailable", "SchemaOutdated", "clock"]

DatabaseUnavailable = DBAPIError
"""What a transaction raises when the database cannot be reached or refuses; repeated by `workers.writer` alone."""


class SchemaOutdated(Exception):
    """The database is not at this release's revision.

    Attributes:
        found: its revision; None for an empty database.
        wanted: the revision of this release.
    """

    def __init__(self, found: str | None, wanted: str) -> None:
        self.found = found
        self.wanted = wanted
        super().__init__(f"the database is at revision {found or 'none'}, this release needs {wanted}")


class Database:
    """A database and its connection pool. Thread-safe; one object per process.

    Args:
        url: as in `DATABASE_URL`; nothing is connected yet.
        pool_size: connections kept.

    Raises:
        ValueError: the URL is not one we understand.
    """

    def __init__(self, url: str, pool_size: int = 6) -> None:
        self._url = parse_url(url)
        self._engine = open_engine(self._url, pool_size)

    @property
    def engine(self) -> Engine:
        """The engine, for migrations and tests."""
        return self._engine

    @property
    def address(self) -> str:
        """The URL with the password masked."""
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def transaction(self) -> Generator[Connection]:
        """One short transaction that writes. Never hold it open while a provider thinks.

        Raises:
            DatabaseUnavailable: the database cannot be reached, or refuses.
        """
        with writing(self._engine) as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Generator[Connection]:
        """One transaction that reads."""
        with reading(self._engine) as connection:
            yield connection

    def migrate(self) -> None:
        """Brings the schema to this release. Safe to repeat, and safe when several processes do it at once.

        Raises:
            DatabaseUnavailable: it does not answer.
            SchemaOutdated: a newer release wrote it.
        """
        found = revisions.current_revision(self._engine)
        if found is not None and not revisions.is_known(found):
            raise SchemaOutdated(found, revisions.head_revision())
        _migrate().upgrade(self._engine)

    def check(self) -> None:
        """Proves that the database answers and is at this release's revision.

        Raises:
            DatabaseUnavailable: it does not answer.
            SchemaOutdated: it needs `db upgrade`, or a newer release.
        """
        with self.snapshot() as connection:
            connection.execute(text("SELECT 1"))
        found, wanted = revisions.current_revision(self._engine), revisions.head_revision()
        if found != wanted:
            raise SchemaOutdated(found, wanted)

    def is_prepared(self) -> bool:
        """Whether the database is at this release's revision; does not create a file for SQLite.

        Raises:
            DatabaseUnavailable: it does not answer.
        """
        if self._url.drivername == "sqlite" and not Path(self._url.database or "").exists():
            return False
        return revisions.current_revision(self._engine) == revisions.head_revision()

    def save_workflow_execution(self, values: dict[str, object], limit_nusd: int | None) -> int:
        """Writes a new run with its budget; returns its number in this database."""
        with self.transaction() as connection:
            return intake.create_run(connection, values, limit_nusd)

    def save_prompt_execution(self, settlements: Sequence[batches.Settlement]) -> list[bool]:
        """Writes outcomes of calls with their costs, all or none; False for those taken over by another worker."""
        with self.transaction() as connection:
            return batches.settle(connection, settlements)

    def track_llm_usage(self, run: int) -> dict[str, int]:
        """What a run has used so far: `cost_nusd`, `unconfirmed_nusd`, and tokens `input`, `output`, `cached`."""
        with self.snapshot() as connection:
            return costs.totals(connection, run)

    def cache_result(self, entries: Sequence[CacheEntry]) -> None:
        """Keeps answers for equal calls. Safe to repeat."""
        with self.transaction() as connection:
            cache.store(connection, entries)

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()


@once
def _migrate() -> Any:
    """The module `migrate`, loaded by those who migrate: Alembic costs 11 MB and 0.07 s, which few have to spend."""
    return import_module("orchestrator.database.migrate")
