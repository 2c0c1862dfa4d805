"""The nouns of the distributed rate limiter: limits, pools, permits and refusals.

Pure values without a connection. What a provider allows is a `PoolLimits`; who shares that allowance is a `Pool`;
`workers.limiter` turns both into a `Permit` or a `Refused`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

MINUTE_S = 60.0
DAY_S = 86_400.0
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class LimiterUnavailable(Exception):
    """Redis did not answer, so nothing may be sent: the caller waits and asks again with the same permit id."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `units` in every interval of `window_s`, paced with at most `burst` at one moment.

    `refund` is False where the provider keeps counting the estimate after the reply: a settlement may then charge
    more, never give back. A cost above `burst` leaves from a full bucket and is paid back before the next one.

    With a `zone` (an IANA name) it is at most `units` in every day of that place's calendar; neither `burst` nor
    `window_s` counts then, and a day's units may leave as fast as the other limits let them.
    """

    name: str
    units: int
    window_s: float
    burst: int
    refund: bool = True
    zone: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that no pool could ever serve.

        Raises:
            ValueError: the name is not made of letters, digits and `_.-`, a number is not positive, or nobody knows the
                time zone.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"limit name {self.name!r} may hold letters, digits and _.- only")
        if self.units < 1 or self.burst < 1 or not 0 < self.window_s < math.inf:
            raise ValueError(f"limit {self.name!r} needs positive units, burst and window_s")
        if self.zone is not None:
            try:
                ZoneInfo(self.zone)
            except ZoneInfoNotFoundError as error:
                raise ValueError(f"limit {self.name!r}: no time zone is called {self.zone!r}") from error


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What one pool may do; None means "no such limit".

    Attributes:
        rpm: requests per minute.
        tpm: tokens per minute, input and output together.
        concurrency: calls in flight.
        rpm_burst: requests at one moment; a tenth of `rpm` by default.
        tpm_burst: tokens at one moment, for each of the three kinds; a quarter of the limit by default.
        extra: further named limits.
        itpm: input tokens per minute.
        otpm: output tokens per minute.
        rpd: requests per day of `day_zone`.
        day_zone: IANA name of the time zone at whose midnight the provider begins to count anew.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    rpm_burst: int | None = None
    tpm_burst: int | None = None
    extra: tuple[Limit, ...] = ()
    itpm: int | None = None
    otpm: int | None = None
    rpd: int | None = None
    day_zone: str = "UTC"

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The dimensions in a stable order: `rpm`, `tpm`, `itpm`, `otpm`, `rpd`, then `extra`."""
        found: list[Limit] = []
        if self.rpm is not None:
            found.append(Limit("rpm", self.rpm, MINUTE_S, self.rpm_burst or max(1, self.rpm // 10)))
        for name, units in (("tpm", self.tpm), ("itpm", self.itpm), ("otpm", self.otpm)):
            if units is not None:
                found.append(Limit(name, units, MINUTE_S, self.tpm_burst or max(1, units // 4)))
        if self.rpd is not None:
            found.append(Limit("rpd", self.rpd, DAY_S, self.rpd, zone=self.day_zone))
        return (*found, *self.extra)

    @property
    def is_unlimited(self) -> bool:
        """Whether every request may leave at once."""
        return self.concurrency is None and not self.limits


@dataclass(frozen=True, slots=True)
class Pool:
    """Everything that shares one allowance at the provider: `<provider>:<account fingerprint>:<model pool>`.

    `scope` is what pools that are ever used together have in common, such as `<provider>:<account fingerprint>`: in a
    Redis cluster they live on one node. By default a pool stands alone.
    """

    key: str
    scope: str = ""

    def __post_init__(self) -> None:
        """Refuse names that would break the hash tag of a Redis cluster.

        Raises:
            ValueError: the key is empty, or one of the names holds a brace.
        """
        if not self.key or set("{}") & set(self.key + self.scope):
            raise ValueError(f"pool {self.key!r} in {self.scope!r} must not be empty or hold braces")


Wider = tuple[Pool, PoolLimits]
"""A pool of the whole account, or of several models, that a request draws from beside its own."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a provider's reply said about one limit; None for what it did not say.

    Attributes:
        limit: units per window.
        remaining: units left just after it had counted the request.
        full_s: seconds until all units are there again if nothing else is sent.
    """

    limit: int | None = None
    remaining: int | None = None
    full_s: float | None = None


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one request at one exact moment.

    `send_at` and `late_after` are readings of the event loop's monotonic clock; after `late_after` the provider could
    count the request in another window than we did, so the permit is void. `send_us` is the same moment on the clock of
    the Redis server (0 for a pool without limits). `bound_by` names the limit that delayed it, None when nothing did;
    limits of wider pools begin with `shared:`.
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
    """No permit now. `reason` is a limit's name, `concurrency`, `not_before`, or `share`: others' turn.

    `wait_s` is the exact time to the moment at which this request could leave, if nobody else came first; for
    `concurrency` and `share` it is a guess. `possible` is False when the cost exceeds the limit itself: it never fits.
    """

    wait_s: float
    reason: str
    possible: bool = True
