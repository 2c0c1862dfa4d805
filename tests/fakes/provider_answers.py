"""What the fake provider says: a valid instance of the asked schema, or a sentence. Written apart from the product."""

from __future__ import annotations

import json
from typing import Any

WORDS = ["clear", "useful", "stable", "honest", "small", "careful", "open", "tested", "quick", "friendly"]


def content_for(body: dict[str, Any], chance: int) -> str:
    """Return the message content for a request; `chance` is any non-negative integer, equal for equal prompts."""
    form = body.get("response_format") or {}
    match form.get("type"):
        case "json_schema":
            return json.dumps(instance(form["json_schema"]["schema"], chance, form["json_schema"]["schema"]))
        case "json_object":
            return json.dumps({"answer": phrase(chance)})
        case _:
            return f"The fake service finds this {phrase(chance)}."


def phrase(chance: int) -> str:
    """Return three words."""
    return " ".join(WORDS[(chance >> shift) % len(WORDS)] for shift in (0, 5, 11))


def instance(schema: Any, chance: int, root: Any) -> Any:  # noqa: C901  # one branch per kind of schema
    """Return a value that satisfies the schema (the subset that structured output knows)."""
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].lstrip("#/").split("/"):
            target = target[part]
        return instance(target, chance, root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][chance % len(schema["enum"])]
    if "anyOf" in schema:
        return instance(schema["anyOf"][0], chance, root)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    match kind:
        case "object":
            parts = schema.get("properties", {})
            return {name: instance(part, chance * 31 + at + 7, root) for at, (name, part) in enumerate(parts.items())}
        case "array":
            count = max(schema.get("minItems", 1), min(schema.get("maxItems", 2), 2))
            return [instance(schema["items"], chance * 17 + at, root) for at in range(count)]
        case "integer":
            low = int(schema.get("minimum", 0))
            return low + chance % (int(schema.get("maximum", low + 9)) - low + 1)
        case "number":
            low = schema.get("minimum", 0)
            return round(low + (schema.get("maximum", low + 1) - low) * (chance % 1000) / 1000, 4)
        case "boolean":
            return chance % 2 == 0
        case "null":
            return None
        case _:
            text = phrase(chance)
            return text[: schema["maxLength"]] if "maxLength" in schema else text.ljust(schema.get("minLength", 0), ".")
