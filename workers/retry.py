"""Pure: what an error means for its attempt and its call. The one place that decides about repeating.

An error is first classified (what do we book, what kind of trouble is it), then decided upon: wait and send again,
take the next route, give the call up, or stop the run because every other call would end the same way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from orchestrator.database.ledger import AttemptStatus
from providers import errors

Trouble = Literal["rate_limited", "transient", "route", "content", "request", "run"]
"""rate_limited: too fast. transient: the same request may work later. route: this route will not do.
content: refused by a policy. request: this request is wrong. run: every call of the run would fail the same way."""

BACKOFF_FIRST_S = 0.25
BACKOFF_GROWTH = 3
"""The first repetition comes soon, because most failures are accidents of one moment; four tries still span two seconds
and more, and calls that meet a real outage wait in `workers.breaker`."""
BACKOFF_MOST_S = 30.0
RATE_LIMITED_PAUSE_S = 0.5
"""After a 429 that names no time."""
RATE_LIMITED_TRIES = 5
"""A 429 says nothing about the call, so it may be sent this many times as often as after other errors."""
OUTAGE_TRIES = 2
"""While a provider answers nobody a call may be sent this many times as often, because it is hardly to blame; but when
the last calls of a run fail for reasons of their own, that looks the same, and the run must end."""
UNAVAILABLE = "provider_unavailable"
"""Why a run is paused whose provider answered nobody for too long."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A classified error.

    Attributes:
        code: stable name, for ledgers and reports.
        status: what the attempt becomes; `unknown` when it may have been paid for.
        reason: why the run stops, for trouble of the kind `run`.
        reached: False when certainly nothing of the request arrived.
    """

    code: str
    status: AttemptStatus
    trouble: Trouble
    retry_after_s: float | None = None
    reason: str | None = None
    reached: bool = True


@dataclass(frozen=True, slots=True)
class Outage:
    """The provider answers nobody.

    Attributes:
        lasted_s: since the run of the call met it, in seconds.
        patience_s: how long it may last before the run is paused.
    """

    lasted_s: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class SendAgain:
    """Send on the same route after a wait in seconds."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class TakeNextRoute:
    """Go on with the next route of the fallback chain."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The call has failed."""


@dataclass(frozen=True, slots=True)
class StopRun:
    """Put the call back and pause its run: it is not the call's fault."""

    reason: str


Decision = SendAgain | TakeNextRoute | GiveUp | StopRun


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What one kind of error means; `status` is None where it depends on whether the attempt may have been billed."""

    code: str
    trouble: Trouble
    status: AttemptStatus | None = None
    reason: str | None = None


_MEANINGS: Mapping[type[errors.ProviderError], _Meaning] = {
    errors.RateLimited: _Meaning("rate_limited", "rate_limited", "retryable"),
    errors.QuotaExhausted: _Meaning("quota_exhausted", "run", "fatal", "provider_quota"),
    errors.AuthenticationFailed: _Meaning("authentication", "run", "fatal", "provider_key"),
    errors.ModelNotFound: _Meaning("model_not_found", "run", "fatal", "provider_model"),
    errors.ContextTooLong: _Meaning("context_too_long", "route", "fatal"),
    errors.RequestRejected: _Meaning("request_rejected", "request", "fatal"),
    errors.ContentRefused: _Meaning("content_refused", "content", "refused"),
    errors.TimedOut: _Meaning("timed_out", "transient"),
    errors.ConnectionFailed: _Meaning("connection_failed", "transient"),
    errors.MalformedReply: _Meaning("malformed_reply", "transient"),
    errors.Unavailable: _Meaning("unavailable", "transient"),
}


def classify(error: errors.ProviderError) -> Failure:
    """Says what an error of a provider means."""
    meaning = _MEANINGS.get(type(error), _MEANINGS[errors.Unavailable])
    status = meaning.status
    if status is None:
        status = {"unknown": "unknown", "yes": "bad_output", "no": "retryable"}[error.billed]
    booked = cast("AttemptStatus", status)
    return Failure(meaning.code, booked, meaning.trouble, error.retry_after_s, meaning.reason, error.sent)


def decide(
    failure: Failure,
    route_attempts: int,
    limit: int,
    *,
    more_routes: bool,
    luck: float,
    outage: Outage | None = None,
) -> Decision:
    """Says what happens next.

    Args:
        failure: what went wrong in the attempt just made.
        route_attempts: attempts on this route so far, that one included.
        limit: attempts allowed on a route.
        more_routes: the fallback chain goes on.
        luck: a random number from 0 to 1, for jitter.
        outage: of which the failure is a part; None when others are answered. Where another route is left, nobody
            waits for its end.
    """
    match failure.trouble:
        case "rate_limited" if route_attempts < limit * RATE_LIMITED_TRIES:
            return SendAgain(RATE_LIMITED_PAUSE_S * _spread(luck))
        case "transient" if outage is not None and not more_routes and outage.lasted_s >= outage.patience_s:
            return StopRun(UNAVAILABLE)
        case "transient" if route_attempts < _tries(failure, limit, None if more_routes else outage):
            return SendAgain(max(failure.retry_after_s or 0.0, backoff_s(route_attempts, luck)))
        case _ if more_routes and failure.trouble != "request":
            return TakeNextRoute()
        case "run":
            return StopRun(failure.reason or failure.code)
        case _:
            return GiveUp()


def _tries(failure: Failure, limit: int, outage: Outage | None) -> float:
    if outage is None:
        return limit
    return limit * OUTAGE_TRIES if failure.reached else math.inf


def backoff_s(tries: int, luck: float) -> float:
    """Seconds to wait after so many tries: growing, capped, and spread over the upper half of the interval."""
    # In a long outage a call may be sent thousands of times, and no float holds such a power.
    full = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * BACKOFF_GROWTH ** min(tries - 1, 20))
    return full * _spread(luck)


def _spread(luck: float) -> float:
    return 0.5 + luck / 2
