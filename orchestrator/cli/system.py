"""Declares what keeps an installation going: settings, database, cache, workers, checks."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import Json, home_of, plain_app, read_age

app = plain_app()
config_app = plain_app(help="Show the settings in force.")
db_app = plain_app(help="Create, upgrade or check the database.")
cache_app = plain_app(help="Look after answers that are kept for equal calls.")
app.add_typer(config_app, name="config")
app.add_typer(db_app, name="db")
app.add_typer(cache_app, name="cache")


@config_app.command("show")
def show_config(
    ctx: typer.Context,
    sources: Annotated[bool, typer.Option("--sources", help="Also where each value comes from.")] = False,
    json: Json = False,
) -> None:
    """Show every setting; secrets are masked."""
    act("config.show", home=home_of(ctx), with_sources=sources, as_json=json)


@db_app.command("upgrade")
def upgrade(ctx: typer.Context, json: Json = False) -> None:
    """Bring the database to this release. Safe to repeat."""
    act("db.upgrade", home=home_of(ctx), as_json=json)


@db_app.command("check")
def check(ctx: typer.Context, json: Json = False) -> None:
    """Check that the database answers and is at this release."""
    act("db.check", home=home_of(ctx), as_json=json)


@cache_app.command("stats")
def stats(ctx: typer.Context, json: Json = False) -> None:
    """Show how much is kept, and what it saved in every run."""
    act("cache.stats", home=home_of(ctx), as_json=json)


@cache_app.command("purge")
def purge(
    ctx: typer.Context,
    expired: Annotated[bool, typer.Option("--expired", help="What has expired; the default.")] = False,
    all: Annotated[bool, typer.Option("--all", help="Everything, not only what has expired.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="What was kept for longer: 30d, 12h, ...")
    ] = None,
    json: Json = False,
) -> None:
    """Remove answers that have expired, or others."""
    if expired + all + (older_than is not None) > 1:
        raise typer.BadParameter("--expired, --all and --older-than exclude each other")
    act("cache.purge", home=home_of(ctx), everything=all, older_than=read_age(older_than), as_json=json)


@app.command("worker")
def worker(
    ctx: typer.Context,
    queues: Annotated[
        str | None, typer.Option("--queues", "-Q", metavar="Q,...", help="Queues to serve; else all of them.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", min=1, help="Calls in flight; else as configured.")
    ] = None,
) -> None:
    """Become a worker of the cluster at REDIS_URL. SIGTERM lets calls in flight end, a second one does not wait."""
    act("worker", home=home_of(ctx), queues=queues, concurrency=concurrency)


@app.command("doctor")
def doctor(ctx: typer.Context, json: Json = False) -> None:
    """Check everything that a run needs, each with what to do about it."""
    act("doctor", home=home_of(ctx), as_json=json)


@app.command("version")
def version(json: Json = False) -> None:
    """Show the versions of the product and of what it stands on."""
    act("version", as_json=json)
