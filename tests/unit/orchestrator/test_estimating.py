"""What a run will cost is known before it begins, and its worst is a bound."""

from dataclasses import replace

from orchestrator.declaration import read_workflow
from orchestrator.estimating import estimate
from orchestrator.items import ItemsSummary
from orchestrator.runspec import Route, RunSpec
from providers.pricing import Price

PACK = """
name = "w"
version = "1"
[[steps]]
name = "look"
prompt = "look.j2"
answer = { fields = { score = { type = "integer" } } }
[[steps]]
name = "thrice"
prompt = "thrice.j2"
repeats = 3
[[steps]]
name = "order"
kind = "reduce"
needs = ["look"]
reduce = { rule = "rank", step = "look", weights = { score = 1 } }
[[steps]]
name = "report"
kind = "reduce"
needs = ["order"]
prompt = "report.j2"
reduce = { rule = "llm", ranking = "order", top = 5 }
"""
PRICE = Price(1_000_000_000, 2_000_000_000, 500_000_000, "test")


def make_spec(price: Price | None = PRICE, **files: str) -> RunSpec:
    route = Route("p", "m", 300, None, None, price, "because")
    texts = {"workflow.toml": PACK, "look.j2": "x" * 400, "thrice.j2": "y", "report.j2": "z"} | files
    return RunSpec(
        read_workflow(PACK, "w")[0], texts, {}, dict.fromkeys(("look", "thrice", "report"), (route,)), 9, 9, 9, 0
    )


def summary(count: int = 10, text: str = "some item") -> ItemsSummary:
    return ItemsSummary(count, "0", "id", ("text",), ({"text": text},), None, (), 0)


def test_every_item_is_asked_and_every_reduce_step_once():
    found = estimate(make_spec().workflow, make_spec(), summary(10))
    assert (found.items, found.calls) == (10, 10 + 30 + 1)
    assert [(row.step, row.calls) for row in found.by_step] == [("look", 10), ("thrice", 30), ("report", 1)]
    assert sum(row.cost_nusd for row in found.by_step) == found.cost_nusd


def test_the_worst_is_worse_than_the_likely():
    found = estimate(make_spec().workflow, make_spec(), summary())
    assert 0 < found.cost_nusd < found.worst_nusd
    assert found.output_tokens == 41 * 100
    assert found.input_tokens > 0


def test_longer_templates_items_and_includes_cost_more():
    base = estimate(make_spec().workflow, make_spec(), summary()).input_tokens
    longer = make_spec(**{"look.j2": "x" * 4000})
    assert estimate(longer.workflow, longer, summary()).input_tokens > base
    assert estimate(make_spec().workflow, make_spec(), summary(text="long " * 500)).input_tokens > base
    included = make_spec(**{"look.j2": "x" * 400 + "{% include 'rules.j2' %}", "rules.j2": "r" * 4000})
    assert estimate(included.workflow, included, summary()).input_tokens > base + 5_000


def test_twice_the_items_cost_twice_the_calls():
    one, two = (estimate(make_spec().workflow, make_spec(), summary(count)) for count in (100, 200))
    assert two.by_step[0].cost_nusd == 2 * one.by_step[0].cost_nusd


def test_what_has_no_price_costs_nothing():
    spec = make_spec(price=None)
    found = estimate(spec.workflow, spec, summary())
    assert (found.cost_nusd, found.worst_nusd) == (0, 0)
    assert found.calls == 41


def test_some_steps_are_estimated_alone():
    spec = make_spec().only({"look"})
    found = estimate(spec.workflow, spec, summary(7))
    assert [(row.step, row.calls) for row in found.by_step] == [("look", 7)]


def test_the_primary_route_is_the_one_that_is_told():
    spec = make_spec()
    other = replace(spec.routes["look"][0], provider="other")
    both = replace(spec, routes={**spec.routes, "look": (*spec.routes["look"], other)})
    assert estimate(spec.workflow, both, summary()).by_step[0].provider == "p"
