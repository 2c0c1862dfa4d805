"""How much of a limit is used and who gets how much of it, on virtual time: numbers that no machine can blur."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers import ValkeyServer
from tests.strict_limits import Sending, fixed_window, sliding_log, token_bucket
from tests.virtual_limiter import run_virtually
from workers.limiter import Limit, Limiter, Permit, Pool, PoolLimits, Wider

ACCOUNT, LARGE, SMALL = Pool("p:a", "p:a"), Pool("p:a:large", "p:a"), Pool("p:a:small", "p:a")
FREE = PoolLimits()


@dataclass
class Crowd:
    """Requests that one run sends to one pool, as fast as it is let, through the limiters of some processes.

    Attributes:
        many: requests that wait at the same time, over all processes.
        late_s: a request reaches the provider up to so much later.
        took_s: what a reply takes.
    """

    limiters: Sequence[Limiter]
    many: int
    allowed: PoolLimits
    run: str = ""
    pool: Pool = SMALL
    wider: Sequence[Wider] = ()
    weight: float = 1.0
    costs: Callable[[], Mapping[str, int]] = lambda: {"rpm": 1}
    late_s: float = 0.0
    took_s: float = 0.0
    sent: list[tuple[float, Mapping[str, int]]] = field(default_factory=list)

    async def send(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        turns = (self.limiters[number % len(self.limiters)] for number in range(self.many))
        await asyncio.gather(*(self._sender(one, number, until) for number, one in enumerate(turns)))

    async def _sender(self, limiter: Limiter, number: int, until: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            costs = self.costs()
            number += self.many
            got = await limiter.permit(
                self.pool,
                self.allowed,
                costs,
                permit_id=f"{self.run}{number}",
                lease_s=30.0,
                max_wait_s=max(0.0, until - loop.time()),
                run=self.run,
                weight=self.weight,
                wider=self.wider,
            )
            if not isinstance(got, Permit):
                return
            if await limiter.wait_until_due(got):
                await asyncio.sleep(random.uniform(0, self.late_s))
                self.sent.append((loop.time(), costs))
                await asyncio.sleep(self.took_s)
                limiter.settle(got)
            else:
                limiter.release_unsent(got)

    def sendings(self, name: str = "rpm") -> list[Sending]:
        return [(at, costs[name]) for at, costs in self.sent]


class TestStrictServers:
    @pytest.mark.parametrize("processes", [1, 4])
    @pytest.mark.parametrize(("kind", "enough"), [("rpm", 0.98), ("tpm", 0.93)])
    def test_nothing_is_refused_and_hardly_anything_left_unused(self, valkey, processes, kind, enough):
        """Three minutes of 1,200 RPM with a burst of 20, or of 100,000 TPM in requests of 0.1 to 5 %.

        Requests reach the server up to a tenth of a second late, and Redis answers after up to 10 ms.
        """
        units, burst = (1_200, 20) if kind == "rpm" else (100_000, 25_000)
        allowed = PoolLimits(rpm=units, rpm_burst=burst) if kind == "rpm" else PoolLimits(tpm=units, tpm_burst=burst)

        def costs() -> Mapping[str, int]:
            return {kind: 1 if kind == "rpm" else random.randint(units // 1000, units // 20)}

        async def scenario(limiters: list[Limiter]) -> list[Sending]:
            crowd = Crowd(limiters, 60, allowed, costs=costs, late_s=0.1, took_s=0.3)
            await crowd.send(180.0)
            return crowd.sendings(kind)

        sent = run_virtually(valkey, scenario, processes=processes, jitter_s=0.005)
        assert sliding_log(sent, units, 60.0) == 0
        for phase in (0.0, 0.29, 0.77):
            assert fixed_window(sent, units, 60.0, phase) == 0
        assert token_bucket(sent, units, 60.0, burst) == 0
        used = sum(cost for _, cost in sent) / (3 * units)
        print(f"{processes} processes, {kind}: {used:.2%} used by {len(sent)} requests")
        assert used >= enough

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        processes=st.sampled_from([1, 2, 4]),
        rpm=st.integers(30, 600),
        tpm=st.integers(2_000, 60_000),
        burst=st.floats(0.1, 1.0),
        late_s=st.floats(0.0, 0.1),
        jitter_s=st.floats(0.0, 0.05),
        took_s=st.floats(0.0, 3.0),
        phase=st.floats(0, 1),
        seed=st.integers(0, 10_000),
    )
    def test_no_strict_server_would_refuse_whatever_the_network_does(
        self, valkey, processes, rpm, tpm, burst, late_s, jitter_s, took_s, phase, seed
    ):
        rpm_burst, tpm_burst = max(5, int(rpm * burst)), int(tpm * burst)
        allowed = PoolLimits(rpm=rpm, rpm_burst=rpm_burst, tpm=tpm, tpm_burst=tpm_burst)
        most = max(1, min(tpm_burst // 2, 4 * tpm // rpm))

        async def scenario(limiters: list[Limiter]) -> Crowd:
            crowd = Crowd(limiters, 40, allowed, late_s=late_s, took_s=took_s)
            crowd.costs = lambda: {"rpm": 1, "tpm": random.randint(1, most)}
            await crowd.send(75.0)
            return crowd

        crowd = run_virtually(valkey, scenario, processes=processes, jitter_s=jitter_s, seed=seed)
        for name, units, capacity in (("rpm", rpm, rpm_burst), ("tpm", tpm, tpm_burst)):
            sent = crowd.sendings(name)
            assert sliding_log(sent, units, 60.0) == 0
            assert fixed_window(sent, units, 60.0, phase) == 0
            assert token_bucket(sent, units, 60.0, capacity) == 0

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        processes=st.sampled_from([1, 3]),
        rpms=st.tuples(st.integers(30, 400), st.integers(30, 400)),
        account=st.integers(60, 500),
        late_s=st.floats(0.0, 0.1),
        took_s=st.floats(0.0, 2.0),
        phase=st.floats(0, 1),
        seed=st.integers(0, 10_000),
    )
    def test_nor_would_one_that_counts_models_and_the_account(
        self, valkey, processes, rpms, account, late_s, took_s, phase, seed
    ):
        """Two runs at two models of one account."""
        bursts = tuple(max(5, rpm // 10) for rpm in rpms)
        wider = [(ACCOUNT, PoolLimits(rpm=account, rpm_burst=max(5, account // 10)))]

        async def scenario(limiters: list[Limiter]) -> list[list[Sending]]:
            crowds = [
                Crowd(limiters, 30, PoolLimits(rpm=rpm, rpm_burst=burst), f"run{place}", pool, wider)
                for place, (rpm, burst, pool) in enumerate(zip(rpms, bursts, (SMALL, LARGE), strict=True))
            ]
            for crowd in crowds:
                crowd.late_s, crowd.took_s = late_s, took_s
            await asyncio.gather(*(crowd.send(70.0) for crowd in crowds))
            return [crowd.sendings() for crowd in crowds]

        small, large = run_virtually(valkey, scenario, processes=processes, seed=seed)
        limits = ((small, rpms[0], bursts[0]), (large, rpms[1], bursts[1]), (small + large, account, account // 10))
        for sent, units, burst in limits:
            assert sliding_log(sent, units, 60.0) == 0
            assert fixed_window(sent, units, 60.0, phase) == 0
            assert token_bucket(sent, units, 60.0, max(5, burst)) == 0
        # Whatever binds is used: the account, or what both models may do.
        assert len(small + large) >= 0.93 * min(account, sum(rpms)) * 70 / 60


@dataclass(frozen=True)
class Shared:
    """What two runs got while both waited.

    Attributes:
        small: share of the small one.
        first_s: from its first question to its first sending.
        per_s: sendings of both, per second.
    """

    small: float
    first_s: float
    per_s: float


def share(valkey: ValkeyServer, big: Crowd, small: Crowd, processes: int, seconds: float = 20.0) -> Shared:
    """A big run alone for three seconds, then beside a small one, which has the last of the processes to itself."""

    async def scenario(limiters: list[Limiter]) -> Shared:
        big.limiters, small.limiters = limiters[: max(1, processes - 1)], limiters[-1:]
        loop = asyncio.get_running_loop()
        alone_s = 3.0
        first = asyncio.create_task(big.send(alone_s + seconds))
        await asyncio.sleep(alone_s)
        joined = loop.time()
        await small.send(seconds)
        await first
        began = small.sent[0][0]
        both = sum(at >= began for one in (big, small) for at, _ in one.sent)
        after = sum(at >= joined for one in (big, small) for at, _ in one.sent)
        return Shared(len(small.sent) / both, began - joined, after / seconds)

    found = run_virtually(valkey, scenario, processes=processes)
    print(found)
    return found


PER_SECOND_50 = PoolLimits(extra=(Limit("rpm", 100, 2.0, 5),))
SLOTS_8 = PoolLimits(concurrency=8)


class TestRuns:
    """A run with three hundred requests waiting, and one of sixty that comes later, at the same model."""

    @pytest.mark.parametrize("processes", [1, 2, 5])
    @pytest.mark.parametrize(("weight", "part"), [(1.0, 0.5), (4.0, 0.8)])
    def test_a_small_run_gets_its_share_at_once(self, valkey, processes, weight, part):
        big, small = Crowd((), 300, PER_SECOND_50, "big"), Crowd((), 60, PER_SECOND_50, "small", weight=weight)
        found = share(valkey, big, small, processes)
        assert found.small == pytest.approx(part, abs=0.12)
        assert found.first_s < 0.75
        assert found.per_s >= 0.95 * 50

    @pytest.mark.parametrize("processes", [1, 2, 5])
    def test_slots_are_shared_too(self, valkey, processes):
        big, small = (Crowd((), many, SLOTS_8, run, took_s=0.2) for many, run in ((50, "big"), (10, "small")))
        found = share(valkey, big, small, processes)
        assert found.small == pytest.approx(0.5, abs=0.1)
        assert found.first_s < 0.5
        assert found.per_s >= 0.85 * 40

    def test_nothing_is_kept_for_a_run_that_does_not_wait(self, valkey):
        """Two requests at a time take what they need of 50 a second; the rest is the other run's."""
        big, small = Crowd((), 200, PER_SECOND_50, "big"), Crowd((), 2, PER_SECOND_50, "small", took_s=0.4)
        assert share(valkey, big, small, 2).per_s >= 0.95 * 50


class TestModels:
    """The same at two models, when the limit is that of the account."""

    def crowds(
        self, account: PoolLimits, *, large: PoolLimits = FREE, weight: float = 1.0, took_s: float = 0.0, many: int = 60
    ) -> tuple[Crowd, Crowd]:
        wider = [(ACCOUNT, account)]
        return (
            Crowd((), 300, large, "big", LARGE, wider, took_s=took_s),
            Crowd((), many, FREE, "small", SMALL, wider, weight, took_s=took_s),
        )

    @pytest.mark.parametrize("processes", [1, 2, 5])
    @pytest.mark.parametrize(("weight", "part"), [(1.0, 0.5), (4.0, 0.8)])
    def test_a_small_run_gets_its_share_of_the_account_at_once(self, valkey, processes, weight, part):
        found = share(valkey, *self.crowds(PER_SECOND_50, weight=weight), processes)
        assert found.small == pytest.approx(part, abs=0.12)
        assert found.first_s < 0.75
        assert found.per_s >= 0.95 * 50

    @pytest.mark.parametrize("processes", [1, 2, 5])
    def test_slots_of_the_account_are_shared_too(self, valkey, processes):
        found = share(valkey, *self.crowds(SLOTS_8, took_s=0.2), processes)
        assert found.small == pytest.approx(0.5, abs=0.1)
        assert found.first_s < 0.5
        assert found.per_s >= 0.85 * 40

    def test_who_is_short_of_its_own_model_keeps_nobody_from_the_account(self, valkey):
        """The large model takes 5 of 50 a second; its run waits for that, and the other one has the rest."""
        own = PoolLimits(extra=(Limit("rpm", 10, 2.0, 2),))
        found = share(valkey, *self.crowds(PER_SECOND_50, large=own), 5)
        assert found.small == pytest.approx(0.9, abs=0.03)
        # A send time that is reserved for the large model holds up the account, and its burst is a tenth of a second.
        assert found.per_s >= 0.9 * 50

    def test_nothing_of_the_account_is_kept_for_a_run_that_does_not_wait(self, valkey):
        found = share(valkey, *self.crowds(PER_SECOND_50, many=2, took_s=0.4), 5)
        assert found.per_s >= 0.95 * 50
