"""Actions that read what was stored: results, explanations, costs, runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cli.actions.output import Refused, console, duration, facts, put_json, safe, table
from orchestrator.cli.actions.session import load_config, reading, reading_run
from orchestrator.database import Connection, costs, records, reports
from orchestrator.database.runs import RunStatus
from orchestrator.errors import did_you_mean
from orchestrator.files import write_atomically
from orchestrator.money import usd
from orchestrator.reports.layouts import Format, format_of, layout, write_parquet
from orchestrator.reports.rows import result_rows

_TOTALS = ("calls", "attempts", "unknown_attempts", "input_tokens", "output_tokens", "cached_tokens")
_MONEY = ("cost_usd", "unconfirmed_usd")


def write_results(
    name: str, *, home: Path | None, step: str | None, wanted: Format | None, output: Path | None
) -> None:
    """Writes the rows of a run to stdout or a file."""
    to_file = output is not None and str(output) != "-"
    chosen: Format = wanted or (format_of(output) if output is not None and to_file else None) or "jsonl"
    if chosen == "parquet" and not to_file:
        raise Refused("Parquet is no text; name a file with -o")
    with reading_run(load_config(home), name) as (connection, run, run_id):
        _require_step(connection, run, step)
        rows = result_rows(connection, run, step)
        if output is not None and to_file:
            _write_file(rows, chosen, output, run_id)
        elif chosen != "parquet":
            for piece in layout(rows, chosen, run_id):
                sys.stdout.write(piece)


def _write_file(rows: Iterable[Mapping[str, Any]], chosen: Format, output: Path, run_id: str) -> None:
    if chosen == "parquet":
        write_parquet(rows, output)
    else:
        write_atomically(output.absolute(), (piece.encode() for piece in layout(rows, chosen, run_id)))


def _require_step(connection: Connection, run: int, step: str | None) -> None:
    known = [one["name"] for one in records.run_steps(connection, run)]
    if step is not None and step not in known:
        raise Refused(f"the run has no step {step!r}; {did_you_mean(step, known)}")


def explain(name: str, item: str, *, home: Path | None, as_json: bool) -> None:
    """Shows everything about one item, or one reduce step."""
    with reading_run(load_config(home), name) as (connection, run, run_id):
        story = records.explain(connection, run, item)
    if story is None:
        raise Refused(f"run {run_id} has no item {item!r}; `llm-orchestrator results {run_id}` lists them")
    if as_json:
        put_json(story)
        return
    out = console()
    places = {
        place["step"]: f"rank {place['rank']} of {place['of']}, score {place['score']:g}" for place in story["rankings"]
    }
    workflow = f"{story['workflow']} {story['workflow_version']}, pack {story['pack_hash'][:12]}"
    known = {"run": story["run_id"], "workflow": workflow, "item": story["item_key"], "fields": story["item"]}
    out.print(facts(known | places))
    if story["ranking"]:
        rows = [[place["rank"], place["item_key"], f"{place['score']:g}"] for place in story["ranking"]]
        out.print(table(("rank>", "item", "score>"), rows))
    for call in story["calls"]:
        _print_call(out, call)


def _print_call(out: Console, call: Mapping[str, Any]) -> None:
    out.print()
    routes = [f"{route['provider']}/{route['model']} ({route['reason']})" for route in call["routes"]]
    out.rule(safe(f"{call['step']}: {call['status']}"), align="left", characters="-")
    out.print(
        facts(
            {
                "template": call["template"],
                "routes": "; then ".join(routes) or None,
                "answered by": "the cache" if call["cached"] else f"{call['provider']}/{call['model']}",
                "cost": f"${call['cost_usd']}",
                "quality": call["quality_score"],
                "answer": call["answer"],
                "error": call["error"],
            }
        )
    )
    if call["attempts"]:
        out.print(table(_ATTEMPT_COLUMNS, [_attempt_row(attempt) for attempt in call["attempts"]]))
    if call["prompt"]:
        out.print("prompt", style="bold")
        for line in str(call["prompt"]).splitlines():
            out.print(safe(line) if line.strip() else "")


_ATTEMPT_COLUMNS = ("attempt>", "status", "provider", "model", "in>", "out>", "cost>", "ms>", "request", "error")


def _attempt_row(attempt: Mapping[str, Any]) -> list[Any]:
    error = attempt["error"]
    return [
        attempt["number"],
        attempt["status"],
        attempt["provider"],
        attempt["model_answered"] or attempt["model"],
        attempt["input_tokens"],
        attempt["output_tokens"],
        f"${attempt['cost_usd']}",
        attempt["latency_ms"],
        attempt["request_id"],
        None if error is None else f"{error['code']}: {error['message']}",
    ]


def show_costs(
    *, home: Path | None, run: str | None, by: costs.Grouping, since: datetime | None, as_json: bool
) -> None:
    """Shows costs in groups, and their sum."""
    from_then = None if since is None else since.replace(tzinfo=UTC)
    config = load_config(home)
    if run is not None:
        with reading_run(config, run) as (connection, number, _):
            groups = costs.costs(connection, number, by, from_then)
    else:
        with reading(config) as connection:
            groups = [] if connection is None else costs.costs(connection, None, by, from_then)
    if as_json:
        put_json(groups)
        return
    print_costs(groups)


def print_costs(groups: list[dict[str, Any]]) -> None:
    """A table of cost groups with their sum."""
    if not groups:
        console(err=True).print("nothing was spent")
        return
    names = [name for name in groups[0] if name not in (*_TOTALS, *_MONEY)]
    rows = [
        [
            *(group[name] for name in names),
            *(f"{group[name]:,}" for name in _TOTALS),
            *(f"${group[name]}" for name in _MONEY),
        ]
        for group in groups
    ]
    sums = [f"{sum(group[name] for group in groups):,}" for name in _TOTALS]
    rows.append(["total", *[""] * (len(names) - 1), *sums, *(f"${usd(_sum(groups, name))}" for name in _MONEY)])
    counted = ("calls>", "attempts>", "unknown>", "input tokens>", "output tokens>", "cached>")
    columns = (*names, *counted, "cost>", "of it unconfirmed>")
    console().print(table(columns, rows))


def _sum(groups: list[dict[str, Any]], name: str) -> int:
    """The sum of decimal strings in whole nano-USD."""
    parts = [group[name].partition(".") for group in groups]
    return sum(int(whole) * 10**9 + int(rest.ljust(9, "0")) for whole, _, rest in parts)


def list_runs(*, home: Path | None, limit: int, status: RunStatus | None, as_json: bool) -> None:
    """Lists runs, newest first."""
    with reading(load_config(home)) as connection:
        runs = [] if connection is None else reports.list_runs(connection, limit, status)
    if as_json:
        put_json(runs)
        return
    if not runs:
        console(err=True).print("no runs yet; begin one with: llm-orchestrator run project_selection")
        return
    rows = [
        [
            run["run_id"],
            run["workflow"],
            run["project"],
            run["status"] if run["reason"] is None else f"{run['status']} ({run['reason']})",
            f"{run['items']:,}",
            f"${run['cost_usd']}",
            duration(run["duration_seconds"]) if run["duration_seconds"] is not None else "",
        ]
        for run in runs
    ]
    console().print(table(("run", "workflow", "input", "status", "items>", "cost>", "took>"), rows))
