"""What is pinned when a run begins reads back the same, and a run of some steps stays one of those steps."""

import json
from dataclasses import replace

import pytest

from orchestrator.declaration import read_workflow
from orchestrator.planning import segments
from orchestrator.runspec import Route, RunSpec
from providers.pricing import Price, PriceTier

PACK = """
name = "w"
version = "1"
[variables.topic]
[[steps]]
name = "look"
prompt = "look.j2"
answer = { fields = { score = { type = "integer" } } }
[[steps]]
name = "extra"
prompt = "extra.j2"
repeats = 2
needs = ["look"]
[[steps]]
name = "order"
kind = "reduce"
needs = ["look"]
reduce = { rule = "rank", step = "look", weights = { score = 1 }, top = 4 }
[[steps]]
name = "report"
kind = "reduce"
needs = ["order"]
prompt = "report.j2"
reduce = { rule = "llm", ranking = "order" }
"""
PRICED = Route("openai", "m", 900, 0.2, 7, Price(1, 2, 3, "catalog", 4, (PriceTier(100, 5, 6, 7, 8),)), "because")
UNPRICED = Route("ollama", "n", 500, None, None, None, "fallback of the workflow")


def make_spec() -> RunSpec:
    files = {"workflow.toml": PACK, "look.j2": "a", "extra.j2": "b", "report.j2": "ü — c"}
    routes = {"look": (PRICED, UNPRICED), "extra": (UNPRICED,), "report": (PRICED,)}
    return RunSpec(read_workflow(PACK, "w")[0], files, {"topic": None, "n": 1.5}, routes, 10, 5, 2, 3600)


def test_a_spec_reads_back_the_same():
    spec = make_spec()
    assert RunSpec.from_json(spec.to_json()) == spec


def test_the_same_spec_is_the_same_text():
    assert make_spec().to_json() == make_spec().to_json()


def test_the_declaration_may_change_after_the_run_began_and_the_run_does_not():
    read = RunSpec.from_json(make_spec().to_json())
    assert read.pack_files["workflow.toml"] == PACK
    assert read.workflow.step("extra").repeats == 2


def test_some_steps_read_back_as_some_steps():
    some = make_spec().only({"look", "order"})
    read = RunSpec.from_json(some.to_json())
    assert read == some
    assert [step.name for step in read.workflow.ordered_steps] == ["look", "order"]
    assert set(read.routes) == {"look"}
    assert read.steps == {"look", "order"}
    assert [segment.item_steps() for segment in segments(read.workflow)] == [("look",)]


def test_some_of_some_steps():
    some = make_spec().only({"look", "order"}).only({"look"})
    assert RunSpec.from_json(some.to_json()) == some
    assert len(segments(some.workflow)) == 1


def test_reports_find_the_steps_in_the_order_of_work():
    steps = json.loads(make_spec().to_json())["steps"]
    assert [(step["name"], step["kind"], step["calls"], step["top"]) for step in steps] == [
        ("look", "item", 1, None),
        ("extra", "item", 2, None),
        ("order", "reduce", 0, 4),
        ("report", "reduce", 1, 10),
    ]
    assert [step["name"] for step in json.loads(make_spec().only({"look"}).to_json())["steps"]] == ["look"]


def test_a_template_is_labelled_with_the_version_of_its_text():
    spec = make_spec()
    label = spec.template_label("look.j2")
    assert label == "look.j2@ca978112ca1b"
    changed = replace(spec, pack_files={**spec.pack_files, "look.j2": "b"})
    assert changed.template_label("look.j2") != label


def test_a_run_of_another_release_is_told():
    data = json.loads(make_spec().to_json())
    with pytest.raises(ValueError, match="another release"):
        RunSpec.from_json(json.dumps({**data, "spec_version": 99}))
