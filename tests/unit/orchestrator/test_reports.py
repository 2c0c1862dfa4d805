"""What reports say about runs that were filled through the same doors that workers use."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select

from orchestrator.database import (
    Database,
    batches,
    budgets,
    costs,
    fleet,
    intake,
    ledger,
    records,
    reports,
    runs,
    windows,
)
from orchestrator.database.tables import prompt_executions, verdicts, workflow_executions
from orchestrator.declaration import read_workflow
from orchestrator.errors import RunNotFound
from orchestrator.runspec import Route, RunSpec

PACK = """
name = "picks"
version = "1.0.0"

[[steps]]
name = "look"
prompt = "look.md.j2"

[[steps]]
name = "score"
prompt = "score.md.j2"
needs = ["look"]
answer = { format = "json", fields = { value = { type = "integer" } } }

[[steps]]
name = "order"
kind = "reduce"
needs = ["score"]
reduce = { rule = "rank", step = "score", weights = { value = 1 }, top = 2 }

[[steps]]
name = "verdict"
kind = "reduce"
prompt = "verdict.md.j2"
needs = ["order"]
reduce = { rule = "llm", ranking = "order" }
"""
WORKER = "worker-1"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'runs.db'}")
    database.migrate()
    yield database
    database.close()


def make_spec() -> RunSpec:
    workflow, _ = read_workflow(PACK, "workflow.toml")
    route = Route("simulator", "sim-1", 100, None, None, None, "the only provider")
    files = {"workflow.toml": PACK, "look.md.j2": "a", "score.md.j2": "b", "verdict.md.j2": "c"}
    asking = ("look", "score", "verdict")
    return RunSpec(workflow, files, {}, {step: (route,) for step in asking}, 10, 5, 2, 0)


@dataclass
class Filled:
    """A run that a test drives call by call."""

    connection: Connection
    run: int
    window: int

    def call(self, step: str, ordinal: int) -> int:
        columns = prompt_executions.c
        query = select(columns.id).where(
            columns.workflow_execution_id == self.run, columns.prompt_name == step, columns.item_ordinal == ordinal
        )
        return self.connection.execute(query).scalar_one()

    def answer(self, step: str, ordinal: int, answer: Any, cost_nusd: int, *, model: str = "sim-1") -> None:
        usage = ledger.Usage("ok", input_tokens=10, output_tokens=5, cached_tokens=2, cost_nusd=cost_nusd)
        end = runs.CallEnd("completed", result=json.dumps(answer), quality_score=1.0)
        self._settle(self.call(step, ordinal), step, usage, end, model)

    def fail(self, step: str, ordinal: int, cost_nusd: int = 0) -> None:
        usage = ledger.Usage("fatal", cost_nusd=cost_nusd, error_code="rejected", error_message="bad request")
        end = runs.CallEnd("failed", error_code="rejected", error_message="bad request")
        self._settle(self.call(step, ordinal), step, usage, end, "sim-1")

    def skip(self, step: str, ordinal: int) -> None:
        closing = batches.Closing(self.call(step, ordinal), runs.CallEnd("skipped", error_code="condition"))
        batches.close(self.connection, [closing])

    def lose(self, step: str, ordinal: int, worst_nusd: int) -> None:
        """The worker dies after sending."""
        call = self.call(step, ordinal)
        self._claim(call, step, "sim-1", worst_nusd)
        fleet.sign_off(self.connection, WORKER)

    def ask_reduce(self, answer: str | None) -> None:
        (window,) = intake.add_windows(self.connection, self.run, 0, [(-1, -1)], "verdict")
        windows.open_pending(self.connection, window, [call_row(self.run, "verdict", -1)])
        if answer is None:
            self.fail("verdict", -1)
        else:
            self.answer("verdict", -1, answer, 7)
        windows.close_done(self.connection, window)

    def rank(self, places: list[tuple[int, int, float]]) -> None:
        for position, (ordinal, rank, score) in enumerate(places):
            self.connection.execute(
                insert(verdicts).values(
                    workflow_execution_id=self.run,
                    step="order",
                    position=position,
                    item_ordinal=ordinal,
                    rank=rank,
                    score=score,
                )
            )

    def finish(self) -> reports.Outcome:
        runs.set_stage(self.connection, self.run, segment=0, phase="finish", reduce_index=0)
        ended = reports.outcome(self.connection, self.run)
        runs.move_run(self.connection, self.run, ended.status, ended.reason, sources=("running",))
        return ended

    def _claim(self, call: int, step: str, model: str, worst_nusd: int) -> batches.Claimed:
        budget = budgets.find_budget(self.connection, budgets.run_scope(self.run)).id
        wish = batches.Claim(call, self.run, step, "simulator", model, WORKER, call, worst_nusd, (budget,), "test")
        (claimed,) = batches.claim(self.connection, [wish])
        assert isinstance(claimed, batches.Claimed)
        return claimed

    def _settle(self, call: int, step: str, usage: ledger.Usage, end: runs.CallEnd, model: str) -> None:
        claimed = self._claim(call, step, model, 1000)
        settlement = batches.Settlement(call, claimed.number, claimed.fence, WORKER, usage, end)
        assert batches.settle(self.connection, [settlement]) == [True]


def call_row(run: int, step: str, ordinal: int) -> dict[str, Any]:
    return {
        "workflow_execution_id": run,
        "prompt_name": step,
        "prompt_template": f"{step}.md.j2@0",
        "llm_provider": "simulator",
        "llm_model": "sim-1",
        "item_ordinal": ordinal,
    }


def begin_run(connection: Connection, items: int = 3, run_id: str = "20261122-101500-brave-otter") -> Filled:
    spec = make_spec()
    values = {
        "run_id": run_id,
        "workflow_id": "picks",
        "project_name": "things",
        "status": "running",
        "started_at": datetime.now(UTC) - timedelta(seconds=10),
        "workflow_version": "1.0.0",
        "pack_hash": "0" * 64,
        "identity": "1" * 64,
        "spec": spec.to_json(),
    }
    run = intake.create_run(connection, values, 10**9)
    intake.add_items(connection, run, [(n, f"item-{n}", json.dumps({"n": n})) for n in range(items)])
    (window,) = intake.add_windows(connection, run, 0, [(0, items - 1)])
    intake.complete_input(connection, run)
    rows = [call_row(run, step, ordinal) for step in ("look", "score") for ordinal in range(items)]
    windows.open_pending(connection, window, rows)
    return Filled(connection, run, window)


@pytest.fixture
def filled(database: Database) -> Iterator[Filled]:
    with database.transaction() as connection:
        yield begin_run(connection)


@pytest.fixture
def ended(filled: Filled) -> Filled:
    """Item 0 is judged, item 1 fails half way, item 2 is not asked at all."""
    filled.answer("look", 0, "fine", 100)
    filled.answer("score", 0, {"value": 8}, 23)
    filled.answer("look", 1, "odd", 100, model="sim-2")
    filled.fail("score", 1, 5)
    filled.skip("look", 2)
    filled.skip("score", 2)
    windows.close_done(filled.connection, filled.window)
    filled.rank([(0, 1, 8.0)])
    filled.ask_reduce("item-0 it is")
    filled.finish()
    return filled


def test_a_running_run_counts_what_is_not_asked_yet_as_pending(filled: Filled) -> None:
    filled.answer("look", 0, "fine", 100)
    status = reports.status(filled.connection, filled.run)
    assert status["calls"] == {
        "pending": 6,
        "running": 0,
        "completed": 1,
        "failed": 0,
        "skipped": 0,
        "cancelled": 0,
    }
    assert status["items"] == {"total": 3, "completed": 0, "failed": 0, "skipped": 0}
    assert status["duration_seconds"] >= 10
    assert status["eta_seconds"] > 0


def test_items_of_an_ended_run_add_up_to_the_total(ended: Filled) -> None:
    status = reports.status(ended.connection, ended.run)
    assert (status["status"], status["reason"]) == ("completed", "with_failures")
    assert status["items"] == {"total": 3, "completed": 1, "failed": 1, "skipped": 1}
    assert status["calls"]["pending"] == 0
    assert status["completed_at"].endswith("Z")
    assert status["eta_seconds"] is None


def test_items_of_a_cancelled_run_add_up_to_the_total(filled: Filled) -> None:
    runs.move_run(filled.connection, filled.run, "cancelled", "user", sources=("running",))
    runs.cancel_calls(filled.connection, filled.run)
    status = reports.status(filled.connection, filled.run)
    assert status["items"] == {"total": 3, "completed": 0, "failed": 0, "skipped": 3}
    assert status["calls"]["cancelled"] == 7


def test_money_is_exact_and_the_unconfirmed_part_is_told_apart(filled: Filled) -> None:
    filled.answer("look", 0, "fine", 123)
    filled.lose("look", 1, 1000)
    status = reports.status(filled.connection, filled.run)
    assert status["cost_usd"] == "0.000001123"
    assert status["unconfirmed_usd"] == "0.000001"
    assert status["reserved_usd"] == "0.00"
    assert status["budget_usd"] == "1.00"
    assert status["attempts"]["unknown"] == 1
    assert status["tokens"] == {"input": 10, "output": 5, "cached": 2}


def test_a_run_without_a_worker_is_bound_by_workers(filled: Filled) -> None:
    assert reports.status(filled.connection, filled.run)["bound_by"] == "workers"
    fleet.register(filled.connection, WORKER, "llm.simulator", "1", 16)
    fleet.beat(filled.connection, WORKER, 5, "rate_limit")
    assert reports.status(filled.connection, filled.run)["bound_by"] == "rate_limit"


def test_a_lost_reduce_answer_fails_the_run(filled: Filled) -> None:
    for ordinal in range(3):
        filled.answer("look", ordinal, "fine", 1)
        filled.answer("score", ordinal, {"value": 1}, 1)
    windows.close_done(filled.connection, filled.window)
    filled.ask_reduce(None)
    assert filled.finish() == reports.Outcome("failed", "reduce_failed")


def test_a_run_whose_items_all_failed_has_failed(filled: Filled) -> None:
    for ordinal in range(3):
        filled.fail("look", ordinal)
        filled.skip("score", ordinal)
    windows.close_done(filled.connection, filled.window)
    assert filled.finish() == reports.Outcome("failed", "all_items_failed")


def test_an_item_that_failed_in_two_segments_counts_once(filled: Filled) -> None:
    filled.answer("look", 0, "fine", 1)
    for ordinal in range(3):
        filled.fail("score", ordinal)
    filled.fail("look", 1)
    filled.answer("look", 2, "fine", 1)
    windows.close_done(filled.connection, filled.window)
    (window,) = intake.add_windows(filled.connection, filled.run, 1, [(0, 2)])
    windows.open_pending(filled.connection, window, [call_row(filled.run, "again", ordinal) for ordinal in range(3)])
    filled.fail("again", 0)
    windows.close_done(filled.connection, window)
    assert reports.status(filled.connection, filled.run)["items"]["failed"] == 3


def test_results_come_in_the_order_of_items_and_of_work(ended: Filled) -> None:
    rows = list(records.results(ended.connection, ended.run))
    assert [(row["item_key"], row["step"], row["status"]) for row in rows] == [
        ("item-0", "look", "completed"),
        ("item-0", "score", "completed"),
        ("item-1", "look", "completed"),
        ("item-1", "score", "failed"),
        ("item-2", "look", "skipped"),
        ("item-2", "score", "skipped"),
        (None, "order", "completed"),
        (None, "verdict", "completed"),
    ]
    assert rows[1]["answer"] == {"value": 8}
    assert rows[3]["error"] == {"code": "rejected", "message": "bad request"}
    assert rows[6]["answer"] == {"ranking": [{"rank": 1, "score": 8.0, "item_key": "item-0"}]}
    assert sum(Decimal(row["cost_usd"]) for row in rows) == Decimal("0.000000235")


def test_results_of_many_items_cross_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PAGE_ITEMS", 2)
    with database.transaction() as connection:
        filled = begin_run(connection, items=5)
        rows = list(records.results(connection, filled.run, "look"))
    assert [row["item_key"] for row in rows] == [f"item-{n}" for n in range(5)]


@pytest.mark.parametrize("by", ["run", "provider", "model", "step", "day"])
def test_every_grouping_of_costs_adds_up_to_the_ledger(ended: Filled, by: costs.Grouping) -> None:
    groups = costs.costs(ended.connection, ended.run, by)
    total = costs.totals(ended.connection, ended.run)["cost_nusd"]
    assert sum(Decimal(group["cost_usd"]) for group in groups) == Decimal(total) / 10**9
    assert sum(group["attempts"] for group in groups) == 5


def test_costs_since_tomorrow_are_none(ended: Filled) -> None:
    assert costs.costs(ended.connection, since=datetime.now(UTC) + timedelta(days=1)) == []


def test_explain_tells_the_whole_story_of_an_item(ended: Filled) -> None:
    story = records.explain(ended.connection, ended.run, "item-1")
    assert story is not None
    assert story["item"] == {"n": 1}
    assert [call["step"] for call in story["calls"]] == ["look", "score"]
    failed = story["calls"][1]
    assert failed["template"] == "score.md.j2@0"
    assert failed["routes"][0]["reason"] == "the only provider"
    assert failed["attempts"][0]["error"] == {"code": "rejected", "message": "bad request"}
    assert records.explain(ended.connection, ended.run, "item-0")["rankings"] == [  # type: ignore[index]
        {"step": "order", "rank": 1, "score": 8.0, "of": 1}
    ]


def test_explain_knows_reduce_steps_and_nothing_else(ended: Filled) -> None:
    story = records.explain(ended.connection, ended.run, "verdict")
    assert story is not None
    assert story["calls"][0]["answer"] == "item-0 it is"
    assert records.explain(ended.connection, ended.run, "nobody") is None


def test_a_run_is_found_by_id_prefix_words_and_latest(database: Database) -> None:
    with database.transaction() as connection:
        first = begin_run(connection)
        second = begin_run(connection, run_id="20261123-080000-calm-heron")
        for name in ("20261122-101500-brave-otter", "20261122", "brave-otter"):
            assert reports.find_run(connection, name)[0] == first.run
        assert reports.find_run(connection, "latest")[0] == second.run
        with pytest.raises(RunNotFound) as ambiguous:
            reports.find_run(connection, "202611")
        assert len(ambiguous.value.candidates) == 2
        with pytest.raises(RunNotFound):
            reports.find_run(connection, "2026%")
        assert [run["run_id"][:8] for run in reports.list_runs(connection)] == ["20261123", "20261122"]


def test_a_run_that_is_gone_is_a_lookup_error(database: Database) -> None:
    with database.snapshot() as connection, pytest.raises(LookupError):
        reports.status(connection, 99)


def test_listed_costs_come_from_the_budgets(ended: Filled) -> None:
    assert reports.list_runs(ended.connection)[0]["cost_usd"] == "0.000000235"
    assert ended.connection.execute(select(workflow_executions.c.duration_seconds)).scalar_one() > 9
