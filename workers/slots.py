"""The places that a process has at a provider, handed to the runs that wait for one in turn, by their weight."""

import asyncio
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Waiting:
    """The calls of a run that wait.

    Attributes:
        at: where the run stands; the one that is furthest behind is next.
    """

    at: float
    stride: float
    places: deque["asyncio.Future[None]"] = field(default_factory=deque["asyncio.Future[None]"])


class Slots:
    """A semaphore that is fair to runs: each gets places in proportion to its weight, its own calls in their order.

    Stride scheduling: every place moves its run on by the reciprocal of its weight. A run that comes later begins where
    the others are, so it gets its share at once, and nothing for the time before. For one event loop.

    Args:
        size: how many places there are.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: dict[int, _Waiting] = {}
        self._now = 0.0

    def place(self, run: int, weight: float) -> "_Place":
        """A place for the length of an `async with`."""
        return _Place(self, run, weight)

    async def acquire(self, run: int, weight: float) -> None:
        """Waits for a place; a wait that is cancelled leaves none behind."""
        if self._free:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(run)
        if waiting is None:
            waiting = self._waiting[run] = _Waiting(self._now + 1 / weight, 1 / weight)
        waiting.stride = 1 / weight
        waiting.places.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Gives a place back, to whoever is next."""
        while self._waiting:
            run, waiting = min(self._waiting.items(), key=lambda one: one[1].at)
            place = waiting.places.popleft()
            if not waiting.places:
                del self._waiting[run]
            if not place.done():
                self._now = waiting.at
                waiting.at += waiting.stride
                place.set_result(None)
                return
        self._free += 1


@dataclass(frozen=True, slots=True)
class _Place:
    slots: Slots
    run: int
    weight: float

    async def __aenter__(self) -> None:
        await self.slots.acquire(self.run, self.weight)

    async def __aexit__(self, *_: object) -> None:
        self.slots.release()
