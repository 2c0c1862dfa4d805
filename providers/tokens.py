"""How many tokens a text probably has, and how many it has at most, without any vocabulary file.

The estimate follows character classes (words, digits, punctuation, scripts) and is meant for rate limits and cost
forecasts; it is usually within -15 % and +45 % of the o200k vocabulary. The upper bound counts bytes, because a
byte-level tokenizer never makes more tokens than there are bytes; budgets reserve with it. Both run in C string
operations, since at thousands of calls a second a loop over characters would be the largest part of a worker's time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from providers.messages import Message

TOKENS_PER_MESSAGE = 4
TOKENS_PER_REQUEST = 10
UPPER_TOKENS_PER_MESSAGE = 16
# What adapters or services write around a schema to explain it to the model.
UPPER_TOKENS_PER_SCHEMA = 64

# First UTF-8 byte of a character -> class, and what one character of that class weighs in tokens.
_SCRIPTS: tuple[tuple[int, int, bytes, float], ...] = (
    (0xC0, 0xCF, b"L", 0.5),  # accented Latin, Greek
    (0xD0, 0xD7, b"Y", 0.3),  # Cyrillic
    (0xD8, 0xDF, b"R", 0.45),  # Arabic
    (0xE0, 0xE0, b"I", 0.4),  # Indic scripts
    (0xE1, 0xE2, b"O", 1.0),  # typographic signs and the rest
    (0xE3, 0xED, b"C", 0.85),  # Chinese, Japanese, Korean
    (0xEE, 0xEF, b"O", 0.0),  # counted with the row above
    (0xF0, 0xFF, b"E", 2.0),  # emoji
)
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


def _class_table() -> bytes:
    table = bytearray(b"." * 256)
    for byte in range(128):
        char = chr(byte)
        if char.isalpha():
            table[byte] = ord("A" if char.isupper() else "a")
        elif char.isdigit():
            table[byte] = ord("0")
        elif char.isspace():
            table[byte] = ord("n" if char == "\n" else " ")
    for first, last, name, _ in _SCRIPTS:
        table[first : last + 1] = name * (last + 1 - first)
    return bytes(table)


_CLASSES = _class_table()
_ONLY_LETTERS = bytes(ord("a") if byte in b"aA" else ord(" ") for byte in range(256))


def estimate_tokens(text: str) -> int:
    """Return the probable number of tokens of a text, rounded up; 0 for an empty text."""
    data = text.encode("utf-8", "replace")
    if text.isascii():
        return math.ceil(_ascii_weight(data.translate(_CLASSES)))
    classes = data.translate(_CLASSES, _CONTINUATION_BYTES)
    foreign = sum(classes.count(name) * weight for _, _, name, weight in _SCRIPTS if weight)
    return math.ceil(foreign + _ascii_weight(classes))


def estimate_messages(messages: Sequence[Message], answer_schema: Mapping[str, object] | None = None) -> int:
    """Return the probable number of input tokens of a request."""
    total = sum(estimate_tokens(message.content) for message in messages)
    if answer_schema is not None:
        total += estimate_tokens(json.dumps(answer_schema))
    return total + TOKENS_PER_MESSAGE * len(messages) + TOKENS_PER_REQUEST


def upper_bound(messages: Sequence[Message], answer_schema: Mapping[str, object] | None = None) -> int:
    """Return a number of input tokens that no byte-level tokenizer exceeds for this request."""
    total = sum(len(message.content.encode("utf-8", "replace")) for message in messages)
    if answer_schema is not None:
        total += len(json.dumps(answer_schema)) + UPPER_TOKENS_PER_SCHEMA
    return total + UPPER_TOKENS_PER_MESSAGE * len(messages) + TOKENS_PER_REQUEST


def _ascii_weight(classes: bytes) -> float:
    """Weigh words, capitals inside words, digits in threes, punctuation and blank runs, given one class per byte."""
    letters = classes.translate(_ONLY_LETTERS)
    words = len(letters.split()) + 0.7 * letters.count(b"aaaaaaaaa") + 0.8 * classes.count(b"aA")
    tripled = classes.replace(b"000", b"#")
    numbers = tripled.count(b"#") + tripled.count(b"0") - tripled.count(b"00")
    lines = classes.count(b"n") - classes.count(b"nn")
    return words + numbers + 0.75 * classes.count(b".") + 0.9 * lines + 0.3 * classes.count(b"  ")
