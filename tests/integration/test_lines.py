"""Messages on their way through a real broker: from every line, and counted for as long as they are held."""

from typing import Any

import pytest
from kombu import transport

from orchestrator import broker
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
