"""Shows how a run goes on, on stderr: live on a terminal, a line every half minute elsewhere, or not at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from orchestrator.cli.actions.output import console, duration, say
from orchestrator.cli.options import Progress as Wanted

LINE_EVERY_S = 30.0
RATE_OVER_S = 10.0


class Display(Protocol):
    """Something that shows a status object."""

    def show(self, status: Mapping[str, Any]) -> None:
        """Shows the present status; called about every second."""
        ...

    def note(self, text: str) -> None:
        """Says something once."""
        ...


@contextmanager
def open_display(wanted: Wanted) -> Generator[Display]:
    """The display that fits: `auto` is live on a terminal and lines elsewhere."""
    if wanted == "none":
        yield _Silent()
    elif wanted == "plain" or not sys.stderr.isatty():
        yield _Lines()
    else:
        with _Live() as live:
            yield live


def ended_calls(status: Mapping[str, Any]) -> tuple[int, int]:
    """Calls that are over, and all of them."""
    calls = status["calls"]
    total = sum(calls.values())
    return total - calls["pending"] - calls["running"], total


def one_line(status: Mapping[str, Any], rate: float | None = None) -> str:
    """The status in one line."""
    done, total = ended_calls(status)
    items = status["items"]
    parts = [f"{status['run_id']}: {done:,} of {total:,} calls"]
    if items["failed"]:
        parts.append(f"{items['failed']:,} items failed")
    parts.append(f"${status['cost_usd']}")
    if rate:
        parts.append(f"{rate:,.1f} calls/s")
    if status["eta_seconds"] is not None:
        parts.append(f"about {duration(status['eta_seconds'])} left")
    if status["bound_by"]:
        parts.append(f"bound by {status['bound_by']}")
    parts += status["warnings"][:1]
    return ", ".join(parts)


class _Rate:
    """Calls per second over the last seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def after(self, done: int) -> float | None:
        clock = time.monotonic()
        self._seen = [(at, count) for at, count in self._seen if clock - at <= RATE_OVER_S] + [(clock, done)]
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else None


class _Silent:
    def show(self, status: Mapping[str, Any]) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        say(text)


class _Lines:
    def __init__(self) -> None:
        self._next_at = time.monotonic() + LINE_EVERY_S
        self._rate = _Rate()

    def show(self, status: Mapping[str, Any]) -> None:
        rate = self._rate.after(ended_calls(status)[0])
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + LINE_EVERY_S
            say(one_line(status, rate))

    def note(self, text: str) -> None:
        say(text)


class _Live:
    def __init__(self) -> None:
        self._rate = _Rate()
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("calls  {task.description}"),
            console=console(err=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, status: Mapping[str, Any]) -> None:
        done, total = ended_calls(status)
        rate = self._rate.after(done)
        told = one_line(status, rate).partition("calls, ")[2]
        self._progress.update(self._task, completed=done, total=total or None, description=told)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False)
