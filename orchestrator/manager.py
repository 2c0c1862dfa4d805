"""WorkflowManager: the facade that the command line and a Python program call.

`plan` checks everything and spends nothing; `execute_workflow` writes the run, streams its items into the database
and publishes the first windows while later items are still being read. Everything after that happens in the workers.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from celery import Celery

from orchestrator import __version__, naming, planning, routing, validation
from orchestrator.broker import make_app
from orchestrator.config import ConfigManager
from orchestrator.database import Connection, Database, DatabaseUnavailable, intake, ledger, reports, runs, work
from orchestrator.database.runs import OPEN_RUN
from orchestrator.errors import EnvironmentNotReady, InvalidInput, OrchestratorError, Problem, WorkflowError
from orchestrator.estimating import Estimate, estimate
from orchestrator.files import FileManager, PackFiles
from orchestrator.items import ItemSource, ItemsSummary, iter_items, open_source, scan_items
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.runspec import Route, RunSpec
from orchestrator.settings import nusd_of
from orchestrator.workflow import WORKFLOW_FILE, Workflow, inspect_workflow, parse_usd
from providers.price_data import price_for

T = TypeVar("T")
BATCH = 1000
FIRST_WINDOW = 200
"""Items of the first window, so that the first calls leave while most items are still being read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What a user asks for.

    Attributes:
        pack: name of a shipped pack, or a folder.
        input: file of items, `-` for standard input, None for the pack's sample items.
        variables: from `--var`, as text.
        limit: take only so many items from the top.
        sample: take so many items chosen by a hash of `seed` and key.
        budget_usd: of the run; None takes the configured one, else the workflow's.
        allow_unpriced: send calls although nobody knows their price; they are booked at zero.
    """

    pack: str
    input: str | None = None
    input_format: str | None = None
    provider: str | None = None
    model: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    budget_usd: Decimal | None = None
    allow_unpriced: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that could begin now: everything checked, nothing written.

    Attributes:
        budget_nusd: nano-USD; None for no limit.
        identity: hash of what is asked; runs with the same one can continue each other.
        unfinished: id of a run of the same identity that has not ended; None if there is none.
        simulated: no route leads to a real model.
    """

    request: RunRequest
    workflow: Workflow
    spec: RunSpec
    source: ItemSource
    summary: ItemsSummary
    estimate: Estimate
    budget_nusd: int | None
    identity: str
    pack_hash: str
    project_name: str
    unfinished: str | None
    simulated: bool


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
        redis_url: the broker; None takes the configured one. Needed from `execute_workflow` on.
    """

    def __init__(self, config: ConfigManager, redis_url: str | None = None) -> None:
        self._config = config
        self._settings = config.settings
        self._redis_url = redis_url or self._settings.redis_url
        self._files = FileManager(self._settings.home)
        self._held = ExitStack()
        self._database = Database(self._settings.database_url)

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
        problems = list(_selection_problems(request))
        if problems:
            # So that the rows themselves are looked at all the same.
            request = replace(request, limit=None, sample=None)
        pack = _collect(problems, lambda: self._files.load_prompts(request.pack))
        source, summary = self._scan(request, pack, problems)
        if pack is None:
            raise InvalidInput(problems)
        examples = () if summary is None else summary.examples
        workflow, found = validation.check_pack(_all_files(pack), str(pack.root), examples)
        problems.extend(found)
        if workflow is None:
            raise InvalidInput(problems)
        configured = cast("Mapping[str, Any]", self._config.get_workflow_config(workflow.name))
        set_here: Mapping[str, Any] = configured.get("variables", {})
        variables = _collect(
            problems,
            lambda: validation.read_variables(workflow, request.variables, set_here),
        )
        routes = self._routes(workflow, request, configured, problems)
        budget = _budget(request, workflow, configured, problems)
        keys = self._missing_keys(routes)
        if problems or variables is None or source is None or summary is None:
            raise InvalidInput([*problems, *keys])
        if keys:
            raise EnvironmentNotReady(keys)
        spec = self._spec(workflow, pack, variables, routes)
        identity = _identity(spec, pack, summary)
        return Plan(
            request=request,
            workflow=workflow,
            spec=spec,
            source=source,
            summary=summary,
            estimate=estimate(workflow, spec, summary),
            budget_nusd=budget,
            identity=identity,
            pack_hash=pack.sha256,
            project_name=_project_name(request, pack),
            unfinished=self._unfinished(identity),
            simulated=self._is_simulated(routes),
        )

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
            self._set_budget(run, plan.budget_nusd)
            orchestrator.manage_state(run, "running", None, sources=("paused",))
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
            OrchestratorError: not all its items were stored; run the same command again with its input.
        """
        run, run_id = self.find_run(name)
        with self._database.snapshot() as connection:
            row = work.run_row(connection, run)
        if not row.input_complete:
            raise OrchestratorError(
                f"run {run_id} has not stored all its items; repeat its `run` command to continue it"
            )
        if budget_usd is not None:
            limit = parse_usd(str(budget_usd))
            if limit is None:
                raise InvalidInput(_bad_budget(str(budget_usd)))
            self._set_budget(run, limit)
        self._renew_limits(run)
        orchestrator = self._orchestrator()
        orchestrator.manage_state(run, "running", None, sources=("paused",))
        orchestrator.republish(run)
        return StartedRun(run, run_id, resumed=True)

    def pause(self, name: str) -> bool:
        """Pauses a running run; False if it was not running. Calls in flight may still settle."""
        run, _ = self.find_run(name)
        return self._orchestrator().manage_state(run, "paused", "user", sources=("pending", "running"))

    def cancel(self, name: str) -> bool:
        """Ends a run for good; False if it had ended already. Its finished answers stay."""
        run, _ = self.find_run(name)
        return self._orchestrator().manage_state(run, "cancelled", "user", sources=OPEN_RUN)

    def _scan(
        self, request: RunRequest, pack: PackFiles | None, problems: list[Problem]
    ) -> tuple[ItemSource | None, ItemsSummary | None]:
        wanted: Path | str | None = request.input
        if wanted is None and pack is not None:
            wanted = pack.sample_items
        if wanted is None:
            if pack is None:
                return None, None
            problems.append(
                Problem("items.none", "the pack has no sample items", str(pack.root), "name a file with --input")
            )
            return None, None
        try:
            source = self._held.enter_context(open_source(wanted, request.input_format))  # pyright: ignore[reportArgumentType]  # the reader checks the format
            key_field = None if pack is None else _key_field(pack)
            summary = scan_items(source, key_field, request.limit, request.sample, request.seed)
        except InvalidInput as error:
            problems.extend(error.problems)
            return None, None
        problems.extend(summary.problems)
        return source, summary

    def _routes(
        self, workflow: Workflow, request: RunRequest, configured: Mapping[str, Any], problems: list[Problem]
    ) -> dict[str, tuple[Route, ...]]:
        wishes = routing.Preferences(
            default_provider=self._settings.default_provider,
            provider=request.provider,
            model=request.model,
            workflow_provider=configured.get("provider"),
            workflow_model=configured.get("model"),
            fallback_provider=self._settings.global_.fallback_provider,
            allow_unpriced=request.allow_unpriced,
        )
        routes: dict[str, tuple[Route, ...]] = {}
        for step in workflow.steps:
            if step.asks():
                place = f"step {step.name!r}"
                chosen = routing.choose(workflow, step, wishes, self._settings.providers, price_for, place)
                problems.extend(one for one in chosen.problems if one not in problems)
                routes[step.name] = chosen.routes
        return routes

    def _missing_keys(self, routes: Mapping[str, tuple[Route, ...]]) -> list[Problem]:
        problems: list[Problem] = []
        for name in sorted({route.provider for chosen in routes.values() for route in chosen}):
            try:
                self._config.get_llm_config(name)
            except EnvironmentNotReady as error:
                problems.extend(error.problems)
        return problems

    def _spec(
        self, workflow: Workflow, pack: PackFiles, variables: Mapping[str, Any], routes: Mapping[str, tuple[Route, ...]]
    ) -> RunSpec:
        worker, shared = self._settings.worker, self._settings.global_
        return RunSpec(
            workflow=workflow,
            pack_files=_all_files(pack),
            variables=variables,
            routes=routes,
            window_size=worker.window_size,
            shard_size=worker.shard_size,
            lanes=worker.lanes,
            cache_ttl_s=shared.cache_ttl_s if shared.enable_caching else 0,
            min_output_tokens=shared.min_output_tokens,
            retry_unknown=shared.retry_unknown,
        )

    def _is_simulated(self, routes: Mapping[str, tuple[Route, ...]]) -> bool:
        used = {chosen[0].provider for chosen in routes.values() if chosen}
        return bool(used) and all(self._settings.providers[name].dialect == "simulator" for name in used)

    def _unfinished(self, identity: str) -> str | None:
        try:
            if not self._database.is_prepared():
                return None
            with self._database.snapshot() as connection:
                return runs.unfinished(connection, identity)
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

    def _set_budget(self, run: int, limit_nusd: int | None) -> None:
        with self._database.transaction() as connection:
            ledger.set_limit(connection, ledger.run_scope(run), limit_nusd)

    def _limits(self, connection: Connection, workflow: str) -> dict[str, int | None]:
        """The limits that the configuration sets beside those of single runs, by scope."""
        shared = self._settings.global_
        total = cast("Decimal | None", self._config.get_workflow_config(workflow).get("total_budget_usd"))
        providers = self._settings.providers.values()
        return {
            ledger.GLOBAL_SCOPE: shared.cost_limit_nusd,
            ledger.workflow_scope(workflow): nusd_of(total),
            **{ledger.provider_scope(one.name): one.cost_limit_nusd for one in providers},
            ledger.day_scope(reports.clock(connection)): shared.daily_cost_limit_nusd,
        }

    def _renew_limits(self, run: int) -> None:
        with self._database.transaction() as connection:
            row = work.run_row(connection, run)
            intake.set_limits(connection, self._limits(connection, row.workflow_id))

    def _orchestrator(self) -> WorkflowOrchestrator:
        return WorkflowOrchestrator(self._database, self._app())

    def _app(self) -> Celery:
        if self._redis_url is None:
            problem = Problem("broker.missing", "no broker is named", "REDIS_URL", "set REDIS_URL, or use `run`")
            raise EnvironmentNotReady(problem)
        return make_app(self._redis_url, tuple(self._settings.providers), self._settings.queue_prefix)


def _selection_problems(request: RunRequest) -> Iterator[Problem]:
    for name, wanted in (("limit", request.limit), ("sample", request.sample)):
        if wanted is not None and wanted < 1:
            yield Problem("items.bad-selection", f"{name} must be at least 1, not {wanted}", f"--{name}")


def _collect(problems: list[Problem], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except InvalidInput as error:
        problems.extend(error.problems)
        return None


def _all_files(pack: PackFiles) -> dict[str, str]:
    return {WORKFLOW_FILE: pack.workflow_text, **pack.files}


def _key_field(pack: PackFiles) -> str | None:
    # What is wrong with the declaration is told by the check of the pack; the items are looked at all the same.
    workflow = inspect_workflow(pack.workflow_text, WORKFLOW_FILE).workflow
    return None if workflow is None else workflow.item_key


def _budget(
    request: RunRequest, workflow: Workflow, configured: Mapping[str, Any], problems: list[Problem]
) -> int | None:
    wanted = request.budget_usd if request.budget_usd is not None else configured.get("budget_usd")
    text = workflow.budget.max_usd if wanted is None else str(wanted)
    if text is None:
        return None
    limit = parse_usd(text)
    # The workflow's own one was looked at with the rest of its declaration.
    if limit is None and wanted is not None:
        problems.append(_bad_budget(text))
    return limit


def _bad_budget(text: str) -> Problem:
    return Problem("budget.invalid", f"the budget must be a number of US dollars above 0, not {text}", "--budget")


def _identity(spec: RunSpec, pack: PackFiles, summary: ItemsSummary) -> str:
    routes = {
        step: [(route.provider, route.model, route.max_output_tokens, route.temperature) for route in chosen]
        for step, chosen in sorted(spec.routes.items())
    }
    asked = (pack.sha256, summary.sha256, sorted(spec.variables.items()), routes)
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _project_name(request: RunRequest, pack: PackFiles) -> str:
    match request.input:
        case None:
            return f"{pack.name} samples"
        case "-":
            return "stdin"
        case path:
            return Path(path).stem


def _batches(rows: Iterable[tuple[int, str, str]], first: int) -> Iterator[list[tuple[int, str, str]]]:
    iterator = iter(rows)
    size = first
    while batch := list(islice(iterator, size)):
        yield batch
        size = BATCH
