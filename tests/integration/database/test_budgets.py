"""A budget is never overspent: the claim checks, and the database itself refuses."""

import random
from threading import Event, Thread

import pytest
from celery import Celery
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from orchestrator.database import Database, budgets
from orchestrator.database.batches import Claimed, OverBudget
from orchestrator.database.budgets import GLOBAL_SCOPE
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from orchestrator.database.tables import budgets as budget_rows
from orchestrator.orchestration import WorkflowOrchestrator
from tests.integration.database.stage import Stage


@pytest.mark.parametrize("column", ["spent_nusd", "reserved_nusd"])
def test_the_database_refuses_to_go_beyond_a_limit(stage: Stage, column: str):
    stage.set_limit(100)
    with pytest.raises(IntegrityError, match="never_overspent"), stage.database.transaction() as connection:
        connection.execute(update(budget_rows).values({column: 101}))
    with stage.database.transaction() as connection:
        connection.execute(update(budget_rows).values({column: 100}))


@pytest.mark.parametrize("column", ["spent_nusd", "reserved_nusd", "excess_nusd"])
def test_the_database_refuses_sums_below_zero(stage: Stage, column: str):
    with pytest.raises(IntegrityError, match="not_negative"), stage.database.transaction() as connection:
        connection.execute(update(budget_rows).values({column: -1}))


def test_a_reservation_fits_to_the_last_nano_dollar(stage: Stage):
    stage.set_limit(200)
    answers = stage.claim(stage.wish(0, worst=100), stage.wish(1, worst=100), stage.wish(2, worst=1))
    assert answers[:2] == [Claimed(1, 1), Claimed(1, 1)]
    assert isinstance(answers[2], OverBudget)
    assert stage.row(2).status == "pending"
    assert stage.money().free_nusd() == 0


def test_a_smaller_wish_behind_a_refused_one_is_granted(stage: Stage):
    stage.set_limit(100)
    answers = stage.claim(stage.wish(0, worst=60), stage.wish(1, worst=60), stage.wish(2, worst=40))
    assert [type(one) for one in answers] == [Claimed, OverBudget, Claimed]


def test_waiting_helps_while_money_is_only_reserved(stage: Stage):
    stage.set_limit(150)
    grant = stage.claimed(0, worst=100)
    scope = budgets.run_scope(stage.run)
    assert stage.claim(stage.wish(1, worst=100)) == [OverBudget(scope, 150, 100, for_good=False)]
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=50), CallEnd("completed", result="1")))
    assert stage.claim(stage.wish(1, worst=100)) == [Claimed(1, 1)]


def test_waiting_does_not_help_when_money_is_spent(stage: Stage):
    stage.set_limit(150)
    grant = stage.claimed(0, worst=100)
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=51), CallEnd("completed", result="1")))
    scope = budgets.run_scope(stage.run)
    assert stage.claim(stage.wish(1, worst=100)) == [OverBudget(scope, 150, 151, for_good=True)]


def test_excess_counts_against_the_limit(stage: Stage):
    stage.set_limit(200)
    grant = stage.claimed(0, worst=100)
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=150), CallEnd("completed", result="1")))
    (answer,) = stage.claim(stage.wish(1, worst=100))
    assert isinstance(answer, OverBudget)
    assert answer.for_good
    assert stage.claim(stage.wish(1, worst=50)) == [Claimed(1, 1)]


def test_every_budget_of_a_call_must_hold(database: Database):
    stage = Stage.with_calls(database, 3, limit_nusd=1000)
    with database.transaction() as connection:
        everything = budgets.set_limit(connection, GLOBAL_SCOPE, 150)
    both = {"budget_ids": (everything.id, stage.budget)}
    first, second = stage.claim(stage.wish(0, **both), stage.wish(1, **both))
    assert first == Claimed(1, 1)
    assert isinstance(second, OverBudget)
    assert second.scope == GLOBAL_SCOPE
    stage.settle(stage.settlement(0, first, Usage("ok", cost_nusd=60), CallEnd("completed", result="1")))
    with database.snapshot() as connection:
        assert budgets.find_budget(connection, GLOBAL_SCOPE).spent_nusd == 60
    assert stage.money().spent_nusd == 60
    stage.check_books()


def test_a_limit_below_what_is_taken_binds_at_once(stage: Stage):
    stage.set_limit(300)
    first, second = stage.claimed(0, worst=100), stage.claimed(1, worst=100)
    assert stage.set_limit(120).limit_nusd == 120
    assert stage.money().free_nusd() == 0
    scope = budgets.run_scope(stage.run)
    stage.settle(stage.settlement(0, first, Usage("ok", cost_nusd=60), CallEnd("completed", result="1")))
    assert stage.claim(stage.wish(2, worst=1)) == [
        OverBudget(scope, 120, 61, for_good=False, free_nusd=0, spare_nusd=60)
    ]
    stage.settle(stage.settlement(1, second, Usage("ok", cost_nusd=30), CallEnd("completed", result="1")))
    assert stage.claim(stage.wish(2, worst=30)) == [Claimed(1, 1)]
    stage.check_books()


def test_what_was_taken_beyond_a_lowered_limit_only_falls(stage: Stage):
    grant = stage.claimed(0, worst=100)
    stage.set_limit(30)
    with pytest.raises(IntegrityError, match="never_overspent"), stage.database.transaction() as connection:
        budgets.reserve(connection, {stage.budget: 1})
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=70), CallEnd("completed", result="1")))
    with pytest.raises(IntegrityError, match="never_overspent"), stage.database.transaction() as connection:
        budgets.reserve(connection, {stage.budget: 1})
    assert stage.money().free_nusd() == 0
    stage.check_books()


def test_a_limit_that_is_taken_away_leaves_no_overhang(stage: Stage):
    stage.claimed(0, worst=100)
    stage.set_limit(30)
    assert stage.set_limit(None).free_nusd() is None
    assert stage.set_limit(150).free_nusd() == 50
    with pytest.raises(IntegrityError, match="never_overspent"), stage.database.transaction() as connection:
        budgets.reserve(connection, {stage.budget: 51})


def test_a_scope_without_a_budget_is_told(stage: Stage):
    with stage.database.snapshot() as connection, pytest.raises(LookupError):
        budgets.find_budget(connection, "run:0")


def test_two_producers_create_the_global_budget_at_once(url: str):
    database = Database(url)
    failed: list[BaseException] = []

    def create() -> None:
        try:
            with database.transaction() as connection:
                budgets.set_limit(connection, GLOBAL_SCOPE, 500)
        except IntegrityError as error:
            failed.append(error)

    threads = [Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.snapshot() as connection:
        assert len(connection.execute(select(budget_rows)).all()) == 1
    database.close()
    assert failed == []


def test_no_number_of_workers_overspends(database: Database):
    """Four threads claim and settle against a tight budget while a fifth one watches the row."""
    stage = Stage.with_calls(database, 40, limit_nusd=1_000)
    done, seen = Event(), list[tuple[int, int, int]]()

    def watch() -> None:
        while not done.is_set():
            money = stage.money()
            assert money.limit_nusd is not None
            seen.append((money.spent_nusd, money.reserved_nusd, money.limit_nusd))

    def work(worker: str) -> None:
        luck = random.Random(worker)
        for ordinal in range(int(worker[1:]) * 10, int(worker[1:]) * 10 + 10):
            worst = luck.choice((20, 90, 170, 400))
            for _ in range(20):
                (answer,) = stage.claim(stage.wish(ordinal, worst, worker))
                if isinstance(answer, Claimed):
                    cost = luck.choice((0, worst // 2, worst))
                    end = CallEnd("completed", result="1")
                    stage.settle(stage.settlement(ordinal, answer, Usage("ok", cost_nusd=cost), end, worker))
                    break
                assert isinstance(answer, OverBudget)
                if answer.for_good:
                    break

    watcher = Thread(target=watch)
    workers = [Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()
    assert seen
    assert all(spent + reserved <= limit for spent, reserved, limit in seen)
    money = stage.money()
    assert 600 <= money.spent_nusd <= 1_000
    assert money.reserved_nusd == 0
    stage.check_books()


class TestPausing:
    """A worker that was refused tells so in a transaction of its own, when the limit may have changed already."""

    def pause(self, stage: Stage, refusal: OverBudget) -> bool:
        orchestrator = WorkflowOrchestrator(stage.database, Celery(broker="memory://"))
        told = {"detail": refusal.scope, "refused": (refusal.scope, refusal.limit_nusd)}
        return orchestrator.manage_state(stage.run, "paused", "budget", sources=("running",), **told)

    def refusal(self, stage: Stage) -> OverBudget:
        stage.set_limit(50)
        (answer,) = stage.claim(stage.wish(0, worst=100))
        assert isinstance(answer, OverBudget)
        return answer

    def test_a_refusal_pauses_the_run_while_its_limit_stands(self, stage: Stage):
        refusal = self.refusal(stage)
        assert self.pause(stage, refusal)
        assert not self.pause(stage, refusal)

    def test_a_refusal_under_an_earlier_limit_pauses_nothing(self, stage: Stage):
        refusal = self.refusal(stage)
        stage.set_limit(500)
        assert not self.pause(stage, refusal)
        stage.set_limit(None)
        assert not self.pause(stage, refusal)
        assert stage.claim(stage.wish(0, worst=100)) == [Claimed(1, 1)]
