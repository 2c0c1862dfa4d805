from typing import Any

class Message:
    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None: ...
