from collections.abc import Sequence
from typing import Any

from celery import Celery

class Signature:
    def apply_async(self) -> Any: ...

class chord(Signature):
    def __init__(self, header: Sequence[Signature], body: Signature, *, app: Celery) -> None: ...

class group(Signature): ...
