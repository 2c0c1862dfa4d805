"""What the reconciler makes of windows in which nothing moves: lost messages, long queues, and real stalls."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import update
from structlog.testing import capture_logs

from orchestrator.database import fleet, reports
from orchestrator.database.tables import windows, workflow_executions
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.settings import WorkerSettings
from tests.integration.database.stage import PROVIDER, Stage
from workers import reconciler
from workers.reconciler import SILENT_S, Reconciler

QUEUE = f"llm.{PROVIDER}"
STALL_S = 30.0


class Orchestrator:
    """Notes which windows were published."""

    def __init__(self) -> None:
        self.published: list[int] = []

    def close_window(self, window: int, *, due: bool) -> None:
        assert due
        self.published.append(window)

    def coordinate_steps(self, run: int) -> None:
        raise OSError(28, "No space left on device")


class Looked:
    """A reconciler that has been there for long, and what it did."""

    def __init__(self, stage: Stage) -> None:
        worker = WorkerSettings.model_validate({"stall_seconds": STALL_S})
        settings = SimpleNamespace(worker=worker, queue_prefix="", providers=(PROVIDER,))
        self.orchestrator = Orchestrator()
        self._reconciler = Reconciler(
            stage.database,
            cast("WorkflowOrchestrator", self.orchestrator),
            cast("Any", None),
            "w1",
            cast("Any", settings),
        )
        self._reconciler._began_at -= 10 * STALL_S  # pyright: ignore[reportPrivateUsage]

    def events(self, **queued: int) -> list[str]:
        """Looks once while so many messages wait; returns what was logged."""
        with capture_logs() as logs:
            self._reconciler._repair(set(), {"control": 0, QUEUE: queued.get("messages", 0)}, False)  # pyright: ignore[reportPrivateUsage]
        return [entry["event"] for entry in logs]


@pytest.fixture
def looked(stage: Stage) -> Looked:
    """The window was published, and nothing has moved for as long as the tests say."""
    with stage.database.transaction() as connection:
        connection.execute(update(windows).values(status="open"))
        connection.execute(update(workflow_executions).values(status="running", input_complete=True))
        fleet.register(connection, "w1", f"control,{QUEUE}", "1", 60.0)
    return Looked(stage)


def _be_silent(stage: Stage, seconds: float) -> None:
    with stage.database.transaction() as connection:
        at = reconciler.windows.NOW - seconds
        connection.execute(update(windows).values(published_at=at, progress_at=at))


def test_messages_that_are_nowhere_are_published_again(stage: Stage, looked: Looked) -> None:
    _be_silent(stage, SILENT_S + 1)
    assert looked.events() == ["window.silent"]
    assert looked.orchestrator.published == [stage.window]


def test_messages_that_wait_are_left_alone(stage: Stage, looked: Looked) -> None:
    _be_silent(stage, STALL_S - 5)
    assert looked.events(messages=3) == []
    assert looked.orchestrator.published == []


def test_nothing_that_moves_while_messages_wait_is_a_stall(stage: Stage, looked: Looked) -> None:
    _be_silent(stage, STALL_S + 1)
    assert looked.events(messages=3) == ["work.stalled"]
    assert looked.orchestrator.published == [stage.window]


def test_a_long_queue_is_no_stall_while_others_move(stage: Stage, looked: Looked) -> None:
    other = Stage.with_calls(stage.database, 1, name="other")
    _be_silent(stage, STALL_S + 1)
    with stage.database.transaction() as connection:
        connection.execute(
            update(windows)
            .where(windows.c.id == other.window)
            .values(status="open", progress_at=reconciler.windows.NOW)
        )
        connection.execute(update(workflow_executions).values(status="running", input_complete=True))
    assert looked.events(messages=3) == []


def test_a_queue_on_which_nobody_listens_is_told_once_and_not_filled_up(stage: Stage, looked: Looked) -> None:
    with stage.database.transaction() as connection:
        fleet.sign_off(connection, "w1")
        fleet.register(connection, "w1", "control", "1", 60.0)
    _be_silent(stage, STALL_S + 1)
    assert looked.events(messages=3) == ["work.stalled"]
    assert looked.events(messages=3) == []
    assert looked.orchestrator.published == []


def test_a_run_whose_items_do_not_come_any_more_is_told_once(stage: Stage, looked: Looked) -> None:
    with stage.database.transaction() as connection:
        at = reconciler.windows.NOW - max(STALL_S, reports.PRODUCER_SILENT_S) - 1
        connection.execute(update(workflow_executions).values(input_complete=False, producer_at=at))
        connection.execute(update(windows).values(published_at=reconciler.windows.NOW))
    assert looked.events() == ["run.producer_silent"]
    assert looked.events() == []
    assert [told[:28] for told in _warnings(stage)] == ["items do not come any more: "]
    with stage.database.transaction() as connection:
        connection.execute(update(workflow_executions).values(producer_at=reconciler.windows.NOW))
    assert _warnings(stage) == []


def _warnings(stage: Stage) -> list[str]:
    with stage.database.snapshot() as connection:
        return reports.status(connection, stage.run)["warnings"]


def test_a_run_whose_result_files_cannot_be_written_does_not_keep_others_waiting(stage: Stage, looked: Looked) -> None:
    with stage.database.transaction() as connection:
        connection.execute(update(windows).values(status="closed"))
    assert looked.events() == ["run.not_moved"]
