"""Points at which a process ends as arranged, and those that workers and producers have in common.

`CRASH_AT=point:n` in the environment ends the process at its n-th passage of a point, as `kill -9` does. The common
points:

| point | what happened before |
|---|---|
| `in_move_commit` | what comes next for a run is decided and not committed |
| `before_publish` | that is committed, and not published |
| `after_publish` | it is published |
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event

from orchestrator.orchestration import WorkflowOrchestrator

CRASHED = "crashed as arranged"

_wanted, _, _passage = os.environ.get("CRASH_AT", "").partition(":")  # noqa: TID251
_passages = itertools.count(1)
_here = threading.local()
"""What the transaction of this thread is about."""


def reach(point: str) -> None:
    """Passes a point; the one that was arranged is the end."""
    if point == _wanted and next(_passages) == int(_passage):
        sys.stderr.write(f"{CRASHED}: {point}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a function by `wrapper`, which gets the original in front of its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


@contextmanager
def about(kinds: set[str]) -> Generator[None]:
    """Says what the transactions of this thread are about; their points are named `in_<kind>_commit`."""
    _here.kinds = kinds
    try:
        yield
    finally:
        _here.kinds = set()


def note(kind: str) -> None:
    """Says what the transaction at hand is about."""
    _here.kinds = {kind}


def add_common_points() -> None:
    """Makes the points of the table, and every commit, one at which the process may end."""
    wrap(WorkflowOrchestrator, "close_window", _move)
    wrap(WorkflowOrchestrator, "coordinate_steps", _move)
    wrap(WorkflowOrchestrator, "_publish", _publish)
    event.listen(Engine, "commit", _before_commit)


def _move(original: Any, *args: Any, **kwargs: Any) -> Any:
    with about({"move"}):
        return original(*args, **kwargs)


def _publish(original: Any, orchestrator: WorkflowOrchestrator, publications: Sequence[Any]) -> None:
    if publications:
        reach("before_publish")
    original(orchestrator, publications)
    if publications:
        reach("after_publish")


def _before_commit(_connection: object) -> None:
    for kind in getattr(_here, "kinds", ()):
        reach(f"in_{kind}_commit")
