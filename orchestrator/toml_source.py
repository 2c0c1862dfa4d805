"""Parses TOML and remembers where every key stands.

`tomllib` tells no positions, yet a person who mistyped the third field of the fifth step wants to read a line number.
`parse_toml` lets `tomllib` decide what the document means and walks the same text a second time, only to note the
line and column of every key, header and array element. What the keys mean is for the callers: configuration and
workflow declarations.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.errors import InvalidInput, Problem
from orchestrator.plain_text import MAX_TEXT_BYTES, decode_text, read_text

KeyPath = tuple[str | int, ...]
"""Keys and array positions from the top of a document: `("steps", 2, "answer", "fields", "score")`."""

MAX_DEPTH = 32
"""Tables and arrays inside one another; people write five or six levels."""

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
_STRING = re.compile(
    r'''"""(?:\\[\s\S]|[^\\])*?"{3,5}|\'\'\'[\s\S]*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*\'''',
)
_BARE = re.compile(r"[^,\]}\s#]+(?: \d\d:\d\d[^,\]}\s#]*)?")
# tomllib needs time and memory quadratic in the parts of one dotted key, so such keys must not reach it.
_LONG_DOTTED = re.compile(rf"""(?<![\w"'.-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){{{MAX_DEPTH},}}""")
_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


class TomlDocument(NamedTuple):
    """What a document says, and where it says it."""

    data: dict[str, Any]
    """The parsed document, as `tomllib` gives it."""
    locate: Callable[[Sequence[str | int]], str]
    """Key path -> `name:line:column`. Parts that are not in the document are passed over, so the path of a missing
    key gives its table, and the empty path gives `name`."""


def parse_toml(source: Path | str | bytes, name: str | None = None, max_bytes: int = MAX_TEXT_BYTES) -> TomlDocument:
    """Parse a TOML file or text.

    Args:
        source: A `Path` is read; `str` and `bytes` are the document itself.
        name: What places call the document; for a path, the path itself is the default.
        max_bytes: Larger documents are refused.

    Raises:
        InvalidInput: Unreadable, too large, not UTF-8, not TOML, or nested too deeply; the place has line and column
            wherever there are any.
    """
    name = name or (str(source) if isinstance(source, Path) else "<toml>")
    text = _text(source, name, max_bytes).replace("\r\n", "\n")
    if long := _LONG_DOTTED.search(text):
        raise _too_deep(_Lines(name, text).place(long.start()))
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise _too_deep(name) from error
    # ValueError as well as its subclass TOMLDecodeError: a number of 5,000 digits is refused by int() itself.
    except ValueError as error:
        raise InvalidInput(_syntax_problem(error, name, text)) from error
    if _depth(data) > MAX_DEPTH:
        raise _too_deep(name)
    scanner = _Scanner(text)
    scanner.scan()
    return TomlDocument(data, _locator(_Lines(name, text), scanner.offsets))


def _text(source: Path | str | bytes, name: str, max_bytes: int) -> str:
    if isinstance(source, Path):
        return read_text(source, name, max_bytes)
    data = source if isinstance(source, bytes) else source.encode("utf-8", "surrogatepass")
    if len(data) > max_bytes:
        raise InvalidInput(Problem("file.too-large", f"the document is larger than {max_bytes:,} bytes", name))
    return decode_text(data, name)


def _too_deep(place: str) -> InvalidInput:
    return InvalidInput(Problem("toml.depth", f"nested deeper than {MAX_DEPTH} levels", place))


def _depth(data: object) -> int:
    """Levels of tables and arrays; a loop over levels, because the data may be deeper than the stack."""
    level: list[object] = [data]
    depth = 0
    while level := [child for node in level for child in _children(node)]:
        depth += 1
    return depth


def _children(node: Any) -> list[object]:
    match node:
        case dict():
            return list(node.values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        case list():
            return node  # pyright: ignore[reportUnknownVariableType]
        case _:
            return []


def _syntax_problem(error: ValueError, name: str, text: str) -> Problem:
    lines = _Lines(name, text)
    scanner = _Scanner(text)
    scanner.scan()
    if scanner.duplicate and not str(error).startswith(("Expected", "Unclosed", "Invalid", "Unterminated")):
        path, first, second = scanner.duplicate
        message = f"{dotted(path)!r} is set twice, first in line {lines.line(first)}"
        return Problem("toml.duplicate-key", message, lines.place(second), "keep one of them")
    message = str(error)
    at = _AT.search(message)
    place = f"{name}:{at[1]}:{at[2]}" if at and at[1] else lines.place(len(text)) if at else name
    return Problem("toml.syntax", _AT.sub("", message), place)


def dotted(path: Sequence[str | int]) -> str:
    """A key path as people write it: `steps[2].answer.score`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


class _Lines:
    """Turns offsets into places."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]

    def line(self, offset: int) -> int:
        return bisect_right(self._starts, offset)

    def place(self, offset: int) -> str:
        line = self.line(offset)
        return f"{self.name}:{line}:{offset - self._starts[line - 1] + 1}"


def _locator(lines: _Lines, offsets: dict[KeyPath, int]) -> Callable[[Sequence[str | int]], str]:
    def locate(path: Sequence[str | int]) -> str:
        known: KeyPath = ()
        for part in path:
            if (*known, part) in offsets:
                known = (*known, part)
        return lines.place(offsets[known]) if known else lines.name

    return locate


class _LostError(Exception):
    """The text is not TOML from here on."""


class _Scanner:
    """Notes the offset of every key, header and array element; stops quietly where the text is not TOML."""

    def __init__(self, text: str) -> None:
        self.offsets: dict[KeyPath, int] = {}
        self.duplicate: tuple[KeyPath, int, int] | None = None
        self._text = text
        self._at = 0
        self._array_tables: dict[KeyPath, int] = {}
        self._headers: set[KeyPath] = set()

    def scan(self) -> None:
        """Walk the whole text."""
        table: KeyPath = ()
        try:
            while self._skip_blank() < len(self._text):
                if self._text[self._at] == "[":
                    table = self._header()
                else:
                    self._pair(table, 0)
        except _LostError:
            return

    def _skip_blank(self) -> int:
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at

    def _next(self) -> str:
        """The next character that means something; empty at the end."""
        at = self._skip_blank()
        return self._text[at : at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if not found:
            raise _LostError
        self._at = found.end()
        return found[0]

    def _expect(self, token: str) -> None:
        if not self._text.startswith(token, self._at):
            raise _LostError
        self._at += len(token)

    def _header(self) -> KeyPath:
        start = self._at
        is_array = self._text.startswith("[[", start)
        self._at += 2 if is_array else 1
        self._skip_blank()
        keys = self._keys()
        self._skip_blank()
        self._expect("]]" if is_array else "]")
        path = self._resolve(keys, is_array)
        if path in self._headers and not self.duplicate:
            self.duplicate = (path, self.offsets[path], start)
        self._headers.add(path)
        self._note(path, start)
        return path

    def _resolve(self, keys: list[str], is_array: bool) -> KeyPath:
        """The path of a header: every array of tables on the way means its newest element."""
        path: KeyPath = ()
        for key in keys[:-1]:
            path = self._newest((*path, key))
        path = (*path, keys[-1])
        if is_array:
            self._array_tables[path] = self._array_tables.get(path, 0) + 1
        return self._newest(path)

    def _newest(self, path: KeyPath) -> KeyPath:
        count = self._array_tables.get(path)
        return path if count is None else (*path, count - 1)

    def _keys(self) -> list[str]:
        keys = [self._key()]
        while found := _DOT.match(self._text, self._at):
            self._at = found.end()
            keys.append(self._key())
        return keys

    def _key(self) -> str:
        raw = self._take(_KEY)
        if raw[0] == "'":
            return raw[1:-1]
        return _unescaped(raw) if raw[0] == '"' else raw

    def _pair(self, table: KeyPath, depth: int) -> None:
        start = self._at
        path = (*table, *self._keys())
        self._skip_blank()
        self._expect("=")
        if path in self.offsets and not self.duplicate:
            self.duplicate = (path, self.offsets[path], start)
        self._note(path, start)
        self._value(path, depth)

    def _note(self, path: KeyPath, start: int) -> None:
        """Keep the first position of a path and of every table that it creates on the way."""
        for length in range(1, len(path) + 1):
            self.offsets.setdefault(path[:length], start)

    def _value(self, path: KeyPath, depth: int) -> None:
        opening = self._next()
        if depth > MAX_DEPTH:
            raise _LostError
        if opening == "[":
            self._array(path, depth + 1)
        elif opening == "{":
            self._inline_table(path, depth + 1)
        else:
            self._take(_STRING if opening in {'"', "'"} else _BARE)

    def _array(self, path: KeyPath, depth: int) -> None:
        self._expect("[")
        index = 0
        while self._next() != "]":
            self._note((*path, index), self._at)
            self._value((*path, index), depth)
            index += 1
            if self._next() != "]":
                self._expect(",")
        self._expect("]")

    def _inline_table(self, path: KeyPath, depth: int) -> None:
        self._expect("{")
        while self._next() != "}":
            self._pair(path, depth)
            if self._next() != "}":
                self._expect(",")
        self._expect("}")


def _unescaped(raw: str) -> str:
    """The value of a basic string; an invalid escape ends the scan, as tomllib refuses the document anyway."""
    try:
        return str(tomllib.loads(f"key = {raw}")["key"])
    except tomllib.TOMLDecodeError as error:
        raise _LostError from error
