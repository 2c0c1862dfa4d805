"""What an attempt turned out to be: booked once, to the right call, whoever tells and however often."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.database import Database, batches, cache, costs, windows
from orchestrator.database.batches import Claimed
from orchestrator.database.cache import CacheEntry
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd, CallText
from orchestrator.database.tables import llm_usage
from tests.integration.database.stage import Stage

ANSWERED = CallEnd("completed", result='{"score":4}', quality_score=0.9)


def test_an_answer_ends_its_call_and_frees_what_was_reserved(stage: Stage):
    grant = stage.claimed(0, worst=100)
    usage = Usage(
        "ok",
        input_tokens=10,
        output_tokens=5,
        cached_tokens=2,
        cost_nusd=40,
        latency_ms=7,
        http_status=200,
        request_id="r-1",
        model_answered="sim-1b",
    )
    text_asked = CallText("the prompt", "a" * 64)
    assert stage.settle(stage.settlement(0, grant, usage, ANSWERED, text=text_asked)) == [True]
    call = stage.row(0)
    assert (call.status, call.result, call.quality_score, call.worker_id) == ("completed", '{"score":4}', 0.9, None)
    assert (call.rendered_prompt, call.prompt_hash) == ("the prompt", "a" * 64)
    assert (call.input_tokens, call.output_tokens, call.cost_nusd, call.cost_usd) == (10, 5, 40, 4e-8)
    assert call.execution_time_ms >= 0
    (attempt,) = stage.attempts(0)
    assert (attempt.status, attempt.cost_nusd, attempt.cached_tokens, attempt.latency_ms) == ("ok", 40, 2, 7)
    assert (attempt.request_id, attempt.model_answered, attempt.http_status) == ("r-1", "sim-1b", 200)
    assert attempt.settled_at is not None
    money = stage.money()
    assert (money.spent_nusd, money.reserved_nusd, money.excess_nusd) == (40, 0, 0)
    stage.check_books()


def test_a_failure_keeps_its_reason_and_its_cost(stage: Stage):
    grant = stage.claimed(0)
    usage = Usage("fatal", cost_nusd=3, http_status=400, error_code="rejected", error_message="bad request")
    stage.settle(stage.settlement(0, grant, usage, CallEnd("failed", error_code="rejected", error_message="bad")))
    call, (attempt,) = stage.row(0), stage.attempts(0)
    assert (call.status, call.error_code, call.error_message, call.result) == ("failed", "rejected", "bad", None)
    assert (attempt.error_code, attempt.error_message, attempt.http_status) == ("rejected", "bad request", 400)
    stage.check_books()


def test_a_call_that_is_put_back_waits_and_gives_its_reservation_back(stage: Stage):
    grant = stage.claimed(0)
    stage.settle(stage.settlement(0, grant, Usage("retryable"), CallEnd("pending", next_at_s=45)))
    call = stage.row(0)
    assert (call.status, call.worker_id, call.completed_at) == ("pending", None, None)
    assert call.next_at is not None
    assert stage.money().reserved_nusd == 0


def test_a_bad_answer_keeps_the_call_held_and_counts_the_question(stage: Stage):
    grant = stage.claimed(0)
    usage = Usage("bad_output", input_tokens=10, output_tokens=5, cost_nusd=40, response="no JSON")
    stage.settle(stage.settlement(0, grant, usage, CallEnd("running", reask=True)))
    call = stage.row(0)
    assert (call.status, call.worker_id, call.reasks, call.cost_nusd) == ("running", "w1", 1, 40)
    assert stage.attempts(0)[0].response == "no JSON"
    second = stage.claimed(0, held_fence=grant.fence)
    stage.settle(stage.settlement(0, second, Usage("ok", input_tokens=20, output_tokens=5, cost_nusd=50), ANSWERED))
    call = stage.row(0)
    assert (call.status, call.input_tokens, call.output_tokens, call.cost_nusd) == ("completed", 30, 10, 90)
    stage.check_books()


def test_a_settlement_notes_progress_of_its_window(stage: Stage):
    with stage.database.snapshot() as connection:
        query = text("SELECT progress_at FROM windows")
        assert connection.execute(query).scalar_one() is None
    stage.complete(0)
    with stage.database.snapshot() as connection:
        assert connection.execute(query).scalar_one() is not None


def lose(stage: Stage, ordinal: int, worst: int = 100) -> Claimed:
    """A worker claims a call, is taken for dead, and the call goes back."""
    stage.register("w1")
    grant = stage.claimed(ordinal, worst)
    stage.kill("w1")
    assert stage.free_dead().calls == 1
    return grant


def test_a_zombie_pays_but_does_not_answer(stage: Stage):
    grant = lose(stage, 0)
    late = stage.settlement(0, grant, Usage("ok", input_tokens=9, cost_nusd=30, response="late"), ANSWERED)
    assert stage.settle(late) == [False]
    call, (attempt,) = stage.row(0), stage.attempts(0)
    assert (call.status, call.result, call.cost_nusd, call.input_tokens) == ("pending", None, 30, 9)
    assert (attempt.status, attempt.cost_nusd, attempt.response) == ("stale", 30, "late")
    stage.check_books()


def test_a_zombie_does_not_touch_its_successors_answer(stage: Stage):
    grant = lose(stage, 0)
    successor = stage.claimed(0, worker="w2")
    assert successor.fence == grant.fence + 1
    late = stage.settlement(0, grant, Usage("ok", cost_nusd=30), CallEnd("completed", result='"zombie"'))
    assert stage.settle(late) == [False]
    assert (stage.row(0).status, stage.row(0).worker_id) == ("running", "w2")
    assert stage.settle(stage.settlement(0, successor, Usage("ok", cost_nusd=50), ANSWERED, "w2")) == [True]
    assert stage.settle(late) == [False]
    assert stage.row(0).result == '{"score":4}'
    assert [(one.status, one.cost_nusd) for one in stage.attempts(0)] == [("stale", 30), ("ok", 50)]
    assert stage.money().spent_nusd == 80
    stage.check_books()


def test_a_zombie_that_also_does_not_know_changes_nothing(stage: Stage):
    grant = lose(stage, 0)
    before = stage.attempts(0)
    unknown = Usage("unknown", cost_nusd=100, estimated=True, error_code="timed_out")
    assert stage.settle(stage.settlement(0, grant, unknown, CallEnd("running"))) == [False]
    assert stage.attempts(0) == before
    assert stage.row(0).status == "pending"
    stage.check_books()


def test_an_unknown_outcome_is_booked_at_its_worst(stage: Stage):
    grant = stage.claimed(0, worst=77)
    usage = Usage("unknown", cost_nusd=77, estimated=True, error_code="timed_out")
    assert stage.settle(stage.settlement(0, grant, usage, CallEnd("running"))) == [True]
    assert stage.row(0).status == "running"
    assert (stage.money().spent_nusd, stage.money().reserved_nusd) == (77, 0)
    with stage.database.snapshot() as connection:
        assert costs.totals(connection, stage.run)["unconfirmed_nusd"] == 77
    stage.check_books()


def test_sums_of_a_closed_window_follow_what_is_settled_late(stage: Stage):
    grant = lose(stage, 0)
    for ordinal in range(len(stage.calls)):
        stage.complete(ordinal, cost=40)
    with stage.database.transaction() as connection:
        assert windows.close_done(connection, stage.window)
    with stage.database.snapshot() as connection:
        row = windows.find(connection, stage.window)
        assert row is not None
        assert row.attempts is not None
        assert windows.attempt_sums(connection, stage.run)["unknown"].attempts == 1
    assert stage.settle(stage.settlement(0, grant, Usage("ok", 5, 5, cost_nusd=33), CallEnd("completed"))) == [False]
    with stage.database.snapshot() as connection:
        sums = windows.attempt_sums(connection, stage.run)
    assert "unknown" not in sums
    assert (sums["stale"].attempts, sums["stale"].input_tokens, sums["stale"].cost_nusd) == (1, 5, 33)
    stage.check_books()


@pytest.mark.parametrize(
    ("usage", "end"),
    [
        (Usage("ok", cost_nusd=40), ANSWERED),
        (Usage("retryable", error_code="unavailable"), CallEnd("running")),
        (Usage("retryable"), CallEnd("pending", next_at_s=1)),
        (Usage("unknown", cost_nusd=100, error_code="timed_out"), CallEnd("running")),
        (Usage("bad_output", cost_nusd=9), CallEnd("running", reask=True)),
        (Usage("stale", error_code="never_sent"), CallEnd("pending")),
        (Usage("fatal", cost_nusd=1), CallEnd("failed")),
    ],
    ids=lambda value: f"{value.status}",
)
def test_the_same_settlement_again_gets_the_same_answer_and_books_nothing(stage: Stage, usage: Usage, end: CallEnd):
    one = stage.settlement(0, stage.claimed(0), usage, end)
    assert stage.settle(one) == [True]
    call, attempts, money = stage.row(0), stage.attempts(0), stage.money()
    assert stage.settle(one) == [True]
    assert (stage.row(0), stage.attempts(0), stage.money()) == (call, attempts, money)
    stage.check_books()


def test_a_repetition_after_the_call_went_on_changes_nothing(stage: Stage):
    """The writer that repeats may be slower than the worker that claims the call next."""
    one = stage.settlement(0, stage.claimed(0), Usage("retryable"), CallEnd("pending"))
    stage.settle(one)
    stage.claimed(0, worker="w2")
    assert stage.settle(one) == [True]
    assert (stage.row(0).status, stage.row(0).worker_id) == ("running", "w2")
    stage.check_books()


def test_a_late_settlement_again_is_late_again(stage: Stage):
    late = stage.settlement(0, lose(stage, 0), Usage("ok", cost_nusd=30), ANSWERED)
    assert [stage.settle(late), stage.settle(late)] == [[False], [False]]
    assert stage.money().spent_nusd == 30
    stage.check_books()


def test_a_batch_answers_in_order_and_mixes_outcomes(stage: Stage):
    lost = lose(stage, 2)
    grants = [stage.claimed(0), stage.claimed(1)]
    answers = stage.settle(
        stage.settlement(1, grants[1], Usage("ok", cost_nusd=1), ANSWERED),
        stage.settlement(2, lost, Usage("ok", cost_nusd=2), ANSWERED),
        stage.settlement(3, Claimed(1, 1), Usage("ok", cost_nusd=4), ANSWERED),
        stage.settlement(0, grants[0], Usage("fatal", cost_nusd=8), CallEnd("failed")),
    )
    assert answers == [True, False, False, True]
    assert [stage.row(n).status for n in range(4)] == ["failed", "completed", "pending", "pending"]
    assert stage.money().spent_nusd == 11
    stage.check_books()


def test_what_two_say_of_one_attempt_in_one_batch_is_booked_once(stage: Stage):
    """The one is the worker that was taken for dead, the other has asked the provider what became of the attempt."""
    grant = lose(stage, 0)
    late = stage.settlement(0, grant, Usage("ok", cost_nusd=33), ANSWERED)
    told = stage.settlement(0, replace(grant, fence=-1), Usage("ok", cost_nusd=33), CallEnd("running"), worker="")
    assert stage.settle(late, told) == [False, False]
    assert stage.row(0).cost_nusd == 33
    assert stage.money().spent_nusd == 33
    stage.check_books()


def test_one_settlement_twice_in_one_batch_is_booked_once(stage: Stage):
    one = stage.settlement(0, stage.claimed(0), Usage("ok", cost_nusd=33), ANSWERED)
    assert stage.settle(one, one) == [True, True]
    assert stage.money().spent_nusd == 33
    stage.check_books()


def test_a_call_is_closed_once_however_often_a_batch_says_so(stage: Stage):
    one = batches.Closing(stage.calls[0], CallEnd("skipped", error_code="condition"))
    other = batches.Closing(stage.calls[0], CallEnd("failed", error_code="prompt"))
    with stage.database.transaction() as connection:
        assert batches.close(connection, [one, other, one]) == [True, False, False]
    assert (stage.row(0).status, stage.row(0).error_code) == ("skipped", "condition")


def test_two_attempts_of_one_call_settle_in_one_batch(stage: Stage):
    lost = lose(stage, 0)
    mine = stage.claimed(0, worker="w2")
    answers = stage.settle(
        stage.settlement(0, lost, Usage("ok", cost_nusd=5), ANSWERED),
        stage.settlement(0, mine, Usage("ok", cost_nusd=7), ANSWERED, "w2"),
    )
    assert answers == [False, True]
    assert stage.row(0).cost_nusd == 12
    stage.check_books()


def test_the_answer_of_the_holder_is_cached_and_that_of_a_zombie_is_not(stage: Stage):
    zombie = lose(stage, 1)
    grant = stage.claimed(0)
    keep = [CacheEntry(key * 64, "p" * 64, "{}", 60.0) for key in "ab"]
    stage.settle(
        stage.settlement(0, grant, Usage("ok"), ANSWERED, keep=keep[0]),
        stage.settlement(1, zombie, Usage("ok"), ANSWERED, keep=keep[1]),
    )
    with stage.database.snapshot() as connection:
        assert set(cache.find(connection, ["a" * 64, "b" * 64])) == {"a" * 64}


def test_what_a_provider_bills_beyond_the_worst_price_is_kept_apart(stage: Stage):
    stage.set_limit(150)
    grant = stage.claimed(0, worst=100)
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=130), ANSWERED))
    money = stage.money()
    assert (money.spent_nusd, money.excess_nusd, money.reserved_nusd) == (100, 30, 0)
    assert money.free_nusd() == 20
    stage.check_books()


@pytest.mark.parametrize("evil", ["nul \x00 nul", "half \ud800 pair", "x" * 100_000, "emoji 👩‍💻 \u202e"])
def test_whatever_a_provider_says_can_be_stored(stage: Stage, evil: str):
    grant = stage.claimed(0)
    usage = Usage("fatal", error_message=evil, request_id=evil, model_answered=evil, response=evil, error_code="x")
    end = CallEnd("failed", error_code="x", error_message=evil)
    assert stage.settle(stage.settlement(0, grant, usage, end, text=CallText(evil, "a" * 64))) == [True]
    (attempt,) = stage.attempts(0)
    kept = evil.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert (attempt.error_message, attempt.response, attempt.request_id) == (kept, kept, kept[:200])
    assert stage.row(0).rendered_prompt == kept


def test_token_counts_beyond_belief_do_not_break_a_batch(stage: Stage):
    usage = Usage("ok", input_tokens=10**12, output_tokens=10**12, cached_tokens=10**12, cost_nusd=10**15)
    grants = [stage.claimed(0, worst=10**15), stage.claimed(1)]
    answers = stage.settle(
        stage.settlement(0, grants[0], usage, ANSWERED), stage.settlement(1, grants[1], Usage("ok"), ANSWERED)
    )
    assert answers == [True, True]
    assert stage.money().spent_nusd == 10**15
    stage.check_books()


def test_totals_are_the_sums_of_the_rows(stage: Stage):
    other = Stage.with_calls(stage.database, 1, name="run-2")
    other.complete(0, cost=1000)
    for ordinal, cost in enumerate((3, 5, 7)):
        grant = stage.claimed(ordinal)
        usage = Usage("ok", input_tokens=cost * 10, output_tokens=cost, cached_tokens=1, cost_nusd=cost)
        stage.settle(stage.settlement(ordinal, grant, usage, ANSWERED))
    stage.settle(stage.settlement(3, stage.claimed(3), Usage("unknown", cost_nusd=100), CallEnd("failed")))
    assert stage.database.track_llm_usage(stage.run) == {
        "cost_nusd": 115,
        "unconfirmed_nusd": 100,
        "input": 150,
        "output": 15,
        "cached": 3,
    }
    assert other.database.track_llm_usage(other.run)["cost_nusd"] == 1000


def test_a_run_without_attempts_has_used_nothing(database: Database):
    stage = Stage.with_calls(database, 1)
    assert set(database.track_llm_usage(stage.run).values()) == {0}


def test_an_attempt_cannot_be_written_twice(stage: Stage):
    """The unique key behind the promise: one row per sending."""
    stage.claimed(0)
    (row,) = stage.attempts(0)
    values: dict[str, Any] = {key: value for key, value in row._mapping.items() if key != "id"}
    with pytest.raises(Exception, match=r"(?i)unique"), stage.database.transaction() as connection:
        connection.execute(llm_usage.insert().values(**values))
    assert len(stage.attempts(0)) == 1


def test_nothing_is_written_when_one_of_a_batch_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    grants = [stage.claimed(0), stage.claimed(1)]
    monkeypatch.setattr(cache, "store", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.settle(*(stage.settlement(n, grants[n], Usage("ok", cost_nusd=1), ANSWERED) for n in (0, 1)))
    assert [stage.row(n).status for n in (0, 1)] == ["running", "running"]
    assert stage.money().reserved_nusd == 200
