"""Log records are single lines without secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from orchestrator.logs import MASK, Logger, escape_control, mask_secrets

KEY = "sk-" + "a1B2" * 8


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def records() -> Callable[[], list[dict[str, Any]]]:
    stream = io.StringIO()
    Logger.init("info", "json", stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_have_fields_level_and_time(records: Callable[[], list[dict[str, Any]]]) -> None:
    Logger.log_workflow("run.started", "r1", items=3)
    Logger.log_llm_call("call.settled", "c1", cost_nusd=5, tokens={"input": 1})
    first, second = records()
    assert (first["event"], first["run_id"], first["items"], first["level"]) == ("run.started", "r1", 3, "info")
    assert first["timestamp"].endswith("Z")
    assert (second["call_id"], second["cost_nusd"], second["tokens"]) == ("c1", 5, {"input": 1})


def test_text_of_prompts_shows_at_debug_only(records: Callable[[], list[dict[str, Any]]]) -> None:
    Logger.log_text("call.sent", "c1", prompt="secret plan")
    assert records() == []


def test_secrets_are_masked_by_name_and_by_form(records: Callable[[], list[dict[str, Any]]]) -> None:
    logging.getLogger("other").warning("key is %s in %s", KEY, {"Authorization": f"Bearer {KEY}"})
    nested = {"headers": [{"x-api-key": "plain", "text": f"https://h/v1?key={KEY}&x=1"}]}
    Logger.log_errors("call.failed", RuntimeError(f"bad {KEY}"), api_key="plain", request=nested)
    Logger.log_errors("db.lost", url="postgresql://me:hunter2@host/db")
    text = json.dumps(records())
    assert KEY not in text
    assert "plain" not in text
    assert "hunter2" not in text
    assert text.count(MASK) >= 6


def test_a_record_is_one_line_whatever_it_holds(records: Callable[[], list[dict[str, Any]]]) -> None:
    Logger.log_workflow("run.started", 'r1\n{"event": "forged"}', note="\x1b[31mred\u202e")
    (record,) = records()
    assert record["run_id"] == 'r1\\n{"event": "forged"}'
    assert record["note"] == "\\x1b[31mred\\u202e"


def test_console_records_cannot_be_forged_either() -> None:
    stream = io.StringIO()
    Logger.init("info", "console", stream)
    try:
        raise ValueError("first\n2026-01-01 [info] forged")
    except ValueError as error:
        Logger.log_errors("call.failed", error, note="a\nb")
    lines = stream.getvalue().splitlines()
    assert "call.failed" in lines[0]
    assert "a\\nb" in lines[0]
    assert all(line.startswith("  ") for line in lines[1:])


def test_http_libraries_are_quiet(records: Callable[[], list[dict[str, Any]]]) -> None:
    Logger.init("debug", "json", io.StringIO())
    for name in ("httpx", "httpcore", "aiohttp", "aiohttp.client"):
        assert logging.getLogger(name).getEffectiveLevel() == logging.WARNING


def test_bound_ids_reach_every_record(records: Callable[[], list[dict[str, Any]]]) -> None:
    with structlog.contextvars.bound_contextvars(shard="s1"):
        logging.getLogger("library").warning("hello")
    assert records()[0]["shard"] == "s1"


@pytest.mark.parametrize(
    "text", [KEY, "AIza" + "x1Y" * 12, f"Bearer {KEY}", "https://h/?key=abcdef", "redis://:hunter2@h", "api_key=abcdef"]
)
def test_known_forms_of_secrets(text: str) -> None:
    masked = mask_secrets(text)
    assert MASK in masked
    assert not any(secret in masked for secret in (KEY, "x1Y", "abcdef", "hunter2"))


def test_harmless_text_stays() -> None:
    text = "step 3 of 5: 12:30, tokens=40, sketch, ask-me"
    assert escape_control(mask_secrets(text)) == text
