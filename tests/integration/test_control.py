"""Control of runs that are going on, through real workers: in force everywhere within five seconds, and on record."""

import json
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.database import audit
from orchestrator.errors import InvalidInput, WrongState
from orchestrator.maintenance import Maintenance
from orchestrator.manager import RunRequest, StartedRun
from tests.engine import Engine, launch_engine
from tests.packs import ONE, SURVEY, one_step
from tests.servers import wait_until

IN_FORCE_S = 5.0
SLOW = {"main": {"latency_s": 0.3}}


@pytest.fixture(scope="module")
def installation() -> Iterator[Engine]:
    """Two workers that share everything."""
    with launch_engine(workers=2, settings={"worker": {"shard_size": 5}}) as engine:
        yield engine


@pytest.fixture
def engine(installation: Engine) -> Engine:
    """The shared installation with providers that behave well, and limits as configured."""
    return installation.calm()


def changes(engine: Engine, run: StartedRun) -> list[str]:
    """What the audit log tells of a run, oldest first."""
    with engine.manager.database.snapshot() as connection:
        return [row["action"] for row in reversed(audit.entries(connection, run.run_id))]


def received_in(engine: Engine, seconds: float) -> int:
    """How many requests come in so many seconds."""
    before = engine.fake.provider.number
    deadline = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= deadline, seconds + 5, 0.05)
    return engine.fake.provider.number - before


def start_with_texts(engine: Engine, name: str, texts: Sequence[str]) -> StartedRun:
    """Begins a run over items that differ in their keys, and in their texts as given."""
    file = engine.home / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"key": f"k{at}", "text": text}) + "\n" for at, text in enumerate(texts)))
    folder = one_step(cache=True).write(engine.home / "packs")
    return engine.manager.execute_workflow(engine.manager.plan(RunRequest(pack=str(folder), input=str(file))))


class TestRetry:
    def test_what_failed_is_asked_again_and_what_stands_behind_it_is_done_anew(self, engine: Engine) -> None:
        engine.fake.control(malformed=0.6)
        run = engine.start_run(30, SURVEY, salt="retry")
        first = engine.wait(run)
        assert first["calls"]["failed"] > 0
        assert first["calls"]["skipped"] > 0
        answers = "SELECT id, result FROM prompt_executions WHERE workflow_execution_id = :run AND status = 'completed'"
        before = {row.id: row.result for row in engine.rows(f"{answers} AND item_ordinal >= 0", run=run.run)}
        engine.fake.control(malformed=0.0)
        retried = engine.manager.retry(run.run_id)
        assert retried.failed == first["calls"]["failed"]
        status = engine.wait(run)
        assert (status["status"], status["reason"]) == ("completed", None)
        assert status["calls"] == status["calls"] | {"completed": 61, "failed": 0, "skipped": 0, "pending": 0}
        after = {row.id: row.result for row in engine.rows(answers, run=run.run)}
        assert before.items() <= after.items()
        assert (
            engine.rows("SELECT count(*) AS n FROM verdicts WHERE workflow_execution_id = :run", run=run.run)[0].n == 30
        )
        engine.check(run, repeats=200, redone=1)
        assert engine.manager.retry(run.run_id).failed == 0
        assert changes(engine, run) == ["run.retry"]

    def test_only_what_nobody_knows_is_asked_again(self, engine: Engine) -> None:
        engine.fake.control("malformed", "malformed", reset_after=1.0)
        run = engine.start_run(4, one_step(attempts=1, reasks=0), salt="unknown")
        engine.wait(run)
        known = engine.rows(
            "SELECT status, count(*) AS n FROM llm_usage WHERE workflow_execution_id = :run GROUP BY status",
            run=run.run,
        )
        assert {row.status: row.n for row in known} == {"bad_output": 2, "unknown": 2}
        engine.fake.control(reset_after=0.0)
        assert engine.manager.retry(run.run_id, failed=False, unknown=True).failed == 2
        status = engine.wait(run)
        assert (status["calls"]["completed"], status["calls"]["failed"]) == (2, 2)
        engine.check(run, repeats=2, unknown=2)

    def test_a_cancelled_run_stays_cancelled(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.5)
        run = engine.start_run(20, ONE, salt="no retry")
        assert engine.manager.cancel(run.run_id)
        with pytest.raises(WrongState):
            engine.manager.retry(run.run_id)
        assert changes(engine, run) == ["run.cancel"]


class TestLimits:
    def test_a_paused_provider_gets_nothing_and_a_changed_limit_is_kept(self) -> None:
        with launch_engine(providers={"main": {"concurrency": 20}}, fakes=SLOW, workers=2) as engine:
            run = engine.start_run(900, ONE, salt="limits")
            engine.wait_received(40)
            engine.manager.set_limits("main", concurrency=0)
            began = time.monotonic()
            wait_until(lambda: received_in(engine, 0.7) == 0, IN_FORCE_S, 0.02)
            print(f"paused after {time.monotonic() - began:.1f} s")
            assert received_in(engine, 1.5) == 0
            engine.manager.set_limits("main", rpm=1200, concurrency=50)
            wait_until(lambda: received_in(engine, 0.2) > 0, IN_FORCE_S)
            # A tenth of the limit may leave at once; then it is twenty a second.
            engine.wait_received(engine.fake.provider.number + 130)
            slow = received_in(engine, 3.0)
            # Busy machines wake senders late, never early; without the limit it would be hundreds.
            assert 15 <= slow <= 75, slow
            engine.manager.clear_limits("main")
            wait_until(lambda: received_in(engine, 0.5) > 20, IN_FORCE_S)
            assert engine.wait(run)["status"] == "completed"
            assert engine.check(run).received == 900
            with engine.manager.database.snapshot() as connection:
                assert audit.verify(connection).rows == 3

    def test_an_unknown_provider_is_refused(self, engine: Engine) -> None:
        with pytest.raises(InvalidInput):
            engine.manager.set_limits("mian", rpm=1)


class TestBudgets:
    def test_a_smaller_budget_stops_a_run_and_a_larger_one_lets_it_be_resumed(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.2)
        engine.manager.set_limits("main", concurrency=40)
        run = engine.start_run(400, ONE, salt="budget")
        engine.wait_received(engine.fake.provider.number + 60)
        assert engine.manager.set_budget(run.run_id, Decimal("0.000001")).limit_nusd == 1000
        attempts = engine.rows("SELECT count(*) FROM llm_usage")
        status = engine.wait(run, "paused", timeout_s=4 * IN_FORCE_S)
        assert status["reason"] == "budget"
        # No sending is on record, so none left, that was not on its way when the budget changed.
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0, IN_FORCE_S)
        assert engine.rows("SELECT count(*) FROM llm_usage") == attempts
        engine.manager.set_budget(run.run_id, Decimal("5"))
        assert engine.status(run)["status"] == "paused"
        engine.manager.resume(run.run_id)
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run).received == 400
        assert [name for name in changes(engine, run) if name != "run.paused"] == [
            "budget.set",
            "budget.set",
            "run.resume",
        ]


class TestPriority:
    def test_a_run_of_higher_priority_gets_more_of_the_limit(self) -> None:
        with launch_engine(providers={"main": {"rate_limit_rpm": 1800, "burst": 10}}, workers=2) as engine:
            runs = [engine.start_run(400, ONE, salt=f"priority {name}") for name in "ab"]
            engine.wait_received(60)
            assert engine.manager.set_priority(runs[1].run_id, 3)
            assert not engine.manager.set_priority(runs[1].run_id, 3)
            received_in(engine, 3.0)
            before = [engine.status(run)["calls"]["completed"] for run in runs]
            received_in(engine, 4.0)
            got = [engine.status(run)["calls"]["completed"] - done for run, done in zip(runs, before, strict=True)]
            print(f"of one limit, priority 0 got {got[0]} and priority 3 got {got[1]}")
            assert got[1] > 2 * got[0]
            assert changes(engine, runs[1]) == ["run.priority"]


class TestEqualCalls:
    def test_equal_calls_of_two_runs_on_two_workers_are_paid_once(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.4)
        texts = [f"the same text {at % 6}" for at in range(120)]
        runs = [start_with_texts(engine, name, texts) for name in ("one", "two")]
        for run in runs:
            assert engine.wait(run)["status"] == "completed"
        assert engine.fake.provider.number == 6
        histories = [engine.check(run) for run in runs]
        assert sum(history.attempts["ok"] for history in histories) == 6
        both = ",".join(str(run.run) for run in runs)
        saved = engine.rows(
            "SELECT count(*) AS n, sum(saved_nusd) AS saved FROM prompt_executions "
            f"WHERE cached AND workflow_execution_id IN ({both})"
        )[0]
        assert saved.n == 234
        assert saved.saved > 0

    def test_when_the_one_that_asks_fails_another_one_asks(self, engine: Engine) -> None:
        engine.fake.control("malformed", latency_s=0.2)
        run = start_with_texts(engine, "bad", ["one bad text"] * 10)
        engine.wait(run)
        assert engine.check(run, repeats=2).calls["completed"] >= 9


class TestErasing:
    def test_nothing_that_was_said_about_items_can_be_found_again(self) -> None:
        with launch_engine(workers=1) as engine:
            engine.fake.control(malformed=0.2)
            run = start_with_texts(engine, "people", [f"CANARY{at} lives here" for at in range(20)])
            engine.wait(run)
            engine.stop()
            data = engine.home / "data"
            assert places_with(data, b"CANARY7 ")
            keeper = Maintenance(engine.config, engine.manager.database, "tester")
            cost = engine.status(run)["cost_usd"]
            assert [one.items for one in keeper.erase(item="k7")] == [1]
            assert places_with(data, b"CANARY7 ") == []
            assert places_with(data, b"CANARY8 ")
            keeper.erase(run=(run.run, run.run_id))
            assert places_with(data, b"CANARY") == []
            assert places_with(data, b'"k3"') == []
            assert engine.status(run)["cost_usd"] == cost
            assert changes(engine, run) == ["data.erase", "data.erase"]
            with pytest.raises(WrongState):
                engine.manager.retry(run.run_id)

    def test_a_run_at_work_is_not_erased(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.5)
        run = engine.start_run(20, ONE, salt="at work")
        keeper = Maintenance(engine.config, engine.manager.database, "tester")
        with pytest.raises(WrongState):
            keeper.erase(run=(run.run, run.run_id))
        engine.manager.cancel(run.run_id)


def places_with(folder: Path, needle: bytes) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and needle in path.read_bytes()]


def test_backups_are_whole_while_a_run_goes_on_and_are_not_restored_under_workers(
    engine: Engine, tmp_path: Path
) -> None:
    engine.fake.control(latency_s=0.02)
    run = engine.start_run(600, ONE, salt="backup")
    engine.wait_received(100)
    keeper = Maintenance(engine.config, engine.manager.database, "tester")
    path = keeper.backup(tmp_path / "copy.db")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InvalidInput):
        keeper.backup(path)
    with pytest.raises(WrongState):
        keeper.restore(path)
    engine.manager.cancel(run.run_id)
