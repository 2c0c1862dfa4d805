"""The part of kombu that this project uses; kombu ships no types."""

class Exchange:
    def __init__(self, name: str, type: str) -> None: ...

class Queue:
    def __init__(self, name: str, exchange: Exchange, *, routing_key: str) -> None: ...
