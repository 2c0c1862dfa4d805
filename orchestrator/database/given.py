"""Many rows in one statement: the rows stand in front of it as the table `given`, on SQLite and Postgres alike.

A driver's `executemany` steps through its rows one by one. On SQLite each step hands Python's lock to the event loop's
thread and waits to get it back, so a batch took as long as the loop pleased; on Postgres each row is a statement of its
own. One statement over `given` is one step, whatever the number of rows.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Delete, Dialect, Insert, Update, column, table
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from sqlalchemy.sql.elements import KeyedColumnElement
from sqlalchemy.types import TypeEngine

SIZES = (64, 32, 16, 8, 4, 2, 1)
"""Rows in one statement: far fewer than either database takes, and a few sizes only, so that most statements are
found prepared."""


class Given:
    """The shape of the rows that a statement is given.

    Args:
        types: type by name, in the order in which the values are sent.
    """

    def __init__(self, **types: TypeEngine[Any]) -> None:
        self._types = types
        self._table = table("given", *(column(name, type_) for name, type_ in types.items()))

    @property
    def c(self) -> ReadOnlyColumnCollection[str, KeyedColumnElement[Any]]:
        """The columns, for building the statement."""
        return self._table.c

    def execute(
        self, connection: Connection, statement: Update | Insert | Delete, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Runs a statement over all rows; does nothing without any.

        Args:
            connection: the caller's transaction.
            statement: names columns of `c` and has no parameters of its own but constants. Of several rows that meet
                the same stored row, an update takes any one.
            rows: each with every name; further names are left out.
        """
        start = 0
        for size in SIZES:
            while len(rows) - start >= size:
                self._execute(connection, statement, rows[start : start + size])
                start += size

    def _execute(
        self, connection: Connection, statement: Update | Insert | Delete, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        names, dialect = tuple(self._types), connection.dialect
        processors = [type_.dialect_impl(dialect).bind_processor(dialect) for type_ in self._types.values()]
        bound = tuple(zip(names, processors, strict=True))
        values = tuple(row[name] if process is None else process(row[name]) for row in rows for name, process in bound)
        sqlite = dialect.name == "sqlite"
        # Postgres takes the types of the columns from the first row; SQLite's values bring their own.
        types = () if sqlite else tuple(type_.compile(dialect) for type_ in self._types.values())
        head = _head(names, types, len(rows), "?" if sqlite else "%s")
        connection.exec_driver_sql(f"{head} {_text(statement, dialect)}", values)


@lru_cache(maxsize=512)
def _head(names: tuple[str, ...], types: tuple[str, ...], rows: int, mark: str) -> str:
    plain = ", ".join(mark for _ in names)
    first = ", ".join(f"CAST({mark} AS {type_})" for type_ in types) or plain
    values = ", ".join([f"({first})"] + [f"({plain})"] * (rows - 1))
    return f"WITH given ({', '.join(names)}) AS (VALUES {values})"


@lru_cache(maxsize=64)
def _text(statement: Update | Insert | Delete, dialect: Dialect) -> str:
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
