"""The distributed rate limiter: exact send times from one bucket per pool, shared by every worker process.

The arithmetic runs inside Redis (`token_bucket.lua`) on the clock of Redis, so hosts with skewed clocks agree. This
module is the asker: one pump per pool and process collects what waits, asks for many permits with one script call,
and hands out moments of the event loop's own clock. What an error of a provider means for the pool is decided
elsewhere; here is only `penalise`.
"""

import asyncio
import contextlib
import math
import random
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile

from redis.asyncio import Redis

from workers.bucket import MIN_TTL_S, Answer, Bucket, Correction, Memory, Request, Terms
from workers.limits import Limit, LimiterUnavailable, Permit, Pool, PoolLimits, Refused

__all__ = ["Limit", "Limiter", "LimiterUnavailable", "Permit", "Pool", "PoolLimits", "Refused"]

MAX_HORIZON_S = 60.0
# One script call per pool and this long: what arrives meanwhile shares the next call.
LINGER_S = 0.002
# Refunds of other processes can free room earlier than the last answer said.
MAX_RECHECK_S = 1.0
CONCURRENCY_POLL_S = (0.02, 0.05)
# How old this process's knowledge of a penalty may be when a permit comes due.
STALE_S = 0.25
SETTLE_RETRY_S = 0.5
SETTLE_BATCH = 200
# Beyond this many unwritten settlements the oldest are dropped; their estimates simply stay charged.
MAX_UNSETTLED = 20_000


@dataclass(slots=True, eq=False)
class _Waiting:
    """One request in the queue of this process."""

    permit_id: str
    costs: Mapping[str, int]
    lease_s: float
    terms: Terms
    deadline: float
    horizon_s: float
    answer: asyncio.Future[Permit | Refused]


@dataclass(slots=True, eq=False)
class _PoolState:
    """What this process knows of one pool. `leases` maps live permit ids to the end of their lease on Redis's clock."""

    pool: Pool
    queue: deque[_Waiting] = field(default_factory=lambda: deque[_Waiting]())
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    pump: asyncio.Task[None] | None = None
    unsettled: dict[str, Correction] = field(default_factory=lambda: dict[str, Correction]())
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    flusher: asyncio.Task[None] | None = None
    refresher: asyncio.Task[None] | None = None
    leases: dict[str, int] = field(default_factory=lambda: dict[str, int]())
    memory: Memory = field(default_factory=Memory)
    not_before_us: int = 0
    not_before_at: float = -math.inf
    heard_at: float = -math.inf
    ttl_s: float = MIN_TTL_S
    refusal: Refused | None = None
    blocked_since: float | None = None


class Limiter:
    """Hands out permits to send. One per process and event loop; it does not own the Redis client.

    Within one process a pool is served first come, first served; across processes send times never run backwards.
    """

    def __init__(
        self, redis: Redis, prefix: str, *, margin: float = 0.01, horizon_s: float = 5.0, batch: int = 64
    ) -> None:
        """Remember the server and the deployment.

        Args:
            redis: client of the server that all processes share.
            prefix: put before every key.
            margin: share by which our windows are longer than the provider's.
            horizon_s: how far ahead a send time may be reserved.
            batch: permits asked for with one script call.
        """
        self._bucket = Bucket(redis, prefix, margin)
        self._horizon_s = min(horizon_s, MAX_HORIZON_S)
        self._batch = batch
        self._asker = uuid.uuid4().hex
        self._pools: dict[str, _PoolState] = {}

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
    ) -> Permit | Refused:
        """Wait for a permit, at most until one could no longer send within `max_wait_s`.

        Args:
            pool: whose allowance is used.
            limits: the allowance; every process of a deployment should pass the same.
            costs: whole units per limit name; a missing name costs nothing.
            permit_id: stable name of the attempt; asking again while it lives returns the same send time.
            lease_s: how long after the send time the call may occupy a concurrency slot without `renew`.
            max_wait_s: 0 asks once. The refusal comes early when the exact send time lies beyond it.
            horizon_s: overrides how far ahead a send time may be reserved.

        Raises:
            LimiterUnavailable: Redis did not answer; nothing may be sent.
        """
        state = self._state(pool)
        terms = self._bucket.terms(limits)
        for name, units in zip(terms.names, terms.units, strict=True):
            if costs.get(name, 0) > units:
                return Refused(math.inf, name, possible=False)
        loop = asyncio.get_running_loop()
        if limits.is_unlimited:
            send_at = max(loop.time(), state.not_before_at)
            return Permit(permit_id, pool, send_at, costs, "not_before" if send_at > loop.time() else None)
        state.ttl_s = max(state.ttl_s, terms.ttl_s, terms.ttl_s - MIN_TTL_S + lease_s)
        waiting = _Waiting(
            permit_id,
            costs,
            lease_s,
            terms,
            loop.time() + max_wait_s,
            min(horizon_s or self._horizon_s, MAX_HORIZON_S),
            loop.create_future(),
        )
        state.queue.append(waiting)
        if state.pump is None or state.pump.done():
            state.pump = loop.create_task(self._run(state), name=f"limiter {pool.key}")
        return await self._answer(state, waiting)

    async def _answer(self, state: _PoolState, waiting: _Waiting) -> Permit | Refused:
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
            return permit.send_at >= state.not_before_at or self._now() >= state.not_before_at
        return permit.send_us >= state.not_before_us and self._now() <= permit.late_after

    async def wait_until_due(self, permit: Permit) -> bool:
        """Sleep until the send time. True: send now. False: the permit is void, release it and ask again.

        Learns of penalties set by other processes on the way.

        Raises:
            LimiterUnavailable: Redis did not answer; the permit stays reserved until settled or released.
        """
        state = self._state(permit.pool)
        await self._sleep_until(permit.send_at - STALE_S / 5)
        if permit.send_us and self._now() - state.heard_at > STALE_S:
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
        self._correct(permit, Correction(permit.permit_id, booked))

    def release_unsent(self, permit: Permit) -> None:
        """Give everything back for a request of which not one byte left. Never raises, safe to repeat."""
        self._correct(permit, Correction(permit.permit_id, None))

    async def renew(self, permit: Permit, lease_s: float) -> bool:
        """Let the call occupy its slot for `lease_s` from now. False when the lease was already gone.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        if not permit.send_us:
            return True
        state = self._state(permit.pool)
        until_us = self._bucket.clock.remote_us(self._now() + lease_s)
        renewed = await self._bucket.renew(permit.pool, permit.permit_id, until_us)
        if renewed and permit.permit_id in state.leases:
            state.leases[permit.permit_id] = until_us
        return renewed

    async def renew_all(self, lease_s: float) -> None:
        """Let every call of this process occupy its slot for `lease_s` from now, or longer if it has longer.

        Raises:
            LimiterUnavailable: Redis did not answer.
        """
        until_us = self._bucket.clock.remote_us(self._now() + lease_s)
        for state in list(self._pools.values()):
            due = [permit_id for permit_id, lease_us in state.leases.items() if lease_us < until_us]
            for start in range(0, len(due), SETTLE_BATCH):
                batch = [permit_id for permit_id in due[start : start + SETTLE_BATCH] if permit_id in state.leases]
                if batch:
                    await self._bucket.renew_all(state.pool, batch, until_us, state.ttl_s)
                    state.leases.update((one, until_us) for one in batch if one in state.leases)

    async def penalise(self, pool: Pool, retry_after_s: float) -> None:
        """Let nothing of the pool leave before `retry_after_s` (plus up to a tenth) from now, in any process.

        Permits whose send time lies before that moment are void. Safe to repeat: the moment never moves back.

        Raises:
            LimiterUnavailable: Redis did not answer; this process still keeps to it.
        """
        state = self._state(pool)
        wait_s = retry_after_s * random.uniform(1.0, 1.1)
        self._learn_not_before(state, self._bucket.clock.remote_us(self._now() + wait_s))
        state.not_before_at = max(state.not_before_at, self._now() + wait_s)
        self._learn_not_before(state, await self._bucket.penalise(pool, wait_s, state.ttl_s + wait_s, self._now))

    async def flush(self) -> None:
        """Wait until every settlement so far is written or has failed once more.

        Raises:
            LimiterUnavailable: Redis did not answer; the rest is tried again in the background.
        """
        for state in self._pools.values():
            await self._write_settlements(state)

    async def aclose(self) -> None:
        """Write what is settled, then stop; requests still waiting are cancelled. Safe to repeat."""
        with contextlib.suppress(LimiterUnavailable):
            await self.flush()
        for state in self._pools.values():
            tasks = [task for task in (state.pump, state.flusher, state.refresher) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _sleep_until(self, at: float) -> None:
        delay = at - self._now()
        if delay > 0:
            await asyncio.sleep(delay)

    def _state(self, pool: Pool) -> _PoolState:
        state = self._pools.get(pool.key)
        if state is None:
            state = self._pools[pool.key] = _PoolState(pool)
        return state

    async def _run(self, state: _PoolState) -> None:
        """The pump: serve the queue until it is empty."""
        try:
            while batch := self._next_batch(state):
                state.wake.clear()
                answer = await self._ask(state, batch)
                self._grant(state, batch, answer)
                await self._pause(state, batch, answer)
        except LimiterUnavailable as error:
            for waiting in state.queue:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
        finally:
            for waiting in state.queue:
                waiting.answer.cancel()
            state.queue.clear()

    def _next_batch(self, state: _PoolState) -> list[_Waiting]:
        """The longest front part of the queue that one script call can serve."""
        if any(waiting.answer.done() for waiting in state.queue):
            state.queue = deque(waiting for waiting in state.queue if not waiting.answer.done())
        front = islice(state.queue, self._batch)
        return list(takewhile(lambda waiting: waiting.terms is state.queue[0].terms, front))

    async def _ask(self, state: _PoolState, batch: list[_Waiting]) -> Answer:
        if any(waiting.permit_id in state.unsettled for waiting in batch):
            # Asked again after a release: without this the script would answer with the void permit.
            await self._write_settlements(state)
        if self._now() - state.heard_at > state.ttl_s / 2:
            state.memory = Memory()
        while True:
            now, since = self._now(), state.blocked_since
            answer = await self._bucket.reserve(
                state.pool,
                batch[0].terms,
                [_request(waiting, now) for waiting in batch],
                memory=state.memory,
                ttl_s=state.ttl_s,
                asker=self._asker,
                starved=since is not None and now - since > 2 * batch[0].horizon_s,
                now=self._now,
            )
            state.memory, state.heard_at = answer.memory, self._now()
            self._learn_not_before(state, answer.not_before_us)
            if answer.status != "lost":
                return answer
            await self._bucket.restore(state.pool, state.leases, state.ttl_s)

    def _learn_not_before(self, state: _PoolState, moment_us: int) -> None:
        state.not_before_us = max(state.not_before_us, moment_us)

    def _grant(self, state: _PoolState, batch: list[_Waiting], answer: Answer) -> None:
        for waiting, (send_us, why) in zip(batch, answer.granted, strict=False):
            permit = self._permit(state.pool, waiting, send_us, why)
            state.leases[permit.permit_id] = send_us + round(waiting.lease_s * 1e6)
            if waiting.answer.done():
                self.release_unsent(permit)
            else:
                waiting.answer.set_result(permit)
        for _ in answer.granted:
            state.queue.popleft()
        now = self._now()
        if answer.status == "ok":
            state.refusal, state.blocked_since = None, None
            return
        if answer.granted or state.blocked_since is None or answer.reason == "concurrency":
            state.blocked_since = now
        state.refusal = Refused(answer.wait_s or random.uniform(*CONCURRENCY_POLL_S), answer.reason)
        self._refuse_hopeless(state, now + answer.wait_s)

    def _permit(self, pool: Pool, waiting: _Waiting, send_us: int, why: str) -> Permit:
        terms, send_at = waiting.terms, self._bucket.clock.local(send_us)
        late_after = send_at + terms.slack_s
        return Permit(waiting.permit_id, pool, send_at, waiting.costs, why or None, late_after, send_us, terms.firm)

    def _refuse_hopeless(self, state: _PoolState, possible_at: float) -> None:
        """Answer those whose patience ends before the head of the queue could leave."""
        refusal = state.refusal
        for waiting in state.queue:
            if refusal is not None and not waiting.answer.done() and waiting.deadline < possible_at:
                waiting.answer.set_result(refusal)

    async def _pause(self, state: _PoolState, batch: list[_Waiting], answer: Answer) -> None:
        """Wait before the next script call: for company, for room within the horizon, or for a free slot."""
        if answer.status == "ok" or batch[len(answer.granted)].answer.done():
            await asyncio.sleep(LINGER_S)
            return
        if answer.reason == "concurrency":
            delay_s = random.uniform(*CONCURRENCY_POLL_S)
        else:
            # Room for several more permits gathers while the reserved ones are still ahead of us.
            horizon_s = batch[0].horizon_s
            delay_s = max(0.0, answer.wait_s - horizon_s) + horizon_s * random.uniform(0.05, 0.25)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(delay_s, MAX_RECHECK_S)):
                await state.wake.wait()
        self._refuse_hopeless(state, self._now())

    async def _refresh(self, state: _PoolState) -> None:
        """Learn the not-before moment; permits that come due together share one question."""
        if state.refresher is None or state.refresher.done():
            state.refresher = asyncio.get_running_loop().create_task(self._read_not_before(state))
        await asyncio.shield(state.refresher)

    async def _read_not_before(self, state: _PoolState) -> None:
        self._learn_not_before(state, await self._bucket.not_before_us(state.pool))
        state.heard_at = self._now()

    def _correct(self, permit: Permit, correction: Correction) -> None:
        state = self._state(permit.pool)
        if not permit.send_us or state.leases.pop(permit.permit_id, None) is None:
            return
        state.unsettled[permit.permit_id] = correction
        if len(state.unsettled) > MAX_UNSETTLED:
            del state.unsettled[next(iter(state.unsettled))]
        if state.flusher is None or state.flusher.done():
            state.flusher = asyncio.get_running_loop().create_task(self._flush_soon(state))

    async def _flush_soon(self, state: _PoolState) -> None:
        while state.unsettled:
            await asyncio.sleep(LINGER_S)
            try:
                await self._write_settlements(state)
            except LimiterUnavailable:
                await asyncio.sleep(SETTLE_RETRY_S)

    async def _write_settlements(self, state: _PoolState) -> None:
        async with state.writing:
            while batch := list(islice(state.unsettled.values(), SETTLE_BATCH)):
                await self._bucket.settle(state.pool, batch, state.ttl_s)
                for correction in batch:
                    state.unsettled.pop(correction.permit_id, None)
                if state.refusal is not None and state.refusal.reason == "concurrency":
                    state.wake.set()


def _request(waiting: _Waiting, now: float) -> Request:
    horizon_s = max(0.0, min(waiting.horizon_s, waiting.deadline - now))
    return Request(waiting.permit_id, waiting.lease_s, waiting.costs, horizon_s)
