"""Error replies: code first, then type, then status, whatever the server's dialect of the dialect."""

from __future__ import annotations

import json

import pytest

from providers.errors import (
    AuthenticationFailed,
    ContentRefused,
    ContextTooLong,
    ModelNotFound,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    TimedOut,
    Unavailable,
)
from providers.openai_errors import error_of

HTML = b"<html><body>502 Bad Gateway</body></html>"


def envelope(**error: object) -> bytes:
    return json.dumps({"error": error}).encode()


@pytest.mark.parametrize(
    ("status", "body", "kind", "billed"),
    [
        (
            400,
            envelope(message="too long", type="invalid_request_error", code="context_length_exceeded"),
            ContextTooLong,
            "no",
        ),
        (
            400,
            envelope(message="maximum context length is 8192", type="BadRequestError", code=400),
            ContextTooLong,
            "no",
        ),
        (400, envelope(code=400, type="exceed_context_size_error", message="too big"), ContextTooLong, "no"),
        (500, envelope(code=500, message="input is too large to process"), ContextTooLong, "no"),
        (
            400,
            envelope(message="bad", type="invalid_request_error", code="unsupported_parameter"),
            RequestRejected,
            "no",
        ),
        (
            400,
            envelope(message="no", type="invalid_request_error", code="content_policy_violation"),
            ContentRefused,
            "no",
        ),
        (403, envelope(code=403, message="flagged", metadata={"reasons": ["violence"]}), ContentRefused, "no"),
        (401, envelope(message="bad key", code="invalid_api_key"), AuthenticationFailed, "no"),
        (401, envelope(message="expired", type="expired_key", code="401"), AuthenticationFailed, "no"),
        (403, b"", AuthenticationFailed, "no"),
        (402, envelope(code=402, message="no credit"), QuotaExhausted, "no"),
        (404, envelope(message="none", code="model_not_found"), ModelNotFound, "no"),
        (404, b'{"object":"error","message":"none","type":"NotFoundError","code":404}', ModelNotFound, "no"),
        (403, envelope(message="none", type="key_model_access_denied", code="403"), ModelNotFound, "no"),
        (408, HTML, TimedOut, "unknown"),
        (409, envelope(message="conflict"), Unavailable, "no"),
        (422, envelope(message="over", type="budget_exceeded", code="422"), QuotaExhausted, "no"),
        (422, b'{"detail":[{"msg":"field required"}]}', RequestRejected, "no"),
        (429, envelope(message="slow", type="requests", code="rate_limit_exceeded"), RateLimited, "no"),
        (429, envelope(message="slow", type="rate_limit_error", code="slow_down"), RateLimited, "no"),
        (429, envelope(message="pay", type="insufficient_quota", code=None), QuotaExhausted, "no"),
        (429, envelope(message="pay", type="x", code="project_spend_limit_exceeded"), QuotaExhausted, "no"),
        (429, envelope(message="busy", code="resource_unavailable"), Unavailable, "no"),
        (429, b"", RateLimited, "no"),
        (500, envelope(message="oops", type="server_error"), Unavailable, "no"),
        (502, HTML, Unavailable, "unknown"),
        (503, envelope(message="busy", type="service_unavailable_error", code="slow_down"), Unavailable, "no"),
        (503, envelope(code=503, message="Loading model", type="unavailable_error"), Unavailable, "no"),
        (504, HTML, TimedOut, "unknown"),
        (524, b"", TimedOut, "unknown"),
        (529, envelope(code=529, message="x", metadata={"error_type": "provider_overloaded"}), Unavailable, "no"),
        (307, b"", RequestRejected, "no"),
        (400, b'[{"error":{"code":400,"message":"in a list"}}]', RequestRejected, "no"),
        (400, b'{"error":"plain text"}', RequestRejected, "no"),
        (500, b"[" * 100_000, Unavailable, "unknown"),
    ],
)
def test_each_row_of_the_error_tables(status: int, body: bytes, kind: type[ProviderError], billed: str) -> None:
    error = error_of("p", status, {}, body, "")
    assert (type(error), error.billed, error.status, error.sent) == (kind, billed, status, True)


def test_waiting_times_come_from_headers_and_then_from_the_message() -> None:
    body = envelope(
        message="Limit 10000 on tokens per min (TPM). Please try again in 1m2.5s.", code="rate_limit_exceeded"
    )
    told = error_of("p", 429, {}, body, "")
    assert isinstance(told, RateLimited)
    assert (told.retry_after_s, told.dimension) == (62.5, "tokens")
    assert error_of("p", 429, {"retry-after": "3"}, body, "").retry_after_s == 3


def test_keys_that_the_service_echoes_are_removed() -> None:
    body = envelope(message="Incorrect API key provided: my-secret-1. Also sk-proj-abc***xyz and Bearer tok123456.")
    error = error_of("p", 401, {}, body, "my-secret-1")
    for secret in ("my-secret-1", "sk-proj", "tok123456"):
        assert secret not in repr(error) + str(error) + error.message


def test_messages_are_short() -> None:
    error = error_of("p", 400, {}, envelope(message="x" * 10_000), "")
    assert len(error.message) == 500


def test_an_unsent_request_is_never_billed() -> None:
    assert Unavailable("p", "m", sent=False, billed="unknown").billed == "no"
