"""The Chat Completions dialect, as spoken by OpenAI and by every server that imitates it.

Covers api.openai.com, OpenRouter, LiteLLM's proxy, vLLM, llama.cpp's server and Ollama's `/v1`. They differ in field
names and tolerance, which is catalog data (`OpenAIOptions`), not code. Replies are read leniently: unknown fields are
ignored, and a success status proves nothing until there is a choice with text. OpenAI's API reference and the
compatible servers' sources, read 2026-11-22.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from providers.base import ClientFactory, NotSupported, ProviderSettings
from providers.catalog import ModelEntry, Sampling, at_address, find_model, find_provider
from providers.errors import MalformedReply, Unavailable
from providers.headers import rate_limit_hint
from providers.http import HttpReply
from providers.messages import ChatReply, ChatRequest, FinishReason, Message, Usage
from providers.openai_errors import build_error, error_of, read_error, without_secrets
from providers.pricing import NUSD_PER_USD

JsonMode = Literal["json_schema", "json_object", "none"]

_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "error": "error",
    "cancelled": "cancelled",
}
_SCHEMA_PROMPT = "\n\nAnswer only with JSON that satisfies this JSON Schema:\n"
# Keywords that make OpenAI's strict mode refuse a schema; it is then sent as a hint and checked by us alone.
_NOT_STRICT = {
    "allOf", "contains", "dependentRequired", "else", "if", "maxContains", "maxLength", "maxProperties", "minContains",
    "minLength", "minProperties", "not", "oneOf", "patternProperties", "propertyNames", "then", "unevaluatedItems",
    "unevaluatedProperties", "uniqueItems",
}  # fmt: skip
_MAX_REMEMBERED_BODIES = 64
_ATTEMPT = "attempt"
"""Name of the attempt id in the metadata of a stored completion."""
_MAX_COUNT = 10**12


class OpenAIOptions(BaseModel):
    """How a server deviates from the dialect.

    Attributes:
        catalog: Catalog row whose options and models this server has; empty means the row of the configured name.
        cap_field: Name of the output cap.
        system_role: Role of instructions; `user` merges them into the first user message.
        json_mode: How a schema is asked for. All but `json_schema` write the schema into the prompt.
        sampling: Whether temperature may be sent to models that the catalog does not know.
        send_seed: Whether the server accepts `seed`.
        store: Whether the vendor may keep the exchange; None sends nothing. With true, attempts of unknown outcome
            can be looked up.
        reasoning_effort: Passed on; None leaves the model's default.
        extra_headers: Added to every request.
        extra_body: Added to every body; fields that we set ourselves win.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    catalog: str = ""
    cap_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    system_role: Literal["system", "developer", "user"] = "system"
    json_mode: JsonMode = "json_schema"
    sampling: Sampling = "yes"
    send_seed: bool = True
    store: bool | None = None
    reasoning_effort: str | None = None
    extra_headers: Mapping[str, str] = Field(default_factory=dict)
    extra_body: Mapping[str, object] = Field(default_factory=dict)


class OpenAIProvider:
    """One server that speaks Chat Completions."""

    def __init__(self, settings: ProviderSettings, client_factory: ClientFactory) -> None:
        """Check options and address, and prepare the connection pool; nothing is sent.

        Raises:
            ValueError: An option or the address is not acceptable.
        """
        self._name = settings.name
        self._options = _options_of(settings)
        self._key = settings.api_key
        self._written: dict[tuple[object, ...], tuple[Mapping[str, object] | None, str]] = {}
        if not settings.base_url:
            raise ValueError(f"provider '{settings.name}': base_url is missing")
        headers = {"content-type": "application/json", **self._options.extra_headers}
        if self._key is not None and self._secret():
            headers["authorization"] = f"Bearer {self._secret()}"
        self._client = client_factory()
        url = settings.base_url.rstrip("/") + "/chat/completions"
        self._endpoint = self._client.endpoint(settings.name, url, headers)

    @property
    def name(self) -> str:
        """The configured name."""
        return self._name

    async def send(self, request: ChatRequest) -> ChatReply:
        """Send once; see `Provider.send`."""
        reply = await self._endpoint.post(self._body(request), request.timeout_s, request.attempt_id)
        if reply.status != 200:
            raise error_of(self._name, reply.status, reply.headers, reply.body, self._secret())
        return self._read(request, reply)

    async def look_up(self, attempt_id: str, timeout_s: float) -> ChatReply | NotSupported | None:
        """Find a stored completion by the attempt id in its metadata; see `LooksUp.look_up`.

        `NotSupported` unless the option `store` is true, or when the server has no such listing.
        """
        if not self._options.store:
            return NotSupported()
        reply = await self._endpoint.get({f"metadata[{_ATTEMPT}]": attempt_id, "limit": "1"}, timeout_s)
        if reply.status in {404, 405}:
            return NotSupported()
        if reply.status != 200:
            raise error_of(self._name, reply.status, reply.headers, reply.body, self._secret())
        rows = self._decoded(reply).get("data")
        for row in cast("list[object]", rows) if isinstance(rows, list) else []:
            body = _mapping(row)
            # A server that does not know the filter lists anything.
            if _mapping(body.get("metadata")).get(_ATTEMPT) == attempt_id:
                return _stored_reply(body)
        return None

    async def aclose(self) -> None:
        """Close connections. Safe to repeat."""
        await self._client.aclose()

    def _secret(self) -> str:
        return "" if self._key is None else self._key.get_secret_value()

    def _body(self, request: ChatRequest) -> bytes:
        """The request as JSON; what all calls of a step have in common, the schema above all, is written once."""
        model = find_model(self._options.catalog or self._name, request.model)
        messages = request.messages
        if request.answer_schema is not None and self._json_mode(model) != "json_schema":
            messages = _with_schema(messages, request.answer_schema)
        role = (model and model.system_role) or self._options.system_role
        own: dict[str, object] = {"messages": _wire_messages(messages, role)}
        if self._tells_attempt(request):
            given = cast("Mapping[str, str]", self._options.extra_body.get("metadata", {}))
            own["metadata"] = {**given, _ATTEMPT: request.attempt_id}
        return f"{self._common(request, model)}, {json.dumps(own)[1:]}".encode("ascii")

    def _common(self, request: ChatRequest, model: ModelEntry | None) -> str:
        """What a request shares with others of its step, without the closing brace; remembered by what shapes it."""
        schema = request.answer_schema
        shaping = (request.model, request.max_output_tokens, request.temperature, request.seed)
        place = (*shaping, id(schema), self._tells_attempt(request))
        known = self._written.get(place)
        if known is not None and known[0] is schema:
            return known[1]
        found = json.dumps(self._fields(request, model))[:-1]
        if len(self._written) >= _MAX_REMEMBERED_BODIES:
            self._written.clear()
        self._written[place] = (schema, found)
        return found

    def _fields(self, request: ChatRequest, model: ModelEntry | None) -> dict[str, object]:
        options = self._options
        # What each request has of its own must not stand there twice.
        own = ("messages", "metadata") if self._tells_attempt(request) else ("messages",)
        fields = {name: value for name, value in options.extra_body.items() if name not in own}
        fields["model"] = request.model
        fields[(model and model.cap_field) or options.cap_field] = request.max_output_tokens
        if request.temperature is not None and self._may_sample(model):
            fields["temperature"] = request.temperature
        if request.seed is not None and options.send_seed:
            fields["seed"] = request.seed
        if options.reasoning_effort is not None:
            fields["reasoning_effort"] = options.reasoning_effort
        if options.store is not None:
            fields["store"] = options.store
        mode = "none" if request.answer_schema is None else self._json_mode(model)
        if mode == "json_schema":
            fields["response_format"] = _response_format(request.answer_schema)
        elif mode == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return fields

    def _tells_attempt(self, request: ChatRequest) -> bool:
        return bool(self._options.store and request.attempt_id)

    def _json_mode(self, model: ModelEntry | None) -> str:
        return (model and model.json_mode) or self._options.json_mode

    def _may_sample(self, model: ModelEntry | None) -> bool:
        rule = self._options.sampling if model is None else model.sampling
        effort = self._options.reasoning_effort or (model and model.default_effort)
        return rule == "yes" or (rule == "without_reasoning" and effort == "none")

    def _read(self, request: ChatRequest, reply: HttpReply) -> ChatReply:
        body = self._decoded(reply)
        usage = _usage_of(body.get("usage"))
        choice = self._choice(reply, body, usage)
        message: Mapping[str, Any] = choice["message"] if isinstance(choice.get("message"), dict) else {}
        finish = _FINISH_REASONS.get(str(choice.get("finish_reason")), "stop")
        text = _text_of(message.get("content"))
        refusal = _refusal_of(message.get("refusal"), finish)
        if finish == "error":
            raise Unavailable(
                self._name,
                "the answer ended with an error",
                status=200,
                usage=usage,
                request_id=_request_id(reply, body),
            )
        if text is None and refusal is None and finish != "length":
            raise self._malformed(reply, "the reply has a choice without text", usage)
        model = body.get("model")
        return ChatReply(
            text=text or "",
            finish_reason=finish,
            usage=usage,
            model=model if isinstance(model, str) and model else request.model,
            request_id=_request_id(reply, body),
            cost_nusd=_cost_of(body.get("usage"), reply.headers),
            refusal=refusal,
            rate_limit=rate_limit_hint(reply.headers),
        )

    def _decoded(self, reply: HttpReply) -> Mapping[str, Any]:
        try:
            body = json.loads(reply.body)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise self._malformed(reply, "the reply is not a JSON object", None)
        return cast("Mapping[str, Any]", body)

    def _choice(self, reply: HttpReply, body: Mapping[str, Any], usage: Usage | None) -> Mapping[str, Any]:
        """Return the first choice; gateways announce errors and empty answers with status 200 too."""
        choices = body.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return cast("Mapping[str, Any]", choices[0])
        error = read_error(body)
        if error is not None:
            raise build_error(self._name, reply.status, reply.headers, error, self._secret())
        raise self._malformed(reply, "the reply has no choices", usage)

    def _malformed(self, reply: HttpReply, message: str, usage: Usage | None) -> MalformedReply:
        return MalformedReply(
            self._name,
            without_secrets(message, self._secret()),
            status=reply.status,
            billed="unknown" if usage is None else "yes",
            request_id=reply.headers.get("x-request-id"),
            usage=usage,
        )


def _response_format(schema: object) -> dict[str, object]:
    wrapped = {"name": "answer", "strict": is_strict(schema), "schema": schema}
    return {"type": "json_schema", "json_schema": wrapped}


def is_strict(schema: object) -> bool:
    """Tell whether OpenAI's strict mode takes the schema: closed objects, everything required, known keywords."""
    if isinstance(schema, list):
        return all(is_strict(part) for part in cast("list[object]", schema))
    if not isinstance(schema, Mapping):
        return True
    node = cast("Mapping[str, Any]", schema)
    if not _NOT_STRICT.isdisjoint(node):
        return False
    properties: Mapping[str, object] = node.get("properties") or {}
    is_closed = node.get("additionalProperties") is False and set(node.get("required", ())) == set(properties)
    if (node.get("type") == "object" or properties) and not is_closed:
        return False
    nested = [node[word] for word in ("items", "anyOf") if word in node]
    return all(is_strict(part) for part in [*nested, *properties.values(), *node.get("$defs", {}).values()])


def _options_of(settings: ProviderSettings) -> OpenAIOptions:
    named = settings.options.get("catalog")
    row = find_provider(str(named or settings.name))
    if row is not None and not named:
        # Another server that answers under the vendor's name need not know the vendor's newest fields.
        row = at_address(row, settings.base_url)
    standing: Mapping[str, object] = row.options if row is not None and row.dialect == settings.dialect else {}
    try:
        return OpenAIOptions.model_validate({**standing, **settings.options})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"provider '{settings.name}': option '{place}': {first['msg']}") from None


def _with_schema(messages: tuple[Message, ...], schema: Mapping[str, object]) -> tuple[Message, ...]:
    *before, last = messages
    return (*before, Message(last.role, last.content + _SCHEMA_PROMPT + json.dumps(schema)))


def _wire_messages(messages: tuple[Message, ...], system_role: str) -> list[dict[str, str]]:
    if system_role != "user":
        return [{"role": system_role if m.role == "system" else m.role, "content": m.content} for m in messages]
    wire: list[dict[str, str]] = []
    for message in messages:
        role = "user" if message.role == "system" else message.role
        if wire and wire[-1]["role"] == role == "user":
            wire[-1]["content"] += "\n\n" + message.content
        else:
            wire.append({"role": role, "content": message.content})
    return wire


def _text_of(content: object) -> str | None:
    """Return the text of a message; some servers split it into parts. None when there is none at all."""
    if isinstance(content, list):
        parts = cast("list[object]", content)
        texts = [cast("dict[str, object]", part).get("text") for part in parts if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str)) or None
    return content if isinstance(content, str) else None


def _refusal_of(refusal: object, finish: FinishReason) -> str | None:
    if isinstance(refusal, str) and refusal:
        return refusal
    return "the service's content filter stopped the answer" if finish == "content_filter" else None


def _usage_of(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    counts = cast("dict[str, Any]", usage)
    prompt, completion = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    details = counts.get("prompt_tokens_details")
    parts = cast("dict[str, Any]", details) if isinstance(details, dict) else {}
    cached, written = _count(parts.get("cached_tokens")), _count(parts.get("cache_write_tokens"))
    return Usage(prompt, completion, cached_tokens=cached or 0, cache_write_tokens=written or 0)


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < _MAX_COUNT else None


def _cost_of(usage: object, headers: Mapping[str, str]) -> int | None:
    """Return the bill in nano-USD that OpenRouter (body) or LiteLLM (header) state; None otherwise."""
    counts = cast("dict[str, Any]", usage) if isinstance(usage, dict) else {}
    if "cost" in counts:
        details = counts.get("cost_details")
        upstream = cast("dict[str, Any]", details).get("upstream_inference_cost") if isinstance(details, dict) else None
        own = _nusd(counts["cost"])
        # With the customer's own upstream key, OpenRouter's cost is only its fee.
        return own + (_nusd(upstream) or 0) if own is not None and counts.get("is_byok") else own
    return _nusd(headers.get("x-litellm-response-cost"))


def _nusd(usd: object) -> int | None:
    if usd is None or isinstance(usd, bool):
        return None
    try:
        amount = Decimal(str(usd))
    except InvalidOperation:
        return None
    return round(amount * NUSD_PER_USD) if amount.is_finite() and 0 <= amount < 1_000_000 else None


def _mapping(value: object) -> Mapping[str, Any]:
    """A JSON object as it is, and anything else as an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _stored_reply(body: Mapping[str, Any]) -> ChatReply:
    choices = body.get("choices")
    choice = _mapping(cast("list[object]", choices)[0] if isinstance(choices, list) and choices else None)
    message = _mapping(choice.get("message"))
    model, name = body.get("model"), body.get("id")
    return ChatReply(
        text=_text_of(message.get("content")) or "",
        finish_reason=_FINISH_REASONS.get(str(choice.get("finish_reason")), "stop"),
        usage=_usage_of(body.get("usage")),
        model=model if isinstance(model, str) else "",
        request_id=name if isinstance(name, str) else None,
        cost_nusd=_cost_of(body.get("usage"), {}),
    )


def _request_id(reply: HttpReply, body: Mapping[str, Any]) -> str | None:
    found = reply.headers.get("x-request-id") or reply.headers.get("x-litellm-call-id") or body.get("id")
    return found if isinstance(found, str) else None
