"""Money as people and JSON see it: exact decimal strings of US dollars. Everywhere else it is integer nano-dollars."""

from __future__ import annotations

NUSD_PER_USD = 1_000_000_000


def usd(nusd: int) -> str:
    """Nano-USD as a decimal string with at least two decimals and nothing rounded, such as `0.00` or `0.000125`."""
    sign, whole, rest = "-" if nusd < 0 else "", abs(nusd) // NUSD_PER_USD, abs(nusd) % NUSD_PER_USD
    return f"{sign}{whole}.{f'{rest:09d}'.rstrip('0').ljust(2, '0')}"


def usd_or_none(nusd: int | None) -> str | None:
    """The same for an amount that may be absent, such as the limit of a budget without one."""
    return None if nusd is None else usd(nusd)


def short_usd(nusd: int) -> str:
    """Nano-USD for a person's eye: `$12.35`, and four significant digits below one dollar."""
    if abs(nusd) >= NUSD_PER_USD or nusd == 0:
        return f"${nusd / NUSD_PER_USD:,.2f}"
    return f"${nusd / NUSD_PER_USD:.4g}" if abs(nusd) >= 100_000 else f"${usd(nusd)}"
