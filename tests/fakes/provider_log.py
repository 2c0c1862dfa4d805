"""The fake provider's own book: one line when a request arrives, one when it is answered.

Tests compare it with the product's ledger. Lines are written with one `os.write` each before the answer leaves, so
they are there even when the server is killed right afterwards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Received:
    """A request that arrived. Times are seconds; `mono` is comparable within one server process only."""

    number: int
    attempt_id: str
    mono: float
    wall: float
    model: str
    prompt_hash: str
    input_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """How a request ended; `status` 0 is a connection that was cut. `billed` means that an answer was generated."""

    number: int
    attempt_id: str
    mono: float
    wall: float
    status: int
    fault: str
    input_tokens: int
    output_tokens: int
    billed: bool


@dataclass(frozen=True, slots=True)
class ProviderLog:
    """All that a server wrote, in order."""

    received: tuple[Received, ...]
    answered: tuple[Answered, ...]

    def statuses(self) -> dict[int, int]:
        """Count answers by status."""
        counts: dict[int, int] = {}
        for line in self.answered:
            counts[line.status] = counts.get(line.status, 0) + 1
        return counts


def read_log(path: Path) -> ProviderLog:
    """Read a log file; a last line that is still being written is left out."""
    received: list[Received] = []
    answered: list[Answered] = []
    text = path.read_text("utf-8")
    for line in text[: text.rfind("\n") + 1].splitlines():
        fields: dict[str, Any] = json.loads(line)
        if fields.pop("event") == "received":
            received.append(Received(**fields))
        else:
            answered.append(Answered(**fields))
    return ProviderLog(tuple(received), tuple(answered))
