"""The names that the owner's design promises, and the methods they must have."""

from importlib import import_module

import pytest

import orchestrator

PROMISED = {
    "orchestrator.manager.WorkflowManager": (
        "execute_workflow execute_step handle_dependencies track_progress select_provider"
    ),
    "orchestrator.orchestration.WorkflowOrchestrator": "orchestrate manage_state coordinate_steps report_progress",
    "prompts.engine.PromptEngine": "load_template render_prompt validate_variables cache_template",
    "workers.client.LLMClient": "send_prompt track_usage handle_rate_limits validate_response select_provider",
    "orchestrator.results.ResultProcessor": "parse_response validate_quality detect_errors aggregate_results",
    "orchestrator.database.Database": (
        "save_workflow_execution save_prompt_execution track_llm_usage cache_result transaction migrate"
    ),
    "orchestrator.files.FileManager": "load_prompts save_results backup_data cleanup_cache",
    "orchestrator.config.ConfigManager": "get_llm_config get_workflow_config validate reload",
    "orchestrator.logs.Logger": "init log_workflow log_llm_call log_errors",
}


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_name_has_its_methods(name: str) -> None:
    module, _, class_name = name.rpartition(".")
    promised = getattr(import_module(module), class_name)
    missing = [method for method in PROMISED[name].split() if not callable(getattr(promised, method, None))]
    assert missing == []


def test_the_door_of_the_package_opens_to_every_public_name() -> None:
    assert all(getattr(orchestrator, name) is not None for name in orchestrator.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        orchestrator.nothing  # noqa: B018 - looking is the test
