"""Reads rows from CSV, TSV, JSONL, a JSON array or Parquet, in bounded memory, and says what is wrong in which line.

Every reader is a generator of `Row`; it reports what it cannot read and goes on behind it, so that one reading finds
every bad row of a large file. Which rows make valid items is decided in `items.py`.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from orchestrator.item_json import json_array, json_lines
from orchestrator.item_lines import MAX_ROW_BYTES, Report, Row, decoded, numbered_lines
from orchestrator.item_parquet import parquet_rows

Format = Literal["csv", "tsv", "jsonl", "json", "parquet"]

_DELIMITERS = ",;\t|"


def read_rows(path: Path, kind: Format, report: Report) -> Iterator[Row]:
    """All readable rows of a file, in order; everything else goes into the report.

    Raises:
        OSError: The file cannot be opened or read.
    """
    if kind == "parquet":
        yield from parquet_rows(path, report)
        return
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        match kind:
            case "csv" | "tsv":
                yield from _delimited(file, kind, report)
            case "jsonl":
                yield from json_lines(file, report)
            case "json":
                yield from json_array(file, report)


def _delimited(file: BinaryIO, kind: Literal["csv", "tsv"], report: Report) -> Iterator[Row]:
    # The cap is the csv module's only setting for it, and holds for the whole process.
    csv.field_size_limit(MAX_ROW_BYTES)
    start = file.tell()
    delimiter = "\t" if kind == "tsv" else _delimiter(file.readline(MAX_ROW_BYTES))
    file.seek(start)
    texts = (decoded(raw, line, report) or "\n" for line, raw in numbered_lines(file, report))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for line, cells in _csv_rows(reader, report):
        if header is None:
            header = _header(cells, line, report)
        elif len(cells) != len(header):
            report.add("ragged", f"{len(cells)} fields, where the header has {len(header)}", line)
        else:
            yield line, dict(zip(header, cells, strict=True)), None


def _csv_rows(reader: Any, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line in which they begin; after a bad one, reading goes on with the line behind it."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.add("csv", _csv_message(str(error)), line)
            continue
        if cells:
            yield line, cells


def _csv_message(error: str) -> str:
    if "unexpected end of data" in error or "field larger" in error:
        return "a quote that opens here is never closed"
    if "new-line character" in error:
        return "a line ends in CR alone; save the file with LF or CRLF"
    return f"not CSV: {error}"


def _delimiter(first_line: bytes) -> str:
    """The delimiter that stands most often in the header, outside of quotes; a comma when there is none."""
    bare = re.sub(r'"[^"]*"', "", first_line.decode(errors="replace"))
    return max(_DELIMITERS, key=bare.count)


def _header(cells: list[str], line: int, report: Report) -> list[str]:
    names = [cell.strip() for cell in cells]
    for column, name in enumerate(names, 1):
        if not name:
            report.add("header", f"column {column} has no name", line)
        elif name in names[: column - 1]:
            report.add("header", f"column {name!r} stands twice in the header", line)
    return names
