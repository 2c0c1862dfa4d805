"""Single answers as people read them: results in the order of the input, places in rankings, and how one came about.

Results are read a page of items at a time, so that a run of a million items takes the memory of one page. Everything
here reads only.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Select, func, select

from orchestrator.database.engine import AnyRow
from orchestrator.database.tables import items, llm_usage, prompt_executions, verdicts, workflow_executions
from orchestrator.database.times import iso_epoch
from orchestrator.money import usd

PAGE_ITEMS = 500
DEFAULT_TOP = 10
Combine = Callable[[Sequence[Any]], Any]
"""Makes one answer of the answers of a step's repeats."""

_calls = prompt_executions.c
_runs = workflow_executions.c
_usage = llm_usage.c


def results(
    connection: Connection, run: int, step: str | None = None, *, combine: Combine = list, top: int | None = None
) -> Iterator[dict[str, Any]]:
    """One object per item and step, items in the order of the input and steps in the order of work, reduce steps last.

    Args:
        connection: the caller's transaction, open until the last row was taken.
        run: number of the run.
        step: one step only; None for all.
        combine: makes one answer of those of several repeats; a list of them by default.
        top: places of a ranking to show; None for as many as the step itself speaks of.

    Yields:
        `item_key` (None for a reduce step), `step`, `status`, `answer` (None unless completed), `quality_score`,
        `provider`, `model`, `attempts`, `cost_usd`, `error` (`code` and `message`, or None). The answer of a ranking
        is `{"ranking": [{"rank", "score", "item_key"}, ...]}`. Steps that nobody came to yet are left out.

    Raises:
        LookupError: the run does not exist.
    """
    steps = [known for known in run_steps(connection, run) if step in (None, known["name"])]
    of_items = [known["name"] for known in steps if known["kind"] == "item"]
    for keys, calls in _pages(connection, run, of_items):
        for (ordinal, name), repeats in groupby(calls, key=lambda call: (call.item_ordinal, call.prompt_name)):
            yield _result(keys[ordinal], name, list(repeats), combine)
    for known in (known for known in steps if known["kind"] == "reduce"):
        yield from _reduce_results(connection, run, known, combine, top)


def ranking(connection: Connection, run: int, step: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The places of a ranking, best first, as `rank`, `score`, `item_key`; empty until it was computed."""
    query = (
        select(verdicts.c.rank, verdicts.c.score, items.c.item_key)
        .join(
            items,
            (items.c.workflow_execution_id == verdicts.c.workflow_execution_id)
            & (items.c.ordinal == verdicts.c.item_ordinal),
        )
        .where(verdicts.c.workflow_execution_id == run, verdicts.c.step == step)
        .order_by(verdicts.c.position)
        .limit(limit)
    )
    return [{"rank": row.rank, "score": row.score, "item_key": row.item_key} for row in connection.execute(query)]


def answers_of(connection: Connection, run: int, item_keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Completed answers about a few items: item key -> step -> answer of the first repeat."""
    query = (
        select(items.c.item_key, _calls.prompt_name, _calls.result)
        .join(
            items,
            (items.c.workflow_execution_id == _calls.workflow_execution_id) & (items.c.ordinal == _calls.item_ordinal),
        )
        .where(
            _calls.workflow_execution_id == run,
            _calls.prompt_name.in_([step["name"] for step in run_steps(connection, run)]),
            _calls.repeat == 0,
            _calls.status == "completed",
            items.c.item_key.in_(item_keys),
        )
        .order_by(_calls.id)
    )
    found: dict[str, dict[str, Any]] = {}
    for row in connection.execute(query):
        found.setdefault(row.item_key, {})[row.prompt_name] = json.loads(row.result)
    return found


def run_steps(connection: Connection, run: int) -> list[dict[str, Any]]:
    """The steps of a run in the order of work: `name`, `kind`, `segment`, `calls`, `top`, `scored_step`.

    Raises:
        LookupError: the run does not exist.
    """
    return json.loads(_run(connection, run).spec).get("steps", [])


def providers_of(connection: Connection, run: int) -> set[str]:
    """The providers that a run paid, or would ask first when every answer came from the cache."""
    paid = set(
        connection.execute(select(_usage.provider).where(_usage.workflow_execution_id == run).distinct()).scalars()
    )
    routes: dict[str, list[dict[str, Any]]] = json.loads(_run(connection, run).spec).get("routes", {})
    return paid or {chosen[0]["provider"] for chosen in routes.values() if chosen}


def explain(connection: Connection, run: int, item_key: str) -> dict[str, Any] | None:
    """Everything about one item, or about one reduce step when no item has that key.

    Returns:
        JSON data with the run's facts, the item's fields, `calls` in the order of work (each with its template's
        version, rendered prompt, the routes it could take with their reasons, every attempt, answer and error) and
        `rankings`; a step that ranks has no calls but the whole `ranking`. None when there is no such item and no such
        reduce step.
    """
    row = _run(connection, run)
    spec = json.loads(row.spec)
    steps = [step["name"] for step in spec.get("steps", [])]
    item = connection.execute(
        select(items).where(items.c.workflow_execution_id == run, items.c.item_key == item_key)
    ).one_or_none()
    if item is None and item_key not in steps:
        return None
    query = select(prompt_executions).where(_calls.workflow_execution_id == run).order_by(_calls.id)
    if item is None:
        query = query.where(_calls.prompt_name == item_key, _calls.item_ordinal == -1)
    else:
        query = query.where(_calls.prompt_name.in_(steps), _calls.item_ordinal == item.ordinal)
    calls = connection.execute(query).all()
    places = ranking(connection, run, item_key) if item is None and not calls else []
    if item is None and not calls and not places:
        return None
    attempts = _attempts(connection, [call.id for call in calls])
    return {
        "run_id": row.run_id,
        "workflow": row.workflow_id,
        "workflow_version": row.workflow_version,
        "pack_hash": row.pack_hash,
        "variables": spec.get("variables", {}),
        "item_key": None if item is None else item.item_key,
        "item": None if item is None else json.loads(item.content),
        "calls": [_explained(call, spec, attempts.get(call.id, [])) for call in calls],
        "rankings": [] if item is None else _places(connection, run, item.ordinal),
        "ranking": places,
    }


def _run(connection: Connection, run: int) -> AnyRow:
    row = connection.execute(select(workflow_executions).where(_runs.id == run)).one_or_none()
    if row is None:
        raise LookupError(f"run {run} does not exist")
    return row


def _call_query(run: int) -> Select[*tuple[Any, ...]]:
    # From the attempts, because they also hold what was paid for a call that another worker had taken over.
    paid = select(func.coalesce(func.sum(_usage.cost_nusd), 0)).where(_usage.prompt_execution_id == _calls.id)
    return select(
        _calls.prompt_name,
        _calls.item_ordinal,
        _calls.status,
        _calls.result,
        _calls.quality_score,
        _calls.llm_provider,
        _calls.llm_model,
        _calls.attempts,
        _calls.error_code,
        _calls.error_message,
        paid.scalar_subquery().label("paid_nusd"),
    ).where(_calls.workflow_execution_id == run)


def _pages(connection: Connection, run: int, steps: Sequence[str]) -> Iterator[tuple[dict[int, str], Sequence[AnyRow]]]:
    """Pages of items as (keys by ordinal, calls in the order of items and work)."""
    place = {name: position for position, name in enumerate(steps)}
    first = 0
    while steps:
        keys = _keys(connection, run, first)
        if not keys:
            return
        query = _call_query(run).where(_calls.prompt_name.in_(steps), _calls.item_ordinal.between(min(keys), max(keys)))
        calls = connection.execute(query.order_by(_calls.id)).all()
        yield keys, sorted(calls, key=lambda call: (call.item_ordinal, place[call.prompt_name]))
        first = max(keys) + 1


def _keys(connection: Connection, run: int, first: int) -> dict[int, str]:
    query = select(items.c.ordinal, items.c.item_key).where(
        items.c.workflow_execution_id == run, items.c.ordinal >= first
    )
    return {row.ordinal: row.item_key for row in connection.execute(query.order_by(items.c.ordinal).limit(PAGE_ITEMS))}


def _result(item_key: str | None, step: str, calls: Sequence[AnyRow], combine: Combine) -> dict[str, Any]:
    values = [json.loads(call.result) for call in calls if call.status == "completed"]
    scores = [call.quality_score for call in calls if call.quality_score is not None]
    failed = next((call for call in calls if call.error_code is not None and call.status != "completed"), None)
    told = failed or next((call for call in calls if call.status == "completed"), calls[0])
    return {
        "item_key": item_key,
        "step": step,
        "status": _status_of_all([call.status for call in calls]),
        "answer": None if not values else values[0] if len(values) == 1 else combine(values),
        "quality_score": round(sum(scores) / len(scores), 6) if scores else None,
        "provider": told.llm_provider,
        "model": told.llm_model,
        "attempts": sum(call.attempts for call in calls),
        "cost_usd": usd(sum(int(call.paid_nusd) for call in calls)),
        "error": None if failed is None else {"code": failed.error_code, "message": failed.error_message},
    }


def _status_of_all(statuses: Iterable[str]) -> str:
    """The status of a step's repeats together: what is still open first, then the worst."""
    found = set(statuses)
    order = ("running", "pending", "failed", "cancelled", "completed", "skipped")
    return next(status for status in order if status in found)


def _reduce_results(
    connection: Connection, run: int, step: dict[str, Any], combine: Combine, top: int | None
) -> Iterator[dict[str, Any]]:
    if step["calls"]:
        query = _call_query(run).where(_calls.prompt_name == step["name"], _calls.item_ordinal == -1)
        calls = connection.execute(query.order_by(_calls.id)).all()
        if calls:
            yield _result(None, step["name"], calls, combine)
        return
    places = ranking(connection, run, step["name"], top or step["top"] or DEFAULT_TOP)
    if places:
        yield {
            "item_key": None,
            "step": step["name"],
            "status": "completed",
            "answer": {"ranking": places},
            "quality_score": None,
            "provider": None,
            "model": None,
            "attempts": 0,
            "cost_usd": usd(0),
            "error": None,
        }


def _attempts(connection: Connection, calls: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    query = (
        select(llm_usage)
        .where(_usage.prompt_execution_id.in_(calls))
        .order_by(_usage.prompt_execution_id, _usage.number)
    )
    found: dict[int, list[dict[str, Any]]] = {}
    for row in connection.execute(query.order_by(_usage.number)):
        found.setdefault(row.prompt_execution_id, []).append(
            {
                "number": row.number,
                "status": row.status,
                "provider": row.provider,
                "model": row.model,
                "model_answered": row.model_answered,
                "input_tokens": row.input_tokens,
                "output_tokens": row.output_tokens,
                "cached_tokens": row.cached_tokens,
                "estimated": row.estimated,
                "cost_usd": usd(row.cost_nusd),
                "price_source": row.price_source,
                "sent_at": iso_epoch(row.sent_at),
                "latency_ms": row.latency_ms,
                "http_status": row.http_status,
                "request_id": row.request_id,
                "worker": row.worker_id,
                "error": _error(row),
                "response": row.response,
            }
        )
    return found


def _explained(call: AnyRow, spec: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    routes = [
        {
            "provider": route["provider"],
            "model": route["model"],
            "reason": route["reason"],
            "taken": position == call.route_index,
        }
        for position, route in enumerate(spec.get("routes", {}).get(call.prompt_name, []))
    ]
    return {
        "step": call.prompt_name,
        "repeat": call.repeat,
        "status": call.status,
        "template": call.prompt_template,
        "prompt": call.rendered_prompt or None,
        "routes": routes,
        "provider": call.llm_provider,
        "model": call.llm_model,
        "attempts": attempts,
        "reasks": call.reasks,
        "cached": call.cached,
        "answer": None if call.result is None else json.loads(call.result),
        "quality_score": call.quality_score,
        "cost_usd": usd(call.cost_nusd),
        "completed_at": iso_epoch(call.completed_at),
        "error": _error(call),
    }


def _error(row: AnyRow) -> dict[str, str | None] | None:
    return None if row.error_code is None else {"code": row.error_code, "message": row.error_message}


def _places(connection: Connection, run: int, ordinal: int) -> list[dict[str, Any]]:
    sizes = (
        select(verdicts.c.step, func.count().label("ranked"))
        .where(verdicts.c.workflow_execution_id == run)
        .group_by(verdicts.c.step)
        .subquery()
    )
    query = (
        select(verdicts.c.step, verdicts.c.rank, verdicts.c.score, sizes.c.ranked)
        .join(sizes, sizes.c.step == verdicts.c.step)
        .where(verdicts.c.workflow_execution_id == run, verdicts.c.item_ordinal == ordinal)
        .order_by(verdicts.c.step)
    )
    return [
        {"step": row.step, "rank": row.rank, "score": row.score, "of": row.ranked} for row in connection.execute(query)
    ]
