"""How runs share the places of a process at a provider."""

import asyncio
from collections import Counter

import pytest

from workers.slots import Slots


async def _served(size: int, wishes: list[tuple[int, float]]) -> list[int]:
    """The runs in the order in which they got places, given up at once, after all have asked."""
    slots = Slots(size)
    order: list[int] = []
    for _ in range(size):
        await slots.acquire(0, 1.0)

    async def one(run: int, weight: float) -> None:
        async with slots.place(run, weight):
            order.append(run)

    tasks = [asyncio.ensure_future(one(*wish)) for wish in wishes]
    await asyncio.sleep(0)
    for _ in range(size):
        slots.release()
    await asyncio.gather(*tasks)
    return order


def test_a_run_that_asks_last_does_not_wait_behind_a_crowd():
    order = asyncio.run(_served(1, [*[(1, 1.0)] * 100, *[(2, 1.0)] * 3]))
    assert order[:6].count(2) == 3
    assert Counter(order) == {1: 100, 2: 3}


@pytest.mark.parametrize(("weight", "of_ninety"), [(1.0, 45), (2.0, 60), (0.5, 30)])
def test_places_are_shared_by_weight(weight: float, of_ninety: int):
    order = asyncio.run(_served(1, [*[(1, 1.0)] * 200, *[(2, weight)] * 200]))
    assert abs(order[:90].count(2) - of_ninety) <= 1


def test_a_run_that_comes_late_is_not_made_up_to():
    async def scenario() -> list[int]:
        slots, order = Slots(1), list[int]()
        await slots.acquire(1, 1.0)

        async def one(run: int) -> None:
            await slots.acquire(run, 1.0)
            order.append(run)

        first = [asyncio.ensure_future(one(1)) for _ in range(100)]
        await asyncio.sleep(0)
        for _ in range(50):
            slots.release()
            await asyncio.sleep(0)
        second = [asyncio.ensure_future(one(2)) for _ in range(50)]
        await asyncio.sleep(0)
        for _ in range(100):
            slots.release()
            await asyncio.sleep(0)
        await asyncio.gather(*first, *second)
        return order[50:]

    assert 9 <= asyncio.run(scenario())[:20].count(2) <= 11


def test_there_are_never_more_than_there_are_places_and_cancelled_waits_leave_none_behind():
    async def scenario() -> None:
        slots, inside, most = Slots(3), 0, 0

        async def one(run: int) -> None:
            nonlocal inside, most
            async with slots.place(run, 1.0):
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0)
                finally:
                    inside -= 1

        tasks = [asyncio.ensure_future(one(number % 4)) for number in range(60)]
        for number, task in enumerate(tasks):
            await asyncio.sleep(0)
            if number % 3 == 0:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 3
        for _ in range(3):
            await asyncio.wait_for(slots.acquire(9, 1.0), 1)

    asyncio.run(scenario())


def test_a_place_that_was_given_to_a_wait_just_cancelled_goes_to_the_next():
    async def scenario() -> None:
        slots = Slots(1)
        await slots.acquire(1, 1.0)
        first = asyncio.ensure_future(slots.acquire(1, 1.0))
        second = asyncio.ensure_future(slots.acquire(1, 1.0))
        await asyncio.sleep(0)
        slots.release()
        first.cancel()
        await asyncio.wait_for(second, 1)
        assert first.cancelled()

    asyncio.run(scenario())
