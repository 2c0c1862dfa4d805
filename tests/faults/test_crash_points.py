"""A worker dies at each point that a call passes; the next one finishes, and the books say exactly what happened.

Every point has a provider, a queue, a worker and a run of its own, so that all of them die at about the same time. The
run asks three questions one after the other, and the worker dies over the second one: what was finished before stays,
and nothing is asked twice but what had left when its worker died.
"""

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from orchestrator.broker import provider_queue
from orchestrator.manager import StartedRun
from tests.engine import Engine, launch_engine
from tests.faults.crashing import CRASHED
from tests.packs import SURVEY
from tests.servers import PostgresServer, wait_until

CALLS = 3


@dataclass(frozen=True, slots=True)
class Left:
    """What a crash leaves to its successor: attempts of unknown outcome, and requests that leave once more."""

    unknown: int = 0
    repeated: int = 0


POINTS = {
    "before_claim": Left(),
    "in_claim_commit": Left(),
    "after_claim_commit": Left(unknown=1),
    "before_send": Left(unknown=1),
    "after_send": Left(unknown=1, repeated=1),
    "after_response": Left(unknown=1, repeated=1),
    "in_settle_commit": Left(unknown=1, repeated=1),
    "after_settle_commit": Left(),
    "after_shard": Left(),
    "before_ack": Left(),
}
ON_POSTGRES = ("in_claim_commit", "after_claim_commit", "after_send", "in_settle_commit", "after_settle_commit")


@dataclass(frozen=True, slots=True)
class Aftermath:
    """All runs after all crashes."""

    engine: Engine
    runs: dict[str, StartedRun]


@contextmanager
def crashed(points: tuple[str, ...], database_url: str | None = None) -> Generator[Aftermath]:
    """Lets a worker die at each of the points, and one more finish what they began."""
    with launch_engine(database_url=database_url, fakes=dict.fromkeys(points, {}), workers=0) as engine:
        doomed = {
            point: engine.start_worker(
                [provider_queue(point)], ready=False, module="tests.faults.faulty_worker", CRASH_AT=f"{point}:2"
            )
            for point in points
        }
        for worker in doomed.values():
            wait_until(worker.is_ready, 60)
        # The second request is never answered: its worker dies while it waits.
        engine.fakes["after_send"].control("ok", "hang")
        runs = {point: engine.start_run(1, SURVEY, provider=point, salt=point) for point in points}
        wait_until(lambda: engine.fakes["after_send"].provider.number == 2, 30)
        doomed["after_send"].kill9()
        for point, worker in doomed.items():
            wait_until(lambda worker=worker: not worker.is_alive(), 30)
            assert worker.process.returncode == -signal.SIGKILL, worker.log()
            assert point == "after_send" or f"{CRASHED}: {point}" in worker.log()
        engine.start_worker()
        for run in runs.values():
            assert engine.wait(run)["status"] == "completed"
        engine.stop()
        yield Aftermath(engine, runs)


@pytest.fixture(scope="module")
def on_sqlite() -> Iterator[Aftermath]:
    with crashed(tuple(POINTS)) as aftermath:
        yield aftermath


@pytest.fixture(scope="module")
def on_postgres(postgres_server: PostgresServer) -> Iterator[Aftermath]:
    name = postgres_server.create()
    with crashed(ON_POSTGRES, postgres_server.url(name)) as aftermath:
        yield aftermath
        aftermath.engine.manager.close()
    postgres_server.drop(name)


def _check(aftermath: Aftermath, point: str) -> None:
    left = POINTS[point]
    history = aftermath.engine.check(aftermath.runs[point], unknown=left.unknown, repeats=left.repeated)
    assert (history.attempts["ok"], history.attempts["unknown"]) == (CALLS, left.unknown)
    assert history.attempts.total() == CALLS + left.unknown
    assert history.received == CALLS + left.repeated
    assert history.calls == {"completed": CALLS}


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_any_point_loses_nothing_and_repeats_only_what_had_left(on_sqlite: Aftermath, point: str) -> None:
    _check(on_sqlite, point)


@pytest.mark.parametrize("point", ON_POSTGRES)
def test_a_crash_around_a_commit_of_postgres_is_no_worse(on_postgres: Aftermath, point: str) -> None:
    _check(on_postgres, point)
