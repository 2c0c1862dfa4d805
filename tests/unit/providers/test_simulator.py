"""The simulator: valid, repeatable, readable, and as unreliable as one asks it to be."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema_rs
import pytest

from providers.base import Provider, ProviderSettings, open_provider
from providers.errors import ProviderError, RateLimited, TimedOut, Unavailable
from providers.http import HttpClient
from providers.messages import ChatReply, ChatRequest, Message
from providers.simulated_answers import subject_of
from providers.tokens import upper_bound

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "share", "reason", "tags", "grade", "points", "ok", "kind", "when", "maybe", "even", "open"],
    "properties": {
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "reason": {"type": "string", "description": "Why the project deserves the score.", "maxLength": 90},
        "tags": {
            "type": "array",
            "items": {"enum": ["a", "b", "c"]},
            "minItems": 2,
            "maxItems": 2,
            "uniqueItems": True,
        },
        "grade": {"enum": ["poor", "fair", "good"]},
        "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1},
        "ok": {"type": "boolean"},
        "kind": {"const": "verdict"},
        "when": {"type": "string", "format": "date"},
        "maybe": {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 300}]},
        "even": {"type": "integer", "multipleOf": 2, "exclusiveMinimum": 0, "maximum": 9},
        "open": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    },
    "$defs": {"point": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}},
}


def no_client() -> HttpClient:
    raise AssertionError("the simulator needs no network")


def simulator(**options: object) -> Provider:
    return open_provider(ProviderSettings("simulator", "simulator", options=options), no_client)


def asked(name: str = "Redis", schema: dict[str, Any] | None = SCHEMA, **fields: Any) -> ChatRequest:
    prompt = (Message("system", "You judge."), Message("user", f"Project: {name}\nCategory: database"))
    return ChatRequest(
        **{"model": "m", "messages": prompt, "max_output_tokens": 2000, "timeout_s": 5.0, **fields},
        answer_schema=schema,
    )


def answer(provider: Provider, request: ChatRequest) -> ChatReply:
    return asyncio.run(provider.send(request))


def test_answers_satisfy_the_schema_and_stay_within_the_bounds() -> None:
    provider, check = simulator(), jsonschema_rs.validator_for(SCHEMA)
    for number in range(40):
        request = asked(f"Project {number}")
        reply = answer(provider, request)
        check.validate(json.loads(reply.text))
        assert reply.usage is not None
        assert 0 < reply.usage.input_tokens <= upper_bound(request.messages, SCHEMA)
        assert 0 < reply.usage.output_tokens <= request.max_output_tokens


def test_the_same_question_has_the_same_answer_and_another_seed_another() -> None:
    first = answer(simulator(), asked())
    assert answer(simulator(), asked()) == first
    assert answer(simulator(seed=1), asked()).text != first.text
    assert answer(simulator(), asked(seed=1)).text != first.text


def test_scores_spread_over_the_range() -> None:
    provider = simulator()
    scores = {json.loads(answer(provider, asked(f"P{n}")).text)["score"] for n in range(60)}
    assert len(scores) >= 7


def test_texts_name_the_subject_and_say_that_they_are_simulated() -> None:
    reason = json.loads(answer(simulator(), asked("Valkey")).text)["points"][0]["text"]
    assert "Valkey" in reason
    assert "Simulated" in reason
    essay = answer(simulator(), asked("Valkey", schema=None)).text
    assert essay.startswith("# Valkey: simulated assessment")


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Judge.\nProject: Redis\n", "Redis"),
        ("- **Project name:** Apache Kafka\n", "Apache Kafka"),
        ("| name | SQLite |", "SQLite"),
        ("# Review of nginx\ntext", "Review of nginx"),
        ("nothing here", "the submitted item"),
    ],
)
def test_the_subject_is_found(prompt: str, subject: str) -> None:
    assert subject_of(prompt) == subject


def test_a_small_cap_cuts_the_answer() -> None:
    reply = answer(simulator(), asked(max_output_tokens=5))
    assert reply.finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.output_tokens == 5


def outcomes(provider: Provider, attempts: int, **fields: Any) -> list[str]:
    found: list[str] = []
    for number in range(attempts):
        try:
            reply = answer(provider, asked(**{"attempt_id": f"a{number}", **fields}))
            found.append("refusal" if reply.refusal else "ok")
        except ProviderError as error:
            found.append(type(error).__name__)
    return found


def test_faults_are_drawn_per_attempt_and_repeatable() -> None:
    first = outcomes(simulator(error_rate=0.3, rate_limited_rate=0.3, refusal_rate=0.3), 60)
    assert {"ok", "refusal", "Unavailable", "RateLimited"} == set(first)
    assert outcomes(simulator(error_rate=0.3, rate_limited_rate=0.3, refusal_rate=0.3), 60) == first


def test_repeating_without_an_attempt_id_can_succeed() -> None:
    assert "ok" in outcomes(simulator(error_rate=0.5), 20, attempt_id="")


def test_certain_faults_always_happen() -> None:
    with pytest.raises(Unavailable) as outage:
        answer(simulator(error_rate=1), asked())
    assert outage.value.billed == "no"
    with pytest.raises(RateLimited) as limit:
        answer(simulator(rate_limited_rate=1, retry_after_s=1.5), asked())
    assert limit.value.retry_after_s == 1.5
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer(simulator(malformed_rate=1), asked()).text)


def test_latency_beyond_the_deadline_times_out() -> None:
    with pytest.raises(TimedOut):
        answer(simulator(latency_s=1.0, latency_jitter=0.0), asked(timeout_s=0.02))


@pytest.mark.parametrize("options", [{"latency": 1}, {"error_rate": 2}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="option '"):
        simulator(**options)
