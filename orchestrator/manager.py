"""WorkflowManager: the facade that the command line and a Python program call.

`plan` checks everything and spends nothing; `execute_workflow` writes the run, streams its items into the database
and publishes the first windows while later items are still being read. Everything after that happens in the workers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from itertools import islice
from typing import Any, cast

from celery import Celery

from orchestrator import __version__, naming, planning
from orchestrator.broker import make_app
from orchestrator.config import ConfigManager
from orchestrator.control import Retried, RunControl, budget_scope, default_actor
from orchestrator.database import (
    Connection,
    Database,
    DatabaseUnavailable,
    budgets,
    clock,
    costs,
    intake,
    limits,
    reports,
    work,
)
from orchestrator.database.budgets import Budget
from orchestrator.database.limits import Override
from orchestrator.errors import EnvironmentNotReady, InvalidInput, Problem, WorkflowError, WrongState, did_you_mean
from orchestrator.items import iter_items
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.plans import Plan, Planner, RunRequest, bad_budget
from orchestrator.runspec import Route
from orchestrator.settings import nusd_of
from orchestrator.workflow import Workflow, parse_usd

__all__ = ["Plan", "RunRequest", "StartedRun", "WorkflowManager"]

BATCH = 1000
FIRST_WINDOW = 200
"""Items of the first window, so that the first calls leave while most items are still being read."""


@dataclass(frozen=True, slots=True)
class StartedRun:
    """A run that was begun or taken up again."""

    run: int
    run_id: str
    resumed: bool


class WorkflowManager:
    """Plans, starts, stops and follows runs. Use as a context manager, or `close` it.

    Args:
        config: the configuration.
        redis_url: the broker; None takes the configured one. Needed by what publishes: `execute_workflow`, `resume`.
        actor: who changes things, for the audit log; None is the person at this machine.
    """

    def __init__(self, config: ConfigManager, redis_url: str | None = None, actor: str | None = None) -> None:
        self._config = config
        self._settings = config.settings
        self._redis_url = redis_url or self._settings.redis_url
        self._held = ExitStack()
        self._planner = Planner(config, self._held)
        self._database = Database(self._settings.database_url)
        self._actor = actor or default_actor()
        self._control = RunControl(self._database, self._actor)

    def __enter__(self) -> "WorkflowManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes connections and removes temporary files. Safe to repeat."""
        self._held.close()
        self._database.close()

    @property
    def database(self) -> Database:
        """The database, for reports."""
        return self._database

    def use_broker(self, redis_url: str) -> None:
        """Names the broker after the fact: local mode starts its own when a plan is about to be executed."""
        self._redis_url = redis_url

    def plan(self, request: RunRequest) -> Plan:
        """Checks a request completely: pack, templates, variables, routes, prices, budget and every item.

        Reads only; safe to repeat.

        Raises:
            InvalidInput: with all problems found.
            EnvironmentNotReady: the key of a provider that would be asked is missing.
        """
        return self._planner.plan(request, self._unfinished)

    def execute_workflow(
        self, plan: Plan, *, resume: str | None = None, on_stored: Callable[[int], None] = lambda _: None
    ) -> StartedRun:
        """Begins a run, or takes up an unfinished one of the same identity where it stands.

        Returns when all items are stored; the workers may have answered many of them by then.

        Args:
            plan: from `plan`.
            resume: id of the run to take up; None begins a new one.
            on_stored: told how many items are stored, after every batch.

        Raises:
            RunNotFound: there is no such run.
            EnvironmentNotReady: no broker was named.
        """
        orchestrator = self._orchestrator()
        if resume is None:
            started = self._create(plan)
        else:
            run, run_id = self.find_run(resume)
            self._renew_limits(run)
            self._control.set_budget(budgets.run_scope(run), plan.budget_nusd, run_id)
            self._control.take_up(run)
            started = StartedRun(run, run_id, resumed=True)
        self._store_items(orchestrator, started.run, plan, on_stored)
        orchestrator.orchestrate(started.run)
        if started.resumed:
            orchestrator.republish(started.run)
        return started

    def execute_step(self, plan: Plan, step: str) -> StartedRun:
        """Begins a run of one step and the steps it needs, over the items of a plan.

        Raises:
            WorkflowError: the workflow has no such step.
        """
        known = [one.name for one in plan.workflow.steps]
        if step not in known:
            raise WorkflowError(Problem("workflow.unknown-step", f"there is no step {step!r}", plan.workflow.name))
        wanted = {step, *planning.needed_answers(plan.workflow, plan.workflow.step(step))}
        spec = plan.spec.only(wanted)
        identity = sha256(f"{plan.identity}:{step}".encode()).hexdigest()
        return self.execute_workflow(replace(plan, spec=spec, workflow=spec.workflow, identity=identity))

    def handle_dependencies(self, workflow: Workflow) -> tuple[planning.Segment, ...]:
        """The order of work: segments, and inside them levels of steps that do not need each other."""
        return planning.segments(workflow)

    def select_provider(self, plan: Plan, step: str) -> tuple[Route, ...]:
        """The routes of a step, the primary one first, each with the reason for which it was chosen."""
        return plan.spec.routes[step]

    def track_progress(self, run: int) -> dict[str, Any]:
        """The status object of a run; cheap at any size."""
        with self._database.snapshot() as connection:
            return reports.status(connection, run)

    def find_run(self, name: str) -> tuple[int, str]:
        """Number and id of a run, by its id, an unambiguous beginning of it, or `latest`.

        Raises:
            RunNotFound: none fits, or several do.
        """
        with self._database.snapshot() as connection:
            return reports.find_run(connection, name)

    def resume(self, name: str, budget_usd: Decimal | None = None) -> StartedRun:
        """Takes a paused run up again, with another budget if one is given. Safe to repeat.

        Raises:
            RunNotFound: none fits, or several do.
            WrongState: not all its items were stored; run the same command again with its input.
        """
        run, run_id = self.find_run(name)
        with self._database.snapshot() as connection:
            row = work.run_row(connection, run)
        if not row.input_complete:
            raise WrongState(f"run {run_id} has not stored all its items; repeat its `run` command to continue it")
        limit = None if budget_usd is None else _limit_of(budget_usd)
        orchestrator = self._orchestrator()
        if limit is not None:
            self._control.set_budget(budgets.run_scope(run), limit, run_id)
        self._renew_limits(run)
        self._control.take_up(run)
        orchestrator.republish(run)
        return StartedRun(run, run_id, resumed=True)

    def pause(self, name: str) -> bool:
        """Pauses a running run; False if it was not running. Calls in flight may still settle."""
        return self._control.pause(self.find_run(name)[0])

    def cancel(self, name: str) -> bool:
        """Ends a run for good; False if it had ended already. Its finished answers stay."""
        return self._control.cancel(self.find_run(name)[0])

    def retry(self, name: str, *, failed: bool = True, unknown: bool = False) -> Retried:
        """Asks calls that failed again, and takes the run up; see `orchestrator.control.RunControl.retry`.

        Published at once when a broker is named, else by the workers' next look.

        Args:
            name: of the run.
            failed: all calls that failed.
            unknown: those of them whose last attempt ended in a way that nobody knows.

        Raises:
            RunNotFound: none fits, or several do.
            WrongState: the run was cancelled or erased, or its items are not all stored.
        """
        run, _ = self.find_run(name)
        retried = self._control.retry(run, failed=failed, unknown=unknown)
        if retried.failed and self._redis_url is not None:
            self._orchestrator().republish(run)
        return retried

    def set_priority(self, name: str, priority: int) -> bool:
        """Gives a run another priority; higher ones go first. False if it had that one."""
        return self._control.set_priority(self.find_run(name)[0], priority)

    def budgets(self, name: str | None = None) -> list[Budget]:
        """Budgets: those that an attempt of a run would be held against now, or all but those of runs that ended."""
        with self._database.snapshot() as connection:
            if name is None:
                return budgets.find_budgets(connection, costs.current_scopes(connection))
            run, _ = reports.find_run(connection, name)
            workflow, clock_s = work.run_row(connection, run).workflow_id, clock(connection)
            scopes = {s for one in self._settings.providers for s in budgets.scopes_of(run, workflow, one, clock_s)}
            return budgets.find_budgets(connection, scopes)

    def set_budget(self, name: str, limit_usd: Decimal | None) -> Budget:
        """Changes the limit of a budget; None is no limit. Takes no run up by itself.

        Args:
            name: a run, `global`, `workflow:NAME`, `provider:NAME`, `day` or `day:DATE`.
            limit_usd: US dollars; below what is spent and in flight it becomes that sum.

        Raises:
            RunNotFound: the name fits none of these.
            InvalidInput: the amount is none.
        """
        limit = None if limit_usd is None else _limit_of(limit_usd)
        scope, run_id = budget_scope(self._database, name)
        return self._control.set_budget(scope, limit, run_id)

    def limits(self) -> dict[str, Override]:
        """Limits of providers that were changed and win over the configuration, by provider."""
        with self._database.snapshot() as connection:
            return limits.overrides(connection)

    def set_limits(
        self, provider: str, *, rpm: int | None = None, tpm: int | None = None, concurrency: int | None = None
    ) -> Override:
        """Changes limits of a provider on all workers; 0 pauses it, None leaves that limit as it is.

        Raises:
            InvalidInput: there is no such provider.
        """
        wanted = {"rpm": rpm, "tpm": tpm, "concurrency": concurrency}
        self._require_provider(provider)
        return self._control.set_limits(provider, {name: n for name, n in wanted.items() if n is not None})

    def clear_limits(self, provider: str) -> Override:
        """Leaves the limits of a provider to the configuration again."""
        self._require_provider(provider)
        return self._control.clear_limits(provider)

    def _require_provider(self, name: str) -> None:
        known = self._settings.providers
        if name not in known:
            raise InvalidInput(Problem("provider.unknown", "no such provider", name, did_you_mean(name, known)))

    def _unfinished(self, identity: str) -> str | None:
        try:
            if not self._database.is_prepared():
                return None
            with self._database.snapshot() as connection:
                return intake.unfinished(connection, identity)
        except DatabaseUnavailable as error:
            reason = str(error.orig).strip().splitlines() or ["no reason was given"]
            hint = "check DATABASE_URL and that the database runs"
            problem = Problem("database.unavailable", reason[0], self._database.address, hint)
            raise EnvironmentNotReady(problem) from error

    def _create(self, plan: Plan) -> StartedRun:
        run_id = naming.new_run_id()
        values: dict[str, Any] = {
            "run_id": run_id,
            "workflow_id": plan.workflow.name,
            "project_name": plan.project_name,
            "status": "pending",
            "started_at": datetime.now(UTC),
            "metadata": naming.metadata(plan.source.name, plan.summary.sha256, __version__),
            "workflow_version": plan.workflow.version,
            "pack_hash": plan.pack_hash,
            "identity": plan.identity,
            "spec": plan.spec.to_json(),
            "phase": "items",
        }
        with self._database.transaction() as connection:
            intake.set_limits(connection, self._limits(connection, plan.workflow.name))
            run = intake.create_run(connection, values, plan.budget_nusd)
        return StartedRun(run, run_id, resumed=False)

    def _store_items(
        self, orchestrator: WorkflowOrchestrator, run: int, plan: Plan, on_stored: Callable[[int], None]
    ) -> None:
        with self._database.snapshot() as connection:
            row = work.run_row(connection, run)
        if row.input_complete:
            return
        first = row.items_total
        items = iter_items(plan.source, plan.summary.key_field, plan.request.limit, plan.summary.selection)
        rows = ((item.ordinal, item.key, item.content_json) for item in islice(items, first, None))
        has_items_first = bool(planning.segments(plan.workflow)[0].levels)
        for batch in _batches(rows, FIRST_WINDOW if first == 0 and plan.summary.count > BATCH else BATCH):
            with self._database.transaction() as connection:
                intake.add_items(connection, run, batch)
                if has_items_first:
                    ranges = planning.windows(batch[0][0], batch[-1][0], plan.spec.window_size)
                    intake.add_windows(connection, run, 0, ranges)
            on_stored(batch[-1][0] + 1)
            orchestrator.orchestrate(run)
        with self._database.transaction() as connection:
            intake.complete_input(connection, run)

    def _limits(self, connection: Connection, workflow: str) -> dict[str, int | None]:
        """The limits that the configuration sets beside those of single runs, by scope."""
        shared = self._settings.global_
        total = cast("Decimal | None", self._config.get_workflow_config(workflow).get("total_budget_usd"))
        providers = self._settings.providers.values()
        return {
            budgets.GLOBAL_SCOPE: shared.cost_limit_nusd,
            budgets.workflow_scope(workflow): nusd_of(total),
            **{budgets.provider_scope(one.name): one.cost_limit_nusd for one in providers},
            budgets.day_scope(clock(connection)): shared.daily_cost_limit_nusd,
        }

    def _renew_limits(self, run: int) -> None:
        with self._database.transaction() as connection:
            row = work.run_row(connection, run)
            intake.set_limits(connection, self._limits(connection, row.workflow_id))

    def _orchestrator(self) -> WorkflowOrchestrator:
        return WorkflowOrchestrator(self._database, self._app(), actor=self._actor)

    def _app(self) -> Celery:
        if self._redis_url is None:
            problem = Problem("broker.missing", "no broker is named", "REDIS_URL", "set REDIS_URL, or use `run`")
            raise EnvironmentNotReady(problem)
        return make_app(self._redis_url, tuple(self._settings.providers), self._settings.queue_prefix)


def _limit_of(amount: Decimal) -> int:
    limit = parse_usd(str(amount))
    if limit is None:
        raise InvalidInput(bad_budget(str(amount)))
    return limit


def _batches(rows: Iterable[tuple[int, str, str]], first: int) -> Iterator[list[tuple[int, str, str]]]:
    iterator = iter(rows)
    size = first
    while batch := list(islice(iterator, size)):
        yield batch
        size = BATCH
