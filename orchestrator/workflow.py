"""The validated declaration of a workflow: what `workflow.toml` may say, and what it means.

`read_workflow` turns a pack's declaration into a `Workflow` or raises with every problem at once, each with its line
and column. Checks that need templates, items or providers are made in `orchestrator.validation`; this module looks at
the declaration alone. Its JSON Schema is published for editors by `json_schema`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import InvalidInput, Problem, WorkflowError, did_you_mean, suggest
from orchestrator.toml_source import TomlDocument, parse_toml

WORKFLOW_FILE = "workflow.toml"
RESERVED_NAMES = frozenset({"item", "answers", "entries", "totals", "workflow", "step"})
"""Names that templates see anyway, so that no step, variable or alias may take them."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
ScalarType = Literal["string", "integer", "number", "boolean"]
_QUOTED = re.compile("'([^']*)'")
MAX_USD = 9_000_000
"""Above it a 64-bit number of nano-USD has no room for sums."""
StepKind = Literal["item", "reduce"]
ReduceRule = Literal["rank", "llm"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


class Variable(_Strict):
    """A value that the user may set with `--var`; `required` without a default must be set."""

    type: ScalarType = "string"
    required: bool = False
    default: str | int | float | bool | None = None
    description: str = ""


class AnswerField(_Strict):
    """One field of a JSON answer. `minimum` and `maximum` are inclusive; a list holds `items` of one scalar type."""

    type: Literal["string", "integer", "number", "boolean", "list"]
    description: str = ""
    required: bool = True
    choices: tuple[str | int | float, ...] | None = None
    minimum: float | int | None = None
    maximum: float | int | None = None
    max_length: int | None = Field(default=None, gt=0)
    min_items: int | None = Field(default=None, ge=0)
    max_items: int | None = Field(default=None, gt=0)
    items: "AnswerField | None" = None
    fields: "dict[Name, AnswerField] | None" = None

    def schema_of(self) -> dict[str, Any]:
        """The JSON Schema (draft 2020-12) of this field."""
        schema: dict[str, Any] = {"type": "array" if self.type == "list" else self.type}
        if self.fields is not None:
            schema = object_schema(self.fields)
        if self.items is not None:
            schema["items"] = self.items.schema_of()
        named = {
            "description": self.description or None,
            "enum": list(self.choices) if self.choices else None,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "maxLength": self.max_length,
            "minItems": self.min_items,
            "maxItems": self.max_items,
        }
        return schema | {key: value for key, value in named.items() if value is not None}


def object_schema(fields: Mapping[str, AnswerField]) -> dict[str, Any]:
    """The JSON Schema of an object with exactly these fields, in the strict form that providers accept."""
    return {
        "type": "object",
        "properties": {name: field.schema_of() for name, field in fields.items()},
        "required": [name for name, field in fields.items() if field.required],
        "additionalProperties": False,
    }


class AnswerSpec(_Strict):
    """What a reply must be: a JSON object (inline `fields`, or a `schema` file), Markdown, or plain text."""

    format: Literal["json", "markdown", "text"] = "json"
    fields: dict[Name, AnswerField] | None = None
    schema_file: str | None = Field(default=None, alias="schema")
    min_length: int = Field(default=1, ge=0, description="characters, for markdown and text")
    max_length: int = Field(default=100_000, gt=0, description="characters, for markdown and text")


class Retry(_Strict):
    """How often a call may be sent: `attempts` on one route, `reasks` for answers that are not valid.

    `unknown` tells whether it may be sent again while nobody knows what became of its last attempt; absent is what the
    installation wants.
    """

    attempts: int = Field(default=4, ge=1, le=20)
    reasks: int = Field(default=1, ge=0, le=5)
    unknown: bool | None = None


class Routing(_Strict):
    """Where a step's calls go. What is absent comes from the workflow's `[routing]`, then from the configuration."""

    provider: str | None = None
    model: str | None = None
    fallback: tuple[str, ...] = ()
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_output_tokens: int | None = Field(default=None, gt=0, le=200_000)
    seed: int | None = None


class Reduce(_Strict):
    """How a reduce step looks at all items.

    `rank` orders them by the weighted mean of numeric answer fields of `step`: `weights` by field, `tie_break` fields
    compared next, the higher value first. `llm` asks one question about the best `top` entries of a `ranking`.
    """

    rule: ReduceRule
    step: str | None = None
    weights: dict[str, float | int] | None = None
    tie_break: tuple[str, ...] = ()
    ranking: str | None = None
    top: int = Field(default=10, gt=0, le=1000)


class Step(_Strict):
    """One question, or one way to look at all answers."""

    name: Name
    kind: StepKind = "item"
    description: str = ""
    prompt: str | None = None
    needs: tuple[str, ...] = ()
    alias: Name | None = Field(default=None, alias="as")
    when: str | None = None
    answer: AnswerSpec = AnswerSpec(format="text")
    reduce: Reduce | None = None
    route: Routing = Routing()
    retry: Retry = Retry()
    repeats: int = Field(default=1, ge=1, le=25)
    cache: bool = True
    timeout_s: float | int = Field(default=60, gt=0, le=3600)

    def asks(self) -> bool:
        """Whether the step sends prompts; a deterministic reduce step does not."""
        return self.prompt is not None


class Limits(_Strict):
    """Budget of one run; a decimal number of US dollars as text, so that nothing is rounded."""

    max_usd: str | None = None


class Workflow(_Strict):
    """A whole declaration. `steps` keep the order of the file; `ordered_steps` is the order of work."""

    name: Name
    version: str = Field(min_length=1, max_length=64)
    description: str = ""
    item_key: str | None = None
    variables: dict[Name, Variable] = {}
    budget: Limits = Limits()
    routing: Routing = Routing()
    steps: tuple[Step, ...] = Field(min_length=1)

    @cached_property
    def ordered_steps(self) -> tuple[Step, ...]:
        """The steps, each after all it needs; ties in the order of the file."""
        by_name = {step.name: step for step in self.steps}
        sorter = TopologicalSorter({step.name: step.needs for step in self.steps})
        sorter.prepare()
        ordered: list[Step] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=list(by_name).index)
            ordered.extend(by_name[name] for name in ready)
            sorter.done(*ready)
        return tuple(ordered)

    def step(self, name: str) -> Step:
        """The step of that name.

        Raises:
            KeyError: there is none.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def only(self, names: Set[str]) -> "Workflow":
        """The same workflow with some of its steps; whoever names a step names all that it needs."""
        # A plain copy would take the cached order of all steps along.
        fields: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        fields["steps"] = tuple(one for one in self.steps if one.name in names)
        return type(self).model_construct(None, **fields)


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
    order = list(_order_problems(workflow, document))
    known = {(one.place, one.code) for one in problems}
    further = [*order, *_structure_problems(workflow, document)]
    problems.extend(one for one in further if (one.place, one.code) not in known)
    return Inspected(workflow, document, tuple(problems), is_ordered=not order)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `workflow.toml`, for editors."""
    return Workflow.model_json_schema(by_alias=True)


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


def _order_problems(workflow: Workflow, document: TomlDocument) -> Iterator[Problem]:
    """What keeps the steps from having an order of work, and templates from having a known set of names."""
    names = [step.name for step in workflow.steps]
    yield from _name_problems(workflow, document, names)
    known = set(names)
    for index, step in enumerate(workflow.steps):
        for position, need in enumerate(step.needs):
            if need not in known:
                place = document.locate(("steps", index, "needs", position))
                message = f"step {step.name!r} needs {need!r}, which is not a step"
                yield Problem("workflow.unknown-step", message, place, did_you_mean(need, known - {step.name}))
    sorter = TopologicalSorter[str]()
    for step in workflow.steps:
        sorter.add(step.name, *known & {*step.needs})
    try:
        sorter.prepare()
    except CycleError as error:
        # The sorter follows the arrows backwards: each one it names is needed by the one before.
        circle = [str(name) for name in reversed(error.args[1])]
        place = document.locate(("steps", names.index(circle[0]), "needs"))
        yield Problem("workflow.cycle", f"steps need each other: {' -> '.join(circle)}", place)


def _structure_problems(workflow: Workflow, document: TomlDocument) -> Iterator[Problem]:
    for index, step in enumerate(workflow.steps):
        yield from _step_problems(workflow, step, ("steps", index), document)
    for name, variable in workflow.variables.items():
        if variable.default is not None and not has_type(variable.default, variable.type):
            place = document.locate(("variables", name, "default"))
            yield Problem("workflow.bad-value", f"default of {name!r} is not of type {variable.type}", place)
    if workflow.budget.max_usd is not None and parse_usd(workflow.budget.max_usd) is None:
        place = document.locate(("budget", "max_usd"))
        yield Problem("workflow.bad-budget", "budget.max_usd must be a decimal number above 0", place, 'such as "5.00"')


def _name_problems(workflow: Workflow, document: TomlDocument, names: list[str]) -> Iterator[Problem]:
    seen: dict[str, str] = {name: f"variable {name!r}" for name in workflow.variables}
    for name in workflow.variables:
        if name in RESERVED_NAMES:
            place = document.locate(("variables", name))
            yield Problem("workflow.reserved-name", f"the name {name!r} is reserved", place)
    for index, step in enumerate(workflow.steps):
        for key, name in (("name", step.name), ("as", step.alias)):
            if name is None:
                continue
            place = document.locate(("steps", index, key))
            if name in RESERVED_NAMES:
                yield Problem("workflow.reserved-name", f"the name {name!r} is reserved", place)
            elif name in seen:
                yield Problem("workflow.duplicate-name", f"the name {name!r} is taken by {seen[name]}", place)
            seen.setdefault(name, f"step {names[index]!r}")


def _step_problems(
    workflow: Workflow, step: Step, path: tuple[str | int, ...], document: TomlDocument
) -> Iterator[Problem]:
    def problem(code: str, message: str, *keys: str | int, hint: str | None = None) -> Problem:
        return Problem(f"workflow.{code}", f"step {step.name!r}: {message}", document.locate((*path, *keys)), hint)

    if step.kind == "item" and step.reduce is not None:
        yield problem("not-a-reduce-step", "[steps.reduce] belongs to steps of kind 'reduce'", "reduce")
    if step.kind == "item" and step.prompt is None:
        yield problem("missing-prompt", "an item step needs a prompt", hint='prompt = "name.md.j2"')
    if step.kind == "reduce" and step.when is not None:
        yield problem("when-on-reduce", "a condition can only stand at an item step", "when")
    if step.kind == "reduce" and step.reduce is None:
        yield problem(
            "missing-reduce", "a reduce step needs a table [steps.reduce]", hint="with rule = 'rank' or 'llm'"
        )
    if step.kind == "reduce" and step.repeats > 1:
        yield problem("repeats-on-reduce", "only an item step can be asked several times", "repeats")
    if step.reduce is not None and step.kind == "reduce":
        yield from (
            problem(code, message, "reduce", *keys, hint=hint)
            for code, message, keys, hint in _reduce_problems(workflow, step, step.reduce)
        )
    yield from (problem(code, message, "answer", *keys) for code, message, keys in _answer_problems(step.answer))
    if step.when is not None and not step.needs:
        yield problem("when-without-needs", "a condition over earlier answers needs the steps it reads", "when")


_ReduceProblem = tuple[str, str, tuple[str | int, ...], str | None]
"""Code, message, keys below the step's `reduce` table, hint."""


def _reduce_problems(workflow: Workflow, step: Step, reduce: Reduce) -> Iterator[_ReduceProblem]:
    by_name = {other.name: other for other in workflow.steps}
    if reduce.rule == "llm":
        yield from _ask_problems(step, reduce, by_name)
    else:
        yield from _rank_problems(step, reduce, by_name)


def _ask_problems(step: Step, reduce: Reduce, by_name: Mapping[str, Step]) -> Iterator[_ReduceProblem]:
    if step.prompt is None:
        yield "missing-prompt", "rule 'llm' needs a prompt", (), None
    if reduce.ranking is None:
        return
    ranking = by_name.get(reduce.ranking)
    ranks = ranking is not None and ranking.reduce is not None and ranking.reduce.rule == "rank"
    if not ranks or reduce.ranking not in step.needs:
        yield "unknown-ranking", f"{reduce.ranking!r} is no ranking step among its needs", ("ranking",), None


def _rank_problems(step: Step, reduce: Reduce, by_name: Mapping[str, Step]) -> Iterator[_ReduceProblem]:
    if step.prompt is not None:
        yield "prompt-on-rank", "rule 'rank' computes and asks nobody; remove the prompt", (), None
    scored = by_name.get(reduce.step or "")
    if scored is None or scored.kind != "item" or scored.name not in step.needs:
        yield "unknown-step", "reduce.step must name an item step among its needs", ("step",), None
        return
    weights = reduce.weights or {}
    if sum(weights.values()) <= 0 or min(weights.values()) < 0:
        yield "bad-weights", "reduce.weights must not be negative and must have a positive sum", ("weights",), None
    numeric = {name for name, field in (scored.answer.fields or {}).items() if field.type in ("integer", "number")}
    used = [*((name, ("weights", name)) for name in weights)]
    used += [(name, ("tie_break", position)) for position, name in enumerate(reduce.tie_break)]
    for name, keys in used:
        if name not in numeric:
            message = f"{name!r} is no number in the answer of {scored.name!r}"
            yield "unknown-field", message, keys, did_you_mean(name, numeric) if numeric else None


def _answer_problems(answer: AnswerSpec) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
    if answer.format == "json" and (answer.fields is None) == (answer.schema_file is None):
        yield "answer", "a JSON answer needs either fields or a schema file", ()
    if answer.format != "json" and (answer.fields is not None or answer.schema_file is not None):
        yield "answer", f"an answer in {answer.format} has neither fields nor a schema", ()
    if answer.min_length > answer.max_length:
        yield "answer", "min_length is above max_length", ("min_length",)
    for name, field in (answer.fields or {}).items():
        yield from _field_problems(field, name, ("fields", name))


_FieldProblem = tuple[str, str, tuple[str | int, ...]]


def _field_problems(field: AnswerField, name: str, keys: tuple[str | int, ...]) -> Iterator[_FieldProblem]:
    """What no answer could ever satisfy, in a field and in the fields inside of it."""
    if field.type == "list" and field.items is None:
        yield "answer", f"list {name!r} must say what its items are", keys
    if _is_above(field.minimum, field.maximum):
        yield "answer", f"{name!r}: minimum is above maximum", (*keys, "minimum")
    if _is_above(field.min_items, field.max_items):
        yield "answer", f"{name!r}: min_items is above max_items", (*keys, "min_items")
    if (field.minimum is not None or field.maximum is not None) and field.type not in ("integer", "number"):
        yield "answer", f"{name!r}: only numbers have a range", keys
    if field.choices is not None and not _can_be_chosen(field):
        yield "answer", f"{name!r}: none of the choices is a possible {field.type}", (*keys, "choices")
    if field.items is not None:
        yield from _field_problems(field.items, f"{name}.items", (*keys, "items"))
    for inner, of_inner in (field.fields or {}).items():
        yield from _field_problems(of_inner, f"{name}.{inner}", (*keys, "fields", inner))


def _is_above(least: float | None, most: float | None) -> bool:
    return least is not None and most is not None and least > most


def _can_be_chosen(field: AnswerField) -> bool:
    return field.type != "list" and any(has_type(choice, field.type) for choice in field.choices or ())


def has_type(value: object, type_: ScalarType) -> bool:
    """Whether a value from TOML or `--var` is of a variable's type. True is no integer."""
    match type_:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)


def parse_usd(text: str) -> int | None:
    """A decimal number of US dollars above 0 as nano-USD, rounded down; None if it is not one."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        return None
    if not amount.is_finite() or amount <= 0 or amount > MAX_USD:
        return None
    return int(amount * 10**9) or None
