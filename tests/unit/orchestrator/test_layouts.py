"""Layouts keep what they are given, and nothing in a cell can act."""

import csv
import io
import json
from typing import Any

import pytest

from orchestrator.reports.layouts import layout


def make_row(answer: Any, key: str | None = "one") -> dict[str, Any]:
    return {
        "item_key": key,
        "step": "judge",
        "status": "completed",
        "answer": answer,
        "quality_score": 1.0,
        "provider": "simulator",
        "model": "m",
        "attempts": 1,
        "cost_usd": "0.10",
        "error": None,
    }


def test_json_lines_lose_nothing() -> None:
    rows = [make_row({"text": "ünï\ncode \u2028"}), make_row(None, None)]
    assert [json.loads(line) for line in "".join(layout(rows, "jsonl", "t")).split("\n") if line] == rows


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_spreadsheet_finds_no_formula(start: str) -> None:
    text = "".join(layout([make_row(f"{start}HYPERLINK(1)", f"{start}key")], "csv", "t"))
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row["answer"] == f"'{start}HYPERLINK(1)"
    assert row["item_key"] == f"'{start}key"


def test_negative_numbers_stay_numbers_in_csv() -> None:
    row = make_row("x") | {"quality_score": -1.5}
    assert ",-1.5," in "".join(layout([row], "csv", "t"))


def test_an_answer_cannot_leave_its_cell() -> None:
    hostile = "<script>alert(1)</script> | [x](javascript:1)\n# title"
    page = "".join(layout([make_row(hostile)], "html", "<t>"))
    assert "<script>" not in page
    assert "<t>" not in page
    assert "default-src 'none'" in page
    table = "".join(layout([make_row(hostile)], "md", "t"))
    assert len(table.splitlines()) == 5
    assert "<script>" not in table
    assert "\\|" in table


def test_layouts_of_no_rows_have_their_head() -> None:
    assert "".join(layout([], "csv", "t")).startswith("item_key,step,")
    assert "".join(layout([], "jsonl", "t")) == ""
