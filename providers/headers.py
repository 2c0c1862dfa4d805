"""Reads what response headers say about waiting and limits.

Vendors write times as seconds, fractions, milliseconds, HTTP dates, RFC 3339, Go durations (`6m0s`, `120ms`) or epochs,
and leave any header out as they like. Everything unreadable is None; nothing here raises. Header names are lower case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from providers.messages import RateLimitHint

_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|μs|ns|d|h|m|s)")
_UNIT_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_FIRST_EPOCH_MS = 1e11
_ANTHROPIC = "anthropic-ratelimit"
# Anthropic rounds the tokens that are left to whole thousands.
_ROUNDED = 1000


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return how many seconds the service asks us to wait, or None.

    Looks at `retry-after-ms`, then `retry-after` (seconds or an HTTP date), then an `x-ratelimit-reset` that is a
    moment in epoch milliseconds. A moment in the past is 0.
    """
    moment = now or datetime.now(UTC)
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is not None:
        seconds = _number(text)
        return _until_date_s(text, moment) if seconds is None else seconds
    epoch_ms = _number(headers.get("x-ratelimit-reset"))
    if epoch_ms is not None and epoch_ms > _FIRST_EPOCH_MS:
        return max(0.0, epoch_ms / 1000 - moment.timestamp())
    return None


def duration_s(text: str | None) -> float | None:
    """Read a duration such as `1s`, `6m0s`, `120ms`, `23h18m29.144s` or a plain number of seconds."""
    if text is None:
        return None
    seconds = _number(text)
    if seconds is not None:
        return seconds
    compact = text.strip()
    parts = _DURATION_PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        return None
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def rate_limit_hint(headers: Mapping[str, str], now: datetime | None = None) -> RateLimitHint | None:
    """Return what `x-ratelimit-*` or `anthropic-ratelimit-*` headers say, or None when none of them is there."""
    if "x-ratelimit-limit-requests" not in headers and "x-ratelimit-limit-tokens" not in headers:
        return _anthropic_hint(headers, now) if f"{_ANTHROPIC}-requests-limit" in headers else None
    return RateLimitHint(
        requests_limit=_whole(headers.get("x-ratelimit-limit-requests")),
        requests_remaining=_whole(headers.get("x-ratelimit-remaining-requests")),
        requests_reset_s=duration_s(headers.get("x-ratelimit-reset-requests")),
        tokens_limit=_whole(headers.get("x-ratelimit-limit-tokens")),
        tokens_remaining=_whole(headers.get("x-ratelimit-remaining-tokens")),
        tokens_reset_s=duration_s(headers.get("x-ratelimit-reset-tokens")),
    )


def _anthropic_hint(headers: Mapping[str, str], now: datetime | None) -> RateLimitHint:
    """Anthropic's headers, as described in its API reference (read 2026-11-22).

    Those on `tokens` repeat the tightest of the others, whichever that is; they count where the others are missing.
    """
    # Its own clock, where it tells it: then ours may be wrong.
    moment = _http_date(headers.get("date")) or now or datetime.now(UTC)
    requests = _anthropic_limit(headers, "requests", moment)
    given, produced = (_anthropic_limit(headers, name, moment) for name in ("input-tokens", "output-tokens"))
    nothing = (None, None, None)
    both = _anthropic_limit(headers, "tokens", moment) if given == produced == nothing else nothing
    return RateLimitHint(*requests, *both, *given, *produced)


def _anthropic_limit(
    headers: Mapping[str, str], name: str, now: datetime
) -> tuple[int | None, int | None, float | None]:
    """Limit, the least that is left, and seconds until it is full."""
    remaining = _whole(headers.get(f"{_ANTHROPIC}-{name}-remaining"))
    if remaining is not None and name != "requests":
        remaining = max(0, remaining - _ROUNDED)
    reset_s = _until_timestamp_s(headers.get(f"{_ANTHROPIC}-{name}-reset"), now)
    return _whole(headers.get(f"{_ANTHROPIC}-{name}-limit")), remaining, reset_s


def _until_timestamp_s(text: str | None, now: datetime) -> float | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return max(0.0, (_aware(moment) - now).total_seconds())


def _until_date_s(text: str, now: datetime) -> float | None:
    moment = _http_date(text)
    return None if moment is None else max(0.0, (moment - now).total_seconds())


def _http_date(text: str | None) -> datetime | None:
    try:
        return _aware(parsedate_to_datetime(text or ""))
    except (ValueError, IndexError):
        return None


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _number(text: str | None) -> float | None:
    """Read a finite number that is not negative."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _whole(text: str | None) -> int | None:
    value = _number(text)
    return None if value is None else int(value)
