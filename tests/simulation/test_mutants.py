"""The simulation is worth something only if it can fail: each of these lies must be found within so many steps."""

from collections.abc import Callable

import pytest

from orchestrator.database import batches, fleet, ledger, runs, windows
from orchestrator.orchestration import WorkflowOrchestrator
from tests.simulation.mutants import mutate
from tests.simulation.world import BrokenPromise, World

MOST_STEPS = 40_000
Patch = pytest.MonkeyPatch


def settle_under_any_fence(patch: Patch) -> None:
    mutate(
        patch,
        batches,
        "settle",
        ('row.status == "running" and row.fence == one.fence and row.worker_id == one.worker', "True"),
        ('mine and attempt.status != "unknown"', "mine"),
    )


def claim_what_others_hold(patch: Patch) -> None:
    mutate(patch, batches, "_may_claim", ('row.status == "pending" and', 'row.status != "completed" or'))


def reserve_beyond_the_budget(patch: Patch) -> None:
    mutate(patch, batches, "_over_budget", ("if not refusing:", "if True:"))


def settle_twice(patch: Patch) -> None:
    mutate(patch, batches, "_may_change", ("return attempt.status in ledger.OPEN_ATTEMPT", "return True"))


def keep_what_dead_workers_held(patch: Patch) -> None:
    mutate(patch, runs, "free_calls", ("if not ids:", "if True:"))


def book_dead_workers_at_nothing(patch: Patch) -> None:
    mutate(patch, ledger, "book_unknown", ("cost_nusd=row.reserved_nusd", "cost_nusd=0"))


def forget_silent_windows(patch: Patch) -> None:
    mutate(patch, windows, "due_or_silent", ("return list(connection.execute(query))", "return []"))


def close_windows_early(patch: Patch) -> None:
    mutate(patch, WorkflowOrchestrator, "close_window", ("if not calls:", "if len(calls) < 2:"))


def send_without_a_record(patch: Patch) -> None:
    mutate(patch, ledger, "add_attempts", ("if rows:", "if len(rows) > 1:"))


def forget_the_dead(patch: Patch) -> None:
    mutate(patch, fleet, "free_dead", ("if gone else", "if False else"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "lie",
    [
        settle_under_any_fence,
        claim_what_others_hold,
        reserve_beyond_the_budget,
        settle_twice,
        keep_what_dead_workers_held,
        book_dead_workers_at_nothing,
        forget_silent_windows,
        close_windows_early,
        send_without_a_record,
        forget_the_dead,
    ],
)
def test_a_lie_is_found(lie: Callable[[Patch], None], monkeypatch: Patch):
    lie(monkeypatch)
    steps = 0
    for seed in range(10_000):
        world = World(seed, most_faults=40, patience_s=700)
        try:
            world.run()
        except BrokenPromise as found:
            print(f"{lie.__name__}: found after {steps + world.steps} steps: {str(found)[:150]}")
            return
        steps += world.steps
        assert steps < MOST_STEPS, "nobody noticed"
