"""Notices that this process does not do its work, although it lives, beats and is connected.

Celery's consumers have frozen after troubles of the broker in several releases: they wait for ever and take nothing. An
event loop may hang in a library. In both cases nothing inside the process can be trusted to repair it, so it says so
and ends, and its supervisor starts another one. A process that has work to wait for is left alone.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NoAnswer

import structlog
from celery.worker import state
from redis import Redis
from redis.exceptions import RedisError

log = structlog.get_logger(__name__)


class Stillness:
    """Measures how long a consumer with nothing else to do has left messages alone. Pure; it is told the time."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._taken = -1

    def seconds(self, now_s: float, *, queued: int, taken: int, is_at_work: bool) -> float:
        """How long it has been still.

        Args:
            now_s: the moment of this look.
            queued: messages that wait in its queues.
            taken: messages that it has taken so far.
            is_at_work: whether it works on one.
        """
        if not queued or is_at_work or taken != self._taken:
            self._since_s = now_s
        self._taken = taken
        return now_s - self._since_s

    def begin_anew(self, now_s: float) -> None:
        """Forgets what was: while the broker is away nobody can take anything."""
        self._since_s = now_s


class Watchdog:
    """Looks every few seconds from a thread of its own.

    Args:
        redis: a client of the broker, for this thread alone.
        keys: of the queues this process listens on.
        loop: the event loop of the process.
        stall_s: how long is too long.
        every_s: pause between two looks.
        give_up: ends the process; told whether its event loop still answers.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        *,
        stall_s: float,
        every_s: float,
        give_up: Callable[[bool], None],
    ) -> None:
        self._redis = redis
        self._keys = tuple(keys)
        self._loop = loop
        self._stall_s = stall_s
        self._every_s = every_s
        self._give_up = give_up
        self._stopping = threading.Event()
        self._stillness = Stillness(time.monotonic())
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks no more. Safe to repeat."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            if not self._loop_answers():
                log.error("worker.stalled", reason="the event loop does not answer", silent_s=self._stall_s)
                self._give_up(False)
                return
            queued, still_s = self._look()
            if still_s >= self._stall_s and not self._stopping.is_set():
                reason = "messages wait and none is taken"
                log.error("worker.stalled", reason=reason, queued=queued, silent_s=round(still_s, 1))
                self._give_up(True)
                return

    def _loop_answers(self) -> bool:
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(self._stall_s)
        except NoAnswer:
            return self._stopping.is_set()
        return True

    def _look(self) -> tuple[int, float]:
        try:
            asked = self._redis.pipeline(transaction=False)  # pyright: ignore[reportUnknownMemberType]  # a keyword has no type
            for key in self._keys:
                asked.llen(key)
            queued = sum(asked.execute())
        except (RedisError, OSError):
            self._stillness.begin_anew(time.monotonic())
            return 0, 0.0
        taken, is_at_work = state.total_count.total(), bool(state.active_requests)
        return queued, self._stillness.seconds(time.monotonic(), queued=queued, taken=taken, is_at_work=is_at_work)
