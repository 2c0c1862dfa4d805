"""A database that goes away in the middle of a run."""

import socket
import sys
import time

import pytest

from orchestrator.database import Database
from tests.engine import launch_engine
from tests.packs import ONE, SURVEY
from tests.servers import start_postgres, wait_until

RECOVERY_S = 12.0


def test_a_crash_of_postgres_is_a_pause() -> None:
    providers = {"main": {"concurrency": 40}}
    with start_postgres(durable=True) as server:
        url = server.url(server.create())
        with launch_engine(
            database_url=url, providers=providers, fakes={"main": {"latency_s": 0.3}}, workers=2
        ) as engine:
            run = engine.start_run(400, ONE)
            engine.wait_received(100)
            server.kill()
            wait_until(lambda: engine.fake.provider.in_flight == 0, 15)
            # No attempt may leave that is not on record, so nothing was sent while the database was away.
            sent = engine.fake.provider.number
            assert sent < 400
            back_at = time.monotonic()
            server.start()
            assert engine.wait(run)["calls"]["completed"] == 400
            # Answers that came meanwhile were kept: nothing is unknown, and nothing was asked twice.
            engine.check(run)
            first = min(line.mono for line in engine.fake.log().received if line.mono > back_at)
            print(f"Postgres crashed and back: first call after {first - back_at:.1f} s, none repeated")
            assert first - back_at < RECOVERY_S
            assert all(worker.is_alive() for worker in engine.workers)


def test_two_workers_share_a_run_on_postgres(postgres_url: str) -> None:
    with launch_engine(database_url=postgres_url, workers=2) as engine:
        run = engine.start_run(100, SURVEY)
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run).received == 201
        engine.manager.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the option is Linux's own")
def test_a_line_that_swallows_what_is_sent_is_given_up_within_half_a_minute(postgres_url: str) -> None:
    """Keepalives do not help while sent data waits for its acknowledgement, and the kernel waits for 15 minutes."""
    database = Database(postgres_url)
    with database.snapshot() as connection, socket.socket(fileno=connection.connection.fileno()) as line:
        assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        line.detach()
    database.close()
