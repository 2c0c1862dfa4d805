"""Scenario E: one of two workers is killed in the middle of a run; heartbeat and lease are those that are shipped."""

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import tables
from orchestrator.settings import WorkerSettings
from tests.engine import Engine, Worker, launch_engine
from tests.packs import ONE

CALLS, IN_FLIGHT, LATENCY_S = 600, 50, 0.5
MOST_S = 12.0


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
    found = [run_with_a_death() for _ in range(rounds)]
    lines = [
        f"\nE. {CALLS:,} calls of {LATENCY_S} s, {IN_FLIGHT} in flight, one of two workers killed: "
        f"what a crash costs us (median of {rounds})",
        tables.HEAD,
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
    return "\n".join(lines), [asdict(one) for one in found]


def _each(found: Sequence[Survived], name: str) -> list[float]:
    return [getattr(one, name) for one in found]


def run_with_a_death() -> Survived:
    """One run; a third of the calls are asked when the busier worker dies, which may have had all of them."""
    shipped = WorkerSettings()
    beats = {"heartbeat_seconds": shipped.heartbeat_s, "lease_seconds": shipped.lease_s}
    with launch_engine(
        providers={"main": {"concurrency": IN_FLIGHT}},
        settings={"worker": beats},
        fakes={"main": {"latency_s": LATENCY_S}},
        workers=2,
    ) as engine:
        run = engine.start_run(CALLS, ONE)
        engine.wait_received(CALLS // 3)
        dying = max(engine.workers, key=lambda worker: _on_record(engine, worker))
        killed_at = time.monotonic()
        dying.signal(signal.SIGKILL)
        dying.process.wait(10)
        at_death = _on_record(engine, dying)
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


def _on_record(engine: Engine, worker: Worker) -> int:
    """Attempts of a worker that are on record as sent."""
    query = "SELECT count(*) FROM llm_usage WHERE status = 'sent' AND worker_id LIKE :worker"
    return engine.rows(query, worker=f"%:{worker.pid}:%")[0][0]
