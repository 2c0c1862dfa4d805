"""Rows of every format become the same items, and every bad row is named with its line."""

from __future__ import annotations

import io
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidInput
from orchestrator.item_rows import Format
from orchestrator.items import Item, ItemsSummary, iter_items, open_source, scan_items

ROWS = [{"id": "a", "name": "Ada"}, {"id": "b", "name": 'Zoë, "quoted"\nand more'}]


class Folder:
    """Writes one input file and reads it back as items."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, data: str | bytes, name: str) -> Path:
        path = self.root / name
        path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        return path

    def scan(self, data: str | bytes, name: str = "x.jsonl", **options: Any) -> ItemsSummary:
        with open_source(self.write(data, name)) as source:
            return scan_items(source, **options)

    def items(self, data: str | bytes, name: str = "x.jsonl", **options: Any) -> list[Item]:
        with open_source(self.write(data, name)) as source:
            summary = scan_items(source, **options)
            summary.require()
            items = list(iter_items(source, summary.key_field, options.get("limit"), summary.selection))
        assert len(items) == summary.count
        return items

    def findings(self, data: str | bytes, name: str = "x.jsonl", **options: Any) -> list[tuple[str, str]]:
        """Code and place (behind the file's name) of all problems."""
        summary = self.scan(data, name, **options)
        assert summary.problem_count >= len(summary.problems)
        return [
            (problem.code.removeprefix("items."), problem.place.removeprefix(f"{self.root}/{name}").lstrip(":"))
            for problem in summary.problems
        ]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


CSV = 'id,name\na,Ada\nb,"Zoë, ""quoted""\nand more"\n'


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (CSV, "x.csv"),
        ("\ufeff" + CSV, "x.csv"),
        (CSV.replace("id,name\na,Ada", "id,name\r\na,Ada\r"), "x.csv"),
        (CSV.replace("id,name", "id;name").replace("a,A", "a;A").replace('b,"', 'b;"'), "x.csv"),
        (CSV.replace("id,name", "id\tname").replace("a,A", "a\tA").replace('b,"', 'b\t"'), "x.tsv"),
        ("\n".join(json.dumps(row) for row in ROWS), "x.jsonl"),
        ("\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n", "x.ndjson"),
        (json.dumps(ROWS, indent=2), "x.json"),
        ("\ufeff" + json.dumps(ROWS), "x.json"),
        (CSV, "sniffed"),
        (json.dumps(ROWS), "sniffed"),
        ("\n".join(json.dumps(row) for row in ROWS), "sniffed"),
    ],
)
def test_every_format_gives_the_same_items(folder: Folder, data: str, name: str) -> None:
    items = folder.items(data, name)
    assert [dict(item.content) for item in items] == ROWS
    assert [(item.key, item.ordinal) for item in items] == [("a", 0), ("b", 1)]
    assert [json.loads(item.content_json) for item in items] == ROWS
    summary = folder.scan(data, name)
    assert (summary.count, summary.key_field, summary.fields) == (2, "id", ("id", "name"))
    assert summary.examples == tuple(ROWS)


@pytest.mark.parametrize(
    ("data", "findings"),
    [
        ("id,name\na\nb,1,2\nc,ok\n", [("ragged", "2"), ("ragged", "3")]),
        ('id,name\na,"open\nb,2\n', [("csv", "2")]),
        ('id,name\na,"x"y\nb,2\n', [("csv", "2")]),
        ("id,id,\n1,2,3\n", [("header", "1"), ("header", "1")]),
        ("id,name\n,x\n  ,y\n", [("blank-key", "2"), ("blank-key", "3")]),
        ("id,name\na,x\nb,y\na,z\n", [("duplicate-key", "4")]),
        ("id,name\n", [("empty", "")]),
        ("", [("empty", "")]),
        (b"id,name\na,x\xe9\nb,y\x00\n", [("encoding", "2:4"), ("nul", "3:4")]),
        ("id,name\na,1\rb,2\r\n", [("csv", "2")]),
        (f"id,name\n{'k' * 201},x\n\x07,y\n", [("bad-key", "2"), ("bad-key", "3")]),
    ],
)
def test_bad_csv(folder: Folder, data: str | bytes, findings: list[tuple[str, str]]) -> None:
    assert folder.findings(data, "x.csv") == findings


@pytest.mark.parametrize(
    ("line", "code", "column"),
    [
        ('{"id": "b",}', "json", ":12"),
        ("{'id': 1}", "json", ":2"),
        ('{"id": "b"} {"id": "c"}', "json", ":13"),
        ('{"id": "b", "x": NaN}', "number", ""),
        ('{"id": "b", "x": -Infinity}', "number", ""),
        ('{"id": "b", "x": 1e999}', "number", ""),
        ('{"id": "b", "x": ' + "1" * 5000 + "}", "number", ""),
        ('{"id": "b", "x": 1, "x": 2}', "duplicate-field", ""),
        ('{"id": "b", "x": {"y": 1, "y": 2}}', "duplicate-field", ""),
        ('{"id": "b", "x": 1, "x" : 2}', "duplicate-field", ""),
        ('{"id": "b", "x": 1, "\\u0078": 2}', "duplicate-field", ""),
        ('{"id": "b:c", "x": 1, "x"\t: 2, "y": {}}', "duplicate-field", ""),
        ('["b"]', "not-an-object", ""),
        ("null", "not-an-object", ""),
        ('{"id": "b", "x": "\\ud800"}', "text", ""),
        ('{"id": "b", "\\udc00": 1}', "text", ""),
        ('{"id": "b", "x": ["\\u0000"]}', "text", ""),
        ('{"id": "b", "x": "\ud800"}', "encoding", ":19"),
        ('{"id": "b\\u0007"}', "bad-key", ""),
        ('{"id": 1.5}', "bad-key", ""),
        ('{"id": null}', "bad-key", ""),
        ('{"id": true}', "bad-key", ""),
        ('{"di": "b"}', "missing-key", ""),
        ('{"id": "b", "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "depth", ""),
    ],
)
def test_a_bad_line_is_found_among_good_ones_in_every_json_format(
    folder: Folder, line: str, code: str, column: str
) -> None:
    good = ['{"id": "a"}', '{"id": "z"}']
    assert folder.findings("\n".join([good[0], line, good[1]])) == [(code, f"2{column}")]
    if code not in {"json", "depth", "encoding"} and len(line) < 1000:
        assert folder.findings("[" + ",\n".join([good[0], line, good[1]]) + "]", "x.json") == [(code, "2")]


@pytest.mark.parametrize(
    ("data", "findings"),
    [
        ('{"id": 1}', [("json", "1")]),
        ('[{"id": 1}\n {"id": 2}]', [("json", "2:2")]),
        ('[{"id": 1},\n]', [("json", "2:1")]),
        ('[{"id": 1},\n {"id": 2', [("json", "2:10")]),
        ('[{"id": 1}] x', [("json", "1:13")]),
        ("[]", [("empty", "")]),
        ("", [("json", "1")]),
        (b'[{"id": "\xff"}]', [("encoding", "1")]),
        ("[[" + "[" * 100_000, [("depth", "1")]),
        ("[" + "1" * 5000 + "]", [("number", "1")]),
    ],
)
def test_bad_json_arrays(folder: Folder, data: str | bytes, findings: list[tuple[str, str]]) -> None:
    assert folder.findings(data, "x.json") == findings


def test_columns_are_right_far_into_a_long_line(folder: Folder) -> None:
    rows = ", ".join(json.dumps({"id": number, "x": "y" * 100}) for number in range(5000))
    assert folder.findings(f"[{rows}, oops]", "x.json") == [("json", f"1:{len(rows) + 4}")]


def test_problems_name_both_lines_of_a_duplicate(folder: Folder) -> None:
    summary = folder.scan('{"id": "a"}\n{"id": 1}\n{"id": "1"}\n')
    assert summary.problems[0].message == "the key '1' was used in line 2 already"


def test_keys_that_look_the_same_are_the_same(folder: Folder) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert folder.findings(f"id\n{composed}\n{decomposed}\n", "x.csv") == [("duplicate-key", "3")]
    assert folder.items(f"id\n{decomposed}\n", "x.csv")[0].key == composed


def test_a_million_problems_are_counted_and_fifty_are_kept(folder: Folder) -> None:
    summary = folder.scan("nonsense\n" * 1000)
    assert (len(summary.problems), summary.problem_count) == (50, 1000)
    with pytest.raises(InvalidInput):
        summary.require()


@pytest.mark.parametrize("field", ["id", "key", "item_key", "name"])
def test_the_key_is_found_under_its_usual_names(folder: Folder, field: str) -> None:
    assert folder.items(json.dumps({"x": "1", field: "k", "name": "n"}))[0].key == ("n" if field == "name" else "k")


def test_without_a_key_the_content_is_the_key(folder: Folder) -> None:
    first, second = folder.items('{"x": 1}\n{"x": 2}\n')
    assert len(first.key) == 64
    assert first.key != second.key
    assert folder.findings('{"x": 1}\n{"x": 1}\n') == [("duplicate-key", "2")]


def test_a_key_field_that_no_row_has_is_one_problem_with_a_suggestion(folder: Folder) -> None:
    summary = folder.scan("project_id,x\na,1\nb,2\n", "x.csv", key_field="project_ids")
    assert summary.problem_count == 1
    assert summary.problems[0].hint == "did you mean 'project_id'?"


def test_strange_but_good_text_is_kept_exactly(folder: Folder) -> None:
    text = "\x1b[31m\u202e\u200b👩‍👩‍👧 {{ 7*7 }} \\u0000 =cmd() " + "x" * 1_000_000
    assert folder.items(json.dumps({"id": "a/b", "text": text}))[0].content["text"] == text


def test_a_row_over_the_cap_is_passed_over(folder: Folder) -> None:
    data = '{"id": "a"}\n{"id": "' + "b" * 10_000_000 + '"}\n{"id": "c"}\n'
    assert folder.findings(data) == [("too-large", "2")]
    assert folder.findings(data.replace("{", "[{", 1).replace("\n", ",\n", 2) + "]", "x.json") == [("json", "2:1")]


def test_limit_reads_no_further(folder: Folder) -> None:
    data = '{"id": 1}\n{"id": 2}\nnonsense\n'
    assert [item.key for item in folder.items(data, limit=2)] == ["1", "2"]


def test_samples_are_repeatable_and_independent_of_order(folder: Folder) -> None:
    lines = [json.dumps({"id": f"k{number}"}) for number in range(200)]
    chosen = [item.key for item in folder.items("\n".join(lines), sample=10, seed=3)]
    shuffled = [item.key for item in folder.items("\n".join(reversed(lines)), sample=10, seed=3)]
    other = [item.key for item in folder.items("\n".join(lines), sample=10, seed=4)]
    assert len(chosen) == 10
    assert sorted(chosen) == sorted(shuffled)
    assert set(chosen) != set(other)
    assert [item.ordinal for item in folder.items("\n".join(lines), sample=10)] == list(range(10))
    assert len(folder.items("\n".join(lines), sample=500)) == 200


def test_the_digest_changes_with_rows_and_choice_only(folder: Folder) -> None:
    data = '{"id": 1}\n{"id": 2}\n'
    digests = [
        folder.scan(data).sha256,
        folder.scan(data, limit=1).sha256,
        folder.scan(data, sample=1).sha256,
        folder.scan(data.replace("2", "3")).sha256,
    ]
    assert len(set(digests)) == 4
    assert folder.scan(data).sha256 == digests[0]


def test_standard_input_is_spooled_and_read_twice() -> None:
    with open_source("-", stdin=io.BytesIO(CSV.encode())) as source:
        assert scan_items(source).count == 2
        assert [item.key for item in iter_items(source)] == ["a", "b"]
        spool = source.path
    assert not spool.exists()


def test_closed_or_idle_standard_input_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InvalidInput, match="closed"), open_source("-"):
        pass

    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(InvalidInput, match="nothing is piped in"), open_source("-", stdin=Terminal()):
        pass


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("missing.csv", None, "items.unreadable"),
        ("x.csv", "id\na".encode("utf-16"), "items.encoding"),
        ("x.csv", b"\x1f\x8b\x08", "items.compressed"),
    ],
)
def test_files_that_cannot_be_items(folder: Folder, name: str, data: bytes | None, code: str) -> None:
    path = folder.root / name if data is None else folder.write(data, name)
    with pytest.raises(InvalidInput) as caught, open_source(path):
        pass
    assert caught.value.problems[0].code == code


def test_a_fifo_and_a_directory_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.csv")
    for path in (tmp_path / "fifo.csv", tmp_path):
        with pytest.raises(InvalidInput, match="regular file"), open_source(path):
            pass


def test_a_file_that_changed_after_the_scan_is_noticed(folder: Folder) -> None:
    path = folder.write('{"id": 1}\n', "x.jsonl")
    with open_source(path) as source:
        scan_items(source).require()
        folder.write('{"id": 1}\nnonsense\n', "x.jsonl")
        items = iter_items(source, "id")
        assert next(items).key == "1"
        with pytest.raises(InvalidInput, match="not JSON"):
            next(items)


@pytest.mark.parametrize(("kind", "name"), [("jsonl", "x.jsonl"), ("json", "x.json"), ("csv", "x.csv")])
def test_memory_does_not_grow_with_the_number_of_rows(folder: Folder, kind: Format, name: str) -> None:
    def rows() -> Iterator[str]:
        for number in range(8_000):
            row = {"id": f"k{number}", "text": "x" * 200}
            yield ",".join(row.values()) if kind == "csv" else json.dumps(row)

    joined = ",".join(rows()) if kind == "json" else "\n".join(rows())
    data = {"json": f"[{joined}]", "csv": f"id,text\n{joined}\n"}.get(kind, joined)
    with open_source(folder.write(data, name)) as source:
        tracemalloc.start()
        assert scan_items(source).count == 8_000
        assert sum(1 for _ in iter_items(source)) == 8_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 800_000


def test_parquet_without_pyarrow_says_what_to_install(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    summary = folder.scan(b"PAR1", "x.parquet")
    assert summary.problems[0].code == "items.parquet-support"
    assert "llm-orchestrator[data]" in str(summary.problems[0].hint)


def test_parquet_values_are_read_faithfully(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {
            "id": arrow.array(["a", "b"]).dictionary_encode(),
            "price": arrow.array([Decimal("1.10"), None]),
            "at": arrow.array([0, 1], arrow.timestamp("s", "UTC")),
            "tags": arrow.array([["x"], []]),
            "deep": arrow.array([{"y": 1}, {"y": 2}]),
            "pairs": arrow.array([[("k", 1)], []], arrow.map_(arrow.string(), arrow.int64())),
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    with open_source(tmp_path / "x.parquet") as source:
        assert scan_items(source).problems == ()
        first = next(iter_items(source))
    assert dict(first.content) == {
        "id": "a",
        "price": "1.10",
        "at": "1970-01-01T00:00:00+00:00",
        "tags": ["x"],
        "deep": {"y": 1},
        "pairs": {"k": 1},
    }
    whole = (tmp_path / "x.parquet").read_bytes()
    folder = Folder(tmp_path)
    assert folder.findings(whole[: len(whole) // 2], "half.parquet") == [("parquet", "")]
    parquet.write_table(
        arrow.table({"id": arrow.array(["a"]), "x": arrow.array([float("nan")])}), tmp_path / "n.parquet"
    )
    assert folder.findings((tmp_path / "n.parquet").read_bytes(), "n.parquet") == [("number", "1")]
    parquet.write_table(arrow.table({"id": arrow.array(["a"]), "x": arrow.array([b"raw"])}), tmp_path / "b.parquet")
    assert folder.findings((tmp_path / "b.parquet").read_bytes(), "b.parquet") == [("type", "1")]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=5))
def test_what_is_accepted_comes_back_equal_and_can_be_stored(rows: list[dict[str, Any]]) -> None:
    lines = "\n".join(json.dumps({**row, "id": number}) for number, row in enumerate(rows))
    with open_source("-", "jsonl", io.BytesIO(lines.encode())) as source:
        summary = scan_items(source)
        if summary.problems:
            assert {problem.code for problem in summary.problems} == {"items.text"}
            return
        for item, row in zip(iter_items(source), rows, strict=True):
            assert json.loads(item.content_json) == item.content == {**row, "id": int(item.key)}
            assert "\x00" not in item.content_json.encode().decode()
