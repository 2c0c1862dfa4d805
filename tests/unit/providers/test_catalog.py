"""The catalog names only what works, and every row can be opened."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from providers.base import DIALECTS, ProviderSettings, open_provider
from providers.catalog import find_model, find_provider, load_catalog, provider_names, resolve_model
from providers.http import open_client


@pytest.mark.parametrize("name", provider_names())
def test_every_row_opens(name: str) -> None:
    row = find_provider(name)
    assert row is not None
    assert row.dialect in DIALECTS
    settings = ProviderSettings(name, row.dialect, row.base_url, SecretStr("sk-test"), row.timeout_s, row.options)
    assert open_provider(settings, open_client).name == name


def test_default_models_of_known_services_have_a_row() -> None:
    for name in ("openai", "simulator"):
        row = find_provider(name)
        assert row is not None
        assert row.default_model is not None
        assert find_model(name, row.default_model) is not None


def test_names_that_vendors_shut_down_stay_accepted() -> None:
    assert resolve_model("openai", "gpt-4") == "gpt-6-sol"
    assert resolve_model("openrouter", "claude-3") == "anthropic/claude-sonnet-5.5"
    assert resolve_model("openrouter", "gemini-pro") == "google/gemini-3.8-flash"
    assert resolve_model("openai", "gpt-6-luna") == "gpt-6-luna"


def test_aliases_lead_to_known_services() -> None:
    catalog = load_catalog()
    assert all(alias.provider in catalog.providers for alias in catalog.aliases)
    assert all(model.provider in catalog.providers for model in catalog.models)


def test_a_dated_model_has_the_row_of_its_family() -> None:
    row = find_model("openai", "gpt-4o-2024-08-06")
    assert row is not None
    assert (row.name, row.output) == ("gpt-4o", 16_384)
    assert find_model("openai", "gpt-4o-miniature") is None


def test_an_unknown_dialect_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown dialect 'morse', expected one of openai, simulator"):
        open_provider(ProviderSettings("x", "morse"), open_client)
