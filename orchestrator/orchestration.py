"""WorkflowOrchestrator: looks at a run in the database and does whatever comes next.

There is one way forward, `coordinate_steps`, and everybody takes it: the producer after storing items, the task that
closes a window, the reconciler, and a user who resumes. It decides inside one transaction that holds the run's row,
and publishes after the commit. Doing it twice is harmless, and not doing it is repaired by the reconciler.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from orchestrator import broker, planning
from orchestrator.database import AnyRow, Connection, Database, audit, budgets, intake, reports, runs, windows, work
from orchestrator.database.audit import Change
from orchestrator.judging.ranking import Scored, rank
from orchestrator.planning import OpenCall, Segment
from orchestrator.runspec import RunSpec
from orchestrator.workflow import Step

log = structlog.get_logger(__name__)

IDLE_ROUND_S = 2.0
"""Pause before another round when the last one moved nothing: what it waits for takes at least that long."""


@dataclass(frozen=True, slots=True)
class Publication:
    """A round of a window, decided and not yet published.

    Attributes:
        runs_before: older runs that were at work when it was decided.
    """

    run: int
    runs_before: int
    window: int
    round: int
    groups: tuple[tuple[planning.Shard, ...], ...]


@lru_cache(maxsize=64)
def read_spec(text: str) -> RunSpec:
    """A run's pinned spec; parsed once per process."""
    return RunSpec.from_json(text)


class WorkflowOrchestrator:
    """Moves runs forward.

    Args:
        database: where runs live.
        app: the Celery application to publish through.
        on_finish: called with the number of a run whose steps are all done, before its status says so; writes
            result files. It may be called again for the same run after a crash. None leaves ending runs to others.
        actor: who moves runs, for the audit log.
    """

    def __init__(
        self,
        database: Database,
        app: Celery,
        on_finish: Callable[[int], None] | None = None,
        actor: str = "llm-orchestrator",
    ) -> None:
        self._database = database
        self._app = app
        self._on_finish = on_finish
        self._actor = actor
        self._finishing: set[int] = set()
        self._finishing_lock = threading.Lock()

    def orchestrate(self, run: int) -> None:
        """Begins a stored run, or takes it up again where it stands. Safe to repeat."""
        with self._database.transaction() as connection:
            runs.move_run(connection, run, "running", None, sources=("pending",))
        self.coordinate_steps(run)

    def coordinate_steps(self, run: int) -> None:
        """Does whatever the database says comes next for a run. Safe to repeat and to do at the same time."""
        again = True
        while again:
            with self._database.transaction() as connection:
                row = runs.lock_run(connection, run)
                if row.status != "running":
                    return
                again, publications = self._advance(connection, row)
            self._publish(publications)
            if row.phase == "finish" and self._on_finish is not None:
                self._finish(run, self._on_finish)

    def close_window(self, window: int, *, due: bool = False) -> None:
        """Looks at the calls of an open window: closes it, or arranges another round over those that are open.

        Args:
            window: number of the window; one that is closed, deleted or of a paused run is left alone.
            due: the time it waited for has come, so publish even if nothing has moved.
        """
        publications: list[Publication] = []
        with self._database.transaction() as connection:
            found = self._open_window(connection, window)
            if found is None:
                return
            run, row = found
            calls = runs.open_calls(connection, window)
            if not calls:
                windows.close_done(connection, window)
            elif due or self._moved(row, calls):
                publications.append(self._next_round(connection, run, row, calls))
            else:
                windows.wake_in(connection, window, _patience(calls))
        self._publish(publications)
        if not publications:
            self.coordinate_steps(run.id)

    def manage_state(
        self,
        run: int,
        to: runs.RunStatus,
        reason: str | None,
        *,
        sources: Sequence[runs.RunStatus],
        detail: str | None = None,
        refused: tuple[str, int] | None = None,
    ) -> bool:
        """Moves a run to another status if it is in one of the `sources`; cancelling ends its pending calls.

        What people ask for is in `orchestrator.control`; this is for what the machinery finds out by itself.

        Args:
            run: its number.
            to: the new status.
            reason: why, a code; None where the status says it all.
            sources: the statuses that it may come from.
            detail: more about the reason; None for nothing.
            refused: the budget that is the reason, by scope, and its limit when it refused, nano-USD. Under another
                limit it is no reason any more: a worker may tell this after somebody let the run go on with more.

        Returns:
            Whether it moved. Workers notice within a heartbeat.
        """
        with self._database.transaction() as connection:
            row = runs.lock_run(connection, run)
            if refused is not None and budgets.find_budget(connection, refused[0]).limit_nusd != refused[1]:
                return False
            moved = runs.move_run(connection, run, to, reason, sources=sources, detail=detail)
            if moved and to == "cancelled":
                runs.cancel_calls(connection, run)
            if moved:
                new = {"status": to, "reason": reason}
                change = Change(self._actor, f"run.{to}", row.run_id, old={"status": row.status}, new=new)
                audit.append(connection, change)
        if moved and to == "running":
            self.republish(run)
        return moved

    def republish(self, run: int | None = None) -> int:
        """Publishes a round of every open window of running runs: after a resume, or when the broker lost its data.

        Returns:
            How many windows were published. Calls that are held by live workers are not asked twice.
        """
        with self._database.snapshot() as connection:
            found = windows.open_of_running_runs(connection, run)
        for window in found:
            self.close_window(window, due=True)
        if run is not None:
            self.coordinate_steps(run)
        return len(found)

    def report_progress(self, run: int) -> dict[str, Any]:
        """The status object of a run."""
        with self._database.snapshot() as connection:
            return reports.status(connection, run)

    def _advance(self, connection: Connection, row: AnyRow) -> tuple[bool, list[Publication]]:
        """Moves a locked run by one stage; True if there is more to do at once."""
        spec = read_spec(row.spec)
        segments = planning.segments(spec.workflow)
        match row.phase:
            case "items":
                opened = self._fill_lanes(connection, row, spec, segments[int(row.segment)])
                if opened or not row.input_complete or windows.has_unclosed(connection, row.id, row.segment):
                    return False, opened
                runs.set_stage(connection, row.id, segment=row.segment, phase="reduce", reduce_index=0)
                return True, []
            case "reduce":
                return self._reduce(connection, row, spec, segments)
            case _:
                return False, []

    def fill_lanes(self, run: AnyRow) -> None:
        """Opens further windows of a run of which none was closed, when the open ones wait for few calls.

        Slow calls keep a window open for as long as they take; the lane goes on without them. Safe to repeat.

        Args:
            run: its id, segment and spec (`windows.runs_with_pending`).
        """
        with self._database.snapshot() as connection:
            free = _free_lanes(connection, run.id, read_spec(run.spec), int(run.segment))
        if free:
            self.coordinate_steps(run.id)

    def _fill_lanes(self, connection: Connection, row: AnyRow, spec: RunSpec, segment: Segment) -> list[Publication]:
        free = _free_lanes(connection, row.id, spec, segment.number)
        return [
            # A window that was open before has its calls: it waits for a lane again after a retry.
            self._open(connection, row, window, [] if window.round else _item_calls(row.id, spec, segment, window))
            for window in windows.next_pending(connection, row.id, segment.number, free)
        ]

    def _open(self, connection: Connection, run: AnyRow, window: AnyRow, calls: list[dict[str, Any]]) -> Publication:
        windows.open_pending(connection, window.id, calls)
        return self._next_round(connection, run, window, runs.open_calls(connection, window.id))

    def _next_round(self, connection: Connection, run: AnyRow, window: AnyRow, calls: Sequence[AnyRow]) -> Publication:
        spec = read_spec(run.spec)
        segment = planning.segments(spec.workflow)[int(window.segment)]
        wanted = [OpenCall(call.prompt_name, call.item_ordinal, call.llm_provider) for call in calls]
        size = planning.shard_size_for(len(wanted), spec.shard_size)
        number = windows.note_published(connection, window.id)
        before = windows.running_before(connection, run.id)
        return Publication(run.id, before, window.id, number, planning.canvas(segment, wanted, size))

    def _reduce(
        self, connection: Connection, row: AnyRow, spec: RunSpec, segments: Sequence[Segment]
    ) -> tuple[bool, list[Publication]]:
        segment = segments[int(row.segment)]
        if int(row.reduce_index) >= len(segment.reduces):
            self._begin_segment(connection, row, spec, segments)
            return True, []
        step = spec.workflow.step(segment.reduces[int(row.reduce_index)])
        if not step.asks():
            self._rank(connection, row, spec, step)
        else:
            window = windows.find_reduce(connection, row.id, row.segment, step.name)
            if window is None:
                return False, [self._ask_reduce(connection, row, spec, step)]
            if window.status == "pending":
                return False, [self._open(connection, row, window, [])]
            if window.status != "closed":
                return False, []
        runs.set_stage(connection, row.id, segment=row.segment, phase="reduce", reduce_index=row.reduce_index + 1)
        return True, []

    def _begin_segment(self, connection: Connection, row: AnyRow, spec: RunSpec, segments: Sequence[Segment]) -> None:
        following = int(row.segment) + 1
        if following >= len(segments):
            runs.set_stage(connection, row.id, segment=row.segment, phase="finish", reduce_index=0)
            return
        if segments[following].levels and not windows.has_windows(connection, row.id, following):
            ranges = planning.windows(0, row.items_total - 1, spec.window_size)
            intake.add_windows(connection, row.id, following, ranges)
        runs.set_stage(connection, row.id, segment=following, phase="items", reduce_index=0)

    def _ask_reduce(self, connection: Connection, row: AnyRow, spec: RunSpec, step: Step) -> Publication:
        (window_id,) = intake.add_windows(connection, row.id, row.segment, [(-1, -1)], step.name)
        window = windows.find(connection, window_id)
        if window is None:
            raise LookupError(f"window {window_id} does not exist")
        return self._open(connection, row, window, [_call_row(row.id, spec, step, -1, 0)])

    def _rank(self, connection: Connection, row: AnyRow, spec: RunSpec, step: Step) -> None:
        reduce = step.reduce
        if reduce is None or reduce.step is None:
            raise LookupError(f"step {step.name!r} has no rule to rank by")
        fields = {*(reduce.weights or {}), *reduce.tie_break}
        scored = (
            Scored(ordinal, key, _numbers(values, fields))
            for ordinal, key, values in work.completed_answers(connection, row.id, reduce.step)
        )
        ranked = rank(scored, reduce.weights or {}, reduce.tie_break)
        work.save_ranking(connection, row.id, step.name, ((one.ordinal, one.rank, one.score) for one in ranked))

    def _open_window(self, connection: Connection, window: int) -> tuple[AnyRow, AnyRow] | None:
        found = windows.find(connection, window)
        if found is None:
            return None
        run = runs.lock_run(connection, found.workflow_execution_id)
        # Read again under the lock: somebody may have closed it meanwhile.
        row = windows.find(connection, window)
        return (run, row) if row is not None and run.status == "running" and row.status == "open" else None

    def _moved(self, window: AnyRow, calls: Sequence[AnyRow]) -> bool:
        """Whether another round at once makes sense: calls were settled since the last one, and some can be claimed."""
        ready = any(call.status == "pending" and (call.waits_s is None or call.waits_s <= 0) for call in calls)
        return ready and (window.progress_at or 0) >= (window.published_at or 0)

    def _publish(self, publications: Sequence[Publication]) -> None:
        for one in publications:
            groups = [
                [
                    broker.ask_shard(
                        self._app,
                        broker.ShardMessage(
                            one.run, one.window, one.round, shard.step, shard.provider, shard.first, shard.last
                        ),
                        one.runs_before,
                    )
                    for shard in group
                ]
                for group in one.groups
            ]
            try:
                broker.publish_canvas(self._app, groups, broker.close_window(self._app, one.window))
            except OperationalError as error:
                # The round is noted and the database is the truth: the reconciler publishes it once the broker is back.
                log.warning("window.publish_failed", run=one.run, window=one.window, error=str(error))
            else:
                log.info("window.published", run=one.run, window=one.window, round=one.round)

    def _finish(self, run: int, save: Callable[[int], None]) -> None:
        with self._finishing_lock:
            if run in self._finishing:
                # Another thread of this process is writing the same files.
                return
            self._finishing.add(run)
        try:
            save(run)
            self._end(run)
        finally:
            with self._finishing_lock:
                self._finishing.discard(run)

    def _end(self, run: int) -> None:
        with self._database.transaction() as connection:
            row = runs.lock_run(connection, run)
            outcome = reports.outcome(connection, run)
            if row.phase == "finish" and runs.move_run(
                connection, run, outcome.status, outcome.reason, sources=("running",)
            ):
                log.info("run.ended", run=row.run_id, status=outcome.status, reason=outcome.reason)


def _free_lanes(connection: Connection, run: int, spec: RunSpec, number: int) -> int:
    open_windows = windows.count_open(connection, run)
    if open_windows < spec.lanes:
        return spec.lanes - open_windows
    segment = planning.segments(spec.workflow)[number]
    found = windows.open_calls_by_step(connection, run, number)
    busy = sum(not planning.is_trailing(segment, items, open_calls) for items, open_calls in found)
    return planning.free_lanes(spec.lanes, open_windows, busy)


def _patience(calls: Sequence[AnyRow]) -> float:
    waits = [call.waits_s for call in calls if call.waits_s is not None and call.waits_s > 0]
    return min([IDLE_ROUND_S, *waits]) if len(waits) < len(calls) else min(waits)


def _item_calls(run: int, spec: RunSpec, segment: Segment, window: AnyRow) -> list[dict[str, Any]]:
    return [
        _call_row(run, spec, spec.workflow.step(name), ordinal, repeat)
        for name in segment.item_steps()
        for ordinal in range(window.first_ordinal, window.last_ordinal + 1)
        for repeat in range(spec.workflow.step(name).repeats)
    ]


def _call_row(run: int, spec: RunSpec, step: Step, ordinal: int, repeat: int) -> dict[str, Any]:
    route = spec.routes[step.name][0]
    return {
        "workflow_execution_id": run,
        "prompt_name": step.name,
        "prompt_template": spec.template_label(step.prompt or ""),
        "llm_provider": route.provider,
        "llm_model": route.model,
        "item_ordinal": ordinal,
        "repeat": repeat,
    }


def _numbers(values: Sequence[Any], fields: set[str]) -> dict[str, float]:
    """Means over the repeats of those fields that hold numbers."""
    answers = [cast("dict[str, float]", value) for value in values if isinstance(value, dict)]
    means: dict[str, float] = {}
    for field in fields:
        found = [answer[field] for answer in answers if field in answer]
        if found:
            means[field] = sum(found) / len(found) if len(found) > 1 else found[0]
    return means
