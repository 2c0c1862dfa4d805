"""ResultProcessor: the text of a reply becomes a validated answer, or an error that says what is wrong with it.

A reply is never bent into shape. JSON is taken as it stands or as the one object inside surrounding prose; two objects
are ambiguous, because text that an item smuggled in could be either of them; a reply that was cut by the token cap is
not completed, because `{"score": 1` may have been going to be 10; and no value changes its type.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import isfinite
from statistics import fmean
from typing import Any, cast

import jsonschema_rs

from orchestrator.errors import AnswerError
from orchestrator.workflow import AnswerSpec, object_schema
from providers.messages import ChatReply

MAX_ERRORS_TOLD = 5
MAX_ERROR_CHARS = 300
"""Of one error: a message of the validator repeats the value that is wrong, however long it is."""
EXTRACTED_PENALTY = 0.1
EMPTY_PENALTY = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """A validated answer.

    Attributes:
        value: a JSON object, or text for Markdown and plain text.
        quality: 0 to 1; below 1 when prose surrounded the object or fields were left empty.
        flags: why the quality is below 1.
    """

    value: Any
    quality: float
    flags: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The value as compact JSON text."""
        return _COMPACT.encode(self.value)


class ResultProcessor:
    """Reads replies to one step.

    One object serves any number of replies and keeps no state between them.

    Args:
        spec: what the step wants.
        schema: JSON Schema of the answer; None unless the format is JSON (see `answer_schema`).
    """

    def __init__(self, spec: AnswerSpec, schema: Mapping[str, Any] | None) -> None:
        self._spec = spec
        self._validator = None if schema is None else _validator(json.dumps(schema, sort_keys=True))

    def parse_response(self, reply: ChatReply) -> Answer:
        """Turns a reply into an answer.

        Raises:
            AnswerError: it is none; the message can be shown to the model when the question is asked again.
        """
        self.detect_errors(reply)
        if self._validator is None:
            return self._parse_text(reply.text)
        value, surrounded = _one_object(reply.text)
        errors = [
            f"{_path(error.instance_path) or 'the answer'}: {_shortened(error.message)}"
            for error in islice(self._validator.iter_errors(value), MAX_ERRORS_TOLD)
        ]
        if errors:
            raise AnswerError("; ".join(errors))
        quality, flags = self.validate_quality(value, surrounded=surrounded)
        return Answer(value, quality, flags)

    def detect_errors(self, reply: ChatReply) -> None:
        """Finds what makes a reply worthless before its text is looked at.

        Raises:
            AnswerError: it was refused, filtered, cut off or empty.
        """
        if reply.refusal is not None:
            raise AnswerError(f"the model refused: {reply.refusal[:200]}")
        if reply.finish_reason == "length":
            raise AnswerError("the reply was cut off by the limit of output tokens")
        if reply.finish_reason not in ("stop", "tool_calls"):
            raise AnswerError(f"the reply ended with {reply.finish_reason!r}")
        if not reply.text.strip():
            raise AnswerError("the reply is empty")

    def validate_quality(self, value: Any, *, surrounded: bool = False) -> tuple[float, tuple[str, ...]]:
        """Scores an answer that is valid already, from 1 downwards, and names the reasons."""
        flags: list[str] = ["prose_around_json"] if surrounded else []
        quality = 1.0 - (EXTRACTED_PENALTY if surrounded else 0.0)
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            empty = [name for name, field in fields.items() if field in ("", [], None)]
            flags.extend(f"empty:{name}" for name in empty)
            quality -= EMPTY_PENALTY * len(empty) / max(1, len(fields))
        return round(quality, 3), tuple(flags)

    def aggregate_results(self, values: Sequence[Any]) -> Any:
        """One answer from several to the same question; see `aggregate_results` of this module."""
        return aggregate_results(values)

    def _parse_text(self, text: str) -> Answer:
        stripped = text.strip()
        if not self._spec.min_length <= len(stripped) <= self._spec.max_length:
            wanted = f"{self._spec.min_length} to {self._spec.max_length}"
            raise AnswerError(f"the answer has {len(stripped)} characters, wanted {wanted}")
        return Answer(stripped, 1.0)


def aggregate_results(values: Sequence[Any]) -> Any:
    """One answer from several to the same question: means of numbers, the most frequent of the rest.

    Args:
        values: at least one; objects with the same fields, or texts, of which the first one stands.
    """
    if len(values) == 1 or not isinstance(values[0], dict):
        return values[0]
    objects = cast("Sequence[dict[str, Any]]", values)
    names = dict.fromkeys(name for one in objects for name in one)
    return {name: _aggregate([one[name] for one in objects if name in one]) for name in names}


def answer_schema(spec: AnswerSpec, files: Mapping[str, str]) -> dict[str, Any] | None:
    """The JSON Schema of a step's answer, from its inline fields or its schema file; None for text.

    Raises:
        AnswerError: the schema file holds no JSON Schema.
        KeyError: the pack does not hold the file.
    """
    if spec.format != "json":
        return None
    if spec.fields is not None:
        return object_schema(spec.fields)
    if spec.schema_file is None:
        raise KeyError("schema")
    try:
        schema = json.loads(files[spec.schema_file])
        jsonschema_rs.validator_for(schema)
    except (json.JSONDecodeError, jsonschema_rs.ValidationError, ValueError) as error:
        raise AnswerError(f"{spec.schema_file} holds no JSON Schema: {error}") from None
    if not isinstance(schema, dict):
        raise AnswerError(f"{spec.schema_file} holds no JSON Schema object")
    return cast("dict[str, Any]", schema)


@cache
def _validator(schema: str) -> Any:
    return jsonschema_rs.validator_for(json.loads(schema))


def _path(parts: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in parts)


def _one_object(text: str) -> tuple[Any, bool]:
    """The one JSON object of a reply, and whether anything but white space and one code fence was around it.

    An object that begins and is not valid makes the reply invalid: what stands inside of it may look like an answer.
    """
    stripped = _unfenced(text.strip().removeprefix("\ufeff"))
    try:
        value = _STRICT.decode(stripped)
    except json.JSONDecodeError:
        value = None
    except RecursionError:
        raise AnswerError("the JSON is nested too deeply") from None
    except ValueError:
        raise AnswerError("a number in the JSON is too long") from None
    if isinstance(value, dict):
        return cast("dict[str, Any]", value), False
    if value is not None:
        raise AnswerError(f"expected a JSON object, not {type(value).__name__}")
    found = list(_objects_in(stripped))
    if not found:
        raise AnswerError("the reply holds no valid JSON object")
    if len(found) > 1:
        raise AnswerError("the reply holds more than one JSON object; answer with exactly one")
    return found[0], True


def _unfenced(text: str) -> str:
    if text.startswith("```") and text.endswith("```") and text.count("```") == 2:
        first_line, _, rest = text.partition("\n")
        if first_line.strip("`").strip().lower() in ("", "json"):
            return rest[:-3].strip()
    return text


def _objects_in(text: str) -> Iterator[dict[str, Any]]:
    position = text.find("{")
    while position != -1:
        try:
            value, position = _STRICT.raw_decode(text, position)
            yield value
        except json.JSONDecodeError as error:
            if _OPENED.match(text, position):
                raise AnswerError(f"the reply holds a JSON object that is not valid: {error.msg}") from None
            position += 1
        except RecursionError:
            raise AnswerError("the JSON is nested too deeply") from None
        except ValueError:
            raise AnswerError("a number in the JSON is too long") from None
        position = text.find("{", position)


def _no_constant(name: str) -> Any:
    raise AnswerError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise AnswerError(f"{_shortened(text)} is no number that can be stored")
    return number


def _shortened(text: str) -> str:
    return (
        text if len(text) <= MAX_ERROR_CHARS else f"{text[: MAX_ERROR_CHARS // 2]} ... {text[-MAX_ERROR_CHARS // 2 :]}"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counted = Counter(name for name, _ in pairs)
        raise AnswerError(f"the field {counted.most_common(1)[0][0]!r} stands there twice")
    return found


_OPENED = re.compile(r'\{\s*"')
# Made once: `json.loads` and `json.dumps` with options build a decoder or an encoder for every call.
_STRICT = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _aggregate(values: Sequence[Any]) -> Any:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return round(fmean(values), 6)
    counted = Counter(json.dumps(value, sort_keys=True) for value in values)
    return json.loads(counted.most_common(1)[0][0])
