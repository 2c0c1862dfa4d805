"""The database of a simulation: SQLite in memory, on the simulation's clock, with promises that watch themselves.

The promises about single rows are triggers, which see every change whoever makes it. A broken one is written into the
table `broken`, and not raised, so that no error handling can hide it.
"""

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import StaticPool

from orchestrator.database.tables import metadata

UNIX_EPOCH_DAY = 2440587.5
ENDED = "('completed', 'failed', 'skipped', 'cancelled')"
BOOKED = "('ok', 'bad_output', 'refused', 'retryable', 'fatal', 'stale')"

PROMISES = {
    "an ended call changes": (
        "UPDATE",
        "prompt_executions",
        f"OLD.status IN {ENDED} AND (NEW.status <> OLD.status OR NEW.result IS NOT OLD.result"
        " OR NEW.fence <> OLD.fence OR NEW.quality_score IS NOT OLD.quality_score OR NEW.attempts <> OLD.attempts)",
    ),
    "a fence goes back": ("UPDATE", "prompt_executions", "NEW.fence < OLD.fence"),
    "a call is claimed away from its holder": (
        "UPDATE",
        "prompt_executions",
        "OLD.status = 'running' AND NEW.status = 'running'"
        " AND (NEW.worker_id <> OLD.worker_id OR NEW.fence <> OLD.fence)",
    ),
    "a call is held by nobody, or kept by somebody": (
        "UPDATE",
        "prompt_executions",
        "(NEW.status = 'running') <> (NEW.worker_id IS NOT NULL)",
    ),
    "a call ends as completed without an answer": (
        "UPDATE",
        "prompt_executions",
        "(NEW.status = 'completed') <> (NEW.result IS NOT NULL)",
    ),
    "a call disappears": ("DELETE", "prompt_executions", "1"),
    "an attempt disappears": ("DELETE", "llm_usage", "1"),
    "an attempt is booked twice": (
        "UPDATE",
        "llm_usage",
        f"OLD.status IN {BOOKED} AND NEW.settled_at <> OLD.settled_at",
    ),
    "an unknown outcome is booked twice": (
        "UPDATE",
        "llm_usage",
        "OLD.status = 'unknown' AND NEW.status = 'unknown' AND NEW.settled_at <> OLD.settled_at",
    ),
    "an attempt changes its price": ("UPDATE", "llm_usage", "NEW.reserved_nusd <> OLD.reserved_nusd"),
    "a closed window opens": ("UPDATE", "windows", "OLD.status = 'closed' AND NEW.status <> 'closed'"),
    "a window closes over open calls": (
        "UPDATE",
        "windows",
        "NEW.status = 'closed' AND OLD.status <> 'closed' AND EXISTS (SELECT 1 FROM prompt_executions"
        " WHERE window_id = NEW.id AND status IN ('pending', 'running'))",
    ),
    "an ended run goes on": (
        "UPDATE",
        "workflow_executions",
        "OLD.status IN ('completed', 'failed', 'cancelled') AND NEW.status <> OLD.status",
    ),
    "a budget is overspent": (
        "UPDATE",
        "budgets",
        "NEW.spent_nusd + NEW.reserved_nusd > NEW.limit_nusd + NEW.overhang_nusd"
        " OR NEW.spent_nusd < 0 OR NEW.reserved_nusd < 0",
    ),
    "something is taken beyond a lowered limit": (
        "UPDATE",
        "budgets",
        "NEW.limit_nusd IS OLD.limit_nusd AND (NEW.overhang_nusd > OLD.overhang_nusd OR OLD.overhang_nusd > 0"
        " AND NEW.spent_nusd + NEW.reserved_nusd > OLD.spent_nusd + OLD.reserved_nusd)",
    ),
}

BOOKS = """
SELECT b.scope, b.reserved_nusd, b.spent_nusd + b.excess_nusd,
  coalesce(sum(CASE WHEN u.status IN ('reserved', 'sent') THEN u.reserved_nusd ELSE 0 END), 0) AS held,
  coalesce(sum(u.cost_nusd), 0) AS booked
FROM budgets b LEFT JOIN llm_usage u ON (',' || u.budget_ids || ',') LIKE ('%,' || b.id || ',%')
GROUP BY b.id HAVING b.reserved_nusd <> held OR b.spent_nusd + b.excess_nusd <> booked
"""
"""Budgets of which rows and sums tell different things."""

CALL_BOOKS = """
SELECT c.id, c.cost_nusd, c.attempts, coalesce(sum(u.cost_nusd), 0) AS booked, count(u.id) AS made
FROM prompt_executions c LEFT JOIN llm_usage u ON u.prompt_execution_id = c.id
GROUP BY c.id HAVING c.cost_nusd <> booked OR c.attempts <> made
"""
"""Calls of which rows and sums tell different things."""


def open_memory(clock_s: Callable[[], float]) -> tuple[Engine, sqlite3.Connection]:
    """An empty database of this release's schema, and its one connection for looking around cheaply.

    Args:
        clock_s: seconds since the epoch, for everything that asks the database what time it is.
    """
    raw = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None, cached_statements=500)
    _template().backup(raw)

    def julianday(moment: str | None) -> float | None:
        if moment is None:
            return None
        return clock_s() / 86400.0 + UNIX_EPOCH_DAY if moment == "now" else _day(moment)

    # The product asks SQLite for the time in this one way.
    raw.create_function("julianday", 1, julianday)
    raw.execute("PRAGMA foreign_keys=ON")
    engine = create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine, raw


@cache
def _template() -> sqlite3.Connection:
    raw = sqlite3.connect(":memory:", check_same_thread=False)
    metadata.create_all(create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool))
    raw.execute("CREATE TABLE broken (promise TEXT, what TEXT)")
    for number, (promise, (verb, table, condition)) in enumerate(PROMISES.items()):
        shown = "OLD.id || ' ' || OLD.status" if table not in ("budgets",) else "OLD.scope"
        raw.execute(
            f"CREATE TRIGGER promise_{number} AFTER {verb} ON {table} WHEN {condition} "
            f"BEGIN INSERT INTO broken VALUES ('{promise}', {shown}); END"
        )
    raw.commit()
    return raw


def _day(moment: str) -> float | None:
    with suppress(ValueError):
        return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() / 86400.0 + UNIX_EPOCH_DAY
    return None
