"""Windows open once, close with true counters, and wake when they are due or silent."""

from typing import Any

import pytest
from sqlalchemy import Row, func, select, update

from orchestrator.database import Database, intake, runs, windows
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from orchestrator.database.tables import prompt_executions, workflow_executions
from orchestrator.database.tables import windows as table
from tests.integration.database.stage import STEP, Stage, call_row


def window(stage: Stage) -> Row[Any]:
    with stage.database.snapshot() as connection:
        found = windows.find(connection, stage.window)
    assert found is not None
    return found


def due(stage: Stage, silent_s: float = 5.0) -> list[int]:
    with stage.database.snapshot() as connection:
        return [row.id for row in windows.due_or_silent(connection, silent_s)]


def age(stage: Stage, **columns: float) -> None:
    """Moves times of the window back by some seconds."""
    with stage.database.transaction() as connection:
        values = {name: table.c[name] - seconds for name, seconds in columns.items()}
        connection.execute(update(table).where(table.c.id == stage.window).values(**values))


def publish(stage: Stage) -> int:
    with stage.database.transaction() as connection:
        return windows.note_published(connection, stage.window)


def fail(stage: Stage, ordinal: int) -> None:
    stage.settle(stage.settlement(ordinal, stage.claimed(ordinal), Usage("fatal"), CallEnd("failed")))


def test_a_closed_window_counts_what_its_calls_came_to(stage: Stage):
    stage.complete(0)
    fail(stage, 1)
    stage.close(2, CallEnd("skipped"))
    stage.close(3, CallEnd("cancelled"))
    with stage.database.transaction() as connection:
        assert windows.close_done(connection, stage.window)
        assert not windows.close_done(connection, stage.window)
    row = window(stage)
    assert (row.status, row.completed, row.failed, row.skipped, row.cancelled) == ("closed", 1, 1, 1, 1)
    assert (row.items_failed, row.items_skipped) == (1, 1)


def test_items_are_counted_once_over_all_their_calls(database: Database):
    """Two steps, three items: one fails in both, one fails in one, one is skipped in one and answered in the other."""
    stage = Stage.with_calls(database, 3)
    with database.transaction() as connection:
        for ordinal in range(3):
            row = {**call_row(stage.run, ordinal, "second"), "status": "pending", "window_id": stage.window}
            connection.execute(prompt_executions.insert().values(**row))
        ends = {
            ("score", 0): "failed",
            ("second", 0): "failed",
            ("score", 1): "completed",
            ("second", 1): "failed",
            ("score", 2): "skipped",
            ("second", 2): "completed",
        }
        for (step, ordinal), status in ends.items():
            one = (prompt_executions.c.prompt_name == step) & (prompt_executions.c.item_ordinal == ordinal)
            connection.execute(update(prompt_executions).where(one).values(status=status))
        windows.close_done(connection, stage.window)
    row = window(stage)
    assert (row.completed, row.failed, row.skipped) == (2, 3, 1)
    assert (row.items_failed, row.items_skipped) == (2, 0)


def test_an_item_of_which_nothing_was_asked_is_skipped(database: Database):
    stage = Stage.with_calls(database, 2)
    for ordinal in range(2):
        stage.close(ordinal, CallEnd("skipped"))
    with database.transaction() as connection:
        windows.close_done(connection, stage.window)
    assert window(stage).items_skipped == 2


def test_calls_of_reduce_steps_are_no_items(database: Database):
    stage = Stage.with_calls(database, 1)
    with database.transaction() as connection:
        (added,) = intake.add_windows(connection, stage.run, 0, [(-1, -1)], "verdict")
        windows.open_pending(connection, added, [call_row(stage.run, -1, "verdict")])
        connection.execute(
            update(prompt_executions).where(prompt_executions.c.item_ordinal == -1).values(status="failed")
        )
        windows.close_done(connection, added)
        row = windows.find_reduce(connection, stage.run, 0, "verdict")
        assert windows.find_reduce(connection, stage.run, 1, "verdict") is None
    assert row is not None
    assert (row.failed, row.items_failed) == (1, 0)


def test_a_window_opens_once_with_its_calls(stage: Stage):
    with stage.database.transaction() as connection:
        windows.open_pending(connection, stage.window, [call_row(stage.run, 0)])
        found = connection.execute(select(func.count()).select_from(prompt_executions)).scalar_one()
    assert found == 4


def test_a_call_exists_once_per_item_and_repeat(stage: Stage):
    row = {**call_row(stage.run, 0), "status": "pending", "window_id": stage.window}
    with pytest.raises(Exception, match=r"(?i)unique"), stage.database.transaction() as connection:
        connection.execute(prompt_executions.insert().values(**row))


def test_pending_windows_of_items_are_opened_in_order(stage: Stage):
    with stage.database.transaction() as connection:
        added = intake.add_windows(connection, stage.run, 0, [(4, 5), (6, 7), (8, 9)])
        later = intake.add_windows(connection, stage.run, 1, [(0, 3)])
        assert windows.count_open(connection, stage.run) == 1
        assert [one.id for one in windows.next_pending(connection, stage.run, 0, 2)] == added[:2]
        assert windows.next_pending(connection, stage.run, 0, 0) == []
        assert windows.next_pending(connection, stage.run, 0, -3) == []
        assert [one.id for one in windows.next_pending(connection, stage.run, 1, 2)] == later
        assert windows.has_unclosed(connection, stage.run, 0)
        assert windows.has_unclosed(connection, stage.run, 1)
        assert not windows.has_unclosed(connection, stage.run, 2)


def test_open_calls_are_counted_by_window_and_step(stage: Stage):
    with stage.database.transaction() as connection:
        (other,) = intake.add_windows(connection, stage.run, 0, [(4, 13)])
        windows.open_pending(connection, other, [call_row(stage.run, ordinal, "later") for ordinal in range(4, 10)])
        found = dict(windows.open_calls_by_step(connection, stage.run, 0))
        assert found[10] == {"later": 6}
        assert set(found) == {10, 4}
        assert found[4].keys() == {STEP}
        assert windows.open_calls_by_step(connection, stage.run, 1) == []


def test_rounds_are_counted_and_a_round_ends_the_waiting(stage: Stage):
    with stage.database.transaction() as connection:
        windows.wake_in(connection, stage.window, 30)
    assert window(stage).wake_at is not None
    assert [publish(stage), publish(stage)] == [1, 2]
    assert window(stage).wake_at is None


def test_a_window_wakes_when_its_time_has_come(stage: Stage):
    publish(stage)
    with stage.database.transaction() as connection:
        windows.wake_in(connection, stage.window, 30)
    assert due(stage) == []
    age(stage, wake_at=31)
    assert due(stage) == [stage.window]


def test_a_window_that_waits_for_a_time_is_not_taken_for_silent(stage: Stage):
    publish(stage)
    with stage.database.transaction() as connection:
        windows.wake_in(connection, stage.window, 300)
    age(stage, published_at=100)
    assert due(stage) == []


def test_a_silent_window_wakes(stage: Stage):
    publish(stage)
    assert due(stage) == []
    age(stage, published_at=6)
    assert due(stage) == [stage.window]
    assert due(stage, silent_s=60) == []


def test_a_window_in_which_something_was_settled_is_not_silent(stage: Stage):
    publish(stage)
    age(stage, published_at=6)
    stage.complete(0)
    assert due(stage) == []
    age(stage, progress_at=6)
    assert due(stage) == [stage.window]


def test_a_window_with_a_held_call_is_not_silent(stage: Stage):
    publish(stage)
    stage.claimed(0)
    age(stage, published_at=600)
    assert due(stage) == []


@pytest.mark.parametrize("state", ["paused", "cancelled"])
def test_windows_of_a_run_that_does_not_run_stay_asleep(stage: Stage, state: runs.RunStatus):
    publish(stage)
    age(stage, published_at=600)
    with stage.database.snapshot() as connection:
        assert windows.open_of_running_runs(connection) == [stage.window]
    stage.move(state, "running")
    assert due(stage) == []
    with stage.database.snapshot() as connection:
        assert windows.open_of_running_runs(connection) == []


def test_a_closed_window_neither_wakes_nor_waits_and_may_be_taken_back(stage: Stage):
    with stage.database.transaction() as connection:
        windows.close_done(connection, stage.window)
        windows.wake_in(connection, stage.window, 5)
    assert due(stage) == []
    assert window(stage).wake_at is None
    with stage.database.transaction() as connection:
        windows.take_back(connection, stage.run, [stage.window], behind=0)
    assert window(stage).status == "pending"
    with stage.database.transaction() as connection:
        assert [one.id for one in windows.next_pending(connection, stage.run, 0, 2)] == [stage.window]
        windows.open_pending(connection, stage.window, [])
    assert window(stage).status == "open"


def test_open_windows_are_listed_for_one_run_or_all(stage: Stage):
    other = Stage.with_calls(stage.database, 1, name="run-2")
    with stage.database.snapshot() as connection:
        assert windows.open_of_running_runs(connection) == [stage.window, other.window]
        assert windows.open_of_running_runs(connection, other.run) == [other.window]


def test_a_window_goes_with_its_run(stage: Stage):
    stage.complete(0)
    with stage.database.transaction() as connection:
        connection.execute(workflow_executions.delete())
        assert windows.find(connection, stage.window) is None
        assert connection.execute(select(func.count()).select_from(prompt_executions)).scalar_one() == 0
