"""Checks a whole pack before anything is spent: declaration, templates, conditions and answer schemas, all at once.

Templates are checked against sample values: an item as the input has it, and for every earlier step an answer of the
form that the step declares. So a misspelt variable is found before the first call and not after the thousandth.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from orchestrator import context
from orchestrator.declaration import inspect_workflow
from orchestrator.errors import AnswerError, Problem, WorkflowError, did_you_mean
from orchestrator.planning import needed_answers
from orchestrator.results import answer_schema
from orchestrator.toml_source import TomlDocument
from orchestrator.workflow import WORKFLOW_FILE, AnswerField, Step, Workflow, has_type
from prompts.analysis import UNKNOWN
from prompts.conditions import compile_condition
from prompts.engine import PromptEngine
from prompts.errors import PromptError, TemplateProblem

_UNDEFINED = re.compile(r"'([^'.]+)[^']*' is not defined")
SAMPLE_RANK = {"rank": 1, "score": 5.0}
SAMPLE_TOTALS = {"items": 1, "completed": 1, "failed": 0, "skipped": 0, "ranked": 1}


def check_pack(
    files: Mapping[str, str], root: str, examples: Sequence[Mapping[str, Any]]
) -> tuple[Workflow | None, list[Problem]]:
    """Checks a pack.

    Args:
        files: text by file name.
        root: what places call the pack's folder.
        examples: some items; fields that any of them has may be used by templates. Without any, nothing is known
            about items, and names that could be their fields are not reported.

    Returns:
        The workflow, and all problems. With problems the workflow is what is probably meant, and None when that
        cannot be told.
    """
    found = inspect_workflow(files[WORKFLOW_FILE], f"{root}/{WORKFLOW_FILE}")
    problems = list(found.problems)
    workflow, document = found.workflow, found.document
    if workflow is None or document is None:
        return None, problems
    problems.extend(_missing_files(workflow, document, files))
    problems.extend(_schema_problems(workflow, document, files))
    problems.extend(_template_problems(workflow, document, files, root, examples, is_ordered=found.is_ordered))
    return workflow, problems


def read_variables(workflow: Workflow, given: Mapping[str, str], configured: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all declared variables: `--var`, then the installation's settings, then the default.

    Args:
        workflow: the declaration.
        given: from the command line, as text.
        configured: from the configuration, typed.

    Raises:
        WorkflowError: a variable is unknown, missing or of the wrong type; all of them at once.
    """
    problems: list[Problem] = []
    places = {name: f"workflows.{workflow.name}.variables.{name}" for name in configured}
    places |= {name: f"--var {name}" for name in given}
    for name, place in places.items():
        if name not in workflow.variables:
            hint = did_you_mean(name, workflow.variables) if workflow.variables else "it has none"
            problems.append(Problem("variable.unknown", f"the workflow has no variable {name!r}", place, hint))
    values: dict[str, Any] = {}
    for name, variable in workflow.variables.items():
        value = _typed(given[name], variable.type) if name in given else configured.get(name, variable.default)
        if value is None and (variable.required or name in given):
            what = f"must be of type {variable.type}" if name in given else "must be set"
            problems.append(
                Problem(
                    "variable.bad-value", f"variable {name!r} {what}", f"--var {name}", variable.description or None
                )
            )
        elif value is not None and name in places and not has_type(value, variable.type):
            message = f"variable {name!r} must be of type {variable.type}"
            problems.append(Problem("variable.bad-value", message, places[name]))
        values[name] = value
    if problems:
        raise WorkflowError(problems)
    return values


def _typed(text: str, type_: str) -> str | int | float | bool | None:
    """Text from the command line as a value of a type; None if it is none."""
    try:
        match type_:
            case "integer":
                return int(text)
            case "number":
                number = float(text)
                return number if isfinite(number) else None
            case "boolean":
                return {"true": True, "false": False}.get(text.lower())
            case _:
                return text
    except ValueError:
        return None


def _missing_files(workflow: Workflow, document: TomlDocument, files: Mapping[str, str]) -> Iterator[Problem]:
    for index, step in enumerate(workflow.steps):
        for keys, name in ((("prompt",), step.prompt), (("answer", "schema"), step.answer.schema_file)):
            if name is not None and name not in files:
                place = document.locate(("steps", index, *keys))
                hint = did_you_mean(name, [file for file in files if file != WORKFLOW_FILE])
                yield Problem(
                    "pack.missing-file", f"step {step.name!r} names {name!r}, which is not there", place, hint
                )


def _schema_problems(workflow: Workflow, document: TomlDocument, files: Mapping[str, str]) -> Iterator[Problem]:
    for index, step in enumerate(workflow.steps):
        if step.answer.schema_file not in files:
            continue
        try:
            answer_schema(step.answer, files)
        except AnswerError as error:
            yield Problem("pack.bad-schema", str(error), document.locate(("steps", index, "answer", "schema")))


def _template_problems(
    workflow: Workflow,
    document: TomlDocument,
    files: Mapping[str, str],
    root: str,
    examples: Sequence[Mapping[str, Any]],
    *,
    is_ordered: bool,
) -> Iterator[Problem]:
    engine = PromptEngine({name: text for name, text in files.items() if name.endswith(".j2")})
    seen: set[str] = set()
    for index, step in enumerate(workflow.steps):
        values = _sample_values(workflow, step, examples) if is_ordered else _unordered_values(workflow, examples)
        is_open = not examples and step.kind == "item"
        found: list[Problem] = []
        if step.prompt is not None and step.prompt in files:
            found.extend(_of_template(engine, step.prompt, values, root, is_open=is_open))
        if step.when is not None:
            place = document.locate(("steps", index, "when"))
            found.extend(_of_condition(step, values, place, is_open=is_open))
        yield from (problem for problem in found if problem.render() not in seen)
        seen.update(problem.render() for problem in found)


def _of_template(
    engine: PromptEngine, name: str, values: context.Values, root: str, *, is_open: bool
) -> Iterator[Problem]:
    for problem in engine.validate_variables(name, values):
        if not (is_open and _could_be_a_field(problem, values)):
            yield Problem("template.invalid", problem.message, _place(problem, root), problem.hint)


def _of_condition(step: Step, values: context.Values, place: str, *, is_open: bool) -> Iterator[Problem]:
    try:
        found = compile_condition(step.when or "").problems(values)
    except PromptError as error:
        found = [error.problem]
    for problem in found:
        if not (is_open and _could_be_a_field(problem, values)):
            yield Problem("workflow.bad-condition", f"step {step.name!r}: {problem.message}", place, problem.hint)


def _could_be_a_field(problem: TemplateProblem, values: context.Values) -> bool:
    """Whether a name is missing that items may have; asked where no item is known."""
    named = _UNDEFINED.fullmatch(problem.message)
    return named is not None and named[1] not in values


def _place(problem: TemplateProblem, root: str) -> str:
    numbers = [str(number) for number in (problem.line, problem.column) if number is not None]
    return ":".join([f"{root}/{problem.template}", *numbers])


def _unordered_values(workflow: Workflow, examples: Sequence[Mapping[str, Any]]) -> context.Values:
    """Names for a workflow whose steps have no order: every step may see every other one."""
    answers = {step.name: UNKNOWN for step in workflow.steps}
    answers |= {step.alias: UNKNOWN for step in workflow.steps if step.alias is not None}
    others = {"answers": UNKNOWN, "entries": UNKNOWN, "totals": UNKNOWN, "workflow": "", "step": ""}
    return {**_sample_item(examples), **_sample_variables(workflow), **answers, **others, "item": UNKNOWN}


def _sample_values(workflow: Workflow, step: Step, examples: Sequence[Mapping[str, Any]]) -> context.Values:
    variables, item = _sample_variables(workflow), _sample_item(examples)
    earlier = [workflow.step(name) for name in needed_answers(workflow, step)]
    answers = {one.name: SAMPLE_RANK if not one.asks() else _sample_answer(one) for one in earlier}
    if step.kind == "item":
        values = context.item_context(workflow, step.name, variables, item, answers)
        return values if examples else {**values, "item": UNKNOWN}
    of_items = {one.name: answers[one.name] for one in earlier if one.kind == "item"}
    entries = [{**SAMPLE_RANK, "key": "sample", "item": item if examples else UNKNOWN, "answers": of_items}]
    reduced = {one.name: answers[one.name] for one in earlier if one.kind == "reduce" and one.asks()}
    return context.reduce_context(workflow, step.name, variables, entries, SAMPLE_TOTALS, reduced)


def _sample_item(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    item: dict[str, Any] = {}
    for example in examples:
        item = {**example, **item}
    return item


def _sample_variables(workflow: Workflow) -> dict[str, Any]:
    return {name: _sample_variable(variable.type, variable.default) for name, variable in workflow.variables.items()}


def _sample_variable(type_: str, default: Any) -> Any:
    return default if default is not None else {"integer": 1, "number": 1.0, "boolean": True}.get(type_, "sample")


def _sample_answer(step: Step) -> Any:
    if step.answer.format != "json":
        return "sample"
    if step.answer.fields is None:
        # The fields of a schema file are not known here; its templates are checked by name only.
        return UNKNOWN
    return {name: _sample_field(field) for name, field in step.answer.fields.items()}


def _sample_field(field: AnswerField) -> Any:
    if field.fields is not None:
        return {name: _sample_field(inner) for name, inner in field.fields.items()}
    if field.choices:
        return field.choices[0]
    match field.type:
        case "list":
            return [] if field.items is None else [_sample_field(field.items)]
        case "integer" | "number":
            return field.minimum if field.minimum is not None else 1
        case "boolean":
            return True
        case _:
            return "sample"
