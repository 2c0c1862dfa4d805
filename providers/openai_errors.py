"""Turns an OpenAI-shaped error reply into one `ProviderError`.

Every compatible server keeps the outline `{"error": {"message", "type", "code"}}` and varies the rest: codes are
strings or numbers, OpenRouter hides the true kind in `metadata.error_type`, vLLM and FastAPI drop the envelope, edge
proxies answer in HTML. So the kind is looked up by code, then by type, then by status. OpenAI's error page,
OpenRouter's error types and LiteLLM's proxy sources, read 2026-11-22.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from providers.errors import (
    AuthenticationFailed,
    Billed,
    ContentRefused,
    ContextTooLong,
    LimitDimension,
    ModelNotFound,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    TimedOut,
    Unavailable,
)
from providers.headers import duration_s, rate_limit_hint, retry_after_s

_KINDS: Mapping[type[ProviderError], str] = {
    ContextTooLong: "context_length_exceeded max_tokens_exceeded token_limit_exceeded string_too_long "
    "exceed_context_size_error",
    QuotaExhausted: "insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded "
    "project_spend_limit_exceeded organization_usage_limit_exceeded billing_hard_limit_reached payment_required "
    "budget_exceeded",
    RateLimited: "rate_limit_exceeded rate_limit_error requests tokens slow_down ramp_limit_exceeded",
    ModelNotFound: "model_not_found not_found not_found_error notfounderror key_model_access_denied "
    "team_model_access_denied",
    AuthenticationFailed: "invalid_api_key authentication authentication_error auth_error expired_key "
    "token_not_found_in_db permission_denied permission_error account_deactivated",
    ContentRefused: "content_policy_violation content_filter invalid_prompt refusal bio_policy "
    "misalignment_policy_violation responsible_ai_policy_violation",
    Unavailable: "server_error server server_is_overloaded service_unavailable_error unavailable_error "
    "overloaded_error provider_overloaded provider_unavailable resource_unavailable internal_error "
    "internal_server_error no_db_connection",
    TimedOut: "timeout",
}
_KIND_BY_NAME = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_KIND_BY_STATUS: Mapping[int, type[ProviderError]] = {
    401: AuthenticationFailed,
    402: QuotaExhausted,
    403: AuthenticationFailed,
    404: ModelNotFound,
    408: TimedOut,
    409: Unavailable,
    425: Unavailable,
    429: RateLimited,
    504: TimedOut,
    524: TimedOut,
}
_UNBILLED_KINDS = (RateLimited, QuotaExhausted, RequestRejected, AuthenticationFailed)
# A gateway that gives up says nothing about the server behind it, which may go on generating.
_GATEWAY_STATUSES = {408, 499, 502, 504, 520, 521, 522, 523, 524}

_OVERFLOW = re.compile(r"maximum context length|context (?:size|window|length)|too large to process", re.IGNORECASE)
_TRY_AGAIN = re.compile(r"try again in ((?:\d+(?:\.\d+)?(?:ms|s|m|h))+)")
_KEY_SHAPED = re.compile(r"\b(?:sk|key|gsk|xai)-[\w*.\-]{6,}|\bBearer\s+\S+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What an error body says; texts are lower case except the message, and empty when absent."""

    message: str
    names: tuple[str, ...] = ()
    status: int | None = None
    is_flagged: bool = False


def read_error(payload: object) -> ErrorBody | None:
    """Find an error in a decoded body; None when it holds none."""
    if isinstance(payload, list) and payload:
        return read_error(cast("list[object]", payload)[0])
    if not isinstance(payload, dict):
        return None
    body = cast("dict[str, Any]", payload)
    error = body.get("error")
    if isinstance(error, str):
        return ErrorBody(error)
    if isinstance(error, dict):
        return _of_object(cast("dict[str, Any]", error))
    if body.get("object") == "error":
        return _of_object(body)
    return ErrorBody(_text(body["detail"])) if body.get("detail") else None


def error_of(provider: str, status: int, headers: Mapping[str, str], body: bytes, secret: str) -> ProviderError:
    """Build the error for a reply whose status is not a success.

    Args:
        provider: Name for the error.
        status: HTTP status.
        headers: With lower-case names.
        body: As received; need not be JSON.
        secret: The key, removed from the message wherever the service echoes it; may be empty.
    """
    try:
        found = read_error(json.loads(body))
    except (ValueError, RecursionError):
        found = None
    return build_error(provider, status, headers, found, secret)


def build_error(
    provider: str, status: int, headers: Mapping[str, str], found: ErrorBody | None, secret: str
) -> ProviderError:
    """Build the error for a status and what the body said; `found` is None for a body that said nothing."""
    said = found or ErrorBody("the reply has no error object")
    effective = said.status if status < 300 and said.status is not None else status
    kind = _kind_of(said, effective)
    wait_s = retry_after_s(headers)
    if wait_s is None and kind is RateLimited:
        wait_s = _wait_from_message(said.message)
    error = kind(
        provider,
        _sentence(status, said, secret),
        status=status,
        retry_after_s=wait_s,
        billed=_billed(kind, status, found is not None),
        request_id=headers.get("x-request-id") or headers.get("x-litellm-call-id"),
        rate_limit=rate_limit_hint(headers),
    )
    if isinstance(error, RateLimited):
        error.dimension = _dimension(said)
    return error


def without_secrets(text: str, secret: str) -> str:
    """Return the text with the key, and whatever looks like one, replaced."""
    plain = text.replace(secret, "[key]") if secret else text
    return _KEY_SHAPED.sub("[key]", plain)


def _of_object(error: Mapping[str, Any]) -> ErrorBody:
    metadata: Mapping[str, Any] = error["metadata"] if isinstance(error.get("metadata"), dict) else {}
    code = error.get("code")
    status = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else None
    names = (code, metadata.get("error_type"), error.get("type"))
    return ErrorBody(
        _text(error.get("message") or ""),
        tuple(name.lower() for name in names if isinstance(name, str)),
        status,
        is_flagged="reasons" in metadata or "flagged_input" in metadata,
    )


def _kind_of(said: ErrorBody, status: int) -> type[ProviderError]:
    if said.is_flagged:
        return ContentRefused
    for name in said.names:
        # `slow_down` was the old name of an overload; a 503 stays one.
        if name in _KIND_BY_NAME and not (status == 503 and _KIND_BY_NAME[name] is RateLimited):
            return _KIND_BY_NAME[name]
    # llama.cpp reports a prompt that does not fit its batch as a 500.
    if status in {400, 413, 422, 500} and _OVERFLOW.search(said.message):
        return ContextTooLong
    if status in _KIND_BY_STATUS:
        return _KIND_BY_STATUS[status]
    return RequestRejected if 300 <= status < 500 else Unavailable


def _billed(kind: type[ProviderError], status: int, has_error_object: bool) -> Billed:
    """Services bill finished generations only; doubt remains where a gateway answered or a success was announced."""
    if status < 300:
        return "no" if issubclass(kind, _UNBILLED_KINDS) else "unknown"
    if status in _GATEWAY_STATUSES or (status >= 500 and not has_error_object):
        return "unknown"
    return "no"


def _sentence(status: int, said: ErrorBody, secret: str) -> str:
    if 300 <= status < 400:
        return f"HTTP {status}: redirects are not followed; check base_url"
    name = f" {said.names[0]}" if said.names else ""
    return without_secrets(f"HTTP {status}{name}: {' '.join(said.message.split())}", secret)


def _dimension(said: ErrorBody) -> LimitDimension | None:
    if "tokens" in said.names or "tokens per min" in said.message:
        return "tokens"
    if "requests" in said.names or "requests per" in said.message:
        return "requests"
    return None


def _wait_from_message(message: str) -> float | None:
    match = _TRY_AGAIN.search(message)
    return duration_s(match.group(1)) if match else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
