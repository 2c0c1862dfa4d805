from typing import Any

class Message:
    delivery_tag: Any
    delivery_info: Any
    properties: dict[str, Any]
    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None: ...
