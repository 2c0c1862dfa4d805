"""A run as a worker needs it: parsed once from its pinned spec, then used for every shard.

Holds compiled templates, conditions and validators; renders the messages of a call and computes the key under which its
answer may be cached.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from time import monotonic
from typing import Any

import structlog

from orchestrator.database import Connection, Database, DatabaseUnavailable, budgets, clock, work
from orchestrator.planning import needed_answers, segments
from orchestrator.results import ResultProcessor, aggregate_results, answer_schema
from orchestrator.runspec import Route, RunSpec
from orchestrator.workflow import Step
from prompts.conditions import Condition, compile_condition
from prompts.engine import PromptEngine, RenderedPrompt
from providers.messages import Message
from providers.tokens import estimate_messages, upper_bound

log = structlog.get_logger(__name__)

DATABASE_AWAY_S = 0.5


@dataclass(frozen=True, slots=True)
class StepKit:
    """One step, ready to ask.

    Attributes:
        item_steps: earlier item steps whose answers it may see, in order of work.
        reduce_steps: earlier reduce steps that ask.
        rankings: earlier ranking steps.
        schema: JSON Schema of the answer; None for text.
        schema_tokens: our estimate of what the schema adds to a request.
        schema_upper: an upper bound of the same.
        shape: hash of everything in the step that shapes an answer, apart from route and messages.
    """

    step: Step
    template: str
    routes: tuple[Route, ...]
    item_steps: tuple[str, ...]
    reduce_steps: tuple[str, ...]
    rankings: tuple[str, ...]
    condition: Condition | None
    schema: Mapping[str, Any] | None
    schema_tokens: int
    schema_upper: int
    shape: str
    processor: ResultProcessor


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, whichever route asks it.

    Attributes:
        text: as it is kept for people: system text, a rule, user text.
        input_tokens: our estimate.
        input_upper: an upper bound, for reservations.
    """

    messages: tuple[Message, ...]
    text: str
    messages_hash: str
    input_tokens: int
    input_upper: int


class PreparedRun:
    """A run's spec with everything compiled, shared by all shards of the run.

    Nothing of it changes but `priority` and `has_answers`, which the event loop of the process sets.

    Args:
        number: of the run.
        run_id: its public id.
        priority: each step doubles its share of a provider's limits beside other runs.
        has_answers: whether any of its calls was ever answered.
    """

    def __init__(
        self, number: int, run_id: str, spec: RunSpec, priority: int = 0, *, has_answers: bool = False
    ) -> None:
        self.number = number
        self.run_id = run_id
        self.spec = spec
        self.priority = priority
        self.has_answers = has_answers
        self._engine = PromptEngine({name: text for name, text in spec.pack_files.items() if name.endswith(".j2")})
        self._kits = {step.name: self._kit(step) for step in spec.workflow.steps if step.asks()}

    def kit(self, step: str) -> StepKit:
        """A step that asks.

        Raises:
            KeyError: the workflow has no such step.
        """
        return self._kits[step]

    def resends_unknown(self, step: Step) -> bool:
        """Whether a call of a step may be sent again while the outcome of its last attempt is unknown."""
        return self.spec.retry_unknown if step.retry.unknown is None else step.retry.unknown

    def segment_of(self, step: str) -> int:
        """Number of the segment that a reduce step belongs to."""
        return next(segment.number for segment in segments(self.spec.workflow) if step in segment.reduces)

    def aggregate(self, values: Sequence[Any]) -> Any:
        """One answer from the answers of all repeats."""
        return values[0] if len(values) == 1 else aggregate_results(values)

    def render(self, kit: StepKit, values: Mapping[str, Any]) -> Prompt:
        """Renders a step's prompt.

        Raises:
            prompts.errors.PromptError: a value is missing, or the prompt is empty or too large.
        """
        rendered = self._engine.render_prompt(kit.template, values)
        messages = _messages(rendered)
        text = rendered.user if rendered.system is None else f"{rendered.system}\n\n---\n\n{rendered.user}"
        return Prompt(
            messages=messages,
            text=text,
            messages_hash=sha256(json.dumps([(one.role, one.content) for one in messages]).encode()).hexdigest(),
            input_tokens=estimate_messages(messages) + kit.schema_tokens,
            input_upper=upper_bound(messages) + kit.schema_upper,
        )

    def _kit(self, step: Step) -> StepKit:
        workflow = self.spec.workflow
        earlier = [workflow.step(name) for name in needed_answers(workflow, step)]
        schema = answer_schema(step.answer, self.spec.pack_files)
        return StepKit(
            step=step,
            template=step.prompt or "",
            routes=self.spec.routes[step.name],
            item_steps=tuple(one.name for one in earlier if one.kind == "item"),
            reduce_steps=tuple(one.name for one in earlier if one.kind == "reduce" and one.asks()),
            rankings=tuple(one.name for one in earlier if one.kind == "reduce" and not one.asks()),
            condition=None if step.when is None else compile_condition(step.when),
            schema=schema,
            # Known once per step: at thousands of calls a second, writing the schema again and again shows.
            schema_tokens=estimate_messages((), schema) - estimate_messages(()),
            schema_upper=upper_bound((), schema) - upper_bound(()),
            shape=sha256(json.dumps((schema, step.answer.format), sort_keys=True).encode()).hexdigest(),
            processor=ResultProcessor(step.answer, schema),
        )


def cache_key(kit: StepKit, route: Route, prompt: Prompt, repeat: int) -> str:
    """Hash of everything that shapes an answer: route, parameters, messages, schema, and which repeat it is."""
    parameters = (route.provider, route.model, route.max_output_tokens, route.temperature, route.seed)
    shaping = repr((parameters, kit.shape, prompt.messages_hash, repeat))
    return sha256(shaping.encode()).hexdigest()


def find_run(connection: Connection, number: int) -> PreparedRun:
    """Reads and compiles a run.

    Raises:
        LookupError: it was deleted.
        ValueError: another release began it.
    """
    row = work.run_row(connection, number)
    has_answers = work.has_answers(connection, number)
    return PreparedRun(number, row.run_id, RunSpec.from_json(row.spec), row.priority, has_answers=has_answers)


class BudgetIds:
    """The budgets that attempts are held against: looked up once per run, provider and day, and made where missing.

    The day is that of the database's clock, read with every look-up and counted on from there, so that workers whose
    clocks differ agree on it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[int, str], tuple[int, ...]] = {}
        self._ahead_s = 0.0
        self._day = -1
        self._looking = asyncio.Lock()

    async def find(self, run: PreparedRun, provider: str) -> tuple[int, ...]:
        """Ids of the budgets of an attempt that is sent now, ascending; waits while the database is away."""
        while (found := self.known(run, provider)) is None:
            # One look-up for all calls of a shard, which come here at the same time.
            async with self._looking:
                if self.known(run, provider) is None:
                    await self._look_up_soon(run, provider)
        return found

    def known(self, run: PreparedRun, provider: str) -> tuple[int, ...] | None:
        """The same without waiting; None when they must be looked up."""
        is_today = self._day == _day_of(monotonic() + self._ahead_s)
        return self._known.get((run.number, provider)) if is_today else None

    async def _look_up_soon(self, run: PreparedRun, provider: str) -> None:
        try:
            await asyncio.to_thread(self._look_up, run, provider)
        except DatabaseUnavailable as error:
            log.warning("database.unavailable", error=str(error.orig), again_in_s=DATABASE_AWAY_S)
            await asyncio.sleep(DATABASE_AWAY_S)

    def _look_up(self, run: PreparedRun, provider: str) -> None:
        with self._database.transaction() as connection:
            now_s = clock(connection)
            scopes = budgets.scopes_of(run.number, run.spec.workflow.name, provider, now_s)
            ids = tuple(sorted(budgets.ensure_budgets(connection, scopes).values()))
        if self._day != _day_of(now_s):
            self._known = {}
        self._ahead_s, self._day = now_s - monotonic(), _day_of(now_s)
        self._known[run.number, provider] = ids


def _day_of(epoch_s: float) -> int:
    return int(epoch_s // 86_400)


def _messages(rendered: RenderedPrompt) -> tuple[Message, ...]:
    user = Message("user", rendered.user)
    return (user,) if rendered.system is None else (Message("system", rendered.system), user)
