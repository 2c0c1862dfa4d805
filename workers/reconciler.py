"""Repairs what crashes leave behind: frees what dead workers held, and publishes again what the broker lost.

Every worker looks once per heartbeat; a lock in the database lets one of them act. All it does is idempotent, so two at
once, after a lock that expired, do no harm.

Redis is asked for two things only. A marker key tells whether the broker still has the data it had: when the
marker is gone (restart without persistence, FLUSHALL), all open windows are published at once. And the lengths of the
queues tell silence that means a loss from silence that means a long queue.
"""

import asyncio
from collections.abc import Iterable

import structlog
from redis.asyncio import Redis

from orchestrator import broker
from orchestrator.database import Database, fleet, runs, windows
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.settings import Settings

log = structlog.get_logger(__name__)

LOCK = "reconciler"
SILENT_S = 5.0
"""Silence of an open window, with empty queues and none of its calls held, after which its messages count as lost."""
SILENT_BEHIND_QUEUE_S = 600.0
"""The same while messages are queued: they are probably its own."""


class Reconciler:
    """Looks after the runs of a database.

    Args:
        owner: who holds the lock: the worker's id.
    """

    def __init__(
        self, database: Database, orchestrator: WorkflowOrchestrator, redis: Redis, owner: str, settings: Settings
    ) -> None:
        self._database = database
        self._orchestrator = orchestrator
        self._redis = redis
        self._owner = owner
        self._lock_s = 3 * settings.worker.heartbeat_s
        self._queues = [settings.queue_prefix + name for name in broker.all_queues(settings.providers)]
        self._marker = f"{settings.queue_prefix}llm-orchestrator:broker-has-its-data"

    async def look(self, at_work: Iterable[int]) -> None:
        """Looks once.

        Args:
            at_work: windows of which this process has shards at work; noted as progress, so that a shard that waits
                for a slow limit is not taken for lost.
        """
        broker_forgot = bool(await self._redis.set(self._marker, "1", nx=True))
        queued = sum([await self._redis.llen(name) for name in self._queues])
        await asyncio.to_thread(self._repair, set(at_work), queued, broker_forgot)

    def _repair(self, at_work: set[int], queued: int, broker_forgot: bool) -> None:
        with self._database.transaction() as connection:
            windows.note_progress(connection, at_work)
            mine = fleet.take_lock(connection, LOCK, self._owner, self._lock_s)
        if broker_forgot:
            # Whoever set the marker acts, lock or no lock: nobody else will learn of the loss.
            published = self._orchestrator.republish()
            if published:
                log.warning("broker.lost_its_data", windows_published=published)
        if not mine:
            return
        with self._database.transaction() as connection:
            freed = fleet.free_dead(connection)
        if freed.workers:
            log.warning("worker.lost", workers=freed.workers, calls_freed=freed.calls, attempts_unknown=freed.unknown)
            # Shards that it had not begun died with it too, and nobody knows which; a second copy does no harm.
            self._orchestrator.republish()
        silent_s = SILENT_BEHIND_QUEUE_S if queued else SILENT_S
        with self._database.snapshot() as connection:
            due = windows.due_or_silent(connection, silent_s)
            idle = runs.idle_runs(connection)
        for window in due:
            self._orchestrator.close_window(window.id, due=True)
        for run in idle:
            self._orchestrator.coordinate_steps(run)
