"""Reads API keys, and never says more about one than the name of its variable and its fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from orchestrator.errors import InvalidInput, Problem
from orchestrator.plain_text import read_text

Lookup = Callable[[str], str | None]
"""Variable -> value, from the environment or a `.env` file."""

KEY_MISSING = "key.missing"
"""Code of the one problem that is no mistake in what was written: the environment lacks a key."""
_MAX_KEY_BYTES = 10_000
_PLACEHOLDER = re.compile(
    r"(?i)^(?:sk-)?(?:ant-)?(?:x{3,}|\.{3,}|\*{3,}|<.*>|\$\{?\w.*|(?:your|insert|enter|paste)[-_ ].*)$"
    r"|^(?:change[-_ ]?me|placeholder)$|your[-_]?(?:api[-_]?)?key|x{4,}$|\.\.\.$"
)
_VENDOR_KEY = re.compile(r"^(?:Bearer )?(?:sk-|AIza|gsk_|xai-|pplx-|hf_)[A-Za-z0-9_-]{16,}$")
_KEY_SHAPED = re.compile(r"^(?:sk-|AIza|gsk_|xai-|key-|pplx-|hf_)|^(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9_-]{32,}$")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key of a provider. `variable` is where it came from; the secret shows in no repr."""

    variable: str
    secret: SecretStr

    @property
    def fingerprint(self) -> str:
        """First 8 hex digits of the SHA-256 of the key: enough to tell keys apart, useless for anything else."""
        return fingerprint(self.secret)


@dataclass(frozen=True, slots=True)
class KeysRead:
    """What became of a provider's key variables."""

    keys: tuple[ApiKey, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def fingerprint(secret: SecretStr) -> str:
    """First 8 hex digits of the SHA-256 of a secret."""
    return hashlib.sha256(secret.get_secret_value().encode()).hexdigest()[:8]


def looks_like_key(text: str) -> bool:
    """Whether a text is probably a key itself, written where the name of a variable belongs."""
    return _KEY_SHAPED.search(text) is not None


def is_vendor_key(text: str) -> bool:
    """Whether a text has the very form that a vendor gives to its keys."""
    return _VENDOR_KEY.match(text) is not None


def read_keys(variables: Iterable[str], required: bool, lookup: Lookup) -> KeysRead:
    """Read a pool of keys.

    A variable may hold several keys with commas between them, and `<VARIABLE>_FILE` may name a file with the key, as
    container platforms do. Of a pool, unset variables are passed over as long as one key is there.

    Args:
        variables: Names of the variables, in order of preference.
        required: Whether the service is of no use without a key.
        lookup: Where values come from.
    """
    keys: list[ApiKey] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    unset: list[str] = []
    for variable in variables:
        value, problem = _value(variable, lookup)
        if problem:
            problems.append(problem)
        elif value is None:
            unset.append(variable)
        else:
            _collect(variable, value, keys, problems, warnings)
    if required and not keys and not problems:
        names = " or ".join(unset)
        problems.append(Problem(KEY_MISSING, "the API key is not set", names, f"export {unset[0]}, or put it in .env"))
    return KeysRead(tuple(keys), tuple(problems), tuple(warnings))


def _value(variable: str, lookup: Lookup) -> tuple[str | None, Problem | None]:
    value, path = lookup(variable), lookup(f"{variable}_FILE")
    if not path:
        return value, None
    if value:
        message = f"both {variable} and {variable}_FILE are set"
        return None, Problem("key.ambiguous", message, variable, "unset one of them")
    try:
        return read_text(Path(path), f"{variable}_FILE", _MAX_KEY_BYTES), None
    except InvalidInput as error:
        return None, Problem("key.unreadable", error.problems[0].message, f"{variable}_FILE")


def _collect(variable: str, value: str, keys: list[ApiKey], problems: list[Problem], warnings: list[Problem]) -> None:
    trimmed = value.rstrip("\r\n")
    if trimmed != value and trimmed:
        warnings.append(Problem("key.newline", "the key ended in a newline, which was dropped", variable))
    for part in trimmed.split(","):
        if fault := _fault(part):
            problems.append(Problem("key.invalid", fault, variable, "set it to the key alone"))
        else:
            keys.append(ApiKey(variable, SecretStr(part)))


def _fault(key: str) -> str | None:
    if not key.strip():
        return "the API key is blank"
    if key[0] in "\"'" or key[-1] in "\"'":
        return "the API key has quotes around it"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "the API key holds spaces, newlines or characters that no key has"
    if _PLACEHOLDER.search(key):
        return "the API key is a placeholder"
    return None
