"""The values that travel to and from a provider: messages, requests, replies and token counts.

They are the same for every dialect. Nothing here knows a wire format; adapters translate. A value is immutable, so it
may be shared between attempts and between tasks of one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `content` is plain text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question, complete: whatever is not here is not sent.

    Attributes:
        model: The service's own model name; an adapter never rewrites it.
        messages: In order; at least one.
        max_output_tokens: Hard cap that is always sent; hidden reasoning counts against it.
        timeout_s: Deadline of the whole exchange in seconds, connecting and reading included.
        temperature: None leaves the service's default. Dropped where the catalog says that the model rejects it.
        seed: Best effort; dropped where the catalog says so.
        answer_schema: JSON Schema that the reply should satisfy; None asks for free text.
        attempt_id: Sent as the header `x-attempt-id`, so that our ledger and a gateway's log can be joined. Services
            that do not know the header ignore it. Empty sends no header.
    """

    model: str
    messages: tuple[Message, ...]
    max_output_tokens: int
    timeout_s: float
    temperature: float | None = None
    seed: int | None = None
    answer_schema: Mapping[str, object] | None = None
    attempt_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one or several attempts; values add up with `+`.

    Attributes:
        input_tokens: All of the prompt, cached and cache-written tokens included.
        output_tokens: All that was generated, hidden reasoning included.
        cached_tokens: Part of `input_tokens` that was read from the service's prompt cache.
        estimated: True when the service reported nothing and we counted ourselves.
        cache_write_tokens: Part of `input_tokens` that was written to the prompt cache.
    """

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    estimated: bool = False
    cache_write_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.estimated or other.estimated,
            self.cache_write_tokens + other.cache_write_tokens,
        )


@dataclass(frozen=True, slots=True)
class RateLimitHint:
    """What the service's headers say about its limits; every field is None when the header was missing.

    The `reset` values are seconds until the allowance is *full* again, so they are no waiting times. `tokens` are those
    of a limit on input and output together.
    """

    requests_limit: int | None = None
    requests_remaining: int | None = None
    requests_reset_s: float | None = None
    tokens_limit: int | None = None
    tokens_remaining: int | None = None
    tokens_reset_s: float | None = None
    input_tokens_limit: int | None = None
    input_tokens_remaining: int | None = None
    input_tokens_reset_s: float | None = None
    output_tokens_limit: int | None = None
    output_tokens_remaining: int | None = None
    output_tokens_reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One answer as the service gave it, not yet validated against the schema.

    Attributes:
        text: The visible answer; empty when the model refused or spent its cap on hidden reasoning.
        finish_reason: `length` means that the text is probably cut.
        usage: None when the service reported no counts.
        model: The model that really answered, which need not be the one that was asked.
        request_id: The service's own id of this exchange, if it named one.
        cost_nusd: Cost in nano-USD as billed by the service; None when it did not say.
        refusal: Not None when the model or a content filter declined although the exchange succeeded and was billed.
            A request that the service turned away unbilled raises `ContentRefused` instead.
        rate_limit: None when the headers said nothing about limits.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage | None
    model: str
    request_id: str | None = None
    cost_nusd: int | None = None
    refusal: str | None = None
    rate_limit: RateLimitHint | None = None
