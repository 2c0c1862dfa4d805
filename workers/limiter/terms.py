"""What the scripts of the limiter need to know of a pool's limits, worked out once per set of limits.

Here stand the margins: how much longer our windows are than the provider's, how much of a burst is kept for the jitter
of a network, how far from midnight a request counts for both days, and how late a permit may be used.
"""

import math
import time
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from workers.limiter.limits import DAY_S, Limit, PoolLimits

SLOTS_PER_WINDOW = 600
# Below this a margin would be smaller than the jitter of an ordinary event loop.
MIN_MARGIN_S = 0.02
# One request may reach the provider so much later than the next one without exceeding the burst that it allows; of
# that, this process may take so much.
MAX_JITTER_S = 0.15
MAX_LATE_S = 0.12
# How far the provider's clock may differ from ours when it turns the page of its calendar.
MIDNIGHT_GUARD_S = 5.0
# State must outlive the longest window it describes; two hours also cover the lease of every ordinary call.
MIN_TTL_S = 7200.0
# The offset of a time zone changes twice a year; this often we look.
ZONE_CHECK_S = 600.0


@dataclass(frozen=True, slots=True)
class Terms:
    """A pool's limits: script arguments, how late a permit may be used, how long state must live.

    Attributes:
        firm: names of the limits that give nothing back.
        valid_until: reading of the monotonic clock after which they must be worked out again.
    """

    names: tuple[str, ...]
    units: tuple[int, ...]
    firm: frozenset[str]
    concurrency: int
    args: tuple[str | int, ...]
    slack_s: float
    ttl_s: float
    valid_until: float = math.inf


class TermsBook:
    """Terms by limits, remembered.

    Args:
        margin: share by which our windows are longer than the provider's.
    """

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._known: dict[PoolLimits, Terms] = {}

    def find(self, limits: PoolLimits) -> Terms:
        """The terms of these limits as they hold now."""
        known = self._known.get(limits)
        if known is None or known.valid_until < time.monotonic():
            known = self._known[limits] = self._work_out(limits)
        return known

    def _work_out(self, limits: PoolLimits) -> Terms:
        dimensions = limits.limits
        args: list[str | int] = []
        for limit in dimensions:
            args += self._dimension(limit)
        sliding = [limit for limit in dimensions if limit.zone is None]
        return Terms(
            names=tuple(limit.name for limit in dimensions),
            units=tuple(limit.units for limit in dimensions),
            firm=frozenset(limit.name for limit in dimensions if not limit.refund),
            concurrency=limits.concurrency or 0,
            args=tuple(args),
            # Half of the margin is for the process, the other half for the network.
            slack_s=min((min(MAX_LATE_S, self._margin_s(limit) / 2) for limit in sliding), default=math.inf),
            ttl_s=MIN_TTL_S + 2 * max((limit.window_s for limit in dimensions), default=0.0),
            valid_until=math.inf if len(sliding) == len(dimensions) else time.monotonic() + ZONE_CHECK_S,
        )

    def _margin_s(self, limit: Limit) -> float:
        return max(self._margin * limit.window_s, MIN_MARGIN_S)

    def _dimension(self, limit: Limit) -> tuple[str, int, int, int, str | int, str | int]:
        if limit.zone is not None:
            offset_us = round(_offset_s(limit.zone) * 1e6)
            return f"{limit.name}@day", limit.units, round(DAY_S * 1e6), 0, offset_us, round(MIDNIGHT_GUARD_S * 1e6)
        margin_s = self._margin_s(limit)
        window_us = math.ceil((limit.window_s + margin_s) * 1e6)
        slot_us = max(1, math.ceil(window_us / SLOTS_PER_WINDOW))
        rate = limit.units / (window_us + slot_us)
        burst = min(limit.burst, limit.units)
        # What must not be refused when the first request of a burst is the slowest of all.
        kept = rate * min(margin_s, MAX_JITTER_S) * 1e6
        cap = float(burst) if burst == limit.units else max(min(burst, 1), burst - kept)
        return f"{limit.name}@{window_us}", limit.units, window_us, slot_us, format(cap, ".17g"), format(rate, ".17g")


def _offset_s(zone: str) -> float:
    offset = datetime.now(ZoneInfo(zone)).utcoffset()
    return offset.total_seconds() if offset else 0.0
