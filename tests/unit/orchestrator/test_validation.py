"""A pack is checked as a whole before anything is spent, and everything that is wrong is told at once."""

from typing import Any

import pytest

from orchestrator.context import item_context, reduce_context
from orchestrator.declaration import read_workflow
from orchestrator.errors import Problem, WorkflowError
from orchestrator.validation import check_pack, read_variables
from orchestrator.workflow import Workflow

DECLARATION = """
name = "w"
version = "1"

[variables.topic]
required = true

[[steps]]
name = "look"
as = "first_look"
prompt = "look.j2"
answer = { fields = { score = { type = "integer" }, tags = { type = "list", items = { type = "string" } } } }

[[steps]]
name = "free"
prompt = "free.j2"
answer = { format = "json", schema = "free.json" }

[[steps]]
name = "check"
prompt = "check.j2"
needs = ["look", "free"]
when = "look.score > 3"

[[steps]]
name = "order"
kind = "reduce"
needs = ["look"]
reduce = { rule = "rank", step = "look", weights = { score = 1 } }

[[steps]]
name = "report"
kind = "reduce"
needs = ["order", "look"]
prompt = "report.j2"
reduce = { rule = "llm", ranking = "order" }
"""
FILES = {
    "workflow.toml": DECLARATION,
    "look.j2": "{{ title }} {{ item.title }} {{ topic }}",
    "free.j2": "{% include 'part.j2' %}",
    "part.j2": "{{ title }}",
    "free.json": '{"type": "object"}',
    "check.j2": "{{ look.score }} {{ first_look.tags[0] }} {{ free.anything.at.all }} {{ answers.look.score }}",
    "report.j2": "{% for one in entries %}{{ one.rank }} {{ one.item.title }} {{ one.answers.look.score }}{% endfor %}"
    "{{ totals.ranked }}",
}
EXAMPLES = ({"title": "A"}, {"title": "B", "extra": 1})


def check(examples: Any = EXAMPLES, **changes: str | None) -> list[Problem]:
    """Problems of the pack with some files replaced, or taken away."""
    files = {name: text for name, text in FILES.items() if name not in changes}
    files |= {name: text for name, text in changes.items() if text is not None}
    return check_pack(files, "pack", examples)[1]


def told(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(one.code, one.place) for one in problems]


def test_a_sound_pack_has_no_problems():
    workflow, problems = check_pack(FILES, "pack", EXAMPLES)
    assert problems == []
    assert isinstance(workflow, Workflow)


def test_fields_of_any_example_may_be_used():
    assert check(**{"look.j2": "{{ extra }}"}) == []


@pytest.mark.parametrize(
    ("template", "place", "hint"),
    [
        ("{{ titel }}", "pack/look.j2:1:4", "did you mean 'title'?"),
        ("a\n{{ item.titel }}", "pack/look.j2:2:4", "did you mean 'title'?"),
        ("{{ check.score }}", "pack/look.j2:1:4", None),
        ("{{ title }", "pack/look.j2:1", None),
        ("{% if %}", "pack/look.j2:1", None),
        ("{{ ''.__class__ }}", "pack/look.j2:1", None),
        ("{% include 'prt.j2' %}", "pack/look.j2:1:13", "did you mean 'part.j2'?"),
        ("{% include '../secret' %}", "pack/look.j2:1:13", None),
        ("{% include 'look.j2' %}", "pack/look.j2:1:13", None),
        ("{{ title | shout }}", "pack/look.j2:1", None),
    ],
)
def test_a_template_is_checked_with_line_and_column(template: str, place: str, hint: str | None):
    problems = check(**{"look.j2": template})
    assert problems
    assert problems[0].code == "template.invalid"
    assert problems[0].place.startswith(place)
    if hint is not None:
        assert problems[0].hint == hint


def test_a_fault_in_a_part_is_told_once_and_where_it_is():
    problems = check(**{"part.j2": "{{ nope }}", "look.j2": "{% include 'part.j2' %}"})
    assert told(problems) == [("template.invalid", "pack/part.j2:1:4")]


def test_answers_have_the_form_that_their_step_declares():
    problems = check(**{"check.j2": "{{ look.scor }} {{ look.tags.x }} {{ first_look.nope }}"})
    assert len(problems) == 3


def test_a_step_does_not_see_what_it_does_not_need():
    problems = check(**{"report.j2": "{{ free }}"})
    assert [one.message for one in problems] == ["'free' is not defined"]


def test_conditions_are_checked_too():
    problems = check(**{"workflow.toml": DECLARATION.replace("look.score > 3", "look.scr > ")})
    assert told(problems) == [("workflow.bad-condition", "pack/workflow.toml:23:1")]
    problems = check(**{"workflow.toml": DECLARATION.replace("look.score > 3", "look.scr > 3")})
    assert problems[0].hint == "did you mean 'score'?"


@pytest.mark.parametrize("name", ["look.j2", "free.json", "report.j2"])
def test_a_missing_file_is_told_with_the_place_that_names_it(name: str):
    (problem,) = check(**{name: None})
    assert problem.code == "pack.missing-file"
    assert problem.place.startswith("pack/workflow.toml:")
    assert name in problem.message


def test_a_broken_schema_is_told():
    (problem,) = check(**{"free.json": '{"type": 3}'})
    assert (problem.code, problem.place) == ("pack.bad-schema", "pack/workflow.toml:17:29")


def test_everything_at_once():
    """A key, a missing file, a schema, two templates and a condition: none of them hides another."""
    problems = check(
        **{
            "workflow.toml": DECLARATION.replace('when = "look.score > 3"', 'when = "nope"').replace(
                "required = true", "requird = true"
            ),
            "look.j2": "{{ titel }}",
            "check.j2": None,
            "free.json": "[]",
            "report.j2": "{{ totals.rankd }}",
        }
    )
    assert sorted(one.code for one in problems) == [
        "pack.bad-schema",
        "pack.missing-file",
        "template.invalid",
        "template.invalid",
        "workflow.bad-condition",
        "workflow.unknown-key",
    ]


def test_steps_without_an_order_still_have_their_templates_checked():
    problems = check(
        **{
            "workflow.toml": DECLARATION.replace('name = "free"\n', 'name = "free"\nneeds = ["check"]\n'),
            "look.j2": "{{ title }",
            "check.j2": "{{ look.whatever }} {{ titel }}",
        }
    )
    codes = [one.code for one in problems]
    assert codes.count("workflow.cycle") == 1
    assert codes.count("template.invalid") == 2


def test_without_items_nothing_is_claimed_about_their_fields():
    """The input could not be read: its fields are not known, and that is the only problem."""
    assert check(examples=()) == []
    assert check(examples=(), **{"look.j2": "{{ anything }} {{ item.what.ever }}"}) == []
    (problem,) = check(examples=(), **{"check.j2": "{{ anything }} {{ look.scor }}"})
    assert problem.message == "'look.scor' is not defined"
    assert len(check(examples=(), **{"report.j2": "{{ anything }}"})) == 1


def test_a_declaration_that_cannot_be_read_gives_no_workflow():
    assert check_pack({"workflow.toml": "="}, "pack", ())[0] is None


VARIABLES, _ = read_workflow(
    """
name = "w"
version = "1"
variables.text = { required = true, description = "some text" }
variables.count = { type = "integer", default = 3 }
variables.share = { type = "number" }
variables.sure = { type = "boolean", default = false }
[[steps]]
name = "a"
prompt = "a.j2"
""",
    "w",
)


def test_values_come_from_the_command_line_then_the_settings_then_the_default():
    given = {"text": "x", "sure": "TRUE"}
    assert read_variables(VARIABLES, given, {"text": "y", "share": 1}) == {
        "text": "x",
        "count": 3,
        "share": 1,
        "sure": True,
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("count", "3.0"),
        ("count", "three"),
        ("count", ""),
        ("share", "nan"),
        ("share", "inf"),
        ("share", "1,5"),
        ("sure", "yes"),
        ("sure", "1"),
    ],
)
def test_text_that_is_no_value_of_the_type_is_told(name: str, text: str):
    with pytest.raises(WorkflowError) as caught:
        read_variables(VARIABLES, {"text": "x", name: text}, {})
    (problem,) = caught.value.problems
    assert (problem.code, problem.place) == ("variable.bad-value", f"--var {name}")


def test_all_variables_are_told_at_once():
    with pytest.raises(WorkflowError) as caught:
        read_variables(VARIABLES, {"cuont": "1", "share": "x"}, {"sure": "yes", "colour": 1})
    assert sorted((one.code, one.place, one.hint) for one in caught.value.problems) == [
        ("variable.bad-value", "--var share", None),
        ("variable.bad-value", "--var text", "some text"),
        ("variable.bad-value", "workflows.w.variables.sure", None),
        ("variable.unknown", "--var cuont", "did you mean 'count'?"),
        ("variable.unknown", "workflows.w.variables.colour", "known: count, share, sure, text"),
    ]


def test_names_in_a_template_have_an_order_of_strength():
    workflow, _ = read_workflow(DECLARATION, "w")
    item = {"title": "T", "topic": "from item", "look": "from item", "item": "from item", "step": "from item"}
    values = item_context(workflow, "check", {"topic": "chosen"}, item, {"look": {"score": 1}})
    assert values["title"] == "T"
    assert values["topic"] == "chosen"
    assert values["look"] == values["first_look"] == {"score": 1}
    assert values["item"] == item
    assert (values["step"], values["workflow"]) == ("check", "w")


def test_a_reduce_step_sees_no_single_item():
    workflow, _ = read_workflow(DECLARATION, "w")
    values = reduce_context(workflow, "report", {"topic": "x"}, [{"rank": 1}], {"items": 1}, {})
    assert set(values) == {"topic", "entries", "totals", "answers", "workflow", "step"}
