"""The command line with a fault in it: it ends as arranged (`tests.faults.crashing`).

Items are stored in small batches, so that a small input has many of these moments:

| point | what happened before |
|---|---|
| `in_create_commit` | the run is written and not committed |
| `after_create` | it is committed, and has no items |
| `in_store_commit` | a batch of items and its windows are written and not committed |
| `after_store` | they are committed, and nothing of them is published |
| `in_complete_commit` | all items are stored, and the run does not say so yet |
"""

from typing import Any

from orchestrator import manager
from orchestrator.cli import main
from orchestrator.database import intake
from orchestrator.manager import WorkflowManager
from orchestrator.orchestration import WorkflowOrchestrator
from tests.faults.crashing import add_common_points, note, reach, wrap

BATCH = 10


def _noting(kind: str) -> Any:
    def work(original: Any, *args: Any) -> Any:
        done = original(*args)
        note(kind)
        return done

    return work


def _create(original: Any, *args: Any) -> Any:
    created = original(*args)
    reach("after_create")
    return created


def _orchestrate(original: Any, *args: Any) -> None:
    reach("after_store")
    original(*args)


if __name__ == "__main__":
    manager.BATCH = manager.FIRST_WINDOW = BATCH
    for function, kind in (("create_run", "create"), ("add_items", "store"), ("complete_input", "complete")):
        wrap(intake, function, _noting(kind))
    wrap(WorkflowManager, "_create", _create)
    wrap(WorkflowOrchestrator, "orchestrate", _orchestrate)
    add_common_points()
    main()
