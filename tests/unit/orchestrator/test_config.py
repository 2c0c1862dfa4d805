"""Settings come from the strongest source that has them, and whatever is wrong says where."""

from __future__ import annotations

import re
from decimal import Decimal
from itertools import product
from pathlib import Path

import pytest
from pydantic import BaseModel

from orchestrator.config import ConfigManager
from orchestrator.config_layers import keys_at, known_variables
from orchestrator.errors import ConfigError, EnvironmentNotReady, Problem
from orchestrator.settings import ConfigDocument, GlobalSettings, LoggingSettings, StorageSection, WorkerSettings
from orchestrator.toml_source import parse_toml
from providers.catalog import load_catalog

REPOSITORY = Path(__file__).parents[3]
KEY = "sk-" + "a1B2" * 10


class Project:
    """A directory with configuration files, and an environment."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(
        self,
        toml: str = "",
        environ: dict[str, str] | None = None,
        dotenv: str = "",
        flags: dict[str, object] | None = None,
    ) -> ConfigManager:
        if toml:
            (self.root / "llm-orchestrator.toml").write_text(toml)
        if dotenv:
            (self.root / ".env").write_text(dotenv)
        return ConfigManager(flags, cwd=self.root, environ=environ or {}, user_config=self.root / "user.toml")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def only_problem(manager: ConfigManager) -> Problem:
    problems = manager.validate()
    assert len(problems) == 1, problems
    return problems[0]


def test_nothing_configured_is_local_mode_with_the_simulator(project: Project) -> None:
    settings = project.load().settings
    assert settings.default_provider == "simulator"
    assert list(settings.providers) == ["simulator"]
    assert settings.home == project.root / "data"
    assert settings.database_url == f"sqlite:///{project.root}/data/orchestrator.db"
    assert settings.redis_url is None
    assert settings.is_local
    assert (settings.worker.concurrency, settings.worker.shards, settings.worker.lanes) == (1000, 256, 4)
    assert (settings.worker.heartbeat_s, settings.worker.lease_s, settings.worker.drain_s) == (5, 16, 60)
    assert (settings.worker.window_size, settings.worker.shard_size) == (1000, 50)
    assert settings.global_.cache_ttl_s == 604_800
    assert settings.global_.cost_limit_nusd is None


@pytest.mark.parametrize("present", list(product([False, True], repeat=5)))
def test_the_strongest_source_wins(project: Project, present: tuple[bool, ...]) -> None:
    """All 32 combinations of flag, environment, .env, project file and user file; the value tells its source."""
    flag, environment, dotenv, toml, user = present
    if user:
        (project.root / "user.toml").write_text("[global]\nmax_retries = 14\n")
    manager = project.load(
        toml="[global]\nmax_retries = 13\n" if toml else "",
        dotenv="LLM_MAX_RETRIES=12\n" if dotenv else "",
        environ={"LLM_MAX_RETRIES": "11"} if environment else {},
        flags={"global.max_retries": 10} if flag else {"global.max_retries": None},
    )
    expected = next((10 + rank for rank, is_there in enumerate(present) if is_there), 3)
    assert manager.settings.global_.max_retries == expected
    words = {
        10: "flag",
        11: "environment (LLM_",
        12: ".env (.env:1)",
        13: "llm-orchestrator.toml:2:1",
        14: "user.toml:2",
    }
    assert words.get(expected, "default") in manager.sources["global.max_retries"]


def test_sources_combine_value_by_value(project: Project) -> None:
    toml = '[llm_providers.openai]\nmax_tokens = 10\ndefault_model = "a"\n'
    config = project.load(toml, {"OPENAI_DEFAULT_MODEL": "b", "OPENAI_API_KEY": KEY}).get_llm_config("openai")
    assert (config.max_tokens, config.default_model) == (10, "b")
    assert config.rate_limit_rpm == load_catalog().providers["openai"].rpm


def test_an_empty_table_hides_nothing_of_a_weaker_source(project: Project) -> None:
    (project.root / "user.toml").write_text("[llm_providers.simulator]\nmax_tokens = 7\n")
    assert project.load("[llm_providers.simulator]\n").get_llm_config("simulator").max_tokens == 7


def test_a_blank_variable_counts_as_unset(project: Project) -> None:
    settings = project.load(environ={"REDIS_URL": "", "LLM_MAX_RETRIES": " "}, dotenv="REDIS_URL=redis://h").settings
    assert settings.redis_url == "redis://h"
    assert settings.global_.max_retries == 3


def test_the_owners_variables_are_all_known() -> None:
    known = known_variables(load_catalog().providers)
    suffixes = ["BASE_URL", "DEFAULT_MODEL", "MAX_TOKENS", "TEMPERATURE"]
    wanted = {f"{name}_{suffix}" for name in ("OPENAI", "OPENROUTER") for suffix in suffixes}
    wanted |= {"OLLAMA_BASE_URL", "OLLAMA_DEFAULT_MODEL", "OLLAMA_TIMEOUT_SECONDS", "LLM_DEFAULT_PROVIDER"}
    wanted |= {"LLM_FALLBACK_PROVIDER", "LLM_MAX_RETRIES", "LLM_TIMEOUT_SECONDS", "LLM_COST_LIMIT_USD"}
    wanted |= {"DATABASE_URL", "REDIS_URL", "LLM_ORCHESTRATOR_HOME", "LLM_ORCHESTRATOR_WORKER_LEASE_SECONDS"}
    assert wanted <= set(known)


def test_a_key_in_the_environment_enables_its_provider_and_makes_it_the_default(project: Project) -> None:
    settings = project.load(environ={"OPENAI_API_KEY": KEY}).settings
    assert settings.default_provider == "openai"
    assert list(settings.providers) == ["openai", "simulator"]


def test_keys_form_a_pool_and_show_in_nothing(project: Project, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}3\n")
    toml = '[llm_providers.openai]\napi_key_env = ["A_KEY", "B_KEY", "C_KEY"]\n'
    manager = project.load(toml, {"A_KEY": f"{KEY}1,{KEY}2", "B_KEY_FILE": str(tmp_path / "key")})
    config = manager.get_llm_config("openai")
    assert [key.secret.get_secret_value()[-1] for key in config.api_keys] == ["1", "2", "3"]
    assert len({key.fingerprint for key in config.api_keys}) == 3
    assert config.provider_settings().api_key == config.api_keys[0].secret
    assert config.provider_settings(config.api_keys[2]).api_key == config.api_keys[2].secret
    shown = repr(manager.settings) + repr(manager.values()) + repr(manager.sources)
    assert KEY not in shown
    assert config.api_keys[0].fingerprint in shown


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "key.missing"),
        ("  ", "key.invalid"),
        ("sk-xxx", "key.invalid"),
        ("your-key-here", "key.invalid"),
        ("sk-your-api-key", "key.invalid"),
        (f"'{KEY}'", "key.invalid"),
        (f"{KEY} ", "key.invalid"),
        (f"{KEY}\nB={KEY}", "key.invalid"),
        ("<insert key>", "key.invalid"),
        ("$OPENAI", "key.invalid"),
    ],
)
def test_a_bad_key_is_named_by_its_variable_only(project: Project, value: str | None, code: str) -> None:
    environ = {} if value is None else {"OPENAI_API_KEY": value}
    manager = project.load("[llm_providers.openai]\n", environ)
    problem = only_problem(manager)
    assert (problem.code, problem.place) == (code, "OPENAI_API_KEY")
    assert not value or not value.strip() or value not in problem.render()
    assert manager.settings.providers["simulator"], "other providers stay usable"
    with pytest.raises(EnvironmentNotReady) as caught:
        manager.get_llm_config("openai")
    assert caught.value.problems == (problem,)


def test_a_newline_after_a_key_is_dropped_with_a_warning(project: Project) -> None:
    manager = project.load(environ={"OPENAI_API_KEY": f"{KEY}\n"})
    assert manager.get_llm_config("openai").api_keys[0].secret.get_secret_value() == KEY
    assert [warning.code for warning in manager.warnings] == ["key.newline"]


def test_a_key_and_a_key_file_together_are_refused(project: Project) -> None:
    problem = only_problem(project.load(environ={"OPENAI_API_KEY": KEY, "OPENAI_API_KEY_FILE": "/x"}))
    assert problem.code == "key.ambiguous"


@pytest.mark.parametrize(
    ("toml", "code", "place", "words"),
    [
        ("[gloabl]\nmax_retries = 1", "config.unknown-key", "2:1", "did you mean 'global'?"),
        ("[gloabl]", "config.unknown-key", "1:1", "did you mean 'global'?"),
        ("[global]\nmax_retires = 1", "config.unknown-key", "2:1", "did you mean 'max_retries'?"),
        ("[llm_providers.openai]\nmodle = 'x'\nenabled=false", "config.unknown-key", "2:1", "default_model"),
        ("[worker]\nconcurrency = 0", "config.invalid-value", "2:1", "worker.concurrency"),
        ("[worker]\nconcurrency = 1000000000", "config.invalid-value", "2:1", "worker.concurrency"),
        ("[worker]\nconcurrency = '10'", "config.invalid-value", "2:1", "valid integer"),
        ("[worker]\nlease_seconds = 15", "config.lease-too-short", "2:1", "three heartbeat_seconds"),
        ("[global]\nmax_retries = true", "config.invalid-value", "2:1", "valid integer"),
        ("[global]\ncost_limit_usd = 0", "config.invalid-value", "2:1", "greater than 0"),
        ("[global]\ncost_limit_usd = nan", "config.invalid-value", "2:1", "cost_limit_usd"),
        ("[global]\ncost_limit_usd = 'ten'", "config.invalid-value", "2:1", "cost_limit_usd"),
        ("[global]\ntimeout_seconds = inf", "config.invalid-value", "2:1", "timeout_seconds"),
        ("[global]\ndefault_provider = 'opnai'", "config.unknown-provider", "2:1", "did you mean 'openai'?"),
        ("[llm_providers.opnai]\nmax_tokens = 1", "config.unknown-provider", "2:1", "did you mean 'openai'?"),
        ("[llm_providers.mine]\ndialect = 'openai'", "config.missing-address", "2:1", "base_url"),
        ("[llm_providers.mine]\ndialect = 'opnai'", "config.unknown-dialect", "2:1", "did you mean 'openai'?"),
        ("[llm_providers.ollama]\nbase_url = 'file:///etc'", "config.bad-address", "2:1", "http://"),
        ("[llm_providers.ollama]\nbase_url = 'http://me:pw@h'", "config.bad-address", "2:1", "no user"),
        ("[llm_providers.ollama]\nsimulate = {seed = 1}", "config.not-a-simulator", "2:13", "simulators"),
        ("[llm_providers.ollama]\napi_key_env = 'a b'", "config.invalid-value", "2:1", "name of a variable"),
        ("[llm_providers.simulator]\nenabled = false", "config.no-provider", "", "disabled"),
        ("global = 3", "config.invalid-value", "1:1", "global"),
        ("[global]\nmax_retries = 1\nmax_retries = 2", "toml.duplicate-key", "3:1", "line 2"),
    ],
)
def test_what_is_wrong_in_a_file_says_where(project: Project, toml: str, code: str, place: str, words: str) -> None:
    manager = project.load(toml)
    problem = only_problem(manager)
    assert problem.code == code
    assert problem.place == (f"llm-orchestrator.toml:{place}" if place else "llm_providers")
    assert words in problem.render()
    with pytest.raises(ConfigError):
        _ = manager.settings


@pytest.mark.parametrize(
    "toml",
    [
        f"[llm_providers.openai]\napi_key = '{KEY}'",
        f"[llm_providers.openai]\napi_key_env = '{KEY}'",
        f"[llm_providers.openai]\noptions = {{ extra_headers = {{ auth = '{KEY}' }} }}",
        f"[storage]\ndatabase_url = 'postgresql://me:{KEY}@host/db'",
    ],
)
def test_secrets_in_a_file_are_refused_and_not_repeated(project: Project, toml: str) -> None:
    manager = project.load(toml, {"OPENAI_API_KEY": KEY})
    assert "config.literal-key" in {problem.code for problem in manager.validate()}
    assert not any(KEY in problem.render() for problem in manager.validate())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LLM_MAX_RETRIES", "1_000"),
        ("LLM_MAX_RETRIES", "three"),
        ("LLM_COST_LIMIT_USD", "-1"),
        ("LLM_COST_LIMIT_USD", "1e999"),
        ("LLM_ENABLE_CACHING", "maybe"),
        ("OPENAI_TEMPERATURE", "warm"),
        ("OPENAI_TEMPERATURE", "9"),
        ("DATABASE_URL", "mysql://me:secret@h/db"),
        ("REDIS_URL", "http://localhost"),
        ("LLM_ORCHESTRATOR_LOG_LEVEL", "loud"),
    ],
)
def test_a_bad_variable_is_a_problem_with_its_name(project: Project, variable: str, value: str) -> None:
    problem = only_problem(project.load(environ={variable: value, "OPENAI_API_KEY": KEY}))
    assert problem.place == variable
    assert value not in problem.render()


def test_variables_are_read_as_their_setting_wants(project: Project) -> None:
    environ = {"LLM_ENABLE_CACHING": "no", "LLM_COST_LIMIT_USD": "0.1", "LLM_ORCHESTRATOR_WORKER_DRAIN_SECONDS": "2.5"}
    settings = project.load(environ=environ).settings
    assert settings.global_.enable_caching is False
    assert settings.global_.cost_limit_usd == Decimal("0.1")
    assert settings.global_.cost_limit_nusd == 100_000_000
    assert settings.worker.drain_s == 2.5


def test_a_misspelt_variable_is_a_warning(project: Project) -> None:
    environ = {"LLM_ORCHESTRATOR_HOEM": "x", "LLM_DEFALT_PROVIDER": "y", "LLM_OF_SOMEBODY_ELSE": "z"}
    manager = project.load(environ=environ)
    assert manager.validate() == []
    assert [warning.place for warning in manager.warnings] == ["LLM_ORCHESTRATOR_HOEM", "LLM_DEFALT_PROVIDER"]
    assert manager.warnings[0].hint == "did you mean 'LLM_ORCHESTRATOR_HOME'?"


def test_dotenv_files_are_read_as_documented(project: Project) -> None:
    lines = ["export LLM_MAX_RETRIES=7\r", "REDIS_URL='redis://h/#1'  # comment", "HOMELESS=$HOME", "what is this"]
    manager = project.load(dotenv="\n".join(lines))
    assert manager.settings.global_.max_retries == 7
    assert manager.settings.redis_url == "redis://h/#1"
    assert [warning.place for warning in manager.warnings] == [".env:4"]


def test_a_dotenv_that_is_a_directory_is_a_problem(project: Project) -> None:
    (project.root / ".env").mkdir()
    assert only_problem(project.load()).code == "file.not-regular"


def test_all_problems_are_reported_together(project: Project) -> None:
    manager = project.load("[worker]\nlanes = 0\n[global]\nmax_retires = 1\n", {"LLM_TIMEOUT_SECONDS": "x"})
    assert [problem.code for problem in manager.validate()] == [
        "config.invalid-value",
        "config.unknown-key",
        "config.invalid-value",
    ]


def test_a_name_of_ones_own_with_a_dialect(project: Project) -> None:
    toml = '[llm_providers.our-gpu]\ndialect = "openai"\nbase_url = "http://gpu:8000/v1"\ndefault_model = "m"\n'
    manager = project.load(toml + "cost_per_1k_tokens = 0.03\ncost_per_1k_output_tokens = 0.06\n")
    config = manager.get_llm_config()
    assert (config.name, config.dialect, config.api_keys) == ("our-gpu", "openai", ())
    assert config.price is not None
    assert (config.price.input_npm, config.price.output_npm) == (30_000_000_000, 60_000_000_000)


def test_simulators_take_their_options(project: Project) -> None:
    toml = '[llm_providers.slow]\ndialect = "simulator"\nsimulate = { latency_s = 2.0, seed = 7 }\n'
    config = project.load(toml).get_llm_config("slow")
    assert config.options["latency_s"] == 2.0
    assert config.options["seed"] == 7


def test_an_unconfigured_provider_tells_how_to_configure_it(project: Project) -> None:
    manager = project.load("[llm_providers.litellm]\nenabled = false\n")
    with pytest.raises(EnvironmentNotReady, match="OPENAI_API_KEY"):
        manager.get_llm_config("openai")
    with pytest.raises(ConfigError, match=r"add \[llm_providers.ollama\]"):
        manager.get_llm_config("ollama")
    with pytest.raises(ConfigError, match="did you mean 'openai'"):
        manager.get_llm_config("openia")
    with pytest.raises(ConfigError, match="disabled"):
        manager.get_llm_config("litellm")


def test_a_limit_of_zero_is_a_pause_with_a_warning(project: Project) -> None:
    manager = project.load("[llm_providers.ollama]\nrate_limit_rpm = 0\n")
    assert manager.get_llm_config("ollama").rate_limit_rpm == 0
    assert [warning.code for warning in manager.warnings] == ["config.paused"]


def test_workflow_settings(project: Project) -> None:
    manager = project.load('[workflows.rank]\nmodel = "m"\nvariables = { team = "x" }\n')
    assert manager.get_workflow_config("rank") == {"model": "m", "variables": {"team": "x"}}
    assert manager.get_workflow_config("other") == {}


def test_reload_takes_what_is_new_and_keeps_what_was_when_that_is_broken(project: Project) -> None:
    manager = project.load("[global]\nmax_retries = 1\n")
    (project.root / "llm-orchestrator.toml").write_text("[global]\nmax_retries = 2\n")
    assert manager.reload().global_.max_retries == 2
    (project.root / "llm-orchestrator.toml").write_text("[global]\nmax_retries = \n")
    with pytest.raises(ConfigError):
        manager.reload()
    assert manager.settings.global_.max_retries == 2


def test_a_configuration_file_that_was_asked_for_must_be_there(project: Project) -> None:
    problem = only_problem(project.load(environ={"LLM_ORCHESTRATOR_CONFIG": "other.toml"}))
    assert (problem.code, problem.place) == ("file.missing", "other.toml")


def test_passwords_in_addresses_are_masked(project: Project) -> None:
    environ = {"DATABASE_URL": "postgresql://me:hunter2@h/db?sslmode=require", "REDIS_URL": "redis://:hunter2@h"}
    manager = project.load(environ=environ)
    assert "hunter2" in manager.settings.database_url
    assert "hunter2" not in repr(manager.settings) + repr(manager.values())
    assert manager.values()["storage.database_url"] == "postgresql://me:***@h/db"


def test_every_effective_setting_has_a_source(project: Project) -> None:
    manager = project.load("[llm_providers.openai]\nmax_tokens = 5\n", {"OPENAI_API_KEY": KEY})
    assert set(manager.values()) <= set(manager.sources)


EXAMPLE = REPOSITORY / "llm-orchestrator.example.toml"


def test_the_example_shows_the_defaults() -> None:
    data, _ = parse_toml(EXAMPLE)
    models: dict[str, BaseModel] = {
        "global": GlobalSettings(),
        "worker": WorkerSettings(),
        "storage": StorageSection(),
        "logging": LoggingSettings(),
    }
    for section, model in models.items():
        defaults = {key: value for key, value in model.model_dump(by_alias=True).items() if value is not None}
        assert data[section] == defaults
    assert set(data) == set(models)


def test_the_example_names_every_setting_and_holds_with_all_of_them_set(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    opened = re.sub(r"(?m)^# (?=\[|\w+ = )", "", text)
    (tmp_path / "llm-orchestrator.toml").write_text(opened)
    environ = {"OPENAI_API_KEY": KEY}
    manager = ConfigManager(cwd=tmp_path, environ=environ, user_config=tmp_path / "none")
    assert manager.validate() == []
    for section in ("global", "worker", "storage", "logging"):
        assert all(re.search(rf"(?m)^{key} = ", opened) for key in keys_at((section,)))
    missing = {"cli_path", "project_path"} | {"dialect"}
    for key in set(keys_at(("llm_providers", "x"))) - missing | set(keys_at(("workflows", "x"))):
        assert re.search(rf"(?m)^{key} = ", opened), key
    assert set(ConfigDocument.model_fields) == {"llm_providers", "global_", "worker", "storage", "logging", "workflows"}


def test_the_example_environment_can_be_read(tmp_path: Path) -> None:
    text = (REPOSITORY / ".env.example").read_text()
    (tmp_path / ".env").write_text(text)
    untouched = ConfigManager(cwd=tmp_path, environ={}, user_config=tmp_path / "none")
    assert untouched.validate() == []
    assert list(untouched.settings.providers) == ["simulator"]
    (tmp_path / ".env").write_text(re.sub(r"(?m)^# (?=[A-Z_]+=.)", "", text) + f"OPENAI_API_KEY={KEY}\n")
    opened = ConfigManager(cwd=tmp_path, environ={}, user_config=tmp_path / "none")
    assert opened.validate() == []
    assert opened.warnings == ()
