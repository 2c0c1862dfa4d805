"""One simulated process: a real `Runtime` whose doors to the world can be shut, at any moment and for ever.

A process that is killed does not notice: what it waits for never comes. One that is stopped is a zombie: what would
happen to it happens when it goes on, long after others took it for dead.
"""

import asyncio
import contextvars
import sqlite3
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError, OperationalError

from orchestrator.database import Database, DatabaseUnavailable, batches, fleet
from tests.simulation.clock import ACTOR
from workers.intake import Intake
from workers.runtime import Runtime
from workers.writer import MOST_PER_BATCH, REPEAT_FIRST_S, REPEAT_MOST_S, BatchWriter, Wish, _may_pass, _Waiting

if TYPE_CHECKING:
    from tests.simulation.world import World

HELD = "SELECT id, status, fence, worker_id, result, attempts FROM prompt_executions WHERE id IN ({})"


class Killed(BaseException):
    """The process is gone; nothing may catch this."""


class Process:
    """What all processes have: an aliveness, and tasks that end with it."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        # A set would be in the order of addresses, which is another one every time.
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.is_dead = False
        self.is_stopped = False
        self.is_starting = False
        self.dies_at: str | None = None
        self.database = DoorDatabase(self)
        self._late: deque[Callable[[], None]] = deque()
        self._context = contextvars.copy_context()
        self._context.run(ACTOR.set, self)

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Does something as this process."""
        return self._context.run(work, *args)

    def begin(self, coro: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Starts a task of this process."""
        return self._context.run(self.world.loop.create_task, coro)

    def enter(self, event: Callable[[], None]) -> None:
        """Lets something happen to this process: now, when it goes on, or never."""
        if self.is_stopped and not self.is_dead:
            self._late.append(event)
        elif not self.is_dead:
            event()

    async def awake(self) -> None:
        """Returns when this process is not stopped; never, when it is dead."""
        if self.is_dead:
            raise asyncio.CancelledError
        if self.is_stopped:
            going_on: asyncio.Future[None] = self.world.loop.create_future()
            self._late.append(lambda: None if going_on.done() else going_on.set_result(None))
            await going_on

    def kill(self) -> None:
        """Ends it as a crash does."""
        self.is_dead = True
        self.dies_at = None
        self._late.clear()
        current = asyncio.current_task(self.world.loop)
        for task in list(self.tasks):
            if task is not current:
                task.cancel()

    def stop(self) -> None:
        """Holds it, as SIGSTOP or a sleeping laptop does."""
        self.is_stopped = True

    def go_on(self) -> None:
        """Lets a stopped process catch up."""
        self.is_stopped = False
        while self._late and not self.is_stopped and not self.is_dead:
            self._late.popleft()()

    def call(self, work: Callable[[], Any], answer: "asyncio.Future[Any]") -> None:
        """What a thread of the process does; the outcome goes to `answer`."""

        def answer_with() -> None:
            if answer.done():
                return
            try:
                done = work()
            except Killed:
                return
            except Exception as error:
                self.world.note_error(error)
                answer.set_exception(error)
            else:
                answer.set_result(done)

        if self.is_starting:
            answer_with()
        else:
            self.world.loop.call_later(self.world.latency_s(), self.enter, answer_with)

    def reach(self, point: str) -> None:
        """Passes a point at which a crash was arranged.

        Raises:
            Killed: this was the one.
        """
        if self.dies_at == point:
            self.world.step(f"killed at {point}")
            self.kill()
        if self.is_dead:
            raise Killed


class DoorDatabase(Database):
    """The simulation's database as one process sees it: away at times, and gone with the process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._engine = process.world.engine

    @contextmanager
    def transaction(self) -> Generator[Connection]:
        process, world = self._process, self._process.world
        process.reach("begin")
        world.fail_database()
        with super().transaction() as connection:
            yield connection
            process.reach("commit")
        world.check()
        process.reach("committed")
        if world.has_fault(0.01):
            world.step("lost answer of a commit")
            raise _away()

    @contextmanager
    def snapshot(self) -> Generator[Connection]:
        self._process.reach("read")
        self._process.world.fail_database()
        with super().snapshot() as connection:
            yield connection

    def close(self) -> None:
        """The engine belongs to the world."""


def _away() -> OperationalError:
    return OperationalError("simulated", None, sqlite3.OperationalError("database is locked"))


away = _away


class Writer(BatchWriter):
    """The batch writer without its thread: the loop calls it after a while."""

    def __init__(self, database: Database, loop: asyncio.AbstractEventLoop) -> None:
        self._database = database
        self._loop = loop
        self._process: Process = ACTOR.get()
        self._queue: deque[_Waiting] = deque()
        self._batch: list[_Waiting] = []
        self._repeat_s = REPEAT_FIRST_S

    def stop(self) -> None:
        """Ends nothing: there is no thread."""

    def is_idle(self) -> bool:
        """Whether everything is written."""
        return not self._queue and not self._batch

    def _ask(self, wish: Wish) -> "asyncio.Future[Any]":
        if self.is_idle():
            self._flush_soon(self._process.world.commit_s())
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._queue.append(_Waiting(wish, answer))
        return answer

    def _flush_soon(self, wait_s: float) -> None:
        self._loop.call_later(wait_s, self._process.enter, self._flush)

    def _flush(self) -> None:
        while self._queue and len(self._batch) < MOST_PER_BATCH:
            self._batch.append(self._queue.popleft())
        batch = self._batch
        if not batch:
            return
        try:
            answers = self._commit([one.wish for one in batch])
        except Killed:
            return
        except (DatabaseUnavailable, ValueError, OverflowError) as error:
            self._process.world.note_error(error)
            if not _may_pass(error):
                self._answer([(one, error) for one in batch])
        else:
            self._answer(list(zip(batch, answers, strict=True)))
        self._go_on()

    def _answer(self, answered: Sequence[tuple[_Waiting, Any]]) -> None:
        self._batch, self._repeat_s = [], REPEAT_FIRST_S
        for one, answer in answered:
            if one.answer.done():
                continue
            if isinstance(answer, Exception):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)

    def _go_on(self) -> None:
        if self._batch:
            self._repeat_s = min(REPEAT_MOST_S, self._repeat_s * 2)
            self._flush_soon(self._repeat_s)
        elif self._queue:
            self._flush_soon(self._process.world.commit_s())

    def _commit(self, wishes: Sequence[Wish]) -> list[Any]:
        world = self._process.world
        settled = {wish.call for wish in wishes if isinstance(wish, batches.Settlement)}
        before = world.calls(settled)
        answers = super()._commit(wishes)
        for wish in wishes:
            world.step({batches.Claim: "claim", batches.Settlement: "settle"}.get(type(wish), "close"))
        self._check_fences(wishes, before)
        return answers

    def _check_fences(self, wishes: Sequence[Wish], before: dict[int, tuple[Any, ...]]) -> None:
        """Nobody but the holder, under the fence it holds, moves a call by a settlement."""
        allowed = {wish.call for wish in wishes if not isinstance(wish, batches.Settlement)}
        allowed |= {
            wish.call
            for wish in wishes
            if isinstance(wish, batches.Settlement) and before[wish.call][1:4] == ("running", wish.fence, wish.worker)
        }
        after = self._process.world.calls(before.keys() - allowed)
        for call, row in after.items():
            if row != before[call]:
                self._process.world.break_promise("a stale fence writes", f"{before[call]} became {row}")


class SimulatedRuntime(Runtime):
    """The runtime without threads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._loop.close()
        process: Process = ACTOR.get()
        self._loop = process.world.loop
        self._loop_thread = _NoThread()

    def run(self, work_to_do: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine that waits for nothing but threads, which answer at once while a process starts."""
        try:
            work_to_do.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("it waits")


class _NoThread:
    def start(self) -> None:
        pass

    def join(self) -> None:
        pass


class Worker(Process):
    """A worker process, with slots for shards."""

    def __init__(self, world: "World", name: str, slots: int) -> None:
        super().__init__(world, name)
        self.free_slots = slots

    def start(self) -> None:
        """Starts it; raises what a start raises."""
        self.is_starting = True
        self.runtime: SimulatedRuntime = self.run(SimulatedRuntime, self.world.config, self, self.world.queues)
        self.run(self.runtime.start)
        self.is_starting = False

    async def ask(self, message: Any) -> None:
        """Works on a shard as a Celery thread does."""
        await self.awake()
        await self.runtime._ask(message, Intake().ticket(""))
        await self.awake()

    async def close_window(self, window: int) -> None:
        """Works on the task behind a canvas."""
        await self.awake()
        await asyncio.to_thread(self.runtime.orchestrator.close_window, window)

    async def leave(self, grace_s: float) -> None:
        """Stops in good order, as SIGTERM does."""
        self.runtime.stop_claiming()
        await self.runtime.wait_idle(grace_s)
        await self.awake()
        for endless in self.runtime._rounds:
            endless.cancel()
        while not self.runtime.writer.is_idle():
            await asyncio.sleep(0.05)
        while not self.is_dead:
            try:
                with self.database.transaction() as connection:
                    fleet.sign_off(connection, self.runtime.worker_id)
                break
            except OperationalError:
                await asyncio.sleep(0.2)
        self.kill()


__all__ = ["IntegrityError", "Killed", "Process", "Worker", "Writer", "away"]
