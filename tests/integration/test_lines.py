"""Runs share a queue: messages come from every line of it, and no run waits behind another one's."""

from typing import Any

import pytest
from kombu import transport

from orchestrator import broker
from tests.engine import launch_engine
from tests.packs import GRAPH, ONE, SURVEY
from tests.servers import ValkeyServer, wait_until
from workers.transport import Channel, install

MESSAGE = broker.ShardMessage(7, 1, 1, "judge", "simulator", 0, 4)


def test_messages_of_all_lines_come_and_count_until_they_are_done_with(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("redis", "rediss"):
        monkeypatch.setitem(transport.TRANSPORT_ALIASES, name, transport.TRANSPORT_ALIASES[name])
    # Kombu remembers what a scheme meant when it was first asked, in this process by another test.
    monkeypatch.setattr(transport, "_transport_cache", {})
    intake = install()
    app = broker.make_app(valkey.url, ("simulator",))
    for before in range(2 * broker.LINES):
        broker.ask_shard(app, MESSAGE, before).apply_async()
    held: list[Any] = []
    with app.connection() as connection:
        assert isinstance(connection.default_channel, Channel)
        queue = app.amqp.queues["llm.simulator"]
        with connection.Consumer([queue], callbacks=[lambda _, message: held.append(message)], accept=["json"]):

            def have_come() -> bool:
                connection.drain_events(timeout=5)
                return len(held) == 2 * broker.LINES

            wait_until(have_come, 20)
            lines = [int(message.properties["priority"]) for message in held]
            # Turn by turn, although the messages of one line came one after the other.
            assert sorted(lines[: broker.LINES]) == list(range(broker.LINES))
            assert len(intake._tickets) == len(held)
            for number, message in enumerate(held):
                message.reject() if number % 3 == 0 else message.ack()
            assert not intake._tickets
            assert not intake._waiting


def test_a_small_run_gets_its_share_while_a_large_one_has_all_its_windows_out() -> None:
    """Windows of 4,000 calls of the large run were published before the small one began: 200 s of the limit.

    Counted in calls, because time says nothing on a busy machine: at equal shares as many calls of the large run as
    of the small one leave until the small one is done, and what had its permit before.
    """
    limits = {"rate_limit_rpm": 1200, "burst": 20}
    with launch_engine(providers={"main": limits}, workers=1) as engine:
        engine.start_run(6000, ONE)
        engine.wait_received(60)
        before = engine.fake.provider.number
        small = engine.start_run(40, ONE, salt="small")
        assert engine.wait(small)["status"] == "completed"
        meanwhile = engine.fake.provider.number - before
        print(f"40 calls beside 6,000: done after {meanwhile} calls of both")
        assert meanwhile <= 3 * 40


def test_more_runs_than_lines_share_them() -> None:
    with launch_engine(workers=2) as engine:
        started = [engine.start_run(20, SURVEY, salt=f"run {number}") for number in range(broker.LINES + 3)]
        for run in started:
            assert engine.wait(run)["status"] == "completed"
            engine.check(run)


def test_installations_that_share_a_broker_keep_to_their_prefixes() -> None:
    with launch_engine(settings={"storage": {"queue_prefix": "mine."}}, workers=1) as engine:
        with engine.redis() as redis:
            redis.lpush("llm.main", "somebody else's")
        run = engine.start_run(30, GRAPH)
        assert engine.wait(run)["status"] == "completed"
        engine.check(run)
        with engine.redis() as redis:
            names = {key.decode() for key in redis.scan_iter()}
            assert redis.llen("llm.main") == 1
        assert {name for name in names if not name.startswith("mine.")} == {"llm.main"}
