"""What becomes of an attempt: booked, answered, asked again, sent elsewhere, put back or given up.

Every path ends in one settlement, which books the attempt and moves its call in one transaction. What an error means
and what follows from it is decided in `workers.retry`; this module carries it out.
"""

import asyncio
import random
from dataclasses import replace
from time import monotonic
from typing import Protocol

from orchestrator.database import batches, budgets, ledger
from orchestrator.database.cache import CacheEntry
from orchestrator.database.runs import UNKNOWN_OUTCOME, CallEnd, CallText
from orchestrator.errors import AnswerError
from orchestrator.runspec import Route
from providers.errors import ProviderError
from providers.messages import ChatReply, ChatRequest, Usage
from providers.pricing import cost_nusd
from providers.tokens import estimate_messages, estimate_tokens
from workers import retry
from workers.asking import (
    Asking,
    Job,
    Sent,
    booked_cost,
    cache_entry,
    correction_of,
    text_of,
)
from workers.flights import Flights
from workers.limiter import Refused
from workers.waits import Waits
from workers.writer import BatchWriter

LONG_WAIT_S = 60.0
"""Longer waits are not sat out in a shard: the call is put back with the time from which it may be asked."""
MAX_KEPT_RESPONSE = 20_000


def track_usage(route: Route, request: ChatRequest, reply: ChatReply) -> tuple[Usage, int]:
    """Tokens and cost (nano-USD) of a reply; tokens are estimated when the provider told none."""
    usage = reply.usage
    if usage is None:
        told = estimate_messages(request.messages, request.answer_schema)
        usage = Usage(told, estimate_tokens(reply.text), estimated=True)
    return usage, booked_cost(route, reply, usage)


class StopRun(Protocol):
    """Pauses a run for a reason, with a detail.

    When a budget is the reason, the detail is its scope, and the limit that refused comes with it: under another limit,
    the run goes on.
    """

    def __call__(self, run: int, reason: str, detail: str | None = None, limit_nusd: int | None = None) -> None:
        """Returns at once; the pause follows. Safe to repeat."""
        ...


class Outcomes:
    """Concludes attempts for one worker process; every method runs on its loop.

    Args:
        worker: id of the worker.
        writer: where settlements go.
        waits: pauses between attempts, which end when a run or the process stops.
        flights: told the answers that equal calls of this process wait for.
        stop_run: pauses a run.
    """

    def __init__(
        self,
        worker: str,
        writer: BatchWriter,
        waits: Waits,
        flights: Flights,
        stop_run: StopRun,
    ) -> None:
        self._worker = worker
        self._writer = writer
        self._waits = waits
        self._flights = flights
        self._stop_run = stop_run

    async def run_out(self, job: Job, asking: Asking, refusal: batches.OverBudget) -> None:
        """Goes on at another provider when only this one's budget is used up; stops the run otherwise."""
        here, place = job.route(asking.route_index).provider, _next_place(job, asking)
        has_other = job.has_route_after(asking.route_index) and place[1] != here
        if has_other and refusal.scope == budgets.provider_scope(here):
            end = CallEnd("pending", error_code="budget", route=place)
            await self.release(job, asking, end, always=True)
            return
        await self.release(job, asking, CallEnd("pending", error_code="budget"))
        self._stop_run(job.run.number, budgets.REASON, refusal.scope, refusal.limit_nusd)

    async def leave(self, job: Job, asking: Asking) -> None:
        """Goes on at the next route, because this one's provider answers nobody."""
        told = f"{job.route(asking.route_index).provider} answered nobody"
        end = CallEnd("pending", error_code="unavailable", error_message=told, route=_next_place(job, asking))
        await self.release(job, asking, end, always=True)

    async def put_off(self, job: Job, asking: Asking, refused: Refused) -> None:
        """Puts a call back until its request may be sent, or fails it when the provider would never take it."""
        if refused.possible:
            await self.release(job, asking, CallEnd("pending", next_at_s=refused.wait_s), always=True)
            return
        message = f"the request alone is larger than the provider's limit of {refused.reason}"
        await self.release(job, asking, CallEnd("failed", error_code="over_limit", error_message=message), always=True)

    async def release(self, job: Job, asking: Asking, end: CallEnd, *, always: bool = False) -> None:
        """Moves a call without an attempt: one that this worker holds, or with `always` one that is pending, too."""
        held = None if asking.fence is None else (asking.fence, self._worker)
        if held is not None or always:
            await self._writer.close(batches.Closing(job.call.id, end, text_of(job), held))

    async def settle_unsent(self, job: Job, grant: batches.Claimed, refused: Refused | None) -> None:
        """Takes back an attempt that is on record and never left, and puts its call back."""
        wait_s = refused.wait_s if isinstance(refused, Refused) and refused.possible else None
        usage = ledger.Usage("stale", error_code="never_sent")
        await self._writer.settle(self._settlement(job, grant, usage, CallEnd("pending", next_at_s=wait_s), None))

    async def conclude(self, job: Job, asking: Asking, sent: Sent) -> Asking | None:
        """Books an attempt and says how its call goes on; None when it is over for this worker."""
        if isinstance(sent.outcome, ProviderError):
            return await self._after_error(job, asking, sent, sent.outcome)
        return await self._after_reply(job, asking, sent, sent.outcome)

    async def _after_reply(self, job: Job, asking: Asking, sent: Sent, reply: ChatReply) -> Asking | None:
        usage, cost = track_usage(sent.route, sent.request, reply)
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
            answer = job.kit.processor.parse_response(reply)
        except AnswerError as error:
            status: ledger.AttemptStatus = "refused" if reply.refusal is not None else "bad_output"
            kept = reply.text[:MAX_KEPT_RESPONSE]
            bad = replace(booked, status=status, error_code=status, error_message=str(error), response=kept)
            return await self._after_bad_answer(job, asking, sent, bad, reply)
        end = CallEnd("completed", result=answer.to_json(), quality_score=answer.quality)
        keep = cache_entry(job, sent, answer, cost, reply)
        is_stored = await self._writer.settle(self._settlement(job, sent.grant, booked, end, text_of(job), keep))
        if is_stored and keep is not None:
            self._flights.land(keep.key, keep.result)
        return None

    async def _after_bad_answer(
        self, job: Job, asking: Asking, sent: Sent, booked: ledger.Usage, reply: ChatReply
    ) -> Asking | None:
        if booked.status == "bad_output" and asking.reasks < job.kit.step.retry.reasks:
            await self._settle(job, asking, sent, booked, CallEnd("running", reask=True))
            return replace(
                asking,
                reasks=asking.reasks + 1,
                route_attempts=asking.route_attempts + 1,
                fence=sent.grant.fence,
                correction=correction_of(reply.text, booked.error_message or ""),
            )
        failure = retry.Failure(booked.error_code or booked.status, booked.status, "route")
        return await self._follow(job, asking, sent, booked, failure)

    async def _after_error(self, job: Job, asking: Asking, sent: Sent, error: ProviderError) -> Asking | None:
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
        self, job: Job, asking: Asking, sent: Sent, booked: ledger.Usage, failure: retry.Failure
    ) -> Asking | None:
        """Does what `workers.retry` decides after an attempt without an answer."""
        more = job.has_route_after(asking.route_index)
        tries = asking.route_attempts + 1
        luck = random.random()
        limit = job.kit.step.retry.attempts
        decision = retry.decide(failure, tries, limit, more_routes=more, luck=luck, outage=sent.outage)
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
                end = CallEnd("pending", error_code=told[0], error_message=told[1], route=_next_place(job, asking))
                await self._settle(job, asking, sent, booked, end)
            case retry.GiveUp():
                end = CallEnd("failed", error_code=told[0], error_message=told[1])
                await self._settle(job, asking, sent, booked, end)
            case retry.StopRun(reason):
                end = CallEnd("pending", error_code=told[0], error_message=told[1])
                await self._settle(job, asking, sent, booked, end)
                self._stop_run(job.run.number, reason, booked.error_message)
        return None

    async def _settle(self, job: Job, asking: Asking, sent: Sent, booked: ledger.Usage, end: CallEnd) -> bool:
        return await self._writer.settle(self._settlement(job, sent.grant, booked, end, text_of(job)))

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


def _next_place(job: Job, asking: Asking) -> tuple[int, str, str]:
    """The next route of the fallback chain, as a call keeps it."""
    following = job.route(asking.route_index + 1)
    return asking.route_index + 1, following.provider, following.model
