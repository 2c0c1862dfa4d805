"""No order of events overspends a budget: seeded chaos by eight processes, many small runs and one of whole workers.

Every run prints its seed. A watcher reads all budgets again and again while the others claim, settle, fail, fall back
and die, and at the end the ledger and the budgets must tell the same sums.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from sqlalchemy import text

from orchestrator.database import Database, budgets, fleet, ledger
from tests.engine import Engine, launch_engine
from tests.faults.chaos import CALLS, LIMIT_NUSD, Crew, Plan, opened, working_crew
from tests.integration.database.stage import Stage
from tests.packs import one_step
from tests.servers import PostgresServer, wait_until

USED_SHARE = 0.97
NOON = 1_800_000_000.0


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


def make_plan(database: Database, url: str, seed: int) -> tuple[Plan, str]:
    """A run with calls to be made, five kinds of budgets, and the scope of that which is tight."""
    luck = random.Random(seed)
    stage = Stage.with_calls(database, CALLS, name=f"chaos-{seed}")
    tight = luck.choice((budgets.GLOBAL_SCOPE, budgets.run_scope(stage.run), budgets.workflow_scope("picks")))
    ids: dict[tuple[str, int], tuple[int, ...]] = {}
    with database.transaction() as connection:
        for provider in ("main", "spare"):
            for day in range(2):
                scopes = budgets.scopes_of(stage.run, "picks", provider, NOON + day * 86_400)
                ids[provider, day] = tuple(sorted(budgets.ensure_budgets(connection, scopes).values()))
        budgets.set_limit(connection, tight, LIMIT_NUSD)
        # The first choice may have less than the run; the second one, and the days, have enough.
        budgets.set_limit(connection, "provider:main", luck.choice((None, LIMIT_NUSD // 3, 2 * LIMIT_NUSD)))
        budgets.set_limit(connection, budgets.day_scope(NOON), 3 * LIMIT_NUSD)
    return Plan(url, seed, stage.run, stage.window, stage.calls, stage.budget, ids), tight


def be_chaotic(crew: Crew, url: str, seed: int) -> Counter[str]:
    """One seeded run; returns what happened in it."""
    with opened(url) as database:
        plan, tight = make_plan(database, url, seed)
        stage = plan.stage(database)
        with Watcher(database, 0.01) as watcher:
            happened = crew.run(plan, stage)
            with database.transaction() as connection:
                connection.execute(text("UPDATE workers SET heartbeat_at = 1"))
            stage.free_dead()
        assert watcher.broken == [], f"seed {seed}: {watcher.broken[:3]}"
        assert watcher.looks > 3, f"seed {seed}"
        check_books(database)
        with database.snapshot() as connection:
            budget = budgets.find_budget(connection, tight)
        used = (budget.spent_nusd + budget.excess_nusd) / LIMIT_NUSD
        assert used >= USED_SHARE, f"seed {seed}: {used:.1%} of {budget} were used"
        return happened


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with working_crew() as crew:
        yield crew


@pytest.fixture(scope="module")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file that nobody has open."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    with opened(f"sqlite:///{path}") as database:
        database.migrate()
    return path


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_twenty_seeds_of_chaos_never_overspend_on_sqlite(
    first: int, crew: Crew, sqlite_file: Path, tmp_path: Path
) -> None:
    began, happened = time.monotonic(), Counter[str]()
    for seed in range(first, first + 20):
        path = tmp_path / f"{seed}.db"
        shutil.copy(sqlite_file, path)
        happened += be_chaotic(crew, f"sqlite:///{path}", seed)
    print(f"seeds {first} to {first + 19}: {time.monotonic() - began:.1f} s, {dict(happened)}")
    assert happened["killed"] > 0
    assert happened["unknown"] > 0


def test_ten_seeds_of_chaos_never_overspend_on_postgres(
    crew: Crew, postgres_server: PostgresServer, postgres_url: str
) -> None:
    with opened(postgres_url) as database:
        database.migrate()
    template = postgres_url.rpartition("/")[2]
    for seed in range(10):
        name = postgres_server.create(template)
        print(f"seed {seed}: {dict(be_chaotic(crew, postgres_server.url(name), seed))}")
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
def test_eight_whole_workers_that_are_killed_never_overspend(postgres_url: str) -> None:
    seed = 1
    fakes = {name: FAULTS | {"malformed": 0.03, "seed": seed} for name in ("main", "spare")}
    settings = {"worker": {"shard_size": 10}}
    with launch_engine(database_url=postgres_url, fakes=fakes, settings=settings, workers=8) as engine:
        _storm(engine, seed, "1.2")
