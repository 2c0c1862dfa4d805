"""Equal calls: while one is asked the others wait, and when it is answered they take its answer."""

from datetime import timedelta

from orchestrator.database import batches, cache, erasing
from orchestrator.database.batches import AnsweredMeanwhile, Claimed, InFlight
from orchestrator.database.cache import CacheEntry
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from tests.integration.database.stage import Stage

KEY = "k" * 64
KEPT = CacheEntry(KEY, "m" * 64, '{"answer": 1}', 60.0)


def test_of_equal_calls_in_one_batch_one_is_granted(stage: Stage):
    answers = stage.claim(*(stage.wish(n, key=KEY) for n in range(3)), stage.wish(3, key="o" * 64))
    assert [type(one) for one in answers] == [Claimed, InFlight, InFlight, Claimed]
    stage.check_books()


def test_equal_calls_of_another_worker_wait_until_the_answer_is_there(stage: Stage):
    grant = stage.claimed(0, key=KEY)
    assert stage.claim(stage.wish(1, key=KEY, worker="w2")) == [InFlight()]
    with stage.database.snapshot() as connection:
        assert batches.look(connection, KEY) == InFlight()
    done = stage.settlement(0, grant, Usage("ok", cost_nusd=40), CallEnd("completed", result="1"), keep=KEPT)
    assert stage.settle(done) == [True]
    assert stage.claim(stage.wish(1, key=KEY, worker="w2")) == [AnsweredMeanwhile(KEPT.result)]
    assert stage.row(1).attempts == 0
    stage.check_books()


def test_a_flight_ends_without_an_answer_when_its_call_fails_or_its_worker_dies(stage: Stage):
    grant = stage.claimed(0, key=KEY)
    assert stage.settle(stage.settlement(0, grant, Usage("fatal"), CallEnd("failed", error_code="x"))) == [True]
    stage.register("w2")
    stage.claimed(1, key=KEY, worker="w2")
    assert stage.claim(stage.wish(2, key=KEY)) == [InFlight()]
    stage.kill("w2")
    stage.free_dead()
    with stage.database.snapshot() as connection:
        assert batches.look(connection, KEY) is None
    stage.claimed(2, key=KEY)


def test_a_held_call_that_is_asked_again_does_not_wait_for_itself(stage: Stage):
    grant = stage.claimed(0, key=KEY)
    assert stage.settle(stage.settlement(0, grant, Usage("bad_output"), CallEnd("running", reask=True))) == [True]
    assert stage.claimed(0, key=KEY, held_fence=grant.fence).fence == grant.fence


def test_calls_without_a_key_never_wait(stage: Stage):
    assert [type(one) for one in stage.claim(*(stage.wish(n) for n in range(4)))] == [Claimed] * 4


def test_what_the_cache_saved_is_told_by_run(stage: Stage):
    stage.database.cache_result([KEPT])
    assert stage.close(0, CallEnd("completed", result="1", cached=True, saved_nusd=40))
    assert stage.close(1, CallEnd("completed", result="1", cached=True, saved_nusd=2))
    with stage.database.transaction() as connection:
        told = cache.stats(connection)
        assert (told["entries"], told["hits"], told["saved_nusd"]) == (1, 2, 42)
        assert [(one.run_id, one.hits, one.saved_nusd) for one in cache.savings(connection)] == [("run-1", 2, 42)]
        assert cache.purge(connection, older_than=timedelta(hours=1)) == 0
        assert cache.purge(connection, older_than=timedelta(0)) == 1


def test_erasing_a_run_keeps_what_was_counted(stage: Stage):
    grant = stage.claimed(0, key=KEY)
    usage = Usage("ok", input_tokens=9, cost_nusd=40, response="secret", error_message="secret")
    end = CallEnd("completed", result='{"why": "secret"}', error_message="secret")
    assert stage.settle(stage.settlement(0, grant, usage, end, keep=KEPT)) == [True]
    assert stage.move("completed", "running")
    with stage.database.transaction() as connection:
        assert [row.id for row in erasing.ended_before(connection, -5, erased=False)] == [stage.run]
        assert erasing.ended_before(connection, 3600, erased=False) == []
        assert erasing.erase_item(connection, stage.run, "item-0")
        assert not erasing.erase_item(connection, stage.run, "item-0")
        assert erasing.erase_run(connection, stage.run) == 4
        assert erasing.ended_before(connection, -5, erased=False) == []
        assert cache.find(connection, [KEY]) == {}
    erasing.scrub(stage.database.engine)
    row, attempt = stage.row(0), stage.attempts(0)[0]
    assert (row.result, row.cost_nusd, row.prompt_hash) == (erasing.MARK, 40, KEY)
    assert (attempt.response, attempt.error_message, attempt.input_tokens) == (None, None, 9)
    stage.check_books()
    with stage.database.transaction() as connection:
        erasing.delete_run(connection, stage.run)
        assert erasing.ended_before(connection, -5, erased=True) == []
