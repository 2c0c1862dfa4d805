"""Reads small text files with care, and says what text may be stored.

Whatever a person hands in as a file (configuration, workflow, template) comes through `read_text`: regular files
only, so that a FIFO cannot hang us, with a cap on size, as UTF-8. `unstorable` is the one rule for text that goes into
a database: Postgres refuses NUL, and no driver can encode a lone surrogate, so neither is accepted anywhere and a run
that works on a laptop works on a cluster.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from orchestrator.errors import InvalidInput, Problem

MAX_TEXT_BYTES = 1_000_000
"""Cap of a configuration, workflow or template file; the largest honest ones have some tens of kilobytes."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def read_text(path: Path, name: str | None = None, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The whole content of a regular UTF-8 file, without a byte order mark.

    Args:
        path: The file; symlinks are followed.
        name: What messages call it; the path by default.
        max_bytes: Files above this size are refused unread.

    Raises:
        InvalidInput: Missing, not a regular file, unreadable, too large, not UTF-8, or with NUL in it.
    """
    return decode_text(read_bytes(path, name, max_bytes), name or str(path))


def read_bytes(path: Path, name: str | None = None, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a regular file; same arguments and refusals as `read_text`, without those about its text."""
    place = name or str(path)
    try:
        # Opening a FIFO that nobody writes to would wait for ever without O_NONBLOCK.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise InvalidInput(_unreadable(place, error)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidInput(Problem("file.not-regular", "a regular file is expected", place))
    with os.fdopen(handle, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InvalidInput(Problem("file.too-large", f"the file is larger than {max_bytes:,} bytes", place))
    return data


def decode_text(data: bytes, name: str) -> str:
    """`data` as text, without a byte order mark.

    Raises:
        InvalidInput: Not UTF-8 (the place is the offending line), or with NUL in it.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[1:200:2].count(0) > len(data[1:200:2]) // 2:
        raise InvalidInput(Problem("file.encoding", "the file is UTF-16", name, "save it as UTF-8"))
    if (at := data.find(0)) >= 0:
        raise InvalidInput(Problem("file.nul", "the file holds a NUL byte", _place(name, data, at)))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset counts from behind a byte order mark.
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        hint = "save it as UTF-8; it may be Latin-1 or Windows-1252 now"
        message = f"byte 0x{data[at]:02x} is not UTF-8"
        raise InvalidInput(Problem("file.encoding", message, _place(name, data, at), hint)) from error


def unstorable(text: str) -> str | None:
    """Why `text` cannot be stored, or None when it can: it holds NUL or a lone surrogate."""
    # isascii() is a flag lookup, which spares most text the search for surrogates.
    if "\x00" in text:
        return "holds a NUL character"
    if text.isascii() or _UNSTORABLE.search(text) is None:
        return None
    return "holds a lone surrogate, which is no character"


def _unreadable(place: str, error: Exception) -> Problem:
    match error:
        case FileNotFoundError():
            return Problem("file.missing", "no such file", place)
        case OSError():
            return Problem("file.unreadable", f"cannot be read: {error.strerror or error}", place)
        case _:
            return Problem("file.unreadable", f"cannot be read: {error}", place)


def _place(name: str, data: bytes, at: int) -> str:
    line = data.count(b"\n", 0, at) + 1
    column = at - data.rfind(b"\n", 0, at)
    return f"{name}:{line}:{column}"
