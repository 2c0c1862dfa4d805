"""Which lists a worker waits for, and how long."""

from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport.redis import Channel as Kombus

from orchestrator.broker import LINES, queue_keys
from workers.intake import MOST_PER_LINE, Intake
from workers.transport import LOOK_AGAIN_S, NOTHING, Channel

QUEUE = "llm.main"
TIMEOUT_S = 1.0


class Stub:
    """As much of a channel as waiting needs; what it sends is kept."""

    def __init__(self, *queues: str, prefix: str = "") -> None:
        self.intake = Intake()
        self.sent: list[Any] = []
        self.active_queues = list(queues)
        self.priority_steps = list(range(LINES))
        self.sep = Kombus.sep
        self.brpop_timeout = TIMEOUT_S
        self.global_keyprefix = prefix
        self._look_again_s = LOOK_AGAIN_S
        self._queue_cycle = SimpleNamespace(consume=lambda count: self.active_queues[:count])
        connection = SimpleNamespace(send_command=lambda *parts: self.sent.append(parts))

        def prefixed(parts: list[Any]) -> list[Any]:
            return [parts[0], *(prefix + key for key in parts[1:-1]), parts[-1]]

        self.client = SimpleNamespace(connection=connection, _prefix_args=prefixed)

    def priority(self, line: int) -> int:
        return line

    def _q_for_pri(self, queue: str, line: int) -> str:
        return Kombus._q_for_pri(self, queue, line)  # pyright: ignore[reportArgumentType]

    def fill(self, line: int) -> None:
        """Lets as many calls of a line wait as may."""
        self.intake.take(str(line), (QUEUE, line))
        self.intake.ticket(str(line)).read(range(MOST_PER_LINE))

    def wait(self) -> tuple[list[str], float]:
        """The lists of the next wait, and its length."""
        Channel._brpop_start(self)  # pyright: ignore[reportArgumentType]
        command, *keys, wait_s = self.sent[-1]
        assert command == "BRPOP"
        return keys, wait_s


def test_windows_come_first_and_then_every_line():
    keys, wait_s = Stub(QUEUE, "control").wait()
    assert keys == ["control", *queue_keys(QUEUE)]
    assert wait_s == TIMEOUT_S


def test_a_full_line_is_not_waited_for_and_looked_at_again_less_and_less_often():
    channel = Stub("control", QUEUE)
    channel.fill(3)
    keys, wait_s = channel.wait()
    assert set(queue_keys(QUEUE)) - set(keys) == {queue_keys(QUEUE)[3]}
    waits = [wait_s, *(channel.wait()[1] for _ in range(8))]
    assert waits == pytest.approx([min(TIMEOUT_S, LOOK_AGAIN_S * 2**look) for look in range(9)])


def test_a_worker_with_nothing_but_full_lines_waits_for_time_to_pass():
    channel = Stub(QUEUE)
    for line in range(LINES):
        channel.fill(line)
    assert channel.wait() == ([NOTHING], LOOK_AGAIN_S)


def test_keys_have_the_prefix_of_the_installation():
    keys, _ = Stub(QUEUE, prefix="mine:").wait()
    assert keys == list(queue_keys(QUEUE, "mine:"))


def test_a_channel_without_queues_waits_for_nothing():
    channel = Stub()
    Channel._brpop_start(channel)  # pyright: ignore[reportArgumentType]
    assert channel.sent == []
