"""Workers that live, beat and do nothing: they notice, say so, and make room for another one."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine import Engine, launch_engine
from tests.packs import ONE
from tests.servers import wait_until

STALL_S = 2.0
CALLS = 40


@pytest.fixture(scope="module")
def impatient() -> Iterator[Engine]:
    """An installation that takes two seconds for a stall, without workers."""
    settings = {"worker": {"stall_seconds": STALL_S, "window_size": 10, "lanes": 1, "shard_size": 5}}
    with launch_engine(settings=settings, workers=0) as engine:
        yield engine


@pytest.mark.parametrize(
    ("fault", "reason", "unknown"),
    [
        # What it has in flight may end before it leaves.
        pytest.param("NO_MESSAGES", "messages wait and none is taken", 0, id="deaf"),
        # Nothing ends on a loop that hangs: its calls are freed by the lease.
        pytest.param("NO_LOOP", "the event loop does not answer", 10, id="hanging"),
    ],
)
def test_a_worker_that_stands_still_says_so_and_is_replaced(
    impatient: Engine, fault: str, reason: str, unknown: int
) -> None:
    switch = impatient.home / fault
    environment: dict[str, Any] = {fault: str(switch)}
    worker = impatient.start_worker(module="tests.faults.faulty_worker", **environment)
    before = impatient.fake.provider.number
    # One window after the other, a second each: there is work left when the fault comes.
    impatient.fake.control(latency_s=1.0)
    run = impatient.start_run(CALLS, ONE, salt=fault)
    impatient.wait_received(before + CALLS // 4)
    switch.touch()
    wait_until(lambda: not worker.is_alive(), 40)
    assert worker.process.returncode == 1
    assert "worker.stalled" in worker.log()
    assert reason in worker.log()
    assert impatient.status(run)["status"] == "running"
    impatient.fake.control(latency_s=0.0)
    successor = impatient.start_worker()
    assert impatient.wait(run)["calls"]["completed"] == CALLS
    impatient.check(run, unknown=unknown, repeats=unknown)
    assert "worker.stalled" not in successor.log()
    successor.kill9()
