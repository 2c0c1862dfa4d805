"""What the limiter does beyond one bucket: several pools and days, what providers say, and several processes."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from providers.headers import rate_limit_hint
from tests.servers import ValkeyServer
from tests.strict_limits import fixed_window, sliding_log, token_bucket
from tests.virtual_limiter import run_virtually
from workers import charges
from workers.limiter import Limit, Limiter, Permit, Pool, PoolLimits, Refused, Sighting

ROOT = Path(__file__).parents[2]
MODEL, OTHER, ACCOUNT = Pool("p:a:small", "p:a"), Pool("p:a:large", "p:a"), Pool("p:a", "p:a")


@contextlib.asynccontextmanager
async def limiter(server: ValkeyServer, **options) -> AsyncIterator[Limiter]:
    client = Redis.from_url(server.url)
    found = Limiter(client, "test", **options)
    try:
        yield found
    finally:
        await found.aclose()
        await client.aclose()


def per(window_s: float, **units: int) -> PoolLimits:
    return PoolLimits(extra=tuple(Limit(name, most, window_s, most) for name, most in units.items()))


async def ask(found: Limiter, allowed: PoolLimits, permit_id: str, **options) -> Permit | Refused:
    pool, costs = options.pop("pool", MODEL), options.pop("costs", {"rpm": 1, "rpd": 1})
    return await found.permit(pool, allowed, costs, permit_id=permit_id, **({"lease_s": 30, "max_wait_s": 0} | options))


class TestPools:
    def test_a_model_and_its_account_are_charged_together_or_not_at_all(self, valkey):
        wider = [(ACCOUNT, per(60.0, rpm=3))]

        async def scenario() -> list[Permit | Refused]:
            async with limiter(valkey) as found, limiter(valkey) as other:
                one = per(60.0, rpm=2)
                got = [await ask(found, one, f"a{n}", wider=wider) for n in range(3)]
                got += [await ask(other, one, f"b{n}", wider=wider, pool=OTHER) for n in range(2)]
                found.release_unsent(got[0])
                await found.flush()
                return [*got, await ask(other, one, "b1", wider=wider, pool=OTHER)]

        got = asyncio.run(scenario())
        told = ["ok" if isinstance(one, Permit) else one.reason for one in got]
        # The third request of the first model finds that model's limit; the second of the other one the account's.
        assert told == ["ok", "ok", "rpm", "ok", "shared:rpm", "ok"]
        with SyncRedis.from_url(valkey.url) as client:
            keys = list(client.scan_iter("*"))
            assert all(b"{p:a}" in key for key in keys)
            assert all(client.pttl(key) > 0 for key in keys)

    def test_concurrency_of_an_account_is_counted_over_its_models(self, valkey):
        wider = [(ACCOUNT, PoolLimits(concurrency=1))]

        async def scenario() -> list[Permit | Refused]:
            async with limiter(valkey) as found:
                first = await ask(found, per(60.0, rpm=9), "a", wider=wider)
                refused = await ask(found, per(60.0, rpm=9), "b", wider=wider, pool=OTHER)
                found.settle(first)
                await found.flush()
                return [refused, await ask(found, per(60.0, rpm=9), "b", wider=wider, pool=OTHER)]

        refused, granted = asyncio.run(scenario())
        assert isinstance(refused, Refused)
        assert refused.reason == "concurrency"
        assert isinstance(granted, Permit)

    def test_pools_without_a_common_scope_are_turned_away(self, valkey):
        async def scenario() -> None:
            async with limiter(valkey) as found:
                await ask(found, per(60.0, rpm=1), "a", wider=[(Pool("elsewhere"), per(60.0, rpm=1))])

        with pytest.raises(ValueError, match="no scope in common"):
            asyncio.run(scenario())

    def test_input_and_output_tokens_are_limited_apart(self, valkey):
        allowed = PoolLimits(itpm=1000, otpm=100, tpm_burst=1000)

        async def scenario() -> list[Permit | Refused]:
            async with limiter(valkey) as found:
                first = await ask(found, allowed, "a", costs={"rpm": 1, "itpm": 300, "otpm": 80})
                second = await ask(found, allowed, "b", costs={"rpm": 1, "itpm": 300, "otpm": 80})
                found.settle(first, {"itpm": 300, "otpm": 10})
                await found.flush()
                return [second, await ask(found, allowed, "b", costs={"rpm": 1, "itpm": 300, "otpm": 80})]

        before, after = asyncio.run(scenario())
        assert isinstance(before, Refused)
        assert before.reason == "otpm"
        assert isinstance(after, Permit)


class TestDays:
    @pytest.mark.parametrize("zone", ["UTC", "America/Los_Angeles"])
    def test_a_day_is_used_at_once_and_then_closed_until_midnight_there(self, valkey, zone):
        allowed = PoolLimits(rpd=5, day_zone=zone)

        async def scenario() -> tuple[list[Permit | Refused], Permit | Refused]:
            async with limiter(valkey) as found, limiter(valkey) as other:
                got = [await ask(found, allowed, f"p{n}") for n in range(5)]
                return got, await ask(other, allowed, "late")

        got, late = asyncio.run(scenario())
        assert all(isinstance(one, Permit) for one in got)
        assert isinstance(late, Refused)
        assert late.reason == "rpd"
        opens = datetime.now(UTC) + timedelta(seconds=late.wait_s)
        assert 0 < late.wait_s <= 25 * 3600
        assert (opens.minute, opens.hour in ((0,) if zone == "UTC" else (7, 8))) == (0, True)

    def test_days_are_not_forgotten_with_the_state(self, valkey):
        allowed = PoolLimits(rpd=5)

        async def scenario() -> Permit | Refused:
            async with limiter(valkey) as found:
                for number in range(5):
                    await ask(found, allowed, f"p{number}")
                with SyncRedis.from_url(valkey.url) as client:
                    client.flushall()
                return await ask(found, allowed, "late", max_wait_s=3)

        late = asyncio.run(scenario())
        assert isinstance(late, Refused)
        assert late.reason == "rpd"

    def test_what_was_never_sent_is_not_counted(self, valkey):
        allowed = PoolLimits(rpd=1)

        async def scenario() -> Permit | Refused:
            async with limiter(valkey) as found:
                found.release_unsent(await ask(found, allowed, "a"))
                await found.flush()
                return await ask(found, allowed, "b")

        assert isinstance(asyncio.run(scenario()), Permit)


class TestSightings:
    def sight(self, valkey, *seen: Mapping[str, Sighting], units: int = 10) -> int:
        """How many of `units` more requests go through after each of as many was answered with what was seen."""

        async def scenario() -> int:
            async with limiter(valkey) as found, limiter(valkey) as other:
                allowed = per(60.0, rpm=units)
                permits = [await ask(found, allowed, f"p{number}") for number in range(len(seen))]
                for permit, sighting in zip(permits, seen, strict=True):
                    found.adopt(permit, sighting)
                    found.settle(permit)
                    await found.flush()
                got = [await ask(other, allowed, f"more{number}") for number in range(units)]
                return sum(isinstance(one, Permit) for one in got)

        return asyncio.run(scenario())

    def test_what_others_used_is_counted_here_too(self, valkey):
        assert self.sight(valkey, {"rpm": Sighting(10, 2)}) == 2

    @pytest.mark.parametrize(("kind", "left"), [("input", 300), ("output", 50)])
    def test_input_and_output_tokens_that_others_used_are_counted_apart(self, valkey, kind, left):
        """Headers as Anthropic writes them, with what it rounds."""
        headers = {"anthropic-ratelimit-requests-limit": "50", f"anthropic-ratelimit-{kind}-tokens-limit": "5000"}
        headers[f"anthropic-ratelimit-{kind}-tokens-remaining"] = str(1000 + left)
        hint = rate_limit_hint(headers)
        assert hint is not None

        async def scenario(limiters: list[Limiter]) -> list[Permit | Refused]:
            found, other = limiters
            allowed, cost = PoolLimits(itpm=5000, otpm=5000, tpm_burst=5000), {"itpm": 100, "otpm": 10}
            first = await ask(found, allowed, "a", costs=cost)
            found.adopt(first, charges.sightings(hint))
            found.settle(first, cost)
            await found.flush()
            return [await ask(other, allowed, f"more{number}", costs=cost) for number in range(9)]

        # What is missing comes back at the pace of the limit: on real time a busy machine would see it.
        got = run_virtually(valkey, scenario, processes=2, jitter_s=0.0)
        fits = left // {"input": 100, "output": 10}[kind]
        assert [isinstance(one, Permit) for one in got] == [number < fits for number in range(9)]
        assert {one.reason for one in got if isinstance(one, Refused)} == {f"{kind[0]}tpm"}

    def test_a_limit_of_the_account_is_heeded_where_it_stands(self, valkey):
        """Both models see what was said to one of them, of the limit that they share and of no other."""

        async def scenario() -> list[Permit | Refused]:
            async with limiter(valkey) as found, limiter(valkey) as other:
                wider = [(ACCOUNT, per(60.0, rpm=10))]
                first = await ask(found, PoolLimits(), "a", wider=wider)
                found.adopt(first, {"rpm": Sighting(10, 3)})
                found.settle(first)
                await found.flush()
                got = [await ask(other, PoolLimits(), f"{n}", pool=OTHER, wider=wider) for n in range(5)]
                return [*got, await ask(other, per(60.0, rpm=5), "own")]

        got = asyncio.run(scenario())
        assert [isinstance(one, Permit) for one in got] == [True, True, True, False, False, True]

    def test_more_than_we_know_of_changes_nothing(self, valkey):
        assert self.sight(valkey, {"rpm": Sighting(1000, 900)}) == 9

    def test_a_smaller_limit_holds_from_now_on(self, valkey):
        assert self.sight(valkey, {"rpm": Sighting(4, 3)}) == 3

    def test_answers_that_were_overtaken_say_nothing_new(self, valkey):
        """Both were sent before anybody knew; the second must not be counted on top of the first."""
        assert self.sight(valkey, {"rpm": Sighting(10, 5)}, {"rpm": Sighting(10, 4)}) == 4

    def test_what_others_used_stays_counted_until_the_provider_is_full_again(self, valkey):
        assert self.sight(valkey, {"rpm": Sighting(10, 2, 40.0)}) == 2

    def test_what_is_back_in_a_moment_is_not_missed_for_a_minute(self, valkey):
        assert self.sight(valkey, {"rpm": Sighting(10, 0, 0.0)}) == 9


class TestShrinking:
    def test_two_refusals_are_no_wave_and_three_are(self, valkey):
        async def scenario() -> list[float]:
            client = Redis.from_url(valkey.url)
            async with limiter(valkey) as found, limiter(valkey) as other:
                shares = []
                for asker in (found, other, found, other):
                    await asker.penalise(MODEL, 0.0)
                    shares.append(float(await client.hget(found._bucket.keys(MODEL)[0], "f")))
                await client.aclose()
                return shares

        assert asyncio.run(scenario()) == [1.0, 1.0, 0.8, 0.8]

    @pytest.mark.parametrize(
        ("pause_s", "sending_s", "expected"),
        [(30.0, 5.0, [1.0, 1.0, 0.8]), (1.0, 5.0, [1.0, 1.0, 0.8]), (1.0, 35.0, [1.0, 1.0, 1.0])],
    )
    def test_refusals_of_what_was_on_its_way_together_are_one(self, valkey, pause_s, sending_s, expected):
        """A burst that came late is refused twenty times and says nothing about the limit; pauses are no sending."""

        async def scenario(limiters: list[Limiter]) -> list[float]:
            shares = []
            with SyncRedis.from_url(valkey.url) as client:
                for _ in expected:
                    await asyncio.gather(*(limiters[n % 2].penalise(MODEL, pause_s) for n in range(20)))
                    shares.append(float(client.hget(limiters[0]._bucket.keys(MODEL)[0], "f")))
                    # A pause lasts up to a tenth longer.
                    await asyncio.sleep(1.1 * pause_s + sending_s)
            return shares

        assert run_virtually(valkey, scenario, processes=2) == expected

    def test_a_pool_that_was_cut_sends_less_and_recovers_by_the_minute(self, valkey):
        async def scenario() -> list[int]:
            client = Redis.from_url(valkey.url)
            counts = []
            async with limiter(valkey) as found:
                state = found._bucket.keys(MODEL)[0]
                for share, minutes in ((0.5, 0), (0.5, 5), (0.9, 99)):
                    await client.flushall()
                    since = time.time() - 60 * minutes - 5
                    await client.hset(state, mapping={"f": share, "f_at": round(since * 1e6)})
                    found._pools.clear()
                    got = [await ask(found, per(60.0, rpm=100), f"{minutes}-{n}") for n in range(100)]
                    counts.append(sum(isinstance(one, Permit) for one in got))
            await client.aclose()
            return counts

        assert asyncio.run(scenario()) == [50, 60, 100]


class TestChanges:
    def test_a_lowered_limit_holds_at_once_and_a_raised_one_too(self, valkey):
        async def scenario() -> list[int]:
            counts = []
            async with limiter(valkey) as found:
                for most in (20, 10, 40):
                    got = [await ask(found, per(60.0, rpm=most), f"{most}-{n}") for n in range(15)]
                    counts.append(sum(isinstance(one, Permit) for one in got))
            return counts

        # 15 of 20; all of 10 are gone then; and of the burst of 20 a quarter was left, which is 10 of a burst of 40.
        assert asyncio.run(scenario()) == [15, 0, 10]


def send_from(valkey: ValkeyServer, processes: int, units: int, kind: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.integration.limiter_process", valkey.url, str(units), "2.0", "4.5"]
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(subprocess.Popen([*command, str(number), kind], stdout=subprocess.PIPE, cwd=ROOT))
            for number in range(processes)
        ]
        return [json.loads(node.communicate(timeout=60)[0]) for node in nodes]


@pytest.mark.parametrize(("processes", "kind"), [(1, "requests"), (4, "requests"), (4, "tokens")])
def test_no_strict_server_would_refuse_what_really_left(valkey, processes, kind):
    """Real processes and clocks; a request reaches the servers up to 8 ms late.

    How much of a limit is used is told exactly by the tests on virtual time; here a busy machine has its say.
    """
    units, window_s = (200 if kind == "requests" else 20_000), 2.0
    reports = send_from(valkey, processes, units, kind)
    assert all(report["left"] for report in reports)
    sent = [(at, cost) for report in reports for at, cost in zip(report["left"], report["costs"], strict=True)]
    due = [(at, cost) for report in reports for at, cost in zip(report["due"], report["costs"], strict=True)]
    held_up = sum(report["held_up"] for report in reports)
    for sendings in [due] if held_up else [due, sent]:
        assert sliding_log(sendings, units, window_s) == 0
        for phase in (0.0, 0.3, 0.77):
            assert fixed_window(sendings, units, window_s, phase) == 0
    # A bucket of the very burst is judged by the server's clock: a loop that is kept waiting reads its own late.
    assert token_bucket(due, units, window_s, units // 10) == 0
    began = min(at for at, _ in sent)
    used = sum(cost for at, cost in sent if at <= began + 2 * window_s) / (2 * units)
    cpu_us = sum(report["cpu_s"] for report in reports) / len(sent) * 1e6
    told = f"{used:.1%} used, {len(sent)} requests, {cpu_us:.0f} us of CPU for each, {held_up} held up"
    print(f"{processes} processes, {kind}: {told}")
    assert used >= 0.5
