"""A broker that dies, forgets everything, delivers twice, or holds messages that nobody of us wrote."""

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.broker import CONTROL_QUEUE, queue_keys
from tests.engine import Engine, launch_engine
from tests.packs import ONE, SURVEY
from tests.servers import wait_until

PROVIDERS = {"main": {"concurrency": 40}}
SLOW = {"main": {"latency_s": 0.3}}
QUEUE = "llm.main"
RECOVERY_S = 12.0


def _silence_after(engine: Engine, since: float) -> float:
    """Seconds until the first request after a moment."""
    return min(line.mono for line in engine.fake.log().received if line.mono > since) - since


def _wait_idle(engine: Engine) -> None:
    wait_until(lambda: engine.fake.provider.in_flight == 0, 10)


def test_a_broker_that_comes_back_empty_costs_seconds_and_no_call() -> None:
    with launch_engine(providers=PROVIDERS, fakes=SLOW, workers=2) as engine:
        run = engine.start_run(500, ONE)
        engine.wait_received(100)
        engine.valkey.kill()
        _wait_idle(engine)
        received = engine.fake.provider.number
        # Without the limiter nobody knows what the others send, so nothing is sent.
        assert received < 500
        back_at = time.monotonic()
        engine.valkey.start()
        assert engine.wait(run)["calls"]["completed"] == 500
        engine.check(run)
        took_s = _silence_after(engine, back_at)
        print(f"Redis killed and back without its data: first call after {took_s:.1f} s, none repeated")
        assert took_s < RECOVERY_S
        assert all(worker.is_alive() for worker in engine.workers)


def test_a_broker_that_dies_between_levels_and_windows_is_made_up_for() -> None:
    settings = {"worker": {"window_size": 25, "lanes": 2, "shard_size": 10}}
    with launch_engine(providers=PROVIDERS, settings=settings, fakes=SLOW, workers=1) as engine:
        run = engine.start_run(150, SURVEY)
        for requests in (60, 180):
            engine.wait_received(requests)
            engine.valkey.restart()
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run).received == 301
        print(f"Redis restarted twice: 301 calls in {engine.status(run)['duration_seconds']:.1f} s")


@pytest.fixture(scope="module")
def durable() -> Iterator[Engine]:
    """A broker that keeps what it holds on disk, and a worker."""
    with launch_engine(providers=PROVIDERS, fakes=SLOW, workers=1, aof=True) as engine:
        yield engine


def test_a_broker_that_dies_and_kept_its_data_has_lost_no_message(durable: Engine) -> None:
    run = durable.start_run(200, ONE, salt="killed")
    wait_until(lambda: durable.status(run)["calls"]["completed"] > 40, 30)
    # A worker that sees a broker for the first time takes it for one that came back empty.
    said = durable.logs().count("broker.lost_its_data")
    durable.valkey.restart()
    assert durable.wait(run)["calls"]["completed"] == 200
    assert durable.check(run).attempts == {"ok": 200}
    assert durable.logs().count("broker.lost_its_data") == said


def test_a_broker_that_forgets_our_scripts_is_told_them_again(durable: Engine) -> None:
    """A script that is not known is an error of its own; a restart and `SCRIPT FLUSH` cause it."""
    run = durable.start_run(200, ONE, salt="scripts")
    with durable.redis() as redis:
        for completed in (20, 60, 100, 140):
            wait_until(lambda least=completed: durable.status(run)["calls"]["completed"] >= least, 30)
            redis.script_flush()
        assert durable.wait(run)["calls"]["completed"] == 200
        assert redis.info("memory")["number_of_cached_scripts"] > 0
    assert durable.check(run).attempts == {"ok": 200}


def test_emptying_the_broker_is_a_delay_and_not_a_loss() -> None:
    with launch_engine(providers=PROVIDERS, fakes=SLOW, workers=1) as engine:
        run = engine.start_run(300, ONE)
        engine.wait_received(80)
        with engine.redis() as redis:
            redis.flushall()
        emptied_at = time.monotonic()
        assert engine.wait(run)["calls"]["completed"] == 300
        engine.check(run)
        print(f"FLUSHALL: ended {time.monotonic() - emptied_at:.1f} s later, no call repeated")


def test_messages_that_are_lost_before_delivery_are_published_again() -> None:
    """Also while messages of others wait in queues on which nobody listens."""
    with launch_engine(workers=0) as engine:
        other = engine.start_run(30, ONE, provider="spare")
        run = engine.start_run(30, ONE)
        with engine.redis() as redis:
            assert redis.delete(*queue_keys(QUEUE)) == 1
            redis.set("llm-orchestrator:broker-has-its-data", "1")
        engine.start_worker([CONTROL_QUEUE, QUEUE])
        began = time.monotonic()
        assert engine.wait(run)["calls"]["completed"] == 30
        assert "window.silent" in engine.logs()
        engine.start_worker()
        assert engine.wait(other)["calls"]["completed"] == 30
        engine.check(run)
        engine.check(other)
        print(f"lost messages: made up for after {time.monotonic() - began:.1f} s")


def test_the_limit_holds_when_the_limiter_forgets_everything() -> None:
    """The service refuses more than 20 per second on average, and knows no excuse."""
    providers = {"main": {"rate_limit_rpm": 1200, "burst": 10}}
    service = {"main": {"rpm": 1200, "limiter": "bucket", "burst": 30}}
    with launch_engine(providers=providers, fakes=service, workers=2) as engine:
        run = engine.start_run(100, ONE)
        engine.wait_received(40)
        with engine.redis() as redis:
            redis.flushall()
        assert engine.wait(run)["calls"]["completed"] == 100
        assert engine.check(run).attempts == {"ok": 100}


@pytest.fixture(scope="module")
def target() -> Iterator[Engine]:
    """A worker that gets what it should not get."""
    with launch_engine(workers=1) as engine:
        yield engine


class TestMessages:
    def test_a_second_delivery_changes_nothing_early_or_late(self) -> None:
        with launch_engine(workers=0, fakes=SLOW) as engine, engine.redis() as redis:
            run = engine.start_run(60, SURVEY)
            copies = redis.lrange(QUEUE, 0, -1)
            assert copies
            for copy in copies * 2:
                redis.lpush(QUEUE, copy)
            engine.start_worker()
            engine.wait_received(60)
            for copy in copies:
                redis.lpush(QUEUE, copy)
            assert engine.wait(run)["status"] == "completed"
            for copy in copies:
                redis.lpush(QUEUE, copy)
            wait_until(lambda: redis.llen(QUEUE) == 0)
            wait_until(lambda: redis.zcard("unacked_index") == 0)
            assert engine.check(run).received == 121

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param([99, 1, 1, 1, "judge", "main", 0, 5], id="another version"),
            pytest.param([1, 4711, 4711, 1, "judge", "main", 0, 5], id="unknown run"),
            pytest.param([1, 1, 4711, 1, "no step", "main", 0, 5], id="unknown window and step"),
            pytest.param([1, "1", None, {}, [], 0.5, "x", True], id="wrong types"),
            pytest.param([1, 1], id="too short"),
            pytest.param([], id="empty"),
            pytest.param({"not": "a list"}, id="no arguments"),
        ],
    )
    def test_a_forged_message_is_dropped_and_the_worker_goes_on(self, target: Engine, body: Any) -> None:
        _push(target, "llm_orchestrator.ask_shard", body, QUEUE)
        _push(target, "llm_orchestrator.close_window", body, "control")
        _push(target, "os.system", body, "control")
        self._still_works(target)

    def test_a_hollow_envelope_is_dropped_and_the_worker_goes_on(self, target: Engine) -> None:
        with target.redis() as redis:
            redis.lpush(QUEUE, b'{"body": "!!!", "headers": {}, "properties": {}}')
        self._still_works(target)

    @pytest.mark.parametrize(
        "raw",
        [
            *(b"\x80\x04\x95pickle", b"{", b"null", b"[1, 2, 3]", b"{}", b'{"properties": 5}', b'{"properties": {}}'),
            *(
                json.dumps(
                    {"body": "", "headers": {}, "properties": {"delivery_tag": tag, "delivery_info": info}}
                ).encode()
                for tag, info in (
                    ("t", None),
                    ("t", {"exchange": "llm"}),
                    ("t", {"exchange": "llm", "routing_key": 5}),
                    ([1], {"exchange": "llm", "routing_key": "llm.main"}),
                    (None, {"exchange": "llm", "routing_key": "llm.main"}),
                )
            ),
        ],
    )
    def test_what_is_no_message_is_dropped_and_the_worker_goes_on(self, target: Engine, raw: bytes) -> None:
        told = target.logs().count("message.dropped")
        with target.redis() as redis:
            redis.lpush(QUEUE, raw)
        wait_until(lambda: target.logs().count("message.dropped") == told + 1)
        self._still_works(target)

    def _still_works(self, engine: Engine) -> None:
        before = engine.fake.provider.number
        run = engine.start_run(5, ONE, salt=f"after {before}")
        assert engine.wait(run)["status"] == "completed"
        engine.check(run)
        assert engine.fake.provider.number == before + 5
        assert engine.workers[0].is_alive()


def _push(engine: Engine, task: str, args: Any, queue: str) -> None:
    """Writes a message as a stranger with access to Redis would."""
    body = base64.b64encode(json.dumps([args, {}, {"callbacks": None, "errbacks": None, "chain": None}]).encode())
    message = {
        "body": body.decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": task, "id": "forged", "lang": "py", "argsrepr": "", "kwargsrepr": "", "origin": "stranger"},
        "properties": {
            "correlation_id": "forged",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "llm", "routing_key": queue},
            "delivery_tag": f"forged-{task}-{time.monotonic_ns()}",
            "body_encoding": "base64",
        },
    }
    with engine.redis() as redis:
        redis.lpush(queue, json.dumps(message))
