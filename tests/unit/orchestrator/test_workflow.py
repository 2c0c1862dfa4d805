"""What a declaration may say; every mistake in it has a code, a place and, where there is one, a way out."""

import json

import jsonschema_rs
import pytest

from orchestrator.declaration import inspect_workflow, read_workflow
from orchestrator.errors import Problem, WorkflowError
from orchestrator.toml_source import parse_toml
from orchestrator.workflow import Step, Workflow, has_type, json_schema, parse_usd

FULL = """
name = "whole"
version = "1.2.0"
description = "Everything that a declaration can say"
item_key = "id"

[variables.topic]
type = "string"
required = true
description = "what it is about"

[variables.least]
type = "integer"
default = 3

[budget]
max_usd = "5.00"

[routing]
provider = "openai"
model = "gpt"
fallback = ["ollama"]
temperature = 0.2
max_output_tokens = 900
seed = 7

[[steps]]
name = "triage"
prompt = "triage.md.j2"
as = "first_look"
answer = { fields = { relevance = { type = "integer", minimum = 0, maximum = 5 }, note = { type = "string" } } }

[[steps]]
name = "score"
kind = "item"
description = "the question"
prompt = "score.md.j2"
needs = ["triage"]
when = "triage.relevance >= 3"
repeats = 3
cache = false
timeout_s = 90
route = { provider = "anthropic", model = "claude", fallback = ["openai"], temperature = 0 }
retry = { attempts = 2, reasks = 0 }

[steps.answer]
format = "json"

[steps.answer.fields.value]
type = "number"
minimum = 0.0
maximum = 10

[steps.answer.fields.tags]
type = "list"
items = { type = "string", choices = ["a", "b"], max_length = 5 }
min_items = 0
max_items = 3
required = false

[[steps]]
name = "order"
kind = "reduce"
needs = ["score"]
reduce = { rule = "rank", step = "score", weights = { value = 1 }, tie_break = ["value"], top = 5 }

[[steps]]
name = "report"
kind = "reduce"
needs = ["score", "order"]
prompt = "report.md.j2"
reduce = { rule = "llm", ranking = "order", top = 3 }
answer = { format = "markdown", min_length = 10, max_length = 5000 }
"""

MINIMAL = 'name = "w"\nversion = "1"\n[[steps]]\nname = "a"\nprompt = "a.j2"\n'


def problems_of(source: str) -> list[Problem]:
    with pytest.raises(WorkflowError) as caught:
        read_workflow(source, "p/workflow.toml")
    return list(caught.value.problems)


def told(source: str) -> set[tuple[str, str]]:
    return {(one.code, one.place.removeprefix("p/workflow.toml")) for one in problems_of(source)}


def test_everything_that_can_be_said_is_understood():
    workflow, document = read_workflow(FULL, "workflow.toml")
    assert [step.name for step in workflow.ordered_steps] == ["triage", "score", "order", "report"]
    score = workflow.step("score")
    assert (score.repeats, score.cache, score.timeout_s, score.when) == (3, False, 90, "triage.relevance >= 3")
    assert (score.retry.attempts, score.retry.reasks) == (2, 0)
    assert (score.route.provider, score.route.fallback, score.route.temperature) == ("anthropic", ("openai",), 0)
    assert workflow.routing.max_output_tokens == 900
    assert workflow.variables["least"].default == 3
    assert workflow.step("triage").alias == "first_look"
    assert workflow.step("triage").answer.format == "json"
    assert workflow.step("order").asks() is False
    assert workflow.step("report").asks() is True
    assert document.locate(("steps", 1, "repeats")) == "workflow.toml:40:1"


def test_the_least_that_can_be_said_has_safe_defaults():
    workflow, _ = read_workflow(MINIMAL, "workflow.toml")
    (step,) = workflow.steps
    assert (step.kind, step.repeats, step.cache, step.timeout_s, step.answer.format) == ("item", 1, True, 60, "text")
    assert (workflow.budget.max_usd, workflow.item_key, workflow.routing.fallback) == (None, None, ())


def test_a_step_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        read_workflow(MINIMAL, "w")[0].step("b")


def test_the_published_schema_accepts_what_we_accept():
    schema = json_schema()
    validator = jsonschema_rs.validator_for(schema)
    for source in (FULL, MINIMAL):
        assert list(validator.iter_errors(parse_toml(source).data)) == []
    assert not validator.is_valid({"name": "w", "version": "1", "steps": []})
    assert not validator.is_valid({**parse_toml(MINIMAL).data, "stepz": 1})
    assert "schema" in json.dumps(schema["$defs"]["AnswerSpec"])
    assert "as" in schema["$defs"]["Step"]["properties"]


def test_some_steps_alone_have_an_order_of_their_own():
    workflow, _ = read_workflow(FULL, "w")
    assert len(workflow.ordered_steps) == 4
    some = workflow.only({"triage", "score"})
    assert [step.name for step in some.ordered_steps] == ["triage", "score"]
    assert (some.name, some.variables, some.routing) == (workflow.name, workflow.variables, workflow.routing)


def step(text: str, top: str = "") -> str:
    return f'name = "w"\nversion = "1"\n{top}\n[[steps]]\nname = "a"\nprompt = "a.j2"\n{text}\n'


RANK = step(
    """answer = {{ fields = {{ value = {{ type = "number" }}, word = {{ type = "string" }} }} }}
[[steps]]
name = "r"
kind = "reduce"
needs = ["a"]
{}"""
)

CASES = {
    "unknown-key-top": ('nmae = "w"\n' + MINIMAL, "workflow.unknown-key", ":1:1"),
    "unknown-key-step": (step("promt = 'x'"), "workflow.unknown-key", ":7:1"),
    "unknown-key-inline": (step("retry = { attemps = 2 }"), "workflow.unknown-key", ":7:11"),
    "unknown-key-field": (
        step("[steps.answer]\nformat = 'json'\n[steps.answer.fields.x]\ntype = 'string'\nminimun = 1"),
        "workflow.unknown-key",
        ":11:1",
    ),
    "missing-key": ('version = "1"\n[[steps]]\nname = "a"\nprompt = "a"', "workflow.missing-key", ""),
    "missing-key-step": ('name = "w"\nversion = "1"\n[[steps]]\nprompt = "a"', "workflow.missing-key", ":3:1"),
    "no-steps": ('name = "w"\nversion = "1"\nsteps = []', "workflow.bad-value", ":3:1"),
    "steps-is-text": ('name = "w"\nversion = "1"\nsteps = "a"', "workflow.bad-value", ":3:1"),
    "empty": ("", "workflow.missing-key", ""),
    "bad-name": (MINIMAL.replace('"a"', '"A b"'), "workflow.bad-name", ":4:1"),
    "path-as-name": (MINIMAL.replace('"a"', '"../a"'), "workflow.bad-name", ":4:1"),
    "emoji-as-name": (MINIMAL.replace('"w"', '"🦊"'), "workflow.bad-name", ":1:1"),
    "long-name": (MINIMAL.replace('"a"', f'"{"a" * 65}"'), "workflow.bad-name", ":4:1"),
    "text-for-number": (step('repeats = "3"'), "workflow.bad-value", ":7:1"),
    "number-for-text": (MINIMAL.replace('"1"', "1"), "workflow.bad-value", ":2:1"),
    "yes-for-boolean": (step('cache = "yes"'), "workflow.bad-value", ":7:1"),
    "number-for-boolean": (step("cache = 1"), "workflow.bad-value", ":7:1"),
    "fraction-of-a-repeat": (step("repeats = 2.5"), "workflow.bad-value", ":7:1"),
    "zero-repeats": (step("repeats = 0"), "workflow.bad-value", ":7:1"),
    "many-repeats": (step("repeats = 26"), "workflow.bad-value", ":7:1"),
    "negative-attempts": (step("retry = { attempts = -1 }"), "workflow.bad-value", ":7:11"),
    "endless-timeout": (step("timeout_s = inf"), "workflow.bad-value", ":7:1"),
    "no-number": (step("timeout_s = nan"), "workflow.bad-value", ":7:1"),
    "zero-timeout": (step("timeout_s = 0"), "workflow.bad-value", ":7:1"),
    "hot": (step("route = { temperature = 2.1 }"), "workflow.bad-value", ":7:11"),
    "no-tokens": (step("route = { max_output_tokens = 0 }"), "workflow.bad-value", ":7:11"),
    "kind": (step("kind = 'map'"), "workflow.bad-value", ":7:1"),
    "need-is-number": (step("needs = ['a', 3]"), "workflow.bad-value", ":7:15"),
    "unknown-step": (step('needs = ["b"]'), "workflow.unknown-step", ":7:10"),
    "needs-itself": (step('needs = ["a"]'), "workflow.cycle", ":7:1"),
    "duplicate-step": (MINIMAL + '[[steps]]\nname = "a"\nprompt = "b"', "workflow.duplicate-name", ":7:1"),
    "alias-of-step": (
        MINIMAL + '[[steps]]\nname = "b"\nas = "a"\nprompt = "b"',
        "workflow.duplicate-name",
        ":8:1",
    ),
    "step-like-variable": (step("", "[variables.a]"), "workflow.duplicate-name", ":5:1"),
    "reserved-step": (MINIMAL.replace('"a"', '"item"'), "workflow.reserved-name", ":4:1"),
    "reserved-alias": (step('as = "answers"'), "workflow.reserved-name", ":7:1"),
    "reserved-variable": (step("", "[variables.totals]"), "workflow.reserved-name", ":3:1"),
    "no-prompt": ('name = "w"\nversion = "1"\n[[steps]]\nname = "a"', "workflow.missing-prompt", ":3:1"),
    "reduce-on-item": (step('reduce = { rule = "llm" }'), "workflow.not-a-reduce-step", ":7:1"),
    "when-on-reduce": (RANK.format('when = "1"\nreduce = {rule="llm"}'), "workflow.when-on-reduce", ":12:1"),
    "when-without-needs": (step('when = "x > 1"'), "workflow.when-without-needs", ":7:1"),
    "no-reduce": (RANK.format(""), "workflow.missing-reduce", ":8:1"),
    "reduce-repeats": (
        RANK.format('repeats = 2\nprompt = "r"\nreduce = { rule = "llm" }'),
        "workflow.repeats-on-reduce",
        ":12:1",
    ),
    "llm-without-prompt": (RANK.format('reduce = { rule = "llm" }'), "workflow.missing-prompt", ":12:1"),
    "rank-with-prompt": (
        RANK.format('prompt = "r"\nreduce = { rule = "rank", step = "a", weights = { value = 1 } }'),
        "workflow.prompt-on-rank",
        ":13:1",
    ),
    "unknown-rule": (RANK.format('reduce = { rule = "vote" }'), "workflow.bad-value", ":12:12"),
    "no-ranking": (
        RANK.format('prompt = "r"\nreduce = { rule = "llm", ranking = "a" }'),
        "workflow.unknown-ranking",
        ":13:26",
    ),
    "rank-of-nothing": (RANK.format('reduce = { rule = "rank" }'), "workflow.unknown-step", ":12:1"),
    "no-weights": (RANK.format('reduce = { rule = "rank", step = "a" }'), "workflow.bad-weights", ":12:1"),
    "zero-weights": (
        RANK.format('reduce = { rule = "rank", step = "a", weights = { value = 0 } }'),
        "workflow.bad-weights",
        ":12:39",
    ),
    "negative-weight": (
        RANK.format('reduce = { rule = "rank", step = "a", weights = { value = -1 } }'),
        "workflow.bad-weights",
        ":12:39",
    ),
    "weight-of-text": (
        RANK.format('reduce = { rule = "rank", step = "a", weights = { word = 1 } }'),
        "workflow.unknown-field",
        ":12:51",
    ),
    "tie-break": (
        RANK.format('reduce = { rule = "rank", step = "a", weights = { value = 1 }, tie_break = ["valu"] }'),
        "workflow.unknown-field",
        ":12:77",
    ),
    "json-without-fields": (step('answer = { format = "json" }'), "workflow.answer", ":7:1"),
    "text-with-fields": (
        step('answer = { format = "text", fields = { x = { type = "string" } } }'),
        "workflow.answer",
        ":7:1",
    ),
    "list-of-what": (step('answer = { fields = { x = { type = "list" } } }'), "workflow.answer", ":7:23"),
    "inner-list": (
        step('answer = { fields = { x = { type = "list", items = { type = "list" } } } }'),
        "workflow.answer",
        ":7:44",
    ),
    "range-upside-down": (
        step('answer = { fields = { x = { type = "integer", minimum = 5, maximum = 1 } } }'),
        "workflow.answer",
        ":7:47",
    ),
    "range-of-text": (
        step('answer = { fields = { x = { type = "string", minimum = 5 } } }'),
        "workflow.answer",
        ":7:23",
    ),
    "items-upside-down": (
        step(
            'answer = { fields = { x = { type = "list", items = { type = "string" }, min_items = 3, max_items = 2 } } }'
        ),
        "workflow.answer",
        ":7:73",
    ),
    "impossible-choices": (
        step('answer = { fields = { x = { type = "integer", choices = ["1", "2"] } } }'),
        "workflow.answer",
        ":7:47",
    ),
    "no-choices": (step('answer = { fields = { x = { type = "string", choices = [] } } }'), "workflow.answer", ":7:46"),
    "length-upside-down": (
        step('answer = { format = "text", min_length = 9, max_length = 8 }'),
        "workflow.answer",
        ":7:29",
    ),
    "bad-field-name": (
        step('answer = { fields = { "no name" = { type = "string" } } }'),
        "workflow.bad-name",
        ":7:23",
    ),
    "default-of-other-type": (
        step("", '[variables.x]\ntype = "integer"\ndefault = "3"'),
        "workflow.bad-value",
        ":5:1",
    ),
    "true-is-no-integer": (step("", '[variables.x]\ntype = "integer"\ndefault = true'), "workflow.bad-value", ":5:1"),
    "budget-zero": (step("", '[budget]\nmax_usd = "0"'), "workflow.bad-budget", ":4:1"),
    "budget-negative": (step("", '[budget]\nmax_usd = "-1"'), "workflow.bad-budget", ":4:1"),
    "budget-word": (step("", '[budget]\nmax_usd = "ten"'), "workflow.bad-budget", ":4:1"),
    "budget-tiny": (step("", '[budget]\nmax_usd = "1e-10"'), "workflow.bad-budget", ":4:1"),
    "budget-endless": (step("", '[budget]\nmax_usd = "inf"'), "workflow.bad-budget", ":4:1"),
    "budget-float": (step("", "[budget]\nmax_usd = 5.0"), "workflow.bad-value", ":4:1"),
    "not-toml": ("name = ", "toml.syntax", ":1:8"),
    "duplicate-key": ('name = "a"\nname = "b"', "toml.duplicate-key", ":2:1"),
}


@pytest.mark.parametrize(("source", "code", "place"), CASES.values(), ids=CASES.keys())
def test_a_mistake_has_a_code_and_a_place(source: str, code: str, place: str):
    assert (code, place) in told(source)


def test_the_way_out_is_shown():
    (problem,) = problems_of(step("tiemout_s = 5"))
    assert problem.hint == "did you mean 'timeout_s'?"
    (problem,) = problems_of(step("[steps.route]\nmodle = 'x'"))
    assert problem.hint == "did you mean 'model'?"
    (problem,) = problems_of(step('needs = ["c"]') + '[[steps]]\nname = "cc"\nprompt = "c"')
    assert problem.hint == "did you mean 'cc'?"


def test_a_cycle_is_shown_in_the_direction_in_which_it_is_written():
    source = "".join(
        f'[[steps]]\nname = "{name}"\nprompt = "p"\nneeds = ["{need}"]\n' for name, need in ("ab", "bc", "ca")
    )
    (problem,) = problems_of('name = "w"\nversion = "1"\n' + source)
    circle = problem.message.removeprefix("steps need each other: ").split(" -> ")
    assert circle[0] == circle[-1]
    assert set(circle) == {"a", "b", "c"}
    assert all(pair in ("ab", "bc", "ca") for pair in map("".join, zip(circle, circle[1:], strict=False)))


MANY = """
name = "w"
version = "1"
colour = "red"

[budget]
max_usd = "free"

[variables.item]
type = "string"

[[steps]]
name = "a"
promt = "a.j2"
needs = ["b"]
repeats = "2"

[[steps]]
name = "b"
prompt = "b.j2"
needs = ["a", "zzz"]
answer = { format = "json" }

[[steps]]
name = "b"
prompt = "c.j2"
kind = "reduce"
"""


def test_all_mistakes_are_told_at_once():
    """Wrong keys and values do not hide what is wrong with the steps themselves."""
    codes = sorted(one.code for one in problems_of(MANY))
    assert codes == sorted(
        [
            "workflow.unknown-key",
            "workflow.unknown-key",
            "workflow.bad-value",
            "workflow.bad-budget",
            "workflow.reserved-name",
            "workflow.cycle",
            "workflow.unknown-step",
            "workflow.duplicate-name",
            "workflow.answer",
            "workflow.missing-reduce",
        ]
    )
    assert len(set(told(MANY))) == len(codes)


def test_a_misspelt_key_is_read_as_what_was_meant():
    found = inspect_workflow(step("tiemout_s = 5"), "w")
    assert found.workflow is not None
    assert found.workflow.steps[0].timeout_s == 5
    assert found.is_ordered


def test_without_a_name_for_a_step_nothing_further_is_claimed():
    found = inspect_workflow('name = "w"\nversion = "1"\n[[steps]]\nprompt = "a"', "w")
    assert found.workflow is None
    assert [one.code for one in found.problems] == ["workflow.missing-key"]


@pytest.mark.parametrize("source", ["a." * 40 + "b = 1", "[[" * 2000, "a = " + "[" * 3000, "\ud800", "x = '''"])
def test_hostile_text_is_a_problem_and_no_crash(source: str):
    assert problems_of(source)


@pytest.mark.parametrize(
    ("text", "nusd"),
    [
        ("5", 5_000_000_000),
        ("0.000000001", 1),
        ("1e-3", 1_000_000),
        ("0.0000000019", 1),
        ("9000000", 9_000_000 * 10**9),
        ("9000000.01", None),
        ("0", None),
        ("0.0000000001", None),
        ("-1", None),
        ("nan", None),
        ("-Infinity", None),
        ("five", None),
        ("", None),
        ("1,5", None),
        ("1e999999999", None),
    ],
)
def test_money_is_read_exactly_or_not_at_all(text: str, nusd: int | None):
    assert parse_usd(text) == nusd


@pytest.mark.parametrize(
    ("value", "types"),
    [
        ("x", {"string"}),
        (True, {"boolean"}),
        (3, {"integer", "number"}),
        (3.0, {"number"}),
        (None, set()),
        ([], set()),
    ],
)
def test_types_of_variables_do_not_blend(value: object, types: set[str]):
    assert {name for name in ("string", "integer", "number", "boolean") if has_type(value, name)} == types


def test_declarations_do_not_change():
    workflow, _ = read_workflow(MINIMAL, "w")
    with pytest.raises(Exception, match="frozen"):
        workflow.name = "other"
    assert isinstance(workflow.steps[0], Step)
    assert isinstance(workflow, Workflow)
