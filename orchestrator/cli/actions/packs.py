"""Actions on packs that spend nothing: list, check, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.cli.actions.asking import request_of, show_plan
from orchestrator.cli.actions.output import console, put_json, say, table
from orchestrator.cli.actions.session import load_config, translated
from orchestrator.cli.options import Asked
from orchestrator.declaration import read_workflow
from orchestrator.errors import ExitCode, InvalidInput
from orchestrator.files import WORKFLOW_FILE, FileManager
from orchestrator.manager import WorkflowManager


def validate(asked: Asked, *, home: Path | None, as_json: bool) -> int:
    """Checks everything that a run would need; with JSON, the problems are data and go to stdout."""
    try:
        with WorkflowManager(load_config(home)) as manager, translated(manager.database.address):
            plan = manager.plan(request_of(asked))
    except InvalidInput as error:
        if not as_json:
            raise
        put_json({"valid": False, "problems": [problem.to_json() for problem in error.problems]})
        return int(ExitCode.INVALID_INPUT)
    if as_json:
        steps = [step.name for step in plan.workflow.ordered_steps]
        put_json(
            {"valid": True, "problems": [], "workflow": plan.workflow.name, "items": plan.summary.count, "steps": steps}
        )
    else:
        say(f"{plan.workflow.name} {plan.workflow.version} is valid, with {plan.summary.count:,} items")
    return int(ExitCode.OK)


def show_estimate(asked: Asked, *, home: Path | None, as_json: bool) -> None:
    """Tells what a run would cost."""
    with WorkflowManager(load_config(home)) as manager, translated(manager.database.address):
        show_plan(manager.plan(request_of(asked)), as_json=as_json)


def list_packs(*, home: Path | None, as_json: bool) -> None:
    """Lists the packs that ship with the product."""
    files = FileManager(load_config(home).settings.home)
    packs = [_described(files, name) for name in files.list_packs()]
    if as_json:
        put_json(packs)
    else:
        rows = [[pack["name"], pack["version"], len(pack["steps"]), pack["description"]] for pack in packs]
        console().print(table(("pack", "version", "steps>", "description"), rows))


def _described(files: FileManager, name: str) -> dict[str, Any]:
    pack = files.load_prompts(name)
    text = pack.files.get(WORKFLOW_FILE) or pack.workflow_text
    workflow, _ = read_workflow(text, f"{name}/{WORKFLOW_FILE}")
    return {
        "name": workflow.name,
        "version": workflow.version,
        "description": workflow.description,
        "steps": [step.name for step in workflow.ordered_steps],
        "variables": {key: variable.description for key, variable in workflow.variables.items()},
        "sha256": pack.sha256,
        "path": str(pack.root),
    }
