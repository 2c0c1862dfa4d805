"""Many rows in one statement: the rows stand in front of it as the table `given`, on SQLite and Postgres alike.

A driver's `executemany` steps through its rows one by one. On SQLite each step hands Python's lock to the event loop's
thread and waits to get it back, so a batch took as long as the loop pleased; on Postgres each row is a statement of its
own. One statement over `given` is one step, whatever the number of rows.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Delete, Dialect, Insert, Update, column, table
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from sqlalchemy.sql.elements import KeyedColumnElement
from sqlalchemy.types import TypeEngine

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows in one statement: far fewer than either database takes, and a few sizes only, so that most statements are
found prepared. What a batch leaves of a size is filled with empty rows, which the statement does not see."""


class Given:
    """The shape of the rows that a statement is given.

    Args:
        types: type by name, in the order in which the values are sent. The first one is never NULL.
    """

    def __init__(self, **types: TypeEngine[Any]) -> None:
        self._types = types
        self._processors: dict[str, list[tuple[str, Any]]] = {}
        self._texts: dict[tuple[Update | Insert | Delete, str, int], str] = {}
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
        bound = self._bound(connection.dialect)
        for start in range(0, len(rows), SIZES[-1]):
            some = rows[start : start + SIZES[-1]]
            size = SIZES[bisect_left(SIZES, len(some))]
            values = [row[name] if process is None else process(row[name]) for row in some for name, process in bound]
            values += [None] * ((size - len(some)) * len(bound))
            connection.exec_driver_sql(self._text(statement, connection.dialect, size), tuple(values))

    def _bound(self, dialect: Dialect) -> Sequence[tuple[str, Any]]:
        """Names, and what turns their values into what the driver takes."""
        known = self._processors.get(dialect.name)
        if known is None:
            types = self._types.items()
            known = [(name, type_.dialect_impl(dialect).bind_processor(dialect)) for name, type_ in types]
            self._processors[dialect.name] = known
        return known

    def _text(self, statement: Update | Insert | Delete, dialect: Dialect, rows: int) -> str:
        place = (statement, dialect.name, rows)
        known = self._texts.get(place)
        if known is None:
            known = self._texts[place] = f"{self._head(dialect, rows)} {_compiled(statement, dialect)}"
        return known

    def _head(self, dialect: Dialect, rows: int) -> str:
        sqlite = dialect.name == "sqlite"
        plain = ", ".join("?" if sqlite else "%s" for _ in self._types)
        # Postgres takes the types of the columns from the first row; SQLite's values bring their own.
        typed = ", ".join(f"CAST(%s AS {type_.compile(dialect)})" for type_ in self._types.values())
        values = ", ".join([f"({plain if sqlite else typed})"] + [f"({plain})"] * (rows - 1))
        names = ", ".join(self._types)
        filled = f"SELECT * FROM (VALUES {values}) AS filled WHERE column1 IS NOT NULL"  # noqa: S608 - holds no value
        return f"WITH given ({names}) AS ({filled})"


def _compiled(statement: Update | Insert | Delete, dialect: Dialect) -> str:
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
