"""What attempts cost, grouped by whatever a person wants to know it by. Read only.

The sums are made by the database over `llm_usage`, in whole nano-dollars, so that every grouping adds up to the ledger.
"""

from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Label, RowMapping, Select, func, literal, or_, select

from orchestrator.database import windows
from orchestrator.database.runs import OPEN_RUN
from orchestrator.database.tables import ATTEMPT_STATES, budgets, llm_usage, workflow_executions
from orchestrator.money import usd

Grouping = Literal["run", "provider", "model", "step", "day"]

_runs = workflow_executions.c
_usage = llm_usage.c
_TOKENS = (_usage.input_tokens, _usage.output_tokens, _usage.cached_tokens)


def costs(
    connection: Connection, run: int | None = None, by: Grouping = "run", since: datetime | None = None
) -> list[dict[str, Any]]:
    """What attempts cost, in groups whose sum is the ledger's to the last nano-dollar.

    Args:
        connection: the caller's transaction.
        run: one run only; None for all.
        by: what to group by. A call that moved to another provider counts in both groups.
        since: attempts from then on only.

    Returns:
        One object per group: its name under the key `by` (`model` comes with its `provider`, `step` with its
        `workflow`, `run` is called `run_id`), then `calls`, `attempts`, `input_tokens`, `output_tokens`,
        `cached_tokens`, `cost_usd`; of these `unknown_attempts` and `unconfirmed_usd` have an unknown outcome.
    """
    keys = _cost_keys(connection, by)
    query: Select[Any] = (
        select(
            *keys,
            func.count(func.distinct(_usage.prompt_execution_id)).label("calls"),
            func.count().label("attempts"),
            *(func.sum(column).label(column.name) for column in _TOKENS),
            func.sum(_usage.cost_nusd).label("cost_nusd"),
            func.count().filter(_usage.status == "unknown").label("unknown_attempts"),
            _unknown_cost().label("unknown_nusd"),
        )
        .join(workflow_executions, _runs.id == _usage.workflow_execution_id)
        .group_by(*(key.element for key in keys))
        .order_by(*(key.element for key in keys))
    )
    if run is not None:
        query = query.where(_usage.workflow_execution_id == run)
    if since is not None:
        query = query.where(_usage.reserved_at >= since.timestamp())
    return [_cost_group(row, keys) for row in connection.execute(query).mappings()]


def _unknown_cost() -> ColumnElement[int]:
    return func.coalesce(func.sum(_usage.cost_nusd).filter(_usage.status == "unknown"), 0)


def _cost_keys(connection: Connection, by: Grouping) -> tuple[Label[Any], ...]:
    match by:
        case "run":
            return (_runs.run_id.label("run_id"),)
        case "provider":
            return (_usage.provider.label("provider"),)
        case "model":
            return _usage.provider.label("provider"), _usage.model.label("model")
        case "step":
            return _runs.workflow_id.label("workflow"), _usage.step.label("step")
        case "day":
            utc = _usage.execution_date
            if connection.dialect.name == "sqlite":
                return (func.date(utc).label("day"),)
            return (func.to_char(func.timezone("UTC", utc), "YYYY-MM-DD").label("day"),)


def _cost_group(row: RowMapping, keys: tuple[Label[Any], ...]) -> dict[str, Any]:
    return {key.name: row[key.name] for key in keys} | {
        "calls": row["calls"],
        "attempts": row["attempts"],
        **{column.name: int(row[column.name]) for column in _TOKENS},
        "cost_usd": usd(int(row["cost_nusd"])),
        "unknown_attempts": row["unknown_attempts"],
        "unconfirmed_usd": usd(int(row["unknown_nusd"])),
    }


def by_outcome(connection: Connection, run: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Attempts of a run by status, tokens by kind, and nano-USD: all of it and that of unknown outcome.

    Exact, and cheap at any size: see `windows.attempt_sums`.
    """
    sums = windows.attempt_sums(connection, run)
    counts = dict.fromkeys(ATTEMPT_STATES, 0) | {status: one.attempts for status, one in sums.items()}
    tokens = {
        "input": sum(one.input_tokens for one in sums.values()),
        "output": sum(one.output_tokens for one in sums.values()),
        "cached": sum(one.cached_tokens for one in sums.values()),
    }
    unknown = sums["unknown"].cost_nusd if "unknown" in sums else 0
    return counts, tokens, {"all": sum(one.cost_nusd for one in sums.values()), "unknown": unknown}


def totals(connection: Connection, run: int) -> dict[str, int]:
    """Sums over the attempts of one run: `cost_nusd`, `unconfirmed_nusd`, `input`, `output`, `cached`."""
    _, tokens, spent = by_outcome(connection, run)
    return {"cost_nusd": spent["all"], "unconfirmed_nusd": spent["unknown"], **tokens}


def current_scopes(connection: Connection) -> list[str]:
    """The names of all budgets but those of runs that have ended."""
    own = literal("run:") + _runs.id.cast(budgets.c.scope.type)
    of_open_runs = select(own).where(_runs.status.in_(OPEN_RUN))
    wanted = or_(~budgets.c.scope.startswith("run:"), budgets.c.scope.in_(of_open_runs))
    return list(connection.execute(select(budgets.c.scope).where(wanted)).scalars())
