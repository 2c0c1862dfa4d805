"""How long a process waits for a provider that answers nobody."""

from types import SimpleNamespace
from typing import Any, cast

from providers import errors
from providers.messages import ChatReply
from tests.simulation.clock import played
from workers.breaker import FAILURES, Breaker
from workers.client import NEVER_ANSWERED_S, LLMClient
from workers.retry import Outage

OUTAGE_S = 3600.0
NOTHING: Any = None


def test_a_run_that_was_ever_answered_is_worth_a_longer_wait() -> None:
    told = _told(
        errors.RateLimited("p", "slow down", billed="no"),
        *[errors.Unavailable("p", "down", billed="no")] * FAILURES,
        ChatReply("so", "stop", None, "m"),
        *[errors.Unavailable("p", "down", billed="no")] * FAILURES,
    )
    before, after = told[1 : FAILURES + 1], told[FAILURES + 2 :]
    assert (told[0], told[FAILURES + 1]) == (None, None)
    assert before == [None] * (FAILURES - 1) + [Outage(0.0, NEVER_ANSWERED_S)]
    assert after == [None] * (FAILURES - 1) + [Outage(0.0, OUTAGE_S)]


def _told(*outcomes: ChatReply | errors.ProviderError) -> list[Outage | None]:
    """What a client makes of the outcomes of calls of a new run."""
    client = LLMClient(
        "w1", NOTHING, NOTHING, {}, lambda _: True, NOTHING, NOTHING, lambda: True, 16.0, OUTAGE_S, NOTHING
    )
    run = cast("Any", SimpleNamespace(number=1, has_answers=False))

    async def scene() -> list[Outage | None]:
        breaker = Breaker("p", "m")
        return [client._outage(breaker, run, call, outcome) for call, outcome in enumerate(outcomes)]  # pyright: ignore[reportPrivateUsage]

    return played(scene())
