"""What a provider is: its settings, its two methods, and how a configured name becomes an object.

A dialect is a wire format with its own module and class; a provider is a dialect with an address, a key and options.
Dialects are registered by module name and loaded when one is opened, so a program that only describes providers never
loads an HTTP client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from pydantic import SecretStr

from providers.messages import ChatReply, ChatRequest

if TYPE_CHECKING:
    from providers.http import HttpClient

ClientFactory = Callable[[], "HttpClient"]

DIALECTS: Mapping[str, tuple[str, str]] = {
    "openai": ("providers.openai", "OpenAIProvider"),
    "simulator": ("providers.simulator", "SimulatorProvider"),
}


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """One configured provider.

    Attributes:
        name: The configured name, as users write it; it appears in errors and ledgers.
        dialect: A key of `DIALECTS`.
        base_url: Address of the API, without the method's path; None for dialects without a network.
        api_key: None where the service wants none. Unwrapped only when a header is built.
        timeout_s: Default deadline in seconds for programs that build requests; a request carries its own.
        options: The user's data for the dialect; the catalog row of this name supplies what is missing.
    """

    name: str
    dialect: str
    base_url: str | None = None
    api_key: SecretStr | None = None
    timeout_s: float = 600.0
    options: Mapping[str, object] = field(default_factory=dict[str, object])


class Provider(Protocol):
    """A service that answers chat requests. One object serves any number of concurrent calls on one event loop."""

    @property
    def name(self) -> str:
        """The configured name."""
        ...

    async def send(self, request: ChatRequest) -> ChatReply:
        """Send the request exactly once and return the answer.

        Never repeats by itself: every call is one attempt in the ledger. Calling it twice may be billed twice.

        Raises:
            ProviderError: Whatever went wrong; see the tree in `providers.errors`.
        """
        ...

    async def aclose(self) -> None:
        """Close connections. Safe to repeat; the object is of no use afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class NotSupported:
    """The service keeps no exchanges, or was not asked to keep them: it cannot say what became of an attempt."""


@runtime_checkable
class LooksUp(Protocol):
    """A provider whose service may tell afterwards what became of an attempt."""

    async def look_up(self, attempt_id: str, timeout_s: float) -> ChatReply | NotSupported | None:
        """Find the answer to an attempt by the id it was sent with. Costs nothing, safe to repeat.

        Returns:
            The answer; None when the service knows none (yet), which does not prove that there was none.

        Raises:
            ProviderError: The service could not be asked.
        """
        ...


def open_provider(settings: ProviderSettings, client_factory: ClientFactory) -> Provider:
    """Build the provider that the settings describe.

    Args:
        settings: Name, dialect, address, key and options.
        client_factory: Called at most once, by dialects that use HTTP; the provider owns and closes the client.

    Raises:
        ValueError: The dialect is unknown, or the address or an option is not acceptable.
    """
    if settings.dialect not in DIALECTS:
        known = ", ".join(sorted(DIALECTS))
        raise ValueError(f"provider '{settings.name}': unknown dialect '{settings.dialect}', expected one of {known}")
    module, name = DIALECTS[settings.dialect]
    build = cast("Callable[[ProviderSettings, ClientFactory], Provider]", getattr(import_module(module), name))
    return build(settings, client_factory)
