"""How actions speak: data on stdout, everything else on stderr, JSON or tables.

Text from models and files is escaped before it reaches a terminal, so that nothing in an answer can steer it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.errors import ExitCode, OrchestratorError
from orchestrator.logs import escape_control

PIPE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


class Refused(OrchestratorError):
    """The command line asks for something that cannot be done as it was typed."""

    exit_code = ExitCode.USAGE


def console(*, err: bool = False) -> Console:
    """A console on stdout or stderr; without escapes unless it is a terminal."""
    stream = sys.stderr if err else sys.stdout
    return Console(stderr=err, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=False)


def put_json(value: Any, *, indent: int | None = 2) -> None:
    """A value as JSON on stdout, flushed, so that a reader of a pipe sees it at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n")
    sys.stdout.flush()


def put_event(event: str, **fields: Any) -> None:
    """One JSON line on stdout, with its kind first."""
    put_json({"event": event, **fields}, indent=None)


def say(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(escape_control(text), err=True)


def safe(value: Any) -> Text:
    """A value as inert text of one line."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Text(escape_control(" ".join(text.split())))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Table:
    """A table; columns whose name ends with `>` are set flush right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(safe(value) for value in row))
    return made


def facts(values: Mapping[str, Any]) -> Table:
    """Names and values below each other."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in values.items():
        if value is not None:
            made.add_row(name, safe(value))
    return made


def duration(seconds: float | None) -> str:
    """Seconds for a person: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
