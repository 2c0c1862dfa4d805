"""A workflow is cut into segments, windows and shards the same way everywhere, and no call is left out."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning import (
    MAX_LEVELS,
    OpenCall,
    Segment,
    Shard,
    calls_per_item,
    canvas,
    free_lanes,
    is_trailing,
    needed_answers,
    redo,
    reduce_calls,
    segments,
    shard_size_for,
    windows,
)
from orchestrator.workflow import Reduce, Step, Workflow


def item(name: str, *needs: str, repeats: int = 1) -> Step:
    return Step(name=name, prompt=f"{name}.j2", needs=needs, repeats=repeats)


def ranking(name: str, *needs: str) -> Step:
    return Step(name=name, kind="reduce", needs=needs, reduce=Reduce(rule="rank"))


def asking(name: str, *needs: str) -> Step:
    return Step(name=name, kind="reduce", needs=needs, prompt=f"{name}.j2", reduce=Reduce(rule="llm"))


def workflow(*steps: Step) -> Workflow:
    return Workflow(name="w", version="1", steps=steps)


def test_steps_that_do_not_need_each_other_share_a_level():
    found = segments(workflow(item("a"), item("b", "a"), item("c", "a"), item("d", "b", "c")))
    assert found == (Segment(0, (("a",), ("b", "c"), ("d",)), ()),)
    assert found[0].item_steps() == ("a", "b", "c", "d")


def test_a_reduce_step_ends_its_segment():
    found = segments(workflow(item("a"), ranking("order", "a"), asking("why", "order"), item("check", "why", "a")))
    assert found == (Segment(0, (("a",),), ("order", "why")), Segment(1, (("check",),), ()))


def test_a_step_stands_in_the_earliest_segment_that_its_needs_allow():
    found = segments(workflow(ranking("order", "a"), item("late", "order"), item("a"), item("beside")))
    assert found == (Segment(0, (("a", "beside"),), ("order",)), Segment(1, (("late",),), ()))


def test_the_order_of_the_file_decides_where_needs_do_not():
    assert segments(workflow(item("z"), item("a")))[0].levels == (("z", "a"),)


def test_a_workflow_may_end_with_a_segment_without_items():
    found = segments(workflow(item("a"), ranking("r", "a"), item("b", "r"), asking("end", "b")))
    assert [one.reduces for one in found] == [("r",), ("end",)]


names = st.lists(
    st.text(string.ascii_lowercase, min_size=1, max_size=3).map("s_{}".format), min_size=1, max_size=8, unique=True
)


@st.composite
def graphs(draw: st.DrawFn) -> Workflow:
    """Workflows without cycles, in which any step may need any earlier one and the file has another order."""
    steps: list[Step] = []
    for name in draw(names):
        needs = draw(st.lists(st.sampled_from(steps), unique_by=lambda one: one.name)) if steps else []
        make = draw(st.sampled_from((item, ranking, asking)))
        steps.append(make(name, *(one.name for one in needs)))
    return workflow(*draw(st.permutations(steps)))


@given(graphs())
def test_every_step_stands_once_and_behind_all_it_needs(graph: Workflow):
    found = segments(graph)
    place = {}
    for segment in found:
        for level, steps in enumerate((*segment.levels, *((name,) for name in segment.reduces))):
            for name in steps:
                assert name not in place
                place[name] = (segment.number, level)
    assert set(place) == {step.name for step in graph.steps}
    assert [segment.number for segment in found] == list(range(len(found)))
    for step in graph.steps:
        assert all(place[need] < place[step.name] for need in step.needs)
        if step.kind == "item":
            assert all(place[need][0] < place[step.name][0] for need in step.needs if graph.step(need).kind == "reduce")


@given(graphs())
def test_only_the_last_segment_may_have_no_reduce_step(graph: Workflow):
    assert all(segment.reduces for segment in segments(graph)[:-1])


@given(graphs())
def test_a_step_sees_all_that_it_needs_directly_or_not(graph: Workflow):
    for step in graph.steps:
        seen = needed_answers(graph, step)
        assert set(step.needs) <= set(seen)
        assert all(set(graph.step(name).needs) <= set(seen) for name in seen)
        assert step.name not in seen
        order = [one.name for one in graph.ordered_steps]
        assert list(seen) == sorted(seen, key=order.index)


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 60))
def test_windows_cover_a_range_without_gaps(first: int, count: int, size: int):
    found = list(windows(first, first + count - 1, size))
    assert [n for low, high in found for n in range(low, high + 1)] == list(range(first, first + count))
    assert all(high - low < size for low, high in found)


LEVELS = Segment(0, (("a", "b"), ("c",), ("d",), ("e",), ("f",)), ("end",))
open_calls = st.lists(
    st.builds(OpenCall, st.sampled_from("abcdef"), st.integers(0, 30), st.sampled_from(("openai", "ollama")))
)


@given(open_calls, st.integers(1, 12))
def test_every_open_call_is_in_exactly_one_shard_of_its_level(calls: list[OpenCall], size: int):
    groups = canvas(LEVELS, calls, size)
    level_of = {name: number for number, level in enumerate(LEVELS.levels) for name in level}
    levels = sorted({level_of[call.step] for call in calls})[:MAX_LEVELS]
    assert len(groups) == len(levels)
    assert all(groups)
    for level, group in zip(levels, groups, strict=True):
        assert all(level_of[shard.step] == level for shard in group)
    for call in calls:
        holding = [shard for group in groups for shard in group if holds(shard, call)]
        assert len(holding) == (1 if level_of[call.step] in levels else 0)


@given(open_calls, st.integers(1, 12))
def test_a_shard_is_no_larger_than_asked_unless_one_item_is(calls: list[OpenCall], size: int):
    for group in canvas(LEVELS, calls, size):
        for shard in group:
            held = [call.ordinal for call in calls if holds(shard, call)]
            of_last = held.count(max(held))
            assert len(held) - of_last < size


@given(st.randoms(), open_calls, st.integers(1, 12))
def test_a_canvas_does_not_depend_on_the_order_of_calls(luck, calls: list[OpenCall], size: int):
    shuffled = calls.copy()
    luck.shuffle(shuffled)
    assert canvas(LEVELS, shuffled, size) == canvas(LEVELS, calls, size)


def holds(shard: Shard, call: OpenCall) -> bool:
    return (shard.step, shard.provider) == (call.step, call.provider) and shard.first <= call.ordinal <= shard.last


def test_repeats_of_one_item_stay_together():
    calls = [OpenCall("a", ordinal, "openai") for ordinal in (0, 1, 1, 1, 2)]
    assert canvas(LEVELS, calls, 2) == ((Shard("a", "openai", 0, 1), Shard("a", "openai", 2, 2)),)


def test_a_reduce_call_is_alone_in_its_canvas():
    assert canvas(LEVELS, [OpenCall("end", -1, "openai")], 50) == ((Shard("end", "openai", -1, -1),),)


def test_nothing_open_makes_no_canvas():
    assert canvas(LEVELS, [], 5) == ()


@pytest.mark.parametrize(
    ("calls", "wanted", "expected"),
    [(1, 50, 5), (100, 50, 13), (400, 50, 50), (10**6, 50, 50), (0, 50, 5), (100, 1, 5)],
)
def test_a_small_window_is_spread_over_workers(calls: int, wanted: int, expected: int):
    assert shard_size_for(calls, wanted) == expected


@pytest.mark.parametrize(
    ("open_calls", "expected"),
    [
        ({"first": 100, "second": 100}, False),
        ({"first": 11, "second": 100}, False),
        # What waits for the first level cannot be asked anyway.
        ({"first": 10, "second": 100}, True),
        ({"second": 11}, False),
        ({"second": 3}, True),
        ({}, True),
    ],
)
def test_a_window_is_trailing_when_few_calls_of_its_level_are_open(open_calls: dict[str, int], expected: bool):
    segment = Segment(0, (("first",), ("second",)), ())
    assert is_trailing(segment, 100, open_calls) is expected


@pytest.mark.parametrize(
    ("open_windows", "busy", "expected"),
    [(0, 0, 4), (4, 4, 0), (4, 3, 1), (8, 2, 2), (38, 0, 2), (40, 0, 0), (45, 1, 0)],
)
def test_a_lane_is_free_when_its_window_is_trailing_within_bounds(open_windows: int, busy: int, expected: int):
    assert free_lanes(4, open_windows, busy) == expected


def test_calls_are_counted_with_repeats():
    graph = workflow(item("a", repeats=3), item("b", "a"), ranking("r", "b"), asking("end", "r"))
    assert (calls_per_item(graph), reduce_calls(graph)) == (4, 1)


REVIEWED = workflow(
    item("judge"),
    item("check", "judge"),
    item("beside"),
    ranking("order", "check"),
    asking("why", "order"),
    item("second", "why", "judge"),
    ranking("final", "second"),
)


def test_a_failed_item_step_reopens_its_segment_and_everything_behind():
    found = redo(REVIEWED, frozenset({"judge"}))
    assert found.same_item == ("check",)
    assert found.behind == ("second",)
    assert found.reduces == ("order", "why", "final")
    assert found.stage == (0, False, 0)


def test_reduce_steps_tell_of_failures_that_they_do_not_need():
    assert redo(REVIEWED, frozenset({"beside"})).reduces == ("order", "why", "final")


def test_a_failed_reduce_step_leaves_those_before_it():
    found = redo(REVIEWED, frozenset({"why"}))
    assert (found.same_item, found.behind, found.reduces) == ((), ("second",), ("why", "final"))
    assert found.stage == (0, True, 1)


def test_the_earliest_of_several_steps_decides_where_a_run_goes_on():
    assert redo(REVIEWED, frozenset({"second"})).stage == (1, False, 0)
    assert redo(REVIEWED, frozenset({"second", "why"})).stage == (0, True, 1)
