"""Turns a file of rows into items: checks all of them once, then streams them for loading.

`scan_items` reads everything in bounded memory and reports every problem with its line; `iter_items` reads the same
input again and yields items. Between the two, nothing is kept but the answer to "which rows". How rows are read from
each format is in `item_rows.py`.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
import shutil
import stat
import sys
import tempfile
import unicodedata
from array import array
from collections.abc import Generator, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import InvalidInput, Problem, did_you_mean
from orchestrator.item_json import to_json
from orchestrator.item_lines import Report, Row
from orchestrator.item_rows import Format, read_rows

KEY_FIELDS = ("id", "key", "item_key", "name")
"""Where an item's key is looked for, in this order, when no field is named."""

MAX_KEY_CHARS = 200

_SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_EXAMPLES = 3
_FIELD_ROWS = 100
_BUCKETS = 256


@dataclass(frozen=True, slots=True)
class Item:
    """One row to be judged.

    Attributes:
        key: Unique in its input, in NFC, at most 200 characters without control characters.
        ordinal: 0, 1, 2, ... in the order of the input, counted over the items that were chosen.
        content: The fields as plain JSON data.
        content_json: The same as compact JSON text, fields in their order.
    """

    key: str
    ordinal: int
    content: Mapping[str, Any]
    content_json: str


@dataclass(frozen=True, slots=True)
class ItemSource:
    """A readable file of rows; `name` is what messages call it."""

    path: Path
    format: Format
    name: str


@dataclass(frozen=True, slots=True)
class ItemsSummary:
    """What one reading of all rows found.

    Attributes:
        count: Items that `iter_items` will yield, given the same arguments and `selection`.
        sha256: Digest of the rows read and of the choice among them, in hex; equal input gives an equal digest.
        key_field: The field with the keys; None when the key is the digest of the content.
        fields: Names of the fields seen in the first rows, in order of appearance.
        examples: The contents of the first few items.
        selection: Row numbers (from 0) of the sample, or None for all.
        problems: The first problems, sorted by line; empty when the input can be loaded.
        problem_count: How many problems there are in all.
    """

    count: int
    sha256: str
    key_field: str | None
    fields: tuple[str, ...]
    examples: tuple[Mapping[str, Any], ...]
    selection: Set[int] | None
    problems: tuple[Problem, ...]
    problem_count: int

    def require(self) -> None:
        """Raise `InvalidInput` with the problems, if there are any."""
        if self.problems:
            raise InvalidInput(self.problems)


@contextmanager
def open_source(source: Path | str, kind: Format | None = None, stdin: BinaryIO | None = None) -> Generator[ItemSource]:
    """A source for `scan_items` and `iter_items`, as long as the context lasts.

    Args:
        source: A file, or `-` for standard input, which is copied to a temporary file because it is read twice.
        kind: The format; by default told from the suffix, and where that says nothing from the first bytes.
        stdin: Read instead of the process's standard input.

    Raises:
        InvalidInput: No such file, not a regular file, no input on standard input, or a format that is not read.
    """
    if str(source) != "-":
        path = Path(source)
        yield ItemSource(path, kind or _format_of(path, str(source)), str(source))
        return
    with tempfile.TemporaryDirectory(prefix="llm-orchestrator-") as directory:
        path = Path(directory) / "stdin"
        with path.open("wb") as spool:
            shutil.copyfileobj(_piped(stdin), spool, 1 << 20)
        yield ItemSource(path, kind or _format_of(path, "<stdin>"), "<stdin>")


def scan_items(
    source: ItemSource,
    key_field: str | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> ItemsSummary:
    """Read all rows once and report everything that is wrong with them. Keeps 8 bytes per row in memory.

    Args:
        source: The input.
        key_field: The field with the keys; None takes the first of `KEY_FIELDS` that the first row has, else the
            digest of the content.
        limit: Read no further than so many rows.
        sample: Choose so many of the rows read, by a hash of seed and key: the choice does not depend on their order,
            and hardly changes when rows are added.
        seed: Another seed, another sample.
    """
    scan = _Scan(source, key_field, limit)
    chosen = _Sampler(sample, seed) if sample is not None else None
    for number, key in enumerate(scan.keys()):
        if chosen and key is not None:
            chosen.offer(number, key)
    report = scan.finish()
    selection = chosen.selection() if chosen else None
    return ItemsSummary(
        count=scan.count if selection is None else len(selection),
        sha256=scan.digest(f"{sample}:{seed}" if chosen else ""),
        key_field=scan.key_field,
        fields=tuple(scan.fields),
        examples=tuple(scan.examples),
        selection=selection,
        problems=tuple(report.problems),
        problem_count=report.count,
    )


def iter_items(
    source: ItemSource,
    key_field: str | None = None,
    limit: int | None = None,
    selection: Set[int] | None = None,
) -> Iterator[Item]:
    """Yield the items, streaming. Pass what was passed to `scan_items`, and the `selection` of its summary.

    Raises:
        InvalidInput: A row is bad; the items before it were yielded. Does not happen after a scan without problems
            unless the file changed; keys are not compared with each other again.
    """
    report = Report(source.name)
    keys = _Keys(key_field, report)
    ordinal = 0
    for number, (line, content, _) in enumerate(_limited(source, limit, report)):
        key = keys.of(content, line)
        if report.problems:
            raise InvalidInput(report.problems)
        if key is not None and (selection is None or number in selection):
            yield Item(key, ordinal, content, to_json(content))
            ordinal += 1
    if report.problems:
        raise InvalidInput(report.problems)


class _Scan:
    """The state of one reading: digest, keys seen, names of fields, problems."""

    def __init__(self, source: ItemSource, key_field: str | None, limit: int | None) -> None:
        self.count = 0
        self.fields: dict[str, None] = {}
        self.examples: list[Mapping[str, Any]] = []
        self._source = source
        self._limit = limit
        self._report = Report(source.name)
        self._wanted = key_field
        self._keys = _Keys(key_field, self._report)
        self._digest = hashlib.sha256()
        self._seen = [array("q") for _ in range(_BUCKETS)]

    @property
    def key_field(self) -> str | None:
        return self._keys.field

    def keys(self) -> Iterator[str | None]:
        """The key of every row, None for a row without a good one."""
        digest, seen = self._digest, self._seen
        for line, content, raw in _limited(self._source, self._limit, self._report):
            digest.update(raw if raw is not None else to_json(content).encode())
            if self.count < _FIELD_ROWS:
                self._remember(content)
            self.count += 1
            key = self._keys.of(content, line)
            if key is not None:
                mark = hash(key)
                seen[mark % _BUCKETS].append(mark)
            yield key

    def digest(self, choice: str) -> str:
        """The digest of all rows and of how some were chosen among them."""
        self._digest.update(f"\n{self.key_field}\n{choice}".encode())
        return self._digest.hexdigest()

    def finish(self) -> Report:
        """Look for duplicate keys and for emptiness; the report is complete then."""
        if repeated := self._repeated():
            self._report_duplicates(repeated)
        if not self.count and not self._report.count:
            self._report.add("empty", "there are 0 items", hint="a header alone is no item")
        self._report.problems.sort(key=_line_of)
        return self._report

    def _remember(self, content: Mapping[str, Any]) -> None:
        self.fields.update(dict.fromkeys(content))
        if len(self.examples) < _EXAMPLES:
            self.examples.append(content)

    def _repeated(self) -> set[int]:
        """Hashes that occur more than once. One bucket at a time becomes a set, which keeps memory small."""
        repeated: set[int] = set()
        for bucket in self._seen:
            if len(once := set(bucket)) != len(bucket):
                for mark in bucket:
                    if mark in once:
                        once.discard(mark)
                    else:
                        repeated.add(mark)
        return repeated

    def _report_duplicates(self, repeated: set[int]) -> None:
        """Read again to learn the lines, and whether the keys are equal rather than only their hashes."""
        first: dict[str, int] = {}
        silent = Report(self._source.name)
        keys = _Keys(self._wanted, silent)
        for line, content, _ in _limited(self._source, self._limit, silent):
            key = keys.of(content, line)
            if key is None or hash(key) not in repeated:
                continue
            if key in first:
                shown = key if self.key_field else "the content"
                hint = None if self.key_field else "identical rows need a key of their own"
                message = f"the key {shown!r} was used in line {first[key]} already"
                self._report.add("duplicate-key", message, line, hint=hint)
            else:
                first[key] = line


class _Sampler:
    """Keeps the rows with the smallest hashes of seed and key."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._salt = seed.to_bytes(16, "big", signed=True)
        self._heap: list[tuple[int, int]] = []

    def offer(self, number: int, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=8, key=self._salt).digest()
        entry = (-int.from_bytes(digest, "big"), number)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def selection(self) -> frozenset[int]:
        return frozenset(number for _, number in self._heap)


class _Keys:
    """Finds the key of a row; which field holds it is settled by the first row."""

    def __init__(self, wanted: str | None, report: Report) -> None:
        self.field = wanted
        self._report = report
        self._is_settled = wanted is not None
        self._was_found = False
        self._was_missed = False

    def of(self, content: Mapping[str, Any], line: int) -> str | None:
        """The key in NFC, or None with the reason in the report."""
        if not self._is_settled:
            self.field = next((name for name in KEY_FIELDS if name in content), None)
            self._is_settled = True
        if self.field is None:
            return hashlib.sha256(to_json(content).encode("utf-8", "surrogatepass")).hexdigest()
        if self.field not in content:
            self._report_missing(self.field, content, line)
            return None
        self._was_found = True
        value = content[self.field]
        key = str(value) if type(value) is int else value
        if not isinstance(key, str):
            self._report.add("bad-key", f"the key {self.field!r} is neither text nor an integer", line)
            return None
        return self._checked(key, line)

    def _report_missing(self, name: str, content: Mapping[str, Any], line: int) -> None:
        """A field that no row has is one problem, not one for every row."""
        if self._was_found or not self._was_missed:
            hint = did_you_mean(name, content)
            self._report.add("missing-key", f"the row has no field {name!r}", line, hint=hint)
        self._was_missed = True

    def _checked(self, key: str, line: int) -> str | None:
        if key.isascii() and key.isprintable() and len(key) <= MAX_KEY_CHARS and not key.isspace() and key:
            return key
        if not key.isascii():
            key = unicodedata.normalize("NFC", key)
        if not key.strip():
            self._report.add("blank-key", f"the key {self.field!r} is blank", line)
        elif len(key) > MAX_KEY_CHARS:
            self._report.add(
                "bad-key", f"the key has {len(key):,} characters, at most {MAX_KEY_CHARS} are allowed", line
            )
        elif not key.isprintable() and _CONTROL.search(key):
            self._report.add("bad-key", "the key holds a control character", line)
        else:
            return key
        return None


def _limited(source: ItemSource, limit: int | None, report: Report) -> Iterator[Row]:
    """Rows up to the limit; nothing behind it is read, so nothing behind it is a problem."""
    if limit is not None and limit <= 0:
        return
    for number, row in enumerate(read_rows(source.path, source.format, report), 1):
        yield row
        if number == limit:
            return


def _line_of(problem: Problem) -> tuple[int, ...]:
    return tuple(int(part) for part in problem.place.rsplit(":", 2)[1:] if part.isdigit())


def _piped(stdin: BinaryIO | None) -> BinaryIO:
    stream = stdin or getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise InvalidInput(Problem("items.no-stdin", "standard input is closed", "<stdin>"))
    if stream.isatty():
        raise InvalidInput(Problem("items.no-stdin", "nothing is piped in", "<stdin>", "pipe rows, or name a file"))
    return stream


def _format_of(path: Path, name: str) -> Format:
    head = _head(path, name)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidInput(Problem("items.encoding", "the file is UTF-16", name, "save it as UTF-8"))
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise InvalidInput(Problem("items.compressed", "the file is compressed", name, "unpack it, or pipe it into -"))
    if (known := _SUFFIXES.get(path.suffix.lower())) is not None:
        return known
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"[", b"{")):
        return "json" if text.startswith(b"[") else "jsonl"
    return "tsv" if b"\t" in text.partition(b"\n")[0] else "csv"


def _head(path: Path, name: str) -> bytes:
    try:
        # A FIFO that nobody writes to would hang us, and cannot be read twice anyway.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInput(Problem("items.unreadable", f"cannot be read: {reason}", name)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidInput(Problem("items.not-regular", "a regular file is expected", name, "pipe it into -"))
    with os.fdopen(handle, "rb") as file:
        return file.read(4096)
