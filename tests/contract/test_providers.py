"""Every provider against a service it cannot trust: real sockets, every fault, and nothing secret in any error."""

from __future__ import annotations

import asyncio
import json
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from pydantic import SecretStr

from providers.base import Provider, ProviderSettings, open_provider
from providers.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ContextTooLong,
    MalformedReply,
    ModelNotFound,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    TimedOut,
    Unavailable,
)
from providers.http import HttpClient, open_client
from providers.messages import ChatReply, ChatRequest, Message, RateLimitHint, Usage
from tests.fakes.provider_server import RunningServer, running_server

KEY = "sk-very-secret-0123456789"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "reason"],
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}, "reason": {"type": "string"}},
}
COMPLETION: dict[str, Any] = {
    "id": "gen-1",
    "model": "answered-by",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One fake service for the module; tests script it."""
    log = tmp_path_factory.mktemp("fake") / "log.jsonl"
    with running_server(log=str(log), api_key=KEY) as running:
        yield running


@pytest.fixture
def service(server: RunningServer) -> RunningServer:
    """The fake service without leftovers of the last test."""
    server.control(reset=True, api_key=KEY, rpm=0, tpm=0, models="", context_tokens=1_000_000, latency_s=0.0)
    return server


def provider_for(name: str, service: RunningServer, **options: object) -> Provider:
    dialect = "simulator" if name == "simulator" else "openai"
    settings = ProviderSettings(name, dialect, service.base_url, SecretStr(KEY), options=options)
    return open_provider(settings, open_client)


def asked(**fields: Any) -> ChatRequest:
    prompt = (Message("system", "You judge."), Message("user", "Project: Rédis 😀"))
    return ChatRequest(**{"model": "judge", "messages": prompt, "max_output_tokens": 500, "timeout_s": 5.0} | fields)


def send(provider: Provider, request: ChatRequest) -> ChatReply:
    async def once() -> ChatReply:
        try:
            return await provider.send(request)
        finally:
            await provider.aclose()

    return asyncio.run(once())


def raw(body: object, status: int = 200, **headers: str) -> dict[str, Any]:
    text = body if isinstance(body, str) else json.dumps(body)
    return {"status": status, "body": text, "headers": {k.replace("_", "-"): v for k, v in headers.items()}}


def completion(**changes: Any) -> dict[str, Any]:
    return raw({**COMPLETION, **changes})


def choice(finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    return completion(choices=[{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}])


PROVIDERS = ("openai", "openrouter", "litellm", "vllm", "llamacpp", "ollama", "my-own-server", "simulator")


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_answers_with_text_and_with_the_schema(name: str, service: RunningServer) -> None:
    model = "gpt-6-sol" if name == "openai" else "judge"
    text = send(provider_for(name, service), asked(model=model, temperature=0.3, seed=7))
    assert text.text
    assert (text.finish_reason, text.model, text.refusal) == ("stop", model, None)
    formed = send(provider_for(name, service), asked(model=model, answer_schema=SCHEMA))
    jsonschema_rs.validator_for(SCHEMA).validate(json.loads(formed.text))
    assert formed.usage is not None
    assert formed.usage.input_tokens > 0
    assert formed.usage.output_tokens > 0
    assert not formed.usage.estimated


def test_the_attempt_id_reaches_the_services_book(service: RunningServer) -> None:
    send(provider_for("vllm", service), asked(attempt_id="attempt-42"))
    log = service.log()
    assert log.received[-1].attempt_id == "attempt-42"
    assert (log.answered[-1].attempt_id, log.answered[-1].status, log.answered[-1].billed) == ("attempt-42", 200, True)


@pytest.mark.parametrize("mode", ["json_object", "none"])
def test_servers_without_schemas_get_the_schema_in_the_prompt(mode: str, service: RunningServer) -> None:
    send(provider_for("my-own-server", service), asked(answer_schema=SCHEMA))
    plain = service.log().received[-1]
    send(provider_for("my-own-server", service, json_mode=mode), asked(answer_schema=SCHEMA))
    assert service.log().received[-1].prompt_hash != plain.prompt_hash


def test_system_text_can_be_merged_into_the_question(service: RunningServer) -> None:
    assert send(provider_for("my-own-server", service, system_role="user"), asked()).text


@pytest.mark.parametrize(
    ("script", "kind", "billed"),
    [
        ("rate_limit", RateLimited, "no"),
        ("quota", QuotaExhausted, "no"),
        ("error_500", Unavailable, "no"),
        ("error_503", Unavailable, "no"),
        ("reset_before", ConnectionFailed, "unknown"),
        ("reset_after", ConnectionFailed, "unknown"),
        ("truncated", ConnectionFailed, "unknown"),
        ("not_json", MalformedReply, "unknown"),
        ("empty", MalformedReply, "yes"),
        ("oversized", MalformedReply, "unknown"),
        ("gzip_bomb", MalformedReply, "unknown"),
        (raw({"error": {"code": 429, "message": "upstream", "metadata": {"error_type": "x"}}}), RateLimited, "no"),
        (raw({"error": {"code": 502, "message": "upstream"}}), Unavailable, "unknown"),
        (raw({"error": "odd"}), Unavailable, "unknown"),
        (completion(choices=None), MalformedReply, "yes"),
        (completion(choices=[], usage=None), MalformedReply, "unknown"),
        (raw({"provider": COMPLETION}), MalformedReply, "unknown"),
        (raw("[1]"), MalformedReply, "unknown"),
        (raw("[" * 200_000), MalformedReply, "unknown"),
        (choice("error", content="half"), Unavailable, "unknown"),
        (raw("fine", content_encoding="br"), MalformedReply, "unknown"),
        (raw("fine", content_encoding="gzip"), MalformedReply, "unknown"),
        (raw("", status=307, location="http://127.0.0.1:1/"), RequestRejected, "no"),
        (raw("<html>", status=502), Unavailable, "unknown"),
    ],
)
def test_each_failure_is_told_apart_and_holds_no_key(
    script: str | dict[str, Any], kind: type[ProviderError], billed: str, service: RunningServer
) -> None:
    service.control(script)
    provider = provider_for("vllm", service)
    with pytest.raises(ProviderError) as caught:
        send(provider, asked())
    error = caught.value
    assert (type(error), error.billed, error.sent, error.provider) == (kind, billed, True, "vllm")
    assert KEY not in "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)) + repr(provider)
    assert error.__cause__ is None
    assert error.__context__ is None or KEY not in repr(error.__context__)


@pytest.mark.parametrize(
    ("options", "request_fields", "kind"),
    [
        ({"api_key": "another"}, {}, AuthenticationFailed),
        ({"models": "a,b"}, {}, ModelNotFound),
        ({"context_tokens": 100}, {}, ContextTooLong),
        ({}, {"max_output_tokens": 0}, RequestRejected),
    ],
)
def test_requests_that_are_wrong_say_why(
    options: dict[str, Any], request_fields: dict[str, Any], kind: type[ProviderError], service: RunningServer
) -> None:
    service.control(**options)
    with pytest.raises(ProviderError) as caught:
        send(provider_for("vllm", service), asked(**request_fields))
    assert type(caught.value) is kind
    assert caught.value.billed == "no"
    assert KEY not in str(caught.value)


def test_a_rate_limit_says_how_long_and_what(service: RunningServer) -> None:
    service.control(rpm=1)
    assert send(provider_for("vllm", service), asked()).rate_limit == RateLimitHint(1, 0)
    with pytest.raises(RateLimited) as caught:
        send(provider_for("vllm", service), asked())
    assert caught.value.dimension == "requests"
    assert caught.value.retry_after_s is not None
    assert 1 <= caught.value.retry_after_s <= 60


def test_a_refused_connection_was_certainly_not_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        settings = ProviderSettings("gone", "openai", f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        with pytest.raises(ConnectionFailed) as caught:
            send(open_provider(settings, open_client), asked())
    assert (caught.value.sent, caught.value.billed) == (False, "no")


def test_the_deadline_covers_the_whole_exchange(service: RunningServer) -> None:
    service.control("hang")
    with pytest.raises(TimedOut) as caught:
        send(provider_for("vllm", service), asked(timeout_s=0.1))
    assert (caught.value.sent, caught.value.billed) == (True, "unknown")


def test_a_provider_goes_on_after_a_failure(service: RunningServer) -> None:
    service.control("reset_after", "hang", "truncated")

    async def run() -> str:
        provider = provider_for("vllm", service)
        for _ in range(3):
            with pytest.raises(ProviderError):
                await provider.send(asked(timeout_s=0.2))
        reply = await provider.send(asked())
        await provider.aclose()
        return reply.text

    assert asyncio.run(run())


def test_a_thousand_calls_are_in_flight_together(service: RunningServer) -> None:
    service.control(latency_s=1.0)

    async def run() -> None:
        provider = provider_for("vllm", service)
        await asyncio.gather(*(provider.send(asked(timeout_s=20.0)) for _ in range(1000)))
        await provider.aclose()

    asyncio.run(run())
    assert service.provider.most_in_flight >= 900


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("refusal", ("", "stop", "I cannot help with that.")),
        ("length", ("", "length", None)),
        (
            choice("content_filter", content="half"),
            ("half", "content_filter", "the service's content filter stopped the answer"),
        ),
        (choice("something-new", content="text"), ("text", "stop", None)),
        (choice(None, content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ("ab", "stop", None)),
        (choice("function_call", content="x"), ("x", "tool_calls", None)),
    ],
)
def test_replies_are_read_leniently(
    script: str | dict[str, Any], expected: tuple[Any, ...], service: RunningServer
) -> None:
    service.control(script)
    reply = send(provider_for("vllm", service), asked())
    assert (reply.text, reply.finish_reason, reply.refusal) == expected


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (COMPLETION["usage"], Usage(10, 5, cached_tokens=4)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": None}, Usage(10, 5)),
        (
            {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cache_write_tokens": 3}},
            Usage(9, 1, 0, False, 3),
        ),
        ({"prompt_tokens": None, "completion_tokens": 5}, None),
        ({"prompt_tokens": "10", "completion_tokens": 5}, None),
        ({"prompt_tokens": -1, "completion_tokens": 5}, None),
        ([], None),
        (None, None),
    ],
)
def test_counts_that_are_odd_or_missing_are_none(usage: object, expected: Usage | None, service: RunningServer) -> None:
    service.control(completion(usage=usage))
    assert send(provider_for("vllm", service), asked()).usage == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (completion(usage={**COMPLETION["usage"], "cost": 0.00014}), 140_000),
        (
            completion(
                usage={
                    **COMPLETION["usage"],
                    "cost": 1e-6,
                    "is_byok": True,
                    "cost_details": {"upstream_inference_cost": 0.002},
                }
            ),
            2_001_000,
        ),
        (completion(usage={**COMPLETION["usage"], "cost": None}), None),
        (raw(COMPLETION, x_litellm_response_cost="0.0005"), 500_000),
        (raw(COMPLETION, x_litellm_response_cost="None"), None),
        (raw(COMPLETION, x_litellm_response_cost="NaN"), None),
        (raw(COMPLETION), None),
    ],
)
def test_the_services_own_bill_is_read(script: dict[str, Any], expected: int | None, service: RunningServer) -> None:
    service.control(script)
    assert send(provider_for("vllm", service), asked()).cost_nusd == expected


def test_the_answering_model_and_the_request_id_are_kept(service: RunningServer) -> None:
    service.control(raw(COMPLETION, x_request_id="req_7"), raw(COMPLETION))
    first = send(provider_for("vllm", service), asked())
    assert (first.model, first.request_id) == ("answered-by", "req_7")
    assert send(provider_for("vllm", service), asked()).request_id == "gen-1"


@pytest.mark.parametrize(
    ("base_url", "options", "reason"),
    [
        (None, {}, "base_url is missing"),
        ("https://user:pw@api.example.com/v1", {}, "user name or password"),
        ("https://api.example.com/v1", {"cap_field": "tokens"}, "option 'cap_field'"),
        ("https://api.example.com/v1", {"colour": "red"}, "option 'colour'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    base_url: str | None, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        open_provider(ProviderSettings("x", "openai", base_url, SecretStr(KEY), options=options), open_client)


def test_no_object_that_a_caller_holds_shows_the_key(service: RunningServer) -> None:
    settings = ProviderSettings("vllm", "openai", service.base_url, SecretStr(KEY))
    clients: list[HttpClient] = []

    def remembered() -> HttpClient:
        clients.append(open_client())
        return clients[-1]

    provider = open_provider(settings, remembered)
    shown = [repr(thing) + str(thing) for thing in (settings, provider, *clients, vars(provider))]
    assert KEY not in "".join(shown)


def test_the_book_survives_in_a_file(service: RunningServer, tmp_path: Path) -> None:
    service.control("reset_before")
    with pytest.raises(ConnectionFailed):
        send(provider_for("vllm", service), asked(attempt_id="lost"))
    log = service.log()
    assert log.received[-1].attempt_id == "lost"
    assert (log.answered[-1].status, log.answered[-1].fault, log.answered[-1].billed) == (0, "reset_before", False)
    assert log.statuses()[0] >= 1
