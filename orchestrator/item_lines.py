"""What all readers of rows share: the report, the cap, and numbered lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from orchestrator.errors import MAX_PROBLEMS, Problem

Row = tuple[int, dict[str, Any], bytes | None]
"""Line (in Parquet: row number), fields, and the bytes of the row where they are at hand."""

MAX_ROW_BYTES = 4_000_000
"""Cap of one row; a model's whole context window fits in."""


@dataclass(slots=True)
class Report:
    """Collects problems: keeps the first ones, counts all.

    Attributes:
        name: What places call the input.
        problems: The first `MAX_PROBLEMS` of them.
        count: How many there were.
    """

    name: str
    problems: list[Problem] = field(default_factory=list[Problem])
    count: int = 0

    def add(self, code: str, message: str, line: int = 0, column: int = 0, hint: str | None = None) -> None:
        """Note a problem; line and column 0 mean the input as a whole, or the line as a whole."""
        self.count += 1
        if len(self.problems) < MAX_PROBLEMS:
            place = ":".join([self.name, *(str(number) for number in (line, column) if number)])
            self.problems.append(Problem(f"items.{code}", message, place, hint))


def numbered_lines(file: BinaryIO, report: Report) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends; those over the cap are reported and passed over."""
    line = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) <= MAX_ROW_BYTES:
            yield line, raw
            continue
        hint = "lines end in CR alone: save the file with LF or CRLF" if raw.count(b"\r") > 1 else None
        report.add("too-large", f"the line is longer than {MAX_ROW_BYTES:,} bytes", line, hint=hint)
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_ROW_BYTES)


def decoded(raw: bytes, line: int, report: Report) -> str | None:
    """The text of a line, or None with the reason in the report."""
    if b"\x00" in raw:
        report.add("nul", "the line holds a NUL byte", line, raw.index(b"\x00") + 1)
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        hint = "save the file as UTF-8; it may be Latin-1 or Windows-1252 now"
        report.add("encoding", f"byte 0x{raw[error.start]:02x} is not UTF-8", line, error.start + 1, hint)
        return None
