"""Collects settings from every place that may hold one, and keeps track of which place won.

A setting is a path such as `("worker", "concurrency")`; a layer is a mapping of paths to values. Layers are combined
value by value: flag > environment > `.env` > `llm-orchestrator.toml` > user configuration. Whether a value is valid is
for `settings.py`; here only the text of an environment variable is turned into the type that its setting has.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, cast, get_args

from dotenv.parser import parse_stream
from pydantic import BaseModel

from orchestrator.errors import InvalidInput, Problem, did_you_mean, suggest
from orchestrator.plain_text import read_text
from orchestrator.settings import (
    ConfigDocument,
    GlobalSettings,
    LoggingSettings,
    ProviderSection,
    StorageSection,
    WorkerSettings,
    WorkflowSection,
)
from orchestrator.toml_source import parse_toml

SettingPath = tuple[str, ...]

CONFIG_VARIABLE = "LLM_ORCHESTRATOR_CONFIG"
"""Names the project's configuration file, instead of `llm-orchestrator.toml` in the working directory."""

_PREFIXES: Mapping[str, str] = {
    "global": "LLM_",
    "worker": "LLM_ORCHESTRATOR_WORKER_",
    "logging": "LLM_ORCHESTRATOR_LOG_",
    "storage": "LLM_ORCHESTRATOR_",
}
_CUSTOMARY: Mapping[SettingPath, str] = {
    ("storage", "database_url"): "DATABASE_URL",
    ("storage", "redis_url"): "REDIS_URL",
}
_PROVIDER_SETTINGS = frozenset(
    {"base_url", "default_model", "max_tokens", "temperature", "timeout_seconds", "cli_path", "project_path"}
)
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "global": GlobalSettings,
    "worker": WorkerSettings,
    "storage": StorageSection,
    "logging": LoggingSettings,
}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value, the layer that it comes from, and the place to look at when it is wrong."""

    value: object
    layer: str
    place: str

    @property
    def is_from_file(self) -> bool:
        """Whether the value stands in a configuration file, which people commit and share."""
        return self.layer not in {"flag", "environment", ".env"}


@dataclass(slots=True)
class Gathered:
    """Everything found so far; the first layer to give a setting wins.

    Attributes:
        leaves: The values, each under its full path.
        sections: Every table that was written, with its place, for those that hold nothing.
        problems: What stands in the way.
        warnings: What is odd, and does no harm.
    """

    leaves: dict[SettingPath, Leaf] = field(default_factory=dict[SettingPath, Leaf])
    sections: dict[SettingPath, str] = field(default_factory=dict[SettingPath, str])
    problems: list[Problem] = field(default_factory=list[Problem])
    warnings: list[Problem] = field(default_factory=list[Problem])

    def add(self, path: SettingPath, leaf: Leaf) -> None:
        """Take a value unless a stronger layer gave the same setting, or something inside or around it."""
        if not any(path[: len(known)] == known or known[: len(path)] == path for known in self.leaves):
            self.leaves[path] = leaf

    def nested(self) -> dict[str, Any]:
        """All values as one document."""
        document: dict[str, Any] = {}
        for path in self.sections:
            _table(document, path)
        for path, leaf in self.leaves.items():
            table = _table(document, path[:-1])
            if table is not None:
                table[path[-1]] = leaf.value
        return document

    def place(self, path: SettingPath) -> str:
        """Where a setting was given, or the first one inside it, or the closest one around it."""
        # The table around a provider's table is every other provider, which would be the wrong place.
        widest = 1 if len(path) > 1 and path[0] in {"llm_providers", "workflows"} else 0
        for length in range(len(path), widest, -1):
            start = path[:length]
            inside = [leaf.place for known, leaf in self.leaves.items() if known[:length] == start]
            if places := inside or [place for known, place in self.sections.items() if known == start]:
                return places[0]
        return ""


def _table(document: dict[str, Any], path: SettingPath) -> dict[str, Any] | None:
    """The table at a path, made where it is missing; None when a plain value stands in its way."""
    table = document
    for part in path:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            return None
        table = cast("dict[str, Any]", inner)
    return table


@dataclass(frozen=True, slots=True)
class Variable:
    """The value of a variable and its origin."""

    value: str
    layer: str
    place: str


def known_variables(providers: Iterable[str]) -> dict[str, SettingPath]:
    """Every environment variable that is a setting, for these providers."""
    names: dict[str, SettingPath] = {}
    for section, prefix in _PREFIXES.items():
        for key in keys_at((section,)):
            names[_CUSTOMARY.get((section, key), f"{prefix}{key.upper()}")] = (section, key)
    for provider in providers:
        for key in _PROVIDER_SETTINGS:
            names[f"{variable_prefix(provider)}{key.upper()}"] = ("llm_providers", provider, key)
    return names


def variable_prefix(provider: str) -> str:
    """What the variables of a provider begin with: `OPENAI_`; those of `cursor_cli` begin with `CURSOR_`."""
    return provider.upper().replace("-", "_").removesuffix("_CLI") + "_"


def add_variables(gathered: Gathered, variables: Mapping[str, Variable], known: Mapping[str, SettingPath]) -> None:
    """Take every known variable that is not blank, and warn of those that look like a misspelt one."""
    for name, path in known.items():
        variable = variables.get(name)
        if variable is None or not variable.value.strip():
            continue
        try:
            value = _typed(variable.value.strip(), path)
        except ValueError as error:
            gathered.problems.append(Problem("config.invalid-value", f"{name}: {error}", variable.place))
        else:
            gathered.add(path, Leaf(value, variable.layer, variable.place))
    for name, variable in variables.items():
        if name not in known and name != CONFIG_VARIABLE:
            gathered.warnings.extend(_misspelt(name, variable, known))


def _misspelt(name: str, variable: Variable, known: Mapping[str, SettingPath]) -> Iterator[Problem]:
    ours = [*(other for other in known if other.startswith("LLM_")), CONFIG_VARIABLE]
    is_ours = name.startswith("LLM_ORCHESTRATOR_")
    if is_ours or (name.startswith("LLM_") and suggest(name, ours)):
        message = f"{name} is not a setting and has no effect"
        yield Problem("config.unknown-variable", message, variable.place, did_you_mean(name, ours) if is_ours else None)


def read_dotenv(path: Path, gathered: Gathered, required: bool = False) -> dict[str, Variable]:
    """The variables of a `.env` file; a value is taken as it is written, without `$VARIABLE` being replaced.

    `export`, quotes, comments and Windows lines are understood. A line that is none of it is a warning.
    """
    if not required and not path.exists():
        return {}
    name = path.name
    try:
        text = read_text(path, name)
    except InvalidInput as error:
        gathered.problems.extend(error.problems)
        return {}
    if os.name == "posix" and path.stat().st_uid not in {os.geteuid(), 0}:
        gathered.warnings.append(Problem("config.foreign-file", "the file belongs to another user", name))
    variables: dict[str, Variable] = {}
    for binding in parse_stream(io.StringIO(text)):
        place = f"{name}:{binding.original.line}"
        if binding.error:
            gathered.warnings.append(Problem("config.dotenv-line", "the line is not NAME=value", place))
        elif binding.key and binding.value is not None:
            variables[binding.key] = Variable(binding.value, ".env", place)
    return variables


def add_file(gathered: Gathered, path: Path, layer: str, required: bool = False) -> None:
    """Take what a TOML file sets; a missing file is no problem unless it is required."""
    if not required and not path.exists():
        return
    try:
        document = parse_toml(path, layer)
    except InvalidInput as error:
        gathered.problems.extend(error.problems)
        return
    for keys, value in _walk(document.data, ()):
        place = document.locate(keys)
        if value is None:
            gathered.sections.setdefault(keys, place)
        else:
            gathered.add(keys, Leaf(value, layer, place))


def _walk(table: Mapping[str, Any], path: SettingPath) -> Iterator[tuple[SettingPath, object]]:
    """Every table (with None) and every value in it, in the order of the file."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield (*path, key), None
            yield from _walk(cast("Mapping[str, Any]", value), (*path, key))
        else:
            yield (*path, key), value


def keys_at(path: SettingPath) -> list[str]:
    """The keys that may stand in the table at `path`; empty where anything may."""
    return list(_fields_at(path))


def _fields_at(path: SettingPath) -> dict[str, Any]:
    """Key -> annotation, of the table at `path`."""
    match path:
        case ():
            return _annotations(ConfigDocument)
        case ("llm_providers", _):
            return _annotations(ProviderSection)
        case ("workflows", _):
            return _annotations(WorkflowSection)
        case ("global" | "worker" | "storage" | "logging" as section,):
            return _annotations(_SECTIONS[section])
        case _:
            return {}


def _annotations(model: type[BaseModel]) -> dict[str, Any]:
    return {info.alias or name: info.annotation for name, info in model.model_fields.items()}


def _types_in(annotation: Any) -> list[Any]:
    """A type and everything that it is made of."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _types_in(part))]


def _typed(text: str, path: SettingPath) -> object:
    """The text of a variable as the type of its setting.

    Raises:
        ValueError: It cannot be read as that type; the message does not repeat the text.
    """
    kinds = _types_in(_fields_at(path[:-1])[path[-1]])
    if bool in kinds:
        return _boolean(text)
    if int in kinds:
        return _number(text, _INTEGER, int, "an integer such as 1000 is expected")
    if Decimal in kinds:
        return _number(text, _NUMBER, Decimal, "a number such as 12.5 is expected")
    return _number(text, _NUMBER, float, "a number such as 12.5 is expected") if float in kinds else text


def _boolean(text: str) -> bool:
    if text.casefold() not in _BOOLEANS:
        raise ValueError("true or false is expected")
    return _BOOLEANS[text.casefold()]


def _number(text: str, pattern: re.Pattern[str], kind: type[int | float | Decimal], expected: str) -> object:
    if not pattern.fullmatch(text):
        raise ValueError(expected)
    return kind(text)
