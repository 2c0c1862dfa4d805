"""Many wishes become one transaction; one that the database refuses does not take the others with it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError

from orchestrator.database import Database, batches
from orchestrator.database.batches import Claimed, NotMine
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from tests.integration.database.stage import Stage
from workers import writer
from workers.writer import BatchWriter

ANSWERED = CallEnd("completed", result="1")


def with_writer(database: Database, work: Callable[[BatchWriter], Awaitable[Any]]) -> Any:
    """Runs a coroutine with a writer of its own loop."""

    async def whole() -> Any:
        wishes = BatchWriter(database, asyncio.get_running_loop())
        try:
            return await work(wishes)
        finally:
            await asyncio.to_thread(wishes.stop)

    return asyncio.run(whole())


@contextmanager
def counted_commits(database: Database):
    commits: list[int] = []

    def count(_: Any) -> None:
        commits.append(1)

    event.listen(database.engine, "commit", count)
    yield commits
    event.remove(database.engine, "commit", count)


def test_wishes_of_many_calls_share_a_transaction_and_get_their_own_answers(database: Database):
    stage = Stage.with_calls(database, 60)

    async def ask(wishes: BatchWriter) -> list[Any]:
        return await asyncio.gather(
            *(wishes.claim(stage.wish(ordinal)) for ordinal in range(60)), wishes.claim(stage.wish(0, worker="w2"))
        )

    with counted_commits(database) as commits:
        answers = with_writer(database, ask)
    assert answers == [Claimed(1, 1)] * 60 + [NotMine()]
    assert len(commits) < 20
    stage.check_books()


def test_a_settlement_frees_money_for_a_claim_of_the_same_batch(stage: Stage):
    stage.set_limit(100)
    grant = stage.claimed(0, worst=100)

    async def ask(wishes: BatchWriter) -> list[Any]:
        done = stage.settlement(0, grant, Usage("ok", cost_nusd=10), ANSWERED)
        closing = batches.Closing(stage.calls[2], CallEnd("skipped"))
        return await asyncio.gather(wishes.claim(stage.wish(1, worst=90)), wishes.settle(done), wishes.close(closing))

    assert with_writer(stage.database, ask) == [Claimed(1, 1), True, True]
    assert [stage.row(n).status for n in range(3)] == ["completed", "running", "skipped"]


def test_one_wish_that_is_refused_does_not_harm_the_others(stage: Stage):
    """Its column cannot hold the value: the same error every time, so waiting would not help anybody."""
    grants = [stage.claimed(0), stage.claimed(1)]

    async def ask(wishes: BatchWriter) -> list[Any]:
        bad = stage.settlement(0, grants[0], Usage("ok", cost_nusd=2**70), ANSWERED)
        good = stage.settlement(1, grants[1], Usage("ok", cost_nusd=7), ANSWERED)
        return await asyncio.gather(wishes.settle(bad), wishes.settle(good), return_exceptions=True)

    refused, settled = with_writer(stage.database, ask)
    assert isinstance(refused, DBAPIError | OverflowError)
    assert settled is True
    assert [stage.row(n).status for n in (0, 1)] == ["running", "completed"]
    stage.check_books()


def test_an_error_that_nobody_foresaw_is_told_and_the_writer_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    whole = batches.claim
    monkeypatch.setattr(batches, "claim", lambda *_: {}["no such budget"])

    async def ask(wishes: BatchWriter) -> list[Any]:
        (refused,) = await asyncio.gather(wishes.claim(stage.wish(0)), return_exceptions=True)
        monkeypatch.setattr(batches, "claim", whole)
        return [refused, await asyncio.wait_for(wishes.claim(stage.wish(0)), 10)]

    refused, answer = with_writer(stage.database, ask)
    assert isinstance(refused, KeyError)
    assert answer == Claimed(1, 1)


def test_a_batch_is_repeated_until_the_database_is_back(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "REPEAT_FIRST_S", 0.001)
    away = iter((True, True, True))
    whole = batches.claim

    def claim(*arguments: Any) -> Any:
        answers = whole(*arguments)
        if next(away, False):
            raise OperationalError("COMMIT", None, ConnectionError("the database went away"))
        return answers

    monkeypatch.setattr(batches, "claim", claim)
    answer = with_writer(stage.database, lambda wishes: wishes.claim(stage.wish(0)))
    assert answer == Claimed(1, 1)
    assert len(stage.attempts(0)) == 1
    stage.check_books()


def test_a_commit_of_unknown_outcome_is_repeated_without_harm(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """The commit succeeded and the connection broke before we heard of it."""
    monkeypatch.setattr(writer, "REPEAT_FIRST_S", 0.001)
    lost = iter((True,))
    whole = stage.database.transaction

    @contextmanager
    def transaction():
        with whole() as connection:
            yield connection
        if next(lost, False):
            raise OperationalError("COMMIT", None, ConnectionError("connection reset"))

    monkeypatch.setattr(stage.database, "transaction", transaction)
    assert with_writer(stage.database, lambda wishes: wishes.claim(stage.wish(0))) == Claimed(1, 1)
    lost = iter((True,))
    done = stage.settlement(0, Claimed(1, 1), Usage("ok", cost_nusd=7), ANSWERED)
    assert with_writer(stage.database, lambda wishes: wishes.settle(done)) is True
    assert stage.money().spent_nusd == 7
    stage.check_books()


def test_stopping_writes_what_is_waiting(stage: Stage):
    async def ask() -> Any:
        wishes = BatchWriter(stage.database, asyncio.get_running_loop())
        answers = [asyncio.ensure_future(wishes.claim(stage.wish(ordinal))) for ordinal in range(4)]
        await asyncio.sleep(0)
        await asyncio.to_thread(wishes.stop)
        return await asyncio.gather(*answers)

    assert asyncio.run(ask()) == [Claimed(1, 1)] * 4
    assert not [thread for thread in threading.enumerate() if thread.name == "batch-writer"]


def test_a_caller_that_left_does_not_disturb_the_others(stage: Stage):
    async def ask(wishes: BatchWriter) -> Any:
        gone = asyncio.ensure_future(wishes.claim(stage.wish(0)))
        await asyncio.sleep(0)
        gone.cancel()
        return await wishes.claim(stage.wish(1))

    assert with_writer(stage.database, ask) == Claimed(1, 1)
    assert stage.row(0).status == "running"
