"""The two transactions of a call, for many calls at once: claim with reservation, and settlement.

A worker collects what its calls want to write and commits it together. Each operation in a batch gets an answer of
its own; one that comes too late (another worker was faster, the run was paused, the fence is stale) is told so and
changes nothing. Every operation may be repeated after a commit whose outcome is unknown: a claim is recognised by its
random token, a settlement by the attempt that is no longer open.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, select

from orchestrator.database import budgets, cache, ledger, runs, windows
from orchestrator.database.engine import AnyRow
from orchestrator.database.tables import llm_usage

TAKEN_OVER = "taken_over"
"""Error code of an attempt whose call somebody else held when its outcome came."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Wish to send one attempt of a call now; a permit for it is at hand.

    Attributes:
        call: number of the call.
        run: number of its run.
        held_fence: None to claim a pending call; the fence under which this worker already holds it otherwise.
        token: random 62-bit number of this wish.
        worst_nusd: the worst price of the attempt, nano-USD.
        budget_ids: budgets to hold it against.
        key: of the answer in the cache; None when this call neither takes answers from there nor leaves any.
    """

    call: int
    run: int
    step: str
    provider: str
    model: str
    worker: str
    token: int
    worst_nusd: int
    budget_ids: tuple[int, ...]
    price_source: str
    held_fence: int | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """The attempt is reserved and noted as sent: it may leave, and from now on it may have been paid for."""

    fence: int
    number: int


@dataclass(frozen=True, slots=True)
class NotMine:
    """Somebody else holds the call, it has ended, or its run does not run: nothing to do."""


@dataclass(frozen=True, slots=True)
class OverBudget:
    """The reservation does not fit into a budget.

    Attributes:
        scope: the budget that binds most.
        for_good: it would not fit even if everything in flight cost nothing; otherwise waiting may help.
        free_nusd: what would have fitted into every budget.
        spare_nusd: what would fit into every budget if everything in flight cost nothing.
    """

    scope: str
    limit_nusd: int
    needed_nusd: int
    for_good: bool
    free_nusd: int = field(default=0, compare=False)
    spare_nusd: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class AnsweredMeanwhile:
    """An equal call was answered since the cache was looked at: `result` is what it keeps, JSON text."""

    result: str


@dataclass(frozen=True, slots=True)
class InFlight:
    """An equal call is being asked at this moment, here or by another worker: its answer will do for this one too."""


ClaimAnswer = Claimed | NotMine | OverBudget | AnsweredMeanwhile | InFlight


@dataclass(frozen=True, slots=True)
class Settlement:
    """Outcome of one attempt, and what it means for its call."""

    call: int
    number: int
    fence: int
    worker: str
    usage: ledger.Usage
    end: runs.CallEnd
    text: runs.CallText | None = None
    keep: cache.CacheEntry | None = None


@dataclass(frozen=True, slots=True)
class Closing:
    """What becomes of a pending call without an attempt: skipped, answered from the cache, impossible, or put off."""

    call: int
    end: runs.CallEnd
    text: runs.CallText | None = None
    held: tuple[int, str] | None = None
    """Fence and worker under which the call is held; None for a call that is pending."""


def lock_in_order(connection: Connection, wishes: Sequence[Claim | Settlement | Closing]) -> None:
    """Locks what several groups of wishes in one transaction need in the order that all transactions keep.

    Calls come before budgets. A settlement locks both, so a claim behind it would lock its calls too late, and two
    workers that hold copies of a message would wait for each other's.
    """
    if connection.dialect.name == "sqlite":
        return
    runs.lock_calls(connection, (wish.call for wish in wishes))
    budgets.lock_budgets(connection, {id_ for wish in wishes if isinstance(wish, Claim) for id_ in wish.budget_ids})


def claim(connection: Connection, claims: Sequence[Claim]) -> list[ClaimAnswer]:
    """Claims calls and reserves their worst prices, first come first served; answers in the order given."""
    rows = runs.lock_calls(connection, (wish.call for wish in claims))
    repeated = _claims_already_made(connection, claims, rows)
    locked = budgets.lock_budgets(connection, (id_ for wish in claims for id_ in wish.budget_ids))
    # Behind the lock on the budgets, which serialises claims: nobody else begins an equal flight from here on.
    equal = _equal_calls(connection, claims)
    taken: dict[int, int] = defaultdict(int)
    answers: list[ClaimAnswer] = []
    granted: list[tuple[Claim, Claimed]] = []
    claimed: set[int] = set()
    for wish in claims:
        row = rows.get(wish.call)
        if wish.token in repeated:
            answers.append(repeated[wish.token])
        elif row is None or wish.call in claimed or not _may_claim(wish, row):
            answers.append(NotMine())
        elif wish.held_fence is None and wish.key in equal:
            answers.append(equal[wish.key])
        elif (refusal := _over_budget(wish, [locked[id_] for id_ in wish.budget_ids], taken)) is not None:
            answers.append(refusal)
        else:
            for id_ in wish.budget_ids:
                taken[id_] += wish.worst_nusd
            fence = row.fence + 1 if wish.held_fence is None else row.fence
            granted.append((wish, Claimed(fence, row.attempts + 1)))
            claimed.add(wish.call)
            if wish.key is not None:
                equal[wish.key] = InFlight()
            answers.append(granted[-1][1])
    budgets.reserve(connection, taken)
    runs.claim_calls(connection, [(wish.call, grant.fence, wish.worker, wish.key) for wish, grant in granted])
    ledger.add_attempts(connection, [_attempt_row(wish, grant) for wish, grant in granted])
    return answers


def look(connection: Connection, key: str) -> AnsweredMeanwhile | InFlight | None:
    """What there is of an equal call now; None when somebody has to ask."""
    return _equal(connection, [key]).get(key)


def _equal_calls(connection: Connection, claims: Sequence[Claim]) -> dict[str | None, AnsweredMeanwhile | InFlight]:
    keys = sorted({wish.key for wish in claims if wish.key is not None and wish.held_fence is None})
    return {**_equal(connection, keys)} if keys else {}


def _equal(connection: Connection, keys: Sequence[str]) -> dict[str, AnsweredMeanwhile | InFlight]:
    # In this order: a flight that lands in between is seen twice rather than never.
    flying: dict[str, AnsweredMeanwhile | InFlight] = {key: InFlight() for key in runs.flights(connection, keys)}
    kept = cache.find(connection, keys)
    return flying | {key: AnsweredMeanwhile(result) for key, result in kept.items()}


def _may_claim(wish: Claim, row: AnyRow) -> bool:
    if row.run_status != "running":
        return False
    if wish.held_fence is None:
        # Put off or sent to another route since it was read: whoever comes for that will see it as it is now.
        return row.status == "pending" and row.is_due and row.llm_provider == wish.provider
    return row.status == "running" and row.fence == wish.held_fence and row.worker_id == wish.worker


def _claims_already_made(
    connection: Connection, claims: Sequence[Claim], rows: dict[int, AnyRow]
) -> dict[int, Claimed]:
    """Answers of a batch whose first commit succeeded without our hearing of it, by token."""
    suspects = [
        wish
        for wish in claims
        if (row := rows.get(wish.call)) is not None and row.status == "running" and row.worker_id == wish.worker
    ]
    if not suspects:
        return {}
    columns = llm_usage.c
    query = select(columns.token, columns.fence, columns.number).where(
        columns.prompt_execution_id.in_([wish.call for wish in suspects]),
        columns.token.in_([wish.token for wish in suspects]),
    )
    return {row.token: Claimed(row.fence, row.number) for row in connection.execute(query)}


def _over_budget(wish: Claim, held: Sequence[budgets.Budget], taken: dict[int, int]) -> OverBudget | None:
    limited = [budget for budget in held if budget.limit_nusd is not None]
    free = {budget.id: max(0, (budget.free_nusd() or 0) - taken[budget.id]) for budget in limited}
    refusing = [budget for budget in limited if free[budget.id] < wish.worst_nusd]
    if not refusing:
        return None
    tightest = min(refusing, key=lambda budget: budget.spare_nusd() or 0)
    spare = tightest.spare_nusd() or 0
    return OverBudget(
        scope=tightest.scope,
        limit_nusd=tightest.limit_nusd or 0,
        needed_nusd=tightest.used_nusd() + wish.worst_nusd,
        for_good=spare < wish.worst_nusd,
        free_nusd=min(free.values()),
        spare_nusd=spare,
    )


def _attempt_row(wish: Claim, grant: Claimed) -> dict[str, Any]:
    return {
        "provider": wish.provider,
        "model": wish.model,
        "workflow_execution_id": wish.run,
        "prompt_execution_id": wish.call,
        "step": wish.step,
        "number": grant.number,
        "token": wish.token,
        "fence": grant.fence,
        "worker_id": wish.worker,
        "reserved_nusd": wish.worst_nusd,
        "budget_ids": ",".join(str(id_) for id_ in wish.budget_ids),
        "price_source": wish.price_source,
    }


def settle(connection: Connection, settlements: Sequence[Settlement]) -> list[bool]:
    """Books attempts and moves their calls; False for those whose call was taken over meanwhile.

    A late attempt keeps its cost and its response as `stale`: money spent is money spent, but the answer of the
    successor stands.
    """
    late: list[tuple[int, int, int, int]] = []
    rows = runs.lock_calls(connection, (one.call for one in settlements))
    attempts = ledger.find_attempts(connection, rows)
    booked: list[tuple[AnyRow, ledger.Usage]] = []
    ends: list[tuple[int, runs.CallEnd, runs.CallText | None, int, int, int]] = []
    answers: list[bool] = []
    told: dict[tuple[int, int], bool] = {}
    for one in settlements:
        row, attempt = rows.get(one.call), attempts.get((one.call, one.number))
        if row is None or attempt is None:
            answers.append(False)
            continue
        if (one.call, one.number) in told:
            # Somebody who was late and somebody who asked the provider may say the same at the same moment.
            answers.append(told[one.call, one.number])
            continue
        if not _may_change(attempt, one.usage):
            # Already settled: this is the repetition of a commit whose outcome was not known.
            answers.append(attempt.error_code not in (TAKEN_OVER, ledger.WORKER_LOST))
            continue
        mine = row.status == "running" and row.fence == one.fence and row.worker_id == one.worker
        mine = mine and attempt.status != "unknown"
        booked.append((attempt, one.usage if mine else _as_stale(one.usage)))
        told[one.call, one.number] = mine
        answers.append(mine)
        tokens = [min(count, ledger.MOST_TOKENS) for count in (one.usage.input_tokens, one.usage.output_tokens)]
        if mine:
            ends.append((one.call, _end_of(row, one.end), one.text, tokens[0], tokens[1], one.usage.cost_nusd))
        else:
            before = attempt.cost_nusd if attempt.status == "unknown" else 0
            late.append((one.call, tokens[0], tokens[1], one.usage.cost_nusd - before))
    ledger.settle(connection, booked)
    runs.end_calls(connection, ends)
    runs.add_costs(connection, late)
    windows.note_progress(connection, (rows[end[0]].window_id for end in ends))
    windows.forget_sums(connection, (rows[one[0]].window_id for one in late))
    cache.store(connection, [one.keep for one, mine in zip(settlements, answers, strict=True) if mine and one.keep])
    return answers


def _may_change(attempt: AnyRow, usage: ledger.Usage) -> bool:
    """Whether an attempt is open, or was booked as unknown and its outcome is known now."""
    if attempt.status == "unknown":
        return usage.status != "unknown"
    return attempt.status in ledger.OPEN_ATTEMPT


def _as_stale(usage: ledger.Usage) -> ledger.Usage:
    return replace(usage, status="stale", error_code=TAKEN_OVER)


def _end_of(row: AnyRow, end: runs.CallEnd) -> runs.CallEnd:
    """The end as it was meant, but nothing goes back into a run that was cancelled meanwhile."""
    if row.run_status == "cancelled" and end.status == "pending":
        return replace(end, status="cancelled", next_at_s=None)
    return end


def close(connection: Connection, closings: Sequence[Closing]) -> list[bool]:
    """Moves calls without an attempt; False for those that were not pending, or not held as said, any more."""
    rows = runs.lock_calls(connection, (one.call for one in closings))
    ended: dict[int, Closing] = {}
    answers: list[bool] = []
    for one in closings:
        answers.append(one.call in rows and one.call not in ended and _is_as_said(one, rows[one.call]))
        if answers[-1]:
            ended[one.call] = one
    runs.end_calls(
        connection, [(one.call, _end_of(rows[one.call], one.end), one.text, 0, 0, 0) for one in ended.values()]
    )
    windows.note_progress(connection, (rows[call].window_id for call in ended))
    return answers


def _is_as_said(one: Closing, row: AnyRow) -> bool:
    if one.held is None:
        return row.status == "pending"
    return row.status == "running" and (row.fence, row.worker_id) == one.held
