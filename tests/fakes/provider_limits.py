"""The three ways in which real services count: a sliding log, a fixed window and a token bucket.

A limiter is asked once per request with the request's cost in each dimension and either admits all of it or nothing.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Literal, Protocol

LimiterKind = Literal["sliding", "fixed", "bucket"]


class Limiter(Protocol):
    """One limit of `limit` units per window."""

    def wait_s(self, now: float, cost: float) -> float:
        """Return 0 when the cost fits now, otherwise the seconds until it would."""
        ...

    def take(self, now: float, cost: float) -> None:
        """Count the cost; only after `wait_s` returned 0."""
        ...

    def remaining(self, now: float) -> int:
        """Return what is left now."""
        ...


class SlidingLog:
    """Every interval of the window's length holds at most `limit` units."""

    def __init__(self, limit: float, window_s: float) -> None:
        self._limit, self._window_s = limit, window_s
        self._log: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def wait_s(self, now: float, cost: float) -> float:
        self._forget(now)
        over = self._sum + cost - self._limit
        if over <= 0:
            return 0.0
        for at, units in self._log:
            over -= units
            if over <= 0:
                return max(1e-6, at + self._window_s - now)
        return self._window_s

    def take(self, now: float, cost: float) -> None:
        self._log.append((now, cost))
        self._sum += cost

    def remaining(self, now: float) -> int:
        self._forget(now)
        return int(self._limit - self._sum)

    def _forget(self, now: float) -> None:
        while self._log and self._log[0][0] <= now - self._window_s:
            self._sum -= self._log.popleft()[1]


class FixedWindow:
    """Counters that restart at a moment which clients cannot know."""

    def __init__(self, limit: float, window_s: float, phase_s: float) -> None:
        self._limit, self._window_s, self._phase_s = limit, window_s, phase_s
        self._index, self._sum = -1, 0.0

    def wait_s(self, now: float, cost: float) -> float:
        self._turn(now)
        if self._sum + cost <= self._limit:
            return 0.0
        return (self._index + 1) * self._window_s - (now + self._phase_s)

    def take(self, now: float, cost: float) -> None:
        self._sum += cost

    def remaining(self, now: float) -> int:
        self._turn(now)
        return int(self._limit - self._sum)

    def _turn(self, now: float) -> None:
        index = int((now + self._phase_s) // self._window_s)
        if index != self._index:
            self._index, self._sum = index, 0.0


class TokenBucket:
    """A level that refills steadily up to a capacity."""

    def __init__(self, limit: float, window_s: float, capacity: float) -> None:
        self._rate, self._capacity = limit / window_s, capacity
        self._level, self._at = capacity, 0.0

    def wait_s(self, now: float, cost: float) -> float:
        self._refill(now)
        # The tolerance is far below one unit: repeated float additions must not refuse an exact fit.
        return 0.0 if self._level + 1e-6 >= cost else (cost - self._level) / self._rate

    def take(self, now: float, cost: float) -> None:
        self._level -= cost

    def remaining(self, now: float) -> int:
        self._refill(now)
        return int(self._level)

    def _refill(self, now: float) -> None:
        if self._at:
            self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now


def build_limiter(kind: LimiterKind, limit: float, window_s: float, burst: float, chance: random.Random) -> Limiter:
    """Build a limiter; `burst` is the bucket's capacity and 0 means the whole limit."""
    match kind:
        case "sliding":
            return SlidingLog(limit, window_s)
        case "fixed":
            return FixedWindow(limit, window_s, chance.random() * window_s)
        case "bucket":
            return TokenBucket(limit, window_s, burst or limit)
