"""The asker of one process: collects what waits for a pool, asks for many permits at once, and sleeps in between.

A pool has at most one pump per process, and only while requests wait. It asks again when room should have come up, and
a little more often because other processes give back what they did not use.
"""

import asyncio
import contextlib
import math
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from workers.limiter.bucket import Answer, Bucket, Memory, Reach, Request
from workers.limiter.limits import LimiterUnavailable, Permit, Pool, Refused, Sighting
from workers.limiter.settling import Settlements
from workers.limiter.terms import MIN_TTL_S
from workers.limiter.waiting import Queues, Waiting

# One script call per pool and this long: what arrives meanwhile shares the next call.
LINGER_S = 0.002
# Refunds of other processes can free room earlier than the last answer said.
MAX_RECHECK_S = 1.0
# Shares of the horizon: room for several permits gathers while the reserved ones are still ahead of us.
RECHECK_SHARES = (0.25, 0.5)
SMALL_BATCH = 8
CONCURRENCY_POLL_S = (0.02, 0.05)
SHARE_POLL_S = (0.04, 0.1)


@dataclass(slots=True, eq=False)
class PoolState:
    """What this process knows of one pool.

    Attributes:
        asker: names the pump of this pool and process to the others.
        reach: the pool and all wider ones, each with its terms, as the latest request named them.
        leases: live permit ids and the end of their lease on Redis's clock.
        seen: what the provider said about its limits when it answered a permit's request, until that is settled.
        batch: how many requests to ask for next, at most.
        share: what refusals left of the limits, as last reported in the log.
        smaller: limits of the provider that are smaller than ours, as last reported in the log.
    """

    pool: Pool
    settlements: Settlements
    asker: str = field(default_factory=lambda: uuid.uuid4().hex)
    reach: Reach = ()
    queues: Queues = field(default_factory=Queues)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    pump: asyncio.Task[None] | None = None
    refresher: asyncio.Task[None] | None = None
    leases: dict[str, int] = field(default_factory=lambda: dict[str, int]())
    seen: dict[str, Mapping[str, Sighting]] = field(default_factory=lambda: dict[str, Mapping[str, Sighting]]())
    share: float = 1.0
    smaller: dict[str, int] = field(default_factory=lambda: dict[str, int]())
    memory: Memory = field(default_factory=Memory)
    not_before_us: int = 0
    not_before_at: float = -math.inf
    heard_at: float = -math.inf
    ttl_s: float = MIN_TTL_S
    batch: int = SMALL_BATCH
    refusal: Refused | None = None
    blocked_since: float | None = None

    def pools(self) -> list[Pool]:
        """The pool itself, then the wider ones."""
        return [pool for pool, _ in self.reach] or [self.pool]

    def places(self) -> dict[str, tuple[int, int]]:
        """Where each limit stands that requests must keep: place of the nearest pool that has it, from 1, and units."""
        found: dict[str, tuple[int, int]] = {}
        for place, (_, terms) in enumerate(self.reach, 1):
            for name, units in zip(terms.names, terms.units, strict=True):
                found.setdefault(name, (place, units))
        return found

    def learn_not_before(self, moment_us: int) -> None:
        """Keep the latest moment before which nothing may leave, on Redis's clock."""
        self.not_before_us = max(self.not_before_us, moment_us)


class Pump:
    """Serves the queues of all pools of a process.

    Args:
        batch: permits asked for with one script call.
        find_state: what this process knows of a pool.
        release: gives back a permit that nobody waits for any more.
    """

    def __init__(
        self, bucket: Bucket, batch: int, find_state: Callable[[Pool], PoolState], release: Callable[[Permit], None]
    ) -> None:
        self._bucket = bucket
        self._batch = batch
        self._find_state = find_state
        self._release = release

    async def run(self, state: PoolState) -> None:
        """Serve the queues of a pool until they are empty. One at a time per pool."""
        try:
            while batch := state.queues.batch(min(self._batch, state.batch)):
                state.wake.clear()
                answer = await self._ask(state, batch)
                self._grant(state, batch, answer)
                await self._pause(state, batch, answer)
        except LimiterUnavailable as error:
            for waiting in state.queues:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
        finally:
            for waiting in state.queues:
                waiting.answer.cancel()
            state.queues.clear()

    async def _ask(self, state: PoolState, batch: list[Waiting]) -> Answer:
        if any(waiting.permit_id in state.settlements.unwritten for waiting in batch):
            # Asked again after a release: without this the script would answer with the void permit.
            await state.settlements.write_all()
        reach = state.reach
        states = [self._find_state(pool) for pool, _ in reach]
        while True:
            now, since = now_s(), state.blocked_since
            for one in states:
                if now - one.heard_at > one.ttl_s / 2:
                    one.memory = Memory()
            answer = await self._bucket.reserve(
                reach,
                [_request(waiting, now) for waiting in batch],
                memories=[one.memory for one in states],
                ttl_s=state.ttl_s,
                asker=state.asker,
                starved=since is not None and now - since > 2 * batch[0].horizon_s,
                now=now_s,
            )
            for one, memory in zip(states, answer.memories, strict=True):
                one.memory, one.heard_at = _later(one.memory, memory), now_s()
            state.learn_not_before(answer.not_before_us)
            if answer.status != "lost":
                return answer
            for pool, _ in reach:
                await self._bucket.restore(pool, state.leases, state.ttl_s)

    def _grant(self, state: PoolState, batch: list[Waiting], answer: Answer) -> None:
        for place, send_us, why in answer.granted:
            waiting = batch[place]
            permit = self._permit(state, waiting, send_us, why)
            state.leases[permit.permit_id] = send_us + round(waiting.lease_s * 1e6)
            if waiting.answer.done():
                self._release(permit)
            else:
                waiting.answer.set_result(permit)
        state.queues.remove([batch[place] for place, _, _ in answer.granted])
        # Naming requests that cannot be granted yet costs time on both sides.
        state.batch = 2 * max(
            len(answer.granted), SMALL_BATCH // 2 if answer.status == "refused" else min(state.batch, self._batch)
        )
        now = now_s()
        if answer.status == "ok":
            state.refusal, state.blocked_since = None, None
            return
        if answer.granted or state.blocked_since is None or answer.reason in ("concurrency", "share"):
            state.blocked_since = now
        state.refusal = Refused(answer.wait_s or random.uniform(*CONCURRENCY_POLL_S), answer.reason)
        self._refuse_hopeless(state, now + answer.wait_s)

    def _permit(self, state: PoolState, waiting: Waiting, send_us: int, why: str) -> Permit:
        send_at = self._bucket.clock.local(send_us)
        late_after = send_at + min(terms.slack_s for _, terms in state.reach)
        firm = state.reach[0][1].firm
        return Permit(waiting.permit_id, state.pool, send_at, waiting.costs, why or None, late_after, send_us, firm)

    def _refuse_hopeless(self, state: PoolState, possible_at: float) -> None:
        """Answer those whose patience ends before the next request could leave."""
        refusal = state.refusal
        for waiting in state.queues:
            if refusal is not None and not waiting.answer.done() and waiting.deadline < possible_at:
                waiting.answer.set_result(refusal)

    async def _pause(self, state: PoolState, batch: list[Waiting], answer: Answer) -> None:
        """Wait before the next script call: for company, for room within the horizon, or for a free slot."""
        if answer.status == "ok" or all(waiting.answer.done() for waiting in batch):
            await asyncio.sleep(LINGER_S)
            return
        if answer.reason == "concurrency":
            delay_s = random.uniform(*CONCURRENCY_POLL_S)
        elif answer.reason == "share":
            delay_s = random.uniform(*SHARE_POLL_S)
        else:
            horizon_s = batch[0].horizon_s
            delay_s = max(0.0, answer.wait_s - horizon_s) + horizon_s * random.uniform(*RECHECK_SHARES)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(delay_s, MAX_RECHECK_S)):
                await state.wake.wait()
        self._refuse_hopeless(state, now_s())


def now_s() -> float:
    """The reading of the running event loop's clock."""
    return asyncio.get_running_loop().time()


def _request(waiting: Waiting, now: float) -> Request:
    horizon_s = max(0.0, min(waiting.horizon_s, waiting.deadline - now))
    return Request(waiting.permit_id, waiting.lease_s, waiting.costs, horizon_s, waiting.run, waiting.weight)


def _later(old: Memory, new: Memory) -> Memory:
    """What is known of a pool's days holds until the same incarnation tells something newer."""
    return new if new.days or new.incarnation != old.incarnation else Memory(new.incarnation, new.last_us, old.days)
