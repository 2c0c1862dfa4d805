"""Every key of a TOML document can be found again by line and column, and bad documents say where they are bad."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidInput, Problem
from orchestrator.toml_source import dotted, parse_toml

Locate = Callable[[Sequence[str | int]], str]

DOCUMENT = r'''# a comment with [brackets] and "quotes
name = "rank"
text = """
[not.a.table]
key = 1 \""" still inside"""
date = 1979-05-27 07:32:00

[budget]
limit.usd = 5
"quoted key" = 'x'

[[steps]]
name = "first"

[[steps]]
name = "second"
needs = [ "first",
  'other', # why
]
route = { provider = "openai", fallback = [{ provider = "ollama" }] }

[steps.answer.fields.score]
type = "integer"

[[steps.judges]]
model = "a"
[[steps.judges]]
model = "b"
'''


@pytest.fixture
def locate() -> Locate:
    return parse_toml(DOCUMENT, "workflow.toml").locate


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("name",), "2:1"),
        (("text",), "3:1"),
        (("date",), "6:1"),
        (("budget",), "8:1"),
        (("budget", "limit", "usd"), "9:1"),
        (("budget", "limit"), "9:1"),
        (("budget", "quoted key"), "10:1"),
        (("steps", 0), "12:1"),
        (("steps", 0, "name"), "13:1"),
        (("steps", 1, "name"), "16:1"),
        (("steps", 1, "needs", 1), "18:3"),
        (("steps", 1, "route", "provider"), "20:11"),
        (("steps", 1, "route", "fallback", 0, "provider"), "20:46"),
        (("steps", 1, "answer", "fields", "score", "type"), "23:1"),
        (("steps", 1, "judges", 1, "model"), "28:1"),
        (("steps", 1, "missing", "deeper"), "15:1"),
        (("steps", 1, "SomeModel", "name"), "16:1"),
    ],
)
def test_every_key_has_a_place(locate: Locate, path: tuple[str | int, ...], place: str) -> None:
    assert locate(path) == f"workflow.toml:{place}"


def test_the_empty_path_is_the_document(locate: Locate) -> None:
    assert locate(()) == "workflow.toml"


def test_paths_are_printed_as_people_write_them() -> None:
    assert dotted(("steps", 2, "answer", "score")) == "steps[2].answer.score"


def problem_of(source: Path | str | bytes) -> Problem:
    with pytest.raises(InvalidInput) as caught:
        parse_toml(source, "x.toml")
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("source", "code", "place"),
    [
        ("a = 1\nb = \n", "toml.syntax", "x.toml:2:5"),
        ("a = 'open", "toml.syntax", "x.toml:1:10"),
        ("[a\n", "toml.syntax", "x.toml:1:3"),
        ("a = 1\nb = 2\na = 3\n", "toml.duplicate-key", "x.toml:3:1"),
        ("[t]\nx = 1\n[u]\n[t]\n", "toml.duplicate-key", "x.toml:4:1"),
        ("r = {a = 1, a = 2}", "toml.duplicate-key", "x.toml:1:13"),
        ("a = " + "9" * 5000, "toml.syntax", "x.toml"),
        ("a = " + "[" * 20_000, "toml.depth", "x.toml"),
        ("a = " + "[" * 50 + "]" * 50, "toml.depth", "x.toml"),
        ("ok = 1\n" + ".".join(["a"] * 100_000) + " = 1", "toml.depth", "x.toml:2:1"),
        (b"\xff\xfea\x00", "file.encoding", "x.toml"),
        ("name = 1\n".encode("utf-16-le"), "file.encoding", "x.toml"),
        ("a = 'é'\nb = 'ü'".encode("latin-1"), "file.encoding", "x.toml:1:6"),
        (b"a = 1\nb = '\x00'", "file.nul", "x.toml:2:6"),
        (b"#" * 1_000_001, "file.too-large", "x.toml"),
    ],
)
def test_bad_documents_are_refused_with_their_place(source: str | bytes, code: str, place: str) -> None:
    began = time.monotonic()
    problem = problem_of(source)
    assert (problem.code, problem.place) == (code, place)
    assert time.monotonic() - began < 2


def test_a_duplicate_key_names_both_lines() -> None:
    assert problem_of("a = 1\nb = 2\na = 3\n").message == "'a' is set twice, first in line 1"


def test_a_byte_order_mark_and_windows_lines_are_accepted() -> None:
    document = parse_toml(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n", "x.toml")
    assert document.data == {"a": 1, "b": 2}
    assert document.locate(("b",)) == "x.toml:2:1"


def test_files_that_are_no_files_are_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert problem_of(tmp_path / "missing").code == "file.missing"
    assert problem_of(tmp_path / "fifo").code == "file.not-regular"
    assert problem_of(tmp_path).code == "file.not-regular"


def test_a_path_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("a = 1")
    data, locate = parse_toml(tmp_path / "a.toml")
    assert data == {"a": 1}
    assert locate(("a",)) == f"{tmp_path / 'a.toml'}:1:1"


@given(st.text(alphabet="[]{}\"'\n .=a1,#\\-", max_size=60))
def test_any_text_either_parses_or_is_refused_with_a_problem(text: str) -> None:
    try:
        data, locate = parse_toml(text, "x.toml")
    except InvalidInput:
        return
    assert all(locate((key,)) != "x.toml" for key in data)
