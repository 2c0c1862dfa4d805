"""Completes what was configured for each provider with its row of the catalog and with its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.addresses import SERVICE_SCHEMES, address_problems
from orchestrator.config_layers import Gathered
from orchestrator.errors import Problem, did_you_mean
from orchestrator.money import usd_or_none
from orchestrator.provider_keys import KeysRead, Lookup, looks_like_key, read_keys
from orchestrator.settings import ConfigDocument, LLMProviderConfig, ProviderSection, nusd_of
from providers.base import DIALECTS
from providers.catalog import ProviderEntry, at_address, load_catalog
from providers.pricing import Price, override_price

SIMULATOR = "simulator"
DEFAULT_MAX_TOKENS = 4_000
DEFAULT_TIMEOUT_S = 600.0

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(slots=True)
class ProvidersBuilt:
    """The providers, and everything that is wrong with any of them.

    Attributes:
        providers: The enabled ones by name, those with bad keys included.
        default: The default provider's name; empty when there is none, which is a problem too.
        problems: What is wrong with the configuration.
        key_problems: What is wrong with the keys, by provider; the others can still be used.
        warnings: What is odd and does no harm.
    """

    providers: dict[str, LLMProviderConfig] = field(default_factory=dict[str, LLMProviderConfig])
    default: str = ""
    problems: list[Problem] = field(default_factory=list[Problem])
    key_problems: dict[str, tuple[Problem, ...]] = field(default_factory=dict[str, tuple[Problem, ...]])
    warnings: list[Problem] = field(default_factory=list[Problem])


def build_providers(document: ConfigDocument, gathered: Gathered, lookup: Lookup) -> ProvidersBuilt:
    """Build every provider that is configured.

    Configured are those with a table in a file or a variable of their own, those whose key is set, the default and the
    fallback provider, and always the simulator.
    """
    built = ProvidersBuilt()
    for name in _configured_names(document, lookup):
        section = document.llm_providers.get(name, ProviderSection())
        if not section.enabled:
            continue
        row = load_catalog().providers.get(name)
        place = gathered.place(("llm_providers", name)) or name
        if faults := list(_section_problems(name, section, row, gathered, place)):
            built.problems.extend(faults)
            continue
        row = at_address(row, section.base_url) if row else None
        read = _read_keys(section, row, lookup)
        built.warnings.extend(read.warnings)
        if read.problems:
            built.key_problems[name] = read.problems
        if 0 in {section.rate_limit_rpm, section.rate_limit_tpm}:
            built.warnings.append(Problem("config.paused", f"provider {name!r} is paused by a limit of 0", place))
        built.providers[name] = _complete(name, section, row, read, document.global_.timeout_s)
    _choose_default(built, document, gathered)
    return built


def is_key_problem(problem: Problem) -> bool:
    """Whether a problem concerns a key, which is the environment's fault and not the configuration's."""
    return problem.code.startswith("key.")


def shown_settings(config: LLMProviderConfig) -> Mapping[str, object]:
    """A provider's settings by the names of the file, for display: keys by variable and fingerprint only."""
    return {
        "enabled": True,
        "dialect": config.dialect,
        "api_key_env": [f"{key.variable} ({key.fingerprint})" for key in config.api_keys],
        "base_url": config.base_url,
        "default_model": config.default_model,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "rate_limit_rpm": config.rate_limit_rpm,
        "rate_limit_tpm": config.rate_limit_tpm,
        "rate_limit_itpm": config.rate_limit_itpm,
        "rate_limit_otpm": config.rate_limit_otpm,
        "rate_limit_rpd": config.rate_limit_rpd,
        "rate_limit_day_zone": config.day_zone,
        "shared_limits": list(config.shared_limits),
        "concurrency": config.concurrency,
        "burst": config.burst,
        "timeout_seconds": config.timeout_s,
        "allow_unpriced": config.allow_unpriced,
        "cost_limit_usd": usd_or_none(config.cost_limit_nusd),
        "cli_path": config.cli_path,
        "project_path": config.project_path,
    }


def _configured_names(document: ConfigDocument, lookup: Lookup) -> list[str]:
    rows = load_catalog().providers
    with_key = [name for name, row in rows.items() if row.key_env and _is_set(row.key_env, lookup)]
    chosen = (document.global_.default_provider, document.global_.fallback_provider)
    asked_for = [name for name in chosen if name and name in rows]
    return list(dict.fromkeys([*document.llm_providers, *with_key, *asked_for, SIMULATOR]))


def _is_set(variable: str, lookup: Lookup) -> bool:
    return bool((lookup(variable) or "").strip() or lookup(f"{variable}_FILE"))


def _section_problems(
    name: str, section: ProviderSection, row: ProviderEntry | None, gathered: Gathered, place: str
) -> Iterator[Problem]:
    def at(key: str) -> str:
        return gathered.place(("llm_providers", name, key)) or place

    if row is None and section.dialect is None:
        hint = f"{did_you_mean(name, load_catalog().providers)} A name of your own needs dialect and base_url"
        yield Problem("config.unknown-provider", f"no provider is called {name!r}", place, hint)
    if section.dialect and section.dialect not in DIALECTS:
        hint = did_you_mean(section.dialect, DIALECTS)
        yield Problem("config.unknown-dialect", f"unknown dialect {section.dialect!r}", at("dialect"), hint)
    if row is None and section.dialect == "openai" and section.base_url is None:
        yield Problem("config.missing-address", f"provider {name!r} needs a base_url", place)
    if section.base_url:
        yield from address_problems(section.base_url, SERVICE_SCHEMES, at("base_url"))
    if section.simulate is not None and (section.dialect or (row and row.dialect)) != SIMULATOR:
        yield Problem("config.not-a-simulator", "simulate is for simulators only", at("simulate"))
    yield from _variable_problems(section, at("api_key_env"))


def _variable_problems(section: ProviderSection, place: str) -> Iterator[Problem]:
    for variable in _variables(section, None):
        if looks_like_key(variable):
            hint = "put the key into a variable, and the variable's name here"
            yield Problem("config.literal-key", "api_key_env holds what looks like a key", place, hint)
        elif not _VARIABLE.fullmatch(variable):
            yield Problem("config.invalid-value", "api_key_env is the name of a variable", place)


def _variables(section: ProviderSection, row: ProviderEntry | None) -> list[str]:
    match section.api_key_env:
        case str(variable):
            return [variable]
        case list(variables):
            return variables
        case None:
            return [row.key_env] if row and row.key_env else []


def _read_keys(section: ProviderSection, row: ProviderEntry | None, lookup: Lookup) -> KeysRead:
    variables = _variables(section, row)
    is_required = section.api_key_env is not None or bool(row and row.key_required)
    return read_keys(variables, is_required and bool(variables), lookup)


def _complete(
    name: str, section: ProviderSection, row: ProviderEntry | None, read: KeysRead, timeout_s: float | None
) -> LLMProviderConfig:
    """The provider with every gap filled: its own section first, then the global setting, then the catalog."""
    catalog_timeout_s = row.timeout_s if row else DEFAULT_TIMEOUT_S
    programme = {"cli_path": section.cli_path, "project_path": section.project_path}
    options: dict[str, object] = {**(row.options if row else {}), **(section.options or {}), **(section.simulate or {})}
    return LLMProviderConfig(
        name=name,
        dialect=section.dialect or (row.dialect if row else ""),
        base_url=section.base_url or (row.base_url if row else None),
        api_keys=read.keys,
        default_model=section.default_model or (row.default_model if row else None),
        max_tokens=section.max_tokens or DEFAULT_MAX_TOKENS,
        temperature=section.temperature,
        rate_limit_rpm=_first(section.rate_limit_rpm, row.rpm if row else None),
        rate_limit_tpm=_first(section.rate_limit_tpm, row.tpm if row else None),
        rate_limit_itpm=_first(section.rate_limit_itpm, row.itpm if row else None),
        rate_limit_otpm=_first(section.rate_limit_otpm, row.otpm if row else None),
        rate_limit_rpd=_first(section.rate_limit_rpd, row.rpd if row else None),
        day_zone=section.rate_limit_day_zone or (row.day_zone if row else "UTC"),
        shared_limits=tuple(section.shared_limits if section.shared_limits is not None else row.shared if row else ()),
        concurrency=_first(section.concurrency, row.concurrency if row else None),
        burst=_first(section.burst, row.burst if row else None),
        timeout_s=section.timeout_seconds or timeout_s or catalog_timeout_s,
        local=bool(row and row.local),
        price=_own_price(section),
        allow_unpriced=section.allow_unpriced,
        cli_path=section.cli_path,
        project_path=section.project_path,
        cost_limit_nusd=nusd_of(section.cost_limit_usd),
        options={**options, **{key: value for key, value in programme.items() if value is not None}},
    )


def _first(own: int | None, other: int | None) -> int | None:
    return other if own is None else own


def _own_price(section: ProviderSection) -> Price | None:
    both = section.cost_per_1k_tokens
    of_input = both if section.cost_per_1k_input_tokens is None else section.cost_per_1k_input_tokens
    of_output = both if section.cost_per_1k_output_tokens is None else section.cost_per_1k_output_tokens
    per_million = {"input": of_input, "output": of_output}
    return override_price({key: None if usd is None else usd * 1_000 for key, usd in per_million.items()})


def _choose_default(built: ProvidersBuilt, document: ConfigDocument, gathered: Gathered) -> None:
    """Check the default and the fallback provider, and pick the default where none is named."""
    for key, wanted in (
        ("default_provider", document.global_.default_provider),
        ("fallback_provider", document.global_.fallback_provider),
    ):
        if wanted and wanted not in built.providers:
            is_disabled = wanted in document.llm_providers and not document.llm_providers[wanted].enabled
            state = "is disabled" if is_disabled else "is not configured"
            hint = None if is_disabled else did_you_mean(wanted, {*built.providers, *load_catalog().providers})
            place = gathered.place(("global", key))
            built.problems.append(Problem("config.unknown-provider", f"{key} {wanted!r} {state}", place, hint))
    real = [name for name in built.providers if name != SIMULATOR]
    built.default = document.global_.default_provider or next(iter([*real, *built.providers]), "")
    if not built.providers and not built.problems:
        built.problems.append(Problem("config.no-provider", "every provider is disabled", "llm_providers"))
