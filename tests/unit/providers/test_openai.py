"""Which schemas OpenAI's strict mode takes."""

from __future__ import annotations

from typing import Any

import pytest

from providers.openai import is_strict

CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({**CLOSED, "properties": {"a": {"type": "string"}}, "required": ["a"]}, True),
        ({**CLOSED, "properties": {"a": {"type": "string"}}, "required": []}, False),
        ({"type": "object", "properties": {}, "required": []}, False),
        ({**CLOSED, "properties": {"uniqueItems": {"type": "string"}}, "required": ["uniqueItems"]}, True),
        ({**CLOSED, "properties": {"a": {"type": "array", "items": {"type": "object"}}}, "required": ["a"]}, False),
        ({**CLOSED, "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}, False),
        (
            {**CLOSED, "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"], "$defs": {"b": {"oneOf": []}}},
            False,
        ),
    ],
)
def test_strict_mode_wants_closed_objects_and_known_keywords(schema: dict[str, Any], expected: bool) -> None:
    assert is_strict(schema) is expected
