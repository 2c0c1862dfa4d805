"""The nouns of the distributed rate limiter: limits, pools, permits and refusals.

Pure values without a connection. What a provider allows is a `PoolLimits`; who shares that allowance is a `Pool`;
`workers.limiter` turns both into a `Permit` or a `Refused`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

MINUTE_S = 60.0
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class LimiterUnavailable(Exception):
    """Redis did not answer, so nothing may be sent: the caller waits and asks again with the same permit id."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `units` in every interval of `window_s`, paced with at most `burst` at one moment.

    `refund` is False where the provider keeps counting the estimate after the reply: a settlement may then charge
    more, never give back. A cost above `burst` leaves from a full bucket and is paid back before the next one.
    """

    name: str
    units: int
    window_s: float
    burst: int
    refund: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that no pool could ever serve.

        Raises:
            ValueError: the name is not made of letters, digits and `_.-`, or a number is not positive.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"limit name {self.name!r} may hold letters, digits and _.- only")
        if self.units < 1 or self.burst < 1 or not 0 < self.window_s < math.inf:
            raise ValueError(f"limit {self.name!r} needs positive units, burst and window_s")


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What one pool may do: requests and tokens per minute, calls in flight, and further named limits.

    None means "no such limit". Bursts default to a tenth of the requests and a quarter of the tokens.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    rpm_burst: int | None = None
    tpm_burst: int | None = None
    extra: tuple[Limit, ...] = ()

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The dimensions in a stable order: `rpm`, `tpm`, then `extra`."""
        found: list[Limit] = []
        if self.rpm is not None:
            found.append(Limit("rpm", self.rpm, MINUTE_S, self.rpm_burst or max(1, self.rpm // 10)))
        if self.tpm is not None:
            found.append(Limit("tpm", self.tpm, MINUTE_S, self.tpm_burst or max(1, self.tpm // 4)))
        return (*found, *self.extra)

    @property
    def is_unlimited(self) -> bool:
        """Whether every request may leave at once."""
        return self.concurrency is None and not self.limits


@dataclass(frozen=True, slots=True)
class Pool:
    """Everything that shares one allowance at the provider: `<provider>:<account fingerprint>:<model pool>`."""

    key: str

    def __post_init__(self) -> None:
        """Refuse a key that would break the hash tag of a Redis cluster.

        Raises:
            ValueError: the key is empty or holds a brace.
        """
        if not self.key or "{" in self.key or "}" in self.key:
            raise ValueError(f"pool key {self.key!r} must not be empty or hold braces")


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one request at one exact moment.

    `send_at` and `late_after` are readings of the event loop's monotonic clock; after `late_after` the provider could
    count the request in another window than we did, so the permit is void. `send_us` is the same moment on the clock of
    the Redis server (0 for a pool without limits). `bound_by` names the limit that delayed it, None when nothing did.
    """

    permit_id: str
    pool: Pool
    send_at: float
    costs: Mapping[str, int]
    bound_by: str | None = None
    late_after: float = math.inf
    send_us: int = 0
    firm: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Refused:
    """No permit now. `reason` is a limit's name, `concurrency` or `not_before`.

    `wait_s` is the exact time to the moment at which this request could leave, if nobody else came first; for
    `concurrency` it is a guess. `possible` is False when the cost exceeds the limit itself: it never fits.
    """

    wait_s: float
    reason: str
    possible: bool = True
