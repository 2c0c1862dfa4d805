"""The distributed limiter against a real server: never above a limit, hardly below it, and honest about waits."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from tests.servers import ValkeyServer, start_valkey
from tests.strict_limits import Sending, fixed_window, sliding_log, token_bucket
from workers.limiter import Limit, Limiter, LimiterUnavailable, Permit, Pool, PoolLimits, Refused
from workers.limiter.bucket import Bucket, Correction

POOL = Pool("simulator:abc123:small")


@contextlib.asynccontextmanager
async def limiter(server: ValkeyServer, **options) -> AsyncIterator[Limiter]:
    client = Redis.from_url(server.url)
    found = Limiter(client, "test", **options)
    try:
        yield found
    finally:
        await found.aclose()
        await client.aclose()


def limits(units: int, window_s: float, burst: int | None = None, concurrency: int | None = None) -> PoolLimits:
    return PoolLimits(extra=(Limit("rpm", units, window_s, burst or units),), concurrency=concurrency)


async def ask(found: Limiter, allowed: PoolLimits, permit_id: str, **options) -> Permit | Refused:
    costs = options.pop("costs", {"rpm": 1})
    settled = {"lease_s": 30.0, "max_wait_s": 30.0} | options
    return await found.permit(POOL, allowed, costs, permit_id=permit_id, **settled)


async def granted(found: Limiter, allowed: PoolLimits, permit_id: str, **options) -> Permit:
    got = await ask(found, allowed, permit_id, **options)
    assert isinstance(got, Permit), got
    return got


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rpm=st.integers(1, 40),
    tpm=st.integers(100, 3000),
    window_s=st.sampled_from([0.5, 1.0, 2.0]),
    burst=st.floats(0.05, 1.0),
    costs=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=120),
    real=st.floats(0.0, 1.0),
    phase=st.floats(0, 1),
    unsent=st.integers(2, 9),
)
def test_no_strict_provider_would_refuse_what_was_granted(
    valkey, rpm, tpm, window_s, burst, costs, real, phase, unsent
):
    """Send times lie ahead of the clock, so a minute of traffic is judged without waiting for it."""
    rpm_burst, tpm_burst = max(1, int(rpm * burst)), max(1, int(tpm * burst))
    allowed = PoolLimits(extra=(Limit("rpm", rpm, window_s, rpm_burst), Limit("tpm", tpm, window_s, tpm_burst)))
    wanted = [max(1, int(cost * tpm_burst)) for cost in costs]

    async def scenario() -> list[tuple[float, int]]:
        sent = []
        async with limiter(valkey, horizon_s=60.0, batch=16) as found:
            await found.penalise(POOL, 0.0)
            for number, tokens in enumerate(wanted):
                cost = {"rpm": 1, "tpm": tokens}
                got = await ask(found, allowed, f"p{number}", costs=cost, max_wait_s=60.0)
                if isinstance(got, Refused):
                    break
                if number % unsent == 0:
                    found.release_unsent(got)
                    await found.flush()
                    continue
                actual = int(tokens * real) if number % 3 == 0 else tokens
                if actual != tokens:
                    found.settle(got, {"tpm": actual})
                    await found.flush()
                sent.append((got.send_us / 1e6, actual))
        return sent

    with SyncRedis.from_url(valkey.url) as client:
        client.flushall()
    sent = asyncio.run(scenario())
    requests: list[Sending] = [(at, 1) for at, _ in sent]
    moments = [at for at, _ in sent]
    assert moments == sorted(moments)
    for sendings, units, capacity in ((requests, rpm, rpm_burst), (sent, tpm, tpm_burst)):
        assert sliding_log(sendings, units, window_s) == 0
        assert fixed_window(sendings, units, window_s, phase) == 0
        assert token_bucket(sendings, units, window_s, capacity) == 0


@pytest.mark.parametrize("burst", [1, 6, 60])
def test_a_saturated_pool_is_used_to_98_percent(valkey, burst):
    async def scenario() -> list[Permit]:
        async with limiter(valkey, horizon_s=60.0) as found:
            asks = (granted(found, limits(60, 3.0, burst), f"p{n}", max_wait_s=60.0) for n in range(900))
            return await asyncio.gather(*asks)

    moments = [permit.send_at for permit in asyncio.run(scenario())]
    used = 900 / 60 * 3.0 / (moments[-1] - moments[0] + 3.0 / 60)
    print(f"burst {burst}: {used:.1%} used")
    assert used >= 0.98


def test_mixed_request_sizes_use_most_of_a_token_limit(valkey):
    sizes = [10 + (n * 7919) % 120 for n in range(800)]
    allowed = PoolLimits(extra=(Limit("tpm", 3000, 3.0, 600),))

    async def scenario() -> list[Permit]:
        async with limiter(valkey, horizon_s=60.0) as found:
            asks = (ask(found, allowed, f"p{n}", costs={"tpm": size}, max_wait_s=60.0) for n, size in enumerate(sizes))
            return [got for got in await asyncio.gather(*asks) if isinstance(got, Permit)]

    got = asyncio.run(scenario())
    sent = [(permit.send_at, permit.costs["tpm"]) for permit in got]
    used = sum(cost for _, cost in sent) / 3000 * 3.0 / (sent[-1][0] - sent[0][0])
    print(f"mixed sizes: {used:.1%} used")
    assert sliding_log(sent, 3000, 3.0) == 0
    assert used >= 0.97


def test_thousands_of_permits_cost_little(valkey):
    allowed = PoolLimits(rpm=10_000_000, tpm=10**12)

    async def scenario() -> float:
        async with limiter(valkey) as found:
            before = time.process_time()
            asks = (granted(found, allowed, f"p{n}", costs={"rpm": 1, "tpm": 900}) for n in range(2000))
            for permit in await asyncio.gather(*asks):
                found.settle(permit, {"tpm": 500})
            await found.flush()
            return time.process_time() - before

    def server_s() -> float:
        with SyncRedis.from_url(valkey.url) as client:
            found = client.info("cpu")
            return found["used_cpu_user"] + found["used_cpu_sys"]

    before = server_s()
    asker_us = asyncio.run(scenario()) / 2000 * 1e6
    server_us = (server_s() - before) / 2000 * 1e6
    print(f"permit and settlement: {asker_us:.0f} us here, {server_us:.0f} us in the server")
    assert asker_us + server_us < 300


def test_a_cost_above_the_limit_never_fits_and_is_told_so(valkey):
    async def scenario() -> Permit | Refused:
        async with limiter(valkey) as found:
            return await ask(found, limits(10, 60.0), "p", costs={"rpm": 11})

    assert asyncio.run(scenario()) == Refused(math.inf, "rpm", possible=False)


def test_a_refusal_names_the_limit_and_the_exact_wait_and_changes_nothing(valkey):
    allowed = PoolLimits(extra=(Limit("rpm", 10, 60.0, 10), Limit("tpm", 1000, 60.0, 1000)))

    async def scenario() -> tuple[Permit | Refused, Permit | Refused]:
        async with limiter(valkey) as found:
            await granted(found, allowed, "first", costs={"rpm": 1, "tpm": 900})
            large = await ask(found, allowed, "large", costs={"rpm": 1, "tpm": 500}, max_wait_s=0)
            small = await ask(found, allowed, "small", costs={"rpm": 1, "tpm": 100}, max_wait_s=0)
            return large, small

    large, small = asyncio.run(scenario())
    assert isinstance(large, Refused)
    assert large.reason == "tpm"
    assert large.wait_s == pytest.approx(60.7, abs=0.5)
    assert isinstance(small, Permit)
    assert small.bound_by is None


def test_asking_again_with_a_live_id_returns_the_same_moment(valkey):
    async def scenario() -> tuple[Permit, Permit, Permit]:
        async with limiter(valkey) as found, limiter(valkey) as other:
            first = await granted(found, limits(10, 10.0, 1), "same")
            again = await granted(other, limits(10, 10.0, 1), "same")
            found.release_unsent(first)
            fresh = await granted(found, limits(10, 10.0, 1), "same")
            return first, again, fresh

    first, again, fresh = asyncio.run(scenario())
    assert first.send_us == again.send_us
    assert fresh.send_us > first.send_us


def test_settling_gives_back_what_was_not_used_once(valkey):
    allowed = PoolLimits(extra=(Limit("tpm", 1000, 60.0, 1000),))

    async def scenario() -> list[Permit | Refused]:
        async with limiter(valkey) as found:
            first = await granted(found, allowed, "a", costs={"tpm": 1000})
            for _ in range(3):
                found.settle(first, {"tpm": 400})
                await found.flush()
            fits = await ask(found, allowed, "b", costs={"tpm": 600}, max_wait_s=0)
            full = await ask(found, allowed, "c", costs={"tpm": 100}, max_wait_s=0)
            assert isinstance(fits, Permit)
            found.release_unsent(fits)
            await found.flush()
            again = await ask(found, allowed, "d", costs={"tpm": 600}, max_wait_s=0)
            return [fits, full, again]

    fits, full, again = asyncio.run(scenario())
    assert isinstance(fits, Permit)
    assert isinstance(full, Refused)
    assert isinstance(again, Permit)


def test_a_settlement_that_arrives_twice_counts_once(valkey):
    """A reply lost on the way makes the asker repeat; the server itself must know."""
    allowed = PoolLimits(extra=(Limit("tpm", 1000, 60.0, 1000),))

    async def scenario() -> Permit | Refused:
        async with limiter(valkey) as found:
            for name in ("a", "b"):
                await granted(found, allowed, name, costs={"tpm": 500})
            client = Redis.from_url(valkey.url)
            bucket = Bucket(client, "test")
            for _ in range(3):
                await bucket.settle([POOL], [Correction("a", None)], 7200.0)
            await client.aclose()
            return await ask(found, allowed, "c", costs={"tpm": 501}, max_wait_s=0)

    assert isinstance(asyncio.run(scenario()), Refused)


def test_a_call_dearer_than_estimated_is_paid_back_before_the_next(valkey):
    allowed = PoolLimits(extra=(Limit("tpm", 1000, 60.0, 1000),))

    async def scenario() -> Permit | Refused:
        async with limiter(valkey) as found:
            first = await granted(found, allowed, "a", costs={"tpm": 100})
            found.settle(first, {"tpm": 950})
            await found.flush()
            return await ask(found, allowed, "b", costs={"tpm": 100}, max_wait_s=0)

    assert isinstance(asyncio.run(scenario()), Refused)


def test_a_limit_without_refund_keeps_the_estimate(valkey):
    allowed = PoolLimits(extra=(Limit("tpm", 1000, 60.0, 1000, refund=False),))

    async def scenario() -> Permit | Refused:
        async with limiter(valkey) as found:
            first = await granted(found, allowed, "a", costs={"tpm": 1000})
            found.settle(first, {"tpm": 1})
            await found.flush()
            return await ask(found, allowed, "b", costs={"tpm": 100}, max_wait_s=0)

    assert isinstance(asyncio.run(scenario()), Refused)


def test_leases_survive_a_flush(valkey):
    allowed = PoolLimits(concurrency=2)

    async def scenario() -> Permit | Refused:
        async with limiter(valkey) as found:
            await granted(found, allowed, "a")
            await granted(found, allowed, "b")
            with SyncRedis.from_url(valkey.url) as client:
                client.flushall()
            return await ask(found, allowed, "c", max_wait_s=0)

    got = asyncio.run(scenario())
    assert isinstance(got, Refused)
    assert got.reason == "concurrency"


def test_a_silent_server_grants_nothing_and_a_new_one_is_taught_the_scripts():
    async def scenario(server: ValkeyServer) -> None:
        async with limiter(server) as found:
            await granted(found, limits(10, 1.0), "a")
            server.kill()
            with pytest.raises(LimiterUnavailable):
                await ask(found, limits(10, 1.0), "b")
            server.start()
            permit = await granted(found, limits(10, 1.0), "b")
            found.settle(permit)
            await found.flush()

    with start_valkey() as server:
        asyncio.run(scenario(server))


def test_a_pool_without_limits_asks_nobody():
    async def scenario() -> Permit:
        client = Redis.from_url("unix:///nowhere.sock")
        found = Limiter(client, "test")
        permit = await granted(found, PoolLimits(), "a")
        assert await found.wait_until_due(permit)
        found.settle(permit)
        await found.aclose()
        await client.aclose()
        return permit

    assert asyncio.run(scenario()).bound_by is None


def keys_without_expiry(server: ValkeyServer) -> Sequence[bytes]:
    with SyncRedis.from_url(server.url) as client:
        return [key for key in client.scan_iter("*") if client.pttl(key) < 0]


def test_every_key_expires_and_shares_one_hash_tag(valkey):
    async def scenario() -> None:
        async with limiter(valkey) as found:
            permits = [await granted(found, limits(100, 5.0, concurrency=9), f"p{n}") for n in range(5)]
            found.settle(permits[0], {"rpm": 0})
            await found.penalise(POOL, 0.1)
            await found.flush()

    asyncio.run(scenario())
    with SyncRedis.from_url(valkey.url) as client:
        keys = list(client.scan_iter("*"))
    assert len(keys) == 4
    assert all(b"{simulator:abc123:small}" in key for key in keys)
    assert keys_without_expiry(valkey) == []
