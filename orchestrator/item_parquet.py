"""Reads rows from Parquet, with every value in its JSON form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from orchestrator.item_json import is_storable
from orchestrator.item_lines import Report, Row

_BATCH_ROWS = 1_000


def parquet_rows(path: Path, report: Report) -> Iterator[Row]:
    """Rows of a Parquet file; numbered from 1. Without pyarrow, the only result is a problem that says so."""
    # Loaded only now: pyarrow is an optional extra, and slow to load.
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        hint = "pip install 'llm-orchestrator[data]'"
        report.add("parquet-support", "reading Parquet needs pyarrow, which is not installed", hint=hint)
        return
    arrow_error: type[Exception] = import_module("pyarrow").ArrowException
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS):
            for values in batch.to_pylist():
                number += 1
                if (content := _plain_row(values, number, report)) is not None:
                    yield number, content, None
    except (arrow_error, OSError) as error:
        report.add("parquet", f"not a whole Parquet file: {str(error).splitlines()[0][:200]}", number)


def _plain_row(values: Mapping[str, object], number: int, report: Report) -> dict[str, Any] | None:
    content: dict[str, Any] = {}
    for name, value in values.items():
        try:
            content[name] = _plain(value)
        except TypeError as error:
            report.add("type", f"column {name!r}: {error}", number)
            return None
    try:
        return content if is_storable(content, number, report) else None
    except ValueError:
        report.add("number", "NaN and infinities are no values", number)
        return None


def _plain(value: Any) -> object:
    """A value of Arrow's as JSON: times as ISO 8601, decimals as text with all their digits, maps as objects."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return str(value)
        case dict():
            items = cast("dict[str, object]", value)
            return {str(name): _plain(inner) for name, inner in items.items()}
        case list():
            return _plain_list(cast("list[Any]", value))
        case _:
            raise TypeError(f"{type(value).__name__} has no form in JSON")


def _plain_list(values: list[Any]) -> object:
    # Arrow gives a map as pairs.
    if values and all(isinstance(pair, tuple) for pair in values):
        return {str(name): _plain(inner) for name, inner in cast("list[tuple[object, object]]", values)}
    return [_plain(inner) for inner in values]
