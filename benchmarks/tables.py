"""Lines of the tables that scenarios print: what was measured, what we aim at, and whether we are there."""

import statistics
from collections.abc import Sequence

HEAD = f"  {'':40}{'measured':>10}{'aim':>10}{'':>9}{'plain':>10}{'ratio':>8}"


def line(
    label: str, values: Sequence[float], aim: float | None = None, *, plain: Sequence[float] = (), digits: int = 2
) -> str:
    """One row: the median of the rounds beside an aim that is met by anything up to it, and beside the yardstick's."""
    value = statistics.median(values)
    verdict = "" if aim is None else ("met" if value <= aim else "MISSED")
    shown = "" if aim is None else f"{aim:,.{digits}f}"
    told = f"  {label:40}{value:>10,.{digits}f}{shown:>10}{verdict:>9}"
    if plain:
        yardstick = statistics.median(plain)
        told += f"{yardstick:>10,.{digits}f}" + (f"{value / yardstick:>8.2f}" if yardstick else "")
    return told.rstrip()
