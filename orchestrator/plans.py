"""Turns a request into a plan: everything is checked, nothing is written, nothing is spent.

All problems are collected before any of them is raised, so that a person meets them together.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

from orchestrator import routing, validation
from orchestrator.config import ConfigManager
from orchestrator.declaration import inspect_workflow
from orchestrator.errors import EnvironmentNotReady, InvalidInput, Problem
from orchestrator.estimating import Estimate, estimate
from orchestrator.files import FileManager, PackFiles
from orchestrator.items import ItemSource, ItemsSummary, open_source, scan_items
from orchestrator.provider_keys import KEY_MISSING
from orchestrator.runspec import Route, RunSpec
from orchestrator.workflow import WORKFLOW_FILE, Workflow, parse_usd
from providers.price_data import price_for

T = TypeVar("T")


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


class Planner:
    """Makes plans.

    Args:
        config: the configuration.
        held: takes the files that a plan reads its items from; whoever closes it removes them.
    """

    def __init__(self, config: ConfigManager, held: ExitStack) -> None:
        self._config = config
        self._settings = config.settings
        self._files = FileManager(config.settings.home)
        self._held = held

    def plan(self, request: RunRequest, unfinished: Callable[[str], str | None]) -> Plan:
        """Checks a request completely: pack, templates, variables, routes, prices, budget and every item.

        Reads only; safe to repeat.

        Args:
            request: what is asked for.
            unfinished: tells the id of an unfinished run of an identity; None if there is none.

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
        problems.extend(self._missing_keys(routes))
        if problems and all(one.code == KEY_MISSING for one in problems):
            raise EnvironmentNotReady(problems)
        if problems or variables is None or source is None or summary is None:
            raise InvalidInput(problems)
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
            unfinished=unfinished(identity),
            simulated=self._is_simulated(routes),
        )

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
        problems.append(bad_budget(text))
    return limit


def bad_budget(text: str) -> Problem:
    """What is wrong with an amount that is none."""
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
