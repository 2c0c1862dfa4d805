"""Declares what is done with runs: start, follow, pause, resume, cancel, list."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import (
    Asked,
    Budget,
    Detach,
    Follow,
    Input,
    InputFormat,
    Json,
    Limit,
    MaxFailures,
    Model,
    PackName,
    ProgressOption,
    Provider,
    RunName,
    Sample,
    Seed,
    Var,
    home_of,
    plain_app,
    read_max_failures,
    read_usd,
    read_variables,
)

app = plain_app()
runs_app = plain_app(help="List runs.")
app.add_typer(runs_app, name="runs")


@app.command("run")
def run(
    ctx: typer.Context,
    pack: PackName,
    input: Input = None,
    input_format: InputFormat = None,
    provider: Provider = None,
    model: Model = None,
    var: Var = None,
    limit: Limit = None,
    sample: Sample = None,
    seed: Seed = 0,
    budget: Budget = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin a new run even if an equal one is unfinished.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run with its own input.")] = None,
    max_failures: MaxFailures = "0",
    progress: ProgressOption = "auto",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Run a pack over items and follow the run to its end.

    An unfinished run of the same pack, items and models is continued; nothing is asked or paid twice. Ctrl-C leaves the
    run as it is, to be continued later.
    """
    if new and resume is not None:
        raise typer.BadParameter("--new and --resume exclude each other")
    asked = Asked(
        pack=pack,
        input=input,
        input_format=input_format,
        provider=provider,
        model=model,
        variables=read_variables(var),
        limit=limit,
        sample=sample,
        seed=seed,
        budget_usd=read_usd(budget),
    )
    follow = Follow(as_json=json, detach=detach, progress=progress, max_failures=read_max_failures(max_failures))
    act("run", asked, follow, home=home_of(ctx), is_agreed=yes, is_new=new, resume=resume, arguments=sys.argv[1:])


@app.command("resume")
def resume(
    ctx: typer.Context,
    name: RunName,
    budget: Budget = None,
    max_failures: MaxFailures = "0",
    progress: ProgressOption = "auto",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Take a paused or interrupted run up again and follow it to its end; with --budget, under a new budget."""
    follow = Follow(as_json=json, detach=detach, progress=progress, max_failures=read_max_failures(max_failures))
    act("runs.resume", name, read_usd(budget), follow, home=home_of(ctx), arguments=sys.argv[1:])


@app.command("pause")
def pause(ctx: typer.Context, name: RunName, json: Json = False) -> None:
    """Stop asking; calls in flight may still end. `resume` goes on."""
    act("runs.pause", name, home=home_of(ctx), as_json=json)


@app.command("cancel")
def cancel(ctx: typer.Context, name: RunName, json: Json = False) -> None:
    """End a run for good; its answers stay."""
    act("runs.cancel", name, home=home_of(ctx), as_json=json)


@app.command("status")
def status(
    ctx: typer.Context,
    name: RunName = "latest",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until the run ends.")] = False,
    json: Json = False,
) -> None:
    """Show how far a run is, what it costs, and what holds it up."""
    act("runs.status", name, home=home_of(ctx), watch=watch, as_json=json)


@runs_app.command("list")
def list_runs(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    status: Annotated[
        Literal["pending", "running", "paused", "completed", "failed", "cancelled"] | None,
        typer.Option(help="Only runs with this status."),
    ] = None,
    json: Json = False,
) -> None:
    """List runs, newest first."""
    act("runs.list", home=home_of(ctx), limit=limit, status=status, as_json=json)
