"""What happens before a run may spend: the request, the estimate, and the question whether to go on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import typer

from orchestrator.cli.actions.output import Refused, console, put_json, say, table
from orchestrator.cli.options import Asked
from orchestrator.manager import Plan, RunRequest
from orchestrator.money import NUSD_PER_USD, short_usd, usd, usd_or_none

ASK_ABOVE_NUSD = 1 * NUSD_PER_USD
"""A likely cost above this is asked about first."""


def request_of(asked: Asked) -> RunRequest:
    """What was typed as a request to the manager."""
    return RunRequest(
        pack=asked.pack,
        input=asked.input,
        input_format=asked.input_format,
        provider=asked.provider,
        model=asked.model,
        variables=asked.variables,
        limit=asked.limit,
        sample=asked.sample,
        seed=asked.seed,
        budget_usd=asked.budget_usd,
    )


def print_estimate(plan: Plan, continued: str | None) -> None:
    """Says on stderr what is about to happen."""
    known = plan.estimate
    if continued is not None:
        say(f"continuing the unfinished run {continued}; --new begins another one")
    cost = f"likely {short_usd(known.cost_nusd)}, at worst {short_usd(known.worst_nusd)}"
    budget = "no budget" if plan.budget_nusd is None else f"budget {short_usd(plan.budget_nusd)}"
    say(f"{plan.workflow.name}: {known.items:,} items, up to {known.calls:,} calls, {cost}, {budget}")
    if plan.simulated:
        say("the simulator answers: no model is asked, and its answers mean nothing")


def confirm_cost(plan: Plan, *, is_agreed: bool) -> None:
    """Asks before much is spent.

    Raises:
        Refused: the answer is no, or there is nobody to ask.
    """
    if is_agreed or plan.estimate.cost_nusd <= ASK_ABOVE_NUSD:
        return
    likely = short_usd(plan.estimate.cost_nusd)
    hint = f"the run would likely cost {likely}; agree with --yes, or look at: llm-orchestrator estimate"
    confirm(f"Spend about {likely}?", hint)


def confirm_retry(status: Mapping[str, Any], *, is_agreed: bool) -> None:
    """Asks before failed calls of a run are asked again at a price, judged by those that were answered.

    Raises:
        Refused: the answer is no, or there is nobody to ask.
    """
    calls = status["calls"]
    each = Decimal(status["cost_usd"]) / max(1, calls["completed"] + calls["failed"])
    likely = int(each * calls["failed"] * NUSD_PER_USD)
    if not is_agreed and likely > ASK_ABOVE_NUSD:
        hint = f"asking {calls['failed']:,} calls again would likely cost {short_usd(likely)}; agree with --yes"
        confirm(f"Spend about {short_usd(likely)}?", hint)


def confirm(question: str, hint: str) -> None:
    """Asks a person.

    Raises:
        Refused: the answer is no; or there is nobody to ask, and then it says the hint.
    """
    if not sys.stdin.isatty():
        raise Refused(hint)
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        raise Refused("nothing was done")


def estimate_object(plan: Plan) -> dict[str, Any]:
    """An estimate as JSON data."""
    known = plan.estimate
    return {
        "workflow": plan.workflow.name,
        "workflow_version": plan.workflow.version,
        "items": known.items,
        "calls": known.calls,
        "input_tokens": known.input_tokens,
        "output_tokens": known.output_tokens,
        "likely_cost_usd": usd(known.cost_nusd),
        "worst_cost_usd": usd(known.worst_nusd),
        "budget_usd": usd_or_none(plan.budget_nusd),
        "simulated": plan.simulated,
        "unfinished_run": plan.unfinished,
        "steps": [
            {
                "step": step.step,
                "provider": step.provider,
                "model": step.model,
                "calls": step.calls,
                "likely_cost_usd": usd(step.cost_nusd),
            }
            for step in known.by_step
        ],
    }


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """The estimate of a plan on stdout."""
    if as_json:
        put_json(estimate_object(plan))
        return
    print_estimate(plan, None)
    rows = [
        [step.step, step.provider, step.model, f"{step.calls:,}", short_usd(step.cost_nusd)]
        for step in plan.estimate.by_step
    ]
    rows.append(["total", "", "", f"{plan.estimate.calls:,}", short_usd(plan.estimate.cost_nusd)])
    console().print(table(("step", "provider", "model", "calls>", "likely cost>"), rows))
