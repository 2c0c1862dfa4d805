"""Declares how costs are read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import Json, home_of, plain_app

app = plain_app()


@app.command("cost")
def cost(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Only this run.")] = None,
    by: Annotated[Literal["run", "provider", "model", "step", "day"], typer.Option(help="What to group by.")] = "run",
    since: Annotated[
        datetime | None, typer.Option(metavar="DATE", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="UTC.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what was spent; every grouping adds up to the ledger exactly."""
    act("cost", home=home_of(ctx), run=run, by=by, since=since, as_json=json)
