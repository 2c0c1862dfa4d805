"""What a process does with calls to a provider that answers nobody, on virtual time."""

import asyncio

import pytest

from tests.simulation.clock import played
from workers.breaker import FAILURES, UNREACHED, Breaker

RUN = 1


def opened() -> Breaker:
    """A breaker that has just seen enough."""
    breaker = Breaker("p", "m")
    for call in range(FAILURES):
        breaker.failed(call, "gone", reached=True)
    assert breaker.is_open
    return breaker


async def settle() -> None:
    """Lets everybody act who can, and nobody wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def now() -> float:
    return asyncio.get_running_loop().time()


class TestOpening:
    def test_it_takes_failures_in_a_row(self) -> None:
        async def scene() -> None:
            breaker = Breaker("p", "m")
            for _ in range(3):
                for call in range(FAILURES - 1):
                    breaker.failed(call, "gone", reached=True)
                breaker.answered()
            assert not breaker.is_open
            assert breaker.lets(1)

        played(scene())

    def test_one_call_alone_does_not_open_it(self) -> None:
        async def scene() -> None:
            breaker = Breaker("p", "m")
            for _ in range(3 * FAILURES):
                breaker.failed(1, "gone", reached=True)
            assert not breaker.is_open
            breaker.failed(2, "gone", reached=True)
            assert breaker.is_open

        played(scene())

    def test_connections_that_never_come_about_open_it_sooner(self) -> None:
        async def scene() -> None:
            breaker = Breaker("p", "m")
            for reached in [False] * (UNREACHED - 1) + [True] + [False] * (UNREACHED - 1):
                breaker.failed(1, "gone", reached=reached)
            assert not breaker.is_open
            breaker.failed(1, "refused", reached=False)
            assert breaker.is_open

        played(scene())


class TestProbes:
    def test_one_call_after_the_other_goes_to_see_after_pauses_that_double(self) -> None:
        sent: list[tuple[int, float]] = []

        async def ask(breaker: Breaker, call: int) -> None:
            assert await breaker.passage(call, may_leave=False)
            assert [other for other in range(20, 30) if breaker.lets(other)] == [call]
            sent.append((call, now()))
            breaker.failed(call, "gone", reached=True)
            breaker.ended(call)

        async def scene() -> None:
            breaker = opened()
            await asyncio.gather(*(ask(breaker, call) for call in range(20, 28)))
            assert breaker.is_open
            assert breaker.waiting() == 0

        played(scene())
        assert sent == list(zip(range(20, 28), [1.0, 3.0, 7.0, 15.0, 31.0, 61.0, 91.0, 121.0], strict=True))

    def test_a_probe_that_hears_nothing_does_not_hold_up_the_next_one(self) -> None:
        async def scene() -> None:
            breaker = opened()
            waits = [asyncio.ensure_future(breaker.passage(call, may_leave=False)) for call in (21, 22, 23)]
            for wait, at in zip(waits, (1.0, 3.0, 7.0), strict=True):
                assert await wait
                assert now() == at
            assert breaker.waiting() == 3
            breaker.failed(22, "no reply", reached=True)
            breaker.ended(22)
            assert (breaker.lets(21), breaker.lets(22), breaker.lets(24)) == (True, False, False)
            breaker.answered()
            assert breaker.lets(24)

        played(scene())

    def test_an_answer_lets_all_go_on_at_once(self) -> None:
        async def scene() -> None:
            breaker = opened()
            waiting = [asyncio.ensure_future(breaker.passage(call, may_leave=False)) for call in range(5)]
            await settle()
            assert breaker.waiting() == 5
            breaker.answered()
            assert await asyncio.gather(*waiting) == [True] * 5
            assert now() == 0.0
            assert (breaker.waiting(), breaker.lasted_s(RUN)) == (0, None)

        played(scene())

    def test_when_nobody_waits_the_next_one_goes_at_once(self) -> None:
        async def scene() -> None:
            breaker = opened()
            await asyncio.sleep(5)
            assert await breaker.passage(21, may_leave=True)
            assert now() == 5.0
            assert not breaker.lets(22)

        played(scene())

    def test_a_probe_that_did_not_leave_hands_its_turn_on(self) -> None:
        async def scene() -> None:
            breaker = opened()
            first, second = (asyncio.ensure_future(breaker.passage(call, may_leave=False)) for call in (21, 22))
            assert await first
            breaker.ended(21)
            assert await second
            assert now() == 1.0
            assert (breaker.lets(21), breaker.lets(22)) == (False, True)

        played(scene())

    @pytest.mark.parametrize("steps", range(4))
    def test_a_wait_that_is_ended_costs_nobody_else_a_turn(self, steps: int) -> None:
        """Whenever it is ended: before the turn is handed on, at the very moment, or after."""

        async def scene() -> None:
            breaker = opened()
            probe, ended, other = (
                asyncio.ensure_future(breaker.passage(call, may_leave=False)) for call in (21, 22, 23)
            )
            assert await probe
            breaker.ended(21)
            for _ in range(steps):
                await asyncio.sleep(0)
            if not ended.cancel():
                breaker.ended(22)
            assert await other
            assert now() == 1.0

        played(scene())

    def test_those_with_another_route_leave_once_a_probe_has_failed(self) -> None:
        async def scene() -> None:
            breaker = opened()
            probe, leaving, staying = (
                asyncio.ensure_future(breaker.passage(call, may_leave=call == 22)) for call in (21, 22, 23)
            )
            assert await probe
            await settle()
            assert not leaving.done()
            breaker.failed(21, "gone", reached=True)
            assert not await leaving
            assert not await breaker.passage(24, may_leave=True)
            assert now() == 1.0
            assert await staying
            assert now() == 3.0

        played(scene())


class TestPatience:
    def test_it_counts_from_when_a_run_met_the_outage_and_anew_when_the_run_was_stopped(self) -> None:
        async def scene() -> None:
            breaker = opened()
            assert breaker.lasted_s(RUN) == 0.0
            await asyncio.sleep(7)
            assert (breaker.lasted_s(RUN), breaker.lasted_s(2)) == (7.0, 0.0)
            breaker.forget(RUN)
            assert breaker.lasted_s(RUN) == 0.0

        played(scene())
