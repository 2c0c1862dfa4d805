"""Three strict providers as pure functions: what each would have refused of (moment in seconds, units) sendings."""

import math
from collections import deque
from collections.abc import Sequence

Sending = tuple[float, int]


def sliding_log(sendings: Sequence[Sending], units: int, window_s: float) -> int:
    """Refusals of a provider that counts the exact last window."""
    inside: deque[Sending] = deque()
    total = refused = 0
    for at, cost in sorted(sendings):
        while inside and inside[0][0] <= at - window_s:
            total -= inside.popleft()[1]
        total += cost
        inside.append((at, cost))
        refused += total > units
    return refused


def fixed_window(sendings: Sequence[Sending], units: int, window_s: float, phase: float) -> int:
    """Refusals of a provider whose counter falls to zero every window, first at `phase` windows."""
    totals: dict[int, int] = {}
    for at, cost in sendings:
        window = math.floor(at / window_s - phase)
        totals[window] = totals.get(window, 0) + cost
    return sum(total > units for total in totals.values())


def token_bucket(sendings: Sequence[Sending], units: int, window_s: float, capacity: int) -> int:
    """Refusals of a provider with a bucket of `capacity` refilled with `units` per window."""
    level, before, refused = float(capacity), -math.inf, 0
    for at, cost in sorted(sendings):
        level = min(capacity, level + (at - before) * units / window_s) - cost
        before = at
        refused += level < -1e-6
    return refused
