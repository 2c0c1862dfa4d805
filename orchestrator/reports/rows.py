"""Result rows with the answers of a step's repeats made into one, as later steps saw them."""

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.database import Connection, records
from orchestrator.results import ResultProcessor
from orchestrator.workflow import AnswerSpec

_processor = ResultProcessor(AnswerSpec(format="text"), None)


def result_rows(connection: Connection, run: int, step: str | None = None) -> Iterator[dict[str, Any]]:
    """One object per item and step; see `records.results`.

    Args:
        connection: a snapshot, open until the last row was taken.
        run: number of the run.
        step: one step only; None for all.
    """
    return records.results(connection, run, step, combine=_combined)


def _combined(values: Sequence[Any]) -> Any:
    return _processor.aggregate_results(values)
