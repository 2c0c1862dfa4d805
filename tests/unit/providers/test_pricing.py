"""Money is integers: costs are exact, worst cases are never too low, unknown prices stay unknown."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.messages import Usage
from providers.price_data import price_for
from providers.pricing import FREE, Price, PriceTier, cost_nusd, npm_of_usd, override_price, usd_of_nusd, worst_nusd

TIERED = Price(
    2 * 10**9, 10**10, 2 * 10**8, "test", 25 * 10**8, (PriceTier(1000, 4 * 10**9, 15 * 10**9, 4 * 10**8, 5 * 10**9),)
)


def test_a_known_bill_is_exact() -> None:
    price = Price.from_usd(Decimal("0.15"), Decimal("0.60"), "test", Decimal("0.075"))
    usage = Usage(1000, 200, cached_tokens=400)
    assert cost_nusd(price, usage) == 600 * 150 + 400 * 75 + 200 * 600
    assert usd_of_nusd(240_000) == Decimal("0.000240000")


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_costs_round_half_to_even(tokens: int, expected: int) -> None:
    assert cost_nusd(Price(500_000, 0, 500_000, "test"), Usage(tokens, 0)) == expected


def test_long_prompts_pay_the_tier_for_everything() -> None:
    assert cost_nusd(TIERED, Usage(1000, 10)) == 1000 * 2000 + 10 * 10_000
    assert cost_nusd(TIERED, Usage(1001, 10)) == 1001 * 4000 + 10 * 15_000


@given(
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 6000),
    st.integers(0, 6000),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_no_usage_within_the_bounds_costs_more_than_the_worst(
    used: int, out: int, cached: int, written: int, more_in: int, more_out: int
) -> None:
    usage = Usage(used, out, cached_tokens=cached, cache_write_tokens=written)
    assert cost_nusd(TIERED, usage) <= worst_nusd(TIERED, used + more_in, out + more_out)


def test_a_price_survives_being_pinned() -> None:
    assert Price.from_json(TIERED.to_json()) == TIERED
    with pytest.raises(ValueError, match="not a pinned price"):
        Price.from_json('{"input": 1}')


def test_prices_are_never_rounded_down() -> None:
    assert npm_of_usd(Decimal("0.0000000001")) == 1
    assert npm_of_usd(Decimal("0.15")) == 150_000_000


def test_the_operators_price_wins() -> None:
    own = override_price({"input": Decimal(1), "output": None})
    assert own == Price(10**9, 10**9, 10**9, "override")
    assert price_for("openai", "gpt-6-sol", own) is own
    assert override_price({}) is None


def test_models_match_exactly_or_with_a_date() -> None:
    price = price_for("openai", "gpt-6-sol")
    assert price is not None
    assert (price.input_npm, price.output_npm, price.cached_npm) == (2 * 10**9, 10**10, 2 * 10**8)
    assert price_for("openai", "gpt-6-sol-2026-09-22") == price
    assert price_for("openai", "gpt-6-so") is None
    assert price_for("openai", "gpt-6-sol-turbo") is None


def test_unknown_is_none_and_local_is_free() -> None:
    assert price_for("nobody", "gpt-6-sol") is None
    assert price_for("litellm", "gpt-6-sol") is None
    assert price_for("vllm", "anything") == FREE
    simulated = price_for("simulator", "anything")
    assert simulated is not None
    assert (simulated.input_npm, simulated.output_npm) == (150_000_000, 600_000_000)
