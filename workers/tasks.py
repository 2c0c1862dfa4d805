"""The tasks: numbers in, None out. They never raise for the fault of a call and keep no result.

Celery's signals bound the life of the process's `Runtime`: it is built before the first message is taken, and put
away after the last one is done.
"""

import gc
import os
import threading
from collections.abc import Sequence
from typing import Any

import structlog
from celery import Celery, current_task
from celery.signals import worker_init, worker_ready, worker_shutdown, worker_shutting_down
from redis import Redis
from redis.exceptions import RedisError

from orchestrator import broker
from orchestrator.config import ConfigManager
from orchestrator.database import DatabaseUnavailable
from workers.intake import Intake
from workers.runtime import Runtime
from workers.watchdog import Watchdog

log = structlog.get_logger(__name__)

ENVIRONMENT_ERRORS = (DatabaseUnavailable, RedisError, OSError)

GARBAGE_THRESHOLD = 5_000
"""New objects between two rounds over the youngest; Python's own 700 suits programs with fewer of them."""


def register(app: Celery, config: ConfigManager, intake: Intake) -> None:
    """Registers the tasks on an application and ties the runtime to the worker's life.

    Args:
        app: the application.
        config: the configuration.
        intake: what the transport of this process takes messages by.
    """
    life = _Life(app, config, intake)
    # Bound methods count their self as an argument, so the check of the number of arguments is ours.
    app.task(name=broker.ASK_SHARD, typing=False)(life.ask_shard)
    app.task(name=broker.CLOSE_WINDOW, typing=False)(life.close_window)
    worker_init.connect(life.begin, weak=False)
    worker_ready.connect(life.tell_ready, weak=False)
    worker_shutting_down.connect(life.drain, weak=False)
    worker_shutdown.connect(life.end, weak=False)


class _Life:
    """The runtime of this process, from the first signal to the last."""

    def __init__(self, app: Celery, config: ConfigManager, intake: Intake) -> None:
        self._app = app
        self._config = config
        self._intake = intake
        self._runtime: Runtime | None = None
        self._watchdog: Watchdog | None = None

    def ask_shard(self, version: int, *numbers: Any) -> None:
        """Task: ask one shard."""
        if version != broker.MESSAGE_VERSION or self._runtime is None:
            log.error("message.dropped", task=broker.ASK_SHARD, version=version)
            return
        message = broker.ShardMessage(*numbers)
        ticket = self._intake.ticket(current_task.request.properties["delivery_tag"])
        try:
            self._runtime.ask(message, ticket)
        except ENVIRONMENT_ERRORS:
            # The database or the broker is away: the reconciler asks for the shard again.
            raise
        except Exception as error:
            # An entry point: whatever it is, its run must not go on for ever without a word.
            self._runtime.note_broken_shard(message.run, error)
            raise
        finally:
            ticket.end()

    def close_window(self, version: int, window: int) -> None:
        """Task: look at a window and do what comes next."""
        if version != broker.MESSAGE_VERSION or self._runtime is None:
            log.error("message.dropped", task=broker.CLOSE_WINDOW, version=version)
            return
        self._runtime.orchestrator.close_window(window)

    def begin(self, sender: Any = None, **_: Any) -> None:
        """Signal: the worker is about to start."""
        queues = [str(name) for name in sender.app.amqp.queues.consume_from]
        self._runtime = Runtime(self._config, self._app, queues)
        self._runtime.start()
        self._watchdog = self._watch(self._runtime, queues)
        _spare_the_collector()

    def tell_ready(self, **_: Any) -> None:
        """Signal: the worker listens on its queues."""
        if self._runtime is not None:
            log.info("worker.ready", worker=self._runtime.worker_id)

    def drain(self, **_: Any) -> None:
        """Signal: the worker was told to stop. What takes too long is ended, so that the shutdown has an end."""
        if self._runtime is None:
            return
        self._stop_watching()
        self._runtime.stop_claiming()
        grace_s = self._config.settings.worker.drain_s
        threading.Thread(target=self._give_up_after, args=(grace_s,), name="drain", daemon=True).start()

    def end(self, **_: Any) -> None:
        """Signal: all tasks are done."""
        self._stop_watching()
        if self._runtime is not None:
            self._runtime.stop()
            self._runtime = None

    def _watch(self, runtime: Runtime, queues: Sequence[str]) -> Watchdog:
        settings = self._config.settings
        return Watchdog(
            Redis.from_url(settings.redis_url or "", socket_timeout=10, socket_connect_timeout=5),  # pyright: ignore[reportUnknownMemberType]  # its keyword arguments have no types
            [key for name in queues for key in broker.queue_keys(name, settings.queue_prefix)],
            runtime.loop,
            stall_s=settings.worker.stall_s,
            every_s=settings.worker.heartbeat_s,
            give_up=self._leave,
        )

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()

    def _leave(self, loop_answers: bool) -> None:
        """Ends a process that stands still; in good order, if it still can, and for its supervisor to replace."""
        runtime = self._runtime
        if runtime is not None and loop_answers:
            runtime.stop_claiming()
            runtime.run(runtime.wait_idle(self._config.settings.worker.drain_s))
            runtime.stop()
        os._exit(1)

    def _give_up_after(self, grace_s: float) -> None:
        runtime = self._runtime
        if runtime is None or runtime.run(runtime.wait_idle(grace_s)):
            return
        # Threads cannot be ended from outside. What they hold goes back, and the process leaves as it would after a
        # crash, only in good order.
        log.warning("worker.drain_timed_out", grace_s=grace_s)
        runtime.stop()
        os._exit(0)


def _spare_the_collector() -> None:
    """Takes what was loaded so far out of the garbage collector's rounds: it lives as long as the process.

    Walking it again and again was a fifth of a worker's processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
