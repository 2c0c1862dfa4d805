"""Reads rows from JSON lines and from a JSON array, strictly, and writes the JSON that is stored.

The array is decoded element by element, so a file of any size needs the memory of one row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

from orchestrator.item_lines import MAX_ROW_BYTES, Report, Row, decoded, numbered_lines
from orchestrator.plain_text import unstorable

_CHUNK_CHARS = 1 << 16
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_LINE_ENDS = ("\n", "", "\r\n")
_NAME_END = re.compile(rb'"[ \t\r]*:')
_SPACE = re.compile(r"[ \t\r\n]*")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json(content: Mapping[str, Any]) -> str:
    """The fields as compact JSON, in their order.

    Raises:
        ValueError: NaN or an infinity is among the values.
        RecursionError: Nested too deeply.
    """
    return _ENCODER.encode(content)


def storage_problem(content: Mapping[str, Any]) -> str | None:
    """Why the fields cannot be stored, or None when they can; see `plain_text.unstorable`."""
    text = to_json(content)
    # JSON writes NUL as an escape, in which a backslash of the text itself must not be seen.
    return unstorable("\x00") if _ESCAPED_NUL.search(text) else unstorable(text)


class _StrictJson:
    """Decodes JSON and notes what a lenient parser would let pass: duplicate keys, NaN, numbers out of range."""

    def __init__(self) -> None:
        self.faults: list[tuple[str, str]] = []
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_float=self._float
        )

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.faults.append(("duplicate-field", f"the key {twice!r} stands twice in one object"))
        return content

    def _constant(self, name: str) -> None:
        self.faults.append(("number", f"{name} is no JSON number"))

    def _float(self, text: str) -> float:
        value = float(text)
        if value - value != 0:
            self.faults.append(("number", "a number is too large"))
        return value


class _PlainLines:
    """Decodes lines that are plain enough to be sound for certain, at half the cost; leaves all others alone.

    A million rows are checked before the first call is sent, so a user waits for this.
    """

    def __init__(self) -> None:
        self._is_faulty = False
        decoder = json.JSONDecoder(parse_constant=self._constant, parse_float=self._float)
        self._scan: Callable[[str, int], tuple[object, int]] = decoder.scan_once  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # documented in json.decoder's source only

    def read(self, raw: bytes) -> dict[str, Any] | None:
        """The fields of a line with one object; None when it must be read strictly, whether it is bad or not."""
        try:
            text = raw.decode()
            content, end = self._scan(text, 0)
        except (ValueError, StopIteration, RecursionError):
            return None
        if self._is_faulty:
            self._is_faulty = False
            return None
        if not isinstance(content, dict) or b"\\u" in raw or text[end:] not in _LINE_ENDS:
            return None
        fields = cast("dict[str, Any]", content)
        # Every pair, of the object and of those inside it, has a colon: as many as fields means that none stands twice.
        if raw.count(b":") == len(fields) or len(_NAME_END.findall(raw)) == len(fields):
            return fields
        return None

    def _constant(self, _name: str) -> None:
        self._is_faulty = True

    def _float(self, text: str) -> float:
        value = float(text)
        if value - value != 0:
            self._is_faulty = True
        return value


def json_lines(file: BinaryIO, report: Report) -> Iterator[Row]:
    """Rows of a file with one object per line; blank lines are passed over."""
    strict = _StrictJson()
    plain = _PlainLines()
    for line, raw in numbered_lines(file, report):
        if (fields := plain.read(raw)) is not None:
            yield line, fields, raw
            continue
        text = decoded(raw, line, report)
        if not text or text.isspace():
            continue
        content = _parsed(text, line, strict, report)
        if isinstance(content, dict):
            yield line, cast("dict[str, Any]", content), raw


def _parsed(text: str, line: int, strict: _StrictJson, report: Report) -> object:
    """One line as an object; None, with the reason in the report, when it is none that can be stored."""
    strict.faults.clear()
    try:
        content: object = strict.decoder.decode(text)
        # A lone surrogate and NUL can only come from an escape: the bytes were valid UTF-8, and raw NUL is no JSON.
        if "\\u" in text and isinstance(content, dict) and not strict.faults:
            escaped = cast("dict[str, Any]", content)
            return escaped if is_storable(escaped, line, report) else None
    except RecursionError:
        report.add("depth", "nested too deeply", line)
    except json.JSONDecodeError as error:
        report.add("json", f"not JSON: {error.msg}", line, error.colno)
    except ValueError:
        report.add("number", "a number has too many digits", line)
    else:
        return _sound(cast("object", content), line, strict, report)
    return None


def _sound(content: object, line: int, strict: _StrictJson, report: Report) -> object:
    for code, message in strict.faults:
        report.add(code, message, line)
    if strict.faults:
        return None
    if not isinstance(content, dict):
        report.add("not-an-object", f"an object is expected, not {_json_type(content)}", line)
        return None
    return cast("dict[str, Any]", content)


def _json_type(value: object) -> str:
    match value:
        case list():
            return "an array"
        case str():
            return "a string"
        case bool():
            return "a boolean"
        case None:
            return "null"
        case _:
            return "a number"


def is_storable(content: dict[str, Any], line: int, report: Report) -> bool:
    """Whether all texts in the fields can be stored; if not, the reason is in the report.

    Raises:
        ValueError: As `to_json`.
        RecursionError: As `to_json`.
    """
    fault = storage_problem(content)
    if fault:
        report.add("text", f"a text {fault}", line, hint="remove the character")
    return fault is None


def json_array(file: BinaryIO, report: Report) -> Iterator[Row]:
    """Rows of a file that is one array of objects; a syntax error ends the reading, a bad element does not."""
    yield from _ArrayReader(file, report).rows()


class _ArrayReader:
    """Decodes the elements of an array one by one from a buffer that holds little more than one of them."""

    def __init__(self, file: BinaryIO, report: Report) -> None:
        self._file = file
        self._report = report
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._strict = _StrictJson()
        self._buffer = ""
        self._at = 0
        self._is_complete = False
        self._has_escape = False
        self._line = 1
        self._forgotten = 0

    def rows(self) -> Iterator[Row]:
        """All elements that can be stored."""
        try:
            yield from self._elements()
        except UnicodeDecodeError:
            self._report.add("encoding", "not UTF-8 from here on", self._line, hint="save the file as UTF-8")
        except json.JSONDecodeError as error:
            self._report.add("json", f"not JSON: {error.msg}", *self._place(error))
        except RecursionError:
            self._report.add("depth", "nested too deeply", self._line)
        except ValueError:
            self._report.add("number", "a number has too many digits", self._line)

    def _elements(self) -> Iterator[Row]:
        if self._next() != "[":
            hint = "an array of objects is expected; one object per line is JSONL"
            self._report.add("json", "not a JSON array", self._line, hint=hint)
            return
        self._at += 1
        is_first = True
        while (sign := self._next()) != "]":
            if not is_first:
                self._comma(sign)
            line = self._line
            element = _sound(self._element(), line, self._strict, self._report)
            if isinstance(element, dict):
                content = cast("dict[str, Any]", element)
                if not self._has_escape or is_storable(content, line, self._report):
                    yield line, content, None
            is_first = False
        self._at += 1
        if self._next():
            self._fail("text after the end of the array")

    def _comma(self, sign: str) -> None:
        if sign != ",":
            self._fail("a comma or ] is expected")
        self._at += 1
        if self._next() == "]":
            self._fail("a comma before ]")

    def _element(self) -> object:
        """The next element; reads on until it is whole, within the cap."""
        while True:
            self._strict.faults.clear()
            try:
                element, end = self._strict.decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError:
                if self._is_complete:
                    raise
            else:
                # A number at the end of the buffer may go on in the next chunk; an object cannot.
                if isinstance(element, dict) or end < len(self._buffer) or self._is_complete:
                    self._has_escape = self._buffer.find("\\u", self._at, end) >= 0
                    self._consume(end)
                    return cast("object", element)
            pending = len(self._buffer) - self._at
            if pending > MAX_ROW_BYTES:
                self._fail(f"not JSON, or longer than {MAX_ROW_BYTES:,} characters")
            self._fill(max(_CHUNK_CHARS, pending))

    def _next(self) -> str:
        """The next character that is no space, not yet consumed; empty at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            self._consume(found.end() if found else self._at)
            if self._at < len(self._buffer) or self._is_complete:
                return self._buffer[self._at : self._at + 1]
            self._fill(_CHUNK_CHARS)

    def _consume(self, end: int) -> None:
        self._line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _fill(self, size: int) -> None:
        """Read more, and forget what is consumed; what was forgotten of the current line still counts for columns."""
        newline = self._buffer.rfind("\n", 0, self._at)
        self._forgotten = self._at - newline - 1 if newline >= 0 else self._forgotten + self._at
        data = self._file.read(size)
        self._is_complete = not data
        self._buffer = self._buffer[self._at :] + self._decode(data, self._is_complete)
        self._at = 0

    def _place(self, error: json.JSONDecodeError) -> tuple[int, int]:
        """Line and column of an error in the buffer."""
        newline = error.doc.rfind("\n", 0, error.pos)
        column = error.pos - newline if newline >= 0 else self._forgotten + error.pos + 1
        return self._line + error.doc.count("\n", self._at, error.pos), column

    def _fail(self, message: str) -> None:
        raise json.JSONDecodeError(message, self._buffer, self._at)
