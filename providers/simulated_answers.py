"""Writes the simulator's answers: an instance of a JSON Schema, or Markdown when there is none.

Everything is a function of the subject, the question and a digest. Texts name their subject, echo what the field's
description asks for, and always say that they are simulated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from hashlib import blake2b
from typing import Any, cast

_SUBJECT = re.compile(
    r"^[\s>#*_|-]*(?:project|name|item|candidate|subject|title|repository)(?:[ _]name)?[*_]*\s*[:=|][*_\s]*(.{1,120}?)"
    r"[\s*_|`]*$",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(r"^#{1,3}\s+(.{1,120}?)\s*$", re.MULTILINE)
_MAX_DEPTH = 12
_DEFAULT_LOW, _DEFAULT_SPAN = 0.0, 10.0
_SUBJECT_SHARE = 0.8
_VERDICTS = (
    (0.25, "is weak", "Large gaps remain before it could be recommended."),
    (0.45, "is below average", "Some parts work, several need attention."),
    (0.65, "is sound", "It does what it promises, with room to improve."),
    (0.85, "is good", "Most points speak for it."),
    (1.01, "is outstanding", "It could serve others as an example."),
)


@dataclass(frozen=True, slots=True)
class _Judge:
    """What stays the same within one answer: whom it is about, how good that is (0 to 1), and the source of chance."""

    subject: str
    merit: float
    key: bytes
    root: Mapping[str, Any]

    def chance(self, place: str) -> float:
        """Return a number from 0 to 1 that belongs to a place in the answer."""
        return int.from_bytes(blake2b(place.encode(), key=self.key, digest_size=6).digest(), "big") / 2**48

    def score(self, place: str) -> float:
        """Return how good the subject looks at this place, from 0 to 1, near its general merit."""
        return _SUBJECT_SHARE * self.merit + (1 - _SUBJECT_SHARE) * self.chance(place)


def answer_text(prompt: str, schema: Mapping[str, object] | None, seed: str, key: bytes) -> str:
    """Return the simulated reply text.

    Args:
        prompt: All messages; searched for the subject's name.
        schema: JSON Schema of the answer, or None for Markdown.
        seed: Changes how good every subject is.
        key: At most 64 bytes; changes everything else.
    """
    subject = subject_of(prompt)
    digest = blake2b(f"{seed}\n{subject}".encode(), digest_size=6).digest()
    judge = _Judge(subject, int.from_bytes(digest, "big") / 2**48, key, schema or {})
    if schema is None:
        return _markdown(judge)
    return json.dumps(_value(judge, schema, "answer", 0), ensure_ascii=False)


def malformed_text(text: str, chance: int) -> str:
    """Spoil a reply: cut it in the middle, or wrap half of it in chatter."""
    half = text[: max(1, len(text) // 2)]
    return half if chance % 2 else f"Sure, here is my (simulated) answer: {half} ..."


def subject_of(prompt: str) -> str:
    """Return the name after a line such as `Project: X`, else the first heading, else a neutral phrase."""
    found = _SUBJECT.search(prompt) or _HEADING.search(prompt)
    return found.group(1).strip() if found else "the submitted item"


def _value(judge: _Judge, schema: object, place: str, depth: int) -> object:
    """Build one value that satisfies a schema; unknown keywords are ignored."""
    node = _resolved(judge, schema)
    if "const" in node:
        return node["const"]
    if node.get("enum"):
        return _choice(judge, node["enum"], place)
    match _type_of(node):
        case "object":
            return _object(judge, node, place, depth)
        case "array":
            return _array(judge, node, place, depth)
        case "integer":
            return _integer(judge, node, place)
        case "number":
            return _number(judge, node, place)
        case "boolean":
            return judge.score(place) >= 0.4
        case "null":
            return None
        case _:
            return _string(judge, node, place)


def _resolved(judge: _Judge, schema: object) -> Mapping[str, Any]:
    """Follow references and take the first real alternative, at most `_MAX_DEPTH` times."""
    node = _mapping(schema)
    for _ in range(_MAX_DEPTH):
        alternatives = [_mapping(option) for word in ("anyOf", "oneOf") for option in node.get(word, ())]
        real = [option for option in alternatives if option.get("type") != "null"]
        if isinstance(node.get("$ref"), str):
            node = _referenced(judge.root, node["$ref"])
        elif real:
            node = {**_without(node, "anyOf", "oneOf"), **real[0]}
        elif node.get("allOf"):
            node = reduce(lambda merged, part: {**merged, **_mapping(part)}, node["allOf"], _without(node, "allOf"))
        else:
            break
    return node


def _referenced(root: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    found = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if part:
            found = _mapping(found.get(part.replace("~1", "/").replace("~0", "~")))
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _without(node: Mapping[str, Any], *words: str) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name not in words}


def _type_of(node: Mapping[str, Any]) -> str:
    named = node.get("type")
    if isinstance(named, list):
        real = [name for name in cast("list[str]", named) if name != "null"]
        return real[0] if real else "null"
    if isinstance(named, str):
        return named
    if "properties" in node:
        return "object"
    return "array" if "items" in node else "string"


def _object(judge: _Judge, node: Mapping[str, Any], place: str, depth: int) -> dict[str, object]:
    properties: Mapping[str, Any] = node.get("properties", {})
    required = set(node.get("required", ()))
    names = [name for name in properties if depth < _MAX_DEPTH or name in required]
    return {name: _value(judge, properties[name], f"{place}.{name}", depth + 1) for name in names}


def _array(judge: _Judge, node: Mapping[str, Any], place: str, depth: int) -> list[object]:
    low = int(node.get("minItems", 0))
    high = int(node.get("maxItems", max(low, 3)))
    count = min(high, max(low, 0 if depth >= _MAX_DEPTH else 1 + int(judge.chance(place) * 3)))
    items = _resolved(judge, node.get("items", {}))
    choices = items.get("enum")
    if choices and (node.get("uniqueItems") or low <= len(choices)):
        ordered = sorted(choices, key=lambda choice: judge.chance(f"{place}:{choice}"))
        return ordered[:count] if count <= len(ordered) else ordered + ordered[: count - len(ordered)]
    return [_value(judge, items, f"{place}[{index}]", depth + 1) for index in range(count)]


def _choice(judge: _Judge, choices: list[object], place: str) -> object:
    """Pick a choice by score, so that ordered choices (poor to excellent) follow the subject's merit."""
    return choices[min(len(choices) - 1, int(judge.score(place) * len(choices)))]


def _bounds(node: Mapping[str, Any], step: float) -> tuple[float, float]:
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    if low is None:
        low = _DEFAULT_LOW if high is None or high > _DEFAULT_LOW else high - _DEFAULT_SPAN
    if high is None:
        high = low + _DEFAULT_SPAN
    low = max(low, node["exclusiveMinimum"] + step) if "exclusiveMinimum" in node else low
    high = min(high, node["exclusiveMaximum"] - step) if "exclusiveMaximum" in node else high
    return low, high


def _integer(judge: _Judge, node: Mapping[str, Any], place: str) -> int:
    step = int(node.get("multipleOf", 1)) or 1
    low, high = _bounds(node, 1)
    first, last = math.ceil(low / step), math.floor(high / step)
    return step * min(last, first + int(judge.score(place) * (last - first + 1)))


def _number(judge: _Judge, node: Mapping[str, Any], place: str) -> float:
    low, high = _bounds(node, (abs(node.get("exclusiveMaximum", 1)) or 1) * 1e-3)
    value = low + judge.score(place) * (high - low)
    step = node.get("multipleOf")
    if step:
        return round(math.floor(value / step) * step, 10)
    rounded = round(value, 1 if high - low >= 5 else 3)
    return rounded if low <= rounded <= high else value


def _string(judge: _Judge, node: Mapping[str, Any], place: str) -> str:
    match node.get("format"):
        case "date":
            return "2026-01-15"
        case "date-time":
            return "2026-01-15T12:00:00Z"
        case "email":
            return "simulated@example.org"
        case "uri" | "url":
            return "https://example.org/simulated"
        case _:
            return _fitted(_sentence(judge, node, place), node)


def _fitted(text: str, node: Mapping[str, Any]) -> str:
    """Stretch or cut a text to the schema's lengths, which count characters."""
    filler = " This text is simulated."
    low = int(node.get("minLength", 0))
    while len(text) < low:
        text += filler
    high = node.get("maxLength")
    return text if high is None or len(text) <= high else text[: int(high)].rstrip().ljust(low, ".")


def _sentence(judge: _Judge, node: Mapping[str, Any], place: str) -> str:
    verdict, advice = _verdict(judge.score("text"))
    description = node.get("description")
    name = re.sub(r"\[\d+\]$", "", place).rpartition(".")[2].replace("_", " ")
    topic = description.strip().rstrip(".").split("\n", 1)[0] if isinstance(description, str) and description else name
    topic = topic[:1].lower() + topic[1:] if topic[1:2].islower() else topic
    number = re.search(r"\[(\d+)\]$", place)
    lead = f"Simulated point {int(number.group(1)) + 1}" if number else "Simulated judgment"
    return f"{lead} on {judge.subject} ({topic}): this {verdict}. {advice}"


def _verdict(score: float) -> tuple[str, str]:
    return next((verdict, advice) for limit, verdict, advice in _VERDICTS if score < limit)


def _markdown(judge: _Judge) -> str:
    verdict, advice = _verdict(judge.score("overall"))
    lines = [
        f"# {judge.subject}: simulated assessment",
        "",
        f"In this simulated judgment, {judge.subject} {verdict}. {advice}",
        "",
    ]
    for topic in ("Purpose and scope", "Quality of the work", "Community and upkeep"):
        verdict, advice = _verdict(judge.score(topic))
        lines.append(f"- **{topic}**: {verdict} in this simulation. {advice}")
    return "\n".join([*lines, "", "No model was asked; the text only shows where a real answer would stand."])
