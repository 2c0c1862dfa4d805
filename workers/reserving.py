"""The claim of an attempt, which reserves its worst price: at the full cap, or at what a budget still pays.

Near the end of a budget an answer may have to be shorter; below the configured minimum the call is not sent at all.
"""

from dataclasses import replace

from orchestrator.database import batches
from orchestrator.runspec import Route
from providers.messages import ChatRequest
from providers.pricing import affordable_cap
from workers.asking import Asking, Job, claim_of, input_upper, worst_price
from workers.writer import BatchWriter


async def reserve(
    writer: BatchWriter,
    worker: str,
    job: Job,
    asking: Asking,
    route: Route,
    request: ChatRequest,
    budget_ids: tuple[int, ...],
) -> tuple[ChatRequest, int, batches.ClaimAnswer]:
    """Claims at the full cap, or at a smaller one when no budget will pay for the full one any more.

    Returns:
        The request as it may be sent, its worst price, and the answer to the claim.
    """
    worst = worst_price(job, asking, route, request)
    grant = await writer.claim(claim_of(job, asking, route, worst, budget_ids, worker))
    if not isinstance(grant, batches.OverBudget) or not grant.for_good or route.price is None:
        return request, worst, grant
    upper, most = input_upper(job, asking, request), request.max_output_tokens
    least = min(job.run.spec.min_output_tokens, most)
    in_time = affordable_cap(route.price, upper, grant.spare_nusd, most)
    if in_time < least:
        return request, worst, grant
    now = affordable_cap(route.price, upper, grant.free_nusd, most)
    if now < max(least, in_time // 2):
        # What is in flight will give money back, and a much shorter answer would be a waste.
        return request, worst, replace(grant, for_good=False)
    request = replace(request, max_output_tokens=now)
    worst = worst_price(job, asking, route, request)
    grant = await writer.claim(claim_of(job, asking, route, worst, budget_ids, worker))
    if isinstance(grant, batches.OverBudget):
        # Somebody was faster; whether that is for good is for the next try to find out.
        grant = replace(grant, for_good=False)
    return request, worst, grant
