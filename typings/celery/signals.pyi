from collections.abc import Callable
from typing import Any

class Signal:
    def connect(self, receiver: Callable[..., None], *, weak: bool) -> Any: ...

setup_logging: Signal
worker_init: Signal
worker_ready: Signal
worker_shutdown: Signal
worker_shutting_down: Signal
