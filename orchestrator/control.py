"""Control of runs that are going on: every change is a row that all workers read again within seconds.

Nothing here needs a broker. A change and its row in the audit log are one transaction; what would change nothing
writes no row, so every verb may be repeated.
"""

import getpass
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from orchestrator import planning
from orchestrator.database import (
    AnyRow,
    Connection,
    Database,
    audit,
    budgets,
    limits,
    reports,
    retrying,
    runs,
    windows,
)
from orchestrator.database.audit import Change
from orchestrator.database.limits import Override
from orchestrator.errors import InvalidInput, Problem, WrongState
from orchestrator.money import usd_or_none
from orchestrator.runspec import RunSpec

_PHASES = ("items", "reduce", "finish")
MOST_PRIORITY = 1_000_000
BY_USER = "user"
"""Why a run is paused or cancelled that a person paused or cancelled."""
BUDGET_KINDS = ("workflow:", "provider:", "day:")


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry put back: failed calls, and calls that were skipped, or reduced, without their answers."""

    failed: int
    following: int


def default_actor() -> str:
    """The person at this machine, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # In a container, the user id often has no name.
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


class RunControl:
    """Changes runs, budgets and limits.

    Args:
        database: where they live.
        actor: who changes them, for the audit log.
    """

    def __init__(self, database: Database, actor: str) -> None:
        self._database = database
        self._actor = actor

    def pause(self, run: int) -> bool:
        """Pauses a run that is to run; False if it was not. Calls in flight may still settle.

        A run that the budget of a day has paused would go on by itself: from now on it waits for a person.
        """
        return self._move(run, "run.pause", "paused", ("pending", "running", "paused"))

    def cancel(self, run: int) -> bool:
        """Ends a run for good; False if it had ended already. Its finished answers stay."""
        return self._move(run, "run.cancel", "cancelled", runs.OPEN_RUN)

    def take_up(self, run: int) -> bool:
        """Lets a paused run go on; False if it was not paused. The caller publishes, or leaves it to the workers."""
        return self._move(run, "run.resume", "running", ("paused",))

    def set_priority(self, run: int, priority: int) -> bool:
        """Gives a run another priority; higher ones go first. False if it had that one.

        Raises:
            InvalidInput: the number is beyond all reason.
        """
        if abs(priority) > MOST_PRIORITY:
            message = f"a priority lies between -{MOST_PRIORITY} and {MOST_PRIORITY}"
            raise InvalidInput(Problem("priority.invalid", message, str(priority)))
        with self._database.transaction() as connection:
            row = runs.lock_run(connection, run)
            if row.priority == priority:
                return False
            runs.set_priority(connection, run, priority)
            self._note(connection, "run.priority", row.run_id, old=row.priority, new=priority)
        return True

    def set_budget(self, scope: str, limit_nusd: int | None, run_id: str | None = None) -> budgets.Budget:
        """Changes the limit of a budget, or creates it; None is no limit. Paused runs stay paused.

        It binds at once, even below what is spent: nothing new is sent, and what is in flight may settle.

        Args:
            scope: as in the ledger.
            limit_nusd: nano-USD.
            run_id: of the run whose budget it is, for the audit log.
        """
        with self._database.transaction() as connection:
            before = next(iter(budgets.find_budgets(connection, [scope])), None)
            after = budgets.set_limit(connection, scope, limit_nusd)
            if before is None or before.limit_nusd != after.limit_nusd:
                old = None if before is None else {"limit_usd": usd_or_none(before.limit_nusd)}
                self._note(connection, "budget.set", run_id, scope, old, {"limit_usd": usd_or_none(after.limit_nusd)})
        return after

    def set_limits(self, provider: str, wanted: Mapping[str, int]) -> Override:
        """Changes some limits of a provider (`rpm`, `tpm`, `concurrency`; 0 pauses it) and keeps its others."""
        return self._override(provider, lambda before: replace(before, **wanted))

    def clear_limits(self, provider: str) -> Override:
        """Leaves the limits of a provider to the configuration again."""
        return self._override(provider, lambda _: Override())

    def retry(self, run: int, *, failed: bool, unknown: bool) -> Retried:
        """Puts calls that failed back to pending with fresh attempts, and lets the run go on.

        What was skipped for want of their answers is decided anew, and the reduce steps behind them are done anew;
        completed answers about items stay. The caller publishes, or leaves it to the workers.

        Args:
            run: number of the run.
            failed: all calls that failed.
            unknown: those of them whose last attempt ended in a way that nobody knows.

        Raises:
            WrongState: the run was cancelled, its texts were erased, or its items are not all stored.
        """
        with self._database.transaction() as connection:
            row = runs.lock_run(connection, run)
            _require_retryable(row)
            condition = retrying.chosen(run, failed=failed, unknown=unknown)
            steps = retrying.steps_of(connection, condition)
            if not steps:
                return Retried(0, 0)
            spec = RunSpec.from_json(row.spec)
            redo = planning.redo(spec.workflow, steps)
            routes = {step: (chain[0].provider, chain[0].model) for step, chain in spec.routes.items() if chain}
            following, touched = 0, set[int]()
            for other in (
                retrying.skipped(run, redo.same_item, condition),
                retrying.skipped(run, redo.behind, None),
                # A reduce step that failed itself is among them.
                retrying.reduced(run, redo.reduces) & ~condition,
                condition,
            ):
                count, inside = retrying.put_back(connection, other, routes)
                following += count
                touched |= inside
            retrying.forget_rankings(connection, run, redo.reduces)
            windows.take_back(connection, run, touched, behind=redo.stage[0])
            _go_back(connection, row, redo.stage)
            runs.move_run(connection, run, "running", None, sources=("running", "paused", "completed", "failed"))
            put_back = Retried(count, following - count)
            told = {"status": "running", "failed": put_back.failed, "following": put_back.following}
            self._note(connection, "run.retry", row.run_id, old={"status": row.status}, new=told)
        return put_back

    def _move(self, run: int, action: str, to: runs.RunStatus, sources: tuple[runs.RunStatus, ...]) -> bool:
        with self._database.transaction() as connection:
            row = runs.lock_run(connection, run)
            if row.status == to and not budgets.waits_for_a_day(row):
                return False
            reason = None if to == "running" else BY_USER
            moved = runs.move_run(connection, run, to, reason, sources=sources)
            if moved:
                if to == "cancelled":
                    runs.cancel_calls(connection, run)
                self._note(connection, action, row.run_id, old={"status": row.status}, new={"status": to})
        return moved

    def _override(self, provider: str, change: Callable[[Override], Override]) -> Override:
        with self._database.transaction() as connection:
            before = limits.overrides(connection).get(provider, Override())
            after = change(before)
            if after != before:
                limits.set_override(connection, provider, after)
                self._note(connection, "limits.set", None, provider, before.as_dict(), after.as_dict())
        return after

    def _note(
        self,
        connection: Connection,
        action: str,
        run_id: str | None,
        subject: str | None = None,
        old: Any = None,
        new: Any = None,
    ) -> None:
        audit.append(connection, Change(self._actor, action, run_id, subject, old, new))


def budget_scope(database: Database, name: str) -> tuple[str, str | None]:
    """The budget that a name means, and the id of the run if it is a run's.

    Args:
        database: where runs are looked up.
        name: `global`, `workflow:NAME`, `provider:NAME`, `day` for today in UTC, `day:DATE`, or a run.

    Raises:
        RunNotFound: it is none of these.
    """
    if name == budgets.GLOBAL_SCOPE or (name.startswith(BUDGET_KINDS) and not name.endswith(":")):
        return name, None
    if name == "day":
        return f"day:{datetime.now(UTC):%Y-%m-%d}", None
    with database.snapshot() as connection:
        run, run_id = reports.find_run(connection, name)
    return budgets.run_scope(run), run_id


def _require_retryable(row: AnyRow) -> None:
    if row.status == "cancelled":
        raise WrongState(f"run {row.run_id} was cancelled, which is for good; begin another one")
    if row.erased_at is not None:
        raise WrongState(f"the texts of run {row.run_id} were erased; there is nothing to ask with")
    if not row.input_complete:
        raise WrongState(f"run {row.run_id} has not stored all its items; repeat its `run` command")


def _go_back(connection: Connection, row: AnyRow, stage: tuple[int, bool, int]) -> None:
    """Moves a locked run back to a stage, unless it has not come that far."""
    segment, in_reduce, index = min(stage, (row.segment, row.phase != "items", _index(row)))
    runs.set_stage(connection, row.id, segment=segment, phase=_PHASES[in_reduce], reduce_index=index)


def _index(row: AnyRow) -> int:
    # Behind every reduce step of its segment.
    return int(row.reduce_index) if row.phase == "reduce" else (0 if row.phase == "items" else 1_000_000)
