"""The JSON document of a run: facts, rankings, verdicts of reduce steps, and the answers about every item.

It is made in pieces, one item at a time, so that a run of a million items can be written with the memory of one page.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, cast

from orchestrator.database import Connection, records, reports
from orchestrator.database.work import run_row
from orchestrator.reports.rows import result_rows

DOCUMENT_VERSION = 1


def document_pieces(connection: Connection, run: int, *, status: Mapping[str, Any] | None = None) -> Iterator[str]:
    """JSON text of a run's results, in pieces.

    Args:
        connection: a snapshot, open until the last piece was taken.
        run: number of the run.
        status: the status object to show; None for the present one.
    """
    steps = records.run_steps(connection, run)
    facts = _facts(connection, run, status)
    head = {
        "document_version": DOCUMENT_VERSION,
        "run_id": facts["run_id"],
        "workflow": facts["workflow"],
        "run": facts,
    }
    yield "{"
    for name, value in head.items():
        yield f"{json.dumps(name)}: {_text(value)},\n"
    reduces = list(_reduces(connection, run, steps))
    rankings = {name: answer["ranking"] for name, answer in reduces if _is_ranking(answer)}
    verdicts = {name: answer for name, answer in reduces if not _is_ranking(answer)}
    yield f'"rankings": {_text(rankings)},\n"verdicts": {_text(verdicts)},\n"items": ['
    rows = (row for row in result_rows(connection, run) if row["item_key"] is not None)
    for position, (key, answers) in enumerate(groupby(rows, key=lambda row: row["item_key"])):
        item = {"item_key": key, "steps": {row["step"]: _without_names(row) for row in answers}}
        yield f"{',' if position else ''}\n{_text(item)}"
    yield "\n]}\n"


def results_document(connection: Connection, run: int) -> dict[str, Any]:
    """The same document as one object, for runs that fit into memory."""
    return json.loads("".join(document_pieces(connection, run)))


def _facts(connection: Connection, run: int, status: Mapping[str, Any] | None) -> dict[str, Any]:
    row = run_row(connection, run)
    spec = json.loads(row.spec)
    routes = {
        step: [{"provider": route["provider"], "model": route["model"]} for route in chosen]
        for step, chosen in spec.get("routes", {}).items()
    }
    return {
        **(status or reports.status(connection, run)),
        "project": row.project_name,
        "workflow_version": row.workflow_version,
        "pack_hash": row.pack_hash,
        "variables": spec.get("variables", {}),
        "routes": routes,
        "metadata": json.loads(row.metadata) if row.metadata else {},
    }


def _reduces(connection: Connection, run: int, steps: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for step in steps:
        if step["kind"] == "reduce":
            for row in result_rows(connection, run, step["name"]):
                yield row["step"], row["answer"]


def _is_ranking(answer: Any) -> bool:
    return isinstance(answer, dict) and list(cast("dict[str, Any]", answer)) == ["ranking"]


def _without_names(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("item_key", "step")}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
