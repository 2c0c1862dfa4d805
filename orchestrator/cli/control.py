"""Declares what is changed while runs go on: pause, cancel, priority, budgets, limits."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.lazy import act
from orchestrator.cli.options import Actor, Json, RunName, home_of, plain_app, read_usd

app = plain_app()
budget_app = plain_app(help="Show budgets, or change their limits.")
limits_app = plain_app(help="Show limits of providers, or change them on all workers.")
app.add_typer(budget_app, name="budget")
app.add_typer(limits_app, name="limits")

PerMinute = Annotated[int | None, typer.Option(min=0, max=1_000_000_000, metavar="N", help="Per minute; 0 pauses.")]


@app.command("pause")
def pause(ctx: typer.Context, name: RunName, actor: Actor = None, json: Json = False) -> None:
    """Stop asking; calls in flight may still end. `resume` goes on."""
    act("runs.pause", name, home=home_of(ctx), actor=actor, as_json=json)


@app.command("cancel")
def cancel(ctx: typer.Context, name: RunName, actor: Actor = None, json: Json = False) -> None:
    """End a run for good; its answers stay."""
    act("runs.cancel", name, home=home_of(ctx), actor=actor, as_json=json)


@app.command("priority", context_settings={"ignore_unknown_options": True})
def priority(
    ctx: typer.Context,
    name: RunName,
    number: Annotated[int, typer.Argument(metavar="N", help="Higher ones go first; runs begin with 0.")],
    actor: Actor = None,
    json: Json = False,
) -> None:
    """Let a run go before others, or after them."""
    act("runs.priority", name, number, home=home_of(ctx), actor=actor, as_json=json)


@budget_app.command("show")
def show_budgets(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Those that concern this run.")] = None,
    json: Json = False,
) -> None:
    """Show limits, and what is spent and in flight."""
    act("budget.show", name, home=home_of(ctx), as_json=json)


@budget_app.command("set")
def set_budget(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="BUDGET", help="A run, `global`, `workflow:NAME`, `provider:NAME` or `day`."),
    ],
    usd: Annotated[str, typer.Argument(metavar="USD", help="Its limit, or `none`.")],
    actor: Actor = None,
    json: Json = False,
) -> None:
    """Change a limit, of running and of paused runs alike. A run that the budget paused is taken up by `resume`."""
    limit = None if usd == "none" else read_usd(usd)
    act("budget.set", name, limit, home=home_of(ctx), actor=actor, as_json=json)


@limits_app.command("show")
def show_limits(ctx: typer.Context, json: Json = False) -> None:
    """Show limits as configured, as changed, and in force."""
    act("limits.show", home=home_of(ctx), as_json=json)


@limits_app.command("set")
def set_limits(
    ctx: typer.Context,
    provider: Annotated[str, typer.Argument(metavar="PROVIDER")],
    rpm: PerMinute = None,
    tpm: PerMinute = None,
    concurrency: Annotated[
        int | None, typer.Option(min=0, max=1_000_000, metavar="N", help="Calls in flight; 0 pauses.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Leave all limits to the configuration again.")] = False,
    actor: Actor = None,
    json: Json = False,
) -> None:
    """Change limits of a provider on all workers, until they are cleared; what is not named stays."""
    wanted = {"rpm": rpm, "tpm": tpm, "concurrency": concurrency}
    if clear != all(number is None for number in wanted.values()):
        raise typer.BadParameter("name limits, or --clear")
    act("limits.set", provider, wanted, home=home_of(ctx), is_cleared=clear, actor=actor, as_json=json)
