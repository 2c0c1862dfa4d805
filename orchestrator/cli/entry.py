"""The way in and the only way out: finds the command, and turns whatever happens into an exit code and a message.

Only the module that declares the command in question is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from orchestrator import __version__
from orchestrator.cli.lazy import COMMANDS, act, declared_commands
from orchestrator.cli.options import plain_app
from orchestrator.errors import (
    ConfigError,
    EnvironmentNotReady,
    ExitCode,
    InvalidInput,
    OrchestratorError,
    did_you_mean,
)

PROGRAM = "llm-orchestrator"


class _Commands(TyperGroup):
    """Commands by name, imported one at a time; the list of all of them is made from the table alone."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if name != "explain"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A placeholder with the command's one line of help; `resolve_command` brings the real one."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name].help, rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        if name not in COMMANDS:
            ctx.fail(f"No such command {name!r}; {did_you_mean(name, COMMANDS)}")
        return name, get_group(declared_commands(name)).commands[name], args[1:]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["as_json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OrchestratorError as error:
            _show(error, as_json=ctx.meta["as_json"])
            raise typer.Exit(int(error.exit_code)) from None
        except BrokenPipeError:
            # Whoever reads has seen enough. Nothing may be flushed into the closed pipe when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = plain_app(cls=_Commands, add_completion=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit(0)


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
    ctx: typer.Context,
    home: Annotated[
        Path | None, typer.Option(help="Directory of all state; instead of LLM_ORCHESTRATOR_HOME or ./data.")
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Run human-judgment tasks at scale: LLMs answer, every answer is checked, every cent is accounted for."""
    ctx.obj = home


def main() -> None:
    """Runs the command line of this process and ends it with the exit code of the contract."""
    try:
        get_group(app).main(prog_name=PROGRAM)
    except Exception as error:
        act("crash.report", error)
        sys.exit(int(ExitCode.INTERNAL_ERROR))
    finally:
        _flush()


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(error: OrchestratorError, *, as_json: bool) -> None:
    """Every problem on stderr: as text, or as one JSON object per line."""
    if isinstance(error, InvalidInput | EnvironmentNotReady | ConfigError):
        for problem in error.problems:
            typer.echo(json.dumps(problem.to_json()) if as_json else problem.render(), err=True)
    elif as_json:
        typer.echo(json.dumps({"code": error.exit_code.name.lower(), "message": str(error)}), err=True)
    else:
        typer.echo(f"error: {error}", err=True)
