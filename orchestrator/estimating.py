"""Pure: what a run will probably cost, and what it can cost at worst, before anything is spent.

The prompts of the sample items are measured with the templates as they are. The likely cost assumes that every step
is asked for every item and that answers fill a third of their cap; the worst cost assumes full caps and byte-level
upper bounds of input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.items import ItemsSummary
from orchestrator.results import answer_schema
from orchestrator.runspec import RunSpec
from orchestrator.workflow import Step, Workflow
from prompts.engine import PromptEngine
from providers.messages import Message, Usage
from providers.pricing import FREE, cost_nusd, worst_nusd
from providers.tokens import estimate_messages, upper_bound

LIKELY_SHARE_OF_CAP = 1 / 3


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """One step: its primary route, its calls and their likely cost in nano-USD."""

    step: str
    provider: str
    model: str
    calls: int
    cost_nusd: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A whole run. Tokens are likely numbers; costs are nano-USD."""

    items: int
    calls: int
    input_tokens: int
    output_tokens: int
    cost_nusd: int
    worst_nusd: int
    by_step: tuple[StepEstimate, ...]


def estimate(workflow: Workflow, spec: RunSpec, summary: ItemsSummary) -> Estimate:
    """Estimates a run."""
    rows: list[StepEstimate] = []
    input_tokens = output_tokens = worst = 0
    for step in workflow.ordered_steps:
        if not step.asks():
            continue
        calls = summary.count * step.repeats if step.kind == "item" else 1
        route = spec.routes[step.name][0]
        told, upper = _input(step, spec, summary.examples, summary.count)
        answered = max(1, round(route.max_output_tokens * LIKELY_SHARE_OF_CAP))
        price = route.price or FREE
        rows.append(
            StepEstimate(step.name, route.provider, route.model, calls, calls * cost_nusd(price, Usage(told, answered)))
        )
        input_tokens += calls * told
        output_tokens += calls * answered
        worst += calls * worst_nusd(price, upper, route.max_output_tokens)
    return Estimate(
        items=summary.count,
        calls=sum(row.calls for row in rows),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_nusd=sum(row.cost_nusd for row in rows),
        worst_nusd=worst,
        by_step=tuple(rows),
    )


def _input(step: Step, spec: RunSpec, examples: Sequence[Mapping[str, Any]], items: int) -> tuple[int, int]:
    """Likely and greatest number of input tokens of one call, from the template's text and the mean sample item."""
    templates = PromptEngine({name: text for name, text in spec.pack_files.items() if name.endswith(".j2")})
    read = (step.prompt or "", *templates.load_template(step.prompt or "").includes)
    template = sum(len(spec.pack_files[name]) for name in read)
    per_item = sum(len(str(dict(example))) for example in examples) // max(1, len(examples))
    # A reduce step shows the best entries with their answers, which are about as long as the items themselves.
    shown = 1 if step.reduce is None else 2 * min(step.reduce.top, items)
    text = (Message("user", "word " * ((template + shown * per_item) // 5)),)
    schema = answer_schema(step.answer, spec.pack_files)
    return estimate_messages(text, schema), upper_bound(text, schema)
