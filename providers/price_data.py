"""Looks up what a model costs; the only home of `genai-prices`.

Importing this module loads the price data of 47 services (0.2 s, 30 MB), so only programs that plan runs do it. They
pin the resulting `Price` to the run, and workers read it back with `Price.from_json`. An operator's own price wins;
a model is matched by its exact name or that name with a date, never by a prefix; what we do not know is None, never 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from importlib.metadata import version

from genai_prices import data_snapshot
from genai_prices.types import ClauseEquals, ClauseOr, MatchLogic, ModelInfo, ModelPrice, TieredPrices

from providers.catalog import PriceRow, find_model, find_provider, undated
from providers.pricing import FREE, Price, PriceTier, npm_of_usd

_SOURCE = f"genai-prices {version('genai-prices')}"


def price_for(provider: str, model: str, override: Price | None = None, at: datetime | None = None) -> Price | None:
    """Return the price of a model at a service, or None when nobody knows it.

    Args:
        provider: Name of the catalog row.
        model: The model name that the service knows.
        override: The operator's price; returned as it is.
        at: Moment for prices that change by date; None is now.
    """
    if override is not None:
        return override
    entry = find_provider(provider)
    if entry is None:
        return None
    if entry.free:
        return FREE
    row = find_model(provider, model)
    if row is not None and row.price is not None:
        return _of_row(row.price)
    if entry.price is not None:
        return _of_row(entry.price)
    if entry.price_book is None:
        return None
    return _booked_price(entry.price_book, model, at or datetime.now(UTC))


def _booked_price(book: str, model: str, at: datetime) -> Price | None:
    models = _exact_models(book)
    info = models.get(model.lower()) or models.get(undated(model.lower()))
    return None if info is None else _of_booked(info.get_prices(at))


@cache
def _exact_models(book: str) -> dict[str, ModelInfo]:
    """Index a service's models by every name that the data set spells out, own ids before other spellings."""
    for known in data_snapshot.get_snapshot().providers:
        if known.id == book:
            spelled = {name.lower(): info for info in known.models for name in _exact_names(info.match)}
            return spelled | {info.id.lower(): info for info in known.models}
    return {}


def _exact_names(match: MatchLogic) -> Iterator[str]:
    if isinstance(match, ClauseEquals):
        yield match.equals
    elif isinstance(match, ClauseOr):
        for clause in match.or_:
            yield from _exact_names(clause)


def _of_booked(prices: ModelPrice) -> Price | None:
    """Convert a data-set price; None when it lacks a plain input or output price, e.g. for image models."""
    if prices.input_mtok is None or prices.output_mtok is None:
        return None
    cached = prices.input_mtok if prices.cache_read_mtok is None else prices.cache_read_mtok
    written = prices.input_mtok if prices.cache_write_mtok is None else prices.cache_write_mtok
    kinds = (prices.input_mtok, prices.output_mtok, cached, written)
    starts = sorted({tier.start for kind in kinds if isinstance(kind, TieredPrices) for tier in kind.tiers})
    base_in, base_out, base_cached, base_written = (npm_of_usd(_usd_at(kind, 0)) for kind in kinds)
    tiers = tuple(PriceTier(start, *(npm_of_usd(_usd_at(kind, start + 1)) for kind in kinds)) for start in starts)
    return Price(base_in, base_out, base_cached, _SOURCE, base_written, tiers)


def _usd_at(price: Decimal | TieredPrices, input_tokens: int) -> Decimal:
    if not isinstance(price, TieredPrices):
        return price
    reached = [tier.price for tier in price.tiers if input_tokens > tier.start]
    return reached[-1] if reached else price.base


def _of_row(row: PriceRow) -> Price:
    usd = (row.input, row.output, row.cached or row.input, row.write or row.input)
    base_in, base_out, base_cached, base_written = (npm_of_usd(value) for value in usd)
    tiers: tuple[PriceTier, ...] = ()
    if row.long_above is not None:
        tiers = (PriceTier(row.long_above, base_in * 2, base_out * 3 // 2, base_cached * 2, base_written * 2),)
    return Price(base_in, base_out, base_cached, "catalog", base_written, tiers)
