"""What a workflow is: steps, answers, routes and reduce rules, as `workflow.toml` may declare them.

The models know their own types and bounds. How a file becomes a `Workflow` is in `orchestrator.declaration`, what a
declaration must satisfy as a whole in `orchestrator.declaration_checks`. `json_schema` publishes the form for editors.
"""

from collections.abc import Mapping, Set
from decimal import Decimal, InvalidOperation
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

WORKFLOW_FILE = "workflow.toml"
RESERVED_NAMES = frozenset({"item", "answers", "entries", "totals", "workflow", "step"})
"""Names that templates see anyway, so that no step, variable or alias may take them."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
ScalarType = Literal["string", "integer", "number", "boolean"]
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


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `workflow.toml`, for editors."""
    return Workflow.model_json_schema(by_alias=True)


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
