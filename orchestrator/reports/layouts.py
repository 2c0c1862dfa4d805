"""Result rows as files: JSON Lines, CSV, Markdown, HTML and Parquet; and the JSON document that a run leaves behind.

All of them are written row by row. JSON Lines loses nothing and is the default; the others are for spreadsheets and
readers, so answers that are objects become JSON text in one cell, and nothing in a cell can act: a spreadsheet would
run a cell that begins with `=`, a browser would run a tag.
"""

import csv
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.database import Database, reports
from orchestrator.errors import EnvironmentNotReady, Problem
from orchestrator.files import FileManager
from orchestrator.reports.document import document_pieces

Format = Literal["jsonl", "csv", "md", "html", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
COLUMNS = (
    "item_key",
    "step",
    "status",
    "answer",
    "quality_score",
    "provider",
    "model",
    "attempts",
    "cost_usd",
    "error",
)
_SUFFIXES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".md": "md",
    ".html": "html",
    ".htm": "html",
    ".parquet": "parquet",
}
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_PARQUET_ROWS = 5000

Rows = Iterable[Mapping[str, Any]]


def format_of(path: Path) -> Format | None:
    """The format that a file's suffix asks for; None when it says nothing."""
    return _SUFFIXES.get(path.suffix.lower())


def layout(rows: Rows, wanted: Literal["jsonl", "csv", "md", "html"], title: str) -> Iterator[str]:
    """Rows as text in pieces, each ending with a line break."""
    match wanted:
        case "jsonl":
            return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        case "csv":
            return _csv(rows)
        case "md":
            return _markdown(rows, title)
        case "html":
            return _html(rows, title)


def write_parquet(rows: Rows, target: Path) -> None:
    """Writes rows as a Parquet file; answers and errors are JSON text.

    Raises:
        EnvironmentNotReady: pyarrow is not installed.
    """
    try:
        # Loaded only now: pyarrow is an optional extra, and slow to load.
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        hint = "install llm-orchestrator[data]"
        problem = Problem("parquet.missing", "writing Parquet needs pyarrow, which is not installed", str(target), hint)
        raise EnvironmentNotReady(problem) from None
    kinds = {"quality_score": pyarrow.float64(), "attempts": pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COLUMNS])
    with parquet.ParquetWriter(target, schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append({**row, "answer": _json_text(row["answer"]), "error": _json_text(row["error"])})
            if len(batch) == _PARQUET_ROWS:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()
        if batch:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))


def save_run(database: Database, files: FileManager, run: int) -> Path:
    """Writes the JSON document of a run that ends now below the home directory. Safe to repeat.

    Raises:
        LookupError: the run does not exist.
        EnvironmentNotReady: the file cannot be written.
    """
    with database.snapshot() as connection:
        status = reports.final_status(connection, run)
        started = datetime.fromisoformat(status["started_at"]).astimezone(UTC)
        pieces = document_pieces(connection, run, status=status)
        return files.save_results(started.date(), status["workflow"], pieces, status["run_id"])


def _csv(rows: Rows) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_csv_cell(row[name]) for name in COLUMNS])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return "" if value is None else value
    text = value if isinstance(value, str) else _json_text(value) or ""
    # A spreadsheet takes such a cell for a formula; the quote makes it text.
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _markdown(rows: Rows, title: str) -> Iterator[str]:
    yield f"# {_markdown_cell(title)}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
    for row in rows:
        yield f"| {' | '.join(_markdown_cell(row[name]) for name in COLUMNS)} |\n"


def _markdown_cell(value: Any) -> str:
    text = html.escape(_plain(value), quote=False)
    for mark in ("\\", "|", "`", "[", "]", "!"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _html(rows: Rows, title: str) -> Iterator[str]:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{html.escape(title)}</title>'
        "<style>body{font:14px system-ui;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #bbb;padding:.3em .6em;text-align:left;vertical-align:top;white-space:pre-wrap}"
        f"</style></head><body><h1>{html.escape(title)}</h1><table><thead><tr>{head}</tr></thead><tbody>\n"
    )
    for row in rows:
        yield "<tr>" + "".join(f"<td>{html.escape(_plain(row[name]))}</td>" for name in COLUMNS) + "</tr>\n"
    yield "</tbody></table></body></html>\n"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _json_text(value) or ""


def _json_text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
