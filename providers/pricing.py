"""What an attempt costs, in integers.

A `Price` is pinned to a run as JSON and used by workers without any price library; looking prices up is the business
of `price_data.py`. Money is integer nano-USD (1 USD = 10**9). Prices are nano-USD per million tokens, so that
0.01 USD per million tokens is still the exact integer 10_000_000.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from providers.messages import Usage

NUSD_PER_USD = 10**9
TOKENS_PER_PRICE = 10**6


@dataclass(frozen=True, slots=True)
class PriceTier:
    """Prices of a whole request whose input exceeds `above_tokens`; nano-USD per million tokens."""

    above_tokens: int
    input_npm: int
    output_npm: int
    cached_npm: int
    write_npm: int


@dataclass(frozen=True, slots=True)
class Price:
    """What a model charges, in nano-USD per million tokens.

    Attributes:
        input_npm: Fresh input.
        output_npm: Output, hidden reasoning included.
        cached_npm: Input read from the prompt cache.
        source: Where the numbers come from, for the ledger: `override`, `catalog`, `genai-prices 0.2.3`, ...
        write_npm: Input written to the prompt cache; None when it costs the same as fresh input.
        tiers: Long-context prices, ascending by threshold; usually empty.
    """

    input_npm: int
    output_npm: int
    cached_npm: int
    source: str
    write_npm: int | None = None
    tiers: tuple[PriceTier, ...] = ()

    @classmethod
    def from_usd(cls, input_usd: Decimal, output_usd: Decimal, source: str, cached_usd: Decimal | None = None) -> Price:
        """Build a price from USD per million tokens; without a cache price, cached input costs as much as fresh."""
        cached = input_usd if cached_usd is None else cached_usd
        return cls(npm_of_usd(input_usd), npm_of_usd(output_usd), npm_of_usd(cached), source)

    def at(self, input_tokens: int) -> PriceTier:
        """Return the prices that hold for a request with so many input tokens."""
        write = self.input_npm if self.write_npm is None else self.write_npm
        found = PriceTier(-1, self.input_npm, self.output_npm, self.cached_npm, write)
        for tier in self.tiers:
            if input_tokens > tier.above_tokens:
                found = tier
        return found

    def to_json(self) -> str:
        """Return a stable JSON text that `from_json` reads back to an equal price."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Price:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is not such a price.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            tiers = tuple(PriceTier(**tier) for tier in fields.pop("tiers", ()))
            return cls(**fields, tiers=tiers)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a pinned price: {error}") from error


FREE = Price(0, 0, 0, "local")


def npm_of_usd(usd_per_million: Decimal) -> int:
    """Convert USD per million tokens to nano-USD per million tokens, rounded up so that we never price too low."""
    return int((usd_per_million * NUSD_PER_USD).to_integral_value(ROUND_CEILING))


def usd_of_nusd(nusd: int) -> Decimal:
    """Convert nano-USD to USD exactly."""
    return Decimal(nusd).scaleb(-9)


def cost_nusd(price: Price, usage: Usage) -> int:
    """Return what an attempt with these counts costs, in nano-USD, rounded half to even."""
    tier = price.at(usage.input_tokens)
    cached = min(usage.cached_tokens, usage.input_tokens)
    written = min(usage.cache_write_tokens, usage.input_tokens - cached)
    fresh = usage.input_tokens - cached - written
    total = (
        fresh * tier.input_npm
        + cached * tier.cached_npm
        + written * tier.write_npm
        + usage.output_tokens * tier.output_npm
    )
    return _half_even(total)


def worst_nusd(price: Price, input_upper: int, output_cap: int) -> int:
    """Return the most that an attempt can cost, in nano-USD, rounded up.

    Args:
        price: The model's price.
        input_upper: Upper bound of the input tokens (`tokens.upper_bound`).
        output_cap: The cap that is really sent with the request.
    """
    tiers = [price.at(0), *(tier for tier in price.tiers if input_upper > tier.above_tokens)]
    return max(-(-_worst_total(tier, input_upper, output_cap) // TOKENS_PER_PRICE) for tier in tiers)


def affordable_cap(price: Price, input_upper: int, money_nusd: int, most: int) -> int:
    """Return the largest output cap, up to `most`, whose worst price `money_nusd` pays for; 0 when there is none."""
    return bisect_right(range(1, most + 1), money_nusd, key=lambda cap: worst_nusd(price, input_upper, cap))


def override_price(options: Mapping[str, Decimal | None], source: str = "override") -> Price | None:
    """Build the operator's own price from USD per million tokens; None when neither side is given.

    Args:
        options: `input`, `output` and `cached`; a missing output price equals the input price and the other way round.
        source: What the ledger should say about the origin.
    """
    given_input, given_output = options.get("input"), options.get("output")
    input_usd = given_output if given_input is None else given_input
    if input_usd is None:
        return None
    return Price.from_usd(input_usd, input_usd if given_output is None else given_output, source, options.get("cached"))


def _worst_total(tier: PriceTier, input_upper: int, output_cap: int) -> int:
    return input_upper * max(tier.input_npm, tier.cached_npm, tier.write_npm) + output_cap * tier.output_npm


def _half_even(total: int) -> int:
    whole, rest = divmod(total, TOKENS_PER_PRICE)
    if rest * 2 > TOKENS_PER_PRICE or (rest * 2 == TOKENS_PER_PRICE and whole % 2):
        return whole + 1
    return whole
