"""The one door from light modules to heavy ones.

Importing SQLAlchemy, Celery and the HTTP libraries takes a second that nobody wants to wait for when asking for help.
So commands name what they do, and the module behind the name is imported when it is done. Both tables are checked by a
test, since no type checker sees through a dotted name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer


@dataclass(frozen=True, slots=True)
class Declared:
    """Where a command is declared, and the line that the list of commands shows for it."""

    module: str
    help: str


_HERE = "orchestrator.cli"

COMMANDS: Mapping[str, Declared] = {
    "init": Declared("packs", "Write a pack of your own and example settings"),
    "validate": Declared("packs", "Check a pack and its items; spends nothing"),
    "estimate": Declared("packs", "Tell what a run would cost; spends nothing"),
    "run": Declared("runs", "Run a pack over items"),
    "status": Declared("runs", "Show how far a run is"),
    "resume": Declared("runs", "Take a run up again"),
    "pause": Declared("control", "Pause a run"),
    "cancel": Declared("control", "End a run for good"),
    "retry": Declared("runs", "Ask calls that failed again"),
    "priority": Declared("control", "Let a run go before others"),
    "budget": Declared("control", "Show or change budgets"),
    "limits": Declared("control", "Show or change limits of providers"),
    "runs": Declared("runs", "List runs"),
    "results": Declared("results", "Write the answers of a run as JSON Lines, CSV, Markdown, ..."),
    "show": Declared("results", "Explain everything about one item of a run"),
    "explain": Declared("results", "The same as show"),
    "cost": Declared("costs", "Show what was spent, on what"),
    "packs": Declared("packs", "List the packs that ship with the product"),
    "providers": Declared("providers", "List providers"),
    "config": Declared("system", "Show the settings in force"),
    "cache": Declared("system", "Look after answers that are kept"),
    "audit": Declared("keeping", "Show who changed what, and check the log"),
    "backup": Declared("keeping", "Copy the database"),
    "restore": Declared("keeping", "Put a copy of the database back"),
    "erase": Declared("keeping", "Erase texts about items"),
    "retention": Declared("keeping", "Erase or remove old runs"),
    "worker": Declared("system", "Run a worker of a cluster"),
    "db": Declared("system", "Create, upgrade or check the database"),
    "doctor": Declared("system", "Check everything that a run needs"),
    "version": Declared("system", "Show versions"),
}

ACTIONS: Mapping[str, str] = {
    "audit.list": "keeping:list_audit",
    "audit.verify": "keeping:verify_audit",
    "backup": "keeping:backup",
    "budget.set": "controlling:set_budget",
    "budget.show": "controlling:show_budgets",
    "cache.purge": "system:purge_cache",
    "cache.stats": "system:show_cache",
    "config.show": "system:show_config",
    "cost": "reading:show_costs",
    "crash.report": "crash:write_report",
    "db.check": "system:check_database",
    "db.upgrade": "system:upgrade_database",
    "doctor": "system:examine",
    "erase": "keeping:erase",
    "estimate": "packs:show_estimate",
    "init": "scaffold:write_pack",
    "limits.set": "controlling:set_limits",
    "limits.show": "controlling:show_limits",
    "packs.list": "packs:list_packs",
    "providers.list": "system:list_providers",
    "restore": "keeping:restore",
    "results": "reading:write_results",
    "retention": "keeping:apply_retention",
    "run": "running:run",
    "run.detached": "detaching:run_detached",
    "runs.cancel": "controlling:cancel",
    "runs.list": "reading:list_runs",
    "runs.pause": "controlling:pause",
    "runs.priority": "controlling:set_priority",
    "runs.resume": "running:resume",
    "runs.retry": "running:retry",
    "runs.status": "watching:show_status",
    "show": "reading:explain",
    "validate": "packs:validate",
    "version": "system:show_versions",
    "worker": "system:become_worker",
}


def declared_commands(name: str) -> typer.Typer:
    """The Typer application of the module that declares a command."""
    return import_module(f"{_HERE}.{COMMANDS[name].module}").app


def act(name: str, *args: Any, **options: Any) -> None:
    """Does an action and ends the process with its exit code, unless that is 0."""
    module, function = ACTIONS[name].split(":")
    code = getattr(import_module(f"{_HERE}.actions.{module}"), function)(*args, **options)
    if code:
        raise typer.Exit(int(code))
