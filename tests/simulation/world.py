"""A world with a seed: everything random in it, and so everything that happens, follows from one number."""

import asyncio
import random as global_random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy.exc import IntegrityError, OperationalError

from orchestrator.broker import all_queues
from orchestrator.config import ConfigManager
from orchestrator.control import RunControl
from orchestrator.database import budgets, reports
from orchestrator.orchestration import WorkflowOrchestrator
from tests.simulation.clock import ACTOR, NothingToWaitFor, VirtualLoop
from tests.simulation.doors import Broker, doors_of
from tests.simulation.process import HELD, Process, Worker, away
from tests.simulation.runs import WORST_NUSD, plan_run, store_items, store_run
from tests.simulation.store import BOOKS, CALL_BOOKS, open_memory

BEGIN_S = 1_750_000_000.0
"""Database time at loop time 0."""
FAULTS_END_S = 600.0
"""After so much virtual time nothing goes wrong any more."""
ENDS_WITHIN_S = 1500.0
"""After the last fault a run must end within this much virtual time."""
PROVIDERS = ("main", "spare")
ENDED = ("completed", "failed", "cancelled")
BOOKS_EVERY = 16
"""Transactions between two audits of all sums; each is read at the end in any case."""
HARMLESS = (OperationalError,)


class BrokenPromise(AssertionError):
    """The product did not keep its word; names promise, step and seed."""


@dataclass
class Report:
    """What a simulation came to."""

    seed: int
    steps: int
    runs: int
    counts: Counter[str]
    ends: Counter[str] = field(default_factory=Counter[str])


class World:
    """Processes, doors, and what goes wrong between them.

    Args:
        seed: of everything random.
        most_faults: how often something may go wrong.
        patience_s: after the last fault a run must end within this much virtual time.
    """

    def __init__(self, seed: int, most_faults: int = 120, patience_s: float = ENDS_WITHIN_S) -> None:
        self._patience_s = patience_s
        self.seed = seed
        self.random = Random(seed)
        self.faults_left = self.random.choice((0, self.random.randint(1, 20), self.random.randint(20, most_faults)))
        self.intensity = self.random.choice((0.3, 1.0, 3.0))
        self.config = _config()
        self.queues = all_queues(self.config.settings.providers)
        self.loop = VirtualLoop(self.random.uniform(100, 1000), self._call)
        # Some worlds begin shortly before midnight, where one daily budget ends and another begins.
        self._begin_s = (
            BEGIN_S if self.random.random() < 0.7 else (BEGIN_S // 86400 + 1) * 86400 - self.loop.time() - 30
        )
        self.loop.set_exception_handler(self._note_unheard)
        self.engine, self.raw = open_memory(lambda: self._begin_s + self.loop.time())
        self.broker = Broker(self)
        self.workers: list[Worker] = []
        self.replies: dict[str, Any] = {}
        self.is_broker_away = False
        self.database_away_until = 0.0
        self.provider_away_until: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.runs: list[int] = []
        self._sent: set[str] = set()
        self._since_audit = 0
        self._broken: list[str] = []
        self._worker_number = 0
        self._faults_end_s = self.loop.time() + FAULTS_END_S

    def step(self, kind: str) -> None:
        """Counts an event."""
        self.steps += 1
        self.counts[kind] += 1

    def latency_s(self) -> float:
        return self.random.expovariate(100)

    def commit_s(self) -> float:
        """How long others may join a batch: at times so long that it holds many wishes."""
        return self.random.choice((0.005, 0.05, 0.3))

    def has_fault(self, likelihood: float) -> bool:
        """Whether something goes wrong now; never once the faults are used up."""
        if self.faults_left <= 0 or self.loop.time() > self._faults_end_s:
            return False
        if self.random.random() >= likelihood * self.intensity:
            return False
        self.faults_left -= 1
        return True

    def fail_database(self) -> None:
        if self.loop.time() < self.database_away_until or self.has_fault(0.003):
            self.counts["database away"] += 1
            raise away()

    def break_promise(self, promise: str, what: str) -> None:
        self._broken.append(f"{promise}: {what}")

    def note_error(self, error: Exception) -> None:
        """Errors that the database or the broker made are part of the game, others are ours."""
        if isinstance(error, IntegrityError) or not isinstance(error, (*HARMLESS, LookupError)):
            self.break_promise("an unforeseen error", f"{type(error).__name__}: {error}")

    def _note_unheard(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            self.note_error(error)

    def note_sent(self, attempt: str) -> None:
        """A request leaves: it must be the first with its id, and on record."""
        self.step("send")
        _, call, number = attempt.rsplit("/", 2)
        query = "SELECT status FROM llm_usage WHERE prompt_execution_id = ? AND number = ?"
        row = self.raw.execute(query, (int(call), int(number))).fetchone()
        if self.raw.in_transaction or row is None:
            self.break_promise("a request leaves without a record", attempt)
        if attempt in self._sent:
            self.break_promise("an attempt leaves twice", attempt)
        self._sent.add(attempt)

    def calls(self, ids: Collection[int]) -> dict[int, tuple[Any, ...]]:
        """Calls as they stand: id, status, fence, holder, result, attempts."""
        if not ids:
            return {}
        return {row[0]: row for row in self.raw.execute(HELD.format(",".join(map(str, ids))))}

    def check(self) -> None:
        """After a transaction: what must hold at any time."""
        broken = self.raw.execute("SELECT promise, what FROM broken").fetchall()
        self._broken += [f"{promise}: {what}" for promise, what in broken]
        self._since_audit += 1
        if self._since_audit >= BOOKS_EVERY:
            self.audit()

    def audit(self) -> None:
        """Compares all sums with the rows they are of."""
        self._since_audit = 0
        self._broken += [f"budget and attempts differ: {row}" for row in self.raw.execute(BOOKS)]
        self._broken += [f"call and attempts differ: {row}" for row in self.raw.execute(CALL_BOOKS)]

    def run(self) -> Report:
        """Lets everything happen.

        Raises:
            BrokenPromise: one was broken.
        """
        state = global_random.getstate()
        global_random.seed(self.seed)
        try:
            with doors_of(self):
                return self.loop.run_until_complete(self._live())
        except NothingToWaitFor:
            raise self._error("nobody waits for anything, and a run is not over") from None
        finally:
            global_random.setstate(state)
            self._end()

    async def _live(self) -> Report:
        for _ in range(self.random.randint(1, 4)):
            self._start_worker()
        user = Process(self, "user")
        user.begin(self._produce(user))
        chaos = [self.loop.create_task(self._make_trouble())]
        ends_at = self._faults_end_s + self._patience_s
        while not self._is_over() and not self._broken:
            await asyncio.sleep(self.random.uniform(0.5, 2))
            if self.loop.time() > ends_at:
                raise self._error(f"a run does not end: {self._open_rows()}")
            user.begin(self._help(user))
            if self.faults_left <= 0:
                ends_at = min(ends_at, self.loop.time() + self._patience_s)
        for one in chaos:
            one.cancel()
        self.faults_left = 0
        await self._come_to_rest()
        self._raise_broken()
        self._check_end()
        return Report(self.seed, self.steps, len(self.runs), self.counts, Counter(s for _, s in self._statuses()))

    async def _come_to_rest(self) -> None:
        """Waits until zombies and leases are gone."""
        self.is_broker_away, self.database_away_until = False, 0.0
        for worker in self.workers:
            worker.go_on()
        for _ in range(60):
            await asyncio.sleep(2)
            if self._broken or not self._query("SELECT 1 FROM llm_usage WHERE status IN ('sent', 'reserved')"):
                break
            if not any(not worker.is_dead for worker in self.workers):
                self._start_worker()

    async def _produce(self, user: Process) -> None:
        orchestrator = WorkflowOrchestrator(user.database, user)  # pyright: ignore[reportArgumentType]
        for number in range(self.random.choice((1, 1, 2))):
            plan = plan_run(self.random, number)
            run = await self._insist(store_run, user.database, plan)
            self.runs.append(run)
            for batch in plan.batches:
                await asyncio.sleep(self.random.choice((0, self.random.uniform(0, 5))))
                await self._insist(self._store_once, user, orchestrator, run, plan, batch)

    def _store_once(self, user: Process, orchestrator: Any, run: int, plan: Any, batch: tuple[int, int]) -> None:
        # After a commit whose answer was lost, a producer looks how far it was.
        if self._query(f"SELECT items_total FROM workflow_executions WHERE id = {run}")[0][0] > batch[0]:
            orchestrator.orchestrate(run)
            return
        store_items(user.database, orchestrator, run, plan, batch)

    async def _insist(self, work: Any, *args: Any) -> Any:
        """Does something as the user, who tries again when the database is away."""
        before = len(self._query("SELECT id FROM workflow_executions"))
        while True:
            try:
                return work(*args)
            except OperationalError:
                await asyncio.sleep(0.3)
                made = [row[0] for row in self._query("SELECT id FROM workflow_executions ORDER BY id")]
                if work is store_run and len(made) > before:
                    return made[-1]

    async def _help(self, user: Process) -> None:
        """The user takes up what was paused, with more money if that was the reason."""
        control = RunControl(user.database, "user")
        paused = self._query("SELECT id, reason FROM workflow_executions WHERE status = 'paused'")
        for run, reason in paused:
            if self.random.random() < 0.5:
                continue
            try:
                if reason == "budget":
                    budget = self._query(f"SELECT limit_nusd FROM budgets WHERE scope = 'run:{run}'")[0][0]
                    more = None if self.counts["raise"] > 5 else (budget or 0) + 20 * WORST_NUSD
                    control.set_budget(budgets.run_scope(run), more)
                    self.step("raise")
                control.take_up(run)
                self.step("resume")
            except OperationalError:
                continue

    async def _make_trouble(self) -> None:
        user = Process(self, "somebody")
        while True:
            await asyncio.sleep(self.random.expovariate(self.intensity / 4))
            if not any(not one.is_dead and not one.is_stopped for one in self.workers):
                self._start_worker()
            if self.has_fault(1.0 / self.intensity):
                self._trouble(user)

    def _trouble(self, user: Process) -> None:
        later = self.random.uniform(0.5, 40)
        alive = [one for one in self.workers if not one.is_dead]
        worker = self.random.choice(alive) if alive else None
        match self.random.choice(
            ("kill", "kill", "kill", "stop", "stop", "term", "forget", "broker", "database", "provider", "user")
        ):
            case "kill" if worker:
                points = ("begin", "commit", "committed", "read", "publish", "published", "sent", "replied")
                worker.dies_at = self.random.choice(points)
                if self.random.random() < 0.5:
                    worker.kill()
                self.step("kill")
                self.loop.call_later(later, self._start_worker)
            case "stop" if worker:
                self.step("stop")
                worker.stop()
                self.loop.call_later(later, worker.go_on)
            case "term" if worker:
                self.step("term")
                worker.begin(worker.leave(self.random.choice((0.1, 10.0))))
                self.loop.call_later(later, self._start_worker)
            case "forget":
                self.step("forget")
                self.broker.forget()
            case "broker":
                self.step("broker away")
                self.is_broker_away = True
                self.loop.call_later(later, setattr, self, "is_broker_away", False)
            case "database":
                self.database_away_until = self.loop.time() + later
            case "provider":
                self.step("provider away")
                self.provider_away_until[self.random.choice(PROVIDERS)] = self.loop.time() + 3 * later
            case _:
                self._order(user)

    def _order(self, user: Process) -> None:
        """What a person does to a run."""
        control = RunControl(user.database, "user")
        try:
            for run in self.runs[:1]:
                match self.random.choice(("pause", "pause", "budget", "cancel", "priority")):
                    case "pause":
                        control.pause(run)
                    case "budget":
                        control.set_budget(budgets.run_scope(run), self.random.randint(1, 40) * WORST_NUSD // 2)
                    case "priority":
                        control.set_priority(run, self.random.randint(-5, 5))
                    case _ if self.random.random() < 0.3:
                        control.cancel(run)
                self.step("order")
        except OperationalError:
            return

    def _start_worker(self) -> None:
        if sum(not one.is_dead for one in self.workers) >= 4:
            return
        self._worker_number += 1
        worker = Worker(self, f"w{self._worker_number}", self.random.randint(1, 4))
        try:
            worker.start()
        except OperationalError:
            worker.kill()
            self.loop.call_later(1.0, self._start_worker)
            return
        self.step("start")
        self.workers.append(worker)

    def _call(self, work: Any, answer: "asyncio.Future[Any]") -> None:
        actor: Process = ACTOR.get()
        self.step("thread")
        actor.call(work, answer)

    def _query(self, text: str) -> list[Any]:
        return self.raw.execute(text).fetchall()

    def _statuses(self) -> list[tuple[int, str]]:
        return self._query("SELECT id, status FROM workflow_executions")

    def _is_over(self) -> bool:
        states = self._statuses()
        return bool(self.runs) and len(states) == len(self.runs) and all(state in ENDED for _, state in states)

    def _open_rows(self) -> str:
        runs = self._query("SELECT id, status, phase, segment, reduce_index, reason FROM workflow_executions")
        windows = self._query("SELECT id, status, round, wake_at, published_at FROM windows WHERE status <> 'closed'")
        calls = self._query("SELECT id, status, worker_id, next_at FROM prompt_executions WHERE completed_at IS NULL")
        return f"runs {runs} windows {windows} calls {calls[:5]} at {self._begin_s + self.loop.time():.1f}"

    def _check_end(self) -> None:
        self.check()
        self.audit()
        cancelled = {run for run, state in self._statuses() if state == "cancelled"}
        for run, call, status in self._query("SELECT workflow_execution_id, id, status FROM prompt_executions"):
            if status in ("pending", "running") and not (run in cancelled and status == "running"):
                self.break_promise("a call is open after the end of its run", f"{call} {status}")
        for row in self._query("SELECT id, status FROM llm_usage WHERE status IN ('reserved', 'sent')"):
            self.break_promise("an attempt is open at the end", str(row))
        for row in self._query("SELECT scope, reserved_nusd FROM budgets WHERE reserved_nusd <> 0"):
            self.break_promise("money is held at the end", str(row))
        for run, state in self._statuses():
            open_windows = self._query(
                f"SELECT id, status FROM windows WHERE workflow_execution_id = {run} AND status <> 'closed'"
            )
            if state != "cancelled" and open_windows:
                self.break_promise("a window stays open", str(open_windows))
            self._check_items(run)
        self._raise_broken()

    def _check_items(self, run: int) -> None:
        with self.engine.connect() as connection:
            told = reports.status(connection, run)
        items, calls = told["items"], told["calls"]
        if items["total"] != items["completed"] + items["failed"] + items["skipped"]:
            self.break_promise("items do not add up", f"{run}: {items}")
        query = "SELECT count(*) FROM prompt_executions WHERE status = ? AND workflow_execution_id = ?"
        if told["status"] == "cancelled":
            return
        for status in ("completed", "failed", "skipped"):
            (count,) = self.raw.execute(query, (status, run)).fetchone()
            if calls[status] != count:
                self.break_promise("counters and calls differ", f"{run} {status}: {calls[status]} and {count}")

    def _raise_broken(self) -> None:
        if self._broken:
            raise self._error("; ".join(dict.fromkeys(self._broken[:5])))

    def _error(self, what: str) -> BrokenPromise:
        return BrokenPromise(f"SIMULATION_SEED={self.seed}, step {self.steps}: {what}")

    def _end(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.loop.set_exception_handler(lambda *_: None)
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        self.engine.dispose()
        self.raw.close()


@cache
def _config() -> ConfigManager:
    sections = "\n".join(
        f'[llm_providers.{name}]\ndialect = "openai"\nbase_url = "http://127.0.0.1:9/v1"\ndefault_model = "model"\n'
        for name in PROVIDERS
    )
    with TemporaryDirectory() as name:
        home = Path(name)
        file = home / "llm-orchestrator.toml"
        file.write_text(f'[global]\ndefault_provider = "main"\n{sections}')
        environment = {"REDIS_URL": "redis://127.0.0.1:9/0", "LLM_ORCHESTRATOR_HOME": str(home / "data")}
        return ConfigManager(cwd=home, environ=environment, user_config=home / "none.toml")
