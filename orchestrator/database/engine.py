"""Connections to SQLite and Postgres that behave alike: one way to begin, one clock, short transactions.

SQLite runs in WAL mode with full synchronisation, and a writing transaction takes the write lock when it begins
(`BEGIN IMMEDIATE`): waiting happens at the start and never as a deadlock in the middle. Postgres runs at READ
COMMITTED; whoever decides on rows locks them first. Sessions on Postgres carry time-outs, so that a hung client
cannot block the others for long.

Of the idle connections a pool hands out the one used last, not the one that rested longest: what a connection
remembers (pages and statements on SQLite, prepared statements on Postgres) is then worth something, and those that a
quiet process does not need are never opened.
"""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Double,
    Engine,
    Row,
    create_engine,
    event,
    make_url,
    select,
)
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

AnyRow = Row[*tuple[Any, ...]]
"""A row of a query whose columns are named in the docstring of the function that returns it."""
SQLITE_BUSY_MS = 30_000
POSTGRES_OPTIONS = "-c statement_timeout=60000 -c lock_timeout=30000 -c idle_in_transaction_session_timeout=60000"


def parse_url(text: str) -> URL:
    """Reads a `DATABASE_URL` and fills in the driver we ship with.

    Returns:
        A URL for `sqlite` or `postgresql+psycopg`.

    Raises:
        ValueError: the text is no URL, or names another kind of database. The message holds no password.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError("DATABASE_URL is not a URL; expected sqlite:///FILE or postgresql://HOST/NAME") from None
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite":
            if url.database in (None, "", ":memory:"):
                raise ValueError("DATABASE_URL names no file; every process of a run must see the same database")
            return url.set(drivername="sqlite")
        case "postgres" | "postgresql" | "postgresql+psycopg":
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise ValueError(f"DATABASE_URL names {other!r}; expected sqlite:///FILE or postgresql://HOST/NAME")


def open_engine(url: URL, pool_size: int = 6) -> Engine:
    """Opens an engine; nothing is connected yet. The directory of an SQLite file is created when it connects first.

    Args:
        url: from `parse_url`.
        pool_size: connections kept; threads beyond it wait.
    """
    if url.drivername == "sqlite":
        return _open_sqlite(url, pool_size)
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_use_lifo=True,
        pool_pre_ping=True,
        pool_timeout=30,
        connect_args={
            "connect_timeout": 10,
            "options": POSTGRES_OPTIONS,
            "keepalives": 1,
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # Keepalives are not sent while data waits to be acknowledged, and the kernel's own patience is 15 minutes.
            "tcp_user_timeout": 30_000,
            "application_name": "llm-orchestrator",
        },
    )


def _open_sqlite(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_use_lifo=True,
        connect_args={"timeout": SQLITE_BUSY_MS / 1000, "check_same_thread": False},
    )

    directory = Path(url.database or "").parent

    @event.listens_for(engine, "do_connect")
    def make_directory(*_: object) -> None:  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
        # What cannot be made is told by the driver a moment later, as the error that every caller knows.
        with suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
        # The driver's own BEGIN comes late and takes no write lock; ours is emitted below.
        if isinstance(
            connection.driver_connection if hasattr(connection, "driver_connection") else connection, sqlite3.Connection
        ):
            connection.isolation_level = None
        cursor = connection.cursor()
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_MS}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(cursor: DBAPICursor) -> None:
    """Switches a file to WAL, which takes it exclusively for a moment and does not wait for others that do the same."""
    deadline = monotonic() + SQLITE_BUSY_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                raise
            Event().wait(0.01)
        else:
            return


class _Clock(FunctionElement[float]):
    """One element for both databases, so that statements with it can be built once, when a module is loaded."""

    inherit_cache = True
    type: TypeEngine[float] = Double()


@compiles(_Clock)
def _postgres_clock(_element: _Clock, _compiler: SQLCompiler, **_: Any) -> str:  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
    return "CAST(EXTRACT(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(_Clock, "sqlite")
def _sqlite_clock(_element: _Clock, _compiler: SQLCompiler, **_: Any) -> str:  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
    return "((julianday('now') - 2440587.5) * 86400.0)"


NOW: ColumnElement[float] = _Clock()
"""The database's clock as a column: seconds since the epoch, with at least milliseconds."""


def clock(connection: Connection) -> float:
    """The database's clock: seconds since the epoch."""
    return connection.execute(select(NOW)).scalar_one()


@contextmanager
def writing(engine: Engine) -> Generator[Connection]:
    """One transaction that writes; commits at the end, rolls back when the block raises."""
    with _connect(engine).execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Generator[Connection]:
    """One transaction that only reads: a consistent picture on SQLite, read-committed on Postgres."""
    with _connect(engine) as connection, connection.begin():
        yield connection


def _connect(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except PoolTimeout as error:
        # All connections are waiting for the database: for our callers the same as no connection at all.
        raise OperationalError("connect", None, error) from error
