"""Reads `workflow.toml` into a `Workflow`, or tells everything that is wrong with it, each with its line and column.

A misspelt key or value is read as what was probably meant, so that the checks which need a whole workflow can go on and
a person meets all problems together. Checks that need templates, items or providers are made in
`orchestrator.validation`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.declaration_checks import order_problems, structure_problems
from orchestrator.errors import InvalidInput, Problem, WorkflowError, did_you_mean, suggest
from orchestrator.toml_source import TomlDocument, parse_toml
from orchestrator.workflow import (
    AnswerField,
    AnswerSpec,
    Limits,
    Reduce,
    Retry,
    Routing,
    Step,
    Variable,
    Workflow,
)

_QUOTED = re.compile("'([^']*)'")


@dataclass(frozen=True, slots=True)
class Inspected:
    """A declaration with all that is wrong with it.

    Attributes:
        workflow: what it says; with problems, what it probably means. None when that cannot be told.
        document: for locating further problems; None when the text is no TOML.
        is_ordered: the steps have an order of work, so that it is known what each of them sees.
    """

    workflow: Workflow | None
    document: TomlDocument | None
    problems: tuple[Problem, ...]
    is_ordered: bool


def read_workflow(source: str, place: str) -> tuple[Workflow, TomlDocument]:
    """Reads a declaration.

    Args:
        source: text of `workflow.toml`.
        place: what problems call the file.

    Returns:
        The workflow, and the document for locating further problems.

    Raises:
        WorkflowError: with all problems; each place is `file:line:column`.
    """
    found = inspect_workflow(source, place)
    if found.problems or found.workflow is None or found.document is None:
        raise WorkflowError(found.problems)
    return found.workflow, found.document


def inspect_workflow(source: str, place: str) -> Inspected:
    """Reads a declaration as far as it can be read, so that one mistake does not hide another one.

    A key that is misspelt is taken for the one that was probably meant, and a value that cannot be used for its
    default; what is then wrong is reported beside it.
    """
    try:
        document = parse_toml(source, place)
    except InvalidInput as error:
        return Inspected(None, None, error.problems, is_ordered=False)
    problems: list[Problem] = []
    try:
        workflow = _validated(document.data)
    except ValidationError as error:
        details = _innermost(error.errors())
        problems.extend(_as_problem(detail, document) for detail in details)
        workflow = _repaired(document.data, details)
    if workflow is None:
        return Inspected(None, document, tuple(problems), is_ordered=False)
    order = list(order_problems(workflow, document))
    known = {(one.place, one.code) for one in problems}
    further = [*order, *structure_problems(workflow, document)]
    problems.extend(one for one in further if (one.place, one.code) not in known)
    return Inspected(workflow, document, tuple(problems), is_ordered=not order)


def _validated(data: Mapping[str, Any]) -> Workflow:
    # Through JSON, because strict validation takes an array for a tuple only there.
    return Workflow.model_validate_json(json.dumps(data, default=str))


def _innermost(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without complaints about a whole that only repeat what is wrong inside: no valid step makes "no steps"."""
    places = [one["loc"] for one in details]
    return [
        one
        for one in details
        if not any(len(place) > len(one["loc"]) and place[: len(one["loc"])] == one["loc"] for place in places)
    ]


def _repaired(data: Mapping[str, Any], details: Sequence[ErrorDetails]) -> Workflow | None:
    """The workflow that was probably meant; None when something is missing or too much is wrong."""
    copy = json.loads(json.dumps(data, default=str))
    try:
        # Deepest and last first, so that the positions of the others stay true.
        for detail in sorted(details, key=lambda one: [str(part).zfill(6) for part in one["loc"]], reverse=True):
            _repair(copy, detail)
        return _validated(copy)
    except (LookupError, ValidationError):
        return None


def _repair(data: Any, detail: ErrorDetails) -> None:
    """Renames a misspelt key, or takes away a value that is not valid.

    Raises:
        LookupError: there is no way to go on without what is wrong.
    """
    if detail["type"] == "missing":
        raise LookupError(detail["loc"])
    path = list(detail["loc"])
    tables = [data]
    for part in path:
        # Behind the value itself stand the types that it could have had.
        inner = tables[-1]
        if not isinstance(inner, dict | list) or (isinstance(inner, dict) and part not in inner):
            break
        tables.append(inner[part])  # pyright: ignore[reportArgumentType, reportCallIssue, reportUnknownArgumentType]
    path = path[: len(tables) - 1]
    while path and not isinstance(path[-1], str):
        path.pop()
    if not path:
        raise LookupError(detail["loc"])
    table = tables[len(path) - 1]
    value = table.pop(path[-1])
    if detail["type"] == "extra_forbidden":
        meant = suggest(str(path[-1]), _keys_beside(path))
        if meant is not None and meant not in table:
            table[meant] = value
    elif detail["type"] == "literal_error" and (meant := suggest(str(value), _choices(detail))) is not None:
        table[path[-1]] = meant


def _choices(detail: ErrorDetails) -> list[str]:
    """The words that may stand where another one stands."""
    return _QUOTED.findall(str(detail.get("ctx", {}).get("expected", "")))


def _as_problem(detail: ErrorDetails, document: TomlDocument) -> Problem:
    path = detail["loc"]
    place = document.locate(path)
    where = ".".join(str(part) for part in path)
    match detail["type"]:
        case "extra_forbidden":
            hint = did_you_mean(str(path[-1]), _keys_beside(path))
            return Problem("workflow.unknown-key", f"unknown key {path[-1]!r}", place, hint)
        case "missing":
            return Problem("workflow.missing-key", f"{where} is missing", place)
        case "string_pattern_mismatch":
            hint = "use lower-case letters, digits and underscores, and begin with a letter"
            return Problem("workflow.bad-name", f"{where} is no valid name: {detail['input']!r}", place, hint)
        case "literal_error":
            hint = did_you_mean(str(detail["input"]), _choices(detail))
            return Problem("workflow.bad-value", f"{where} cannot be {detail['input']!r}", place, hint)
        case _:
            return Problem("workflow.bad-value", f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]}", place)


def _keys_beside(path: Sequence[str | int]) -> Iterable[str]:
    """The keys that may stand where the last part of `path` stands."""
    model: type[BaseModel] = Workflow
    for part in path[:-1]:
        if isinstance(part, str) and (found := _model_of(model, part)) is not None:
            model = found
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    return {
        "steps": Step,
        "variables": Variable,
        "budget": Limits,
        "routing": Routing,
        "route": Routing,
        "retry": Retry,
        "reduce": Reduce,
        "answer": AnswerSpec,
        "fields": AnswerField,
        "items": AnswerField,
    }.get(key)
