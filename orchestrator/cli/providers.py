"""Declares how providers are read."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import Json, home_of, plain_app

app = plain_app()
providers_app = plain_app(help="List providers.")
app.add_typer(providers_app, name="providers")


@providers_app.command("list")
def list_providers(
    ctx: typer.Context,
    all: Annotated[bool, typer.Option("--all", help="Also those that are known and not configured.")] = False,
    json: Json = False,
) -> None:
    """List the configured providers with their models and limits; keys are never shown."""
    act("providers.list", home=home_of(ctx), is_complete=all, as_json=json)
