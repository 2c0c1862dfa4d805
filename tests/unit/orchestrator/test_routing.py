"""Which provider and model answer a step: the strongest wish wins, and every choice has a reason and a price."""

from typing import Any

import pytest

from orchestrator.errors import Problem
from orchestrator.routing import Preferences, choose
from orchestrator.runspec import Route
from orchestrator.settings import LLMProviderConfig
from orchestrator.workflow import Routing, Step, Workflow
from providers.catalog import load_catalog
from providers.price_data import price_for
from providers.pricing import Price

PRICE = Price(1, 2, 1, "override")


def provider(name: str, **changes: Any) -> LLMProviderConfig:
    values: dict[str, Any] = {
        "name": name,
        "dialect": "openai",
        "base_url": None,
        "api_keys": (),
        "default_model": f"{name}-model",
        "max_tokens": 1000,
        "temperature": None,
        "rate_limit_rpm": None,
        "rate_limit_tpm": None,
        "concurrency": None,
        "burst": None,
        "timeout_s": 60.0,
        "local": False,
        "price": PRICE,
        "allow_unpriced": False,
    }
    return LLMProviderConfig(**values | changes)


PROVIDERS = {name: provider(name) for name in ("red", "green", "blue", "grey")}
EMPTY = Routing()


def routes(
    *,
    of_step: Routing = EMPTY,
    of_workflow: Routing = EMPTY,
    providers: dict[str, LLMProviderConfig] = PROVIDERS,
    **wishes: Any,
) -> tuple[tuple[Route, ...], tuple[Problem, ...]]:
    step = Step(name="s", prompt="s.j2", route=of_step)
    workflow = Workflow(name="w", version="1", routing=of_workflow, steps=(step,))
    preferences = Preferences(**{"default_provider": "grey"} | wishes)
    chosen = choose(workflow, step, preferences, providers, price_for, "step 's'")
    return chosen.routes, chosen.problems


def names(**arguments: Any) -> list[tuple[str, str]]:
    found, problems = routes(**arguments)
    assert problems == ()
    return [(route.provider, route.model) for route in found]


@pytest.mark.parametrize(
    ("arguments", "expected", "reason"),
    [
        ({}, ("grey", "grey-model"), "default provider"),
        ({"workflow_provider": "red"}, ("red", "red-model"), "configured for this workflow"),
        (
            {"workflow_provider": "red", "of_workflow": Routing(provider="green")},
            ("green", "green-model"),
            "[routing] of the workflow",
        ),
        (
            {"of_workflow": Routing(provider="green"), "of_step": Routing(provider="blue")},
            ("blue", "blue-model"),
            "route of step 's'",
        ),
        (
            {"of_step": Routing(provider="blue"), "provider": "red"},
            ("red", "red-model"),
            "chosen on the command line",
        ),
    ],
)
def test_the_strongest_wish_wins(arguments: dict[str, Any], expected: tuple[str, str], reason: str):
    (route,), problems = routes(**arguments)
    assert problems == ()
    assert ((route.provider, route.model), route.reason) == (expected, reason)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"model": "x"}, "x"),
        ({"of_step": Routing(model="y"), "model": "x"}, "x"),
        ({"of_step": Routing(model="y"), "of_workflow": Routing(model="z")}, "y"),
        ({"of_workflow": Routing(model="z"), "workflow_model": "v"}, "z"),
        ({"workflow_model": "v"}, "v"),
        ({"of_step": Routing(provider="red", model="y")}, "y"),
        ({"of_step": Routing(provider="red", model="y"), "provider": "blue", "model": "x"}, "x"),
    ],
)
def test_a_model_may_be_chosen_without_a_provider(arguments: dict[str, Any], expected: str):
    assert names(**arguments)[0][1] == expected


def test_a_model_that_was_meant_for_another_provider_is_not_taken_along():
    """The step asks red for a model of red; whoever says blue on the command line gets blue's own."""
    found = names(of_step=Routing(provider="red", model="red-large"), provider="blue")
    assert found == [("blue", "blue-model")]


def test_the_chain_is_that_of_the_step_else_of_the_workflow_then_of_the_installation():
    of_workflow = Routing(fallback=("red",))
    assert names(of_workflow=of_workflow, fallback_provider="blue") == [
        ("grey", "grey-model"),
        ("red", "red-model"),
        ("blue", "blue-model"),
    ]
    assert names(of_workflow=of_workflow, of_step=Routing(fallback=("green",))) == [
        ("grey", "grey-model"),
        ("green", "green-model"),
    ]


def test_a_route_stands_in_the_chain_once():
    assert names(provider="red", of_step=Routing(fallback=("red", "blue", "red")), fallback_provider="blue") == [
        ("red", "red-model"),
        ("blue", "blue-model"),
    ]


def test_parameters_come_from_the_step_then_the_workflow_then_the_provider():
    warm = {"grey": provider("grey", temperature=0.9, max_tokens=500)}
    (route,), _ = routes(providers=warm)
    assert (route.temperature, route.max_output_tokens, route.seed) == (0.9, 500, None)
    shared = Routing(temperature=0.5, max_output_tokens=300, seed=1)
    (route,), _ = routes(providers=warm, of_workflow=shared)
    assert (route.temperature, route.max_output_tokens, route.seed) == (0.5, 300, 1)
    (route,), _ = routes(providers=warm, of_workflow=shared, of_step=Routing(temperature=0.0, seed=0))
    assert (route.temperature, route.max_output_tokens, route.seed) == (0.0, 300, 0)


def test_a_cap_beyond_the_models_own_is_lowered():
    real = {"grey": provider("openai", max_tokens=10_000_000, default_model="gpt-6-sol")}
    (route,), _ = routes(providers=real)
    assert 1000 < route.max_output_tokens < 10_000_000


def test_a_provider_that_is_not_configured_is_told_and_the_others_are_kept():
    found, (problem,) = routes(provider="rde", of_step=Routing(fallback=("blue",)))
    assert [route.provider for route in found] == ["blue"]
    assert (problem.code, problem.place) == ("route.unknown-provider", "--provider")
    assert problem.hint == "did you mean 'red'?"


def test_a_vendor_without_its_key_is_told_by_the_variable():
    _, (problem,) = routes(provider="openai")
    assert problem.code == "key.missing"
    assert "OPENAI_API_KEY" in problem.message


def test_a_provider_without_a_model_asks_for_one():
    _, (problem,) = routes(providers={"grey": provider("grey", default_model=None)})
    assert problem.code == "route.no-model"
    assert problem.hint is not None
    assert "--model" in problem.hint


def test_an_unknown_price_is_refused():
    found, (problem,) = routes(providers={"grey": provider("grey", price=None)})
    assert found == ()
    assert problem.code == "route.unknown-price"
    assert "grey-model" in problem.message


def test_a_misspelt_model_is_recognised():
    _, (problem,) = routes(providers={"grey": provider("openai", price=None)}, model="gpt-6-sool")
    assert problem.code == "route.unknown-price"
    assert problem.hint is not None
    assert problem.hint.startswith("did you mean 'gpt-6-sol'?")


def test_an_unknown_price_may_be_allowed():
    (route,), problems = routes(providers={"grey": provider("grey", price=None, allow_unpriced=True)})
    assert (route.price, problems) == (None, ())


def test_what_runs_on_our_own_machines_is_free():
    (route,), _ = routes(providers={"grey": provider("grey", price=None, local=True)})
    assert route.price == Price(0, 0, 0, "local")


def test_the_operators_price_wins():
    real = provider("openai", default_model="gpt-6-sol")
    (route,), _ = routes(providers={"grey": real})
    assert route.price == PRICE
    (route,), _ = routes(providers={"grey": provider("openai", default_model="gpt-6-sol", price=None)})
    assert route.price is not None
    assert route.price.source != "override"


OLD = [(row.provider, name) for row in load_catalog().aliases for name in row.names]


@pytest.mark.parametrize(("catalog", "old"), OLD)
def test_models_that_were_shut_down_are_replaced_and_it_is_said(catalog: str, old: str):
    (route,), problems = routes(providers={"grey": provider(catalog)}, model=old)
    assert problems == ()
    assert route.model != old
    assert route.reason == f"default provider; {old} was replaced by its successor"


def test_a_row_of_another_name_uses_the_catalog_that_it_names():
    renamed = provider("work", options={"catalog": "openai"}, price=None, default_model="gpt-4")
    (route,), _ = routes(providers={"grey": renamed})
    assert route.provider == "work"
    assert route.model != "gpt-4"
    assert route.price is not None
