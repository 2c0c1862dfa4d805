"""Declares how answers are read: all of a run's, or everything about one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import Json, RunName, home_of, plain_app

app = plain_app()

ItemKey = Annotated[str, typer.Argument(metavar="ITEM", help="The key of an item, or the name of a reduce step.")]


@app.command("results")
def results(
    ctx: typer.Context,
    name: RunName = "latest",
    step: Annotated[str | None, typer.Option(help="Only this step.")] = None,
    format: Annotated[
        Literal["jsonl", "csv", "md", "html", "parquet"] | None,
        typer.Option("--format", "-f", help="Else told from the file's suffix, else jsonl."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; else stdout.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format jsonl.")] = False,
) -> None:
    """Write one row per item and step, items in the order of the input; reduce steps come last."""
    act("results", name, home=home_of(ctx), step=step, wanted="jsonl" if json else format, output=output)


@app.command("show")
def show(ctx: typer.Context, name: RunName, item: ItemKey, json: Json = False) -> None:
    """Explain one item: prompts, routes with their reasons, every attempt, answers, costs and places in rankings."""
    act("show", name, item, home=home_of(ctx), as_json=json)


@app.command("explain", hidden=True)
def explain(ctx: typer.Context, name: RunName, item: ItemKey, json: Json = False) -> None:
    """The same as show."""
    act("show", name, item, home=home_of(ctx), as_json=json)
