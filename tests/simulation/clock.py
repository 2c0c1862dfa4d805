"""An event loop whose time passes only when nobody has anything to do: hours take seconds, and always the same ones."""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

ACTOR: contextvars.ContextVar[Any] = contextvars.ContextVar("actor", default=None)
"""The simulated process on whose behalf the present task runs; None for the world itself."""


class NothingToWaitFor(Exception):
    """Everybody waits for somebody else: no timer is set and nothing is ready."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs in the present thread; sleeping costs nothing.

    Args:
        start_s: its time at the beginning.
        call: runs what `asyncio.to_thread` hands over: gets the function and the future to be answered.
    """

    def __init__(self, start_s: float, call: Callable[[Callable[[], Any], asyncio.Future[Any]], None]) -> None:
        super().__init__()
        self._now_s = start_s
        self._call = call
        self._selector = self
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """What the base class asks for input and output; here only time passes."""
        if timeout is None:
            raise NothingToWaitFor
        self._now_s += timeout
        return []

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        answer = self.create_future()
        self._call(lambda: func(*args), answer)
        return answer

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody is woken."""

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> Any:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        actor = ACTOR.get()
        if actor is not None:
            actor.tasks[task] = None
            task.add_done_callback(actor.tasks.pop)
        return task


def played(scene: Coroutine[Any, Any, T]) -> T:
    """Plays a scene to its end; one in which nobody can ever go on fails."""
    loop = VirtualLoop(0.0, lambda work, answer: answer.set_result(work()))
    try:
        return loop.run_until_complete(scene)
    finally:
        loop.close()
