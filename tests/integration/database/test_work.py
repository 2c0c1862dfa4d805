"""What a shard reads before it asks, and the answers that are kept for equal calls."""

from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from sqlalchemy import select, update

from orchestrator.database import Database, cache, intake, windows, work
from orchestrator.database.cache import CacheEntry
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from orchestrator.database.tables import prompt_executions, result_cache
from tests.integration.database.stage import PROVIDER, STEP, Stage, call_row


@pytest.fixture
def wide(database: Database) -> Stage:
    """Three items; the step `vote` asks each of them twice, `score` once."""
    stage = Stage.with_calls(database, 3)
    with database.transaction() as connection:
        for ordinal, repeat in product(range(3), range(2)):
            row = {**call_row(stage.run, ordinal, "vote", repeat), "status": "pending", "window_id": stage.window}
            connection.execute(prompt_executions.insert().values(**row))
    return stage


def finish(stage: Stage, step: str, ordinal: int, repeat: int, status: str, result: str | None = None) -> None:
    columns = prompt_executions.c
    one = (columns.prompt_name == step) & (columns.item_ordinal == ordinal) & (columns.repeat == repeat)
    with stage.database.transaction() as connection:
        connection.execute(update(prompt_executions).where(one).values(status=status, result=result))


def test_a_shard_finds_its_claimable_calls_in_order(wide: Stage):
    wide.claimed(0)
    with wide.database.snapshot() as connection:
        scores = work.pending_calls(connection, wide.window, STEP, PROVIDER, 0, 2)
        votes = work.pending_calls(connection, wide.window, "vote", PROVIDER, 1, 2)
        assert work.pending_calls(connection, wide.window, STEP, "other", 0, 2) == []
        assert work.pending_calls(connection, wide.window + 1, STEP, PROVIDER, 0, 2) == []
    assert [call.ordinal for call in scores] == [1, 2]
    assert [(call.ordinal, call.repeat) for call in votes] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert scores[0].id == wide.calls[1]
    assert (scores[0].attempts, scores[0].reasks, scores[0].route_index, scores[0].window_id) == (0, 0, 0, wide.window)


def test_calls_that_must_wait_are_left_out(wide: Stage):
    wide.close(0, CallEnd("pending", next_at_s=60))
    wide.close(1, CallEnd("pending", next_at_s=-1, route=(1, "second", "m2")))
    with wide.database.snapshot() as connection:
        assert [call.ordinal for call in work.pending_calls(connection, wide.window, STEP, PROVIDER, 0, 2)] == [2]
        (moved,) = work.pending_calls(connection, wide.window, STEP, "second", 0, 2)
    assert (moved.ordinal, moved.route_index) == (1, 1)


def test_a_call_remembers_why_it_came_back(wide: Stage):
    grant = wide.claimed(0)
    end = CallEnd("pending", error_code="unavailable", error_message="overloaded")
    wide.settle(wide.settlement(0, grant, Usage("retryable"), end))
    with wide.database.snapshot() as connection:
        call = work.pending_calls(connection, wide.window, STEP, PROVIDER, 0, 0)[0]
    assert (call.error_message, call.attempts, call.route_attempts) == ("overloaded", 1, 1)


def test_items_come_by_ordinal(wide: Stage):
    with wide.database.snapshot() as connection:
        assert work.load_items(connection, wide.run, 1, 5) == {
            1: work.Item("item-1", {"n": 1}),
            2: work.Item("item-2", {"n": 2}),
        }


def test_answers_come_by_item_and_step_in_the_order_of_repeats(wide: Stage):
    finish(wide, "vote", 0, 1, "completed", '"second"')
    finish(wide, "vote", 0, 0, "completed", '"first"')
    finish(wide, "vote", 1, 0, "failed")
    finish(wide, STEP, 1, 0, "skipped")
    with wide.database.snapshot() as connection:
        found = work.load_answers(connection, wide.run, ("vote", STEP), 0, 1)
        assert work.load_answers(connection, wide.run, (), 0, 1) == {}
    assert found[0]["vote"] == work.StepAnswers(0, ("first", "second"), ("completed", "completed"))
    assert found[0][STEP] == work.StepAnswers(1, (), ())
    assert found[1]["vote"] == work.StepAnswers(1, (), ("failed",))
    assert found[1][STEP] == work.StepAnswers(0, (), ("skipped",))
    assert set(found) == {0, 1}


def test_completed_answers_stream_in_the_order_of_items(wide: Stage):
    for ordinal, repeat, value in ((2, 1, 21), (2, 0, 20), (0, 0, 0)):
        finish(wide, "vote", ordinal, repeat, "completed", str(value))
    with wide.database.snapshot() as connection:
        assert list(work.completed_answers(connection, wide.run, "vote")) == [
            (0, "item-0", [0]),
            (2, "item-2", [20, 21]),
        ]
        assert list(work.completed_answers(connection, wide.run, STEP)) == []


def test_rankings_are_read_by_item_and_from_the_top(wide: Stage):
    with wide.database.transaction() as connection:
        work.save_ranking(connection, wide.run, "order", [(2, 1, 9.5), (0, 2, 4.0), (1, 2, 4.0)])
        assert work.best(connection, wide.run, "order", 2) == [(2, 1, 9.5), (0, 2, 4.0)]
        assert work.count_ranked(connection, wide.run, "order") == 3
        assert work.load_verdicts(connection, wide.run, ("order",), 0, 1) == {
            0: {"order": {"rank": 2, "score": 4.0}},
            1: {"order": {"rank": 2, "score": 4.0}},
        }
        assert work.load_verdicts(connection, wide.run, (), 0, 1) == {}


def test_a_reduce_step_knows_the_whole(wide: Stage):
    finish(wide, STEP, 0, 0, "failed")
    for repeat in (0, 1):
        finish(wide, "vote", 1, repeat, "skipped")
    finish(wide, STEP, 1, 0, "skipped")
    with wide.database.transaction() as connection:
        windows.close_done(connection, wide.window)
        work.save_ranking(connection, wide.run, "order", [(2, 1, 1.0)])
        totals = work.reduce_totals(connection, wide.run, 0, "order")
        assert totals == {"items": 3, "completed": 1, "failed": 1, "skipped": 1, "ranked": 1}
        assert work.reduce_totals(connection, wide.run, 0, None)["ranked"] == 0


def test_a_run_that_is_not_there_is_told(database: Database):
    with database.snapshot() as connection, pytest.raises(LookupError):
        work.run_row(connection, 1)


def test_items_have_keys_of_their_own(wide: Stage):
    with pytest.raises(Exception, match=r"(?i)unique"), wide.database.transaction() as connection:
        intake.add_items(connection, wide.run, [(3, "item-0", "{}")])


def entry(key: str, result: str, ttl_s: float = 60.0) -> CacheEntry:
    return CacheEntry(key * 64, "p" * 64, result, ttl_s)


def find(database: Database, keys: str) -> dict[str, str]:
    with database.snapshot() as connection:
        return {key[0]: result for key, result in cache.find(connection, [key * 64 for key in keys]).items()}


def test_kept_answers_are_found_until_they_expire(database: Database):
    database.cache_result([entry("a", "1"), entry("b", "2", ttl_s=-1)])
    assert find(database, "abc") == {"a": "1"}
    assert find(database, "") == {}


def test_a_newer_answer_replaces_an_older_one_and_its_expiry(database: Database):
    database.cache_result([entry("a", "old", ttl_s=-1)])
    database.cache_result([entry("a", "first of batch"), entry("a", "new")])
    assert find(database, "a") == {"a": "new"}
    with database.snapshot() as connection:
        row = connection.execute(select(result_cache)).one()
    expires = row.expires_at if row.expires_at.tzinfo else row.expires_at.replace(tzinfo=UTC)
    assert timedelta(seconds=30) < expires - datetime.now(UTC) <= timedelta(seconds=60)


def test_the_cache_is_cleaned_of_what_expired_or_of_everything(database: Database):
    database.cache_result([])
    database.cache_result([entry("a", "1"), entry("b", "22", ttl_s=-1), entry("c", "333", ttl_s=-1)])
    with database.transaction() as connection:
        assert cache.stats(connection) == {"entries": 3, "expired": 2, "bytes": 6, "hits": 0, "saved_nusd": 0}
        assert cache.purge(connection) == 2
        assert cache.stats(connection) == {"entries": 1, "expired": 0, "bytes": 1, "hits": 0, "saved_nusd": 0}
        assert cache.purge(connection, everything=True) == 1
        assert cache.stats(connection)["entries"] == 0


def test_only_an_answer_tells_that_a_run_was_ever_answered(wide: Stage):
    def has_answers() -> bool:
        with wide.database.snapshot() as connection:
            return work.has_answers(connection, wide.run)

    grant = wide.claimed(0)
    wide.settle(wide.settlement(0, grant, Usage("retryable", error_code="unavailable"), CallEnd("pending")))
    wide.claimed(1)
    assert not has_answers()
    wide.complete(2)
    assert has_answers()
    other = Stage.with_calls(wide.database, 1, name="run-2")
    with wide.database.snapshot() as connection:
        assert not work.has_answers(connection, other.run)
