"""A hundred thousand steps of runs among killed workers, lost messages and confused providers: every promise holds.

A failing simulation names its seed; `SIMULATION_SEED=<seed>` repeats it and nothing else.
"""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from random import Random

import pytest

from tests.simulation.conftest import say_nothing
from tests.simulation.world import Report, World

STEPS = 100_000
FIRST_SEED = 0


def simulate(seed: int) -> Report:
    """One world from its beginning to its end."""
    return World(seed).run()


def reports() -> Iterator[Report]:
    """Worlds of one seed after the other, as many at a time as there are processors; in the order of their seeds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    at_once = os.cpu_count() or 1
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=say_nothing) as pool:
        begun = deque[Future[Report]]()
        for seed in count(FIRST_SEED):
            begun.append(pool.submit(simulate, seed))
            if len(begun) > at_once:
                yield begun.popleft().result()


@pytest.mark.timeout(1800)
def test_promises_hold_whatever_happens(record_property: Callable[[str, object], None]):
    wanted = os.environ.get("SIMULATION_SEED")  # noqa: TID251 - how a person asks for one simulation
    if wanted is not None:
        print(simulate(int(wanted)))
        return
    steps, runs, counts, ends, last = 0, 0, Counter[str](), Counter[str](), FIRST_SEED
    for report in reports():
        steps, runs, last = steps + report.steps, runs + report.runs, report.seed
        counts += report.counts
        ends += report.ends
        if steps >= STEPS:
            break
    record_property("told", f"simulated seeds {FIRST_SEED} to {last}: {steps} steps, {runs} runs, {dict(ends)}")
    print(", ".join(f"{kind} {number}" for kind, number in counts.most_common()))
    least = {
        "kill": 100,
        "stop": 100,
        "forget": 50,
        "message duplicated": 50,
        "lost answer of a commit": 50,
        "answers nobody": 200,
    }
    assert not {kind: counts[kind] for kind, number in least.items() if counts[kind] < number}


@pytest.mark.parametrize("seed", [Random(11).randrange(1000), 67])
def test_a_seed_says_everything(seed: int):
    """The same seed is the same story, event by event: nothing follows from addresses, and nothing from real time."""
    first = World(seed).run()
    for _ in range(4):
        again = World(seed).run()
        assert (again.steps, again.counts, again.ends) == (first.steps, first.counts, first.ends)
