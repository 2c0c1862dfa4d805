"""The history checker: what must be true of every run, whatever was killed on the way.

It compares three witnesses that know nothing of each other: the calls and attempts in the database, the budgets, and
the books that the fake providers kept. Each engine test calls it at its end.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text

from orchestrator.database import Database
from orchestrator.database.ledger import split_ids
from tests.fakes.provider_log import ProviderLog

INPUT_NUSD, OUTPUT_NUSD = 10_000, 30_000
"""Prices of one token in `tests.engine`."""
WITHDRAWN = "withdrawn"
SENT_STATUSES = {"ok", "bad_output", "refused", "retryable", "fatal"}
"""Attempts of which the provider must know; an unknown or stale one may or may not have left."""


@dataclass(frozen=True, slots=True)
class History:
    """What the checker counted, for tests that expect certain numbers."""

    calls: Counter[str]
    attempts: Counter[str]
    received: int
    repeated: int
    cost_nusd: int


def check_history(
    database: Database,
    run: int,
    logs: Sequence[ProviderLog],
    *,
    repeats: int = 0,
    unknown: int = 0,
    stale: int = 0,
    ended: bool = True,
    redone: int = 0,
) -> History:
    """Proves that nothing was lost, recorded twice, unaccounted or overspent.

    Args:
        database: where the run lives.
        run: its number.
        logs: the books of all providers that it may have asked.
        repeats: requests beyond the first for each call that this test allows.
        unknown: attempts of unknown outcome that it allows.
        stale: attempts overtaken by another worker that it allows; withdrawn ones are counted apart and always may be.
        ended: the run is over; otherwise calls may be pending, but nothing may be in flight.
        redone: good answers of reduce steps beyond the first, because a retry behind them did them anew.

    Raises:
        AssertionError: one of the promises is broken.
    """
    with database.snapshot() as connection:
        execution = connection.execute(text("SELECT * FROM workflow_executions WHERE id = :run"), {"run": run}).one()
        calls = connection.execute(
            text("SELECT * FROM prompt_executions WHERE workflow_execution_id = :run"), {"run": run}
        ).all()
        attempts = connection.execute(
            text("SELECT * FROM llm_usage WHERE workflow_execution_id = :run"), {"run": run}
        ).all()
        budgets = connection.execute(text("SELECT * FROM budgets")).all()
        held = Counter[int]()
        for row in connection.execute(text("SELECT * FROM llm_usage WHERE status IN ('reserved', 'sent')")):
            held.update(dict.fromkeys(split_ids(row.budget_ids), row.reserved_nusd))
        all_spent = connection.execute(text("SELECT coalesce(sum(cost_nusd), 0) FROM llm_usage")).scalar_one()

    by_status = Counter(call.status for call in calls)
    outcomes = Counter(WITHDRAWN if _is_withdrawn(attempt) else attempt.status for attempt in attempts)
    told = f"calls {dict(by_status)}, attempts {dict(outcomes)}"
    assert not by_status["running"], f"a call is still held: {told}"
    assert outcomes["sent"] + outcomes["reserved"] == 0, f"an attempt is still open: {told}"
    if ended:
        assert not by_status["pending"], f"a call was forgotten: {told}"
    if execution.status == "completed":
        asked = {call.item_ordinal for call in calls if call.item_ordinal >= 0}
        assert asked == set(range(execution.items_total)), "an item has no call"

    _check_answers(calls, attempts, redone)
    received = [line for log in logs for line in log.received if line.attempt_id.startswith(f"{execution.run_id}/")]
    _check_books(execution.run_id, logs, attempts)
    asked_calls = {line.attempt_id.split("/")[1] for line in received}
    repeated = len(received) - len(asked_calls)
    assert repeated <= repeats, f"{repeated} requests were repeated, {repeats} are allowed: {told}"
    assert outcomes["unknown"] <= unknown, f"too many attempts of unknown outcome: {told}"
    assert outcomes["stale"] <= stale, f"too many stale attempts: {told}"

    cost = sum(attempt.cost_nusd for attempt in attempts)
    assert cost == sum(call.cost_nusd for call in calls)
    for budget in budgets:
        # Other runs may go on beside this one.
        assert budget.reserved_nusd == held[budget.id], f"attempts in flight hold {held[budget.id]}: {budget}"
        assert budget.limit_nusd is None or budget.spent_nusd <= budget.limit_nusd, f"overspent: {budget}"
        if budget.scope == f"run:{run}":
            assert budget.reserved_nusd == 0, f"a reservation is left: {budget}"
            assert budget.spent_nusd + budget.excess_nusd == cost, f"ledger {cost}, budget {budget}"
        if budget.scope == "global":
            assert budget.spent_nusd + budget.excess_nusd == all_spent, f"ledger {all_spent}, budget {budget}"
    return History(by_status, outcomes, len(received), repeated, cost)


def _is_withdrawn(attempt) -> bool:
    """Whether an attempt was taken back before a byte left, because its run or its worker stopped."""
    return attempt.status == "stale" and attempt.error_code == "never_sent"


def _check_answers(calls, attempts, redone: int) -> None:
    good = Counter(attempt.prompt_execution_id for attempt in attempts if attempt.status == "ok")
    names = Counter((call.prompt_name, call.item_ordinal, call.judge, call.repeat) for call in calls)
    assert not [name for name, count in names.items() if count > 1], "a call exists twice"
    for call in calls:
        if call.status == "completed":
            assert call.result is not None
            most = 1 + redone if call.item_ordinal < 0 else 1
            assert call.cached or 1 <= good[call.id] <= most, f"call {call.id} has {good[call.id]} good attempts"
        else:
            assert call.result is None
            assert good[call.id] == 0, f"call {call.id} is {call.status} and has a good attempt"


def _check_books(run_id: str, logs: Sequence[ProviderLog], attempts) -> None:
    rows = {f"{run_id}/{attempt.prompt_execution_id}/{attempt.number}": attempt for attempt in attempts}
    received = Counter(line.attempt_id for log in logs for line in log.received)
    ours = {name: count for name, count in received.items() if name.startswith(f"{run_id}/")}
    assert all(count == 1 for count in ours.values()), "an attempt was sent twice"
    strangers = sorted(set(ours) - set(rows))
    assert not strangers, f"the provider got requests that are not in the ledger: {strangers[:5]}"
    withdrawn = [name for name, row in rows.items() if _is_withdrawn(row) and (name in ours or row.cost_nusd)]
    assert not withdrawn, f"attempts were sent, or cost something, that the ledger calls withdrawn: {withdrawn[:5]}"
    unseen = [
        name
        for name, row in rows.items()
        if row.status in SENT_STATUSES and row.http_status and row.provider != "simulator" and name not in ours
    ]
    assert not unseen, f"the ledger holds attempts that the provider never got: {unseen[:5]}"
    for log in logs:
        for line in log.answered:
            row = rows.get(line.attempt_id)
            if row is not None and line.billed and row.status in ("ok", "bad_output") and line.fault != "no_usage":
                price = line.input_tokens * INPUT_NUSD + line.output_tokens * OUTPUT_NUSD
                assert row.cost_nusd == price, f"{line.attempt_id} cost {price}, the ledger says {row.cost_nusd}"
