"""The Redis side of the rate limiter: key names, script arguments and replies, and the clock.

One object per process. It keeps no queue and makes no decision; `workers.limiter` asks through it. Every failure of
Redis leaves here as `LimiterUnavailable`. Moments whose names end in `_us` are microseconds on the clock of Redis.
"""

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, Protocol, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from workers.limiter.limits import LimiterUnavailable, Pool, Sighting
from workers.limiter.terms import Terms

CLOCK_SAMPLE_S = 10.0
# Connecting and loading a script make the first round trip long, and its midpoint says little about the clock.
FIRST_SAMPLES = 3

_Reply = TypeVar("_Reply")

Reach = Sequence[tuple[Pool, Terms]]
"""All pools that one request draws from, its own first."""


class Script(Protocol):
    """A packaged script: called by digest, loaded again by the client when the server has forgotten it."""

    async def __call__(self, keys: Sequence[str], args: Sequence[str | int | float]) -> Any:
        """Run the script and return its raw reply."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the script sees it; `run` and `weight` say whose turn it is when several runs wait."""

    permit_id: str
    lease_s: float
    costs: Mapping[str, int]
    horizon_s: float
    run: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Memory:
    """What the asker remembers of a pool, `days` as the script told them; the script compares it with what it finds."""

    incarnation: str = ""
    last_us: int = 0
    days: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Reply to one batch: the granted ones as (place in the batch, send moment, limiting name or ''), and why not all.

    `status` is `lost` when the server's state has vanished: nothing was granted, leases must be restored first.
    `memories` are one per pool, in the order of the pools.
    """

    status: Literal["ok", "refused", "lost"]
    memories: tuple[Memory, ...]
    not_before_us: int
    wait_s: float
    reason: str
    granted: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True, slots=True)
class Correction:
    """What a permit really cost; a name left out keeps its estimate, `actual` None gives everything back.

    `seen` is what the provider said about its limits when it answered, each with our own units, by place of the pool
    and name: `1/rpm` for one of the request's own pool.
    """

    permit_id: str
    actual: Mapping[str, int] | None
    seen: Mapping[str, tuple[int, Sighting]] = field(default_factory=dict[str, tuple[int, Sighting]])


class Clock:
    """Offset between the Redis clock and the loop's clock, from the midpoint of the quickest recent round trip."""

    def __init__(self) -> None:
        self._offset_s = 0.0
        self._round_trip_s = math.inf
        self._read_at = -math.inf

    @property
    def is_known(self) -> bool:
        """Whether there has been a sample."""
        return self._read_at > -math.inf

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

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._reserve = self._script("token_bucket.lua")
        self._settle = self._script("token_bucket_settle.lua")
        self._penalise = self._script("token_bucket_penalise.lua")
        self.clock = Clock()

    def _script(self, name: str) -> Script:
        source = resources.files("workers.limiter").joinpath(name).read_text("utf-8")
        return cast("Script", self._redis.register_script(source))

    def keys(self, pool: Pool) -> tuple[str, str, str, str]:
        """State, slots, leases and receipts of a pool; the hash tag keeps them on one node of a cluster."""
        tag = f"{{{pool.scope}}}:{pool.key}" if pool.scope else f"{{{pool.key}}}"
        stem = f"{self._prefix}:limit:{tag}"
        return f"{stem}:state", f"{stem}:slots", f"{stem}:leases", f"{stem}:receipts"

    def _all_keys(self, pools: Sequence[Pool]) -> list[str]:
        """Keys as the scripts want them: receipts are kept with a request's own pool only."""
        keys = list(self.keys(pools[0]))
        for pool in pools[1:]:
            keys += self.keys(pool)[:3]
        return keys

    async def reserve(
        self,
        reach: Reach,
        requests: Sequence[Request],
        *,
        memories: Sequence[Memory],
        ttl_s: float,
        asker: str,
        starved: bool,
        now: "Now",
    ) -> Answer:
        """Reserve send moments, all dimensions of all pools at once; stops at the first request that must wait.

        Requests of one run are served in order; between runs, the one that had least for its weight comes first. Safe
        to repeat: a permit id that is still live answers with the moment it was given before.

        Raises:
            LimiterUnavailable: Redis did not answer; what was granted is unknown until asked again.
        """
        weights = {request.run: request.weight for request in requests}
        places = {run: place for place, run in enumerate(weights, 1)}
        horizon_s = max(request.horizon_s for request in requests)
        args: list[str | int | float] = [round(horizon_s * 1e6), round(ttl_s * 1000), asker, int(starved)]
        args += (len(reach), len(weights), len(requests))
        names: list[str] = []
        for (_, terms), memory in zip(reach, memories, strict=True):
            args += (memory.incarnation, memory.last_us, memory.days, terms.concurrency, len(terms.names), *terms.args)
            names += terms.names
        for run, weight in weights.items():
            args += (run, weight)
        for request in requests:
            args += (
                request.permit_id,
                places[request.run],
                round(request.lease_s * 1e6),
                round(request.horizon_s * 1e6),
            )
            args += [request.costs.get(name, 0) for name in names]
        if not self.clock.is_known:
            await self._read_clock(now)
        asked_at = now()
        reply = await _answered(self._reserve(self._all_keys([pool for pool, _ in reach]), args))
        self.clock.learn(asked_at, now(), int(reply[1]))
        return _read_answer(reply)

    async def _read_clock(self, now: "Now") -> None:
        await _answered(self._server_time())
        for _ in range(FIRST_SAMPLES):
            asked_at = now()
            seconds, microseconds = await _answered(self._server_time())
            self.clock.learn(asked_at, now(), seconds * 1_000_000 + microseconds)

    def _server_time(self) -> Awaitable[tuple[int, int]]:
        return self._redis.time()  # pyright: ignore[reportUnknownMemberType]  # its keyword arguments have no types

    async def settle(self, pools: Sequence[Pool], corrections: Sequence[Correction], ttl_s: float) -> None:
        """Book what permits of the first pool really cost, adopt what the provider said, and end the leases.

        Safe to repeat: what is settled already is left alone.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        args: list[str | int | float] = [round(ttl_s * 1000), len(corrections)]
        for correction in corrections:
            actual = correction.actual
            args += (correction.permit_id, -1 if actual is None else len(actual))
            for name, units in (actual or {}).items():
                args += (name, units)
            args.append(len(correction.seen))
            for name, (units, seen) in correction.seen.items():
                full_us = -1 if seen.full_s is None else round(seen.full_s * 1e6)
                args += (name, units, _told(seen.limit), _told(seen.remaining), full_us)
        await _answered(self._settle(self._all_keys(pools), args))

    async def penalise(self, pool: Pool, wait_s: float, ttl_s: float, now: "Now") -> tuple[int, float]:
        """Move the pool's not-before moment; return the one in force, and the share of the limits that is in force.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        asked_at = now()
        reply = await _answered(self._penalise(self.keys(pool)[:1], [round(wait_s * 1e6), round(ttl_s * 1000)]))
        self.clock.learn(asked_at, now(), int(reply[0]))
        return int(reply[1]), float(reply[2])

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


def _told(value: int | None) -> int:
    return -1 if value is None else value


def _read_answer(reply: Sequence[Any]) -> Answer:
    granted: list[tuple[int, int, str]] = []
    for place, item in enumerate(_text(reply[5]).split(";")):
        if item:
            at, _, why = item.partition(":")
            granted.append((place, int(at), why))
    memories = [
        Memory(_text(reply[start]), int(reply[start + 1]), _text(reply[start + 2])) for start in range(6, len(reply), 3)
    ]
    return Answer(
        status=cast("Literal['ok', 'refused', 'lost']", _text(reply[0])),
        memories=tuple(memories),
        not_before_us=int(reply[2]),
        wait_s=int(reply[3]) / 1e6,
        reason=_text(reply[4]),
        granted=tuple(granted),
    )
