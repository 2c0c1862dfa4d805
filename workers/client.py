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
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic

import structlog

from orchestrator.database import batches
from orchestrator.database.runs import CallEnd, CallText
from orchestrator.results import Answer
from orchestrator.runspec import Route
from providers.errors import ProviderError
from providers.messages import ChatReply, ChatRequest, Usage
from workers import charges, retry
from workers.asking import Asking, Gate, Job, Sent, input_tokens, request_of, shares_answers
from workers.breaker import Breaker, Breakers
from workers.cached import CachedAnswer
from workers.flights import Flights
from workers.limiter import Limiter, LimiterUnavailable, Permit, Refused
from workers.outcomes import LONG_WAIT_S, Outcomes, StopRun, track_usage
from workers.prepared import BudgetIds, PreparedRun, StepKit
from workers.reserving import reserve
from workers.waits import Waits
from workers.writer import BatchWriter

log = structlog.get_logger(__name__)

PERMIT_PATIENCE_S = 20.0
"""How long one question for a permit may wait before we look up whether the run still runs."""
CLAIM_AHEAD_S = 0.08
"""A claim is committed this long before the send time: a commit takes about 20 ms, more when the machine is busy."""
LEASE_CHECK_S = 0.05
LIMITER_AWAY_S = 1.0
BUDGET_WAIT_S, BUDGET_WAIT_MOST_S = 0.1, 10.0
BUDGET_WAITERS = 5
"""Calls of this process that may wait for money before each of them asks less often."""
FLIGHT_WAIT_S = (0.2, 2.0)
"""First and longest pause between two looks at an equal call that another worker is asking."""
INPUT_MARGIN = 1.1
NEVER_ANSWERED_S = 30.0
"""Patience with a provider while nothing of the run was ever answered: then a wrong address is more likely."""


class LLMClient:
    """Sends prompts for one worker process; every method runs on its loop.

    Args:
        worker: id of the worker.
        gates: by provider name.
        may_go_on: whether calls of a run may still be sent by this process.
        stop_run: pauses a run for a reason, with a detail; every other call of it would end the same way.
        has_lease: whether this worker surely counts as alive; while it may not, it must not claim.
        lease_s: how long a slot at a provider stays taken after this process died.
        outage_s: how long a run waits for a provider that answers nobody before it is paused.
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
        stop_run: StopRun,
        note_wait: Callable[[str], None],
        has_lease: Callable[[], bool],
        lease_s: float,
        outage_s: float,
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
        self._outage_s = outage_s
        self._breakers = Breakers()
        self._budgets = budgets
        self._short_of_money = 0
        self._waits = Waits()
        self._waits_to_send = Waits()
        self._flights = Flights()
        self._outcomes = Outcomes(worker, writer, self._waits, self._flights, stop_run)
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
            job.ticket.begin(job.call.id)
            self.at_work[job.call.id] -= 1
            if not self.at_work[job.call.id]:
                del self.at_work[job.call.id]

    async def _fly(self, job: Job) -> None:
        """Asks, or waits for the answer of an equal call of this process."""
        key = job.key if shares_answers(job) else None
        while key is not None and self._flights.is_open(key):
            job.ticket.begin(job.call.id)
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
        job.ticket.begin(job.call.id)
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
        asking: Asking | None = Asking(job.call.route_index, job.call.route_attempts, job.call.reasks)
        while asking is not None and self._may_go_on(job.run.number):
            asking = await self._attempt(job, asking)
        if asking is not None:
            # The run stopped between two attempts. Nobody frees what a live worker holds, so it must go back.
            await self._outcomes.release(job, asking, CallEnd("pending", next_at_s=asking.wait_s))

    def end_waits(self, run: int | None = None) -> None:
        """Ends what calls of a run, or of all runs, wait for: they look whether to go on."""
        self._waits.end(run)
        self._waits_to_send.end(run)
        if run is not None:
            self._breakers.forget(run)

    def held_up(self) -> int:
        """How many calls wait because their provider answers nobody."""
        return self._breakers.waiting()

    def ask_anew(self, run: int | None = None) -> None:
        """Lets calls of a run, or all, that wait for a permit ask again: limits or priorities are others now."""
        self._waits_to_send.end(run)

    def accepts(self, provider: str) -> bool:
        """Whether anything may be sent to a provider now."""
        return not self._gates[provider].paused

    def select_provider(self, job: Job, index: int) -> Route:
        """The route at a place of the fallback chain; the last one if the chain is shorter."""
        return job.route(index)

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
        return track_usage(route, request, reply)

    def validate_response(self, kit: StepKit, reply: ChatReply) -> Answer:
        """The answer in a reply.

        Raises:
            AnswerError: there is none.
        """
        return kit.processor.parse_response(reply)

    async def _attempt(self, job: Job, asking: Asking) -> Asking | None:
        route = self.select_provider(job, asking.route_index)
        gate = self._gates[route.provider]
        if gate.paused:
            # For another round: nobody waits in a shard for somebody who may come tomorrow.
            await self._outcomes.release(job, asking, CallEnd("pending", next_at_s=asking.wait_s))
            return None
        breaker, call = self._breakers.of(route.provider, route.model), job.call.id
        if not breaker.lets(call):
            may_leave = job.has_route_after(asking.route_index)
            stays = await self._waits.until(job.run.number, breaker.passage(call, may_leave=may_leave))
            if stays is None:
                return asking
            if not stays:
                return await self._outcomes.leave(job, asking)
        request = request_of(job, route, asking)
        try:
            async with gate.slots.place(job.run.number, charges.weight(job.run.priority)):
                # It may have opened while this call waited for its place.
                sent = await self._send(job, asking, gate, route, request, breaker) if breaker.lets(call) else asking
        finally:
            breaker.ended(call)
        match sent:
            case Sent():
                return await self._outcomes.conclude(job, asking, sent)
            case batches.AnsweredMeanwhile(result):
                self._flights.land(job.key, result)
                await self._take_answer(job, job.key, result)
                return None
            case batches.InFlight():
                return None if await self._await_flight(job, job.key) else asking
            case _:
                return sent

    async def _send(
        self, job: Job, asking: Asking, gate: Gate, route: Route, request: ChatRequest, breaker: Breaker
    ) -> "Sent | Asking | batches.AnsweredMeanwhile | batches.InFlight | None":
        run = job.run.number
        budget_ids = self._budgets.known(job.run, route.provider) or await self._waits.until(
            run, self._budgets.find(job.run, route.provider)
        )
        if budget_ids is None:
            return asking
        costs = charges.expected(round(input_tokens(job, asking) * INPUT_MARGIN), request.max_output_tokens)
        self.waiting_for_permits += 1
        try:
            permit = await self._waits_to_send.until(run, self.handle_rate_limits(job, gate, route, costs))
        finally:
            self.waiting_for_permits -= 1
        if permit is None:
            return asking
        if isinstance(permit, Refused):
            await self._outcomes.put_off(job, asking, permit)
            return None
        is_due = await self._may_claim(run, permit) and breaker.lets(job.call.id)
        if not is_due or self._gates[route.provider] is not gate:
            self._limiter.release_unsent(permit)
            return asking
        request, worst, grant = await reserve(self._writer, self._worker, job, asking, route, request, budget_ids)
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
                await self._outcomes.settle_unsent(job, grant, again)
                return None
            permit = again
        request = replace(request, attempt_id=f"{job.run.run_id}/{job.call.id}/{grant.number}")
        job.ticket.begin(job.call.id)
        sent = await self._exchange(gate, route, request, grant, worst)
        self._give_back(permit, sent.outcome)
        await self._heed(gate, route, sent.outcome)
        outage = self._outage(breaker, job.run, job.call.id, sent.outcome)
        return sent if outage is None else replace(sent, outage=outage)

    def _outage(
        self, breaker: Breaker, run: PreparedRun, call: int, outcome: ChatReply | ProviderError
    ) -> retry.Outage | None:
        """Tells the breaker of an outcome; returns the outage that it is part of, if it is."""
        if not isinstance(outcome, ProviderError) or retry.classify(outcome).trouble != "transient":
            run.has_answers = run.has_answers or not isinstance(outcome, ProviderError)
            breaker.answered()
            return None
        breaker.failed(call, outcome.message, reached=outcome.sent)
        lasted_s = breaker.lasted_s(run.number)
        patience_s = self._outage_s if run.has_answers else min(self._outage_s, NEVER_ANSWERED_S)
        return None if lasted_s is None else retry.Outage(lasted_s, patience_s)

    async def _may_claim(self, run: int, permit: Permit) -> bool:
        """Waits until shortly before the send time, and for the lease; False when the run stopped meanwhile."""
        early_s = permit.send_at - CLAIM_AHEAD_S - asyncio.get_running_loop().time()
        if early_s > 0:
            await self._waits_to_send.until(run, asyncio.sleep(early_s))
        while not self._has_lease() and self._may_go_on(run):
            await asyncio.sleep(LEASE_CHECK_S)
        return self._may_go_on(run)

    async def _is_due(self, permit: Permit) -> bool:
        """Waits for the send time; False when the permit is void, or nobody can tell."""
        try:
            return await self._limiter.wait_until_due(permit)
        except LimiterUnavailable:
            self._note_wait("broker")
            return False

    async def _exchange(
        self, gate: Gate, route: Route, request: ChatRequest, grant: batches.Claimed, worst: int
    ) -> Sent:
        started = monotonic()
        self.in_flight += 1
        outcome: ChatReply | ProviderError
        try:
            outcome = await gate.provider.send(request)
        except ProviderError as error:
            outcome = error
        finally:
            self.in_flight -= 1
        return Sent(route, request, grant, outcome, round((monotonic() - started) * 1000), worst)

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
            await self._limiter.penalise(gate.pool(route.model), failure.retry_after_s or retry.RATE_LIMITED_PAUSE_S)
        except LimiterUnavailable:
            log.warning("limiter.unavailable", provider=route.provider)

    async def _not_claimed(
        self, job: Job, asking: Asking, answer: batches.NotMine | batches.OverBudget
    ) -> Asking | None:
        if isinstance(answer, batches.NotMine):
            return None
        self._note_wait("budget")
        if answer.for_good:
            await self._outcomes.run_out(job, asking, answer)
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
