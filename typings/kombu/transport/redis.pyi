from typing import Any

from kombu.transport.virtual import Message

class Channel:
    Message: type[Message]
    def _brpop_read(self, **options: Any) -> bool | None: ...
    def _brpop_start(self, timeout: float | None = None) -> None: ...

class Transport:
    Channel: type[Channel]
