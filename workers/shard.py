"""The heart: one shard of calls, from claim to settlement. Read it first.

A shard arrives as numbers. `ask_shard` reads what it needs with a handful of queries, sorts the calls into those that
need no asking (their condition says no, an answer they need is missing, or the cache knows) and those that do, and
carries all of the latter at once. Every outcome goes through the batch writer. A shard never raises for the fault of
a call; it ends when each of its calls has ended, was put back, or turned out to be somebody else's.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from orchestrator import context
from orchestrator.broker import ShardMessage
from orchestrator.database import Connection, Database, batches, cache, work
from orchestrator.database.runs import UNKNOWN_OUTCOME, CallEnd
from orchestrator.database.work import PendingCall, StepAnswers
from prompts.errors import PromptError
from workers.asking import Job, job_of, text_of
from workers.cached import CachedAnswer
from workers.client import LLMClient
from workers.intake import Ticket
from workers.prepared import PreparedRun, Prompt, StepKit
from workers.writer import BatchWriter

log = structlog.get_logger(__name__)

REDUCE = -1
"""Ordinal of the calls of a reduce step."""


class ShardHost(Protocol):
    """What a shard needs from the process it runs in."""

    @property
    def database(self) -> Database:
        """Where calls are read from."""
        ...

    @property
    def writer(self) -> BatchWriter:
        """Where outcomes go."""
        ...

    @property
    def client(self) -> LLMClient:
        """Who asks."""
        ...

    async def prepared(self, run: int) -> PreparedRun:
        """The compiled run."""
        ...

    def may_go_on(self, run: int) -> bool:
        """Whether calls of a run may be sent by this process."""
        ...


@dataclass(frozen=True, slots=True)
class _Material:
    """What the database holds for a shard."""

    calls: Sequence[PendingCall]
    items: Mapping[int, work.Item]
    answers: Mapping[int, Mapping[str, StepAnswers]]
    verdicts: Mapping[int, Mapping[str, Any]]
    reduced: Mapping[str, Any]
    entries: Sequence[Mapping[str, Any]]
    totals: Mapping[str, int]


async def ask_shard(host: ShardHost, message: ShardMessage, ticket: Ticket) -> None:
    """Asks the open calls of a shard. Safe to run twice, at the same time or later: claims decide who asks.

    Args:
        host: the process.
        message: which calls.
        ticket: of the message; told which calls wait to be sent. Whoever took the message ends it.

    Raises:
        LookupError: the run was deleted.
        ValueError: another release began the run.
    """
    if not host.may_go_on(message.run) or not host.client.accepts(message.provider):
        return
    run = await host.prepared(message.run)
    kit = run.kit(message.step)
    material = await asyncio.to_thread(_read, host.database, run, kit, message)
    closings, to_ask = _sort_out(run, kit, material, ticket)
    if kit.step.cache and run.spec.cache_ttl_s > 0 and to_ask:
        cached, to_ask = await asyncio.to_thread(_look_up, host.database, to_ask)
        closings = [*closings, *cached]
    ticket.read(job.call.id for job in to_ask)
    writes = [host.writer.close(closing) for closing in closings]
    asks = [host.client.send_prompt(job) for job in to_ask]
    # All of them end before the shard does, so that nothing goes on which nobody knows of.
    outcomes = await asyncio.gather(*writes, *asks, return_exceptions=True)
    errors = [one for one in outcomes if isinstance(one, BaseException)]
    if errors:
        raise errors[0]


def _read(database: Database, run: PreparedRun, kit: StepKit, message: ShardMessage) -> _Material:
    first, last = message.first, message.last
    with database.snapshot() as connection:
        calls = work.pending_calls(connection, message.window, message.step, message.provider, first, last)
        reduced = _reduce_answers(connection, run, kit) if calls else {}
        if not calls or first == REDUCE:
            entries = _entries(connection, run, kit) if calls else []
            totals = _totals(connection, run, kit) if calls else {}
            return _Material(calls, {}, {}, {}, reduced, entries, totals)
        return _Material(
            calls=calls,
            items=work.load_items(connection, run.number, first, last),
            answers=work.load_answers(connection, run.number, kit.item_steps, first, last),
            verdicts=work.load_verdicts(connection, run.number, kit.rankings, first, last),
            reduced=reduced,
            entries=[],
            totals={},
        )


def _reduce_answers(connection: Connection, run: PreparedRun, kit: StepKit) -> dict[str, Any]:
    found = work.load_answers(connection, run.number, kit.reduce_steps, REDUCE, REDUCE).get(REDUCE, {})
    return {step: answers.values[0] for step, answers in found.items() if answers.values}


def _entries(connection: Connection, run: PreparedRun, kit: StepKit) -> list[dict[str, Any]]:
    """The entries that a reduce step sees: the best of its ranking, with their items and answers."""
    reduce = kit.step.reduce
    if reduce is None or reduce.ranking is None:
        return []
    entries: list[dict[str, Any]] = []
    for ordinal, rank, score in work.best(connection, run.number, reduce.ranking, reduce.top):
        item = work.load_items(connection, run.number, ordinal, ordinal)[ordinal]
        said = work.load_answers(connection, run.number, kit.item_steps, ordinal, ordinal).get(ordinal, {})
        answers = {step: _value(run, answers) for step, answers in said.items() if answers.values}
        entries.append({"rank": rank, "score": score, "key": item.key, "item": item.content, "answers": answers})
    return entries


def _totals(connection: Connection, run: PreparedRun, kit: StepKit) -> dict[str, int]:
    ranking = None if kit.step.reduce is None else kit.step.reduce.ranking
    return work.reduce_totals(connection, run.number, run.segment_of(kit.step.name), ranking)


def _value(run: PreparedRun, answers: StepAnswers) -> Any:
    return run.aggregate(answers.values)


def _sort_out(
    run: PreparedRun, kit: StepKit, material: _Material, ticket: Ticket
) -> tuple[list[batches.Closing], list[Job]]:
    """Decides for every call: end it without asking, ask it, or leave it for another round."""
    closings: list[batches.Closing] = []
    to_ask: list[Job] = []
    for call in material.calls:
        decided = _decide(run, kit, material, call)
        if isinstance(decided, CallEnd):
            closings.append(batches.Closing(call.id, decided))
        elif decided is not None:
            to_ask.append(job_of(run, kit, call, decided, ticket))
    return closings, to_ask


def _decide(run: PreparedRun, kit: StepKit, material: _Material, call: PendingCall) -> CallEnd | Prompt | None:
    if call.error_code == UNKNOWN_OUTCOME and not run.resends_unknown(kit.step):
        told = "nobody knows what became of the last attempt, which may have been paid for"
        return CallEnd("failed", error_code=UNKNOWN_OUTCOME, error_message=told)
    if call.ordinal == REDUCE:
        return _render(run, kit, _reduce_values(run, kit, material))
    said = material.answers.get(call.ordinal, {})
    if any(said[step].open for step in kit.step.needs if step in said):
        return None
    missing = [step for step in kit.step.needs if step in kit.item_steps and not (step in said and said[step].values)]
    unranked = [step for step in kit.rankings if step not in material.verdicts.get(call.ordinal, {})]
    if missing or (unranked and set(unranked) & set(kit.step.needs)):
        return CallEnd("skipped", error_code="no_answer", error_message=f"no answer of {(missing or unranked)[0]!r}")
    unanswered = [step for step in kit.reduce_steps if step in kit.step.needs and step not in material.reduced]
    if unanswered:
        return CallEnd("skipped", error_code="no_answer", error_message=f"no answer of {unanswered[0]!r}")
    values = _item_values(run, kit, material, call)
    try:
        if kit.condition is not None and not kit.condition.evaluate(values):
            return CallEnd("skipped", error_code="condition", error_message=f"not asked: {kit.step.when}")
    except PromptError as error:
        return CallEnd("failed", error_code="condition", error_message=str(error))
    return _render(run, kit, values)


def _item_values(run: PreparedRun, kit: StepKit, material: _Material, call: PendingCall) -> context.Values:
    said = material.answers.get(call.ordinal, {})
    answers = {step: _value(run, said[step]) for step in kit.item_steps if step in said and said[step].values}
    answers |= material.reduced
    answers |= material.verdicts.get(call.ordinal, {})
    item = material.items[call.ordinal].content
    return context.item_context(run.spec.workflow, kit.step.name, run.spec.variables, item, answers)


def _reduce_values(run: PreparedRun, kit: StepKit, material: _Material) -> context.Values:
    return context.reduce_context(
        run.spec.workflow, kit.step.name, run.spec.variables, material.entries, material.totals, material.reduced
    )


def _render(run: PreparedRun, kit: StepKit, values: context.Values) -> CallEnd | Prompt:
    try:
        return run.render(kit, values)
    except PromptError as error:
        return CallEnd("failed", error_code="prompt", error_message=str(error))


def _look_up(database: Database, jobs: Sequence[Job]) -> tuple[list[batches.Closing], list[Job]]:
    """Answers from the cache what it knows; returns those calls ended, and those that must be asked."""
    with database.snapshot() as connection:
        known = cache.find(connection, [job.key for job in jobs])
    closings = [
        batches.Closing(job.call.id, CachedAnswer.from_json(known[job.key]).end(), text_of(job))
        for job in jobs
        if job.key in known
    ]
    return closings, [job for job in jobs if job.key not in known]
