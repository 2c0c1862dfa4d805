"""A worker process with a fault in it, started in place of `celery`; the product itself knows nothing of faults.

`CRASH_AT=point:n` ends the process at its n-th passage of a point, as `kill -9` does. Further faults come and go with a
file: while the one that `NO_MESSAGES` names exists, the process takes no message from the broker and does not notice;
while the one that `NO_LOOP` names exists, its event loop hangs; while the one that `NO_SPACE` names exists, its SQLite
database may not grow.

The points, in the order in which a call passes them, beside those in `tests.faults.crashing`:

| point | what happened before |
|---|---|
| `before_claim` | a permit was given; nothing is on record |
| `in_claim_commit` | claim, reservation and attempt are written and not committed |
| `after_claim_commit` | they are committed, and nobody in the process knows it yet |
| `before_send` | the attempt may leave, and has not |
| `after_response` | the answer is there, and is not booked |
| `in_settle_commit` | it is written and not committed |
| `after_settle_commit` | it is committed, and nobody in the process knows it yet |
| `after_shard` | all calls of the message have ended, and its group has not counted it |
| `before_ack` | its group has counted it, and the broker still holds the message for us |
| `before_end` | the result files of a run are written; its status does not say that it has ended |
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery.__main__ import main  # pyright: ignore[reportMissingTypeStubs]
from celery.worker.request import Request  # pyright: ignore[reportMissingTypeStubs]
from sqlalchemy import Engine, event

from orchestrator import broker
from orchestrator.database import batches
from orchestrator.orchestration import WorkflowOrchestrator
from tests.faults.crashing import about, add_common_points, reach, wrap
from workers.client import LLMClient
from workers.runtime import Runtime
from workers.transport import Channel
from workers.writer import BatchWriter

KINDS = {batches.Claim: "claim", batches.Settlement: "settle"}
NO_LIMIT = 2**30

_environment = os.environ  # noqa: TID251
_wished: set[int] = set()
_claimed: set[int] = set()


def add_crash_points() -> None:
    """Makes every point of the table one at which the process may end."""
    wrap(BatchWriter, "claim", _claim)
    wrap(BatchWriter, "_commit", _commit)
    wrap(LLMClient, "_exchange", _exchange)
    wrap(WorkflowOrchestrator, "_end", _end)
    wrap(Runtime, "ask", _ask)
    wrap(Request, "acknowledge", _acknowledge)
    add_common_points()


async def _claim(original: Any, writer: BatchWriter, wish: batches.Claim) -> Any:
    if _is_first(_wished, wish):
        reach("before_claim")
    return await original(writer, wish)


def _is_first(seen: set[int], wish: object) -> bool:
    """Whether a wish is not the claim of a call that was claimed before.

    On a slow machine a message may come twice. The second copy finds the call claimed, and passes no point: a crash
    there would be one over the call before, which may be at the provider.
    """
    if not isinstance(wish, batches.Claim):
        return True
    known = wish.call in seen
    seen.add(wish.call)
    return not known


async def _exchange(original: Any, *args: Any) -> Any:
    reach("before_send")
    outcome = await original(*args)
    reach("after_response")
    return outcome


def _commit(original: Any, writer: BatchWriter, wishes: Sequence[Any]) -> Any:
    kinds = {KINDS[type(wish)] for wish in wishes if type(wish) in KINDS and _is_first(_claimed, wish)}
    with about(kinds):
        answers = original(writer, wishes)
    for kind in kinds:
        reach(f"after_{kind}_commit")
    return answers


def _end(original: Any, *args: Any) -> None:
    reach("before_end")
    original(*args)


def _ask(original: Any, *args: Any) -> None:
    original(*args)
    reach("after_shard")


def _acknowledge(original: Any, request: Any) -> None:
    if request.name == broker.ASK_SHARD:
        reach("before_ack")
    original(request)


def add_deafness(switch: Path) -> None:
    """As in the freezes of Celery consumers that its users report: alive, connected, and taking nothing."""

    def begin_to_wait(original: Any, channel: Channel, *args: Any, **kwargs: Any) -> None:
        if not switch.exists():
            original(channel, *args, **kwargs)

    wrap(Channel, "_brpop_start", begin_to_wait)


def add_hanging_loop(switch: Path) -> None:
    """What runs on the event loop does not come back, as a library call that blocks."""

    async def look(original: Any, *args: Any) -> None:
        while switch.exists():
            threading.Event().wait(0.05)
        await original(*args)

    wrap(Runtime, "_look_once", look)


def add_full_disk(switch: Path) -> None:
    """SQLite itself refuses to grow, with the error of a full disk."""

    def limit(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {1 if switch.exists() else NO_LIMIT}")

    event.listen(Engine, "checkout", limit)


if __name__ == "__main__":
    add_crash_points()
    if "NO_MESSAGES" in _environment:
        add_deafness(Path(_environment["NO_MESSAGES"]))
    if "NO_LOOP" in _environment:
        add_hanging_loop(Path(_environment["NO_LOOP"]))
    if "NO_SPACE" in _environment:
        add_full_disk(Path(_environment["NO_SPACE"]))
    main()
