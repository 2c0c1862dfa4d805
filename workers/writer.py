"""Group commit: what many calls want to write becomes one transaction.

One thread owns the writing connection. While a commit is on its way to the disk the next wishes pile up, and they are
committed together; under load a transaction holds a hundred calls, alone a call waits a few milliseconds. A commit
that fails because the database is away is repeated until it is back: no call starts meanwhile, and an answer that was
paid for is kept in memory until it is stored. Repeating is safe (see `orchestrator.database.batches`).
"""

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog

from orchestrator.database import Database, DatabaseUnavailable, batches

log = structlog.get_logger(__name__)

MOST_PER_BATCH = 200
LINGER_S = 0.004
"""Pause for others to join a batch: longer saves processor time and costs latency, twice for every call."""
REPEAT_FIRST_S = 0.05
REPEAT_MOST_S = 2.0

Wish = batches.Claim | batches.Settlement | batches.Closing


@dataclass(frozen=True, slots=True)
class _Waiting:
    wish: Wish
    answer: "asyncio.Future[Any]"


class BatchWriter:
    """Writes for one event loop.

    Args:
        database: where to.
        loop: the loop on which callers wait.
    """

    def __init__(self, database: Database, loop: asyncio.AbstractEventLoop) -> None:
        self._database = database
        self._loop = loop
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batch-writer", daemon=True)
        self._thread.start()

    async def claim(self, wish: batches.Claim) -> batches.ClaimAnswer:
        """Claims a call and reserves its worst price; after the answer `Claimed` the attempt may be sent."""
        return await self._ask(wish)

    async def settle(self, wish: batches.Settlement) -> bool:
        """Books an attempt; False if the call was taken over meanwhile."""
        return await self._ask(wish)

    async def close(self, wish: batches.Closing) -> bool:
        """Moves a pending call without an attempt; False if it was not pending any more."""
        return await self._ask(wish)

    async def look(self, key: str) -> batches.AnsweredMeanwhile | batches.InFlight | None:
        """What there is of a call with this cache key; None also while the database is away."""
        try:
            return await asyncio.to_thread(self._look, key)
        except DatabaseUnavailable as error:
            log.warning("database.unavailable", error=str(getattr(error, "orig", error)))
            return None

    def _look(self, key: str) -> batches.AnsweredMeanwhile | batches.InFlight | None:
        with self._database.snapshot() as connection:
            return batches.look(connection, key)

    def stop(self) -> None:
        """Writes what is waiting and ends the thread. Only for a loop that asks nothing more."""
        self._waiting.put(None)
        self._stopping.set()
        self._thread.join()

    def _ask(self, wish: Wish) -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.put(_Waiting(wish, answer))
        return answer

    def _run(self) -> None:
        going = True
        while going:
            first = self._waiting.get()
            if first is None:
                return
            # One pause for the whole batch: waking up for every wish would take Python's lock from the loop each time.
            self._stopping.wait(LINGER_S)
            batch = [first]
            while len(batch) < MOST_PER_BATCH and going:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    going = False
                else:
                    batch.append(following)
            self._write(batch)

    def _write(self, batch: Sequence[_Waiting]) -> None:
        wait_s = REPEAT_FIRST_S
        while True:
            try:
                answers = self._commit([one.wish for one in batch])
            except Exception as error:
                # An entry point: a thread that ended would leave every call waiting, for ever and without a word.
                if not _may_pass(error) or self._stopping.is_set():
                    self._give_up(batch, error)
                    return
                told = str(getattr(error, "orig", error))
                log.warning("database.unavailable", error=told, waiting=len(batch), again_in_s=wait_s)
                self._stopping.wait(wait_s)
                wait_s = min(REPEAT_MOST_S, wait_s * 2)
            else:
                self._resolve(list(zip((one.answer for one in batch), answers, strict=True)))
                return

    def _give_up(self, batch: Sequence[_Waiting], error: Exception) -> None:
        """Tells the one wish that the database refuses; the others of its batch are written without it."""
        if len(batch) == 1 or self._stopping.is_set():
            self._resolve([(one.answer, error) for one in batch])
            return
        for one in batch:
            self._write([one])

    def _commit(self, wishes: Sequence[Wish]) -> list[Any]:
        claims = [wish for wish in wishes if isinstance(wish, batches.Claim)]
        settlements = [wish for wish in wishes if isinstance(wish, batches.Settlement)]
        closings = [wish for wish in wishes if isinstance(wish, batches.Closing)]
        answers: dict[int, Any] = {}
        with self._database.transaction() as connection:
            if claims and len(claims) < len(wishes):
                batches.lock_in_order(connection, wishes)
            # Settlements first: the money they give back may be what a claim needs.
            for group, work in ((settlements, batches.settle), (closings, batches.close), (claims, batches.claim)):
                if group:
                    done = cast("Any", work)(connection, group)
                    answers.update((id(wish), answer) for wish, answer in zip(group, done, strict=True))
        return [answers[id(wish)] for wish in wishes]

    def _resolve(self, answered: "Sequence[tuple[asyncio.Future[Any], Any]]") -> None:
        self._loop.call_soon_threadsafe(_set_answers, answered)


def _set_answers(answered: "Sequence[tuple[asyncio.Future[Any], Any]]") -> None:
    for future, answer in answered:
        if future.done():
            continue
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def _may_pass(error: Exception) -> bool:
    """Whether the database may accept the same batch later: it is away, busy or shutting down, not contradicting."""
    if not isinstance(error, DatabaseUnavailable):
        return False
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        # Connection (08), resources (53), operator intervention (57), system (58), serialisation and deadlock (40).
        return str(state)[:2] in {"08", "53", "57", "58", "40", "55"}
    return type(error).__name__ == "OperationalError"
