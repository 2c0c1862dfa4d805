"""Everything that can go wrong between us and an LLM service, as one small tree.

Adapters and `http.py` translate foreign errors into these and keep no reference to the request, because a request
holds the key. Whether an error is repeated is decided elsewhere (`workers/retry.py`); an error only carries the facts
that such a decision and the ledger need.
"""

from __future__ import annotations

from typing import Literal

from providers.messages import RateLimitHint, Usage

Billed = Literal["no", "yes", "unknown"]
LimitDimension = Literal["requests", "tokens"]

MAX_MESSAGE_CHARS = 500


class ProviderError(Exception):
    """Base of all errors of this package.

    ::

        ProviderError
        ├── RateLimited              too fast; the same request works later
        ├── QuotaExhausted           no credit, or a spending limit of the account; waiting does not help
        ├── Unavailable              overloaded or broken on the service's side
        ├── TimedOut                 no complete reply before the deadline
        ├── ConnectionFailed         refused, reset or cut
        ├── RequestRejected          the request itself is wrong
        │   ├── ContextTooLong       prompt and cap do not fit the model's window
        │   └── ModelNotFound        the service does not have this model, or not for this key
        ├── AuthenticationFailed     the key is missing, wrong or not allowed
        ├── ContentRefused           turned away by a content policy before an answer was made
        └── MalformedReply           a success status with a body that is no answer

    Attributes:
        provider: Configured name of the provider.
        message: A sentence for people; holds no secret and at most 500 characters.
        status: HTTP status, or None when there was none.
        retry_after_s: How long the service asked us to wait, in seconds; None when it did not say.
        sent: False only when certainly no byte of the request left this machine.
        billed: Whether the service charged for the attempt; `unknown` must be booked at the worst price.
        request_id: The service's id of the exchange, if known.
        usage: Token counts, if the service reported them with the failure.
        rate_limit: What the headers said about limits, if anything.
    """

    def __init__(
        self,
        provider: str,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        sent: bool = True,
        billed: Billed = "unknown",
        request_id: str | None = None,
        usage: Usage | None = None,
        rate_limit: RateLimitHint | None = None,
    ) -> None:
        self.provider = provider
        self.message = message[:MAX_MESSAGE_CHARS]
        self.status = status
        self.retry_after_s = retry_after_s
        self.sent = sent
        self.billed: Billed = billed if sent else "no"
        self.request_id = request_id
        self.usage = usage
        self.rate_limit = rate_limit
        super().__init__(f"{provider}: {self.message}")


class RateLimited(ProviderError):
    """The service asks us to slow down; `dimension` names the limit when the service did, otherwise it is None."""

    dimension: LimitDimension | None = None


class QuotaExhausted(ProviderError):
    """The account has no credit left or reached a spending limit; use another key or tell a person."""


class Unavailable(ProviderError):
    """The service is overloaded, loading or broken; the same request may work later."""


class TimedOut(ProviderError):
    """The deadline passed; the service may still have answered and billed."""


class ConnectionFailed(ProviderError):
    """No connection, or it broke; `sent` tells whether the request may have arrived."""


class RequestRejected(ProviderError):
    """The service calls the request invalid; repeating it unchanged is pointless."""


class ContextTooLong(RequestRejected):
    """Prompt plus output cap exceed the model's context window."""


class ModelNotFound(RequestRejected):
    """The model does not exist there, or this key may not use it."""


class AuthenticationFailed(ProviderError):
    """The key is missing, wrong, disabled or lacks a permission."""


class ContentRefused(ProviderError):
    """A content policy of the service turned the request away."""


class MalformedReply(ProviderError):
    """The status said success, the body is not an answer: not JSON, cut, oversized or without a choice."""
