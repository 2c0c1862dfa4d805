"""Kombu's transport for Redis, which outlives what is no message.

Whoever reaches the broker can put anything into a queue. Kombu takes it out and then gives up the whole worker over an
entry that it cannot read; here the entry is dropped with a line in the log. What is a message and makes no sense is
dropped later, by Celery or by the tasks.
"""

from json import JSONDecodeError
from queue import Empty
from typing import Any

import structlog
from kombu import transport
from kombu.transport import redis, virtual

log = structlog.get_logger(__name__)


class Unreadable(ValueError):
    """An entry of a queue that is no message."""


class Message(virtual.Message):
    """A message, or the error that says so."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        try:
            super().__init__(payload, channel, **kwargs)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Unreadable(type(error).__name__) from error


class Channel(redis.Channel):
    """Drops what cannot be read. It is out of its queue by then, so nobody meets it again."""

    Message = Message

    def _brpop_read(self, **options: Any) -> bool | None:
        try:
            return super()._brpop_read(**options)
        except (Unreadable, JSONDecodeError, UnicodeDecodeError) as error:
            # Not the entry itself: nobody knows what a stranger wrote into it.
            log.error("message.dropped", reason=type(error).__name__)
            raise Empty from error


class Transport(redis.Transport):
    """What `redis://` means in this process once `install` was called."""

    Channel = Channel


def install() -> None:
    """Makes kombu use it. The address of the broker stays what it is, because others read it too (Flower)."""
    for name in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[name] = f"{__name__}:Transport"
