"""Budgets: limits, and what is reserved and spent of them. The only writer of `budgets`.

The invariant

    spent + reserved <= limit + overhang

is a CHECK constraint, so no order of events can break it. The overhang is what had been taken beyond a limit when an
operator lowered it: 0 otherwise, and it falls to 0 as the attempts in flight settle.

All functions work inside the caller's transaction. Whoever changes several budgets locks them in the order of their
ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import BigInteger, Connection, bindparam, case, select, update
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.tables import budgets, workflow_executions

GLOBAL_SCOPE = "global"
DAY_SCOPES = "day:"
REASON = "budget"
"""Why a run is paused whose next attempt fits into a budget no more; the detail is the scope."""
WARN_SHARE = (4, 5)
"""Share of a limit, as a fraction of integers, from which a warning is given."""


def run_scope(run: int) -> str:
    """The name of the budget of one run."""
    return f"run:{run}"


def workflow_scope(workflow: str) -> str:
    """The name of the budget of all runs of a workflow."""
    return f"workflow:{workflow}"


def provider_scope(provider: str) -> str:
    """The name of the budget of everything that is asked of a provider."""
    return f"provider:{provider}"


def day_scope(epoch_s: float) -> str:
    """The name of the budget of the day, in UTC, on which a moment lies; in order of time when sorted as text."""
    return f"{DAY_SCOPES}{datetime.fromtimestamp(epoch_s, UTC):%Y-%m-%d}"


def scopes_of(run: int, workflow: str, provider: str, epoch_s: float) -> tuple[str, ...]:
    """The names of all budgets that an attempt is held against; everybody locks the global one first."""
    names = (run_scope(run), workflow_scope(workflow), provider_scope(provider), day_scope(epoch_s))
    return (GLOBAL_SCOPE, *names)


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit and what has been taken from it, in nano-USD; `limit_nusd` is None when there is no limit."""

    id: int
    scope: str
    limit_nusd: int | None
    spent_nusd: int
    reserved_nusd: int
    excess_nusd: int

    def used_nusd(self) -> int:
        """What was spent, the part beyond worst prices included."""
        return self.spent_nusd + self.excess_nusd

    def is_nearly_used(self) -> bool:
        """Whether so much of the limit is used that people should know."""
        part, whole = WARN_SHARE
        return self.limit_nusd is not None and self.used_nusd() * whole >= self.limit_nusd * part

    def free_nusd(self) -> int | None:
        """What may still be reserved now; None without a limit. Never negative."""
        if self.limit_nusd is None:
            return None
        return max(0, self.limit_nusd - self.used_nusd() - self.reserved_nusd)

    def spare_nusd(self) -> int | None:
        """What would be free if everything in flight cost nothing; None without a limit. Never negative."""
        return None if self.limit_nusd is None else max(0, self.limit_nusd - self.used_nusd())


def set_limit(connection: Connection, scope: str, limit_nusd: int | None) -> Budget:
    """Creates the budget of a scope, or changes its limit.

    It binds at once. What was taken beyond a lowered limit stays taken, as its overhang: nothing new is sent, and what
    is in flight may settle. Another limit is warned of anew. Safe to repeat.
    """
    _create(connection, scope, limit_nusd)
    row = connection.execute(select(budgets).where(budgets.c.scope == scope).with_for_update()).one()
    if limit_nusd != row.limit_nusd:
        overhang = 0 if limit_nusd is None else max(0, row.spent_nusd + row.reserved_nusd - limit_nusd)
        statement = update(budgets).where(budgets.c.scope == scope)
        connection.execute(statement.values(limit_nusd=limit_nusd, overhang_nusd=overhang, warned_at=None))
    return find_budget(connection, scope)


def configure(connection: Connection, scope: str, limit_nusd: int | None) -> None:
    """Sets a limit that a configuration names, once: what an operator sets later stands until it names another one."""
    budget = ensure_budgets(connection, (scope,))[scope]
    row = connection.execute(select(budgets.c.configured_nusd).where(budgets.c.id == budget)).one()
    if row.configured_nusd != limit_nusd:
        set_limit(connection, scope, limit_nusd)
        connection.execute(update(budgets).where(budgets.c.id == budget).values(configured_nusd=limit_nusd))


def ensure_budgets(connection: Connection, scopes: Sequence[str]) -> dict[str, int]:
    """Ids of budgets by scope; those that do not exist yet begin without a limit, a new day with that of the last one.

    Safe to repeat, and for several processes at once.
    """
    found = _ids(connection, scopes)
    for scope in (one for one in scopes if one not in found):
        _create(connection, scope, *_limit_to_begin_with(connection, scope))
    return found if len(found) == len(set(scopes)) else _ids(connection, scopes)


def find_budgets(connection: Connection, scopes: Iterable[str]) -> list[Budget]:
    """Those of some budgets that exist, in the order of their ids."""
    query = select(budgets).where(budgets.c.scope.in_(list(scopes))).order_by(budgets.c.id)
    return [_budget(row) for row in connection.execute(query)]


def warn_once(connection: Connection) -> list[Budget]:
    """Budgets of which so much is used that people should know, and did not know yet: once per budget and limit."""
    part, whole = WARN_SHARE
    used = (budgets.c.spent_nusd + budgets.c.excess_nusd) * whole
    due = (budgets.c.warned_at.is_(None)) & budgets.c.limit_nusd.is_not(None) & (used >= budgets.c.limit_nusd * part)
    rows = connection.execute(update(budgets).where(due).values(warned_at=NOW).returning(budgets)).all()
    return [_budget(row) for row in sorted(rows, key=lambda row: row.id)]


def find_budget(connection: Connection, scope: str) -> Budget:
    """The budget of a scope.

    Raises:
        LookupError: there is none.
    """
    found = find_budgets(connection, (scope,))
    if not found:
        raise LookupError(f"no budget is called {scope!r}")
    return found[0]


def lock_budgets(connection: Connection, ids: Iterable[int]) -> dict[int, Budget]:
    """Locks budgets until the end of the transaction and returns them by id."""
    return {row.id: _budget(row) for row in connection.execute(_LOCK, {"ids": sorted(set(ids))}).all()}


def reserve(connection: Connection, taken_nusd: Mapping[int, int]) -> None:
    """Adds to the reservations of locked budgets. The caller has checked that it fits; the database checks again."""
    book(connection, {id_: (amount, 0, 0) for id_, amount in taken_nusd.items()})


def book(connection: Connection, deltas: Mapping[int, tuple[int, int, int]]) -> None:
    """Adds (reserved, spent, excess) in nano-USD, each of which may be negative, to budgets by id.

    Raises:
        IntegrityError: more would be taken than the limit allows; the transaction is lost.
    """
    keys = ("budget", "reserved", "spent", "excess")
    if deltas:
        connection.execute(_BOOK, [dict(zip(keys, (id_, *deltas[id_]), strict=True)) for id_ in sorted(deltas)])


def waits_for_a_day(run: AnyRow) -> bool:
    """Whether a run is paused for the budget of a day, so that it goes on by itself."""
    return run.status == "paused" and run.reason == REASON and (run.reason_detail or "").startswith(DAY_SCOPES)


def runs_of_past_days(connection: Connection, now_s: float) -> list[int]:
    """Runs that were paused for the budget of a day which is over, by their numbers."""
    run = workflow_executions.c
    past = run.reason_detail.startswith(DAY_SCOPES) & (run.reason_detail < day_scope(now_s))
    query = select(run.id).where(run.status == "paused", run.reason == REASON, past).order_by(run.id)
    return list(connection.execute(query).scalars())


def _create(connection: Connection, scope: str, limit_nusd: int | None, configured_nusd: int | None = None) -> None:
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = {"scope": scope, "limit_nusd": limit_nusd, "configured_nusd": configured_nusd}
    # Two processes may create the same budget at the same time.
    connection.execute(dialect.insert(budgets).values(values).on_conflict_do_nothing())


def _ids(connection: Connection, scopes: Sequence[str]) -> dict[str, int]:
    query = select(budgets.c.scope, budgets.c.id).where(budgets.c.scope.in_(scopes))
    return {row.scope: row.id for row in connection.execute(query)}


def _limit_to_begin_with(connection: Connection, scope: str) -> tuple[int | None, int | None]:
    """A day begins with the configured limit, or else with that of the last day; other budgets without one."""
    if not scope.startswith(DAY_SCOPES):
        return None, None
    days = select(budgets).where(budgets.c.scope.startswith(DAY_SCOPES), budgets.c.scope < scope)
    last = connection.execute(days.order_by(budgets.c.scope.desc()).limit(1)).one_or_none()
    if last is None:
        return None, None
    return last.limit_nusd if last.configured_nusd is None else last.configured_nusd, last.configured_nusd


def _budget(row: AnyRow) -> Budget:
    return Budget(row.id, row.scope, row.limit_nusd, row.spent_nusd, row.reserved_nusd, row.excess_nusd)


# Built once: making a statement and its key in SQLAlchemy's cache costs more than running it for a few rows.
_LOCK = (
    select(budgets).where(budgets.c.id.in_(bindparam("ids", expanding=True))).order_by(budgets.c.id).with_for_update()
)
_beyond = (
    budgets.c.spent_nusd
    + budgets.c.reserved_nusd
    + bindparam("spent", type_=BigInteger)
    + bindparam("reserved", type_=BigInteger)
    - budgets.c.limit_nusd
)
_BOOK = (
    update(budgets)
    .where(budgets.c.id == bindparam("budget"))
    .values(
        reserved_nusd=budgets.c.reserved_nusd + bindparam("reserved", type_=BigInteger),
        spent_nusd=budgets.c.spent_nusd + bindparam("spent", type_=BigInteger),
        excess_nusd=budgets.c.excess_nusd + bindparam("excess"),
        # Never above what it was, so that the constraint still refuses whatever would add to it.
        overhang_nusd=case(
            (budgets.c.overhang_nusd == 0, 0),
            (_beyond <= 0, 0),
            (_beyond < budgets.c.overhang_nusd, _beyond),
            else_=budgets.c.overhang_nusd,
        ),
    )
)
