"""Workers that die, stop answering, or come back from the dead."""

import signal
import sqlite3
import time

import psutil

from tests.engine import Engine, Worker, launch_engine
from tests.packs import ONE
from tests.servers import wait_until

CONCURRENCY = 40
PROVIDERS = {"main": {"concurrency": CONCURRENCY}}
SMALL_SHARDS = {"worker": {"shard_size": 5}}
"""So that a worker cannot take them all before the other one comes."""
SLOW = {"main": {"latency_s": 0.3}}
RECOVERY_S = 12.0
"""A lease of two seconds, the beats around it, and a busy machine."""


def _asked_again_after(engine: Engine, since: float) -> float:
    """Seconds until the first call whose worker was gone was asked a second time."""
    again = [line.mono for line in engine.fake.log().received if line.mono > since and line.attempt_id[-2:] != "/1"]
    return min(again) - since


def _is_stopped_outside_a_transaction(engine: Engine, worker: Worker) -> bool:
    """Stops a worker while it has calls in flight; lets it go on if it was just writing.

    Whoever sleeps with SQLite's write lock in hand stops everybody: that is not what the tests here are about.
    """
    if not worker.has_in_flight(engine):
        return False
    worker.signal(signal.SIGSTOP)
    threads = psutil.Process(worker.pid).threads()
    wait_until(lambda: all(psutil.Process(thread.id).status() == psutil.STATUS_STOPPED for thread in threads))
    database = sqlite3.connect(engine.home / "data" / "orchestrator.db", timeout=1.0, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")
    except sqlite3.OperationalError:
        worker.signal(signal.SIGCONT)
        return False
    finally:
        database.close()
    return worker.has_in_flight(engine)


def test_a_killed_worker_loses_no_call_while_another_lives() -> None:
    with launch_engine(providers=PROVIDERS, settings=SMALL_SHARDS, fakes=SLOW, workers=2) as engine:
        run = engine.start_run(400, ONE)
        engine.wait_received(100)
        wait_until(lambda: engine.workers[0].has_in_flight(engine))
        killed_at = time.monotonic()
        engine.workers[0].kill9()
        at_death = engine.workers[0].on_record(engine)
        status = engine.wait(run)
        assert status["calls"]["completed"] == 400
        history = engine.check(run, unknown=at_death, repeats=at_death)
        assert history.attempts["unknown"] > 0
        assert history.repeated <= history.attempts["unknown"]
        took_s = _asked_again_after(engine, killed_at)
        print(f"kill -9 of one of two: {history.attempts['unknown']} unknown, asked again after {took_s:.1f} s")
        assert took_s < RECOVERY_S


def test_a_killed_worker_is_replaced() -> None:
    with launch_engine(providers=PROVIDERS, fakes=SLOW, workers=1) as engine:
        run = engine.start_run(200, ONE)
        engine.wait_received(80)
        wait_until(lambda: engine.workers[0].has_in_flight(engine))
        killed_at = time.monotonic()
        engine.workers[0].kill9()
        at_death = engine.workers[0].on_record(engine)
        engine.start_worker()
        status = engine.wait(run)
        assert status["calls"]["completed"] == 200
        history = engine.check(run, unknown=at_death, repeats=at_death)
        assert 0 < history.repeated <= history.attempts["unknown"]
        took_s = _asked_again_after(engine, killed_at)
        print(f"kill -9 and another worker: {history.attempts['unknown']} unknown, asked again after {took_s:.1f} s")
        assert took_s < RECOVERY_S


def test_a_worker_that_was_taken_for_dead_cannot_overwrite_its_successor() -> None:
    with launch_engine(providers=PROVIDERS, settings=SMALL_SHARDS, fakes=SLOW, workers=2) as engine:
        run = engine.start_run(300, ONE)
        engine.wait_received(100)
        wait_until(lambda: engine.workers[0].has_in_flight(engine))
        zombie = engine.workers[0]
        wait_until(lambda: _is_stopped_outside_a_transaction(engine, zombie), 20)
        at_stop = zombie.on_record(engine)
        assert engine.wait(run)["calls"]["completed"] == 300
        answers = engine.rows("SELECT id, result, fence FROM prompt_executions ORDER BY id")
        zombie.signal(signal.SIGCONT)
        # What it had in flight was answered long ago: it settles now, too late, and the cost becomes known.
        wait_until(lambda: "worker.taken_for_dead" in zombie.log(), 10)
        wait_until(lambda: engine.status(run)["attempts"]["stale"] > 0, 10)
        wait_until(lambda: engine.status(run)["attempts"]["sent"] == 0, 10)
        assert engine.rows("SELECT id, result, fence FROM prompt_executions ORDER BY id") == answers
        history = engine.check(run, unknown=at_stop, stale=at_stop, repeats=at_stop)
        print(f"SIGSTOP beyond the lease: {dict(history.attempts)}")
        again = engine.start_run(40, ONE, salt="afterwards")
        assert engine.wait(again)["status"] == "completed"
        engine.check(again)
        assert zombie.is_alive()


def test_a_call_that_outlives_three_workers_is_given_up() -> None:
    with launch_engine(fakes={"main": {"latency_s": 60.0}}, workers=0) as engine:
        run = engine.start_run(1, ONE)
        for death in range(3):
            worker = engine.start_worker()
            engine.wait_received(death + 1)
            worker.kill9()
        engine.start_worker()
        status = engine.wait(run)
        assert (status["status"], status["calls"]["failed"]) == ("failed", 1)
        assert engine.rows("SELECT error_code FROM prompt_executions")[0].error_code == "poison"
        engine.check(run, unknown=3, repeats=2)
