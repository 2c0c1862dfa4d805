"""Waits that end early when their run, or the whole process, stops.

A call may wait a minute for a slow limit or for another try. Whoever stops a run or the process does not wait for
that: the wait ends at once, and the call goes back to where others find it.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Waits:
    """The open waits of one event loop, by run."""

    def __init__(self) -> None:
        # Ordered, so that calls go back in the order in which they began to wait, and a simulation can be repeated.
        self._open: dict[int, dict[asyncio.Timeout, None]] = {}

    async def until(self, run: int, awaitable: Awaitable[T]) -> T | None:
        """The result of an awaitable; None when the wait was ended, and then the awaitable was cancelled."""
        patience = asyncio.timeout(None)
        waiting = self._open.setdefault(run, {})
        waiting[patience] = None
        try:
            async with patience:
                return await awaitable
        except TimeoutError:
            if not patience.expired():
                raise
            return None
        finally:
            waiting.pop(patience, None)
            if not waiting:
                self._open.pop(run, None)

    def end(self, run: int | None = None) -> None:
        """Ends the waits of a run, or all of them. Waits that begin later are not touched."""
        runs = list(self._open) if run is None else [run]
        for one in runs:
            for patience in self._open.pop(one, {}):
                patience.reschedule(asyncio.get_running_loop().time())
