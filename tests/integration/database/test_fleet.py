"""What dead workers held is freed once; a call that kills its workers is stopped; one worker holds a lock."""

from threading import Barrier, Thread

import pytest
from sqlalchemy import func, select, update

from orchestrator.database import Database, costs, fleet, runs
from orchestrator.database.batches import NotMine
from orchestrator.database.fleet import Freed
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import POISON_AFTER, CallEnd
from orchestrator.database.tables import workers
from tests.integration.database.stage import Stage


def count_workers(database: Database) -> int:
    with database.snapshot() as connection:
        return connection.execute(select(func.count()).select_from(workers)).scalar_one()


def test_a_worker_that_beats_keeps_its_calls(stage: Stage):
    stage.register("w1", lease_s=60)
    stage.claimed(0)
    with stage.database.transaction() as connection:
        assert fleet.beat(connection, "w1", 3, "rate_limit")
    assert stage.free_dead() == Freed(0, 0, 0)
    assert stage.row(0).status == "running"
    with stage.database.snapshot() as connection:
        row = connection.execute(select(workers)).one()
    assert (row.in_flight, row.bound_by) == (3, "rate_limit")


def test_what_a_dead_worker_held_goes_back_and_what_it_sent_is_unknown(stage: Stage):
    stage.register("w1")
    stage.register("w2")
    stage.claimed(0, worst=70)
    held = stage.claimed(1, worst=50)
    stage.settle(stage.settlement(1, held, Usage("retryable"), CallEnd("running")))
    stage.claimed(2, worker="w2")
    stage.kill("w1")
    assert stage.free_dead() == Freed(workers=1, calls=2, unknown=1)
    assert [stage.row(n).status for n in range(4)] == ["pending", "pending", "running", "pending"]
    assert (stage.row(0).worker_id, stage.row(0).lost_workers, stage.row(0).cost_nusd) == (None, 1, 70)
    (attempt,) = stage.attempts(0)
    assert (attempt.status, attempt.cost_nusd, attempt.error_code) == ("unknown", 70, "worker_lost")
    assert (stage.money().spent_nusd, stage.money().reserved_nusd) == (70, 100)
    stage.check_books()


def test_a_worker_whose_beat_is_late_does_not_free_itself(stage: Stage):
    stage.register("w1")
    stage.claimed(0)
    stage.kill("w1")
    with stage.database.transaction() as connection:
        assert fleet.free_dead(connection, "w1") == Freed(0, 0, 0)
        assert fleet.free_dead(connection, "w2") == Freed(workers=1, calls=1, unknown=1)


def test_a_dead_worker_is_freed_once(stage: Stage):
    stage.register("w1")
    stage.claimed(0)
    stage.kill("w1")
    stage.free_dead()
    money = stage.money()
    assert stage.free_dead() == Freed(0, 0, 0)
    assert stage.money() == money
    assert stage.row(0).lost_workers == 1


def test_several_reconcilers_at_once_free_a_dead_worker_once(stage: Stage):
    stage.register("w1")
    for ordinal in range(4):
        stage.claimed(ordinal, worst=10)
    stage.kill("w1")
    start, freed = Barrier(3), list[Freed]()

    def look() -> None:
        start.wait()
        freed.append(stage.free_dead())

    threads = [Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.unknown for one in freed) == 4
    assert sum(one.calls for one in freed) == 4
    assert [stage.row(n).lost_workers for n in range(4)] == [1, 1, 1, 1]
    assert stage.money().spent_nusd == 40
    stage.check_books()


def test_calls_of_a_worker_that_nobody_knows_are_freed(stage: Stage):
    """A worker that was taken for dead may claim once more before it learns of it."""
    stage.claimed(0, worker="ghost")
    assert stage.free_dead() == Freed(workers=1, calls=1, unknown=1)
    assert stage.row(0).status == "pending"


def test_a_worker_that_was_taken_for_dead_is_told(stage: Stage):
    stage.register("w1")
    stage.kill("w1")
    stage.free_dead()
    with stage.database.transaction() as connection:
        assert not fleet.beat(connection, "w1", 0, None)
    stage.register("w1")
    with stage.database.transaction() as connection:
        assert fleet.beat(connection, "w1", 0, None)


def test_what_a_worker_held_before_it_was_freed_is_not_its_own_afterwards(stage: Stage):
    stage.register("w1")
    grant = stage.claimed(0)
    stage.kill("w1")
    stage.free_dead()
    stage.register("w1")
    assert stage.claim(stage.wish(0, held_fence=grant.fence)) == [NotMine()]
    end = CallEnd("completed", result="1")
    assert stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=1), end)) == [False]


def test_a_call_that_outlives_three_workers_is_poison(stage: Stage):
    for number in range(POISON_AFTER):
        assert stage.row(0).status == "pending"
        worker = f"w{number}"
        stage.register(worker)
        stage.claimed(0, worst=10, worker=worker)
        stage.kill(worker)
        stage.free_dead()
    call = stage.row(0)
    assert (call.status, call.error_code, call.lost_workers, call.cost_nusd) == ("failed", "poison", 3, 30)
    assert call.completed_at is not None
    assert stage.row(1).status == "pending"
    stage.check_books()


def test_an_attempt_that_was_over_before_its_worker_died_stays_as_it_was(stage: Stage):
    stage.register("w1")
    stage.complete(0, cost=5)
    first = stage.claimed(1, worst=20)
    stage.settle(stage.settlement(1, first, Usage("unknown", cost_nusd=20), CallEnd("running")))
    stage.claimed(1, worst=30, held_fence=first.fence)
    stage.kill("w1")
    assert stage.free_dead().unknown == 1
    assert [(one.status, one.cost_nusd) for one in stage.attempts(1)] == [("unknown", 20), ("unknown", 30)]
    assert stage.row(0).status == "completed"
    assert stage.money().spent_nusd == 55
    stage.check_books()


def test_a_successor_that_still_sends_is_not_touched_by_an_old_attempt_of_a_dead_worker(stage: Stage):
    """The first worker never settled; its call went on to a second one, which is alive."""
    stage.register("w1")
    stage.claimed(0, worst=10)
    with stage.database.transaction() as connection:
        runs.free_calls(connection, [stage.calls[0]], lost=True)
    stage.register("w2")
    stage.claimed(0, worst=20, worker="w2")
    stage.kill("w1")
    assert stage.free_dead() == Freed(workers=1, calls=0, unknown=1)
    assert [(one.status, one.reserved_nusd) for one in stage.attempts(0)] == [("unknown", 10), ("sent", 20)]
    assert stage.row(0).worker_id == "w2"
    stage.check_books()


def test_a_worker_that_signs_off_puts_back_without_blame(stage: Stage):
    stage.register("w1")
    grant = stage.claimed(0, worst=10)
    stage.settle(stage.settlement(0, grant, Usage("retryable"), CallEnd("running")))
    stage.claimed(1, worst=20)
    with stage.database.transaction() as connection:
        assert fleet.sign_off(connection, "w1") == Freed(workers=1, calls=2, unknown=1)
    assert [stage.row(n).lost_workers for n in (0, 1)] == [0, 0]
    assert count_workers(stage.database) == 0
    stage.check_books()


def test_a_lock_is_held_by_one_until_its_time_is_over(database: Database):
    def take(owner: str, seconds: float = 60) -> bool:
        with database.transaction() as connection:
            return fleet.take_lock(connection, "reconciler", owner, seconds)

    assert take("w1")
    assert not take("w2")
    assert take("w1", seconds=-1), "the owner renews"
    assert take("w2"), "it ran out"
    assert not take("w1")


def test_locks_of_different_names_do_not_meet(database: Database):
    with database.transaction() as connection:
        assert fleet.take_lock(connection, "a", "w1", 60)
        assert fleet.take_lock(connection, "b", "w2", 60)


def test_of_many_that_want_a_lock_at_once_one_gets_it(database: Database):
    start, won = Barrier(4), list[str]()

    def want(owner: str) -> None:
        start.wait()
        with database.transaction() as connection:
            if fleet.take_lock(connection, "reconciler", owner, 60):
                won.append(owner)

    threads = [Thread(target=want, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_an_unknown_attempt_is_corrected_once_its_outcome_is_known(stage: Stage):
    stage.set_limit(100)
    stage.register("w1")
    grant = stage.claimed(0, worst=100)
    stage.kill("w1")
    stage.free_dead()
    assert stage.money().free_nusd() == 0
    stage.settle(stage.settlement(0, grant, Usage("ok", cost_nusd=25), CallEnd("completed", result="1")))
    assert stage.money().free_nusd() == 75
    with stage.database.snapshot() as connection:
        assert costs.totals(connection, stage.run)["unconfirmed_nusd"] == 0
    stage.check_books()


@pytest.mark.parametrize("lease_s", [0.5, 3600.0])
def test_a_lease_is_the_workers_own(stage: Stage, lease_s: float):
    """Workers with long leases are not freed by reconcilers that have short ones."""
    stage.register("w1", lease_s=lease_s)
    with stage.database.transaction() as connection:
        connection.execute(update(workers).values(heartbeat_at=workers.c.heartbeat_at - 10))
    stage.claimed(0)
    assert stage.free_dead().workers == (1 if lease_s < 10 else 0)
