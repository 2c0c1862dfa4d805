"""The Celery application: queues, task names, routes, and every option with its reason.

Messages carry numbers and nothing else: no prompt, no item, no key. A lost message is published again from the
database, and a message that comes twice finds its calls claimed, so the broker is transport and never the record.

The queue of a provider has several lines, and runs that are at work at the same time stand in different ones, so that
the messages of a small run do not wait behind those of a large one. To kombu a line is a priority, which has a list of
its own in Redis; that one is served before the other is not used (`workers.transport`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery import Celery, chord
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from kombu import Exchange, Queue
from kombu.transport.redis import Channel

MESSAGE_VERSION = 1
"""First argument of every task; a worker drops a message whose version it does not know."""
ASK_SHARD = "llm_orchestrator.ask_shard"
CLOSE_WINDOW = "llm_orchestrator.close_window"
TASK_NAMES = (ASK_SHARD, CLOSE_WINDOW)
CONTROL_QUEUE = "control"
PROVIDER_QUEUE_PREFIX = "llm."
LINES = 10
"""Lines of a provider's queue: as many as kombu knows priorities."""

CONTROL_THREADS = 2
"""Threads beyond the shards', so that windows are closed while all others wait for providers."""
VISIBILITY_TIMEOUT_S = 4 * 3600
"""Longer than any call's deadline. Recovery of a dead worker's calls is by the database's leases, within seconds;
redelivery by the broker would only ask for calls that are still being worked on."""


@dataclass(frozen=True, slots=True)
class ShardMessage:
    """What `ask_shard` gets: numbers and the names of a step and a provider."""

    run: int
    window: int
    round: int
    step: str
    provider: str
    first: int
    last: int

    def args(self) -> list[Any]:
        """Positional arguments of the task."""
        return [
            MESSAGE_VERSION,
            self.run,
            self.window,
            self.round,
            self.step,
            self.provider,
            self.first,
            self.last,
        ]


class LeanBackend(RedisBackend):
    """Chord counters without subscriptions.

    The stock backend subscribes to one channel per header task when a chord is published, although nobody here waits
    for a result: thousands of subscriptions in the producer, and memory that grows with the run.
    """

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Does nothing: nobody waits for this result."""
        return result

    def add_pending_results(self, results: Any, weak: bool = False) -> None:
        """Does nothing: nobody waits for these results."""

    def remove_pending_result(self, result: Any) -> Any:
        """Does nothing: there was nothing to remove."""
        return result

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        """Does nothing: the stock backend would subscribe to the task's channel here."""
        return {}


def provider_queue(provider: str) -> str:
    """The queue on which the workers of a provider listen."""
    return f"{PROVIDER_QUEUE_PREFIX}{provider}"


def has_lines(queue: str) -> bool:
    """Whether a queue has lines; that of the windows has none, because a window is a matter of moments."""
    return queue.startswith(PROVIDER_QUEUE_PREFIX)


def queue_keys(queue: str, prefix: str = "") -> tuple[str, ...]:
    """The lists in Redis that make up a queue.

    Args:
        queue: its name.
        prefix: of all keys of the installation.
    """
    others = range(1, LINES) if has_lines(queue) else ()
    return (f"{prefix}{queue}", *(f"{prefix}{queue}{Channel.sep}{line}" for line in others))


def all_queues(providers: Iterable[str]) -> tuple[str, ...]:
    """Every queue of an installation: the control queue, then one per provider."""
    return (CONTROL_QUEUE, *(provider_queue(name) for name in providers))


def worker_command(queues: Iterable[str], threads: int, name: str) -> list[str]:
    """Arguments for the Python interpreter that start a worker process.

    Args:
        queues: to listen on.
        threads: shards that it works on at the same time.
        name: before the `@` of the worker's Celery name.
    """
    return [
        # Quiet: no banner between the lines of the log.
        *("-m", "celery", "-A", "workers.app", "--quiet", "worker"),
        # Threads: each waits for a shard that runs on the process's one asyncio loop.
        *("--pool", "threads", "--concurrency", str(threads + CONTROL_THREADS)),
        *("--queues", ",".join(queues), "--hostname", f"{name}@%h"),
        # Nobody needs workers to gossip: fewer channels, faster start.
        *("--without-mingle", "--without-gossip"),
    ]


def make_app(redis_url: str, providers: Sequence[str], prefix: str = "") -> Celery:
    """Builds the application that producers, workers and Flower share.

    Args:
        redis_url: `redis://`, `rediss://` or `unix:///path?db=0`.
        providers: names of the configured providers.
        prefix: put in front of every key, for several installations on one Redis.
    """
    app = Celery("llm_orchestrator", set_as_current=False)
    app.conf.update(
        broker_url=_kombu_url(redis_url),
        result_backend=_backend_url(redis_url),
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "priority_steps": list(range(LINES)),
            "global_keyprefix": prefix,
            # Without a timeout a publish over a dead link waits for ever.
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 15,
            "max_connections": 50,
            "unacked_restore_limit": 100,
        },
        result_backend_transport_options={"global_keyprefix": prefix},
        redis_socket_timeout=10,
        redis_socket_connect_timeout=5,
        redis_retry_on_timeout=True,
        redis_backend_health_check_interval=15,
        # JSON only: a pickled message would be code execution for whoever reaches the broker.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_protocol=2,
        # Late, so that a message of a killed worker is not gone; calls are protected by their claims.
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        # Results are rows; Redis keeps only the counters of chords, long enough for a run that waits for days.
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        result_expires=14 * 24 * 3600,
        result_extended=False,
        task_track_started=False,
        # Off until somebody watches: Flower switches the workers' events on by remote control, and until then they
        # would be a tenth of what a shard costs.
        worker_send_task_events=False,
        task_send_sent_event=False,
        # Our own limiter paces calls; Celery's would keep waiting messages in memory.
        worker_disable_rate_limits=True,
        # A misspelt queue must be an error and not a queue that nobody reads.
        task_create_missing_queues=False,
        task_queues=[Queue(name, Exchange("llm", "direct"), routing_key=name) for name in all_queues(providers)],
        task_default_queue=CONTROL_QUEUE,
        task_default_exchange="llm",
        task_default_routing_key=CONTROL_QUEUE,
        task_publish_retry_policy={"max_retries": 8, "interval_start": 0.2, "interval_step": 0.5, "interval_max": 3},
        broker_connection_retry_on_startup=True,
        # None is for ever: the default gives up after 100 tries and takes the worker with it.
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
        # Calls in flight are paid for; they go on while the broker is away.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=True,
        enable_utc=True,
    )
    return app


def ask_shard(app: Celery, message: ShardMessage, runs_before: int) -> Signature:
    """The task that asks one shard, on its provider's queue.

    Args:
        app: the application.
        message: which shard.
        runs_before: runs at work that are older than the message's: they stand in the lines before. While there are not
            more runs than lines, none shares its line; one that moves up is served from both lines for a while.
    """
    return app.signature(
        ASK_SHARD,
        args=message.args(),
        immutable=True,
        queue=provider_queue(message.provider),
        priority=runs_before % LINES,
        argsrepr=f"run {message.run}, window {message.window}, items {message.first}-{message.last}",
    )


def close_window(app: Celery, window: int) -> Signature:
    """The task that looks at a window in the database and does what comes next, on the control queue."""
    return app.signature(
        CLOSE_WINDOW,
        args=[MESSAGE_VERSION, window],
        immutable=True,
        queue=CONTROL_QUEUE,
        argsrepr=f"window {window}",
    )


def publish_canvas(app: Celery, groups: Sequence[Sequence[Signature]], last: Signature) -> None:
    """Publishes groups one after the other and then the last task: a chain of chords.

    Raises:
        kombu.exceptions.OperationalError: the broker cannot be reached; the reconciler publishes again later.
    """
    canvas: Any = last
    for group in reversed(groups):
        # Every header task carries the rest of the canvas, so the number of levels is bounded by planning.
        canvas = chord(list(group), canvas, app=app)
    canvas.apply_async()


def _kombu_url(redis_url: str) -> str:
    parts = urlsplit(redis_url)
    if parts.scheme == "unix":
        return f"redis+socket://{parts.path}?virtual_host={_unix_db(parts.query)}"
    return redis_url


def _backend_url(redis_url: str) -> str:
    lean = f"{__name__}:{LeanBackend.__name__}"
    parts = urlsplit(redis_url)
    if parts.scheme == "unix":
        return f"{lean}+socket://{parts.path}?virtual_host={_unix_db(parts.query)}"
    return f"{lean}+{redis_url}"


def _unix_db(query: str) -> str:
    return parse_qs(query).get("db", ["0"])[0]
