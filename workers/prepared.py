"""A run as a worker needs it: parsed once from its pinned spec, then used for every shard.

Holds compiled templates, conditions and validators; renders the messages of a call and computes the key under which its
answer may be cached.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from orchestrator.database import Connection, ledger, work
from orchestrator.planning import needed_answers, segments
from orchestrator.results import ResultProcessor, aggregate_results, answer_schema
from orchestrator.runspec import Route, RunSpec
from orchestrator.workflow import Step
from prompts.conditions import Condition, compile_condition
from prompts.engine import PromptEngine, RenderedPrompt
from providers.messages import Message
from providers.tokens import estimate_messages, upper_bound


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
    """A run's spec with everything compiled. Immutable and shared by all shards of the run.

    Args:
        number: of the run.
        run_id: its public id.
        budget_ids: budgets that its attempts are held against.
    """

    def __init__(self, number: int, run_id: str, spec: RunSpec, budget_ids: tuple[int, ...]) -> None:
        self.number = number
        self.run_id = run_id
        self.spec = spec
        self.budget_ids = budget_ids
        self._engine = PromptEngine({name: text for name, text in spec.pack_files.items() if name.endswith(".j2")})
        self._kits = {step.name: self._kit(step) for step in spec.workflow.steps if step.asks()}

    def kit(self, step: str) -> StepKit:
        """A step that asks.

        Raises:
            KeyError: the workflow has no such step.
        """
        return self._kits[step]

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
        LookupError: it was deleted, or has no budget.
        ValueError: another release began it.
    """
    row = work.run_row(connection, number)
    scopes = (ledger.GLOBAL_SCOPE, ledger.run_scope(number))
    ids = tuple(sorted(ledger.find_budget(connection, scope).id for scope in scopes))
    return PreparedRun(number, row.run_id, RunSpec.from_json(row.spec), ids)


def _messages(rendered: RenderedPrompt) -> tuple[Message, ...]:
    user = Message("user", rendered.user)
    return (user,) if rendered.system is None else (Message("system", rendered.system), user)
