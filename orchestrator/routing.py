"""Pure: which provider and model answers a step, what stands behind it in the fallback chain, and why.

A provider is chosen by, from strong to weak: the command line, the step's own route, the workflow's `[routing]`, the
installation's settings for this workflow, the installation's default. The fallback chain is the step's, else the
workflow's, then the installation's `fallback_provider`. Prices are looked up here once and pinned to the run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.errors import Problem, did_you_mean, suggest
from orchestrator.provider_keys import KEY_MISSING
from orchestrator.runspec import Route
from orchestrator.settings import LLMProviderConfig
from orchestrator.workflow import Routing, Step, Workflow
from providers.catalog import find_model, load_catalog, resolve_model
from providers.pricing import Price

PriceLookup = Callable[[str, str, Price | None], Price | None]
"""Catalog name, model and the operator's own price give the price, or None."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """What the caller and the installation want; None where they want nothing.

    Attributes:
        provider, model: from the command line.
        workflow_provider, workflow_model: the installation's settings for this workflow.
        default_provider: of the installation.
        fallback_provider: of the installation.
        allow_unpriced: send calls although nobody knows their price; they are booked at zero.
    """

    default_provider: str
    provider: str | None = None
    model: str | None = None
    workflow_provider: str | None = None
    workflow_model: str | None = None
    fallback_provider: str | None = None
    allow_unpriced: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """Routes of one step, and what is wrong with them."""

    routes: tuple[Route, ...]
    problems: tuple[Problem, ...]


def choose(
    workflow: Workflow,
    step: Step,
    wishes: Preferences,
    providers: Mapping[str, LLMProviderConfig],
    price_of: PriceLookup,
    place: str,
) -> Chosen:
    """Chooses the routes of a step, the primary one first.

    Args:
        workflow: the declaration.
        step: one that asks.
        wishes: what caller and installation want.
        providers: the configured providers.
        price_of: looks up prices.
        place: where the step stands, for problems.
    """
    problems: list[Problem] = []
    routes: list[Route] = []
    for name, model, reason in _wanted(workflow, step, wishes):
        config = providers.get(name)
        if config is None:
            asked_at = "--provider" if name == wishes.provider else place
            problems.append(_not_configured(name, asked_at, providers))
            continue
        found = _route(workflow, step, config, model, reason, price_of, place, wishes.allow_unpriced)
        if isinstance(found, Problem):
            problems.append(found)
        elif all((found.provider, found.model) != (other.provider, other.model) for other in routes):
            routes.append(found)
    return Chosen(tuple(routes), tuple(problems))


def _not_configured(name: str, place: str, providers: Mapping[str, LLMProviderConfig]) -> Problem:
    row = load_catalog().providers.get(name)
    if row is None:
        hint = did_you_mean(name, {*providers, *load_catalog().providers})
        return Problem("route.unknown-provider", f"no provider is called {name!r}", place, hint)
    if row.key_required and row.key_env:
        hint = f"export {row.key_env}=..., or put it into .env"
        return Problem(KEY_MISSING, f"provider {name!r} needs a key, and {row.key_env} is not set", place, hint)
    hint = f"add [llm_providers.{name}] to llm-orchestrator.toml"
    return Problem("route.unknown-provider", f"provider {name!r} is not configured", place, hint)


def _wanted(workflow: Workflow, step: Step, wishes: Preferences) -> Iterator[tuple[str, str | None, str]]:
    """Provider, model and reason of each route, in order."""
    candidates = (
        (wishes.provider, wishes.model, "chosen on the command line"),
        (step.route.provider, step.route.model, f"route of step {step.name!r}"),
        (workflow.routing.provider, workflow.routing.model, "[routing] of the workflow"),
        (wishes.workflow_provider, wishes.workflow_model, "configured for this workflow"),
    )
    chosen = next((one for one in candidates if one[0] is not None), None)
    provider, reason = (wishes.default_provider, "default provider") if chosen is None else (chosen[0], chosen[2])
    # A model that was named together with another provider means nothing at this one.
    models = (model for name, model, _ in candidates if name in (None, provider))
    yield provider or wishes.default_provider, next((model for model in models if model is not None), None), reason
    yield from ((name, None, "fallback of the workflow") for name in _fallback(workflow, step))
    if wishes.fallback_provider is not None:
        yield wishes.fallback_provider, None, "fallback of the installation"


def _fallback(workflow: Workflow, step: Step) -> Iterable[str]:
    return step.route.fallback or workflow.routing.fallback


def _route(
    workflow: Workflow,
    step: Step,
    config: LLMProviderConfig,
    model: str | None,
    reason: str,
    price_of: PriceLookup,
    place: str,
    allow_unpriced: bool,
) -> Route | Problem:
    wanted = model or config.default_model
    if wanted is None:
        hint = f"set default_model in [llm_providers.{config.name}], or use --model"
        return Problem("route.no-model", f"no model is named for provider {config.name!r}", place, hint)
    catalog_name = str(config.options.get("catalog", config.name))
    resolved = resolve_model(catalog_name, wanted)
    price = price_of(catalog_name, resolved, config.price)
    if price is None and config.local:
        price = Price(0, 0, 0, "local")
    if price is None and not (config.allow_unpriced or allow_unpriced):
        message = f"nobody knows the price of model {resolved!r} at provider {config.name!r}"
        hint = f"set cost_per_1k_input_tokens and cost_per_1k_output_tokens in [llm_providers.{config.name}]"
        meant = suggest(resolved, (row.name for row in load_catalog().models if row.provider == catalog_name))
        first = "" if meant is None else f"did you mean {meant!r}? Otherwise "
        return Problem("route.unknown-price", message, place, f"{first}{hint}, or use --allow-unpriced")
    known = find_model(catalog_name, resolved)
    cap = _first(step.route.max_output_tokens, workflow.routing.max_output_tokens) or config.max_tokens
    return Route(
        provider=config.name,
        model=resolved,
        max_output_tokens=cap if known is None else min(cap, known.output),
        temperature=_sampling(step.route, workflow.routing, config),
        seed=_first(step.route.seed, workflow.routing.seed),
        price=price,
        reason=reason if resolved == wanted else f"{reason}; {wanted} was replaced by its successor",
    )


def _sampling(own: Routing, shared: Routing, config: LLMProviderConfig) -> float | None:
    if own.temperature is not None:
        return own.temperature
    return config.temperature if shared.temperature is None else shared.temperature


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
