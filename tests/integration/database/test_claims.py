"""Who may send: a claim is granted once, to one worker, for a call that is due in a run that runs."""

from threading import Barrier, Thread

import pytest

from orchestrator.database import Database, batches, fleet, intake, runs
from orchestrator.database.batches import ClaimAnswer, Claimed, NotMine
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from tests.integration.database.stage import Stage


def test_a_granted_claim_holds_the_call_and_notes_the_attempt_as_sent(stage: Stage):
    assert stage.claim(stage.wish(0, worst=70, token=99)) == [Claimed(fence=1, number=1)]
    call = stage.row(0)
    assert (call.status, call.worker_id, call.fence, call.attempts, call.route_attempts) == ("running", "w1", 1, 1, 1)
    assert call.claimed_at is not None
    (attempt,) = stage.attempts(0)
    assert (attempt.status, attempt.number, attempt.fence, attempt.token) == ("sent", 1, 1, 99)
    assert attempt.reserved_nusd == 70
    assert attempt.sent_at is not None
    assert attempt.settled_at is None
    assert stage.money().reserved_nusd == 70


def test_a_second_delivery_steps_aside(stage: Stage):
    stage.claimed(0)
    assert stage.claim(stage.wish(0, worker="w2"), stage.wish(0)) == [NotMine(), NotMine()]
    assert len(stage.attempts(0)) == 1
    assert stage.money().reserved_nusd == 100


def test_of_two_wishes_for_one_call_in_a_batch_the_first_is_granted(stage: Stage):
    assert stage.claim(stage.wish(1), stage.wish(1, worker="w2")) == [Claimed(1, 1), NotMine()]


def test_answers_stand_in_the_order_of_the_wishes(stage: Stage):
    stage.claimed(2)
    answers = stage.claim(stage.wish(3), stage.wish(2, worker="w2"), stage.wish(0), stage.wish(1, call=10**9))
    assert answers == [Claimed(1, 1), NotMine(), Claimed(1, 1), NotMine()]


@pytest.mark.parametrize("state", ["completed", "failed", "skipped", "cancelled"])
def test_a_call_that_has_ended_is_not_claimed(stage: Stage, state: runs.CallStatus):
    assert stage.close(0, CallEnd(state))
    assert stage.claim(stage.wish(0)) == [NotMine()]


@pytest.mark.parametrize("state", ["paused", "cancelled", "failed", "completed"])
def test_a_run_that_does_not_run_sends_nothing(stage: Stage, state: runs.RunStatus):
    assert stage.move(state, "running")
    assert stage.claim(stage.wish(0)) == [NotMine()]
    assert stage.money().reserved_nusd == 0


def test_a_resumed_run_goes_on(stage: Stage):
    stage.move("paused", "running")
    stage.move("running", "paused")
    assert stage.claim(stage.wish(0)) == [Claimed(1, 1)]


def test_the_holder_sends_again_under_its_fence(stage: Stage):
    grant = stage.claimed(0)
    usage = Usage("retryable")
    assert stage.settle(stage.settlement(0, grant, usage, CallEnd("running"))) == [True]
    assert stage.claim(stage.wish(0, held_fence=grant.fence)) == [Claimed(fence=grant.fence, number=2)]
    call = stage.row(0)
    assert (call.fence, call.attempts, call.route_attempts) == (1, 2, 2)


def test_nobody_but_the_holder_sends_again(stage: Stage):
    grant = stage.claimed(0)
    stage.settle(stage.settlement(0, grant, Usage("retryable"), CallEnd("running")))
    other = stage.wish(0, held_fence=grant.fence, worker="w2")
    older = stage.wish(0, held_fence=grant.fence - 1)
    assert stage.claim(other, older) == [NotMine(), NotMine()]


def test_every_claim_gets_a_higher_fence(stage: Stage):
    for expected in (1, 2, 3):
        grant = stage.claimed(0)
        assert grant == Claimed(fence=expected, number=expected)
        stage.settle(stage.settlement(0, grant, Usage("retryable"), CallEnd("pending")))


def test_a_call_that_was_put_off_meanwhile_is_left_for_later(stage: Stage):
    """A second copy of a shard may have read the call before the first copy was told to wait."""
    grant = stage.claimed(0)
    stage.settle(stage.settlement(0, grant, Usage("retryable"), CallEnd("pending", next_at_s=60)))
    assert stage.claim(stage.wish(0, worker="w2")) == [NotMine()]


def test_a_call_whose_waiting_time_is_over_is_claimed(stage: Stage):
    assert stage.close(0, CallEnd("pending", next_at_s=-1))
    assert stage.claim(stage.wish(0)) == [Claimed(1, 1)]
    assert stage.row(0).next_at is None


def test_a_call_that_went_to_another_route_is_not_sent_on_the_old_one(stage: Stage):
    grant = stage.claimed(0)
    end = CallEnd("pending", route=(1, "second", "model-2"))
    stage.settle(stage.settlement(0, grant, Usage("refused"), end))
    assert stage.claim(stage.wish(0)) == [NotMine()]
    assert stage.claim(stage.wish(0, provider="second", model="model-2")) == [Claimed(2, 2)]
    assert (stage.row(0).route_index, stage.row(0).route_attempts) == (1, 1)


def test_the_same_batch_again_gets_the_same_answers_and_no_second_attempt(stage: Stage):
    """The outcome of a commit may stay unknown; the writer then repeats the batch."""
    batch = [stage.wish(0), stage.wish(1), stage.wish(0, worker="w2")]
    first = stage.claim(*batch)
    assert stage.claim(*batch) == first
    assert [len(stage.attempts(ordinal)) for ordinal in (0, 1)] == [1, 1]
    assert stage.money().reserved_nusd == 200
    stage.check_books()


def test_another_wish_of_the_same_worker_is_not_taken_for_a_repetition(stage: Stage):
    stage.claimed(0)
    assert stage.claim(stage.wish(0)) == [NotMine()]


def test_many_workers_at_once_get_every_call_once(database: Database):
    stage = Stage.with_calls(database, 12)
    start = Barrier(4)
    granted: list[tuple[str, int]] = []

    def work(worker: str) -> None:
        start.wait()
        wishes = [stage.wish(ordinal, worker=worker) for ordinal in range(12)]
        if worker in ("w1", "w3"):
            wishes.reverse()
        for half in (wishes[:6], wishes[6:]):
            answers: list[ClaimAnswer] = stage.claim(*half)
            granted.extend(
                (worker, wish.call) for wish, answer in zip(half, answers, strict=True) if isinstance(answer, Claimed)
            )

    threads = [Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(call for _, call in granted) == stage.calls
    assert all(
        stage.row(ordinal).worker_id == dict((c, w) for w, c in granted)[stage.calls[ordinal]] for ordinal in (0, 11)
    )
    stage.check_books()


def test_a_deleted_run_is_nobodys(stage: Stage):
    with stage.database.transaction() as connection:
        assert batches.claim(connection, []) == []
        connection.exec_driver_sql("DELETE FROM workflow_executions")
    assert stage.claim(stage.wish(0)) == [NotMine()]
    usage = Usage("ok", cost_nusd=1)
    assert stage.settle(stage.settlement(0, Claimed(1, 1), usage, CallEnd("completed"))) == [False]


def test_closing_ends_a_pending_call_and_nothing_else(stage: Stage):
    assert stage.close(0, CallEnd("skipped", error_code="condition", error_message="not asked"))
    assert not stage.close(0, CallEnd("failed"))
    call = stage.row(0)
    assert (call.status, call.error_code, call.completed_at is not None, call.cost_nusd) == (
        "skipped",
        "condition",
        True,
        0,
    )


def test_closing_a_held_call_needs_the_fence_and_the_worker(stage: Stage):
    grant = stage.claimed(0)
    stage.settle(stage.settlement(0, grant, Usage("retryable"), CallEnd("running")))
    end = CallEnd("pending", error_code="budget")
    assert not stage.close(0, end)
    assert not stage.close(0, end, held=(grant.fence, "w2"))
    assert not stage.close(0, end, held=(grant.fence + 1, "w1"))
    assert stage.close(0, end, held=(grant.fence, "w1"))
    assert (stage.row(0).status, stage.row(0).worker_id) == ("pending", None)


def test_an_answer_from_the_cache_completes_without_an_attempt(stage: Stage):
    end = CallEnd("completed", result='{"n":1}', quality_score=0.9, cached=True)
    with stage.database.transaction() as connection:
        text = runs.CallText("the prompt", "f" * 64)
        assert batches.close(connection, [batches.Closing(stage.calls[0], end, text)]) == [True]
    call = stage.row(0)
    assert (call.status, call.cached, call.rendered_prompt, call.prompt_hash) == (
        "completed",
        True,
        "the prompt",
        "f" * 64,
    )
    assert stage.attempts(0) == []


def test_calls_that_come_back_into_a_cancelled_run_are_cancelled(stage: Stage):
    """Nobody would ever ask them, and a run that has ended has no open calls."""
    grants = {ordinal: stage.claimed(ordinal) for ordinal in (0, 1)}
    stage.settle(stage.settlement(1, grants[1], Usage("retryable"), CallEnd("running")))
    stage.register("w1")
    stage.move("cancelled", "running")
    with stage.database.transaction() as connection:
        assert runs.cancel_calls(connection, stage.run) == 2
    stage.settle(stage.settlement(0, grants[0], Usage("retryable"), CallEnd("pending", next_at_s=90)))
    assert stage.row(0).status == "cancelled"
    assert stage.row(0).completed_at is not None
    with stage.database.transaction() as connection:
        fleet.sign_off(connection, "w1")
    assert stage.row(1).status == "cancelled"
    assert {stage.row(ordinal).status for ordinal in range(4)} == {"cancelled"}


def test_cancelling_leaves_what_is_in_flight_and_other_runs_alone(stage: Stage):
    other = Stage.with_calls(stage.database, 1, name="run-2")
    grant = stage.claimed(0)
    with stage.database.transaction() as connection:
        assert runs.cancel_calls(connection, stage.run) == 3
        assert runs.cancel_calls(connection, stage.run) == 0
    assert stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=5), CallEnd("completed", result="1"))) == [
        True
    ]
    assert stage.row(0).status == "completed"
    assert other.row(0).status == "pending"


def test_a_run_moves_only_from_the_states_that_are_named(stage: Stage):
    assert not stage.move("paused", "pending")
    assert stage.move("paused", "pending", "running")
    with stage.database.transaction() as connection:
        row = runs.lock_run(connection, stage.run)
        assert (row.status, row.completed_at) == ("paused", None)
        assert runs.move_run(connection, stage.run, "cancelled", "user", sources=runs.OPEN_RUN)
        row = runs.lock_run(connection, stage.run)
    assert (row.status, row.reason) == ("cancelled", "user")
    assert 0 <= row.duration_seconds < 60
    assert row.completed_at is not None
    assert not stage.move("running", "paused")


def test_a_run_that_is_not_there_cannot_be_locked(stage: Stage):
    with stage.database.transaction() as connection, pytest.raises(LookupError):
        runs.lock_run(connection, 10**6)


def test_runs_that_must_stop_are_told_apart(stage: Stage):
    other = Stage.with_calls(stage.database, 1, name="run-2")
    other.move("paused", "running")
    with stage.database.snapshot() as connection:
        assert runs.runs_not_running(connection, [stage.run, other.run, 10**6]) == {other.run, 10**6}
        assert runs.runs_not_running(connection, []) == set()


def test_an_unfinished_run_is_found_by_what_it_asks(stage: Stage):
    with stage.database.snapshot() as connection:
        assert intake.unfinished(connection, "1" * 64) == "run-1"
        assert intake.unfinished(connection, "2" * 64) is None
    stage.move("cancelled", "running")
    with stage.database.snapshot() as connection:
        assert intake.unfinished(connection, "1" * 64) is None


def test_open_calls_come_in_the_order_of_their_items_with_their_waiting_times(stage: Stage):
    stage.complete(1)
    stage.close(2, CallEnd("pending", next_at_s=30))
    stage.claimed(3)
    with stage.database.snapshot() as connection:
        found = runs.open_calls(connection, stage.window)
    assert [(row.item_ordinal, row.status) for row in found] == [(0, "pending"), (2, "pending"), (3, "running")]
    assert found[0].waits_s is None
    assert 25 < found[1].waits_s <= 30


def test_items_stored_in_batches_continue_each_other(database: Database):
    stage = Stage.with_calls(database, 2)
    with database.transaction() as connection:
        intake.add_items(connection, stage.run, [(2, "item-2", "{}")])
        assert intake.add_windows(connection, stage.run, 0, [(2, 2), (3, 5)])[0] > stage.window
        intake.complete_input(connection, stage.run)
        row = runs.lock_run(connection, stage.run)
    assert (row.items_total, row.input_complete) == (3, True)
    assert row.producer_at is not None
