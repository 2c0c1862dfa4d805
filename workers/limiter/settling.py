"""Settlements of one pool on their way to Redis: written in the background, many at a time, and tried again."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import islice

from workers.limiter.bucket import Correction
from workers.limiter.limits import LimiterUnavailable

# What is settled within this time shares a script call.
LINGER_S = 0.002
RETRY_S = 0.5
BATCH = 200
# Beyond this many unwritten settlements the oldest are dropped; their estimates simply stay charged.
MOST = 20_000


class Settlements:
    """What one process has to tell one pool.

    Args:
        write: writes a batch; raises `LimiterUnavailable`. Safe to repeat.
    """

    def __init__(self, write: Callable[[Sequence[Correction]], Awaitable[None]]) -> None:
        self._write = write
        self._unwritten: dict[str, Correction] = {}
        self._writing = asyncio.Lock()
        self._flusher: asyncio.Task[None] | None = None

    @property
    def unwritten(self) -> Collection[str]:
        """Ids of the permits whose settlements Redis has not seen yet."""
        return self._unwritten.keys()

    def add(self, correction: Correction) -> None:
        """Have it written soon."""
        self._unwritten[correction.permit_id] = correction
        if len(self._unwritten) > MOST:
            del self._unwritten[next(iter(self._unwritten))]
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush_soon())

    async def write_all(self) -> None:
        """Write what there is.

        Raises:
            LimiterUnavailable: Redis did not answer; the rest is tried again in the background.
        """
        async with self._writing:
            while batch := list(islice(self._unwritten.values(), BATCH)):
                await self._write(batch)
                for correction in batch:
                    self._unwritten.pop(correction.permit_id, None)

    async def stop(self) -> None:
        """Give up what is not written. Safe to repeat."""
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)

    async def _flush_soon(self) -> None:
        while self._unwritten:
            await asyncio.sleep(LINGER_S)
            try:
                await self.write_all()
            except LimiterUnavailable:
                await asyncio.sleep(RETRY_S)
