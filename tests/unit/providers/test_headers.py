"""Response headers: every spelling of a waiting time, and limits that may be missing."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from providers.headers import duration_s, rate_limit_hint, retry_after_s
from providers.messages import RateLimitHint

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "1000000000"}, 1e9),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Sun, 22 Nov 2026 12:01:30 GMT"}, 90.0),
        ({"retry-after": "Sun, 22 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"x-ratelimit-reset": str(int(NOW.timestamp() * 1000) + 4000)}, 4.0),
        ({"x-ratelimit-reset": "12"}, None),
    ],
)
def test_retry_after_is_read_in_every_spelling(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, NOW) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("4m12.172s", 252.172),
        ("23h18m29.144s", 83909.144),
        ("1d", 86400.0),
        ("15", 15.0),
        ("", None),
        ("1x", None),
        ("s5", None),
        (None, None),
    ],
)
def test_durations_are_read_with_the_longest_unit_first(text: str | None, expected: float | None) -> None:
    found = duration_s(text)
    assert found == (None if expected is None else pytest.approx(expected))


def test_limits_are_read_and_missing_ones_are_none() -> None:
    hint = rate_limit_hint({"x-ratelimit-limit-tokens": "150000", "x-ratelimit-remaining-tokens": "149984"})
    assert hint is not None
    assert (hint.tokens_limit, hint.tokens_remaining, hint.requests_limit) == (150_000, 149_984, None)
    assert rate_limit_hint({"x-ratelimit-limit-project-tokens": "1"}) is None


def anthropic(limits: dict[str, tuple[str, str, str]], **others: str) -> dict[str, str]:
    parts = ("limit", "remaining", "reset")
    return others | {
        f"anthropic-ratelimit-{name}-{part}": value
        for name, values in limits.items()
        for part, value in zip(parts, values, strict=True)
    }


ANTHROPIC = {
    "requests": ("50", "49", "2026-11-22T12:00:01Z"),
    "input-tokens": ("30000", "28000", "2026-11-22T12:00:04Z"),
    "output-tokens": ("8000", "1000", "2026-11-22T12:00:53.5+00:00"),
    "tokens": ("8000", "1000", "2026-11-22T12:00:53Z"),
}


def test_input_and_output_tokens_are_read_apart() -> None:
    """What is left is rounded to thousands there, so it may be that much less; `tokens` only repeats one of the two."""
    expected = RateLimitHint(50, 49, 1.0, None, None, None, 30_000, 27_000, 4.0, 8_000, 0, 53.5)
    assert rate_limit_hint(anthropic(ANTHROPIC), NOW) == expected


def test_resets_are_read_by_the_clock_of_the_service_where_it_tells_it() -> None:
    hint = rate_limit_hint(anthropic(ANTHROPIC, date="Sun, 22 Nov 2026 11:59:59 GMT"), NOW)
    assert hint is not None
    assert hint.input_tokens_reset_s == 5.0


def test_tokens_counted_together_are_read_where_they_are_not_counted_apart() -> None:
    limits = {name: ANTHROPIC[name] for name in ("requests", "tokens")}
    assert rate_limit_hint(anthropic(limits), NOW) == RateLimitHint(50, 49, 1.0, 8_000, 0, 53.0)


def test_unreadable_limits_are_none() -> None:
    limits = {"requests": ("50", "many", "soon"), "input-tokens": ("", "-1", "")}
    assert rate_limit_hint(anthropic(limits), NOW) == RateLimitHint(50)
