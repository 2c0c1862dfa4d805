"""Orders items by the weighted mean of their scores, the same way on every machine.

Scores are compared as exact fractions, so that neither the order of addition nor a platform's floats can swap two
items. Items that are equal in score and in every tie-break field share a rank, and the next rank is left out
(1, 2, 2, 4); among themselves they keep the order of their keys, so that the list is the same every time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Scored:
    """An item with the numbers it is ranked by: answer fields by name."""

    ordinal: int
    key: str
    values: Mapping[str, float | int]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A place in the ranking.

    Attributes:
        position: from 0, without ties.
        rank: from 1, equal items share it.
        score: the weighted mean, rounded to 6 digits.
    """

    position: int
    rank: int
    ordinal: int
    key: str
    score: float


def rank(items: Iterable[Scored], weights: Mapping[str, float | int], tie_break: Sequence[str] = ()) -> list[Ranked]:
    """Ranks items, best first. An item that lacks one of the numbers is left out.

    Args:
        items: in any order.
        weights: by field; not negative, with a positive sum. They need not sum to 1.
        tie_break: fields compared in this order where scores are equal, the higher value first.
    """
    shares = {name: _exact(weight) for name, weight in weights.items()}
    total = sum(shares.values())
    needed = {*weights, *tie_break}
    keyed = [
        (
            tuple(-value for value in _merits(item, shares, total, tie_break)),
            item.key,
            item.ordinal,
        )
        for item in items
        if needed <= item.values.keys()
    ]
    keyed.sort()
    ranked: list[Ranked] = []
    for position, (merits, key, ordinal) in enumerate(keyed):
        tied = position > 0 and keyed[position - 1][0] == merits
        place = ranked[-1].rank if tied else position + 1
        ranked.append(Ranked(position, place, ordinal, key, round(float(-merits[0]), 6)))
    return ranked


def _merits(
    item: Scored, shares: Mapping[str, Fraction], total: Fraction | int, tie_break: Sequence[str]
) -> tuple[Fraction, ...]:
    score = sum((share * _exact(item.values[name]) for name, share in shares.items()), Fraction()) / total
    return (score, *(_exact(item.values[name]) for name in tie_break))


def _exact(number: float | int) -> Fraction:
    # Through text: 0.1 is meant as one tenth, not as the nearest binary fraction.
    return Fraction(str(number))
