"""The Redis side of the rate limiter: key names, script arguments and replies, and the clock.

One object per process. It keeps no queue and makes no decision; `workers.limiter` asks through it. Every failure of
Redis leaves here as `LimiterUnavailable`. Moments whose names end in `_us` are microseconds on the clock of Redis.
"""

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Protocol, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from workers.limits import Limit, LimiterUnavailable, Pool, PoolLimits

SLOTS_PER_WINDOW = 600
# Below this a margin would be smaller than the jitter of an ordinary event loop.
MIN_MARGIN_S = 0.02
# State must outlive the longest window it describes; two hours also cover the lease of every ordinary call.
MIN_TTL_S = 7200.0
CLOCK_SAMPLE_S = 10.0

_Reply = TypeVar("_Reply")


class Script(Protocol):
    """A packaged script: called by digest, loaded again by the client when the server has forgotten it."""

    async def __call__(self, keys: Sequence[str], args: Sequence[str | int | float]) -> Any:
        """Run the script and return its raw reply."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the script sees it."""

    permit_id: str
    lease_s: float
    costs: Mapping[str, int]
    horizon_s: float


@dataclass(frozen=True, slots=True)
class Terms:
    """A pool's limits, worked out once: script arguments, how late a permit may be used, how long state must live."""

    names: tuple[str, ...]
    units: tuple[int, ...]
    firm: frozenset[str]
    concurrency: int
    args: tuple[str | int, ...]
    slack_s: float
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What the asker remembers of a pool; the script compares it with what it finds."""

    incarnation: str = ""
    last_us: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Reply to one batch: the granted ones in order as (send moment, limiting name or ''), then why the next was not.

    `status` is `lost` when the server's state has vanished: nothing was granted, leases must be restored first.
    """

    status: Literal["ok", "refused", "lost"]
    memory: Memory
    not_before_us: int
    wait_s: float
    reason: str
    granted: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Correction:
    """What a permit really cost; a name left out keeps its estimate, `actual` None gives everything back."""

    permit_id: str
    actual: Mapping[str, int] | None


class Clock:
    """Offset between the Redis clock and the loop's clock, from the midpoint of the quickest recent round trip."""

    def __init__(self) -> None:
        self._offset_s = 0.0
        self._round_trip_s = math.inf
        self._read_at = -math.inf

    def learn(self, asked_at: float, heard_at: float, redis_us: int) -> None:
        """Take a sample that is nearly as quick as the best one, or any when the best one has grown old."""
        round_trip_s = heard_at - asked_at
        if round_trip_s <= 1.5 * self._round_trip_s or heard_at - self._read_at > CLOCK_SAMPLE_S:
            self._offset_s = (asked_at + heard_at) / 2 - redis_us / 1e6
            self._round_trip_s, self._read_at = round_trip_s, heard_at

    def local(self, redis_us: int) -> float:
        """The loop's reading at a moment of the Redis clock."""
        return redis_us / 1e6 + self._offset_s

    def remote_us(self, at: float) -> int:
        """The Redis clock at a reading of the loop's clock."""
        return round((at - self._offset_s) * 1e6)


class Bucket:
    """The scripts of one deployment, as typed calls. Nothing here is kept per pool."""

    def __init__(self, redis: Redis, prefix: str, margin: float) -> None:
        self._redis = redis
        self._prefix = prefix
        self._margin = margin
        self._reserve = self._script("token_bucket.lua")
        self._settle = self._script("token_bucket_settle.lua")
        self._penalise = self._script("token_bucket_penalise.lua")
        self._terms: dict[PoolLimits, Terms] = {}
        self.clock = Clock()

    def _script(self, name: str) -> Script:
        return cast("Script", self._redis.register_script(resources.files("workers").joinpath(name).read_text("utf-8")))

    def keys(self, pool: Pool) -> tuple[str, str, str, str]:
        """State, slots, leases and receipts of a pool; the hash tag keeps them on one node of a cluster."""
        stem = f"{self._prefix}:limit:{{{pool.key}}}"
        return f"{stem}:state", f"{stem}:slots", f"{stem}:leases", f"{stem}:receipts"

    def terms(self, limits: PoolLimits) -> Terms:
        """Work out what the script needs to know of these limits; remembered per value."""
        known = self._terms.get(limits)
        if known is None:
            known = self._terms[limits] = self._work_out(limits)
        return known

    def _work_out(self, limits: PoolLimits) -> Terms:
        dimensions = limits.limits
        args: list[str | int] = []
        for limit in dimensions:
            args += self._dimension(limit)
        return Terms(
            names=tuple(limit.name for limit in dimensions),
            units=tuple(limit.units for limit in dimensions),
            firm=frozenset(limit.name for limit in dimensions if not limit.refund),
            concurrency=limits.concurrency or 0,
            args=tuple(args),
            # Half of the margin is for the process, the other half for the network.
            slack_s=min((self._margin_s(limit) / 2 for limit in dimensions), default=math.inf),
            ttl_s=MIN_TTL_S + 2 * max((limit.window_s for limit in dimensions), default=0.0),
        )

    def _margin_s(self, limit: Limit) -> float:
        return max(self._margin * limit.window_s, MIN_MARGIN_S)

    def _dimension(self, limit: Limit) -> tuple[str, int, int, int, int, str]:
        window_us = math.ceil((limit.window_s + self._margin_s(limit)) * 1e6)
        slot_us = max(1, math.ceil(window_us / SLOTS_PER_WINDOW))
        rate = limit.units / (window_us + slot_us)
        burst = min(limit.burst, limit.units)
        return f"{limit.name}@{window_us}", limit.units, window_us, slot_us, burst, format(rate, ".17g")

    async def reserve(
        self,
        pool: Pool,
        terms: Terms,
        requests: Sequence[Request],
        *,
        memory: Memory,
        ttl_s: float,
        asker: str,
        starved: bool,
        now: "Now",
    ) -> Answer:
        """Reserve send moments for requests in order, all dimensions at once; stops at the first that must wait.

        Safe to repeat: a permit id that is still live answers with the moment it was given before.

        Raises:
            LimiterUnavailable: Redis did not answer; what was granted is unknown until asked again.
        """
        horizon_s = max(request.horizon_s for request in requests)
        args: list[str | int | float] = [memory.incarnation, memory.last_us, round(horizon_s * 1e6)]
        args += (terms.concurrency, round(ttl_s * 1000), asker, int(starved), len(terms.names), len(requests))
        args += terms.args
        for request in requests:
            args += (request.permit_id, round(request.lease_s * 1e6), round(request.horizon_s * 1e6))
            args += [int(request.costs.get(name, 0)) for name in terms.names]
        asked_at = now()
        reply = await _answered(self._reserve(self.keys(pool), args))
        self.clock.learn(asked_at, now(), int(reply[1]))
        return _read_answer(reply)

    async def settle(self, pool: Pool, corrections: Sequence[Correction], ttl_s: float) -> None:
        """Book what permits really cost and end their leases. Safe to repeat.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        args: list[str | int | float] = [round(ttl_s * 1000), len(corrections)]
        for correction in corrections:
            actual = correction.actual
            args += (correction.permit_id, -1 if actual is None else len(actual))
            for name, units in (actual or {}).items():
                args += (name, units)
        await _answered(self._settle(self.keys(pool), args))

    async def penalise(self, pool: Pool, wait_s: float, ttl_s: float, now: "Now") -> int:
        """Move the pool's not-before moment and return the one in force.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        asked_at = now()
        reply = await _answered(self._penalise(self.keys(pool)[:1], [round(wait_s * 1e6), round(ttl_s * 1000)]))
        self.clock.learn(asked_at, now(), int(reply[0]))
        return int(reply[1])

    async def not_before_us(self, pool: Pool) -> int:
        """The not-before moment in force, 0 when there is none.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        return int(await _answered(cast("Awaitable[Any]", self._redis.hget(self.keys(pool)[0], "nb"))) or 0)

    async def renew(self, pool: Pool, permit_id: str, until_us: int) -> bool:
        """Extend a lease; False when it was gone.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        changed = self._redis.zadd(self.keys(pool)[2], {permit_id: until_us}, xx=True, ch=True)
        return bool(await _answered(cast("Awaitable[Any]", changed)))

    async def renew_all(self, pool: Pool, permit_ids: Sequence[str], until_us: int, ttl_s: float) -> None:
        """Extend those leases that are still there.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        key = self.keys(pool)[2]
        renewed = self._redis.zadd(key, dict.fromkeys(permit_ids, until_us), xx=True)
        await _answered(cast("Awaitable[Any]", renewed))
        await _answered(cast("Awaitable[Any]", self._redis.pexpire(key, round(ttl_s * 1000))))

    async def restore(self, pool: Pool, leases: Mapping[str, int], ttl_s: float) -> None:
        """Write leases again after the server lost them, so that concurrency stays counted. Safe to repeat.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        if leases:
            key = self.keys(pool)[2]
            await _answered(cast("Awaitable[Any]", self._redis.zadd(key, dict(leases), nx=True)))
            await _answered(cast("Awaitable[Any]", self._redis.pexpire(key, round(ttl_s * 1000))))


class Now(Protocol):
    """Reads the event loop's monotonic clock, in seconds."""

    def __call__(self) -> float:
        """The current reading."""
        ...


async def _answered(call: Awaitable[_Reply]) -> _Reply:
    try:
        return await call
    except (RedisError, OSError) as error:
        raise LimiterUnavailable(f"the rate limiter's Redis did not answer: {type(error).__name__}") from error


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read_answer(reply: Sequence[Any]) -> Answer:
    granted: list[tuple[int, str]] = []
    for item in _text(reply[7]).split(";"):
        at, _, why = item.partition(":")
        if at:
            granted.append((int(at), why))
    return Answer(
        status=cast("Literal['ok', 'refused', 'lost']", _text(reply[0])),
        memory=Memory(_text(reply[2]), int(reply[4])),
        not_before_us=int(reply[3]),
        wait_s=int(reply[5]) / 1e6,
        reason=_text(reply[6]),
        granted=tuple(granted),
    )
