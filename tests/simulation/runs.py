"""The runs of a simulation: packs of every shape, written into the database as a producer does it."""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from orchestrator import planning
from orchestrator.database import Database, budgets, intake
from orchestrator.declaration import read_workflow
from orchestrator.orchestration import WorkflowOrchestrator
from orchestrator.runspec import Route, RunSpec
from providers.pricing import Price
from tests.integration.database.stage import run_values
from tests.packs import CHOOSY, GRAPH, ONE, SURVEY, Pack, one_step

PACKS = (ONE, one_step(cache=True), one_step(fallback=True, attempts=2), SURVEY, SURVEY, CHOOSY, GRAPH)
PRICE = Price(input_npm=1_000_000_000, output_npm=3_000_000_000, cached_npm=1_000_000_000, source="test")
WORST_NUSD = 1_000_000
"""About what an attempt may cost at most."""


@dataclass
class PlannedRun:
    """A run before it is stored."""

    number: int
    spec: RunSpec
    items: int
    batches: tuple[tuple[int, int], ...]
    limit_nusd: int | None


def plan_run(random: Random, number: int) -> PlannedRun:
    """A run of random shape."""
    pack = random.choice(PACKS)
    items = random.choice((random.randint(1, 20), random.randint(20, 120)))
    split = random.randint(1, items)
    spec = _spec(pack, random.randint(2, 40), random.randint(1, 20), random.randint(1, 3))
    ranges = ((0, split - 1), (split, items - 1)) if split < items else ((0, items - 1),)
    limit = random.choice((None, None, random.randint(2, 60) * WORST_NUSD // 4))
    return PlannedRun(number, spec, items, ranges, limit)


@cache
def _spec(pack: Pack, window: int, shard: int, lanes: int) -> RunSpec:
    files = {"workflow.toml": pack.workflow, **dict(pack.templates)}
    workflow, _ = read_workflow(pack.workflow, "workflow.toml")
    names = ("main", "spare") if "fallback" in pack.workflow else ("main",)
    routes = tuple(Route(name, "model", 60, None, None, PRICE, "simulated") for name in names)
    asking = {step.name: routes for step in workflow.steps if step.asks()}
    return RunSpec(workflow, files, {}, asking, window, shard, lanes, 3600)


def store_run(database: Database, plan: PlannedRun) -> int:
    """Writes a run without its items; returns its number."""
    values: dict[str, Any] = run_values(f"run-{plan.number}")
    values |= {"workflow_id": plan.spec.workflow.name, "spec": plan.spec.to_json(), "phase": "items"}
    with database.transaction() as connection:
        intake.set_limits(connection, {budgets.GLOBAL_SCOPE: None})
        return intake.create_run(connection, values, plan.limit_nusd)


def store_items(
    database: Database, orchestrator: WorkflowOrchestrator, run: int, plan: PlannedRun, batch: tuple[int, int]
) -> None:
    """Writes a batch of items and goes on with the run."""
    first, last = batch
    # Some items are the same, so that calls have equals.
    rows = [(n, f"k{n}", f'{{"text": "item {n % 7}", "size": {n}}}') for n in range(first, last + 1)]
    with database.transaction() as connection:
        intake.add_items(connection, run, rows)
        if planning.segments(plan.spec.workflow)[0].levels:
            intake.add_windows(connection, run, 0, planning.windows(first, last, plan.spec.window_size))
        if last == plan.items - 1:
            intake.complete_input(connection, run)
    orchestrator.orchestrate(run)
