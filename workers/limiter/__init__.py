"""The distributed rate limiter: exact send times from one bucket per pool, shared by every worker process.

The arithmetic runs inside Redis (`token_bucket.lua`) on the clock of Redis, so hosts with skewed clocks agree. This
module is the door: it hands out moments of the event loop's own clock, takes back what was not used, and passes on what
providers say about their limits. What an error of a provider means for the pool is decided
elsewhere; here is only `penalise`.

From the top down: `pump` asks for what waits in `waiting`, `settling` writes what calls really cost, `bucket` turns
both into script calls, `terms` works out what a script must know of the nouns in `limits`. Others import from here.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Mapping, Sequence

import structlog
from redis.asyncio import Redis

from workers.limiter.bucket import Bucket, Correction, Reach
from workers.limiter.limits import (
    MINUTE_S,
    Limit,
    LimiterUnavailable,
    Permit,
    Pool,
    PoolLimits,
    Refused,
    Sighting,
    Wider,
)
from workers.limiter.pump import PoolState, Pump, now_s
from workers.limiter.settling import BATCH, Settlements
from workers.limiter.terms import MIN_TTL_S, TermsBook
from workers.limiter.waiting import Waiting

__all__ = [
    "MINUTE_S",
    "Limit",
    "Limiter",
    "LimiterUnavailable",
    "Permit",
    "Pool",
    "PoolLimits",
    "Refused",
    "Sighting",
    "Wider",
]

log = structlog.get_logger(__name__)

MAX_HORIZON_S = 60.0
# A pool whose next send time lies far ahead delays every other pool of the account, so with one it may not lie far.
WIDER_HORIZON_S = 0.5
# How old this process's knowledge of a penalty may be when a permit comes due.
STALE_S = 0.25


class Limiter:
    """Hands out permits to send. One per process and event loop; it does not own the Redis client.

    Within a run a process is served first come, first served; runs share a pool by weight, wherever they wait, and what
    one leaves the others may use. Send times of a pool never run backwards.
    """

    def __init__(
        self, redis: Redis, prefix: str, *, margin: float = 0.0075, horizon_s: float = 0.5, batch: int = 64
    ) -> None:
        """Remember the server and the deployment.

        Args:
            redis: client of the server that all processes share.
            prefix: put before every key.
            margin: share by which our windows are longer than the provider's.
            horizon_s: how far ahead a send time may be reserved; so long a newcomer may have to wait for its share.
            batch: permits asked for with one script call.
        """
        self._bucket = Bucket(redis, prefix)
        self._terms = TermsBook(margin)
        self._horizon_s = min(horizon_s, MAX_HORIZON_S)
        self._pools: dict[str, PoolState] = {}
        self._pump = Pump(self._bucket, batch, self._state, self.release_unsent)

    async def permit(
        self,
        pool: Pool,
        limits: PoolLimits,
        costs: Mapping[str, int],
        *,
        permit_id: str,
        lease_s: float,
        max_wait_s: float,
        horizon_s: float | None = None,
        run: str = "",
        weight: float = 1.0,
        wider: Sequence[Wider] = (),
    ) -> Permit | Refused:
        """Wait for a permit, at most until one could no longer send within `max_wait_s`.

        Args:
            pool: whose allowance is used.
            limits: the allowance; every process of a deployment should pass the same. The latest ones hold, also for
                requests that wait already.
            costs: whole units per limit name; a missing name costs nothing. Wider pools are charged the same.
            permit_id: stable name of the attempt; asking again while it lives returns the same send time.
            lease_s: how long after the send time the call may occupy a concurrency slot without `renew`.
            max_wait_s: 0 asks once. The refusal comes early when the exact send time lies beyond it.
            horizon_s: overrides how far ahead a send time may be reserved.
            run: who shares the pool with others; without `|` and `;`.
            weight: how much of it the run gets beside others.
            wider: pools of the same scope that are charged in the same step: from all of them, or from none.

        Raises:
            LimiterUnavailable: Redis did not answer; nothing may be sent.
            ValueError: the pools have no scope in common.
        """
        state = self._state(pool)
        reach = self._reach(pool, limits, wider)
        for _, terms in reach:
            for name, units in zip(terms.names, terms.units, strict=True):
                if costs.get(name, 0) > units:
                    return Refused(math.inf, name, possible=False)
        loop = asyncio.get_running_loop()
        if limits.is_unlimited and all(other.is_unlimited for _, other in wider):
            send_at = max(loop.time(), state.not_before_at)
            return Permit(permit_id, pool, send_at, costs, "not_before" if send_at > loop.time() else None)
        state.reach = reach
        for _, terms in reach:
            state.ttl_s = max(state.ttl_s, terms.ttl_s, terms.ttl_s - MIN_TTL_S + lease_s)
        ahead_s = min(horizon_s or self._horizon_s, WIDER_HORIZON_S if wider else MAX_HORIZON_S)
        deadline, answer = loop.time() + max_wait_s, loop.create_future()
        waiting = Waiting(permit_id, run, weight, costs, lease_s, deadline, ahead_s, answer)
        state.queues.add(waiting)
        if state.pump is None or state.pump.done():
            state.pump = loop.create_task(self._pump.run(state), name=f"limiter {pool.key}")
        return await self._answer(state, waiting)

    def _reach(self, pool: Pool, limits: PoolLimits, wider: Sequence[Wider]) -> Reach:
        if any(other.scope != pool.scope or not pool.scope for other, _ in wider):
            raise ValueError(f"pool {pool.key!r} and the wider ones have no scope in common")
        return ((pool, self._terms.find(limits)), *((other, self._terms.find(allowed)) for other, allowed in wider))

    async def _answer(self, state: PoolState, waiting: Waiting) -> Permit | Refused:
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if waiting.answer.cancelled() or not waiting.answer.done():
                waiting.answer.cancel()
                state.wake.set()
            elif waiting.answer.exception() is None and isinstance(permit := waiting.answer.result(), Permit):
                self.release_unsent(permit)
            raise

    def still_valid(self, permit: Permit) -> bool:
        """Whether the permit may be used now, as far as this process knows: not penalised since, and not too late."""
        state = self._state(permit.pool)
        if not permit.send_us:
            return permit.send_at >= state.not_before_at or now_s() >= state.not_before_at
        return permit.send_us >= state.not_before_us and now_s() <= permit.late_after

    async def wait_until_due(self, permit: Permit) -> bool:
        """Sleep until the send time. True: send now. False: the permit is void, release it and ask again.

        Learns of penalties set by other processes on the way.

        Raises:
            LimiterUnavailable: Redis did not answer; the permit stays reserved until settled or released.
        """
        state = self._state(permit.pool)
        await self._sleep_until(permit.send_at - STALE_S / 5)
        if permit.send_us and now_s() - state.heard_at > STALE_S:
            await self._refresh(state)
        if self.still_valid(permit):
            await self._sleep_until(permit.send_at)
        return self.still_valid(permit)

    def settle(self, permit: Permit, actual: Mapping[str, int] | None = None) -> None:
        """Book the real cost of a finished call and free its concurrency slot. Never raises, safe to repeat.

        A limit left out of `actual` (all of them for None: outcome unknown) keeps the estimate. Written in the
        background together with others.
        """
        booked = dict(actual or {})
        for name in permit.firm & booked.keys():
            booked[name] = max(booked[name], permit.costs.get(name, 0))
        self._correct(permit, booked)

    def adopt(self, permit: Permit, seen: Mapping[str, Sighting]) -> None:
        """Keep to what the provider said about its limits when it answered the permit's request, by limit name.

        Only tightens: a smaller limit than ours holds from now on, for every process, and what the provider counts
        beyond our own sendings is counted here too. Answers that overtook each other are told apart by send time. Call
        it before `settle`, which takes it along. Never raises.
        """
        state = self._state(permit.pool)
        if permit.permit_id not in state.leases:
            return
        state.seen[permit.permit_id] = seen
        for name, (place, units) in state.places().items():
            limit = seen[name].limit if name in seen else None
            if limit is not None and limit < units and state.smaller.get(name) != limit:
                state.smaller[name] = limit
                pool = state.pools()[place - 1].key
                log.warning("limiter.smaller_limit", pool=pool, limit=name, ours=units, theirs=limit)

    def release_unsent(self, permit: Permit) -> None:
        """Give everything back for a request of which not one byte left. Never raises, safe to repeat."""
        self._correct(permit, None)

    async def renew(self, permit: Permit, lease_s: float) -> bool:
        """Let the call occupy its slot for `lease_s` from now. False when the lease was already gone.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        if not permit.send_us:
            return True
        state = self._state(permit.pool)
        until_us = self._bucket.clock.remote_us(now_s() + lease_s)
        renewed = True
        for pool in state.pools():
            renewed &= await self._bucket.renew(pool, permit.permit_id, until_us)
        if renewed and permit.permit_id in state.leases:
            state.leases[permit.permit_id] = until_us
        return renewed

    async def renew_all(self, lease_s: float) -> None:
        """Let every call of this process occupy its slot for `lease_s` from now, or longer if it has longer.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        until_us = self._bucket.clock.remote_us(now_s() + lease_s)
        for state in list(self._pools.values()):
            due = [permit_id for permit_id, lease_us in state.leases.items() if lease_us < until_us]
            for start in range(0, len(due), BATCH):
                batch = [permit_id for permit_id in due[start : start + BATCH] if permit_id in state.leases]
                if batch:
                    for pool in state.pools():
                        await self._bucket.renew_all(pool, batch, until_us, state.ttl_s)
                    state.leases.update((one, until_us) for one in batch if one in state.leases)

    async def penalise(self, pool: Pool, retry_after_s: float) -> None:
        """Let nothing of the pool leave before `retry_after_s` (plus up to a tenth) from now, in any process.

        Permits whose send time lies before that moment are void. When refusals come in a wave, the pool's limits shrink
        by a fifth, and recover with every clean minute. Safe to repeat: the moment never moves back.

        Raises:
            LimiterUnavailable: Redis did not answer; this process still keeps to it.
        """
        state = self._state(pool)
        wait_s = retry_after_s * random.uniform(1.0, 1.1)
        state.learn_not_before(self._bucket.clock.remote_us(now_s() + wait_s))
        state.not_before_at = max(state.not_before_at, now_s() + wait_s)
        moment_us, share = await self._bucket.penalise(pool, wait_s, state.ttl_s + wait_s, now_s)
        state.learn_not_before(moment_us)
        if share < state.share:
            log.warning("limiter.slowed_down", pool=pool.key, share=share)
        state.share = share

    async def flush(self) -> None:
        """Wait until every settlement so far is written or has failed once more.

        Raises:
            LimiterUnavailable: Redis did not answer; the rest is tried again in the background.
        """
        for state in list(self._pools.values()):
            await state.settlements.write_all()

    async def aclose(self) -> None:
        """Write what is settled, then stop; requests still waiting are cancelled. Safe to repeat."""
        with contextlib.suppress(LimiterUnavailable):
            await self.flush()
        for state in self._pools.values():
            tasks = [task for task in (state.pump, state.refresher) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await state.settlements.stop()

    async def _sleep_until(self, at: float) -> None:
        delay = at - now_s()
        if delay > 0:
            await asyncio.sleep(delay)

    def _state(self, pool: Pool) -> PoolState:
        state = self._pools.get(pool.key)
        if state is None:
            settlements = Settlements(lambda batch: self._write(self._pools[pool.key], batch))
            state = self._pools[pool.key] = PoolState(pool, settlements)
        return state

    async def _refresh(self, state: PoolState) -> None:
        """Learn the not-before moment; permits that come due together share one question."""
        if state.refresher is None or state.refresher.done():
            state.refresher = asyncio.get_running_loop().create_task(self._read_not_before(state))
        await asyncio.shield(state.refresher)

    async def _read_not_before(self, state: PoolState) -> None:
        for pool in state.pools():
            state.learn_not_before(await self._bucket.not_before_us(pool))
        state.heard_at = now_s()

    def _correct(self, permit: Permit, actual: Mapping[str, int] | None) -> None:
        state = self._state(permit.pool)
        if not permit.send_us or state.leases.pop(permit.permit_id, None) is None:
            return
        seen = state.seen.pop(permit.permit_id, None)
        known: dict[str, tuple[int, Sighting]] = {}
        for name, (place, units) in state.places().items() if seen else ():
            if seen and name in seen:
                known[f"{place}/{name}"] = (units, seen[name])
        state.settlements.add(Correction(permit.permit_id, actual, known))

    async def _write(self, state: PoolState, batch: Sequence[Correction]) -> None:
        await self._bucket.settle(state.pools(), batch, state.ttl_s)
        if state.refusal is not None and state.refusal.reason == "concurrency":
            state.wake.set()
