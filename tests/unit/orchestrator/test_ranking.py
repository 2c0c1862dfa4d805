"""Rankings are exact, the same on every machine, and fair to equals."""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.judging import ranking
from orchestrator.judging.ranking import Ranked, Scored

grades = st.one_of(st.integers(0, 10), st.floats(0, 10, allow_nan=False).map(lambda value: round(value, 2)))
scored = st.lists(
    st.builds(
        lambda key, a, b: Scored(int(key, 36), key, {"a": a, "b": b}),
        st.text("abc012", min_size=1, max_size=12),
        grades,
        grades,
    ),
    unique_by=lambda one: one.ordinal,
)
WEIGHTS = {"a": 0.7, "b": 0.3}


def rank(items: Iterable[Scored], weights: Mapping[str, float], tie_break: Sequence[str] = ()) -> list[Ranked]:
    return list(ranking.rank(items, weights, tie_break))


def places(found: list[Ranked]) -> list[tuple[str, int, float]]:
    return [(one.key, one.rank, one.score) for one in found]


def test_the_weighted_mean_decides():
    items = [Scored(0, "low", {"a": 1, "b": 10}), Scored(1, "high", {"a": 10, "b": 1})]
    assert places(rank(items, WEIGHTS)) == [("high", 1, 7.3), ("low", 2, 3.7)]


def test_weights_need_not_sum_to_one():
    items = [Scored(0, "x", {"a": 4, "b": 7})]
    assert rank(items, {"a": 7, "b": 3}) == rank(items, WEIGHTS)


def test_equal_items_share_a_rank_and_the_next_is_left_out():
    items = [Scored(n, key, {"a": value}) for n, (key, value) in enumerate([("d", 1), ("c", 5), ("b", 5), ("a", 9)])]
    assert places(rank(items, {"a": 1})) == [("a", 1, 9.0), ("b", 2, 5.0), ("c", 2, 5.0), ("d", 4, 1.0)]
    assert [one.position for one in rank(items, {"a": 1})] == [0, 1, 2, 3]


def test_tie_breaks_are_compared_in_their_order():
    items = [
        Scored(0, "x", {"a": 5, "b": 1, "c": 9}),
        Scored(1, "y", {"a": 5, "b": 2, "c": 0}),
        Scored(2, "z", {"a": 5, "b": 1, "c": 9}),
    ]
    assert places(rank(items, {"a": 1}, ("b", "c"))) == [("y", 1, 5.0), ("x", 2, 5.0), ("z", 2, 5.0)]
    assert [one.key for one in rank(items, {"a": 1}, ("c", "b"))] == ["x", "z", "y"]


@pytest.mark.parametrize("missing", [{"a": 1}, {"b": 1}, {}])
def test_an_item_without_one_of_the_numbers_is_left_out(missing: dict[str, int]):
    items = [Scored(0, "whole", {"a": 1, "b": 1}), Scored(1, "part", missing)]
    assert [one.key for one in rank(items, {"a": 1}, ("b",))] == ["whole"]


def test_nobody_to_rank():
    assert rank([], WEIGHTS) == []


def test_sums_of_tenths_are_exact():
    """0.1 + 0.2 and 0.3 are equal as grades, though not as floats."""
    items = [Scored(0, "one", {"a": 0.1, "b": 0.2, "c": 0}), Scored(1, "two", {"a": 0, "b": 0, "c": 0.3})]
    assert [one.rank for one in rank(items, {"a": 1, "b": 1, "c": 1})] == [1, 1]


def test_a_difference_beyond_the_digits_that_are_shown_still_decides():
    items = [Scored(0, "a", {"a": 1.0000001}), Scored(1, "b", {"a": 1.0000002})]
    assert places(rank(items, {"a": 1})) == [("b", 1, 1.0), ("a", 2, 1.0)]


@given(scored, st.randoms())
def test_the_order_of_the_input_does_not_matter(items: list[Scored], luck):
    shuffled = items.copy()
    luck.shuffle(shuffled)
    assert rank(shuffled, WEIGHTS, ("b",)) == rank(items, WEIGHTS, ("b",))


@given(scored)
def test_better_stands_before_worse_and_equals_beside_each_other(items: list[Scored]):
    def merit(one: Ranked) -> tuple[Fraction, Fraction]:
        values = {item.ordinal: item.values for item in items}[one.ordinal]
        a, b = (Fraction(str(values[name])) for name in "ab")
        return a * Fraction("0.7") + b * Fraction("0.3"), b

    found = rank(items, WEIGHTS, ("b",))
    assert len(found) == len(items)
    assert [one.position for one in found] == list(range(len(items)))
    for better, worse in zip(found, found[1:], strict=False):
        assert merit(better) >= merit(worse)
        assert (better.rank == worse.rank) == (merit(better) == merit(worse))
        assert worse.rank in (better.rank, worse.position + 1)


@given(scored, st.integers(1, 1000))
def test_scaling_all_weights_changes_nothing(items: list[Scored], factor: int):
    scaled = {name: Fraction(str(weight)) * factor for name, weight in WEIGHTS.items()}
    as_numbers = {name: float(value) for name, value in scaled.items()}
    assert [one.key for one in rank(items, as_numbers)] == [one.key for one in rank(items, WEIGHTS)]
