"""A run is compiled once; equal questions have equal cache keys and others have not."""

from dataclasses import replace

import pytest

from orchestrator.declaration import read_workflow
from orchestrator.runspec import Route, RunSpec
from prompts.errors import PromptError
from workers.prepared import PreparedRun, Prompt, StepKit, cache_key

PACK = """
name = "w"
version = "1"
[[steps]]
name = "look"
prompt = "look.j2"
answer = { fields = { score = { type = "integer" } } }
[[steps]]
name = "order"
kind = "reduce"
needs = ["look"]
reduce = { rule = "rank", step = "look", weights = { score = 1 } }
[[steps]]
name = "why"
kind = "reduce"
needs = ["order"]
prompt = "why.j2"
reduce = { rule = "llm", ranking = "order" }
[[steps]]
name = "check"
prompt = "check.j2"
needs = ["look", "why"]
when = "look.score > 3"
"""
ROUTE = Route("openai", "m", 100, 0.1, 1, None, "because")


@pytest.fixture(scope="module")
def run() -> PreparedRun:
    files = {
        "workflow.toml": PACK,
        "look.j2": '+++\nsystem = "Be fair."\n+++\nLook at {{ title }}',
        "why.j2": "why",
        "check.j2": "{{ look.score }}",
    }
    routes = {step: (ROUTE,) for step in ("look", "why", "check")}
    spec = RunSpec(read_workflow(PACK, "w")[0], files, {}, routes, 10, 5, 2, 60)
    return PreparedRun(7, "run-7", spec)


def test_a_step_knows_what_stands_before_it(run: PreparedRun):
    kit = run.kit("check")
    assert (kit.item_steps, kit.reduce_steps, kit.rankings) == (("look",), ("why",), ("order",))
    assert kit.condition is not None
    assert kit.condition.evaluate({"look": {"score": 4}})
    assert kit.schema is None
    assert run.kit("look").schema is not None
    assert run.segment_of("why") == 0


def test_only_steps_that_ask_can_be_asked(run: PreparedRun):
    for name in ("order", "nothing"):
        with pytest.raises(KeyError):
            run.kit(name)


def test_a_prompt_is_rendered_with_its_bounds(run: PreparedRun):
    prompt = run.render(run.kit("look"), {"title": "T" * 100})
    assert [one.role for one in prompt.messages] == ["system", "user"]
    assert prompt.text == "Be fair.\n\n---\n\nLook at " + "T" * 100
    assert 0 < prompt.input_tokens <= prompt.input_upper
    assert run.render(run.kit("why"), {}).messages[0].role == "user"


def test_a_missing_value_is_a_prompt_error(run: PreparedRun):
    with pytest.raises(PromptError):
        run.render(run.kit("look"), {})


def test_the_rule_between_system_and_user_text_cannot_be_forged(run: PreparedRun):
    """A user text that looks like system text and user text is another question than the two of them."""
    kit = run.kit("look")
    one = run.render(kit, {"title": "x"})
    other = run.render(run.kit("why"), {})
    forged = replace(other, text=one.text)
    assert one.text == forged.text
    assert one.messages_hash != forged.messages_hash


def test_one_answer_comes_from_all_repeats(run: PreparedRun):
    assert run.aggregate([{"score": 1}]) == {"score": 1}
    assert run.aggregate([{"score": 1}, {"score": 4}]) == {"score": 2.5}


def key(
    run: PreparedRun, *, route: Route = ROUTE, title: str = "t", repeat: int = 0, kit: StepKit | None = None
) -> str:
    asked = kit or run.kit("look")
    prompt: Prompt = run.render(run.kit("look"), {"title": title})
    return cache_key(asked, route, prompt, repeat)


def test_equal_questions_have_one_key(run: PreparedRun):
    assert key(run) == key(run)
    assert len(key(run)) == 64
    assert key(run, route=replace(ROUTE, reason="another", price=None)) == key(run)


def test_whatever_shapes_an_answer_changes_its_key(run: PreparedRun):
    keys = [
        key(run),
        key(run, title="u"),
        key(run, repeat=1),
        key(run, kit=run.kit("why")),
        *(
            key(run, route=replace(ROUTE, **change))
            for change in (
                {"provider": "x"},
                {"model": "x"},
                {"max_output_tokens": 1},
                {"temperature": None},
                {"temperature": 0.0},
                {"seed": None},
            )
        ),
    ]
    assert len(set(keys)) == len(keys)
