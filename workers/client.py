"""LLMClient: carries one call through its attempts until it has an answer, has failed, or is put back.

One attempt is: a slot of this process, a permit of the distributed bucket with its exact send time, a claim that
reserves the worst price and notes the attempt as sent, the sending itself, and the settlement. The claim comes after
the permit on purpose: money is held, and an attempt is on record, only for calls that leave within moments, so
waiting for a slow limit costs neither budget nor ledger rows. What follows an error is decided in `workers.retry` and
nowhere else.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import structlog

from orchestrator.database import batches, ledger
from orchestrator.database.cache import CacheEntry
from orchestrator.database.runs import UNKNOWN_OUTCOME, CallEnd, CallText
from orchestrator.database.work import PendingCall
from orchestrator.errors import AnswerError
from orchestrator.results import Answer
from orchestrator.runspec import Route
from providers.base import Provider
from providers.errors import ProviderError
from providers.messages import ChatReply, ChatRequest, Message, Usage
from providers.pricing import affordable_cap, cost_nusd, worst_nusd
from providers.tokens import estimate_messages, estimate_tokens, upper_bound
from workers import charges, retry
from workers.cached import CachedAnswer
from workers.flights import Flights
from workers.limiter import Limiter
from workers.limits import LimiterUnavailable, Permit, Pool, PoolLimits, Refused, Wider
from workers.prepared import BudgetIds, PreparedRun, Prompt, StepKit, cache_key
from workers.waits import Waits
from workers.writer import BatchWriter

log = structlog.get_logger(__name__)

LONG_WAIT_S = 60.0
"""Longer waits are not sat out in a shard: the call is put back with the time from which it may be asked."""
PERMIT_PATIENCE_S = 20.0
"""How long one question for a permit may wait before we look up whether the run still runs."""
CLAIM_AHEAD_S = 0.08
"""A claim is committed this long before the send time: a commit takes about 20 ms, more when the machine is busy."""
LIMITER_AWAY_S = 1.0
BUDGET_WAIT_S, BUDGET_WAIT_MOST_S = 0.1, 10.0
BUDGET_WAITERS = 5
"""Calls of this process that may wait for money before each of them asks less often."""
FLIGHT_WAIT_S = (0.2, 2.0)
"""First and longest pause between two looks at an equal call that another worker is asking."""
INPUT_MARGIN = 1.1
MAX_KEPT_RESPONSE = 20_000
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
    slots: asyncio.Semaphore
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
    """One call with everything that asking it needs."""

    run: PreparedRun
    kit: StepKit
    call: PendingCall
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class _Asking:
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
class _Sent:
    """An attempt that left, and what came of it."""

    route: Route
    request: ChatRequest
    grant: batches.Claimed
    outcome: ChatReply | ProviderError
    latency_ms: int
    worst_nusd: int


class LLMClient:
    """Sends prompts for one worker process; every method runs on its loop.

    Args:
        worker: id of the worker.
        gates: by provider name.
        may_go_on: whether calls of a run may still be sent by this process.
        stop_run: pauses a run for a reason, with a detail; every other call of it would end the same way.
        has_lease: returns once this worker surely counts as alive; before that it may not claim.
        lease_s: how long a slot at a provider stays taken after this process died.
        budgets: finds the budgets of an attempt.
        note_wait: told what a call is waiting for, for `bound_by`; None when it is waiting no more.
    """

    def __init__(
        self,
        worker: str,
        writer: BatchWriter,
        limiter: Limiter,
        gates: Mapping[str, Gate],
        may_go_on: Callable[[int], bool],
        stop_run: Callable[[int, str, str | None], None],
        note_wait: Callable[[str], None],
        has_lease: Callable[[], Awaitable[None]],
        lease_s: float,
        budgets: BudgetIds,
    ) -> None:
        self._worker = worker
        self._writer = writer
        self._limiter = limiter
        self._gates = gates
        self._may_go_on = may_go_on
        self._stop_run = stop_run
        self._note_wait = note_wait
        self._has_lease = has_lease
        self._lease_s = lease_s
        self._budgets = budgets
        self._short_of_money = 0
        self._waits = Waits()
        self._waits_to_send = Waits()
        self._flights = Flights()
        self.at_work: Counter[int] = Counter()
        self.in_flight = 0
        self.waiting_for_permits = 0

    async def send_prompt(self, job: Job) -> None:
        """Asks one pending call until it ends, or is put back for another worker, time or route.

        Safe to run twice for the same call: the second one finds it claimed and steps aside.
        """
        # A call may be here twice, when its message came twice.
        self.at_work[job.call.id] += 1
        try:
            await self._fly(job)
        finally:
            self.at_work[job.call.id] -= 1
            if not self.at_work[job.call.id]:
                del self.at_work[job.call.id]

    async def _fly(self, job: Job) -> None:
        """Asks, or waits for the answer of an equal call of this process."""
        key = _key(job) if _shares(job) else None
        while key is not None and self._flights.is_open(key):
            result = await self._waits.until(job.run.number, self._flights.landed(key))
            if result is not None:
                await self._take_answer(job, key, result)
                return
            if not self._may_go_on(job.run.number):
                return
        if key is None:
            await self._send_until_ended(job)
            return
        with self._flights.leading(key):
            await self._send_until_ended(job)

    async def _take_answer(self, job: Job, key: str, result: str) -> None:
        kept = CachedAnswer.from_json(result)
        await self._writer.close(batches.Closing(job.call.id, kept.end(), CallText(job.prompt.text, key)))

    async def _await_flight(self, job: Job, key: str) -> bool:
        """Waits while another worker asks an equal call; True when this one took its answer."""
        pause_s, longest_s = FLIGHT_WAIT_S
        while self._may_go_on(job.run.number):
            await self._waits.until(job.run.number, asyncio.sleep(pause_s * random.uniform(0.8, 1.2)))
            match await self._writer.look(key):
                case batches.AnsweredMeanwhile(result):
                    self._flights.land(key, result)
                    await self._take_answer(job, key, result)
                    return True
                case batches.InFlight():
                    pause_s = min(longest_s, pause_s * 1.5)
                case _:
                    return False
        return False

    async def _send_until_ended(self, job: Job) -> None:
        asking: _Asking | None = _Asking(job.call.route_index, job.call.route_attempts, job.call.reasks)
        while asking is not None and self._may_go_on(job.run.number):
            asking = await self._attempt(job, asking)
        if asking is not None:
            # The run stopped between two attempts. Nobody frees what a live worker holds, so it must go back.
            await self._release(job, asking, CallEnd("pending", next_at_s=asking.wait_s))

    def end_waits(self, run: int | None = None) -> None:
        """Ends what calls of a run, or of all runs, wait for: they look whether to go on."""
        self._waits.end(run)
        self._waits_to_send.end(run)

    def ask_anew(self, run: int | None = None) -> None:
        """Lets calls of a run, or all, that wait for a permit ask again: limits or priorities are others now."""
        self._waits_to_send.end(run)

    def accepts(self, provider: str) -> bool:
        """Whether anything may be sent to a provider now."""
        return not self._gates[provider].paused

    def select_provider(self, job: Job, index: int) -> Route:
        """The route at a place of the fallback chain; the last one if the chain is shorter."""
        return job.kit.routes[min(index, len(job.kit.routes) - 1)]

    async def handle_rate_limits(
        self, job: Job, gate: Gate, route: Route, costs: Mapping[str, int]
    ) -> Permit | Refused | None:
        """Waits for leave to send.

        Returns:
            A permit; a refusal when the wait is long or the request can never fit; None when the run stopped meanwhile.
        """
        limits, wider = gate.pool_limits()
        permit_id = f"{self._worker}:{job.call.id}:{random.getrandbits(32):x}"
        while self._may_go_on(job.run.number):
            try:
                answer = await self._limiter.permit(
                    gate.pool(route.model),
                    limits,
                    costs,
                    permit_id=permit_id,
                    lease_s=self._lease_s,
                    max_wait_s=PERMIT_PATIENCE_S,
                    run=str(job.run.number),
                    weight=charges.weight(job.run.priority),
                    wider=wider,
                )
            except LimiterUnavailable:
                # Fail closed: without the bucket nobody knows how much the other workers send.
                self._note_wait("broker")
                await asyncio.sleep(LIMITER_AWAY_S)
                continue
            if isinstance(answer, Permit):
                if answer.bound_by is not None:
                    self._note_wait("rate_limit")
                return answer
            self._note_wait("provider" if answer.reason == "concurrency" else "rate_limit")
            if not answer.possible or answer.wait_s > LONG_WAIT_S:
                return answer
            await asyncio.sleep(min(answer.wait_s, PERMIT_PATIENCE_S) / 2)
        return None

    def track_usage(self, route: Route, request: ChatRequest, reply: ChatReply) -> tuple[Usage, int]:
        """Tokens and cost (nano-USD) of a reply; tokens are estimated when the provider told none."""
        usage = reply.usage
        if usage is None:
            told = estimate_messages(request.messages, request.answer_schema)
            usage = Usage(told, estimate_tokens(reply.text), estimated=True)
        return usage, booked_cost(route, reply, usage)

    def validate_response(self, kit: StepKit, reply: ChatReply) -> Answer:
        """The answer in a reply.

        Raises:
            AnswerError: there is none.
        """
        return kit.processor.parse_response(reply)

    async def _attempt(self, job: Job, asking: _Asking) -> _Asking | None:
        route = self.select_provider(job, asking.route_index)
        gate = self._gates[route.provider]
        if gate.paused:
            # For another round: nobody waits in a shard for somebody who may come tomorrow.
            await self._release(job, asking, CallEnd("pending", next_at_s=asking.wait_s))
            return None
        request = _request(job, route, asking)
        async with gate.slots:
            sent = await self._send(job, asking, gate, route, request)
        match sent:
            case _Sent():
                return await self._conclude(job, asking, sent)
            case batches.AnsweredMeanwhile(result):
                self._flights.land(_key(job), result)
                await self._take_answer(job, _key(job), result)
                return None
            case batches.InFlight():
                return None if await self._await_flight(job, _key(job)) else asking
            case _:
                return sent

    async def _send(
        self, job: Job, asking: _Asking, gate: Gate, route: Route, request: ChatRequest
    ) -> "_Sent | _Asking | batches.AnsweredMeanwhile | batches.InFlight | None":
        run = job.run.number
        budget_ids = await self._waits.until(run, self._budgets.find(job.run, route.provider))
        if budget_ids is None:
            return asking
        costs = charges.expected(round(_input_tokens(job, asking) * INPUT_MARGIN), request.max_output_tokens)
        self.waiting_for_permits += 1
        try:
            permit = await self._waits_to_send.until(run, self.handle_rate_limits(job, gate, route, costs))
        finally:
            self.waiting_for_permits -= 1
        if permit is None:
            return asking
        if isinstance(permit, Refused):
            await self._put_off(job, asking, permit)
            return None
        await self._waits_to_send.until(run, _sleep_until(permit.send_at - CLAIM_AHEAD_S))
        await self._waits.until(run, self._has_lease())
        if not self._may_go_on(run) or self._gates[route.provider] is not gate:
            self._limiter.release_unsent(permit)
            return asking
        request, worst, grant = await self._reserve(job, asking, route, request, budget_ids)
        if not isinstance(grant, batches.Claimed):
            self._limiter.release_unsent(permit)
            if isinstance(grant, batches.AnsweredMeanwhile | batches.InFlight):
                return grant
            return await self._not_claimed(job, asking, grant)
        while not await self._is_due(permit):
            # The provider asked for a pause after the permit was given. The attempt is on record and may wait.
            self._limiter.release_unsent(permit)
            again = await self._waits.until(run, self.handle_rate_limits(job, gate, route, costs))
            if not isinstance(again, Permit):
                await self._settle_unsent(job, grant, again)
                return None
            permit = again
        request = replace(request, attempt_id=f"{job.run.run_id}/{job.call.id}/{grant.number}")
        sent = await self._exchange(gate, route, request, grant, worst)
        self._give_back(permit, sent.outcome)
        await self._heed(gate, route, sent.outcome)
        return sent

    async def _is_due(self, permit: Permit) -> bool:
        """Waits for the send time; False when the permit is void, or nobody can tell."""
        try:
            return await self._limiter.wait_until_due(permit)
        except LimiterUnavailable:
            self._note_wait("broker")
            return False

    async def _exchange(
        self, gate: Gate, route: Route, request: ChatRequest, grant: batches.Claimed, worst: int
    ) -> _Sent:
        started = monotonic()
        self.in_flight += 1
        outcome: ChatReply | ProviderError
        try:
            outcome = await gate.provider.send(request)
        except ProviderError as error:
            outcome = error
        finally:
            self.in_flight -= 1
        return _Sent(route, request, grant, outcome, round((monotonic() - started) * 1000), worst)

    def _give_back(self, permit: Permit, outcome: ChatReply | ProviderError) -> None:
        if isinstance(outcome, ProviderError) and not outcome.sent:
            self._limiter.release_unsent(permit)
            return
        if outcome.rate_limit is not None:
            self._limiter.adopt(permit, charges.sightings(outcome.rate_limit))
        self._limiter.settle(permit, None if outcome.usage is None else charges.real(outcome.usage))

    async def _heed(self, gate: Gate, route: Route, outcome: ChatReply | ProviderError) -> None:
        """Moves the whole pool when the provider asked for a pause."""
        if not isinstance(outcome, ProviderError):
            return
        failure = retry.classify(outcome)
        if failure.trouble != "rate_limited":
            return
        try:
            await self._limiter.penalise(gate.pool(route.model), failure.retry_after_s or retry.backoff_s(1, 1.0))
        except LimiterUnavailable:
            log.warning("limiter.unavailable", provider=route.provider)

    async def _reserve(
        self, job: Job, asking: _Asking, route: Route, request: ChatRequest, budget_ids: tuple[int, ...]
    ) -> tuple[ChatRequest, int, batches.ClaimAnswer]:
        """Claims at the full cap, or at a smaller one when no budget will pay for the full one any more.

        Returns:
            The request as it may be sent, its worst price, and the answer to the claim.
        """
        worst = _worst(job, asking, route, request)
        grant = await self._writer.claim(self._claim(job, asking, route, worst, budget_ids))
        if not isinstance(grant, batches.OverBudget) or not grant.for_good or route.price is None:
            return request, worst, grant
        upper, most = _input_upper(job, asking, request), request.max_output_tokens
        least = min(job.run.spec.min_output_tokens, most)
        in_time = affordable_cap(route.price, upper, grant.spare_nusd, most)
        if in_time < least:
            return request, worst, grant
        now = affordable_cap(route.price, upper, grant.free_nusd, most)
        if now < max(least, in_time // 2):
            # What is in flight will give money back, and a much shorter answer would be a waste.
            return request, worst, replace(grant, for_good=False)
        request = replace(request, max_output_tokens=now)
        worst = _worst(job, asking, route, request)
        grant = await self._writer.claim(self._claim(job, asking, route, worst, budget_ids))
        if isinstance(grant, batches.OverBudget):
            # Somebody was faster; whether that is for good is for the next try to find out.
            grant = replace(grant, for_good=False)
        return request, worst, grant

    def _claim(self, job: Job, asking: _Asking, route: Route, worst: int, budget_ids: tuple[int, ...]) -> batches.Claim:
        return batches.Claim(
            call=job.call.id,
            run=job.run.number,
            step=job.kit.step.name,
            provider=route.provider,
            model=route.model,
            worker=self._worker,
            token=random.getrandbits(62),
            worst_nusd=worst,
            budget_ids=budget_ids,
            price_source="none" if route.price is None else route.price.source,
            held_fence=asking.fence,
            key=_key(job) if _shares(job) else None,
        )

    async def _not_claimed(
        self, job: Job, asking: _Asking, answer: batches.NotMine | batches.OverBudget
    ) -> _Asking | None:
        if isinstance(answer, batches.NotMine):
            return None
        self._note_wait("budget")
        if answer.for_good:
            await self._run_out(job, asking, answer.scope)
            return None
        # What is in flight will settle for less than its worst price, and then this call may fit. The more calls wait,
        # the longer each of them does: few of them fit at a time.
        self._short_of_money += 1
        try:
            wait_s = min(BUDGET_WAIT_MOST_S, BUDGET_WAIT_S * max(1.0, self._short_of_money / BUDGET_WAITERS))
            await self._waits.until(job.run.number, asyncio.sleep(wait_s))
        finally:
            self._short_of_money -= 1
        return asking

    async def _run_out(self, job: Job, asking: _Asking, scope: str) -> None:
        """Goes on at another provider when only this one's budget is used up; stops the run otherwise."""
        here, index = self.select_provider(job, asking.route_index).provider, asking.route_index + 1
        following = job.kit.routes[index] if index < len(job.kit.routes) else None
        if following is not None and following.provider != here and scope == ledger.provider_scope(here):
            place = (index, following.provider, following.model)
            await self._release(job, asking, CallEnd("pending", error_code="budget", route=place), always=True)
            return
        await self._release(job, asking, CallEnd("pending", error_code="budget"))
        self._stop_run(job.run.number, "budget", scope)

    async def _put_off(self, job: Job, asking: _Asking, refused: Refused) -> None:
        if refused.possible:
            await self._release(job, asking, CallEnd("pending", next_at_s=refused.wait_s), always=True)
            return
        message = f"the request alone is larger than the provider's limit of {refused.reason}"
        await self._release(job, asking, CallEnd("failed", error_code="over_limit", error_message=message), always=True)

    async def _release(self, job: Job, asking: _Asking, end: CallEnd, *, always: bool = False) -> None:
        held = None if asking.fence is None else (asking.fence, self._worker)
        if held is not None or always:
            await self._writer.close(batches.Closing(job.call.id, end, _text(job, asking), held))

    async def _settle_unsent(self, job: Job, grant: batches.Claimed, refused: Refused | None) -> None:
        wait_s = refused.wait_s if isinstance(refused, Refused) and refused.possible else None
        usage = ledger.Usage("stale", error_code="never_sent")
        await self._writer.settle(self._settlement(job, grant, usage, CallEnd("pending", next_at_s=wait_s), None))

    async def _conclude(self, job: Job, asking: _Asking, sent: _Sent) -> _Asking | None:
        if isinstance(sent.outcome, ProviderError):
            return await self._after_error(job, asking, sent, sent.outcome)
        return await self._after_reply(job, asking, sent, sent.outcome)

    async def _after_reply(self, job: Job, asking: _Asking, sent: _Sent, reply: ChatReply) -> _Asking | None:
        usage, cost = self.track_usage(sent.route, sent.request, reply)
        booked = ledger.Usage(
            status="ok",
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            estimated=usage.estimated,
            cost_nusd=cost,
            latency_ms=sent.latency_ms,
            http_status=200,
            request_id=reply.request_id,
            model_answered=reply.model,
        )
        try:
            answer = self.validate_response(job.kit, reply)
        except AnswerError as error:
            status: ledger.AttemptStatus = "refused" if reply.refusal is not None else "bad_output"
            kept = reply.text[:MAX_KEPT_RESPONSE]
            bad = replace(booked, status=status, error_code=status, error_message=str(error), response=kept)
            return await self._after_bad_answer(job, asking, sent, bad, reply)
        end = CallEnd("completed", result=answer.to_json(), quality_score=answer.quality)
        keep = _cache_entry(job, sent, answer, cost, reply)
        is_stored = await self._writer.settle(self._settlement(job, sent.grant, booked, end, _text(job, asking), keep))
        if is_stored and keep is not None:
            self._flights.land(keep.key, keep.result)
        return None

    async def _after_bad_answer(
        self, job: Job, asking: _Asking, sent: _Sent, booked: ledger.Usage, reply: ChatReply
    ) -> _Asking | None:
        if booked.status == "bad_output" and asking.reasks < job.kit.step.retry.reasks:
            await self._settle(job, asking, sent, booked, CallEnd("running", reask=True))
            return replace(
                asking,
                reasks=asking.reasks + 1,
                route_attempts=asking.route_attempts + 1,
                fence=sent.grant.fence,
                correction=_correction(reply.text, booked.error_message or ""),
            )
        failure = retry.Failure(booked.error_code or booked.status, booked.status, "route")
        return await self._follow(job, asking, sent, booked, failure)

    async def _after_error(self, job: Job, asking: _Asking, sent: _Sent, error: ProviderError) -> _Asking | None:
        failure = retry.classify(error)
        if failure.status == "unknown" and not job.run.resends_unknown(job.kit.step):
            failure = retry.Failure(UNKNOWN_OUTCOME, "unknown", "request")
        used = error.usage or Usage(0, 0)
        paid = 0 if sent.route.price is None else cost_nusd(sent.route.price, used)
        booked = ledger.Usage(
            status=failure.status,
            input_tokens=used.input_tokens,
            output_tokens=used.output_tokens,
            cached_tokens=used.cached_tokens,
            estimated=failure.status == "unknown",
            # Nobody knows whether it was billed: the worst is booked until somebody does.
            cost_nusd=sent.worst_nusd if failure.status == "unknown" else paid,
            latency_ms=sent.latency_ms,
            http_status=error.status,
            request_id=error.request_id,
            error_code=failure.code,
            error_message=error.message,
        )
        return await self._follow(job, asking, sent, booked, failure)

    async def _follow(
        self, job: Job, asking: _Asking, sent: _Sent, booked: ledger.Usage, failure: retry.Failure
    ) -> _Asking | None:
        """Does what `workers.retry` decides after an attempt without an answer."""
        more = asking.route_index + 1 < len(job.kit.routes)
        tries = asking.route_attempts + 1
        luck = random.random()
        decision = retry.decide(failure, tries, job.kit.step.retry.attempts, more_routes=more, luck=luck)
        told = (failure.code, booked.error_message)
        match decision:
            case retry.SendAgain(wait_s) if wait_s <= LONG_WAIT_S:
                if not await self._settle(job, asking, sent, booked, CallEnd("running")):
                    return None
                began = monotonic()
                await self._waits.until(job.run.number, asyncio.sleep(wait_s))
                left_s = began + wait_s - monotonic()
                return replace(
                    asking,
                    route_attempts=tries,
                    fence=sent.grant.fence,
                    wait_s=left_s if left_s > 0 else None,
                )
            case retry.SendAgain(wait_s):
                await self._settle(job, asking, sent, booked, CallEnd("pending", next_at_s=wait_s))
            case retry.TakeNextRoute():
                following = self.select_provider(job, asking.route_index + 1)
                place = (asking.route_index + 1, following.provider, following.model)
                end = CallEnd("pending", error_code=told[0], error_message=told[1], route=place)
                await self._settle(job, asking, sent, booked, end)
            case retry.GiveUp():
                end = CallEnd("failed", error_code=told[0], error_message=told[1])
                await self._settle(job, asking, sent, booked, end)
            case retry.StopRun(reason):
                end = CallEnd("pending", error_code=told[0], error_message=told[1])
                await self._settle(job, asking, sent, booked, end)
                self._stop_run(job.run.number, reason, booked.error_message)
        return None

    async def _settle(self, job: Job, asking: _Asking, sent: _Sent, booked: ledger.Usage, end: CallEnd) -> bool:
        return await self._writer.settle(self._settlement(job, sent.grant, booked, end, _text(job, asking)))

    def _settlement(
        self,
        job: Job,
        grant: batches.Claimed,
        usage: ledger.Usage,
        end: CallEnd,
        text: CallText | None,
        keep: CacheEntry | None = None,
    ) -> batches.Settlement:
        return batches.Settlement(job.call.id, grant.number, grant.fence, self._worker, usage, end, text, keep)


def _request(job: Job, route: Route, asking: _Asking) -> ChatRequest:
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


def _worst(job: Job, asking: _Asking, route: Route, request: ChatRequest) -> int:
    if route.price is None:
        return 0
    return worst_nusd(route.price, _input_upper(job, asking, request), request.max_output_tokens)


def _input_upper(job: Job, asking: _Asking, request: ChatRequest) -> int:
    return upper_bound(request.messages, request.answer_schema) if asking.correction else job.prompt.input_upper


def _input_tokens(job: Job, asking: _Asking) -> int:
    return job.prompt.input_tokens + (estimate_messages(asking.correction) if asking.correction else 0)


def _text(job: Job, asking: _Asking) -> CallText:
    route = job.kit.routes[min(asking.route_index, len(job.kit.routes) - 1)]
    return CallText(job.prompt.text, cache_key(job.kit, route, job.prompt, job.call.repeat))


def _shares(job: Job) -> bool:
    """Whether a call takes answers from the cache and leaves its own there."""
    return job.kit.step.cache and job.run.spec.cache_ttl_s > 0


def _key(job: Job) -> str:
    """The key of a call's answer. Its route is the same until it is put back."""
    route = job.kit.routes[min(job.call.route_index, len(job.kit.routes) - 1)]
    return cache_key(job.kit, route, job.prompt, job.call.repeat)


def _cache_entry(job: Job, sent: _Sent, answer: Answer, cost: int, reply: ChatReply) -> CacheEntry | None:
    if not _shares(job):
        return None
    kept = CachedAnswer(answer.to_json(), answer.quality, sent.route.provider, reply.model, cost)
    key = cache_key(job.kit, sent.route, job.prompt, job.call.repeat)
    return CacheEntry(key, job.prompt.messages_hash, kept.to_json(), float(job.run.spec.cache_ttl_s))


def _correction(text: str, problem: str) -> tuple[Message, ...]:
    return (
        Message("assistant", text[:MAX_REASK_CHARS] or "(empty)"),
        Message(
            "user", f"That reply was not a valid answer: {problem}\nAnswer the question again, in the form asked for."
        ),
    )


async def _sleep_until(at: float) -> None:
    wait_s = at - asyncio.get_running_loop().time()
    if wait_s > 0:
        await asyncio.sleep(wait_s)
