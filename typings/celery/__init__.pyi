"""The part of Celery that this project uses; Celery ships no types."""

from collections.abc import Callable, Sequence
from typing import Any

from celery.canvas import Signature, chord as chord, group as group

class _Conf:
    def update(self, **settings: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...

class _Request:
    properties: dict[str, str]

class _Task:
    request: _Request

current_task: _Task

class Celery:
    conf: _Conf
    amqp: Any
    control: Any
    tasks: Any
    def __init__(self, main: str, *, set_as_current: bool = ...) -> None: ...
    def signature(
        self,
        name: str,
        *,
        args: Sequence[Any],
        immutable: bool,
        queue: str,
        priority: int = ...,
        argsrepr: str,
    ) -> Signature: ...
    def task(self, *, name: str, typing: bool) -> Callable[[Callable[..., None]], Any]: ...
    def connection(self) -> Any: ...
    def connection_for_write(self) -> Any: ...
