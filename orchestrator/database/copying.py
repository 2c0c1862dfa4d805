"""Copies of a whole SQLite database, and how Postgres's own programs reach theirs.

A copy is consistent although runs go on: SQLite copies page by page under a read lock, which stops nobody in WAL mode.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError


class NotACopy(Exception):
    """A file is no sound copy of a database of ours; the message says why."""


def copy_out(engine: Engine, target: Path) -> None:
    """Writes a copy of an SQLite database to a file that does not exist yet; one file, without a log beside it."""
    with closing(engine.raw_connection()) as raw, closing(sqlite3.connect(target)) as copy:
        _driver(raw.driver_connection).backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")


def copy_in(engine: Engine, source: Path) -> None:
    """Replaces the content of an SQLite database by that of a copy, all or nothing.

    Raises:
        DatabaseUnavailable: somebody works with it.
    """
    with closing(engine.raw_connection()) as raw, closing(_open(source)) as copy:
        try:
            copy.backup(_driver(raw.driver_connection))
        except sqlite3.Error as error:
            raise DBAPIError("restore", None, error) from error


def revision_of(source: Path) -> str:
    """The revision of a copy that is sound.

    Raises:
        NotACopy: it is not.
    """
    try:
        with closing(_open(source)) as copy:
            (state,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
            if state != "ok":
                raise NotACopy(f"it is damaged: {state}")
            (revision,) = copy.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(revision)
    except (sqlite3.Error, TypeError) as error:
        raise NotACopy(f"it is no database of ours: {error}") from error


def postgres_address(engine: Engine) -> tuple[str, str | None]:
    """The address for `pg_dump` and `pg_restore` without the password, and the password; None without one."""
    url = engine.url
    plain = url.set(drivername="postgresql", password=None)  # pyright: ignore[reportArgumentType]  # None removes it
    return plain.render_as_string(hide_password=False), url.password


def _open(source: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)


def _driver(connection: object) -> sqlite3.Connection:
    if not isinstance(connection, sqlite3.Connection):
        raise TypeError("only an SQLite database is copied by itself")
    return connection
