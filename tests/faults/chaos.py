"""Processes that do to budgets everything that workers may do, also what they should not, and die while they do it.

Each of them is a real process with a connection of its own. They claim, settle, retry, fall back to another provider,
outlive their leases and are killed with SIGKILL between any two steps, or by a timer in the middle of one, a COMMIT
among them. What they do follows from a seed; how they interleave does not.
"""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from orchestrator.database import Database
from orchestrator.database.batches import Claimed, OverBudget, Settlement
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from tests.integration.database.stage import Stage

PROCESSES = 8
CALLS = 24
LIMIT_NUSD = 15_000
WORST, LEAST = 700, 150
"""Worst prices at the full and at the least output cap; the latter is less than three hundredths of the limit."""
PUT_BACK = CallEnd("pending")
ATTEMPTS = 500
"""More than any process needs: a bound for the test itself."""
TOKENS = 1_000_000
"""Each process draws its tokens from a range of this length of its own."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Plan:
    """One seeded run, as every process needs to know it.

    Attributes:
        url: of its database.
        seed: of everything that is left to chance.
        run: as in `Stage`, like `window`, `calls` and `budget`.
        ids: the budgets of an attempt, by provider and day.
    """

    url: str
    seed: int
    run: int
    window: int
    calls: list[int]
    budget: int
    ids: dict[tuple[str, int], tuple[int, ...]]

    def stage(self, database: Database) -> Stage:
        """The run, seen through a database that is open here."""
        return Stage(database, self.run, self.window, self.calls, self.budget)


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """A database for the threads of one process."""
    database = Database(url, pool_size=4)
    if url.startswith("sqlite"):

        @event.listens_for(database.engine, "connect")
        def hurry(connection: Any, _record: Any) -> None:
            # No power fails in this test, and what is committed is seen by all processes at once.
            connection.execute("PRAGMA synchronous=OFF")
            # SQLite waits in steps of up to 100 ms for the write lock; our own repetition is quicker.
            connection.execute("PRAGMA busy_timeout=0")

    try:
        yield database
    finally:
        database.close()


def again(work: Callable[[], Any]) -> Any:
    """As the batch writer does it: what a database refuses for the moment is done again."""
    while True:
        try:
            return work()
        except OperationalError:
            time.sleep(0.004)  # noqa: TID251 - the pause before a repetition


class ChaosWorker:
    """What one process does in one run, until nothing fits into the budget any more."""

    def __init__(self, plan: Plan, stage: Stage, number: int) -> None:
        self.outcomes = Counter[str]()
        self._plan, self._stage = plan, stage
        self._luck = random.Random(plan.seed * 1_000 + number)
        self._name, self._token, self._generation = f"w{number}", number * TOKENS, 0
        self._zombies = list[tuple[int, Claimed, str]]()

    def work(self) -> None:
        """Does it; may not return."""
        luck, provider = self._luck, "main"
        if luck.random() < 0.1:
            # By default this signal ends a process as it is, wherever it is.
            signal.setitimer(signal.ITIMER_REAL, luck.uniform(0.01, 0.15))
        again(lambda: self._stage.register(self._name))
        for _ in range(ATTEMPTS):
            ids = self._plan.ids[provider, luck.randrange(2)]
            ordinal, worst = luck.randrange(CALLS), luck.randrange(LEAST, WORST + 1)
            answer = self._claim(ordinal, worst, ids)
            if isinstance(answer, OverBudget):
                if answer.for_good and answer.scope == "provider:main":
                    provider = "spare"
                elif answer.for_good:
                    break
                elif luck.random() < 0.3:
                    again(self._stage.free_dead)
                else:
                    time.sleep(0.002)  # noqa: TID251 - others are about to give money back
                self.outcomes["refused"] += 1
                continue
            if isinstance(answer, tuple):
                self._conclude(ordinal, *answer, ids)
            if luck.random() < 0.02:
                again(self._stage.free_dead)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _claim(self, ordinal: int, worst: int, ids: tuple[int, ...], held: int | None = None) -> Any:
        """Claims as the client does: at the full price, then at what is left; a grant comes with its price."""
        answer = self._claim_at(ordinal, worst, ids, held)
        if not isinstance(answer, OverBudget) or not answer.for_good or answer.spare_nusd < LEAST:
            return answer
        if answer.free_nusd >= max(LEAST, answer.spare_nusd // 2):
            smaller = self._claim_at(ordinal, answer.free_nusd, ids, held)
            if not isinstance(smaller, OverBudget):
                return smaller
        return replace(answer, for_good=False)

    def _claim_at(self, ordinal: int, price: int, ids: tuple[int, ...], held: int | None) -> Any:
        self._token += 1
        wish = self._stage.wish(ordinal, price, self._name, budget_ids=ids, held_fence=held, token=self._token)
        (answer,) = again(lambda: self._stage.claim(wish))
        return (answer, price) if isinstance(answer, Claimed) else answer

    def _conclude(self, ordinal: int, grant: Claimed, price: int, ids: tuple[int, ...]) -> None:
        """Lets an attempt end in one of many ways."""
        luck = self._luck
        match luck.choices(("ok", "excess", "retry", "unknown", "killed", "stopped"), (60, 2, 14, 9, 3, 3))[0]:
            case "ok":
                self._settle(ordinal, grant, Usage("ok", cost_nusd=luck.randrange(price // 4, price + 1)))
            case "excess":
                self._settle(ordinal, grant, Usage("bad_output", cost_nusd=price + luck.randrange(1, 20)))
            case "unknown":
                self._settle(ordinal, grant, Usage("unknown", cost_nusd=price, estimated=True))
            case "retry":
                self._settle(ordinal, grant, Usage("retryable"), CallEnd("running"))
                second = self._claim(ordinal, price, ids, held=grant.fence)
                if isinstance(second, tuple):
                    self._conclude(ordinal, *second, ids)
                else:
                    again(lambda: self._stage.close(ordinal, CallEnd("pending"), (grant.fence, self._name)))
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                self._oversleep(ordinal, grant)
                return
        if self._zombies and luck.random() < 0.3:
            self.outcomes["late"] += 1
            late_ordinal, late_grant, name = self._zombies.pop()
            self._settle(late_ordinal, late_grant, Usage("ok", cost_nusd=LEAST // 3), name=name)

    def _oversleep(self, ordinal: int, grant: Claimed) -> None:
        """Counts as dead from now on, with an attempt in flight, and goes on under another name."""
        again(lambda: self._stage.kill(self._name))
        self._zombies.append((ordinal, grant, self._name))
        self._generation += 1
        self._name = f"{self._name.partition('/')[0]}/{self._generation}"
        again(lambda: self._stage.register(self._name))
        self.outcomes["stopped"] += 1

    def _settle(
        self, ordinal: int, grant: Claimed, usage: Usage, end: CallEnd = PUT_BACK, name: str | None = None
    ) -> None:
        wish = Settlement(self._stage.calls[ordinal], grant.number, grant.fence, name or self._name, usage, end)
        again(lambda: self._stage.settle(wish))
        self.outcomes[usage.status] += 1


def serve(pipe: Connection) -> None:
    """Works through plans until the other side is gone; answers each with what happened."""
    while True:
        try:
            plan, number = pipe.recv()
        except EOFError:
            return
        with opened(plan.url) as database:
            worker = ChaosWorker(plan, plan.stage(database), number)
            worker.work()
        pipe.send(worker.outcomes)


def _bury(database: Database, name: str) -> None:
    """Lets the heartbeats of a process that died lie far back, under all names that it had."""
    query = text("UPDATE workers SET heartbeat_at = 1 WHERE id = :name OR id LIKE :name || '/%'")
    with database.transaction() as connection:
        connection.execute(query, {"name": name})


class Crew:
    """Eight processes for one run after the other; those that die are replaced."""

    def __init__(self) -> None:
        self._members: dict[Connection, ForkServerProcess] = {}
        for _ in range(PROCESSES):
            self._hire()

    def close(self) -> None:
        for pipe, process in self._members.items():
            pipe.close()
            process.join()

    def run(self, plan: Plan, stage: Stage) -> Counter[str]:
        """Lets all of them work at a plan until each is done; returns what happened.

        Raises:
            AssertionError: a process ended otherwise than by a signal.
        """
        happened, numbers = Counter[str](), dict[Connection, int]()
        for number, pipe in enumerate(list(self._members)):
            pipe.send((plan, number))
            numbers[pipe] = number
        while numbers:
            for pipe in wait(list(numbers)):
                assert isinstance(pipe, Connection)
                number = numbers.pop(pipe)
                try:
                    happened += pipe.recv()
                except EOFError:
                    happened["killed"] += 1
                    fresh = self._replace(pipe)
                    again(lambda name=f"w{number}": _bury(stage.database, name))
                    fresh.send((plan, number + PROCESSES))
                    numbers[fresh] = number + PROCESSES
        return happened

    def _hire(self) -> Connection:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._members[ours] = process
        return ours

    def _replace(self, pipe: Connection) -> Connection:
        process = self._members.pop(pipe)
        pipe.close()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, -signal.SIGALRM), f"a process ended with {process.exitcode}"
        return self._hire()


@contextmanager
def working_crew() -> Iterator[Crew]:
    """A crew that is gone afterwards."""
    with ExitStack() as stack:
        crew = Crew()
        stack.callback(crew.close)
        yield crew
