"""A judge that costs nothing and needs no network: for demonstrations, rehearsals and tests.

Its answers depend only on the prompt, the model and the seeds, so a run can be repeated exactly. They satisfy the
asked schema and say openly that they are simulated. Scores hang on the subject first (a line such as `Project: X`) and
on the question second, so that different judges roughly agree about a project, as people do. Faults are drawn per
attempt, so a repeated attempt can succeed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from hashlib import blake2b

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from providers.base import ClientFactory, ProviderSettings
from providers.catalog import find_provider
from providers.errors import RateLimited, TimedOut, Unavailable
from providers.messages import ChatReply, ChatRequest, FinishReason, Usage
from providers.simulated_answers import answer_text, malformed_text
from providers.tokens import estimate_messages, estimate_tokens

_MAX_REMEMBERED_FAULTS = 100_000


class SimulatorOptions(BaseModel):
    """What the simulated service is like. Rates are probabilities from 0 to 1, drawn independently per attempt.

    Attributes:
        seed: Changes every answer and every fault.
        latency_s: Mean time to an answer in seconds.
        latency_jitter: Largest relative deviation from the mean, 0 to 1.
        error_rate: Attempts that end as `Unavailable`.
        rate_limited_rate: Attempts that end as `RateLimited`.
        refusal_rate: Answers that are a refusal; billed.
        malformed_rate: Answers that break off or are no JSON; billed.
        retry_after_s: What a simulated rate limit asks us to wait, in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    latency_s: float = Field(default=0.0, ge=0)
    latency_jitter: float = Field(default=0.2, ge=0, le=1)
    error_rate: float = Field(default=0.0, ge=0, le=1)
    rate_limited_rate: float = Field(default=0.0, ge=0, le=1)
    refusal_rate: float = Field(default=0.0, ge=0, le=1)
    malformed_rate: float = Field(default=0.0, ge=0, le=1)
    retry_after_s: float = Field(default=0.2, ge=0)


class SimulatorProvider:
    """The simulated service. The client factory is never called."""

    def __init__(self, settings: ProviderSettings, client_factory: ClientFactory) -> None:
        """Check the options.

        Raises:
            ValueError: An option is unknown or out of range.
        """
        self._name = settings.name
        self._options = _options_of(settings)
        # How often a prompt failed here in a row; kept only for requests without an attempt id.
        self._faults: dict[bytes, int] = {}

    @property
    def name(self) -> str:
        """The configured name."""
        return self._name

    async def send(self, request: ChatRequest) -> ChatReply:
        """Answer after the simulated latency; see `Provider.send`."""
        prompt = "\n\n".join(message.content for message in request.messages)
        key = _digest(str(self._options.seed), request.model, str(request.seed), prompt)
        draws = _digest(key.hex(), request.attempt_id or str(self._faults.get(key, 0)))
        await self._wait(request, _share(draws, 0))
        self._fail_by_chance(key, draws)
        self._faults.pop(key, None)
        usage_in = estimate_messages(request.messages, request.answer_schema)
        if _share(draws, 3) < self._options.refusal_rate:
            return self._refusal(request, usage_in, key)
        text = answer_text(prompt, request.answer_schema, str(self._options.seed), key)
        if _share(draws, 4) < self._options.malformed_rate:
            text = malformed_text(text, draws[15])
        return self._reply(request, text, usage_in, key)

    async def aclose(self) -> None:
        """Do nothing; there is nothing open."""

    async def _wait(self, request: ChatRequest, share: float) -> None:
        latency_s = self._options.latency_s * (1 + self._options.latency_jitter * (2 * share - 1))
        await asyncio.sleep(min(latency_s, request.timeout_s))
        if latency_s > request.timeout_s:
            raise TimedOut(self._name, f"no complete reply within {request.timeout_s:g} s")

    def _fail_by_chance(self, key: bytes, draws: bytes) -> None:
        is_limited = _share(draws, 1) < self._options.rate_limited_rate
        is_broken = _share(draws, 2) < self._options.error_rate
        if not (is_limited or is_broken):
            return
        if len(self._faults) >= _MAX_REMEMBERED_FAULTS:
            self._faults.clear()
        self._faults[key] = self._faults.get(key, 0) + 1
        if is_limited:
            wait_s = self._options.retry_after_s
            raise RateLimited(self._name, "simulated rate limit", status=429, retry_after_s=wait_s, billed="no")
        raise Unavailable(self._name, "simulated outage", status=503, billed="no")

    def _refusal(self, request: ChatRequest, usage_in: int, key: bytes) -> ChatReply:
        refusal = "I cannot judge this (simulated refusal)."
        usage = Usage(usage_in, min(estimate_tokens(refusal), request.max_output_tokens))
        return ChatReply(
            "", "content_filter", usage, request.model, request_id=f"sim-{key.hex()[:16]}", refusal=refusal
        )

    def _reply(self, request: ChatRequest, text: str, usage_in: int, key: bytes) -> ChatReply:
        output = max(1, estimate_tokens(text))
        finish: FinishReason = "stop"
        if output > request.max_output_tokens:
            text = text[: len(text) * request.max_output_tokens // output]
            output, finish = request.max_output_tokens, "length"
        return ChatReply(text, finish, Usage(usage_in, output), request.model, request_id=f"sim-{key.hex()[:16]}")


def _options_of(settings: ProviderSettings) -> SimulatorOptions:
    row = find_provider(settings.name)
    standing: Mapping[str, object] = row.options if row is not None and row.dialect == settings.dialect else {}
    try:
        return SimulatorOptions.model_validate({**standing, **settings.options})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"provider '{settings.name}': option '{place}': {first['msg']}") from None


def _digest(*parts: str) -> bytes:
    return blake2b(json.dumps(parts).encode("ascii"), digest_size=16).digest()


def _share(digest: bytes, index: int) -> float:
    """Return the index-th independent draw from 0 (included) to 1 (excluded); a digest holds five."""
    return int.from_bytes(digest[index * 3 : index * 3 + 3], "big") / 2**24
