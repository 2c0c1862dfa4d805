"""Declares what is done to what was stored: audit, backup, restore, erase, retention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import Actor, Json, Yes, home_of, plain_app, read_age

app = plain_app()
audit_app = plain_app(help="Show who changed what, or check that nobody changed the log.")
app.add_typer(audit_app, name="audit")


@audit_app.command("list")
def list_audit(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Only what concerns this run.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    json: Json = False,
) -> None:
    """List changes, newest first."""
    act("audit.list", home=home_of(ctx), run=run, limit=limit, as_json=json)


@audit_app.command("verify")
def verify_audit(
    ctx: typer.Context,
    head: Annotated[
        str | None, typer.Option(metavar="HASH", help="A head that was noted earlier and must still be there.")
    ] = None,
    json: Json = False,
) -> None:
    """Check the chain of hashes; ends with 1 and names the first row that was changed."""
    act("audit.verify", home=home_of(ctx), head=head, as_json=json)


@app.command("backup")
def backup(
    ctx: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Else below backups/.")] = None,
    actor: Actor = None,
    json: Json = False,
) -> None:
    """Copy the database into a file, also while runs go on."""
    act("backup", home=home_of(ctx), output=output, actor=actor, as_json=json)


@app.command("restore")
def restore(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="From `backup`.")],
    actor: Actor = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Replace the database by a backup; not while workers are alive. What is there now is kept beside it."""
    act("restore", file, home=home_of(ctx), actor=actor, is_agreed=yes, as_json=json)


@app.command("erase")
def erase(
    ctx: typer.Context,
    item: Annotated[str | None, typer.Option(metavar="KEY", help="One item, in all runs or in --run.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="All items of this run, or one of them.")] = None,
    actor: Actor = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Erase texts about items: fields, prompts, answers, replies, cache, result files. Costs and counts stay."""
    if item is None and run is None:
        raise typer.BadParameter("name --item, --run or both")
    act("erase", home=home_of(ctx), item=item, run=run, actor=actor, is_agreed=yes, as_json=json)


@app.command("retention")
def retention(
    ctx: typer.Context,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Runs that ended before: 90d, 12h, ...")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove the runs, with their costs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell which.")] = False,
    actor: Actor = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Erase the texts of old runs, or remove these runs."""
    act(
        "retention",
        home=home_of(ctx),
        age=read_age(older_than),
        is_deleting=delete,
        is_dry=dry_run,
        actor=actor,
        is_agreed=yes,
        as_json=json,
    )
