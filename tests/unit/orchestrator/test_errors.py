"""Problems read well, errors carry their data, and exit codes keep their numbers."""

from __future__ import annotations

import pickle

import pytest

from orchestrator.errors import (
    AnswerError,
    BudgetExceeded,
    ConfigError,
    EnvironmentNotReady,
    ExitCode,
    InvalidInput,
    OrchestratorError,
    Problem,
    RunNotFound,
    WorkflowError,
    did_you_mean,
    suggest,
)

PROBLEM = Problem("config.unknown-key", "unknown key 'modle'", "llm-orchestrator.toml:3:1", "did you mean 'model'?")


def test_a_problem_renders_code_place_message_and_help() -> None:
    assert PROBLEM.render() == (
        "error[config.unknown-key] llm-orchestrator.toml:3:1: unknown key 'modle'\n  help: did you mean 'model'?"
    )
    assert Problem("x.y", "no place", "").render() == "error[x.y] no place"


def test_exit_codes_are_the_published_ones() -> None:
    published = [0, 1, 2, 3, 4, 5, 6, 100, 130, 143]
    assert sorted(ExitCode) == published


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(PROBLEM), ExitCode.INVALID_INPUT),
        (WorkflowError([PROBLEM]), ExitCode.INVALID_INPUT),
        (InvalidInput([]), ExitCode.INVALID_INPUT),
        (EnvironmentNotReady([PROBLEM]), ExitCode.NOT_READY),
        (RunNotFound("abc", ["abcd", "abce"]), ExitCode.USAGE),
        (BudgetExceeded("run", 10**9, 2 * 10**9), ExitCode.STOPPED),
        (AnswerError("not a number", "score"), ExitCode.ITEMS_FAILED),
    ],
)
def test_every_error_knows_its_exit_code_and_survives_pickling(error: OrchestratorError, code: ExitCode) -> None:
    assert error.exit_code is code
    assert isinstance(error, OrchestratorError)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)


def test_messages_say_what_to_do_next() -> None:
    assert str(RunNotFound("ab", ["abcd", "abce"])).endswith("abcd, abce")
    assert str(BudgetExceeded("run", 1_500_000_000, 1_500_000_001)) == (
        "budget of run is 1.50 USD, and 1.500000001 USD would be needed"
    )
    assert str(ConfigError([PROBLEM, PROBLEM])).count("error[") == 2


def test_suggestions() -> None:
    assert suggest("openia", ["openai", "ollama"]) == "openai"
    assert suggest("OPENAI", ["openai"]) == "openai"
    assert suggest("zzz", ["openai"]) is None
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
