"""Cuts work into pieces: a workflow into segments, items into windows, open calls into shards and a canvas.

Everything here is pure: the same workflow and the same numbers give the same plan on every machine, which is what
lets the database and not the broker remember how far a run is.

A segment holds the steps between two global barriers. Inside a window of its items the item steps form levels: a level
can begin for an item once the level before is over. The canvas of a window is therefore a chain of groups of shards;
`orchestrator.orchestration` turns it into Celery's chain of chords.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from orchestrator.workflow import Step, Workflow

MOST_PER_LANE = 10
"""Windows that may be open for each lane, trailing ones included: what bounds the rows and messages of a run."""
TRAILING_SHARE = 10
"""A window is trailing when one of so many of its items is still at work."""
MAX_LEVELS = 4
"""Levels published in one canvas: every further one lies inside the messages of those before. Later levels are left
to the window's next round."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The steps between two barriers.

    Attributes:
        number: from 0.
        levels: names of item steps; the steps of one level do not need each other. May be empty.
        reduces: names of reduce steps, each after those it needs. May be empty in the last segment only.
    """

    number: int
    levels: tuple[tuple[str, ...], ...]
    reduces: tuple[str, ...]

    def item_steps(self) -> tuple[str, ...]:
        """Names of all item steps, level by level."""
        return tuple(name for level in self.levels for name in level)


@dataclass(frozen=True, slots=True)
class OpenCall:
    """What a shard is cut from: a call that is not ended. `ordinal` is -1 for a reduce step."""

    step: str
    ordinal: int
    provider: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Calls of one step, one provider queue and one window: those with an ordinal from `first` to `last`, inclusive."""

    step: str
    provider: str
    first: int
    last: int


def segments(workflow: Workflow) -> tuple[Segment, ...]:
    """Cuts the graph of a workflow at its reduce steps; a step stands in the earliest segment that its needs allow."""
    place: dict[str, int] = {}
    depth: dict[str, int] = {}
    for step in workflow.ordered_steps:
        needed = [workflow.step(name) for name in step.needs]
        after_barrier = [place[need.name] + (step.kind == "item" and need.kind == "reduce") for need in needed]
        place[step.name] = max(after_barrier, default=0)
        beside = [depth[need.name] for need in needed if need.kind == "item" and place[need.name] == place[step.name]]
        depth[step.name] = max(beside, default=-1) + 1
    return tuple(_segment(number, workflow, place, depth) for number in range(max(place.values()) + 1))


def _segment(number: int, workflow: Workflow, place: Mapping[str, int], depth: Mapping[str, int]) -> Segment:
    steps = [step for step in workflow.ordered_steps if place[step.name] == number]
    of_items = [step for step in steps if step.kind == "item"]
    levels = tuple(
        tuple(step.name for step in of_items if depth[step.name] == level)
        for level in sorted({depth[step.name] for step in of_items})
    )
    return Segment(number, levels, tuple(step.name for step in steps if step.kind == "reduce"))


def windows(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts the ordinals from `first` to `last` (inclusive) into ranges of at most `size`."""
    for start in range(first, last + 1, size):
        yield start, min(start + size - 1, last)


def canvas(segment: Segment, calls: Sequence[OpenCall], shard_size: int) -> tuple[tuple[Shard, ...], ...]:
    """Arranges the open calls of one window as a chain of groups of shards.

    Args:
        segment: where the steps stand; reduce steps come alone in their window and form one group.
        calls: the open calls, in any order.
        shard_size: calls per shard at most, unless one item alone has more.

    Returns:
        Groups in the order in which they must run; none is empty. Levels beyond `MAX_LEVELS` are left out.
    """
    level_of = {name: number for number, level in enumerate(segment.levels) for name in level}
    by_level: dict[int, list[OpenCall]] = {}
    for call in calls:
        by_level.setdefault(level_of.get(call.step, -1), []).append(call)
    chosen = sorted(by_level)[:MAX_LEVELS]
    return tuple(tuple(_shards(by_level[level], shard_size)) for level in chosen)


def _shards(calls: Iterable[OpenCall], size: int) -> Iterator[Shard]:
    def queue(call: OpenCall) -> tuple[str, str]:
        return call.step, call.provider

    ordered = sorted(calls, key=lambda call: (*queue(call), call.ordinal))
    for (step, provider), group in groupby(ordered, key=queue):
        ordinals = [call.ordinal for call in group]
        start = 0
        while start < len(ordinals):
            end = min(start + size, len(ordinals))
            # All judges and repeats of one item stay together, since a shard is a range of items.
            while end < len(ordinals) and ordinals[end] == ordinals[end - 1]:
                end += 1
            yield Shard(step, provider, ordinals[start], ordinals[end - 1])
            start = end


def is_trailing(segment: Segment, items: int, open_calls: Mapping[str, int]) -> bool:
    """Whether a window only waits for the last few calls of the level that is at work.

    Args:
        segment: where the steps stand.
        items: how many items the window has.
        open_calls: of each step that has any.
    """
    at_work = next((level for level in segment.levels if any(step in open_calls for step in level)), ())
    return sum(open_calls.get(step, 0) for step in at_work) * TRAILING_SHARE <= items


def free_lanes(lanes: int, open_windows: int, busy: int) -> int:
    """How many windows may be opened: one for each lane without a busy window, within bounds.

    Args:
        lanes: of the run.
        open_windows: how many there are.
        busy: those of them that are not trailing.
    """
    return max(0, min(lanes - busy, lanes * MOST_PER_LANE - open_windows))


def shard_size_for(calls: int, wanted: int, parallel: int = 8) -> int:
    """Calls per shard: as wanted, but a small window is spread over several workers; never below 5."""
    return max(5, min(wanted, -(-calls // parallel)))


def calls_per_item(workflow: Workflow) -> int:
    """How many calls one item causes at most, repeats included."""
    return sum(step.repeats for step in workflow.steps if step.kind == "item")


def reduce_calls(workflow: Workflow) -> int:
    """How many calls the reduce steps of a run cause."""
    return sum(1 for step in workflow.steps if step.kind == "reduce" and step.asks())


def needed_answers(workflow: Workflow, step: Step) -> tuple[str, ...]:
    """Names of the steps whose answers the step may see: all it needs, directly or through others, in order of work."""
    seen: set[str] = set()
    waiting = list(step.needs)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(workflow.step(name).needs)
    return tuple(other.name for other in workflow.ordered_steps if other.name in seen)


@dataclass(frozen=True, slots=True)
class Redo:
    """What follows from asking calls of some steps again.

    Attributes:
        same_item: item steps that saw an answer of these steps about the same item: what was skipped for want of it is
            decided anew.
        behind: item steps that saw a reduce step which is done anew: what was skipped is decided anew for all items.
        reduces: reduce steps that are done anew, in order of work.
        stage: segment, whether its reduce steps are at work, and which of them: where the run goes on.
    """

    same_item: tuple[str, ...]
    behind: tuple[str, ...]
    reduces: tuple[str, ...]
    stage: tuple[int, bool, int]


def redo(workflow: Workflow, asked: frozenset[str]) -> Redo:
    """What has to be done again once calls of the steps `asked` (at least one) were asked again.

    A reduce step is done anew when it needs one of them, itself or through others, and when an item step of its own
    segment is among them, since it tells how many items failed there.
    """
    whole = segments(workflow)
    anew: set[str] = set()
    behind: list[str] = []
    for segment in whole:
        behind += [name for name in segment.item_steps() if anew & {*needed_answers(workflow, workflow.step(name))}]
        for name in segment.reduces:
            if {name, *segment.item_steps(), *needed_answers(workflow, workflow.step(name))} & (asked | anew):
                anew.add(name)
    same_item = [
        step.name
        for step in workflow.ordered_steps
        if step.kind == "item" and asked & {*needed_answers(workflow, step)} and step.name not in behind
    ]
    stages = [
        (segment.number, name in segment.reduces, segment.reduces.index(name) if name in segment.reduces else 0)
        for segment in whole
        for name in asked.intersection((*segment.item_steps(), *segment.reduces))
    ]
    ordered = tuple(name for segment in whole for name in segment.reduces if name in anew)
    return Redo(tuple(same_item), tuple(behind), ordered, min(stages))
