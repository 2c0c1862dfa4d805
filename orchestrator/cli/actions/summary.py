"""What a person wants to see when a run has ended: the best, the reasons, the cost, and where to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.padding import Padding

from orchestrator.cli.actions.output import console, duration, safe, table
from orchestrator.cli.actions.watching import print_status
from orchestrator.database import Connection, Database, costs, records
from orchestrator.settings import Settings

BEST = 10


def print_summary(database: Database, settings: Settings, run: int, status: Mapping[str, Any]) -> None:
    """The end of a run, on stdout."""
    out = console()
    with database.snapshot() as connection:
        steps = records.run_steps(connection, run)
        for step in steps:
            if step["kind"] == "reduce" and not step["calls"]:
                _print_ranking(out, connection, run, step)
        _print_rationales(out, connection, run, [step for step in steps if step["kind"] == "reduce" and step["calls"]])
        by_step = costs.costs(connection, run, "step")
        providers = records.providers_of(connection, run)
    if by_step:
        rows = [[one["step"], f"{one['calls']:,}", f"{one['attempts']:,}", f"${one['cost_usd']}"] for one in by_step]
        out.print(table(("step", "calls>", "attempts>", "cost>"), rows, "Cost by step"))
        out.print()
    elif status["calls"]["completed"]:
        out.print(f"Cost by step: none, all {status['calls']['completed']:,} answers came from the cache")
        out.print()
    _print_end(out, status)
    if providers and all(_is_simulator(settings, name) for name in providers):
        out.print("These answers are simulated: no model was asked, and they mean nothing.", style="bold")
    _print_places(out, settings, status)


def _print_ranking(out: Console, connection: Connection, run: int, step: Mapping[str, Any]) -> None:
    places = records.ranking(connection, run, step["name"], BEST)
    if not places:
        return
    answers = records.answers_of(connection, run, [place["item_key"] for place in places])
    rows = [
        [
            place["rank"],
            place["item_key"],
            f"{place['score']:.2f}",
            _rationale(answers.get(place["item_key"], {}).get(step["scored_step"])),
        ]
        for place in places
    ]
    out.print()
    out.print(table(("rank>", "item", "score>", "rationale"), rows, f"Best {len(rows)} by {step['name']}"))
    out.print()


def _print_rationales(out: Console, connection: Connection, run: int, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        for row in records.results(connection, run, step["name"]):
            told = _rationale(row["answer"])
            if told:
                out.print(safe(f"{step['name']}:"), style="bold")
                out.print(Padding(safe(told), (0, 0, 1, 2)))


def _rationale(answer: Any) -> str:
    if not isinstance(answer, dict):
        return ""
    told = cast("dict[str, Any]", answer).get("rationale")
    return told if isinstance(told, str) else ""


def _print_end(out: Console, status: Mapping[str, Any]) -> None:
    if status["status"] == "paused":
        print_status(status)
        return
    items = status["items"]
    counts = f"{items['completed']:,} of {items['total']:,} items completed"
    more = [f"{items[name]:,} {name}" for name in ("failed", "skipped") if items[name]]
    state = status["status"] if status["reason"] is None else f"{status['status']} ({status['reason']})"
    text = f"Run {status['run_id']} {state}: {', '.join([counts, *more])}, ${status['cost_usd']}"
    out.print(safe(f"{text}, {duration(status['duration_seconds'])}"))


def _print_places(out: Console, settings: Settings, status: Mapping[str, Any]) -> None:
    run_id = status["run_id"]
    written: list[Path] = sorted((settings.home / "results").glob(f"*/*{run_id}.json"))
    for path in written:
        out.print(safe(f"Results: {path}"))
    hints = [f"llm-orchestrator results {run_id}", f"llm-orchestrator show {run_id} ITEM"]
    if status["status"] == "paused":
        budget = " --budget USD" if status["reason"] == "budget" else ""
        hints = [f"llm-orchestrator resume {run_id}{budget}"]
    elif status["items"]["failed"]:
        hints.append(f'llm-orchestrator results {run_id} | grep \'"status": "failed"\'')
    for hint in hints:
        out.print(safe(f"Next: {hint}"))


def _is_simulator(settings: Settings, provider: str) -> bool:
    known = settings.providers.get(provider)
    return known is not None and known.dialect == "simulator"
