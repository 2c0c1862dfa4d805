"""Scenario E: one of two workers is killed in the middle of a run, with each heartbeat and lease that is shipped."""

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import tables
from orchestrator.local import LOCAL_HEARTBEAT_S, LOCAL_LEASE_S
from orchestrator.settings import WorkerSettings
from tests.engine import launch_engine
from tests.packs import ONE

CALLS, IN_FLIGHT, LATENCY_S = 600, 50, 0.5
MOST_S = 12.0
_cluster = WorkerSettings()
BEATS = {
    "on one machine": (float(LOCAL_HEARTBEAT_S), float(LOCAL_LEASE_S)),
    "on a cluster": (_cluster.heartbeat_s, _cluster.lease_s),
}
"""Heartbeat and lease, in seconds, by where they are the default."""


@dataclass(frozen=True)
class Survived:
    """One run with a death in it.

    Attributes:
        lost: calls that are not completed at the end.
        at_death: attempts of the dead worker that were on record as sent. The last of them had not left yet, and the
            first ones were answered but not settled: so they may be a few more than were in flight.
        repeated: requests beyond one for each call.
        done_s: from the kill to the end of the run.
        last_answer_s: from the kill to the last answer of the provider.
    """

    lost: int
    at_death: int
    repeated: int
    done_s: float
    last_answer_s: float


def report(rounds: int) -> tuple[str, Any]:
    """The table over so many rounds, and the numbers of every run."""
    lines = [
        f"\nE. {CALLS:,} calls of {LATENCY_S} s, {IN_FLIGHT} in flight, one of two workers killed: "
        f"what a crash costs us (median of {rounds})",
        tables.HEAD,
    ]
    numbers: dict[str, Any] = {}
    for where, (heartbeat_s, lease_s) in BEATS.items():
        found = [run_with_a_death(heartbeat_s, lease_s) for _ in range(rounds)]
        lines += [f"  {where}: heartbeat {heartbeat_s:g} s, lease {lease_s:g} s", *_rows(found)]
        numbers[where] = [asdict(one) for one in found]
    return "\n".join(lines), numbers


def _rows(found: Sequence[Survived]) -> list[str]:
    return [
        tables.line("calls lost", _each(found, "lost"), 0, digits=0),
        tables.line("on record as sent when it died", _each(found, "at_death"), digits=0),
        tables.line(
            "asked again beyond those",
            [max(0, one.repeated - one.at_death) for one in found],
            0,
            digits=0,
        ),
        tables.line("asked again", _each(found, "repeated"), IN_FLIGHT, digits=0),
        tables.line("s, kill to done", _each(found, "done_s"), MOST_S),
        tables.line("s, kill to last answer", _each(found, "last_answer_s")),
    ]


def _each(found: Sequence[Survived], name: str) -> list[float]:
    return [getattr(one, name) for one in found]


def run_with_a_death(heartbeat_s: float, lease_s: float) -> Survived:
    """One run; a third of the calls are asked when the busier worker dies, which may have had all of them."""
    beats = {"heartbeat_seconds": heartbeat_s, "lease_seconds": lease_s}
    with launch_engine(
        providers={"main": {"concurrency": IN_FLIGHT}},
        settings={"worker": beats},
        fakes={"main": {"latency_s": LATENCY_S}},
        workers=2,
    ) as engine:
        run = engine.start_run(CALLS, ONE)
        engine.wait_received(CALLS // 3)
        dying = max(engine.workers, key=lambda worker: worker.on_record(engine))
        killed_at = time.monotonic()
        dying.signal(signal.SIGKILL)
        dying.process.wait(10)
        at_death = dying.on_record(engine)
        status = engine.wait(run, timeout_s=120.0)
        done_s = time.monotonic() - killed_at
        # How many is what the table tells.
        engine.check(run, unknown=CALLS, repeats=CALLS)
        log = engine.fake.log()
        asked = {line.attempt_id.split("/")[1] for line in log.received}
        return Survived(
            lost=CALLS - status["calls"]["completed"],
            at_death=at_death,
            repeated=len(log.received) - len(asked),
            done_s=done_s,
            last_answer_s=log.answered[-1].mono - killed_at,
        )
