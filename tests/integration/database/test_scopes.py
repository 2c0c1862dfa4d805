"""Budgets of five kinds at once: which binds, what a day begins with, who is warned, and who is asked later."""

from threading import Thread

import pytest
from sqlalchemy import text, update

from orchestrator.database import Database, batches, budgets, clock, fleet, intake, reports
from orchestrator.database.batches import Claimed, OverBudget
from orchestrator.database.budgets import GLOBAL_SCOPE
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import UNKNOWN_OUTCOME, CallEnd
from orchestrator.database.tables import budgets as budget_rows
from orchestrator.database.tables import llm_usage
from tests.integration.database.stage import PROVIDER, Stage

NOON = 1_800_000_000.0
DAY_S = 86_400.0
DONE = CallEnd("completed", result="1")


def ids_of(database: Database, run: int, at_s: float = NOON) -> tuple[int, ...]:
    """The budgets of an attempt that the run makes at a time."""
    with database.transaction() as connection:
        return tuple(
            sorted(budgets.ensure_budgets(connection, budgets.scopes_of(run, "picks", PROVIDER, at_s)).values())
        )


def limit(database: Database, scope: str, limit_nusd: int | None) -> None:
    with database.transaction() as connection:
        budgets.set_limit(connection, scope, limit_nusd)


def budget(database: Database, scope: str) -> budgets.Budget:
    with database.snapshot() as connection:
        return budgets.find_budget(connection, scope)


def scopes(stage: Stage) -> tuple[str, ...]:
    return budgets.scopes_of(stage.run, "picks", PROVIDER, NOON)


def test_an_attempt_is_held_against_five_budgets_and_settles_all_of_them(stage: Stage):
    ids = ids_of(stage.database, stage.run)
    assert len(ids) == 5
    grant = stage.claimed(0, worst=100, budget_ids=ids)
    assert [budget(stage.database, one).reserved_nusd for one in scopes(stage)] == [100] * 5
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=130), DONE))
    for one in scopes(stage):
        found = budget(stage.database, one)
        assert (found.reserved_nusd, found.spent_nusd, found.excess_nusd) == (0, 100, 30)


@pytest.mark.parametrize("which", range(5), ids=["global", "run", "workflow", "provider", "day"])
def test_each_of_the_five_refuses_and_changes_nothing(stage: Stage, which: int):
    ids, scope = ids_of(stage.database, stage.run), scopes(stage)[which]
    for one in scopes(stage):
        limit(stage.database, one, 1_000)
    limit(stage.database, scope, 150)
    first, second = stage.claim(*(stage.wish(n, 100, budget_ids=ids) for n in (0, 1)))
    assert first == Claimed(1, 1)
    assert second == OverBudget(scope, 150, 100, for_good=False)
    assert isinstance(second, OverBudget)
    assert (second.free_nusd, second.spare_nusd) == (50, 150)
    assert [budget(stage.database, one).reserved_nusd for one in scopes(stage)] == [100] * 5


def test_a_refusal_names_the_budget_with_the_least_left(stage: Stage):
    ids = ids_of(stage.database, stage.run)
    limit(stage.database, GLOBAL_SCOPE, 90)
    limit(stage.database, budgets.workflow_scope("picks"), 40)
    (answer,) = stage.claim(stage.wish(0, 100, budget_ids=ids))
    assert answer == OverBudget("workflow:picks", 40, 100, for_good=True)


def test_a_limit_that_is_set_later_counts_what_was_spent_before(stage: Stage):
    ids = ids_of(stage.database, stage.run)
    grant = stage.claimed(0, worst=100, budget_ids=ids)
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=60), DONE))
    limit(stage.database, budgets.provider_scope(PROVIDER), 100)
    assert budget(stage.database, "provider:simulator").free_nusd() == 40


def test_an_attempt_settles_against_the_day_on_which_it_left(stage: Stage):
    grant = stage.claimed(0, worst=100, budget_ids=ids_of(stage.database, stage.run))
    ids_of(stage.database, stage.run, NOON + DAY_S)
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=70), DONE))
    assert budget(stage.database, budgets.day_scope(NOON)).spent_nusd == 70
    assert budget(stage.database, budgets.day_scope(NOON + DAY_S)).spent_nusd == 0


def test_a_new_day_begins_with_the_limit_of_the_last_one_and_with_nothing_spent(stage: Stage):
    today, tomorrow = budgets.day_scope(NOON), budgets.day_scope(NOON + DAY_S)
    limit(stage.database, today, 500)
    ids_of(stage.database, stage.run, NOON + DAY_S)
    assert budget(stage.database, tomorrow).limit_nusd == 500
    ids_of(stage.database, stage.run, NOON - DAY_S)
    assert budget(stage.database, budgets.day_scope(NOON - DAY_S)).limit_nusd is None


def test_what_an_operator_sets_stands_until_the_configuration_names_another_limit(database: Database):
    today = budgets.day_scope(NOON)

    def configure(nusd: int | None) -> int | None:
        with database.transaction() as connection:
            intake.set_limits(connection, {GLOBAL_SCOPE: None, today: nusd})
        return budget(database, today).limit_nusd

    assert configure(500) == 500
    limit(database, today, 900)
    assert configure(500) == 900
    assert configure(600) == 600
    limit(database, today, 900)
    with database.transaction() as connection:
        budgets.ensure_budgets(connection, [budgets.day_scope(NOON + DAY_S)])
    assert budget(database, budgets.day_scope(NOON + DAY_S)).limit_nusd == 600
    assert configure(None) is None


def test_several_processes_make_the_same_budgets_at_once(url: str):
    database, found = Database(url), list[tuple[int, ...]]()
    threads = [Thread(target=lambda: found.append(ids_of(database, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_warning_is_given_once_for_each_limit(stage: Stage):
    def warned() -> list[str]:
        with stage.database.transaction() as connection:
            return [one.scope for one in budgets.warn_once(connection)]

    scope = budgets.run_scope(stage.run)
    stage.set_limit(100)
    grant = stage.claimed(0, worst=79)
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=79), DONE))
    assert warned() == []
    grant = stage.claimed(1, worst=1)
    stage.settle(stage.settlement(1, grant, Usage("ok", cost_nusd=1), DONE))
    assert warned() == [scope]
    assert warned() == []
    stage.set_limit(100)
    assert warned() == []
    stage.set_limit(95)
    assert warned() == [scope]
    stage.set_limit(None)
    assert warned() == []


def test_status_tells_limits_the_scarcest_first_and_warns(stage: Stage):
    with stage.database.snapshot() as connection:
        now_s = clock(connection)
    with stage.database.transaction() as connection:
        ids = budgets.ensure_budgets(connection, budgets.scopes_of(stage.run, "picks", PROVIDER, now_s))
    limit(stage.database, budgets.day_scope(now_s), 100)
    limit(stage.database, GLOBAL_SCOPE, 1_000)
    grant = stage.claimed(0, worst=90, budget_ids=tuple(sorted(ids.values())))
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=85), DONE))
    with stage.database.snapshot() as connection:
        status = reports.status(connection, stage.run)
    assert [one["scope"] for one in status["budgets"]] == [budgets.day_scope(now_s), GLOBAL_SCOPE]
    assert status["budgets"][0]["free_usd"] == "0.000000015"
    assert len(status["warnings"]) == 1
    assert status["warnings"][0].startswith(f"85 % of the budget {budgets.day_scope(now_s)} is used")


class TestUnknownOutcomes:
    def test_a_call_whose_worker_died_in_flight_says_so(self, stage: Stage):
        stage.register("w1")
        stage.claimed(0)
        stage.kill("w1")
        stage.free_dead()
        assert (stage.row(0).status, stage.row(0).error_code) == ("pending", UNKNOWN_OUTCOME)

    def test_it_is_looked_up_a_few_times_less_and_less_often(self, stage: Stage):
        stage.register("w1")
        stage.claimed(0)
        stage.kill("w1")
        stage.free_dead()

        def due() -> list[int]:
            with stage.database.transaction() as connection:
                return [row.prompt_execution_id for row in fleet.to_look_up(connection, [PROVIDER], 20)]

        def later(seconds: float) -> None:
            with stage.database.transaction() as connection:
                connection.execute(update(llm_usage).values(settled_at=llm_usage.c.settled_at - seconds))

        assert due() == []
        later(6)
        assert due() == [stage.calls[0]]
        assert due() == []
        later(16)
        assert due() == [stage.calls[0]]
        later(1_000_000)
        assert [bool(due()) for _ in range(6)] == [True] * 4 + [False] * 2

    def test_what_the_provider_tells_later_corrects_five_budgets_and_no_answer(self, stage: Stage):
        ids = ids_of(stage.database, stage.run)
        stage.register("w1")
        first = stage.claimed(0, worst=100, budget_ids=ids)
        stage.kill("w1")
        stage.free_dead()
        second = stage.claimed(0, worst=100, worker="w2", budget_ids=ids)
        told = Usage("ok", input_tokens=7, output_tokens=3, cost_nusd=25)
        late = batches.Settlement(stage.calls[0], first.number, -1, "", told, CallEnd("pending"))
        assert stage.settle(late) == [False]
        assert stage.row(0).status == "running"
        stage.settle(stage.settlement(0, second, Usage("ok", cost_nusd=30), DONE, "w2"))
        assert stage.row(0).cost_nusd == 55
        assert [budget(stage.database, one).spent_nusd for one in scopes(stage)] == [55] * 5
        assert [row.status for row in stage.attempts(0)] == ["stale", "ok"]
        stage.check_books()


def test_scopes_sort_by_day_and_say_what_they_are(database: Database):
    assert budgets.day_scope(NOON) == "day:2027-01-15"
    assert budgets.scopes_of(3, "w", "p", NOON) == (GLOBAL_SCOPE, "run:3", "workflow:w", "provider:p", "day:2027-01-15")
    with database.snapshot() as connection:
        assert connection.execute(text("SELECT count(*) FROM budgets")).scalar_one() == 0
        assert budgets.find_budgets(connection, ["global"]) == []
    assert budget_rows.c.scope.type.length >= len("workflow:") + 200
