"""Checks the addresses of databases, brokers and services, and hides the passwords in them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from orchestrator.errors import Problem

DATABASE_SCHEMES = frozenset({"sqlite", "postgresql", "postgresql+psycopg", "postgres"})
REDIS_SCHEMES = frozenset({"redis", "rediss", "unix", "redis+socket"})
SERVICE_SCHEMES = frozenset({"http", "https"})


def masked_url(url: str) -> str:
    """The address with `***` for its password and without its query, which may hold one too."""
    split = _split(url)
    if split is None:
        return "***"
    if split.password is None:
        return url.partition("?")[0]
    user_and_host = f"{split.username or ''}:***@{split.netloc.rpartition('@')[2]}"
    return split._replace(netloc=user_and_host, query="", fragment="").geturl()


def has_password(url: str) -> bool:
    """Whether the address carries a password, be it in front of the host or in its query."""
    split = _split(url)
    return split is not None and (split.password is not None or "password=" in split.query.casefold())


def address_problems(url: str, schemes: frozenset[str], place: str) -> Iterator[Problem]:
    """What is wrong with an address; the messages never repeat it."""
    split = _split(url)
    if split is None or url != url.strip():
        yield Problem("config.bad-address", "the address cannot be read", place)
    elif split.scheme not in schemes:
        expected = ", ".join(f"{scheme}://" for scheme in sorted(schemes))
        yield Problem("config.bad-address", "the address has an unknown scheme", place, f"expected: {expected}")
    elif split.scheme in SERVICE_SCHEMES and not split.hostname:
        yield Problem("config.bad-address", "the address has no host", place)
    elif split.scheme in SERVICE_SCHEMES and (split.username or split.query or split.fragment):
        yield Problem(
            "config.bad-address",
            "the address of a service has no user, query or fragment",
            place,
            "a key belongs into the variable that api_key_env names",
        )


def _split(url: str) -> SplitResult | None:
    """The parts of an address, or None when it has none; a port that is no number counts as unreadable."""
    try:
        split = urlsplit(url)
        _ = split.port
    except ValueError:
        return None
    return split
