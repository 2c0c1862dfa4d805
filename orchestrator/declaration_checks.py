"""What a declaration must satisfy beyond the types of its values: names, needs, reduce rules and answers.

Everything here is pure and yields problems; nothing raises.
"""

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

from orchestrator.errors import Problem, did_you_mean
from orchestrator.toml_source import TomlDocument
from orchestrator.workflow import RESERVED_NAMES, AnswerField, AnswerSpec, Reduce, Step, Workflow, has_type, parse_usd


def order_problems(workflow: Workflow, document: TomlDocument) -> Iterator[Problem]:
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


def structure_problems(workflow: Workflow, document: TomlDocument) -> Iterator[Problem]:
    """What is wrong with names, steps and the budget; needs and cycles are the business of `order_problems`."""
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
