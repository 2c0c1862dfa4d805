"""Orders items by the weighted mean of their scores, the same way on every machine.

Scores are compared as exact fractions, so that neither the order of addition nor a platform's floats can swap two
items. Items that are equal in score and in every tie-break field share a rank, and the next rank is left out
(1, 2, 2, 4); among themselves they keep the order of their keys, so that the list is the same every time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

_MOST_KNOWN = 50_000
"""Combinations of numbers whose result is remembered, since scores repeat and exact arithmetic is slow."""


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


def rank(
    items: Iterable[Scored], weights: Mapping[str, float | int], tie_break: Sequence[str] = ()
) -> Iterator[Ranked]:
    """Ranks items, best first. An item that lacks one of the numbers is left out.

    All items are read before the first place is known; of each, some 24 bytes and its key are kept, and a few hundred
    bytes for every different result.

    Args:
        items: in any order.
        weights: by field; not negative, with a positive sum. They need not sum to 1.
        tie_break: fields compared in this order where scores are equal, the higher value first.
    """
    shares = {name: _exact(weight) for name, weight in weights.items()}
    total = sum(shares.values())
    needed = tuple(dict.fromkeys((*weights, *tie_break)))
    numbers_of: dict[tuple[Fraction, ...], int] = {}
    known: dict[tuple[float | int, ...], int] = {}
    entries = _Entries()
    for item in items:
        if not item.values.keys() >= set(needed):
            continue
        values = tuple(item.values[name] for name in needed)
        number = known.get(values)
        if number is None:
            merits = _merits(item, shares, total, tie_break)
            number = known[values] = numbers_of.setdefault(merits, len(numbers_of))
        entries.add(number, item)
        if len(known) > _MOST_KNOWN:
            known.clear()
    yield from _places(entries, numbers_of)


class _Entries:
    """Items in few bytes: for each the number of its result, its ordinal, and where its key ends in `_keys`."""

    def __init__(self) -> None:
        self._results = array("q")
        self._ordinals = array("q")
        self._ends = array("q", [0])
        self._keys = bytearray()

    def add(self, result: int, item: Scored) -> None:
        self._results.append(result)
        self._ordinals.append(item.ordinal)
        self._keys += item.key.encode()
        self._ends.append(len(self._keys))

    def key(self, index: int) -> bytes:
        """The key in UTF-8, which has the order of the text itself."""
        return bytes(self._keys[self._ends[index] : self._ends[index + 1]])

    def ordinal(self, index: int) -> int:
        return self._ordinals[index]

    def by_result(self, count: int) -> tuple[array[int], array[int]]:
        """Indices of all items, those of one result together, and where those of each result begin; one more ends."""
        begins = array("q", bytes(8 * (count + 1)))
        for result in self._results:
            begins[result + 1] += 1
        for result in range(count):
            begins[result + 1] += begins[result]
        free = array("q", begins)
        indices = array("q", bytes(8 * len(self._results)))
        for index, result in enumerate(self._results):
            indices[free[result]] = index
            free[result] += 1
        return indices, begins


def _places(entries: _Entries, numbers_of: Mapping[tuple[Fraction, ...], int]) -> Iterator[Ranked]:
    indices, begins = entries.by_result(len(numbers_of))
    position = 0
    for merits in sorted(numbers_of, reverse=True):
        number = numbers_of[merits]
        score, place = round(float(merits[0]), 6), position + 1
        for index in sorted(indices[begins[number] : begins[number + 1]], key=entries.key):
            yield Ranked(position, place, entries.ordinal(index), entries.key(index).decode(), score)
            position += 1


def _merits(
    item: Scored, shares: Mapping[str, Fraction], total: Fraction | int, tie_break: Sequence[str]
) -> tuple[Fraction, ...]:
    score = sum((share * _exact(item.values[name]) for name, share in shares.items()), Fraction()) / total
    return (score, *(_exact(item.values[name]) for name in tie_break))


def _exact(number: float | int) -> Fraction:
    # Through text: 0.1 is meant as one tenth, not as the nearest binary fraction.
    return Fraction(str(number))
