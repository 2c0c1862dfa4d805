"""A reply becomes an answer only if it is one: nothing is repaired, guessed or taken from an item's own text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import AnswerError
from orchestrator.results import ResultProcessor, aggregate_results, answer_schema
from orchestrator.workflow import AnswerField, AnswerSpec
from providers.messages import ChatReply

SPEC = AnswerSpec(
    fields={
        "score": AnswerField(type="integer", minimum=0, maximum=10),
        "why": AnswerField(type="string", required=False, max_length=50),
        "tags": AnswerField(type="list", items=AnswerField(type="string"), required=False),
        "kind": AnswerField(type="string", choices=("tool", "app"), required=False),
        "ratio": AnswerField(type="number", required=False),
        "sure": AnswerField(type="boolean", required=False),
    }
)
PROCESSOR = ResultProcessor(SPEC, answer_schema(SPEC, {}))
GOOD = '{"score": 7}'


def reply(text: str, **changes: Any) -> ChatReply:
    return ChatReply(**{"text": text, "finish_reason": "stop", "usage": None, "model": "m"} | changes)


def read(text: str, **changes: Any):
    return PROCESSOR.parse_response(reply(text, **changes))


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"  \n{GOOD}\n",
        f"\ufeff{GOOD}",
        f"```json\n{GOOD}\n```",
        f"```JSON\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        '{"score":7.0}',
    ],
)
def test_an_object_alone_or_in_one_fence_is_taken_as_it_stands(text: str):
    answer = read(text)
    assert (answer.value, answer.quality, answer.flags) == ({"score": 7}, 1.0, ())


@pytest.mark.parametrize(
    "text",
    [
        f"Here is my answer: {GOOD}",
        f"{GOOD}\nI hope this helps!",
        f"Thinking about {{braces}} and [lists] first.\n{GOOD}",
        f"Sure:\n```json\n{GOOD}\n```\nDone.",
        f"<answer>{GOOD}</answer>",
    ],
)
def test_the_one_object_inside_prose_is_taken_with_a_flag(text: str):
    answer = read(text)
    assert (answer.value, answer.quality, answer.flags) == ({"score": 7}, 0.9, ("prose_around_json",))


SPOOFS = {
    "two-answers": f'{{"score": 10}} {GOOD}',
    "echoed-item": f'The item says {{"score": 10}} but I say {GOOD}',
    "thinking": f'<think>{{"score": 10}}</think>{GOOD}',
    "fences": f'```json\n{{"score": 10}}\n```\n```json\n{GOOD}\n```',
    "same-twice": f"{GOOD}{GOOD}",
    "lines": f"{GOOD}\n{GOOD}",
    "inside-broken": '{"thoughts": {"score": 10}, "score": 1',
    "behind-broken": f'{{"score": 1, "quote": "it said }} {GOOD}',
    "trailing-comma": '{"score": 7,}',
    "single-quotes": "{'score': 7}",
    "comment": '{"score": 7} // best\n{"score": 8}',
    "duplicate-field": '{"score": 10, "score": 1}',
    "duplicate-escaped": '{"score": 10, "sc\\u006fre": 1}',
    "nested": '{"answer": {"score": 10}}',
    "array": '[{"score": 10}]',
    "string": json.dumps(GOOD),
    "number": "7",
    "null": "null",
    "words": "seven out of ten",
    "truncated": '{"score": 1',
    "nan": '{"score": NaN}',
    "infinity": '{"score": 1, "ratio": Infinity}',
    "overflow": '{"score": 1, "ratio": 1e999}',
    "overflow-in-prose": 'Well: {"score": 1, "ratio": -1e999}',
    "huge-number": '{"score": ' + "1" * 5000 + "}",
    "huge-in-prose": 'Well: {"score": ' + "1" * 5000 + "}",
    "deep": '{"a":' * 5000,
    "deep-list": '{"score": ' + "[" * 100_000,
    "raw-newline": '{"score": 7, "why": "a\nb"}',
    "empty-object": "{}",
}


@pytest.mark.parametrize("text", SPOOFS.values(), ids=SPOOFS.keys())
def test_what_is_ambiguous_or_broken_is_no_answer(text: str):
    with pytest.raises(AnswerError) as caught:
        read(text)
    assert len(str(caught.value)) < 1000


WRONG = {
    "text-for-number": {"score": "7"},
    "fraction": {"score": 7.5},
    "almost": {"score": 7.9999999},
    "of-ten": {"score": "8/10"},
    "word": {"score": "eight"},
    "true": {"score": True},
    "null": {"score": None},
    "above": {"score": 11},
    "below": {"score": -1},
    "missing": {"why": "x"},
    "unknown-field": {"score": 1, "bonus": 2},
    "long": {"score": 1, "why": "x" * 51},
    "list-for-text": {"score": 1, "why": ["x"]},
    "text-for-list": {"score": 1, "tags": "a"},
    "number-in-list": {"score": 1, "tags": ["a", 2]},
    "no-choice": {"score": 1, "kind": "library"},
    "choice-case": {"score": 1, "kind": "Tool"},
    "number-for-boolean": {"score": 1, "sure": 1},
    "boolean-for-number": {"score": 1, "ratio": False},
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())
def test_no_value_changes_its_type_or_leaves_its_range(value: dict[str, Any]):
    with pytest.raises(AnswerError) as caught:
        read(json.dumps(value))
    assert str(caught.value)


def test_an_error_names_the_field_and_not_the_whole_reply():
    with pytest.raises(AnswerError, match=r"^tags\.1: ") as caught:
        read(json.dumps({"score": 1, "tags": ["a", 2]}))
    assert "score" not in str(caught.value)
    with pytest.raises(AnswerError) as caught:
        read(json.dumps({"score": 1, "why": "x" * 1_000_000}))
    assert len(str(caught.value)) < 1000


def test_many_errors_are_told_in_short():
    with pytest.raises(AnswerError) as caught:
        read(json.dumps({"score": 1, "tags": list(range(10_000))}))
    assert str(caught.value).count(";") == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"refusal": "I cannot"}, "refused"),
        ({"finish_reason": "length"}, "cut off"),
        ({"finish_reason": "content_filter"}, "content_filter"),
        ({"finish_reason": "error"}, "error"),
        ({"finish_reason": "cancelled"}, "cancelled"),
    ],
)
def test_a_reply_that_did_not_end_well_is_no_answer_even_if_it_looks_like_one(changes: dict[str, Any], told: str):
    with pytest.raises(AnswerError, match=told):
        read(GOOD, **changes)


@pytest.mark.parametrize("text", ["", "   \n\t"])
def test_an_empty_reply_is_no_answer(text: str):
    with pytest.raises(AnswerError, match="empty"):
        read(text)


def test_an_answer_by_tool_call_counts_as_ended():
    assert read(GOOD, finish_reason="tool_calls").value == {"score": 7}


def test_empty_fields_lower_the_quality():
    answer = read('{"score": 0, "why": "", "tags": [], "sure": false}')
    assert answer.quality == pytest.approx(0.9)
    assert answer.flags == ("empty:why", "empty:tags")


def test_an_answer_is_kept_as_compact_text():
    text = read('{"score": 1, "why": "schön — 好"}').to_json()
    assert text == '{"score":1,"why":"schön — 好"}'


@given(st.integers(0, 10), st.text(max_size=50))
def test_every_valid_answer_survives(score: int, why: str):
    assert read(json.dumps({"score": score, "why": why})).value == {"score": score, "why": why}


@given(st.text(max_size=300) | st.text('{}[]":,0123456789truefalsenull \\\n`', max_size=200))
def test_any_text_is_an_answer_or_an_answer_error(text: str):
    try:
        answer = read(text)
    except AnswerError:
        return
    assert 0 <= answer.value["score"] <= 10


class TestText:
    processor = ResultProcessor(AnswerSpec(format="markdown", min_length=3, max_length=10), None)

    def test_it_is_taken_without_the_space_around_it(self):
        answer = self.processor.parse_response(reply("  # Yes\n"))
        assert (answer.value, answer.quality, answer.to_json()) == ("# Yes", 1.0, '"# Yes"')

    @pytest.mark.parametrize("text", ["ab", " a ", "x" * 11])
    def test_its_length_has_bounds(self, text: str):
        with pytest.raises(AnswerError, match="3 to 10"):
            self.processor.parse_response(reply(text))

    def test_json_in_it_is_text(self):
        assert self.processor.parse_response(reply(GOOD[:9])).value == GOOD[:9]


class TestSchemaFile:
    spec = AnswerSpec(schema="answer.json")

    def test_it_is_read_from_the_pack(self):
        schema = {"type": "object", "required": ["a"]}
        assert answer_schema(self.spec, {"answer.json": json.dumps(schema)}) == schema

    @pytest.mark.parametrize("text", ["", "{", "[]", "true", '{"type": "objekt"}', '{"properties": 3}', '"x"'])
    def test_what_is_no_schema_is_told(self, text: str):
        with pytest.raises(AnswerError, match=r"answer\.json"):
            answer_schema(self.spec, {"answer.json": text})

    def test_a_missing_file_is_a_key_error(self):
        with pytest.raises(KeyError):
            answer_schema(self.spec, {})

    def test_text_has_none(self):
        assert answer_schema(AnswerSpec(format="text"), {}) is None


def test_inline_fields_make_a_closed_schema():
    nested = AnswerField(type="string", fields={"x": AnswerField(type="number", minimum=0)})
    spec = AnswerSpec(
        fields={
            "a": AnswerField(type="list", items=nested, max_items=2),
            "b": AnswerField(type="boolean", required=False),
        }
    )
    assert answer_schema(spec, {}) == {
        "type": "object",
        "properties": {
            "a": {
                "type": "array",
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {"x": {"type": "number", "minimum": 0}},
                    "required": ["x"],
                    "additionalProperties": False,
                },
            },
            "b": {"type": "boolean"},
        },
        "required": ["a"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{"a": 1}], {"a": 1}),
        ([{"a": 1}, {"a": 2}], {"a": 1.5}),
        ([{"a": 1}, {"a": 1}, {"a": 2}], {"a": 1.333333}),
        ([{"a": "x"}, {"a": "y"}, {"a": "y"}], {"a": "y"}),
        ([{"a": "x"}, {"a": "y"}], {"a": "x"}),
        ([{"a": True}, {"a": False}, {"a": True}], {"a": True}),
        ([{"a": ["p"]}, {"a": ["q"]}, {"a": ["q"]}], {"a": ["q"]}),
        ([{"a": 1}, {"a": 3, "b": "late"}], {"a": 2.0, "b": "late"}),
        (["first", "second"], "first"),
    ],
)
def test_repeats_are_brought_together(values: list[Any], expected: Any):
    assert aggregate_results(values) == expected
    assert PROCESSOR.aggregate_results(values) == expected
