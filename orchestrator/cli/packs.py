"""Declares what is done with packs before anything is spent: write, list, check, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import (
    Asked,
    Budget,
    Input,
    InputFormat,
    Json,
    Limit,
    Model,
    PackName,
    Provider,
    Sample,
    Seed,
    Var,
    home_of,
    plain_app,
    read_usd,
    read_variables,
)

app = plain_app()
packs_app = plain_app(help="List the packs that ship with the product.")
app.add_typer(packs_app, name="packs")


@app.command("init")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    json: Json = False,
) -> None:
    """Write a small pack of your own, with items, and example settings; it runs without a key."""
    act("init", directory, is_forced=force, as_json=json)


@app.command("validate")
def validate(
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
    json: Json = False,
) -> None:
    """Check pack, templates, variables, routes, prices and every item, and report all problems at once."""
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
    act("validate", asked, home=home_of(ctx), as_json=json)


@app.command("estimate")
def estimate(
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
    json: Json = False,
) -> None:
    """Tell how many calls a run would make, and its likely and worst cost."""
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
    act("estimate", asked, home=home_of(ctx), as_json=json)


@packs_app.command("list")
def list_packs(ctx: typer.Context, json: Json = False) -> None:
    """List the packs that ship with the product."""
    act("packs.list", home=home_of(ctx), as_json=json)
