"""Kombu's transport for Redis, which takes messages as `workers.intake` wants them and outlives what is no message.

Kombu waits for all lines of all queues and takes whatever comes. Here it waits for those that are wanted, and looks
again soon while some are not.

Whoever reaches the broker can put anything into a queue. Kombu takes it out and then gives up the whole worker over an
entry that it cannot read; here the entry is dropped with a line in the log. What is a message and makes no sense is
dropped later, by Celery or by the tasks.
"""

from json import JSONDecodeError
from queue import Empty
from time import monotonic
from typing import Any

import structlog
from kombu import transport
from kombu.transport import redis, virtual

from orchestrator import broker
from workers.intake import Intake, Line

log = structlog.get_logger(__name__)

LOOK_AGAIN_S = 0.025
"""How long to wait for the lines that are wanted while others are full; servers round it up, to a tenth at most. Every
look in vain doubles it: a line is full for as long as the calls of a message take to leave, however slow they are."""
NOTHING = "nothing"
"""A key that nobody writes: waiting for it is waiting for the time to pass."""


class Unreadable(ValueError):
    """An entry of a queue that is no message."""


class Message(virtual.Message):
    """A message, or the error that says so."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        try:
            super().__init__(payload, channel, **kwargs)
            names = (self.delivery_tag, self.delivery_info["exchange"], self.delivery_info["routing_key"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Unreadable(type(error).__name__) from error
        if not all(isinstance(name, str) for name in names):
            raise Unreadable("a name that is none")


class QoS(redis.QoS):
    """Tells the intake what was taken and what is done with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Channel.intake.forget_unread()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Notes a message that was taken."""
        super().append(message, delivery_tag)
        queue = message.delivery_info["routing_key"]
        if broker.has_lines(queue):
            Channel.intake.take(delivery_tag, (queue, self.channel.line_of(message)))

    def ack(self, delivery_tag: str) -> None:
        """Notes that it was worked on."""
        Channel.intake.drop(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Notes that it will not be."""
        Channel.intake.drop(delivery_tag)
        super().reject(delivery_tag, requeue)


class Channel(redis.Channel):
    """Waits for the lines that are wanted, and drops what cannot be read.

    That is out of its queue by then, so nobody meets it again.
    """

    Message = Message
    QoS = QoS
    intake = Intake()
    _look_again_s = LOOK_AGAIN_S

    def line_of(self, message: Any) -> int:
        """The line that a message came from."""
        return int(self._get_message_priority({"properties": message.properties}))

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        plain = [queue for queue in queues if not broker.has_lines(queue)]
        lines: list[Line] = [
            (queue, line) for queue in queues if broker.has_lines(queue) for line in self.priority_steps
        ]
        wanted = self.intake.wanted(lines)
        # Windows before shards: what they publish is what all wait for.
        keys = [*plain, *(self._q_for_pri(queue, line) for queue, line in wanted)] or [NOTHING]
        wait_s = timeout or self.brpop_timeout
        if len(wanted) < len(lines):
            wait_s = min(wait_s, self._look_again_s)
            self._look_again_s *= 2
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        command = ["BRPOP", *keys, wait_s]
        if self.global_keyprefix:
            command = self.client._prefix_args(command)
        self.client.connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool | None:
        try:
            taken = super()._brpop_read(**options)
        except (Unreadable, JSONDecodeError, UnicodeDecodeError) as error:
            # Not the entry itself: nobody knows what a stranger wrote into it.
            log.error("message.dropped", reason=type(error).__name__)
            raise Empty from error
        self._look_again_s = LOOK_AGAIN_S
        return taken


class Transport(redis.Transport):
    """What `redis://` means in this process once `install` was called."""

    Channel = Channel


def install() -> Intake:
    """Makes kombu use it; returns what it takes messages by, one for the process.

    The address of the broker stays what it is, because others read it too (Flower).
    """
    for name in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[name] = f"{__name__}:Transport"
    return Channel.intake
