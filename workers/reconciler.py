"""Repairs what crashes leave behind: frees what dead workers held, and publishes again what the broker lost.

Where providers can tell, it also corrects what was booked for attempts of unknown outcome, and it warns of budgets
that are nearly used.

Every worker looks once per heartbeat; a lock in the database lets one of them act. All it does is idempotent, so two at
once, after a lock that expired, do no harm.

Redis is asked for two things only. A marker key tells whether the broker still has the data it had: when the
marker is gone (restart without persistence, FLUSHALL), all open windows are published at once. And the lengths of the
queues tell silence that means a loss from silence that means a long queue. When nothing at all moves although messages
wait, that is a stall: it is logged, and the windows are published again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from itertools import chain, islice
from time import monotonic

import structlog
from redis.asyncio import Redis

from orchestrator import broker
from orchestrator.database import (
    AnyRow,
    Connection,
    Database,
    batches,
    budgets,
    clock,
    fleet,
    ledger,
    runs,
    speed,
    windows,
)
from orchestrator.database.runs import CallEnd
from orchestrator.money import usd, usd_or_none
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.settings import Settings
from providers.base import LooksUp, NotSupported
from providers.errors import ProviderError
from providers.messages import ChatReply, Usage
from workers.asking import Gate, booked_cost
from workers.outcomes import MAX_KEPT_RESPONSE
from workers.prepared import PreparedRun
from workers.writer import BatchWriter

log = structlog.get_logger(__name__)

LOCK = "reconciler"
INTERNAL_ERROR = "internal_error"
"""Why a run is paused that a bug of ours, or data of another release, keeps from going on."""
SILENT_S = 5.0
"""Silence of an open window, with none of its calls held and no message in its queues, after which its messages count
as lost."""
SILENT_BEHIND_QUEUE_S = 600.0
"""The same while messages wait in its queues: they are probably its own."""
LOOKS_PER_ROUND = 20
"""Attempts of unknown outcome that one process asks about per heartbeat."""
LOOK_TIMEOUT_S = 10.0
NO_FENCE = -1


def warn_of_budgets(database: Database) -> None:
    """Logs every budget of which so much is used that people should know; once per budget and limit."""
    with database.transaction() as connection:
        nearly_used = budgets.warn_once(connection)
    for budget in nearly_used:
        limit = usd_or_none(budget.limit_nusd)
        log.warning("budget.nearly_used", scope=budget.scope, used_usd=usd(budget.used_nusd()), limit_usd=limit)


class UnknownOutcomes:
    """Asks providers that can tell what became of attempts of unknown outcome, and books what they say.

    Only the money is corrected: the answer is not taken, because the call has gone on since.

    Args:
        gates: the providers of this process, by name.
        prepared: gives the compiled run, for its prices.
    """

    def __init__(
        self,
        database: Database,
        writer: BatchWriter,
        gates: Mapping[str, Gate],
        prepared: Callable[[int], Awaitable[PreparedRun]],
    ) -> None:
        self._database = database
        self._writer = writer
        self._gates = gates
        self._prepared = prepared
        self._cannot_tell: set[str] = set()

    async def look(self) -> None:
        """Looks once; each attempt is asked about a few times, less and less often."""
        asked = [
            name
            for name, gate in self._gates.items()
            if name not in self._cannot_tell and isinstance(gate.provider, LooksUp)
        ]
        if not asked:
            return
        for row in await asyncio.to_thread(self._due, asked):
            provider = self._gates[row.provider].provider
            if row.provider not in self._cannot_tell and isinstance(provider, LooksUp):
                await self._settle(provider, row)

    def _due(self, providers: list[str]) -> list[AnyRow]:
        with self._database.transaction() as connection:
            return fleet.to_look_up(connection, providers, LOOKS_PER_ROUND)

    async def _settle(self, provider: LooksUp, row: AnyRow) -> None:
        attempt_id = f"{row.run_id}/{row.prompt_execution_id}/{row.number}"
        try:
            reply = await provider.look_up(attempt_id, LOOK_TIMEOUT_S)
        except ProviderError as error:
            log.info("attempt.look_failed", attempt=attempt_id, error=error.message)
            return
        if isinstance(reply, NotSupported):
            self._cannot_tell.add(row.provider)
            return
        if reply is None or reply.usage is None:
            return
        routes = (await self._prepared(row.workflow_execution_id)).kit(row.step).routes
        route = next((one for one in routes if (one.provider, one.model) == (row.provider, row.model)), None)
        if route is not None:
            await self._writer.settle(self._settlement(row, reply, reply.usage, booked_cost(route, reply, reply.usage)))
            log.info("attempt.settled_late", attempt=attempt_id)

    def _settlement(self, row: AnyRow, reply: ChatReply, usage: Usage, cost: int) -> batches.Settlement:
        booked = ledger.Usage(
            status="ok",
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            cost_nusd=cost,
            request_id=reply.request_id,
            model_answered=reply.model,
            error_message="the provider told afterwards what became of it",
            response=reply.text[:MAX_KEPT_RESPONSE],
        )
        # Nobody holds a call under this fence, so the call itself is not touched.
        return batches.Settlement(row.prompt_execution_id, row.number, NO_FENCE, "", booked, CallEnd("pending"))


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
        self._stall_s = settings.worker.stall_s
        self._began_at = monotonic()
        self._told: set[int] = set()
        self._told_runs: set[int] = set()
        self._prefix = settings.queue_prefix
        self._queues = broker.all_queues(settings.providers)
        self._marker = f"{settings.queue_prefix}llm-orchestrator:broker-has-its-data"

    async def look(self, at_work: Iterable[int]) -> None:
        """Looks once.

        Args:
            at_work: windows of which this process has shards at work; noted as progress, so that a shard that waits
                for a slow limit is not taken for lost.
        """
        broker_forgot = bool(await self._redis.set(self._marker, "1", nx=True))
        queued = await self._lengths()
        await asyncio.to_thread(self._repair, set(at_work), queued, broker_forgot)

    async def _lengths(self) -> dict[str, int]:
        """How many messages wait in each queue."""
        keys = {name: broker.queue_keys(name, self._prefix) for name in self._queues}
        asked = self._redis.pipeline(transaction=False)
        for key in chain.from_iterable(keys.values()):
            asked.llen(key)
        lengths = iter(await asked.execute())
        return {name: sum(islice(lengths, len(of_queue))) for name, of_queue in keys.items()}

    def _repair(self, at_work: set[int], queued: Mapping[str, int], broker_forgot: bool) -> None:
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
        warn_of_budgets(self._database)
        self._begin_day()
        with self._database.transaction() as connection:
            freed = fleet.free_dead(connection, self._owner)
        if freed.workers:
            log.warning("worker.lost", workers=freed.workers, calls_freed=freed.calls, attempts_unknown=freed.unknown)
            # Shards that it had not begun died with it too, and nobody knows which; a second copy does no harm.
            self._orchestrator.republish()
        with self._database.snapshot() as connection:
            due = windows.due_or_silent(connection, SILENT_S)
            lost = self._lost(connection, [window for window in due if window.silence_s is not None], queued)
            idle = runs.idle_runs(connection)
            waiting = windows.runs_with_pending(connection)
            self._tell_of_producers(connection)
        for window in due:
            if window.silence_s is None or window.id in lost:
                self._tend(window.run, partial(self._orchestrator.close_window, window.id, due=True))
        for run in idle:
            self._tend(run, partial(self._orchestrator.coordinate_steps, run))
        for row in waiting:
            self._tend(row.id, partial(self._orchestrator.fill_lanes, row))

    def _begin_day(self) -> None:
        """Lets runs go on that were paused for the budget of a day which is over."""
        with self._database.snapshot() as connection:
            waiting = budgets.runs_of_past_days(connection, clock(connection))
        for run in waiting:
            log.info("run.day_began", run=run)
            self._tend(run, partial(self._orchestrator.manage_state, run, "running", None, sources=("paused",)))

    def _lost(self, connection: Connection, silent: list[AnyRow], queued: Mapping[str, int]) -> set[int]:
        """Those of the silent windows that must be published again: messages are lost, or nobody takes them."""
        lost: set[int] = set()
        stalled: set[int] = set()
        served = fleet.queues_served(connection) if silent else set[str]()
        still_s = min(windows.stillness_s(connection), monotonic() - self._began_at) if silent else 0.0
        for window in silent:
            providers = windows.providers_waited_for(connection, window.id)
            needed = {broker.CONTROL_QUEUE, *(broker.provider_queue(name) for name in providers)}
            waiting = sum(queued.get(name, 0) for name in needed)
            told = {"run": window.run, "window": window.id, "silent_s": round(window.silence_s, 1)}
            if not waiting:
                log.warning("window.silent", **told)
                lost.add(window.id)
            elif min(still_s, window.silence_s) >= self._stall_s:
                stalled.add(window.id)
                nobody_listens = sorted(needed - served)
                if window.id not in self._told:
                    log.error("work.stalled", **told, messages=waiting, nobody_listens=nobody_listens)
                if not nobody_listens:
                    lost.add(window.id)
            elif window.silence_s >= SILENT_BEHIND_QUEUE_S:
                lost.add(window.id)
        self._told = stalled
        return lost

    def _tell_of_producers(self, connection: Connection) -> None:
        """Says once of a run that its items do not come any more: only whoever has them can go on."""
        for run in speed.without_producer(connection, self._stall_s):
            if run.id not in self._told_runs:
                self._told_runs.add(run.id)
                log.warning("run.producer_silent", run=run.run_id, hint="repeat its `run` command to store the rest")

    def _tend(self, run: int, move: Callable[[], object]) -> None:
        """Moves one run; one that cannot be understood is paused, so that the others are looked after all the same."""
        try:
            move()
        except OSError as error:
            # Its result files cannot be written now. It is tried again, and the others do not wait for that.
            log.warning("run.not_moved", run=run, error=str(error))
        except (LookupError, ValueError) as error:
            log.error("run.not_understood", run=run, error=str(error))
            sources = ("pending", "running")
            self._orchestrator.manage_state(run, "paused", INTERNAL_ERROR, sources=sources, detail=str(error)[:200])
