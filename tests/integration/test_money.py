"""Budgets and unknown outcomes through real worker processes and strict fake services."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.manager import StartedRun
from tests.engine import Engine, launch_engine
from tests.packs import ONE, one_step
from tests.servers import wait_until

LONG = one_step(tokens=1_500)


def _wait_paused(engine: Engine, run: StartedRun) -> dict[str, Any]:
    engine.wait(run, "paused")
    wait_until(lambda: engine.status(run)["calls"]["running"] == 0)
    return engine.status(run)


def _budget(engine: Engine, scope: str) -> Any:
    return engine.rows("SELECT * FROM budgets WHERE scope = :scope", scope=scope)[0]


def test_the_cap_shrinks_near_the_end_and_nearly_all_of_the_budget_is_used() -> None:
    with launch_engine(fakes={"main": {"latency_s": 0.02}}) as engine:
        run = engine.start_run(400, LONG, budget_usd="0.4")
        status = _wait_paused(engine, run)
        scope = f"run:{run.run}"
        assert (status["reason"], status["reason_detail"], status["bound_by"]) == ("budget", scope, "budget")
        assert Decimal("0.4") * Decimal("0.97") <= Decimal(status["cost_usd"]) <= Decimal("0.4")
        assert status["warnings"] == [one for one in status["warnings"] if scope in one] != []
        caps = {line.max_tokens for line in engine.fake.log().received}
        assert max(caps) == 1_500
        assert 64 <= min(caps) < 1_500
        wait_until(lambda: "budget.nearly_used" in engine.logs(), 5)
        assert engine.logs().count("budget.nearly_used") == 1
        engine.check(run, ended=False, repeats=50)
        print(f"used {status['cost_usd']} of 0.40, caps from {min(caps)}")


@pytest.mark.parametrize(
    ("scope", "settings"),
    [
        ("day:", {"global": {"daily_cost_limit_usd": 0.2}}),
        ("workflow:single", {"workflows.single": {"total_budget_usd": 0.2}}),
        ("provider:main", {"llm_providers.main": {"cost_limit_usd": 0.2}}),
    ],
    ids=["day", "workflow", "provider"],
)
def test_a_limit_in_the_configuration_pauses_runs_and_is_named(
    scope: str, settings: Mapping[str, Mapping[str, Any]]
) -> None:
    providers = {"main": dict(settings.get("llm_providers.main", {}))}
    others = {name: values for name, values in settings.items() if name != "llm_providers.main"}
    with launch_engine(providers=providers, settings=others, fakes={"main": {"latency_s": 0.02}}) as engine:
        run = engine.start_run(200, ONE)
        status = _wait_paused(engine, run)
        assert status["reason"] == "budget"
        assert status["reason_detail"].startswith(scope)
        assert status["budgets"][0]["scope"] == status["reason_detail"]
        assert 190_000_000 <= _budget(engine, status["reason_detail"]).spent_nusd <= 200_000_000
        engine.check(run, ended=False)


def test_a_run_that_paused_for_its_day_goes_on_when_the_day_is_over() -> None:
    with launch_engine(settings={"global": {"daily_cost_limit_usd": 0.03}}) as engine:
        runs = [engine.start_run(30, ONE, salt=name) for name in ("goes on", "is held")]
        for run in runs:
            assert _wait_paused(engine, run)["reason"] == "budget"
        assert engine.manager.pause(runs[1].run_id)
        assert not engine.manager.pause(runs[1].run_id)
        engine.manager.set_budget("day", None)
        # To these runs, today is tomorrow.
        with engine.manager.database.transaction() as connection:
            connection.execute(text("UPDATE workflow_executions SET reason_detail = 'day:2026-01-01'"))
        assert engine.wait(runs[0])["status"] == "completed"
        engine.check(runs[0])
        assert (engine.status(runs[1])["status"], engine.status(runs[1])["reason"]) == ("paused", "user")


def test_calls_go_on_at_the_next_provider_when_the_budget_of_one_is_used_up() -> None:
    with launch_engine(providers={"main": {"cost_limit_usd": 0.1}}, fakes={"main": {"latency_s": 0.02}}) as engine:
        run = engine.start_run(100, one_step(fallback=True))
        assert engine.wait(run)["status"] == "completed"
        engine.check(run)
        asked = engine.rows("SELECT DISTINCT provider FROM llm_usage ORDER BY 1")
        assert [row.provider for row in asked] == ["main", "spare"]
        assert _budget(engine, "provider:main").spent_nusd <= 100_000_000


class TestUnknownOutcomes:
    def test_they_are_sent_again_by_default_and_shown(self) -> None:
        with launch_engine() as engine:
            engine.fake.control("reset_after", "reset_after")
            run = engine.start_run(10, ONE)
            status = engine.wait(run)
            assert (status["status"], status["attempts"]["unknown"]) == ("completed", 2)
            assert Decimal(status["unconfirmed_usd"]) > 0
            engine.check(run, repeats=2, unknown=2)

    def test_the_calls_fail_where_nothing_may_be_paid_twice(self) -> None:
        with launch_engine(settings={"global": {"retry_unknown": False}}) as engine:
            engine.fake.control("reset_after", "reset_after")
            run = engine.start_run(10, ONE)
            assert engine.wait(run)["calls"]["failed"] == 2
            codes = engine.rows("SELECT error_code FROM prompt_executions WHERE status = 'failed'")
            assert [row.error_code for row in codes] == ["unknown_outcome"] * 2
            engine.check(run, unknown=2)

    def test_they_fail_too_when_the_worker_died_in_flight(self) -> None:
        settings = {"global": {"retry_unknown": False}}
        with launch_engine(settings=settings, fakes={"main": {"latency_s": 30.0}}, workers=1) as engine:
            run = engine.start_run(5, ONE)
            engine.wait_received(5)
            engine.workers[0].kill9()
            engine.start_worker()
            assert engine.wait(run)["calls"]["failed"] == 5
            engine.check(run, unknown=5)

    def test_a_provider_that_keeps_exchanges_settles_them_afterwards(self) -> None:
        with launch_engine(settings={"llm_providers.main.options": {"store": True}}) as engine:
            engine.fake.control("reset_after", "truncated", "reset_before")
            run = engine.start_run(10, ONE)
            assert engine.wait(run)["attempts"]["unknown"] == 3
            before = _budget(engine, f"run:{run.run}").spent_nusd
            wait_until(lambda: engine.status(run)["attempts"]["unknown"] == 1, 15)
            status = engine.status(run)
            assert status["attempts"]["stale"] == 2
            assert _budget(engine, f"run:{run.run}").spent_nusd < before
            history = engine.check(run, repeats=3, unknown=1, stale=2)
            assert history.calls == {"completed": 10}
            print(f"booked {before}, then {history.cost_nusd} nano-USD")
