from collections.abc import Sequence
from typing import Any

from kombu.transport.virtual import Message

class QoS:
    channel: Any
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def append(self, message: Message, delivery_tag: str) -> None: ...
    def ack(self, delivery_tag: str) -> None: ...
    def reject(self, delivery_tag: str, requeue: bool = False) -> None: ...

class Channel:
    Message: type[Message]
    QoS: type[QoS]
    sep: str
    active_queues: Sequence[str]
    brpop_timeout: float
    client: Any
    global_keyprefix: str
    priority_steps: Sequence[int]
    _queue_cycle: Any
    _in_poll: Any
    _brpop_sent_at: float
    def _brpop_read(self, **options: Any) -> bool | None: ...
    def _brpop_start(self, timeout: float | None = None) -> None: ...
    def _get_message_priority(self, message: Any, reverse: bool = False) -> int: ...
    def _q_for_pri(self, queue: str, pri: int) -> str: ...

class Transport:
    Channel: type[Channel]
