"""What follows an error: the whole table, for every error a provider can raise."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import errors
from workers.retry import (
    BACKOFF_MOST_S,
    OUTAGE_TRIES,
    RATE_LIMITED_TRIES,
    Failure,
    GiveUp,
    Outage,
    SendAgain,
    StopRun,
    TakeNextRoute,
    backoff_s,
    classify,
    decide,
)

AGAIN, NEXT, GIVE_UP, STOP = SendAgain, TakeNextRoute, GiveUp, StopRun
TABLE: dict[str, tuple[type[errors.ProviderError], dict[str, Any], str, str, type, type, type]] = {
    # error, arguments, code, status; then what follows first, at last with another route, and at last without
    "rate-limited": (errors.RateLimited, {"billed": "no"}, "rate_limited", "retryable", AGAIN, NEXT, GIVE_UP),
    "quota": (errors.QuotaExhausted, {"billed": "no"}, "quota_exhausted", "fatal", NEXT, NEXT, STOP),
    "unavailable": (errors.Unavailable, {"billed": "no"}, "unavailable", "retryable", AGAIN, NEXT, GIVE_UP),
    "unavailable-unknown": (errors.Unavailable, {}, "unavailable", "unknown", AGAIN, NEXT, GIVE_UP),
    "timed-out": (errors.TimedOut, {}, "timed_out", "unknown", AGAIN, NEXT, GIVE_UP),
    "reset": (errors.ConnectionFailed, {}, "connection_failed", "unknown", AGAIN, NEXT, GIVE_UP),
    "refused": (errors.ConnectionFailed, {"sent": False}, "connection_failed", "retryable", AGAIN, NEXT, GIVE_UP),
    "rejected": (errors.RequestRejected, {"billed": "no"}, "request_rejected", "fatal", GIVE_UP, GIVE_UP, GIVE_UP),
    "too-long": (errors.ContextTooLong, {"billed": "no"}, "context_too_long", "fatal", NEXT, NEXT, GIVE_UP),
    "no-model": (errors.ModelNotFound, {"billed": "no"}, "model_not_found", "fatal", NEXT, NEXT, STOP),
    "key": (errors.AuthenticationFailed, {"billed": "no"}, "authentication", "fatal", NEXT, NEXT, STOP),
    "content": (errors.ContentRefused, {"billed": "no"}, "content_refused", "refused", NEXT, NEXT, GIVE_UP),
    "malformed": (errors.MalformedReply, {"billed": "yes"}, "malformed_reply", "bad_output", AGAIN, NEXT, GIVE_UP),
    "malformed-unknown": (errors.MalformedReply, {}, "malformed_reply", "unknown", AGAIN, NEXT, GIVE_UP),
}
LIMIT = 4


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_an_error_means_the_same_every_time(row: Any):
    kind, arguments, code, status, first, with_route, alone = row
    failure = classify(kind("p", "told", **arguments))
    assert (failure.code, failure.status) == (code, status)
    assert type(decide(failure, 1, LIMIT, more_routes=True, luck=0.5)) is first
    last = LIMIT * RATE_LIMITED_TRIES
    assert type(decide(failure, last, LIMIT, more_routes=True, luck=0.5)) is with_route
    assert type(decide(failure, last, LIMIT, more_routes=False, luck=0.5)) is alone


def test_the_table_is_whole():
    known = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ProviderError)
    }
    assert {row[0] for row in TABLE.values()} == known - {errors.ProviderError}


def test_an_error_of_a_later_release_is_taken_for_an_outage():
    class Novel(errors.ProviderError):
        """A kind that the table does not know."""

    assert classify(Novel("p", "told")).code == "unavailable"


class TestOutages:
    """The provider answers nobody, so a failure says little about its call."""

    NOW, LONG = Outage(1.0, 60.0), Outage(60.0, 60.0)

    @pytest.mark.parametrize("name", ["unavailable", "timed-out", "reset", "malformed"])
    def test_a_call_is_sent_more_often_but_not_for_ever(self, name: str):
        kind, arguments = TABLE[name][:2]
        failure = classify(kind("p", "told", **arguments))
        last = LIMIT * OUTAGE_TRIES
        assert type(decide(failure, last - 1, LIMIT, more_routes=False, luck=0.5, outage=self.NOW)) is AGAIN
        assert type(decide(failure, last, LIMIT, more_routes=False, luck=0.5, outage=self.NOW)) is GIVE_UP
        assert type(decide(failure, LIMIT, LIMIT, more_routes=True, luck=0.5, outage=self.NOW)) is NEXT

    def test_nothing_that_never_left_is_counted(self):
        failure = classify(errors.ConnectionFailed("p", "refused", sent=False))
        assert type(decide(failure, 1000, LIMIT, more_routes=False, luck=0.5, outage=self.NOW)) is AGAIN
        assert type(decide(failure, LIMIT, LIMIT, more_routes=False, luck=0.5)) is GIVE_UP

    def test_patience_ends_with_a_pause_of_the_run_unless_there_is_another_route(self):
        failure = classify(errors.Unavailable("p", "told", billed="no"))
        assert decide(failure, 1, LIMIT, more_routes=False, luck=0.5, outage=self.LONG) == STOP("provider_unavailable")
        assert type(decide(failure, 1, LIMIT, more_routes=True, luck=0.5, outage=self.LONG)) is AGAIN

    @pytest.mark.parametrize("name", ["rate-limited", "rejected", "too-long", "content"])
    def test_other_errors_mean_what_they_always_mean(self, name: str):
        kind, arguments = TABLE[name][:2]
        failure = classify(kind("p", "told", **arguments))
        for tries in (1, LIMIT, LIMIT * RATE_LIMITED_TRIES):
            told = [
                type(decide(failure, tries, LIMIT, more_routes=False, luck=0.5, outage=outage))
                for outage in (None, self.NOW, self.LONG)
            ]
            assert len(set(told)) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.QuotaExhausted, "provider_quota"),
        (errors.AuthenticationFailed, "provider_key"),
        (errors.ModelNotFound, "provider_model"),
    ],
)
def test_a_run_stops_with_a_reason(kind: type[errors.ProviderError], reason: str):
    assert decide(classify(kind("p", "told")), 1, LIMIT, more_routes=False, luck=0) == StopRun(reason)


def test_attempts_on_a_route_are_counted():
    failure = classify(errors.Unavailable("p", "told"))
    kinds = [type(decide(failure, tries, 3, more_routes=False, luck=0)) for tries in (1, 2, 3, 4)]
    assert kinds == [SendAgain, SendAgain, GiveUp, GiveUp]


def test_being_too_fast_is_forgiven_more_often():
    failure = classify(errors.RateLimited("p", "told"))
    assert isinstance(decide(failure, 14, 3, more_routes=False, luck=0), SendAgain)
    assert isinstance(decide(failure, 15, 3, more_routes=False, luck=0), GiveUp)


@pytest.mark.parametrize("asked", [0.0, 7.0, 86_400.0])
def test_a_wait_that_the_service_asks_for_is_kept(asked: float):
    failure = classify(errors.Unavailable("p", "told", retry_after_s=asked))
    decision = decide(failure, 1, LIMIT, more_routes=False, luck=0)
    assert isinstance(decision, SendAgain)
    assert decision.wait_s == max(asked, 0.125)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_waits_grow_within_bounds(tries: int, luck: float):
    wait = backoff_s(tries, luck)
    full = min(BACKOFF_MOST_S, 0.25 * 3 ** min(tries - 1, 20))
    assert full / 2 <= wait <= full
    assert backoff_s(tries + 1, luck) >= wait


def test_waits_of_many_calls_are_spread():
    waits = [backoff_s(3, luck / 10) for luck in range(11)]
    assert waits == sorted(set(waits))


def test_a_bad_answer_goes_to_the_next_route_or_fails():
    failure = Failure("bad_output", "bad_output", "route")
    assert decide(failure, 1, LIMIT, more_routes=True, luck=0) == TakeNextRoute()
    assert decide(failure, 1, LIMIT, more_routes=False, luck=0) == GiveUp()
