"""Requests of one process that wait for permits of one pool: a queue per run, and runs side by side."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from workers.limiter.limits import Permit, Refused


@dataclass(slots=True, eq=False)
class Waiting:
    """One request; `deadline` is a reading of the loop's clock, `answer` is done too when nobody waits any more."""

    permit_id: str
    run: str
    weight: float
    costs: Mapping[str, int]
    lease_s: float
    deadline: float
    horizon_s: float
    answer: asyncio.Future[Permit | Refused]


class Queues:
    """The waiting requests of one pool, by run. False when none waits."""

    def __init__(self) -> None:
        self._by_run: dict[str, deque[Waiting]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_run)

    def __iter__(self) -> Iterator[Waiting]:
        return chain.from_iterable(self._by_run.values())

    def add(self, waiting: Waiting) -> None:
        """Put a request behind those of its run."""
        self._by_run.setdefault(waiting.run, deque()).append(waiting)

    def batch(self, most: int) -> list[Waiting]:
        """The requests to ask for next, in order within each run; every run has its part of them by weight."""
        self._forget_answered()
        if sum(map(len, self._by_run.values())) <= most:
            return list(self)
        whole = sum(queue[-1].weight for queue in self._by_run.values())
        parts = {run: max(1, int(most * queue[-1].weight / whole)) for run, queue in self._by_run.items()}
        found = list(chain.from_iterable(islice(queue, parts[run]) for run, queue in self._by_run.items()))
        for run, queue in self._by_run.items():
            # What small runs leave of their parts goes to the others.
            found += islice(queue, parts[run], parts[run] + max(0, most - len(found)))
        return found

    def remove(self, served: Sequence[Waiting]) -> None:
        """Take out requests that stood at the front of their runs, in order."""
        for waiting in served:
            queue = self._by_run[waiting.run]
            queue.popleft()
            if not queue:
                del self._by_run[waiting.run]

    def clear(self) -> None:
        """Forget all of them."""
        self._by_run.clear()

    def _forget_answered(self) -> None:
        for run, queue in list(self._by_run.items()):
            if any(waiting.answer.done() for waiting in queue):
                queue = deque(waiting for waiting in queue if not waiting.answer.done())
                self._by_run[run] = queue
            if not queue:
                del self._by_run[run]
