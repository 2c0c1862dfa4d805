"""Workers, deaths, repetitions, pauses and budgets in any order: the promises of the ledger hold after every step.

Hypothesis looks for an order that breaks them. It runs on SQLite, where a step takes a few milliseconds; what the
other tests of this folder show on both databases is what makes that enough.
"""

import itertools
import shutil
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select

from orchestrator.database import Database, batches, fleet, runs
from orchestrator.database.batches import Claimed, Settlement
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import OPEN_RUN, CallEnd
from orchestrator.database.tables import OPEN_CALL, llm_usage, prompt_executions, workers
from tests.integration.database.stage import Stage

CALLS = 3
ordinals = st.integers(0, CALLS - 1)
names = st.sampled_from(("w1", "w2"))
amounts = st.sampled_from((0, 1, 7, 40, 100))
ends = st.sampled_from(
    (
        ("ok", CallEnd("completed", result='"answer"')),
        ("retryable", CallEnd("running")),
        ("retryable", CallEnd("pending")),
        ("bad_output", CallEnd("running", reask=True)),
        ("unknown", CallEnd("running")),
        ("fatal", CallEnd("failed", error_code="rejected")),
        ("stale", CallEnd("pending")),
    )
)


class RunInAnyOrder(RuleBasedStateMachine):
    """One run of three calls, two workers, one budget."""

    grants: Any = Bundle("grants")
    written: Any = Bundle("written")

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.stage = Stage.with_calls(database, CALLS, limit_nusd=150)
        self.answers = itertools.count()
        self.ended: dict[int, Any] = {}
        self.fences = [0] * CALLS

    def teardown(self) -> None:
        self.stage.database.close()

    @rule(target=grants, ordinal=ordinals, worker=names, worst=amounts, hold=st.booleans())
    def claim(self, ordinal: int, worker: str, worst: int, hold: bool) -> Any:
        held = self.stage.row(ordinal).fence if hold else None
        wish = self.stage.wish(ordinal, worst, worker, held_fence=held)
        (answer,) = self.stage.claim(wish)
        if not isinstance(answer, Claimed):
            return multiple()
        assert self.stage.claim(wish) == [answer], "a repeated claim gets the same answer"
        return ordinal, worker, answer, worst

    @rule(target=written, grant=consumes(grants), end=ends, share=st.sampled_from((0, 1, 2, 3)), twice=st.booleans())
    def settle(self, grant: Any, end: tuple[Any, CallEnd], share: int, twice: bool) -> Settlement:
        ordinal, worker, claimed, worst = grant
        status, after = end
        # Half of the worst price, all of it, or, as no honest provider does, more.
        cost = worst if status == "unknown" else worst * share // 2
        if after.status == "completed":
            after = CallEnd("completed", result=f'"{next(self.answers)}"')
        one = self.stage.settlement(ordinal, claimed, Usage(status, cost_nusd=cost), after, worker)
        # In one batch, too, somebody may say what another says.
        told = self.stage.settle(*[one] * (2 if twice else 1))
        assert len(set(told)) == 1
        return one

    @rule(one=written)
    def settle_again(self, one: Settlement) -> None:
        before = (self.stage.money(), [self.stage.attempts(ordinal) for ordinal in range(CALLS)])
        self.stage.settle(one)
        assert (self.stage.money(), [self.stage.attempts(ordinal) for ordinal in range(CALLS)]) == before

    @rule(ordinal=ordinals, status=st.sampled_from(("skipped", "completed", "pending")))
    def close(self, ordinal: int, status: runs.CallStatus) -> None:
        self.stage.close(ordinal, CallEnd(status, result='"cached"' if status == "completed" else None))

    @rule(worker=names)
    def register(self, worker: str) -> None:
        with self.stage.database.snapshot() as connection:
            known = connection.execute(select(workers.c.id)).scalars().all()
        if worker not in known:
            self.stage.register(worker)

    @rule(worker=names)
    def die(self, worker: str) -> None:
        self.stage.kill(worker)
        self.stage.free_dead()

    @rule(worker=names)
    def sign_off(self, worker: str) -> None:
        with self.stage.database.transaction() as connection:
            fleet.sign_off(connection, worker)

    @rule(limit=st.sampled_from((None, 1, 60, 150, 400)))
    def set_limit(self, limit: int | None) -> None:
        self.stage.set_limit(limit)

    @rule()
    def pause(self) -> None:
        self.stage.move("paused", "running")

    @rule()
    def resume(self) -> None:
        self.stage.move("running", "paused")

    @precondition(lambda self: len(self.ended) > 1)
    @rule()
    def cancel(self) -> None:
        with self.stage.database.transaction() as connection:
            if runs.move_run(connection, self.stage.run, "cancelled", "user", sources=OPEN_RUN):
                runs.cancel_calls(connection, self.stage.run)

    @invariant()
    def the_books_agree_and_no_limit_is_passed(self) -> None:
        self.stage.check_books()

    @invariant()
    def what_has_ended_stays_as_it_ended(self) -> None:
        for ordinal in range(CALLS):
            call = self.stage.row(ordinal)
            seen = (call.status, call.result, call.error_code)
            assert self.ended.setdefault(ordinal, seen) == seen if call.status not in OPEN_CALL else True
            assert call.status not in OPEN_CALL or ordinal not in self.ended
            assert call.fence >= self.fences[ordinal]
            self.fences[ordinal] = call.fence

    @invariant()
    def held_calls_have_holders_and_others_have_none(self) -> None:
        for ordinal in range(CALLS):
            call = self.stage.row(ordinal)
            assert (call.worker_id is not None) == (call.status == "running")

    @invariant()
    def attempts_are_counted_and_at_most_one_answers(self) -> None:
        for ordinal in range(CALLS):
            attempts = self.stage.attempts(ordinal)
            assert [one.number for one in attempts] == list(range(1, len(attempts) + 1))
            assert self.stage.row(ordinal).attempts == len(attempts)
            assert sum(one.status == "ok" for one in attempts) <= 1
            assert sum(one.cost_nusd for one in attempts) == self.stage.row(ordinal).cost_nusd

    @invariant()
    def no_call_appears_or_disappears(self) -> None:
        with self.stage.database.snapshot() as connection:
            calls = connection.execute(select(func.count()).select_from(prompt_executions)).scalar_one()
            strays = select(func.count()).where(llm_usage.c.status == "reserved")
            assert connection.execute(strays).scalar_one() == 0
        assert calls == CALLS


def test_the_promises_hold_in_any_order(sqlite_template: Path, tmp_path: Path):
    numbers = itertools.count()

    def machine() -> RunInAnyOrder:
        path = tmp_path / f"{next(numbers)}.db"
        shutil.copy(sqlite_template, path)
        return RunInAnyOrder(Database(f"sqlite:///{path}", pool_size=1))

    quick = settings(
        max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(machine, settings=quick)


def test_a_claim_needs_no_batch(sqlite_template: Path, tmp_path: Path):
    """An empty batch is what a writer commits when it was woken to stop."""
    path = tmp_path / "runs.db"
    shutil.copy(sqlite_template, path)
    database = Database(f"sqlite:///{path}")
    with database.transaction() as connection:
        assert batches.claim(connection, []) == []
        assert batches.settle(connection, []) == []
        assert batches.close(connection, []) == []
    database.close()
