"""No order of events overspends a budget: seeded chaos, many small runs of eight threads and a few of eight processes.

Every run prints its seed. A watcher reads all budgets again and again while the others claim, settle, fail, fall back
and die, and at the end the ledger and the budgets must tell the same sums.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from orchestrator.database import Database, budgets, fleet, ledger
from orchestrator.database.batches import Claimed, OverBudget, Settlement
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from tests.engine import Engine, launch_engine
from tests.integration.database.stage import Stage
from tests.packs import one_step
from tests.servers import PostgresServer, wait_until

THREADS = 8
CALLS = 24
LIMIT_NUSD = 15_000
WORST, LEAST = 700, 150
"""Worst prices at the full and at the least output cap; the latter is less than three hundredths of the limit."""
USED_SHARE = 0.97
NOON = 1_800_000_000.0
PUT_BACK = CallEnd("pending")
ATTEMPTS = 4_000
"""More than any run needs: a bound for the test itself."""


class Watcher:
    """Reads all budgets until it is stopped, and remembers what must not be."""

    def __init__(self, database: Database, pause_s: float = 0.0) -> None:
        self.looks, self.broken = 0, list[str]()
        self._database, self._pause_s, self._done = database, pause_s, Event()
        self._thread = Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            with self._database.snapshot() as connection:
                rows = connection.execute(text("SELECT * FROM budgets WHERE limit_nusd IS NOT NULL")).all()
            self.broken += [str(row) for row in rows if row.spent_nusd + row.reserved_nusd > row.limit_nusd]
            self.looks += 1
            self._done.wait(self._pause_s)


def check_books(database: Database) -> None:
    """Every budget tells what its attempts cost, and nothing is reserved any more."""
    with database.snapshot() as connection:
        attempts = connection.execute(text("SELECT status, cost_nusd, budget_ids FROM llm_usage")).all()
        rows = connection.execute(text("SELECT * FROM budgets")).all()
        calls = connection.execute(text("SELECT sum(cost_nusd) FROM prompt_executions")).scalar_one()
    assert not [row for row in attempts if row.status in ledger.OPEN_ATTEMPT]
    assert calls == sum(row.cost_nusd for row in attempts)
    for budget in rows:
        booked = sum(row.cost_nusd for row in attempts if budget.id in ledger.split_ids(row.budget_ids))
        assert budget.reserved_nusd == 0, budget
        assert budget.spent_nusd + budget.excess_nusd == booked, budget


class Chaos:
    """Eight workers that share one run and do everything that workers may do to a budget, also what they should not."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database, self.seed = database, seed
        luck = random.Random(seed)
        self.stage = Stage.with_calls(database, CALLS, name=f"chaos-{seed}")
        self.tight = luck.choice(
            (budgets.GLOBAL_SCOPE, budgets.run_scope(self.stage.run), budgets.workflow_scope("picks"))
        )
        self.ids: dict[tuple[str, int], tuple[int, ...]] = {}
        with database.transaction() as connection:
            for provider in ("main", "spare"):
                for day in range(2):
                    scopes = budgets.scopes_of(self.stage.run, "picks", provider, NOON + day * 86_400)
                    found = budgets.ensure_budgets(connection, scopes)
                    self.ids[provider, day] = tuple(sorted(found.values()))
            budgets.set_limit(connection, self.tight, LIMIT_NUSD)
            # The first choice may have less than the run; the second one, and the days, have enough.
            budgets.set_limit(connection, "provider:main", luck.choice((None, LIMIT_NUSD // 3, 2 * LIMIT_NUSD)))
            budgets.set_limit(connection, budgets.day_scope(NOON), 3 * LIMIT_NUSD)
        self.generation = 0
        self.outcomes = Counter[str]()
        self._naming, self._zombies = Lock(), list[tuple[int, Claimed, str]]()

    def run(self) -> None:
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                self._work(random.Random(self.seed * 1_000 + number))
            except BaseException as error:  # told by the main thread
                failed.append(error)

        threads = [Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        for generation in range(1, self.generation + 1):
            self._again(lambda name=f"w{generation}": self.stage.kill(name))
        self._again(self.stage.free_dead)

    def _work(self, luck: random.Random) -> None:
        worker, provider = self._new_worker(), "main"
        for _ in range(ATTEMPTS // THREADS):
            ids = self.ids[provider, luck.randrange(2)]
            ordinal, worst = luck.randrange(CALLS), luck.randrange(LEAST, WORST + 1)
            answer = self._claim(ordinal, worst, worker, ids)
            if isinstance(answer, OverBudget):
                if answer.for_good and answer.scope == "provider:main":
                    provider = "spare"
                elif answer.for_good:
                    return
                elif luck.random() < 0.3:
                    self._again(self.stage.free_dead)
                else:
                    time.sleep(0.002)  # noqa: TID251 - others are about to give money back
                self.outcomes["refused"] += 1
                continue
            if isinstance(answer, tuple):
                worker = self._conclude(luck, ordinal, *answer, worker, ids)
            if luck.random() < 0.02:
                self._again(self.stage.free_dead)

    def _claim(self, ordinal: int, worst: int, worker: str, ids: tuple[int, ...], held: int | None = None) -> Any:
        """Claims as the client does: at the full price, then at what is left; a grant comes with its price."""
        answer = self._claim_at(ordinal, worst, worker, ids, held)
        if not isinstance(answer, OverBudget) or not answer.for_good or answer.spare_nusd < LEAST:
            return answer
        if answer.free_nusd >= max(LEAST, answer.spare_nusd // 2):
            smaller = self._claim_at(ordinal, answer.free_nusd, worker, ids, held)
            if not isinstance(smaller, OverBudget):
                return smaller
        return replace(answer, for_good=False)

    def _claim_at(self, ordinal: int, price: int, worker: str, ids: tuple[int, ...], held: int | None) -> Any:
        wish = self.stage.wish(ordinal, price, worker, budget_ids=ids, held_fence=held)
        (answer,) = self._again(lambda: self.stage.claim(wish))
        return (answer, price) if isinstance(answer, Claimed) else answer

    def _conclude(
        self, luck: random.Random, ordinal: int, grant: Claimed, price: int, worker: str, ids: tuple[int, ...]
    ) -> str:
        """Lets an attempt end in one of many ways; returns the worker that goes on."""
        match luck.choices(("ok", "excess", "retry", "unknown", "killed"), (60, 2, 14, 9, 6))[0]:
            case "ok":
                self._settle(ordinal, grant, worker, Usage("ok", cost_nusd=luck.randrange(price // 4, price + 1)))
            case "excess":
                self._settle(ordinal, grant, worker, Usage("bad_output", cost_nusd=price + luck.randrange(1, 20)))
            case "unknown":
                self._settle(ordinal, grant, worker, Usage("unknown", cost_nusd=price, estimated=True))
            case "retry":
                self._settle(ordinal, grant, worker, Usage("retryable"), CallEnd("running"))
                again = self._claim(ordinal, price, worker, ids, held=grant.fence)
                if isinstance(again, tuple):
                    return self._conclude(luck, ordinal, *again, worker, ids)
                self._again(lambda: self.stage.close(ordinal, CallEnd("pending"), (grant.fence, worker)))
            case _:
                self.outcomes["killed"] += 1
                self._again(lambda: self.stage.kill(worker))
                if luck.random() < 0.5:
                    self._zombies.append((ordinal, grant, worker))
                return self._new_worker()
        if self._zombies and luck.random() < 0.3:
            self.outcomes["late"] += 1
            late_ordinal, late_grant, late_worker = self._zombies.pop()
            self._settle(late_ordinal, late_grant, late_worker, Usage("ok", cost_nusd=LEAST // 3))
        return worker

    def _settle(self, ordinal: int, grant: Claimed, worker: str, usage: Usage, end: CallEnd = PUT_BACK) -> None:
        wish = Settlement(self.stage.calls[ordinal], grant.number, grant.fence, worker, usage, end)
        self._again(lambda: self.stage.settle(wish))
        self.outcomes[usage.status] += 1

    def _new_worker(self) -> str:
        with self._naming:
            self.generation += 1
            name = f"w{self.generation}"
        self._again(lambda: self.stage.register(name))
        return name

    def _again(self, work: Callable[[], Any]) -> Any:
        """As the batch writer does it: what a database refuses for the moment is done again."""
        while True:
            try:
                return work()
            except OperationalError:
                time.sleep(0.004)  # noqa: TID251 - the pause before a repetition


@contextmanager
def opened(url: str) -> Iterator[Database]:
    database = Database(url, pool_size=THREADS + 2)
    if url.startswith("sqlite"):

        @event.listens_for(database.engine, "connect")
        def hurry(connection: Any, _record: Any) -> None:
            # No power fails in this test, and what is committed is seen by all threads at once.
            connection.execute("PRAGMA synchronous=OFF")
            # SQLite waits in steps of up to 100 ms for the write lock; our own repetition is quicker.
            connection.execute("PRAGMA busy_timeout=0")

    try:
        yield database
    finally:
        database.close()


def be_chaotic(url: str, seed: int) -> Counter[str]:
    """One seeded run; returns what happened in it."""
    with opened(url) as database:
        chaos = Chaos(database, seed)
        with Watcher(database, 0.01) as watcher:
            chaos.run()
        assert watcher.broken == [], f"seed {seed}: {watcher.broken[:3]}"
        assert watcher.looks > 3, f"seed {seed}"
        check_books(database)
        with database.snapshot() as connection:
            tight = budgets.find_budget(connection, chaos.tight)
        used = (tight.spent_nusd + tight.excess_nusd) / LIMIT_NUSD
        assert used >= USED_SHARE, f"seed {seed}: {used:.1%} of {tight} were used"
        return chaos.outcomes


@pytest.fixture(scope="module")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file that nobody has open."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    with opened(f"sqlite:///{path}") as database:
        database.migrate()
    return path


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_twenty_seeds_of_chaos_never_overspend_on_sqlite(first: int, sqlite_file: Path, tmp_path: Path) -> None:
    began, happened = time.monotonic(), Counter[str]()
    for seed in range(first, first + 20):
        path = tmp_path / f"{seed}.db"
        shutil.copy(sqlite_file, path)
        happened += be_chaotic(f"sqlite:///{path}", seed)
    print(f"seeds {first} to {first + 19}: {time.monotonic() - began:.1f} s, {dict(happened)}")
    assert happened["killed"] > 0
    assert happened["unknown"] > 0


def test_ten_seeds_of_chaos_never_overspend_on_postgres(postgres_server: PostgresServer, postgres_url: str) -> None:
    with opened(postgres_url) as database:
        database.migrate()
    template = postgres_url.rpartition("/")[2]
    for seed in range(10):
        name = postgres_server.create(template)
        print(f"seed {seed}: {dict(be_chaotic(postgres_server.url(name), seed))}")
        postgres_server.drop(name)


def _storm(engine: Engine, seed: int, budget_usd: str) -> None:
    """Kills half of the workers at moments of the seed's choice, and starts others."""
    luck = random.Random(seed)
    limit = int(float(budget_usd) * 1e9)
    run = engine.start_run(
        1_500, one_step(attempts=5, fallback=True, tokens=400), salt=f"seed {seed}", budget_usd=budget_usd
    )
    with Watcher(engine.manager.database, 0.005) as watcher:
        for share in sorted(luck.uniform(0.05, 0.8) for _ in range(4)):
            wait_until(lambda share=share: float(engine.status(run)["cost_usd"]) * 1e9 > share * limit, 60, 0.05)
            luck.choice([worker for worker in engine.workers if worker.is_alive()]).kill9()
            if luck.random() < 0.5:
                engine.start_worker(ready=False)
        status = engine.wait(run, "paused", timeout_s=90)
        wait_until(lambda: engine.status(run)["reserved_usd"] == "0.00", 30)
    assert watcher.broken == [], f"seed {seed}: {watcher.broken[:3]}"
    check_books(engine.manager.database)
    with engine.manager.database.snapshot() as connection:
        budget = budgets.find_budget(connection, budgets.run_scope(run.run))
        freed = fleet.held_calls(connection, "nobody")
    used = (budget.spent_nusd + budget.excess_nusd) / limit
    print(f"seed {seed}: {used:.2%} used, {engine.status(run)['attempts']}, {watcher.looks} looks")
    assert (status["reason"], status["reason_detail"]) == ("budget", budgets.run_scope(run.run))
    assert used >= USED_SHARE, f"seed {seed}: only {used:.1%} were used"
    assert not freed


FAULTS = {"latency_s": 0.15, "latency_jitter": 0.6, "error_503": 0.04, "reset_after": 0.03, "rate_limit": 0.02}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "kind"), [(1, "sqlite"), (2, "sqlite"), (3, "postgres")])
def test_eight_processes_that_are_killed_never_overspend(seed: int, kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgres_url") if kind == "postgres" else None
    fakes = {name: FAULTS | {"malformed": 0.03, "seed": seed} for name in ("main", "spare")}
    with launch_engine(database_url=url, fakes=fakes, settings={"worker": {"shard_size": 10}}, workers=8) as engine:
        _storm(engine, seed, "1.2")
