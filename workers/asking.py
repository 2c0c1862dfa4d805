"""What a call carries through its attempts, and the pure questions about it: what to send, at which price and key.

`workers.client` asks with these values, `workers.outcomes` concludes with them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.database import batches
from orchestrator.database.cache import CacheEntry
from orchestrator.database.runs import CallText
from orchestrator.database.work import PendingCall
from orchestrator.results import Answer
from orchestrator.runspec import Route
from providers.base import Provider
from providers.errors import ProviderError
from providers.messages import ChatReply, ChatRequest, Message, Usage
from providers.pricing import cost_nusd, worst_nusd
from providers.tokens import estimate_messages, upper_bound
from workers.cached import CachedAnswer
from workers.intake import Ticket
from workers.limiter import Pool, PoolLimits, Wider
from workers.prepared import PreparedRun, Prompt, StepKit, cache_key
from workers.retry import Outage
from workers.slots import Slots

MAX_REASK_CHARS = 4_000


@dataclass(frozen=True, slots=True)
class Gate:
    """The way to one provider from this process.

    Attributes:
        account: fingerprint of the key, or a fixed word: providers count limits by account.
        limits: of each model.
        shared: of all models of the account together.
        slots: calls of this process that may be at the provider at the same time.
        paused: nothing may be sent until somebody changes the limits again.
    """

    provider: Provider
    account: str
    limits: PoolLimits
    slots: Slots
    shared: PoolLimits = PoolLimits()
    paused: bool = False

    def pool(self, model: str) -> Pool:
        """The bucket that calls of a model draw from: its own, or that of the account when models have no limits."""
        scope = f"{self.provider.name}:{self.account}"
        return Pool(scope if self.limits.is_unlimited else f"{scope}:{model}", scope)

    def pool_limits(self) -> tuple[PoolLimits, Sequence[Wider]]:
        """The limits of that bucket, and the buckets that are charged beside it."""
        if self.limits.is_unlimited:
            return self.shared, ()
        scope = f"{self.provider.name}:{self.account}"
        return self.limits, () if self.shared.is_unlimited else ((Pool(scope, scope), self.shared),)


@dataclass(frozen=True, slots=True)
class Job:
    """One call with everything that asking it needs.

    Attributes:
        key: of its answer in the cache. Its route is the same until it is put back, and so is the key.
        ticket: of the message that brought it.
    """

    run: PreparedRun
    kit: StepKit
    call: PendingCall
    prompt: Prompt
    key: str
    ticket: Ticket

    def route(self, index: int) -> Route:
        """The route at a place of the fallback chain; the last one if the chain is shorter."""
        return self.kit.routes[min(index, len(self.kit.routes) - 1)]

    def has_route_after(self, index: int) -> bool:
        """Whether the fallback chain goes on behind a place."""
        return index + 1 < len(self.kit.routes)


@dataclass(frozen=True, slots=True)
class Asking:
    """How far a call is.

    Attributes:
        fence: under which this worker holds it; None while it is pending.
        wait_s: rest of the pause before the next attempt when that pause was cut short; None for none.
        correction: the bad reply and what was wrong with it, when the question is asked again.
    """

    route_index: int
    route_attempts: int
    reasks: int
    fence: int | None = None
    correction: tuple[Message, ...] = ()
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """An attempt that left, and what came of it; `outage` is what its failure is part of, None for nothing."""

    route: Route
    request: ChatRequest
    grant: batches.Claimed
    outcome: ChatReply | ProviderError
    latency_ms: int
    worst_nusd: int
    outage: Outage | None = None


def job_of(run: PreparedRun, kit: StepKit, call: PendingCall, prompt: Prompt, ticket: Ticket) -> Job:
    """A call that is to be asked, with the key of its answer."""
    route = kit.routes[min(call.route_index, len(kit.routes) - 1)]
    return Job(run, kit, call, prompt, cache_key(kit, route, prompt, call.repeat), ticket)


def request_of(job: Job, route: Route, asking: Asking) -> ChatRequest:
    """The request of the next attempt, at the full cap."""
    return ChatRequest(
        model=route.model,
        messages=(*job.prompt.messages, *asking.correction),
        max_output_tokens=route.max_output_tokens,
        timeout_s=float(job.kit.step.timeout_s),
        temperature=route.temperature,
        seed=route.seed,
        answer_schema=job.kit.schema,
    )


def booked_cost(route: Route, reply: ChatReply, usage: Usage) -> int:
    """What a reply cost, in nano-USD: as the provider says, unless the operator's own price wins."""
    if route.price is None:
        return reply.cost_nusd or 0
    if reply.cost_nusd is not None and route.price.source != "override":
        return reply.cost_nusd
    return cost_nusd(route.price, usage)


def worst_price(job: Job, asking: Asking, route: Route, request: ChatRequest) -> int:
    """The most that a request can cost, in nano-USD; 0 where nobody knows a price."""
    if route.price is None:
        return 0
    return worst_nusd(route.price, input_upper(job, asking, request), request.max_output_tokens)


def input_upper(job: Job, asking: Asking, request: ChatRequest) -> int:
    """Upper bound of the input tokens of a request."""
    return upper_bound(request.messages, request.answer_schema) if asking.correction else job.prompt.input_upper


def input_tokens(job: Job, asking: Asking) -> int:
    """Our estimate of the input tokens, the correction included."""
    return job.prompt.input_tokens + (estimate_messages(asking.correction) if asking.correction else 0)


def text_of(job: Job) -> CallText:
    """What is kept of the question."""
    return CallText(job.prompt.text, job.key)


def shares_answers(job: Job) -> bool:
    """Whether a call takes answers from the cache and leaves its own there."""
    return job.kit.step.cache and job.run.spec.cache_ttl_s > 0


def cache_entry(job: Job, sent: Sent, answer: Answer, cost: int, reply: ChatReply) -> CacheEntry | None:
    """The answer as equal calls may use it; None where they may not."""
    if not shares_answers(job):
        return None
    kept = CachedAnswer(answer.to_json(), answer.quality, sent.route.provider, reply.model, cost)
    return CacheEntry(job.key, job.prompt.messages_hash, kept.to_json(), float(job.run.spec.cache_ttl_s))


def correction_of(text: str, problem: str) -> tuple[Message, ...]:
    """The turns that ask again and say what was wrong."""
    return (
        Message("assistant", text[:MAX_REASK_CHARS] or "(empty)"),
        Message(
            "user", f"That reply was not a valid answer: {problem}\nAnswer the question again, in the form asked for."
        ),
    )


def claim_of(
    job: Job, asking: Asking, route: Route, worst: int, budget_ids: tuple[int, ...], worker: str
) -> batches.Claim:
    """The wish to send one attempt, with a random token that tells its repetition from a second one."""
    return batches.Claim(
        call=job.call.id,
        run=job.run.number,
        step=job.kit.step.name,
        provider=route.provider,
        model=route.model,
        worker=worker,
        token=random.getrandbits(62),
        worst_nusd=worst,
        budget_ids=budget_ids,
        price_source="none" if route.price is None else route.price.source,
        held_fence=asking.fence,
        key=job.key if shares_answers(job) else None,
    )
