"""Equal calls of one process: one of them asks, the others wait for its answer.

What other processes ask is told by the database (`orchestrator.database.batches`); here the waiting costs neither a
query nor a permit, so a thousand copies of one item are one call and a dictionary entry.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager


class Flights:
    """The keys that calls of one event loop are asking for."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Future[str | None]] = {}

    @contextmanager
    def leading(self, key: str) -> Generator[None]:
        """Makes the caller the one that asks; whoever waits at its end without an answer may lead next."""
        landing: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._open[key] = landing
        try:
            yield
        finally:
            if self._open.get(key) is landing:
                del self._open[key]
            if not landing.done():
                landing.set_result(None)

    def is_open(self, key: str) -> bool:
        """Whether somebody is asking."""
        return key in self._open

    def land(self, key: str, result: str) -> None:
        """Hands an answer that is stored, as the cache keeps it, to those who wait."""
        landing = self._open.get(key)
        if landing is not None and not landing.done():
            landing.set_result(result)

    async def landed(self, key: str) -> str | None:
        """The answer of the one who asks; None when it came to none."""
        landing = self._open.get(key)
        return None if landing is None else await asyncio.shield(landing)
