"""One worker process: an asyncio loop in a thread of its own, and everything that lives as long as the process.

Celery's threads bring shards; each hands its coroutine to the loop and waits, so many shards overlap and a process
keeps a thousand and more calls in flight. This module is the border between the two colours: what is synchronous
calls `run`, and nothing else crosses.

The heartbeat renews the worker's lease; other rounds learn what people changed (`workers.orders`) and repair what
crashes left behind. When the process is told to stop, calls that are not sent yet stay for others, calls in flight may
finish for a while, and what is then still held is put back.
"""

import asyncio
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog
from celery import Celery
from redis.asyncio import Redis
from redis.exceptions import RedisError

from orchestrator import __version__, broker
from orchestrator.config import ConfigManager
from orchestrator.database import Database, DatabaseUnavailable, fleet
from orchestrator.errors import EnvironmentNotReady
from orchestrator.files import FileManager
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.reports.layouts import save_run
from orchestrator.settings import LLMProviderConfig, Settings
from providers.base import open_provider
from providers.http import open_client
from workers.asking import Gate
from workers.charges import pool_limits
from workers.client import LLMClient
from workers.intake import Ticket
from workers.limiter import Limiter, LimiterUnavailable
from workers.orders import LOOK_S, ChangingLimits, read_orders, set_priorities
from workers.prepared import BudgetIds, PreparedRun, find_run
from workers.reconciler import INTERNAL_ERROR, Reconciler, UnknownOutcomes, warn_of_budgets
from workers.shard import ask_shard
from workers.slots import Slots
from workers.writer import BatchWriter

log = structlog.get_logger(__name__)
T = TypeVar("T")

BROKEN_SHARDS = 3
"""Shards in a row that end in an error of ours before their run is paused: one may be an accident of its moment."""
CONNECTIONS = 12
"""To the database: the writer's, and those of the few threads that read shards, close windows and look after others."""


class Runtime:
    """Everything a worker process owns. Built once, by the first signal that Celery sends (`workers.tasks`).

    Args:
        config: the configuration of this machine.
        app: the Celery application of this process.
        queues: names of the queues this process listens on.
    """

    def __init__(self, config: ConfigManager, app: Celery, queues: Sequence[str]) -> None:
        self._config = config
        self._settings: Settings = config.settings
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{random.getrandbits(24):06x}"
        self._queues = tuple(queues)
        self._database = Database(self._settings.database_url, CONNECTIONS)
        self.orchestrator = WorkflowOrchestrator(self._database, app, self._save_results, f"worker {self.worker_id}")
        self._prepared: dict[int, PreparedRun] = {}
        self._halted: set[int] = set()
        self._at_work: Counter[int] = Counter()
        self._shards: set[broker.ShardMessage] = set()
        self._waits: Counter[str] = Counter()
        self._broken: Counter[int] = Counter()
        self._draining = False
        self._lease_until = 0.0
        self._suspects: set[int] = set()
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, name="calls", daemon=True)
        self._rounds: list[Future[None]] = []
        # Tasks that nobody holds may be collected before they have run.
        self._pausing: set[asyncio.Task[None]] = set()

    @property
    def database(self) -> Database:
        """Where runs live."""
        return self._database

    @property
    def writer(self) -> BatchWriter:
        """Where outcomes go."""
        return self._writer

    @property
    def client(self) -> LLMClient:
        """Who asks."""
        return self._client

    def start(self) -> None:
        """Starts the loop, registers the worker and begins to beat.

        Raises:
            EnvironmentNotReady: database, broker or keys are not there.
        """
        self._loop_thread.start()
        with self._database.transaction() as connection:
            fleet.register(
                connection, self.worker_id, ",".join(self._queues), __version__, self._settings.worker.lease_s
            )
        self._writer = BatchWriter(self._database, self._loop)
        self.run(self._open())
        # Rounds of their own, because a repair may take longer than a lease, and a beat must never wait for it.
        beat_s = self._settings.worker.heartbeat_s
        rounds = (
            (self._beat_once, beat_s),
            (self._look_once, beat_s),
            (self._renew_once, beat_s),
            (self._unknown.look, beat_s),
        )
        for work_to_do, every_s in (*rounds, (self._obey_once, min(beat_s, LOOK_S))):
            self._rounds.append(asyncio.run_coroutine_threadsafe(self._for_ever(work_to_do, every_s), self._loop))
        log.info("worker.started", worker=self.worker_id, queues=list(self._queues))

    def run(self, work_to_do: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for it; called from Celery's threads."""
        return asyncio.run_coroutine_threadsafe(work_to_do, self._loop).result()

    def ask(self, message: broker.ShardMessage, ticket: Ticket) -> None:
        """Asks a shard and waits for its end; a second copy that arrives while the first is at work steps aside."""
        self.run(self._ask(message, ticket))

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which calls are asked."""
        return self._loop

    def note_broken_shard(self, run: int, error: Exception) -> None:
        """Counts shards of a run that ended in an error of ours; the third one pauses the run."""
        self._broken[run] += 1
        if self._broken[run] >= BROKEN_SHARDS:
            told = f"{type(error).__name__}: {error}"[:200]
            self._loop.call_soon_threadsafe(self._stop_run, run, INTERNAL_ERROR, told)

    def stop_claiming(self) -> None:
        """Sends nothing more; what is in flight goes on. Safe to repeat."""
        self._draining = True
        self._loop.call_soon_threadsafe(self._client.end_waits)

    def stop(self) -> None:
        """Puts back what is still held and closes everything. Call it once, when the shards are done or given up."""
        self.stop_claiming()
        for endless in self._rounds:
            endless.cancel()
        self.run(self._close())
        self._writer.stop()
        with self._database.transaction() as connection:
            freed = fleet.sign_off(connection, self.worker_id)
        log.info("worker.stopped", worker=self.worker_id, put_back=freed.calls, unknown=freed.unknown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join()
        self._database.close()

    async def wait_idle(self, seconds: float) -> bool:
        """Waits until no call is in flight; False if there still is one after so many seconds."""
        deadline = self._loop.time() + seconds
        while self._shards and self._loop.time() < deadline:
            await asyncio.sleep(0.05)
        return not self._shards

    async def prepared(self, run: int) -> PreparedRun:
        """The compiled run; read once per process."""
        if run not in self._prepared:
            found = await asyncio.to_thread(self._find_run, run)
            self._prepared.setdefault(run, found)
        return self._prepared[run]

    def may_go_on(self, run: int) -> bool:
        """Whether calls of a run may be sent: neither this process nor, as far as we know, the run is stopping."""
        return not self._draining and run not in self._halted

    async def _ask(self, message: broker.ShardMessage, ticket: Ticket) -> None:
        if message in self._shards or self._draining:
            return
        self._shards.add(message)
        self._at_work[message.window] += 1
        # A run that was stopped and resumed must not be judged by what we remember.
        self._halted.discard(message.run)
        try:
            await ask_shard(self, message, ticket)
            self._broken.pop(message.run, None)
        finally:
            self._shards.discard(message)
            self._at_work[message.window] -= 1
            if not self._at_work[message.window]:
                del self._at_work[message.window]

    def _find_run(self, run: int) -> PreparedRun:
        with self._database.snapshot() as connection:
            return find_run(connection, run)

    async def _open(self) -> None:
        settings = self._settings
        if settings.redis_url is None:
            raise EnvironmentNotReady(())
        self._redis = Redis.from_url(settings.redis_url, socket_timeout=10, socket_connect_timeout=5)  # pyright: ignore[reportUnknownMemberType]  # its keyword arguments have no types
        self._limiter = Limiter(self._redis, f"{settings.queue_prefix}limits:")
        wanted = [name for name in settings.providers if broker.provider_queue(name) in self._queues]
        self._gates = {name: self._gate(self._config.get_llm_config(name)) for name in wanted}
        self._changing_limits = ChangingLimits(self._gates)
        self._client = LLMClient(
            self.worker_id,
            self._writer,
            self._limiter,
            self._gates,
            self.may_go_on,
            self._stop_run,
            self._note_wait,
            self._has_lease,
            settings.worker.lease_s,
            settings.worker.outage_s,
            BudgetIds(self._database),
        )
        self._reconciler = Reconciler(self._database, self.orchestrator, self._redis, self.worker_id, settings)
        self._unknown = UnknownOutcomes(self._database, self._writer, self._gates, self.prepared)
        await self._obey_once()

    def _gate(self, config: LLMProviderConfig) -> Gate:
        key = config.api_keys[0] if config.api_keys else None
        of_each_model, of_all = pool_limits(config)
        return Gate(
            provider=open_provider(config.provider_settings(key), open_client),
            account="none" if key is None else key.fingerprint,
            limits=of_each_model,
            shared=of_all,
            slots=Slots(self._settings.worker.concurrency),
        )

    async def _close(self) -> None:
        await self._limiter.aclose()
        await asyncio.gather(*(gate.provider.aclose() for gate in self._gates.values()))
        await self._redis.aclose()

    def _note_wait(self, reason: str) -> None:
        self._waits[reason] += 1

    def _stop_run(self, run: int, reason: str, detail: str | None = None, limit_nusd: int | None = None) -> None:
        if run in self._halted:
            return
        self._halted.add(run)
        self._client.end_waits(run)
        log.warning("run.stopped", run=run, reason=reason, detail=detail)
        task = self._loop.create_task(self._pause(run, reason, detail, limit_nusd))
        self._pausing.add(task)
        task.add_done_callback(self._pausing.discard)

    async def _pause(self, run: int, reason: str, detail: str | None, limit_nusd: int | None) -> None:
        refused = None if detail is None or limit_nusd is None else (detail, limit_nusd)
        await asyncio.to_thread(
            self.orchestrator.manage_state, run, "paused", reason, sources=("running",), detail=detail, refused=refused
        )
        await asyncio.to_thread(warn_of_budgets, self._database)

    def _save_results(self, run: int) -> None:
        save_run(self._database, FileManager(self._settings.home), run)

    async def _for_ever(self, work_to_do: Callable[[], Coroutine[Any, Any, None]], every_s: float) -> None:
        while True:
            try:
                await work_to_do()
            except (DatabaseUnavailable, LimiterUnavailable, RedisError, OSError, LookupError, ValueError) as error:
                log.warning("worker.round_failed", error=str(error))
            await asyncio.sleep(every_s * random.uniform(0.9, 1.0))

    async def _beat_once(self) -> None:
        waits, self._waits = self._waits, Counter()
        bound_by = self._bound_by(waits)
        lease_until = self._loop.time() + self._settings.worker.lease_s
        held = await asyncio.to_thread(self._beat_in_database, self._client.in_flight, bound_by)
        self._lease_until = lease_until
        await self._free_strays(held)

    async def _obey_once(self) -> None:
        orders = await read_orders(self._database, {message.run for message in self._shards}, set(self._prepared))
        self._halted |= orders.stopped
        for run in orders.stopped:
            self._client.end_waits(run)
        for run in set_priorities(self._prepared, orders.priorities):
            self._client.ask_anew(run)
        if self._changing_limits.apply(orders.overrides):
            self._client.ask_anew()

    async def _free_strays(self, held: set[int]) -> None:
        """Puts back calls that the database says we hold, while nothing here works on them, for the second beat."""
        suspects = held - self._client.at_work.keys()
        strays, self._suspects = suspects & self._suspects, suspects
        if strays:
            log.error("call.forgotten", calls=sorted(strays)[:20], count=len(strays))
            await asyncio.to_thread(self._free_in_database, strays)

    def _free_in_database(self, strays: set[int]) -> None:
        with self._database.transaction() as connection:
            fleet.free_strays(connection, self.worker_id, strays)

    def _has_lease(self) -> bool:
        """A process that slept or could not beat may count as dead; what it claimed then would be freed at once."""
        return self._loop.time() <= self._lease_until

    async def _look_once(self) -> None:
        await self._reconciler.look(set(self._at_work))

    async def _renew_once(self) -> None:
        await self._limiter.renew_all(self._settings.worker.lease_s)

    def _bound_by(self, waits: Counter[str]) -> str | None:
        if held_up := self._client.held_up():
            waits["outage"] = held_up
        if waits:
            return waits.most_common(1)[0][0]
        if self._client.waiting_for_permits:
            return "rate_limit"
        return "provider" if self._client.in_flight else None

    def _beat_in_database(self, in_flight: int, bound_by: str | None) -> set[int]:
        with self._database.transaction() as connection:
            if not fleet.beat(connection, self.worker_id, in_flight, bound_by):
                log.warning("worker.taken_for_dead", worker=self.worker_id)
                fleet.register(
                    connection, self.worker_id, ",".join(self._queues), __version__, self._settings.worker.lease_s
                )
            return fleet.held_calls(connection, self.worker_id)
