"""The fake provider's mind: it checks requests, enforces limits, draws faults, writes answers and keeps the book.

It knows nothing of sockets; `provider_server` carries its answers.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.fakes.provider_answers import content_for
from tests.fakes.provider_limits import Limiter, LimiterKind, build_limiter

FAULTS = (
    "ok", "rate_limit", "error_500", "error_503", "reset_before", "reset_after", "slow", "malformed", "truncated",
    "no_usage", "not_json", "refusal", "length", "empty", "quota", "hang", "oversized", "gzip_bomb",
)  # fmt: skip
DRAWN = (
    "rate_limit", "error_500", "error_503", "reset_before", "reset_after", "slow", "malformed", "truncated", "no_usage",
    "refusal",
)  # fmt: skip
KNOWN_FIELDS = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "user",
    "response_format", "stream", "store", "metadata", "reasoning_effort", "verbosity", "service_tier", "provider",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the service behaves. Limits of 0 are off; rates are probabilities per request; times are seconds."""

    rpm: float = 0
    tpm: float = 0
    limiter: LimiterKind = "sliding"
    window_s: float = 60.0
    burst: float = 0
    max_in_flight: int = 0
    latency_s: float = 0.0
    latency_jitter: float = 0.0
    seed: int = 0
    rate_limit: float = 0.0
    error_500: float = 0.0
    error_503: float = 0.0
    reset_before: float = 0.0
    reset_after: float = 0.0
    slow: float = 0.0
    slow_s: float = 2.0
    malformed: float = 0.0
    truncated: float = 0.0
    no_usage: float = 0.0
    refusal: float = 0.0
    api_key: str = ""
    context_tokens: int = 1_000_000
    models: str = ""
    log: str = ""


@dataclass(slots=True)
class Exchange:
    """One request while it is being served."""

    number: int
    attempt_id: str
    model: str
    input_tokens: int
    body: dict[str, Any]
    prompt_hash: int
    fault: str = ""
    headers: str = ""
    raw: dict[str, Any] = field(default_factory=dict[str, Any])


class FakeProvider:
    """The service's mind: checks, limits, faults, answers and the book."""

    def __init__(self, options: ServerOptions) -> None:
        self.script: deque[str | dict[str, Any]] = deque()
        self.stored: dict[str, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = self.number = 0
        self._fd = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if options.log else -1
        self.configure(options)

    def configure(self, options: ServerOptions) -> None:
        """Adopt options; limiters start afresh."""
        self.options = options
        self._chance = random.Random(options.seed)
        self._drawn = [(name, getattr(options, name)) for name in DRAWN if getattr(options, name)]
        self._models = set(filter(None, options.models.split(",")))
        self._requests = self._limiter(options.rpm)
        self._tokens = self._limiter(options.tpm)

    def close(self) -> None:
        """Close the book."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _limiter(self, limit: float) -> Limiter | None:
        options = self.options
        return build_limiter(options.limiter, limit, options.window_s, options.burst, self._chance) if limit else None

    def receive(self, headers: bytes, raw: bytes) -> tuple[Exchange, tuple[int, str, str] | None]:
        """Book a request and check it; the second value is `(status, code, message)` when it is turned away."""
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        exchange = self._exchange(headers, body if isinstance(body, dict) else {})
        self._book_received(exchange)
        problem = self._problem(headers, body, exchange) or self._over_limit(exchange)
        if problem is None:
            self._draw_fault(exchange)
        return exchange, problem

    def book_answered(self, exchange: Exchange, status: int, output_tokens: int, billed: bool) -> None:
        """Write how the request ended, before the answer leaves."""
        self.counts[str(status)] += 1
        if self._fd >= 0:
            line = (
                f'{{"event":"answered","number":{exchange.number},"attempt_id":{json.dumps(exchange.attempt_id)},'
                f'"mono":{time.monotonic():.6f},"wall":{time.time():.6f},"status":{status},"fault":"{exchange.fault}",'
                f'"input_tokens":{exchange.input_tokens},"output_tokens":{output_tokens},'
                f'"billed":{"true" if billed else "false"}}}\n'
            )
            os.write(self._fd, line.encode())

    def keep(self, exchange: Exchange, payload: bytes) -> None:
        """Store a completion whose request asked for it."""
        attempt = (exchange.body.get("metadata") or {}).get("attempt")
        if exchange.body.get("store") and attempt:
            self.stored[attempt] = json.loads(payload) | {"metadata": exchange.body["metadata"]}

    def stored_page(self, path: str) -> bytes:
        """List the stored completions whose metadata a query asks for."""
        asked = parse_qs(urlsplit(path).query).get("metadata[attempt]", [""])[0]
        rows = [self.stored[asked]] if asked in self.stored else []
        return json.dumps({"object": "list", "data": rows, "has_more": False}).encode()

    def latency_s(self, exchange: Exchange) -> float:
        """Return how long the answer takes."""
        options = self.options
        if exchange.fault == "hang":
            return 3600.0
        if exchange.fault == "raw":
            return float(exchange.raw.get("delay_s", 0.0))
        base = options.slow_s if exchange.fault == "slow" else options.latency_s
        return base * (1 + options.latency_jitter * (2 * self._chance.random() - 1)) if base else 0.0

    def statistics(self) -> dict[str, Any]:
        """Return counts by status and the largest number of requests that were open together."""
        counts = dict(self.counts)
        return {"requests": self.number, "statuses": counts, "most_in_flight": self.most_in_flight}

    def _exchange(self, headers: bytes, body: dict[str, Any]) -> Exchange:
        self.number += 1
        messages = body.get("messages")
        text = json.dumps(messages)
        schema = json.dumps(body["response_format"]) if body.get("response_format") else ""
        attempt_id = header_of(headers, b"x-attempt-id").decode("utf-8", "replace")
        tokens = (len(text) + len(schema)) // 4 + 3
        prompt_hash = zlib.crc32(text.encode("utf-8"))
        return Exchange(self.number, attempt_id, str(body.get("model")), tokens, body, prompt_hash)

    def _book_received(self, exchange: Exchange) -> None:
        if self._fd >= 0:
            line = (
                f'{{"event":"received","number":{exchange.number},"attempt_id":{json.dumps(exchange.attempt_id)},'
                f'"mono":{time.monotonic():.6f},"wall":{time.time():.6f},"model":{json.dumps(exchange.model)},'
                f'"prompt_hash":"{exchange.prompt_hash:08x}","input_tokens":{exchange.input_tokens},'
                f'"max_tokens":{_cap(exchange.body)}}}\n'
            )
            os.write(self._fd, line.encode())

    def _problem(self, headers: bytes, body: object, exchange: Exchange) -> tuple[int, str, str] | None:
        if self.options.api_key and header_of(headers, b"authorization") != f"Bearer {self.options.api_key}".encode():
            given = header_of(headers, b"authorization").decode("utf-8", "replace")
            return 401, "invalid_api_key", f"Incorrect API key provided: {given}"
        problem = _invalid(body)
        if problem is not None:
            return problem
        if self._models and exchange.model not in self._models:
            return 404, "model_not_found", f"The model '{exchange.model}' does not exist"
        if exchange.input_tokens + _cap(exchange.body) > self.options.context_tokens:
            window = self.options.context_tokens
            return 400, "context_length_exceeded", f"This model's maximum context length is {window} tokens"
        return None

    def _over_limit(self, exchange: Exchange) -> tuple[int, str, str] | None:
        now = time.monotonic()
        costs = (
            (self._requests, 1.0, "requests"),
            (self._tokens, exchange.input_tokens + _cap(exchange.body), "tokens"),
        )
        waits = [(limiter.wait_s(now, cost), name) for limiter, cost, name in costs if limiter is not None]
        wait_s, name = max(waits, default=(0.0, ""))
        if wait_s > 0:
            exchange.headers = f"retry-after: {math.ceil(wait_s)}\r\n"
            return 429, "rate_limit_exceeded", f"Rate limit reached on {name} per min. Try again in {wait_s:.3f}s."
        if self.options.max_in_flight and self.in_flight > self.options.max_in_flight:
            exchange.headers = "retry-after: 1\r\n"
            return 429, "rate_limit_exceeded", "Too many concurrent requests"
        for limiter, cost, name in costs:
            if limiter is not None:
                limiter.take(now, cost)
                exchange.headers += f"x-ratelimit-remaining-{name}: {limiter.remaining(now)}\r\n"
                limit = self.options.rpm if name == "requests" else self.options.tpm
                exchange.headers += f"x-ratelimit-limit-{name}: {limit:.0f}\r\n"
        return None

    def _draw_fault(self, exchange: Exchange) -> None:
        if self.script:
            step = self.script.popleft()
            exchange.fault, exchange.raw = (step, {}) if isinstance(step, str) else ("raw", step)
        elif self._drawn:
            exchange.fault = next((name for name, rate in self._drawn if self._chance.random() < rate), "")


def completion(exchange: Exchange) -> tuple[int, bytes]:
    """Return the number of generated tokens and the reply body."""
    content = content_for(exchange.body, exchange.prompt_hash)
    output_tokens = min(len(content) // 4 + 1, _cap(exchange.body))
    finish, refusal = "stop", "null"
    match exchange.fault:
        case "malformed":
            content = content[: len(content) // 2]
        case "refusal":
            return output_tokens, _completion_body(
                exchange, "null", '"I cannot help with that."', finish, output_tokens
            )
        case "length":
            content, finish, output_tokens = "", "length", _cap(exchange.body)
        case "empty":
            return output_tokens, _completion_body(exchange, "null", "null", finish, output_tokens)
        case _:
            pass
    return output_tokens, _completion_body(exchange, json.dumps(content), refusal, finish, output_tokens)


def apply_control(provider: FakeProvider, command: dict[str, Any]) -> None:
    """Carry out a control command; see the module's docstring."""
    if command.get("reset"):
        provider.counts.clear()
        provider.script.clear()
        provider.most_in_flight = provider.number = 0
    if command.get("set"):
        provider.configure(replace(provider.options, **command["set"]))
    for step in command.get("script", ()):
        if isinstance(step, str) and step not in FAULTS:
            raise ValueError(f"unknown fault {step!r}")
        provider.script.append(step)


def _completion_body(exchange: Exchange, content: str, refusal: str, finish: str, output_tokens: int) -> bytes:
    total = exchange.input_tokens + output_tokens
    usage = "" if exchange.fault == "no_usage" else (
        f',"usage":{{"prompt_tokens":{exchange.input_tokens},"completion_tokens":{output_tokens},"total_tokens":{total}}}'
    )  # fmt: skip
    return (
        f'{{"id":"chatcmpl-{exchange.number}","object":"chat.completion","created":1,"model":{json.dumps(exchange.model)},'
        f'"choices":[{{"index":0,"finish_reason":"{finish}","message":{{"role":"assistant","content":{content},'
        f'"refusal":{refusal}}}}}]{usage}}}'
    ).encode()


def _invalid(body: object) -> tuple[int, str, str] | None:
    """Check a request as the vendor does; returns `(status, code, message)`."""
    if not isinstance(body, dict):
        return 400, "invalid_json", "The body is not a JSON object"
    unknown = sorted(set(body) - KNOWN_FIELDS)
    if unknown:
        return 400, "unknown_parameter", f"Unrecognized request argument supplied: {unknown[0]}"
    messages = body.get("messages")
    if not isinstance(body.get("model"), str) or not isinstance(messages, list) or not messages:
        return 400, "missing_required_parameter", "model and messages are required"
    for message in messages:
        is_role = message.get("role") in {"system", "developer", "user", "assistant"}
        if not is_role or not isinstance(message.get("content"), str):
            return 400, "invalid_value", "a message needs a known role and text content"
    if _cap(body) < 1:
        return 400, "integer_below_min_value", "the output cap must be at least 1"
    return _invalid_for_model(body)


def _invalid_for_model(body: dict[str, Any]) -> tuple[int, str, str] | None:
    is_reasoning = body["model"].startswith(("gpt-5", "gpt-6", "o1", "o3"))
    for name in ("max_tokens", "temperature") if is_reasoning and body.get("reasoning_effort") != "none" else ():
        if name in body:
            return 400, "unsupported_parameter", f"Unsupported parameter: '{name}' is not supported with this model."
    form = body.get("response_format")
    if form is not None and form.get("type") not in {"text", "json_object", "json_schema"}:
        return 400, "invalid_value", "unknown response_format"
    if form is not None and form["type"] == "json_schema" and not form.get("json_schema", {}).get("name"):
        return 400, "missing_required_parameter", "json_schema.name is required"
    return None


def _cap(body: dict[str, Any]) -> int:
    cap = body.get("max_completion_tokens", body.get("max_tokens", 0))
    return cap if isinstance(cap, int) else 0


def header_of(head: bytes, name: bytes) -> bytes:
    """Return a header of a raw request head, or nothing; `name` is lower case."""
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return b""
    start = at + len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else len(head)].strip()
