"""What the limiter does while time passes: waits, leases, penalties, lateness, losses. On virtual time, so quickly."""

import asyncio
import contextlib
from typing import Any

import pytest
from redis import Redis

from tests.strict_limits import sliding_log
from tests.virtual_limiter import run_virtually
from workers.limiter import Limit, Limiter, Permit, Pool, PoolLimits, Refused

POOL = Pool("simulator:abc123:small")


def limits(units: int, window_s: float, burst: int | None = None, concurrency: int | None = None) -> PoolLimits:
    return PoolLimits(extra=(Limit("rpm", units, window_s, burst or units),), concurrency=concurrency)


async def ask(found: Limiter, allowed: PoolLimits, permit_id: str, **options: Any) -> Permit | Refused:
    costs = options.pop("costs", {"rpm": 1})
    settled = {"lease_s": 30.0, "max_wait_s": 30.0} | options
    return await found.permit(POOL, allowed, costs, permit_id=permit_id, **settled)


async def granted(found: Limiter, allowed: PoolLimits, permit_id: str, **options: Any) -> Permit:
    got = await ask(found, allowed, permit_id, **options)
    assert isinstance(got, Permit), got
    return got


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_patience_decides_between_a_reserved_moment_and_a_refusal(valkey):
    async def scenario(limiters: list[Limiter]) -> tuple[Permit | Refused, Permit | Refused]:
        await granted(limiters[0], limits(10, 10.0, 1), "first")
        impatient = await ask(limiters[0], limits(10, 10.0, 1), "second", max_wait_s=0.5)
        patient = await ask(limiters[0], limits(10, 10.0, 1), "second", max_wait_s=2.0)
        return impatient, patient

    impatient, patient = run_virtually(valkey, scenario)
    assert isinstance(impatient, Refused)
    assert impatient.reason == "rpm"
    assert isinstance(patient, Permit)
    assert patient.bound_by == "rpm"


def test_requests_that_wait_follow_a_new_limit(valkey):
    async def scenario(limiters: list[Limiter]) -> float:
        (found,) = limiters
        await granted(found, limits(2, 60.0), "a", costs={"rpm": 2})
        waiting = asyncio.create_task(granted(found, limits(2, 60.0), "b", max_wait_s=70.0, horizon_s=0.1))
        await asyncio.sleep(5.0)
        assert not waiting.done()
        began = now_s()
        await granted(found, limits(50, 60.0), "c")
        await waiting
        return now_s() - began

    assert run_virtually(valkey, scenario) < 1.1


class TestConcurrency:
    def test_it_is_counted_over_processes_and_passed_on_at_once(self, valkey):
        allowed = PoolLimits(concurrency=2)

        async def scenario(limiters: list[Limiter]) -> tuple[str, float]:
            found, other = limiters
            first = await granted(found, allowed, "a")
            await granted(other, allowed, "b")
            refused = await ask(found, allowed, "c", max_wait_s=0)
            assert isinstance(refused, Refused)
            waiting = asyncio.create_task(granted(found, allowed, "d"))
            await asyncio.sleep(5.0)
            assert not waiting.done()
            began = now_s()
            found.settle(first)
            await waiting
            return refused.reason, now_s() - began

        reason, took_s = run_virtually(valkey, scenario, processes=2)
        assert reason == "concurrency"
        assert took_s < 0.015

    def test_a_crashed_process_frees_its_slot_when_the_lease_ends(self, valkey):
        allowed = PoolLimits(concurrency=1)

        async def scenario(limiters: list[Limiter]) -> tuple[float, bool]:
            found, other = limiters
            kept = await granted(found, allowed, "a", lease_s=3.0)
            began = now_s()
            assert await found.renew(kept, 6.0)
            await granted(other, allowed, "b")
            return now_s() - began, await found.renew(kept, 1.0)

        waited_s, alive = run_virtually(valkey, scenario, processes=2)
        assert 6.0 <= waited_s < 6.1
        assert not alive


class TestMoments:
    def test_a_penalty_moves_the_whole_pool_and_voids_what_was_reserved(self, valkey):
        allowed = limits(120, 60.0, 1)

        async def scenario(limiters: list[Limiter]) -> tuple[bool, bool, Permit, float]:
            found, other = limiters
            await granted(found, allowed, "a")
            ahead = await granted(found, allowed, "b")
            await other.penalise(POOL, 1.0)
            moved_at = now_s()
            own = other.still_valid(ahead)
            due = await found.wait_until_due(ahead)
            found.release_unsent(ahead)
            again = await granted(found, allowed, "b")
            assert await found.wait_until_due(again)
            return own, due, again, again.send_at - moved_at

        own, due, again, delay_s = run_virtually(valkey, scenario, processes=2, horizon_s=5.0)
        assert not own
        assert not due
        assert again.bound_by == "not_before"
        assert 0.99 < delay_s < 1.15

    @pytest.mark.parametrize(("late_s", "valid"), [(0.009, True), (0.012, False)])
    def test_a_permit_used_too_late_is_void(self, valkey, late_s, valid):
        """Half of the margin of 20 ms is the process's, the other half the network's."""

        async def scenario(limiters: list[Limiter]) -> bool:
            permit = await granted(limiters[0], limits(10, 1.0), "a")
            await asyncio.sleep(permit.send_at + late_s - now_s())
            return await limiters[0].wait_until_due(permit)

        assert run_virtually(valkey, scenario, jitter_s=0.0) is valid

    @pytest.mark.parametrize("seed", range(5))
    def test_a_cancelled_request_gives_its_permit_back(self, valkey, seed):
        """Cancelled before, while and after the server answers."""

        async def scenario(limiters: list[Limiter]) -> Permit | Refused:
            (found,) = limiters
            for number in range(20):
                waiting = asyncio.create_task(granted(found, limits(1, 60.0), f"p{number}"))
                await asyncio.sleep(0.001 * number / 2)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    found.release_unsent(await waiting)
                await asyncio.sleep(0.01)
                await found.flush()
            return await ask(found, limits(1, 60.0), "last", max_wait_s=3.0, horizon_s=60.0)

        got = run_virtually(valkey, scenario, seed=seed)
        assert isinstance(got, Permit), got

    def test_a_request_that_is_cancelled_just_when_it_is_granted_gives_its_permit_back(self, valkey):
        """Two are granted by one answer, and the first one awake cancels the other."""

        async def scenario(limiters: list[Limiter]) -> list[Permit | Refused]:
            (found,) = limiters

            async def first() -> Permit:
                permit = await granted(found, limits(2, 60.0), "a")
                second.cancel()
                return permit

            waiting = asyncio.create_task(first())
            second = asyncio.create_task(granted(found, limits(2, 60.0), "b"))
            kept = await waiting
            with contextlib.suppress(asyncio.CancelledError):
                found.release_unsent(await second)
                raise AssertionError("it was not cancelled in time")
            return [kept, *[await ask(found, limits(2, 60.0), name, max_wait_s=3.0) for name in ("c", "d")]]

        kept, free, full = run_virtually(valkey, scenario)
        assert isinstance(kept, Permit)
        assert isinstance(free, Permit), free
        assert isinstance(full, Refused)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_large_request_is_not_starved_by_small_ones(valkey, processes):
    allowed = PoolLimits(extra=(Limit("tpm", 1000, 1.0, 250),))

    async def small(found: Limiter, number: int, until: float) -> None:
        while now_s() < until:
            number += 100
            got = await ask(found, allowed, f"small{number}", costs={"tpm": 50}, max_wait_s=5.0)
            if isinstance(got, Permit):
                await found.wait_until_due(got)
                found.settle(got)

    async def scenario(limiters: list[Limiter]) -> float:
        until = now_s() + 20.0
        crowd = [asyncio.create_task(small(limiters[n % processes], n, until)) for n in range(20)]
        await asyncio.sleep(1.0)
        began = now_s()
        await granted(limiters[-1], allowed, "large", costs={"tpm": 900}, max_wait_s=19.0)
        took_s = now_s() - began
        await asyncio.gather(*crowd)
        return took_s

    assert run_virtually(valkey, scenario, processes=processes, horizon_s=0.2) < 4.0


class TestLosses:
    async def send(self, found: Limiter, allowed: PoolLimits, name: str, until: float, sent: list[float]) -> None:
        number = 0
        while now_s() < until:
            number += 1
            got = await ask(found, allowed, f"{name}-{number}", max_wait_s=max(0.0, until - now_s()))
            if isinstance(got, Permit) and await found.wait_until_due(got):
                sent.append(now_s())
                found.settle(got)
            elif isinstance(got, Permit):
                found.release_unsent(got)

    def test_losing_the_state_exceeds_the_limit_by_no_more_than_the_burst(self, valkey):
        units, burst = 100, 10
        allowed = limits(units, 1.0, burst)

        async def scenario(limiters: list[Limiter]) -> list[float]:
            sent: list[float] = []
            until = now_s() + 12.0
            senders = [
                asyncio.create_task(self.send(one, allowed, f"{number}.{turn}", until, sent))
                for number, one in enumerate(limiters)
                for turn in range(40)
            ]
            with Redis.from_url(valkey.url) as client:
                for _ in range(5):
                    await asyncio.sleep(2.0)
                    client.flushall()
            await asyncio.gather(*senders)
            return sent

        sent = [(at, 1) for at in run_virtually(valkey, scenario, processes=2)]
        print(f"{len(sent)} sent in 12 s with five losses, {units} allowed per second")
        assert sliding_log(sent, units + burst, 1.0) == 0
        assert len(sent) > 0.7 * 12 * units
