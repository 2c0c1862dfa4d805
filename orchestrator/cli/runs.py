"""Declares how runs are started, taken up again, followed and listed; `control` changes them while they go on."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import (
    Actor,
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
    Yes,
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
    actor: Actor = None,
    max_failures: MaxFailures = "0",
    progress: ProgressOption = "auto",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Take a paused or interrupted run up again and follow it to its end; with --budget, under a new budget."""
    follow = Follow(as_json=json, detach=detach, progress=progress, max_failures=read_max_failures(max_failures))
    act("runs.resume", name, read_usd(budget), follow, home=home_of(ctx), actor=actor, arguments=sys.argv[1:])


@app.command("retry")
def retry(
    ctx: typer.Context,
    name: RunName,
    failed: Annotated[bool, typer.Option("--failed", help="All calls that failed; the default.")] = False,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="Those of them whose last attempt ended in a way that nobody knows.")
    ] = False,
    actor: Actor = None,
    yes: Yes = False,
    max_failures: MaxFailures = "0",
    progress: ProgressOption = "auto",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Ask calls that failed again, with fresh attempts, and follow the run to its end.

    What was skipped for want of their answers is decided anew, and rankings and other steps that look at all items are
    done anew behind them. Completed answers about items are never asked again.
    """
    follow = Follow(as_json=json, detach=detach, progress=progress, max_failures=read_max_failures(max_failures))
    act(
        "runs.retry",
        name,
        follow,
        home=home_of(ctx),
        actor=actor,
        failed=failed or not unknown,
        unknown=unknown,
        is_agreed=yes,
        arguments=sys.argv[1:],
    )


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
