"""What a shard does with its calls before anybody is asked: skip, answer from the cache, leave, or ask."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from orchestrator.broker import ShardMessage
from orchestrator.database import Database, budgets, intake, runs, windows, work
from orchestrator.database.cache import CacheEntry
from orchestrator.database.tables import prompt_executions
from orchestrator.declaration import read_workflow
from orchestrator.runspec import Route, RunSpec
from tests.integration.database.stage import run_values
from workers.asking import Job
from workers.cached import CachedAnswer
from workers.intake import Intake
from workers.prepared import PreparedRun, cache_key, find_run
from workers.shard import ask_shard
from workers.writer import BatchWriter

PACK = """
name = "picks"
version = "1"
[[steps]]
name = "look"
prompt = "look.j2"
answer = { fields = { score = { type = "integer" } } }
[[steps]]
name = "check"
prompt = "check.j2"
needs = ["look"]
when = "look.score > 3"
[[steps]]
name = "order"
kind = "reduce"
needs = ["look"]
reduce = { rule = "rank", step = "look", weights = { score = 1 } }
[[steps]]
name = "why"
kind = "reduce"
needs = ["order", "look"]
prompt = "why.j2"
reduce = { rule = "llm", ranking = "order", top = 2 }
[[steps]]
name = "last"
prompt = "last.j2"
needs = ["look", "order", "why"]
"""
FILES = {
    "workflow.toml": PACK,
    "look.j2": "{% if n == 3 %}{% else %}look at {{ n }}{% endif %}",
    "check.j2": "{{ look.score }}",
    "why.j2": "{% for one in entries %}{{ one.rank }} {{ one.key }} {{ one.answers.look.score }};{% endfor %}"
    "{{ totals.items }} {{ totals.failed }} {{ totals.ranked }}",
    "last.j2": "{{ order.rank }} {{ why }} {{ look.score }}",
}
ROUTE = Route("simulator", "sim-1", 100, None, None, None, "because")
ITEMS = 4


@dataclass
class Client:
    """Notes who would be asked, and asks nobody."""

    asked: list[Job] = field(default_factory=list)

    async def send_prompt(self, job: Job) -> None:
        self.asked.append(job)

    def accepts(self, provider: str) -> bool:
        return True

    def texts(self) -> dict[int, str]:
        return {job.call.ordinal: job.prompt.text for job in self.asked}


@dataclass
class Host:
    """A process with one shard."""

    database: Database
    run: int
    window: int
    goes_on: bool = True
    client: Any = field(default_factory=Client)
    writer: Any = None
    compiled: PreparedRun | None = None

    async def prepared(self, run: int) -> PreparedRun:
        with self.database.snapshot() as connection:
            return find_run(connection, run)

    def may_go_on(self, run: int) -> bool:
        return self.goes_on

    def ask(self, step: str, first: int = 0, last: int = ITEMS - 1, window: int | None = None) -> dict[int, str]:
        """Asks a shard; the prompts that would have been sent, by ordinal."""
        self.client = Client()

        async def whole() -> None:
            self.writer = BatchWriter(self.database, asyncio.get_running_loop())
            try:
                message = ShardMessage(self.run, window or self.window, 1, step, "simulator", first, last)
                await ask_shard(self, message, Intake().ticket(""))
            finally:
                await asyncio.to_thread(self.writer.stop)

        asyncio.run(whole())
        return self.client.texts()

    def end(self, step: str, ordinal: int, status: str, answer: Any = None) -> None:
        """Lets a call have ended."""
        columns = prompt_executions.c
        one = (columns.prompt_name == step) & (columns.item_ordinal == ordinal)
        result = json.dumps(answer) if status == "completed" else None
        with self.database.transaction() as connection:
            connection.execute(update(prompt_executions).where(one).values(status=status, result=result))

    def calls(self, step: str) -> list[tuple[str, str | None, str | None]]:
        """Status, error code and result of the calls of a step, by ordinal."""
        columns = prompt_executions.c
        query = select(columns.status, columns.error_code, columns.result).where(columns.prompt_name == step)
        with self.database.snapshot() as connection:
            return [tuple(row) for row in connection.execute(query.order_by(columns.item_ordinal))]


def call_row(run: int, step: str, ordinal: int) -> dict[str, Any]:
    return {
        "workflow_execution_id": run,
        "prompt_name": step,
        "prompt_template": f"{step}.j2@0",
        "llm_provider": "simulator",
        "llm_model": "sim-1",
        "item_ordinal": ordinal,
    }


@pytest.fixture
def host(sqlite_template: Path, tmp_path: Path) -> Iterator[Host]:
    """A running run of four items: a window with the calls of `look`, `check` and `last`, and one of `why`."""
    path = tmp_path / "runs.db"
    path.write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{path}")
    routes = {step: (ROUTE,) for step in ("look", "check", "why", "last")}
    spec = RunSpec(read_workflow(PACK, "w")[0], FILES, {}, routes, 10, 5, 2, 60)
    with database.transaction() as connection:
        budgets.set_limit(connection, budgets.GLOBAL_SCOPE, None)
        run = intake.create_run(connection, {**run_values("run-1"), "spec": spec.to_json()}, None)
        intake.add_items(connection, run, [(n, f"item-{n}", f'{{"n":{n}}}') for n in range(ITEMS)])
        (window,) = intake.add_windows(connection, run, 0, [(0, ITEMS - 1)])
        runs.move_run(connection, run, "running", None, sources=("pending",))
        rows = [call_row(run, step, ordinal) for step in ("look", "check", "last") for ordinal in range(ITEMS)]
        windows.open_pending(connection, window, rows)
    yield Host(database, run, window)
    database.close()


def test_calls_are_asked_with_their_items(host: Host):
    assert host.ask("look", 0, 2) == {0: "look at 0", 1: "look at 1", 2: "look at 2"}
    assert host.ask("look", 1, 1) == {1: "look at 1"}


def test_a_prompt_that_cannot_be_made_fails_its_call_alone(host: Host):
    assert set(host.ask("look")) == {0, 1, 2}
    assert [one[:2] for one in host.calls("look")] == [("pending", None)] * 3 + [("failed", "prompt")]


def test_a_call_whose_needs_are_open_is_left_for_another_round(host: Host):
    assert host.ask("check") == {}
    assert {one[0] for one in host.calls("check")} == {"pending"}


def test_conditions_and_missing_answers_skip_without_asking(host: Host):
    host.end("look", 0, "completed", {"score": 5})
    host.end("look", 1, "completed", {"score": 3})
    host.end("look", 2, "failed")
    host.end("look", 3, "skipped")
    assert host.ask("check") == {0: "5"}
    assert [one[:2] for one in host.calls("check")] == [
        ("pending", None),
        ("skipped", "condition"),
        ("skipped", "no_answer"),
        ("skipped", "no_answer"),
    ]


def test_a_condition_that_does_not_work_on_an_answer_fails_the_call(host: Host):
    host.end("look", 0, "completed", {"score": "many"})
    assert host.ask("check", 0, 0) == {}
    assert host.calls("check")[0][:2] == ("failed", "condition")


def test_a_run_that_stops_is_not_looked_at(host: Host):
    host.goes_on = False
    assert host.ask("look") == {}


def test_known_answers_come_from_the_cache(host: Host):
    host.ask("look", 0, 1)
    job = next(job for job in host.client.asked if job.call.ordinal == 1)
    kept = CachedAnswer('{"score":4}', 0.9, "simulator", "sim-1", 12)
    key = cache_key(job.kit, ROUTE, job.prompt, 0)
    host.database.cache_result([CacheEntry(key, job.prompt.messages_hash, kept.to_json(), 60.0)])
    assert set(host.ask("look", 0, 1)) == {0}
    assert host.calls("look")[1] == ("completed", None, '{"score":4}')


def rank(host: Host) -> int:
    for ordinal, score in enumerate((5, 9, 1)):
        host.end("look", ordinal, "completed", {"score": score})
    host.end("look", 3, "failed")
    for ordinal in range(ITEMS):
        host.end("check", ordinal, "skipped")
        host.end("last", ordinal, "cancelled")
    with host.database.transaction() as connection:
        windows.close_done(connection, host.window)
        work.save_ranking(connection, host.run, "order", [(1, 1, 9.0), (0, 2, 5.0), (2, 3, 1.0)])
        (window,) = intake.add_windows(connection, host.run, 0, [(-1, -1)], "why")
        windows.open_pending(connection, window, [call_row(host.run, "why", -1)])
    return window


def test_a_reduce_step_sees_the_best_and_the_whole(host: Host):
    window = rank(host)
    assert host.ask("why", -1, -1, window) == {-1: "1 item-1 9;2 item-0 5;4 1 3"}


def test_a_step_behind_a_reduce_step_sees_its_answer_and_the_items_place(host: Host):
    rank(host)
    host.end("why", -1, "completed", "because")
    for ordinal in range(ITEMS):
        host.end("last", ordinal, "pending")
    assert host.ask("last") == {0: "2 because 5", 1: "1 because 9", 2: "3 because 1"}
    assert host.calls("last")[3][:2] == ("skipped", "no_answer")


def test_a_step_behind_a_reduce_step_without_an_answer_is_skipped(host: Host):
    rank(host)
    host.end("why", -1, "failed")
    host.end("last", 0, "pending")
    assert host.ask("last", 0, 0) == {}
    assert host.calls("last")[0][:2] == ("skipped", "no_answer")
