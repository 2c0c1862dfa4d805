"""Those that move a run are killed: a producer, a worker that decides what comes next, a whole command on one machine.

Where they die is drawn from a seed that is printed.
"""

import json
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from orchestrator.broker import CONTROL_QUEUE, provider_queue
from orchestrator.manager import StartedRun
from tests.e2e.test_cli_basics import clean_environment, command
from tests.engine import Engine, Worker, launch_engine
from tests.faults.crashing import CRASHED
from tests.packs import ONE, SURVEY
from tests.servers import wait_until

FAULTY = "tests.faults.faulty_worker"
MOVES = ("in_move_commit", "before_publish", "after_publish")
STORES = ("after_create", "in_store_commit", "after_store", "before_publish", "in_complete_commit")
ITEMS = 60
SEED = 20261122


def _wait_for_crash(worker: Worker) -> None:
    wait_until(lambda: not worker.is_alive(), 40)
    assert worker.process.returncode == -signal.SIGKILL, worker.log()
    assert CRASHED in worker.log()


def test_workers_that_decide_what_comes_next_may_die_at_any_moment() -> None:
    luck = random.Random(SEED)
    settings = {"worker": {"window_size": 5, "lanes": 2, "shard_size": 5}}
    with launch_engine(settings=settings, fakes={"main": {"latency_s": 0.1}}, workers=0) as engine:
        arranged = [f"{point}:{luck.randint(1, 2)}" for point in luck.sample(MOVES, 3)]
        print(f"seed {SEED}: {arranged}")
        others = engine.start_worker([provider_queue("main")], ready=False)
        doomed = [
            engine.start_worker([CONTROL_QUEUE], ready=False, module=FAULTY, CRASH_AT=moment) for moment in arranged
        ]
        for worker in (others, *doomed):
            wait_until(worker.is_ready, 60)
        run = engine.start_run(ITEMS, SURVEY)
        for worker in doomed:
            _wait_for_crash(worker)
        engine.start_worker([CONTROL_QUEUE])
        assert engine.wait(run)["status"] == "completed"
        # They held no calls, so not one is asked twice.
        assert engine.check(run).attempts == {"ok": 2 * ITEMS + 1}
        assert others.is_alive()


def test_a_worker_that_dies_between_the_result_files_and_the_end_of_a_run_is_made_up_for() -> None:
    with launch_engine(workers=0) as engine:
        doomed = engine.start_worker(module=FAULTY, CRASH_AT="before_end:1")
        run = engine.start_run(5, SURVEY)
        _wait_for_crash(doomed)
        assert engine.status(run)["status"] == "running"
        engine.start_worker()
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run).attempts == {"ok": 11}
        latest = engine.home / "data" / "results" / "latest" / "survey-results.json"
        assert json.loads(latest.read_text())


def _produce(engine: Engine, items: Path, crash_at: str = "") -> "subprocess.CompletedProcess[str]":
    pack = str(ONE.write(engine.home / "packs"))
    arguments = ["run", pack, "--input", str(items), "--detach", "--json", "--yes"]
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.faulty_producer", *arguments],
        cwd=engine.home,
        env=engine.environment | {"CRASH_AT": crash_at},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_producer_that_dies_while_it_stores_items_is_continued_by_the_same_command() -> None:
    luck = random.Random(SEED)
    with launch_engine(workers=1) as engine:
        items = engine.home / "items.jsonl"
        items.write_text("".join(json.dumps({"key": f"k{n}", "text": f"item {n}"}) + "\n" for n in range(ITEMS)))
        arranged = [
            f"{point}:{1 if 'create' in point or 'complete' in point else luck.randint(1, 2)}" for point in STORES
        ]
        print(f"seed {SEED}: {arranged}")
        for moment in arranged:
            died = _produce(engine, items, moment)
            assert died.returncode == -signal.SIGKILL, died.stderr
            assert CRASHED in died.stderr
        launched = _produce(engine, items)
        assert launched.returncode == 0, launched.stderr
        record = json.loads(launched.stdout)
        assert record["resumed"] is True
        ((number, total),) = engine.rows("SELECT id, items_total FROM workflow_executions")
        assert total == ITEMS
        run = StartedRun(number, record["run_id"], resumed=True)
        assert engine.wait(run)["items"]["completed"] == ITEMS
        assert engine.check(run).attempts == {"ok": ITEMS}


def _completed(database: Path) -> int:
    if not database.exists():
        return 0
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM prompt_executions WHERE status = 'completed'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def test_a_command_on_one_machine_that_is_killed_leaves_no_process_and_goes_on_when_repeated(tmp_path: Path) -> None:
    luck = random.Random(SEED)
    _slow_down(tmp_path, 1.0)
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"key": f"k{n}", "text": f"item {n}"}) + "\n" for n in range(ITEMS)))
    arguments = command("run", str(ONE.write(tmp_path)), "--input", str(items), "--json", "--yes")
    arguments += ["--provider", "simulator"]
    database = tmp_path / "data" / "orchestrator.db"
    least = luck.randint(1, ITEMS // 3)
    print(f"seed {SEED}: killed after {least} calls")
    with (tmp_path / "log").open("wb") as log:
        killed = subprocess.Popen(arguments, cwd=tmp_path, env=clean_environment(), stdout=log, stderr=log)
        try:
            wait_until(lambda: _completed(database) >= least or killed.poll() is not None, 40)
            below = psutil.Process(killed.pid).children(recursive=True)
        finally:
            killed.kill()
            killed.wait(10)
    assert len(below) >= 2
    _, left = psutil.wait_procs(below, timeout=30)
    assert not left
    assert least <= _completed(database) < ITEMS
    _slow_down(tmp_path, 0.0)
    done = subprocess.run(
        arguments, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    launch, *_, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert launch["resumed"] is True
    assert end["items"] == {"total": ITEMS, "completed": ITEMS, "failed": 0, "skipped": 0}
    assert _attempts(database)["ok"] == ITEMS


def _slow_down(directory: Path, latency_s: float) -> None:
    (directory / "llm-orchestrator.toml").write_text(
        f"[llm_providers.simulator]\nconcurrency = 10\nsimulate = {{ latency_s = {latency_s} }}\n"
    )


def _attempts(database: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("SELECT status, count(*) FROM llm_usage GROUP BY status").fetchall())
