"""Puts calls that have ended back to pending: failed ones, and what was decided or concluded without their answers.

Completed answers about items are never touched. Only statuses move here, in one transaction that holds the run's row;
which steps have to be done again is worked out by `orchestrator.planning.redo`.

All functions work inside the caller's transaction.
"""

from collections.abc import Collection, Mapping

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, false, null, or_, select, update

from orchestrator.database.tables import llm_usage, prompt_executions, verdicts

_calls = prompt_executions.c


def chosen(run: int, *, failed: bool, unknown: bool) -> ColumnElement[bool]:
    """The condition for calls of a run to be asked again.

    Args:
        run: number of the run.
        failed: all that failed.
        unknown: those that failed and of whose last attempt nobody knows the outcome.
    """
    last_unknown = exists().where(
        llm_usage.c.prompt_execution_id == _calls.id,
        llm_usage.c.number == _calls.attempts,
        llm_usage.c.status == "unknown",
    )
    which = or_(false() if not failed else _calls.id.is_not(None), last_unknown if unknown else false())
    return and_(_calls.workflow_execution_id == run, _calls.status == "failed", which)


def steps_of(connection: Connection, condition: ColumnElement[bool]) -> frozenset[str]:
    """Names of the steps that calls belong to."""
    return frozenset(connection.execute(select(_calls.prompt_name).where(condition).distinct()).scalars())


def put_back(
    connection: Connection, condition: ColumnElement[bool], routes: Mapping[str, tuple[str, str]]
) -> tuple[int, set[int]]:
    """Puts calls back to pending with fresh attempts on their first route.

    A call that a worker holds is taken from it by its fence; its attempt, once it settles, is booked and changes
    nothing else.

    Args:
        connection: the caller's transaction, which holds the run's row.
        condition: which calls.
        routes: provider and model of the first route, by step.

    Returns:
        How many they were, and their windows.
    """
    # Locked in the order of their ids, as claims do it: otherwise the two could wait for each other.
    query = select(_calls.id, _calls.window_id).where(condition).order_by(_calls.id).with_for_update()
    window_ids = {row.window_id for row in connection.execute(query)}
    count = 0
    for step, (provider, model) in routes.items():
        statement = update(prompt_executions).where(condition, _calls.prompt_name == step)
        moved = connection.execute(
            statement.values(
                status="pending",
                result=None,
                error_code=None,
                error_message=None,
                quality_score=None,
                cached=False,
                saved_nusd=0,
                llm_provider=provider,
                llm_model=model,
                route_index=0,
                route_attempts=0,
                reasks=0,
                lost_workers=0,
                fence=_calls.fence + 1,
                worker_id=null(),
                next_at=null(),
                claimed_at=null(),
                completed_at=null(),
                execution_time_ms=null(),
            )
        )
        count += moved.rowcount
    return count, window_ids


def skipped(run: int, steps: Collection[str], about: ColumnElement[bool] | None) -> ColumnElement[bool]:
    """The condition for skipped calls of some steps; with `about`, only of items that those other calls are about."""
    own = and_(_calls.workflow_execution_id == run, _calls.prompt_name.in_(steps), _calls.status == "skipped")
    if about is None:
        return own
    items = select(_calls.item_ordinal).where(about).correlate(None)
    return and_(own, _calls.item_ordinal.in_(items))


def reduced(run: int, steps: Collection[str]) -> ColumnElement[bool]:
    """The condition for calls of reduce steps that were asked."""
    not_open = _calls.status.in_(("running", "completed", "failed", "skipped"))
    return and_(_calls.workflow_execution_id == run, _calls.prompt_name.in_(steps), not_open)


def forget_rankings(connection: Connection, run: int, steps: Collection[str]) -> None:
    """Removes the places of rankings that are computed anew."""
    mine = verdicts.c.workflow_execution_id == run
    connection.execute(delete(verdicts).where(mine, verdicts.c.step.in_(steps)))
