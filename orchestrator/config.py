"""ConfigManager: the settings in force, where each of them came from, and everything that is wrong with them.

Precedence, value by value: flag > environment > `.env` > `llm-orchestrator.toml` in the working directory > user
configuration > default. This is the one module that reads the environment. `settings.py` says which settings there
are, `config_layers.py` collects them, `provider_keys.py` reads keys, and `provider_configs.py` completes a provider
with its row of the catalog.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from orchestrator.addresses import DATABASE_SCHEMES, REDIS_SCHEMES, address_problems, has_password, masked_url
from orchestrator.config_layers import (
    CONFIG_VARIABLE,
    Gathered,
    Leaf,
    SettingPath,
    Variable,
    add_file,
    add_variables,
    keys_at,
    known_variables,
    read_dotenv,
)
from orchestrator.errors import ConfigError, EnvironmentNotReady, OrchestratorError, Problem, did_you_mean
from orchestrator.provider_configs import ProvidersBuilt, build_providers, is_key_problem, shown_settings
from orchestrator.provider_keys import KEY_MISSING, is_vendor_key
from orchestrator.settings import ConfigDocument, LLMProviderConfig, Settings
from orchestrator.toml_source import dotted
from providers.catalog import load_catalog

CONFIG_FILE = "llm-orchestrator.toml"

_KEY_HINT = "put the key into a variable, and the variable's name into api_key_env"
_LITERAL_KEY_NAMES = frozenset({"api_key", "apikey", "api_keys", "key", "token", "secret", "password"})


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One reading of all sources; `settings` is None while a problem other than a key's stands in the way."""

    gathered: Gathered
    document: ConfigDocument | None
    built: ProvidersBuilt | None
    settings: Settings | None
    problems: tuple[Problem, ...]


class ConfigManager:
    """Reads the configuration from all its sources.

    Building one reads everything and raises nothing, so that `validate` can report all problems at once; `settings`
    and `get_llm_config` raise where somebody relies on what is wrong.

    Args:
        flags: Settings from the command line by dotted name, such as `{"global.default_provider": "openai"}`; a None
            value means that the flag was not given.
        config_file: The project's file; by default `llm-orchestrator.toml` in `cwd`, if there is one.
        env_files: Further `.env` files, the strongest first; they win over the one in `cwd`.
        cwd: The project's directory; the process's working directory by default.
        environ: The environment; the process's by default.
        user_config: The user's file; by default `config.toml` where the platform keeps configuration.
    """

    def __init__(
        self,
        flags: Mapping[str, object] | None = None,
        *,
        config_file: Path | None = None,
        env_files: Sequence[Path] = (),
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        user_config: Path | None = None,
    ) -> None:
        self._flags = dict(flags or {})
        self._config_file = config_file
        self._env_files = tuple(env_files)
        self._cwd = cwd or Path.cwd()
        self._environ = os.environ if environ is None else environ  # noqa: TID251 - the one reader of the environment
        self._user_config = user_config or platformdirs.user_config_path("llm-orchestrator") / "config.toml"
        self._loaded = self._load()

    @property
    def settings(self) -> Settings:
        """The settings in force.

        Raises:
            ConfigError: Something is wrong other than a missing key, with all problems.
        """
        if self._loaded.settings is None:
            raise ConfigError(problem for problem in self._loaded.problems if not is_key_problem(problem))
        return self._loaded.settings

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What is odd and does no harm: unknown `LLM_ORCHESTRATOR_` variables, unreadable `.env` lines, ..."""
        built = self._loaded.built
        return (*self._loaded.gathered.warnings, *(built.warnings if built else ()))

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted name of every setting -> where its value came from: a file with line, a variable, `default`, ..."""
        origins = {name: "default" for name, _ in self._effective()}
        origins.update({name: "catalog" for name in origins if name.startswith("llm_providers.")})
        for path, leaf in self._loaded.gathered.leaves.items():
            origins[dotted(path)] = leaf.layer if leaf.layer == leaf.place else f"{leaf.layer} ({leaf.place})"
        if "global.default_provider" in origins and ("global", "default_provider") not in self._loaded.gathered.leaves:
            origins["global.default_provider"] = "first configured provider"
        return dict(sorted(origins.items()))

    def values(self) -> Mapping[str, object]:
        """Dotted name of every setting -> its value in force; passwords in addresses are masked."""
        return dict(sorted(self._effective()))

    def validate(self) -> list[Problem]:
        """Everything that is wrong, keys of configured providers included; empty when all is well.

        Tells what the last reading found; `reload` reads anew.
        """
        return list(self._loaded.problems)

    def get_llm_config(self, name: str | None = None) -> LLMProviderConfig:
        """The configuration of a provider, the default one if no name is given.

        Raises:
            ConfigError: No such provider is configured, or it is disabled, or the configuration is broken.
            EnvironmentNotReady: Its key is missing or cannot be a key.
        """
        settings, built = self.settings, self._loaded.built
        wanted = name or settings.default_provider
        if faults := (built.key_problems.get(wanted) if built else None):
            raise EnvironmentNotReady(faults)
        if wanted in settings.providers:
            return settings.providers[wanted]
        raise self._not_configured(wanted)

    def get_workflow_config(self, name: str) -> Mapping[str, object]:
        """What `[workflows.<name>]` sets: `provider`, `model`, `budget_usd`, `variables`; only what was written.

        Raises:
            ConfigError: The configuration is broken.
        """
        document = self._loaded.document
        if self.settings and document and name in document.workflows:
            return document.workflows[name].model_dump(exclude_none=True)
        return {}

    def child_environment(self, values: Mapping[str, str]) -> dict[str, str]:
        """The environment for a process that we start: this one's, with some variables set."""
        return {**self._environ, **values}

    def reload(self) -> Settings:
        """Read all sources again and return the new settings. Safe to repeat.

        Raises:
            ConfigError: The new state is broken; the settings read before stay in force.
        """
        fresh = self._load()
        if fresh.settings is None:
            raise ConfigError(problem for problem in fresh.problems if not is_key_problem(problem))
        self._loaded = fresh
        return fresh.settings

    def _load(self) -> _Loaded:
        gathered = Gathered()
        variables = self._gather(gathered)
        document = _validated(gathered)
        if document is None:
            return _Loaded(gathered, None, None, None, tuple(gathered.problems))

        def lookup(name: str) -> str | None:
            return variables[name].value if name in variables else None

        built = build_providers(document, gathered, lookup)
        gathered.problems.extend([*built.problems, *_contradictions(document, gathered)])
        keys = [problem for problems in built.key_problems.values() for problem in problems]
        settings = None if gathered.problems else self._settings(document, built)
        return _Loaded(gathered, document, built, settings, (*gathered.problems, *keys))

    def _gather(self, gathered: Gathered) -> dict[str, Variable]:
        """Fill `gathered` from the strongest layer to the weakest; return all variables."""
        for name, value in self._flags.items():
            if value is not None:
                shown = str(value) if isinstance(value, Path) else value
                gathered.add(tuple(name.split(".")), Leaf(shown, "flag", "flag"))
        environ = {name: Variable(value, "environment", name) for name, value in self._environ.items()}
        dotenv: dict[str, Variable] = read_dotenv(self._cwd / ".env", gathered)
        for path in reversed(self._env_files):
            dotenv |= read_dotenv(path, gathered, required=True)
        # A variable that is set but empty, as compose files like to leave them, hides nothing in .env.
        variables = {**environ, **dotenv, **{name: variable for name, variable in environ.items() if variable.value}}
        add_variables(gathered, variables, known_variables(load_catalog().providers))
        self._add_files(gathered, variables)
        return variables

    def _add_files(self, gathered: Gathered, variables: Mapping[str, Variable]) -> None:
        named = variables.get(CONFIG_VARIABLE)
        chosen = self._config_file or (Path(named.value) if named and named.value else None)
        project = self._cwd / (chosen or CONFIG_FILE)
        add_file(gathered, project, str(chosen or CONFIG_FILE), required=chosen is not None)
        add_file(gathered, self._user_config, str(self._user_config))

    def _settings(self, document: ConfigDocument, built: ProvidersBuilt) -> Settings:
        home = (self._cwd / Path(document.storage.home).expanduser()).absolute()
        return Settings(
            home=home,
            database_url=document.storage.database_url or f"sqlite:///{home / 'orchestrator.db'}",
            redis_url=document.storage.redis_url,
            queue_prefix=document.storage.queue_prefix,
            providers=built.providers,
            default_provider=built.default,
            global_=document.global_,
            worker=document.worker,
            logging=document.logging,
        )

    def _effective(self) -> list[tuple[str, object]]:
        document, settings, built = self._loaded.document, self._loaded.settings, self._loaded.built
        if document is None or settings is None or built is None:
            return []
        sections = document.model_dump(by_alias=True, exclude={"llm_providers", "workflows"})
        sections["storage"] |= {
            "home": str(settings.home),
            "database_url": masked_url(settings.database_url),
            "redis_url": masked_url(settings.redis_url) if settings.redis_url else None,
        }
        sections["global"]["default_provider"] = settings.default_provider
        rows = [(f"{section}.{key}", value) for section, keys in sections.items() for key, value in keys.items()]
        tables = {f"llm_providers.{name}": shown_settings(config) for name, config in built.providers.items()}
        tables |= {f"workflows.{name}": self.get_workflow_config(name) for name in document.workflows}
        return rows + [(f"{table}.{key}", value) for table, keys in tables.items() for key, value in keys.items()]

    def _not_configured(self, wanted: str) -> OrchestratorError:
        row = load_catalog().providers.get(wanted)
        if place := self._loaded.gathered.place(("llm_providers", wanted)):
            return ConfigError(Problem("config.provider-disabled", f"provider {wanted!r} is disabled", place))
        if row and row.key_required and row.key_env:
            hint = f"export {row.key_env}, or put it in .env"
            return EnvironmentNotReady(Problem(KEY_MISSING, f"provider {wanted!r} needs a key", row.key_env, hint))
        if row:
            hint = f"add [llm_providers.{wanted}] to {CONFIG_FILE}"
            return ConfigError(Problem("config.provider-missing", f"provider {wanted!r} is not configured", "", hint))
        known = {*self.settings.providers, *load_catalog().providers}
        hint = did_you_mean(wanted, known)
        return ConfigError(Problem("config.unknown-provider", f"no provider is called {wanted!r}", "", hint))


def _validated(gathered: Gathered) -> ConfigDocument | None:
    """The document that the layers add up to; None, with the problems added, when it is not valid."""
    nested = gathered.nested()
    try:
        return ConfigDocument.model_validate(nested)
    except ValidationError as error:
        for detail in error.errors(include_input=False, include_url=False, include_context=False):
            path = tuple(str(part) for part in detail["loc"])
            gathered.problems.append(_problem(path, detail["type"], detail["msg"], gathered))
        return None


def _problem(path: SettingPath, kind: str, message: str, gathered: Gathered) -> Problem:
    """A finding of pydantic's as ours. The value itself is never repeated: it may be a secret in the wrong place."""
    place = gathered.place(path)
    if kind == "extra_forbidden" and path[-1].casefold() in _LITERAL_KEY_NAMES and path[0] == "llm_providers":
        return Problem("config.literal-key", "keys do not belong into configuration files", place, _KEY_HINT)
    if kind == "extra_forbidden":
        hint = did_you_mean(path[-1], keys_at(path[:-1]))
        return Problem("config.unknown-key", f"unknown key {dotted(path)!r}", place, hint)
    return Problem("config.invalid-value", f"{dotted(path)}: {message[:1].lower()}{message[1:]}", place)


def _contradictions(document: ConfigDocument, gathered: Gathered) -> Iterator[Problem]:
    """Values that are fine by themselves and not together, or not where they stand."""
    worker, storage = document.worker, document.storage
    if worker.lease_s <= 3 * worker.heartbeat_s:
        place = gathered.place(("worker", "lease_seconds")) or gathered.place(("worker", "heartbeat_seconds"))
        message = f"lease_seconds ({worker.lease_s:g}) must exceed three heartbeat_seconds ({worker.heartbeat_s:g})"
        yield Problem("config.lease-too-short", message, place)
    for key, url, schemes, variable in (
        ("database_url", storage.database_url, DATABASE_SCHEMES, "DATABASE_URL"),
        ("redis_url", storage.redis_url, REDIS_SCHEMES, "REDIS_URL"),
    ):
        if url is None:
            continue
        place = gathered.place(("storage", key))
        yield from address_problems(url, schemes, place)
        if has_password(url) and gathered.leaves["storage", key].is_from_file:
            hint = f"use the variable {variable}"
            yield Problem("config.literal-key", "passwords do not belong into configuration files", place, hint)
    for leaf in gathered.leaves.values():
        if leaf.is_from_file and isinstance(leaf.value, str) and is_vendor_key(leaf.value):
            yield Problem("config.literal-key", "keys do not belong into configuration files", leaf.place, _KEY_HINT)
