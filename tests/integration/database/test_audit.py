"""The audit log: a row per change, chained, so that any later edit shows at its place."""

from collections.abc import Callable

import pytest
from sqlalchemy import Connection, delete, insert, select, update

from orchestrator.control import RunControl, budget_scope
from orchestrator.database import Database, audit, budgets
from orchestrator.database.audit import Change
from orchestrator.database.limits import Override
from orchestrator.database.tables import audit_log
from orchestrator.errors import InvalidInput, RunNotFound
from tests.integration.database.stage import Stage


def fill(database: Database, rows: int = 5) -> None:
    for number in range(rows):
        with database.transaction() as connection:
            audit.append(connection, Change("ann@host\x00", "limits.set", subject="s\ud800", new={"n": number}))


def verdict(database: Database, head: str | None = None) -> audit.Verdict:
    with database.snapshot() as connection:
        return audit.verify(connection, head)


def rows(database: Database) -> list[tuple[str, str | None, object, object]]:
    with database.snapshot() as connection:
        told = audit.entries(connection)
    return [(row["action"], row["subject"], row["old"], row["new"]) for row in reversed(told)]


def edit(connection: Connection) -> None:
    connection.execute(update(audit_log).where(audit_log.c.id == 3).values(new='{"n":9}'))


def backdate(connection: Connection) -> None:
    connection.execute(update(audit_log).where(audit_log.c.id == 3).values(at=1.0))


def remove(connection: Connection) -> None:
    connection.execute(delete(audit_log).where(audit_log.c.id == 2))


def swap(connection: Connection) -> None:
    connection.execute(update(audit_log).where(audit_log.c.id == 3).values(id=99))
    connection.execute(update(audit_log).where(audit_log.c.id == 4).values(id=3))
    connection.execute(update(audit_log).where(audit_log.c.id == 99).values(id=4))


def forge(connection: Connection) -> None:
    row = dict(connection.execute(select(audit_log).where(audit_log.c.id == 2)).mappings().one())
    connection.execute(update(audit_log).where(audit_log.c.id >= 3).values(id=audit_log.c.id + 10))
    connection.execute(insert(audit_log).values(**{**row, "id": 3, "hash": "f" * 64}))


def test_an_untouched_log_is_sound(database: Database):
    assert verdict(database) == audit.Verdict(0, audit.FIRST)
    fill(database)
    found = verdict(database)
    assert (found.rows, found.broken, found.reason) == (5, None, None)
    assert rows(database)[4] == ("limits.set", "s\ufffd", None, {"n": 4})


@pytest.mark.parametrize(("change", "at"), [(edit, 3), (backdate, 3), (remove, 3), (swap, 3), (forge, 3)])
def test_every_kind_of_tampering_is_found_at_its_row(database: Database, change: Callable[[Connection], None], at: int):
    fill(database)
    with database.transaction() as connection:
        change(connection)
    assert verdict(database).broken == at


def test_rows_cut_off_at_the_end_are_missed_by_whoever_noted_the_head(database: Database):
    fill(database)
    head = verdict(database).head
    assert verdict(database, head).reason is None
    with database.transaction() as connection:
        connection.execute(delete(audit_log).where(audit_log.c.id > 3))
    assert verdict(database).reason is None
    assert verdict(database, head).reason is not None


def test_a_change_that_fails_leaves_no_row(stage: Stage):
    def fail() -> None:
        with stage.database.transaction() as connection:
            audit.append(connection, Change("ann", "run.pause"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert rows(stage.database) == []


def test_control_writes_what_it_changed_and_nothing_when_it_changed_nothing(stage: Stage):
    control = RunControl(stage.database, "ann")
    assert control.pause(stage.run)
    assert not control.pause(stage.run)
    assert control.take_up(stage.run)
    assert control.set_priority(stage.run, 2)
    assert not control.set_priority(stage.run, 2)
    scope = budgets.run_scope(stage.run)
    for _ in range(2):
        control.set_budget(scope, 2_000_000_000, "run-1")
        assert control.set_limits("simulator", {"rpm": 0}) == Override(rpm=0)
        assert control.set_limits("simulator", {"tpm": 5}) == Override(rpm=0, tpm=5)
        assert control.clear_limits("simulator") == Override()
    assert control.cancel(stage.run)
    assert not control.cancel(stage.run)
    assert rows(stage.database)[:5] == [
        ("run.pause", None, {"status": "running"}, {"status": "paused"}),
        ("run.resume", None, {"status": "paused"}, {"status": "running"}),
        ("run.priority", None, 0, 2),
        ("budget.set", scope, {"limit_usd": None}, {"limit_usd": "2.00"}),
        ("limits.set", "simulator", {}, {"rpm": 0}),
    ]
    assert len(rows(stage.database)) == 11
    assert rows(stage.database)[-1][0] == "run.cancel"
    with pytest.raises(InvalidInput):
        control.set_priority(stage.run, 10**9)


def test_budgets_are_named_as_people_name_them(stage: Stage):
    assert budget_scope(stage.database, "global") == ("global", None)
    assert budget_scope(stage.database, "provider:openai") == ("provider:openai", None)
    assert budget_scope(stage.database, "run-1") == (budgets.run_scope(stage.run), "run-1")
    assert budget_scope(stage.database, "day")[0].startswith("day:20")
    for unknown in ("provider:", "nobody"):
        with pytest.raises(RunNotFound):
            budget_scope(stage.database, unknown)
