"""The status of a run, once or until it ends."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.cli.actions.output import console, duration, facts, put_json
from orchestrator.cli.actions.progress import open_display
from orchestrator.cli.actions.session import load_config, reading_run
from orchestrator.config import ConfigManager
from orchestrator.database import reports

WATCH_S = 1.0
AT_WORK = ("pending", "running")


def show_status(name: str, *, home: Path | None, watch: bool, as_json: bool) -> None:
    """Shows the status object; with `watch` again and again until the run has ended or is paused."""
    config = load_config(home)
    status = _look(config, name)
    if watch:
        status = _watch(config, status, as_json=as_json)
    if as_json:
        put_json(status, indent=None if watch else 2)
    else:
        print_status(status)


def _look(config: ConfigManager, name: str) -> dict[str, Any]:
    with reading_run(config, name) as (connection, run, _):
        return reports.status(connection, run)


def _watch(config: ConfigManager, status: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    pause = threading.Event()
    with open_display("none" if as_json else "auto") as display:
        while status["status"] in AT_WORK:
            display.show(status)
            pause.wait(WATCH_S)
            fresh = _look(config, status["run_id"])
            if as_json and fresh["calls"] != status["calls"]:
                put_json(status, indent=None)
            status = fresh
    return status


def print_status(status: Mapping[str, Any]) -> None:
    """The status object for people."""
    tokens, calls, items = status["tokens"], status["calls"], status["items"]
    budget = "" if status["budget_usd"] is None else f" of ${status['budget_usd']}"
    reserved = "" if status["reserved_usd"] == "0.00" else f", ${status['reserved_usd']} reserved"
    unconfirmed = "" if status["unconfirmed_usd"] == "0.00" else f", of which ${status['unconfirmed_usd']} unconfirmed"
    reason = " ".join(told for told in (status["reason"], status["reason_detail"]) if told)
    state = f"{status['status']} ({reason})" if reason else status["status"]
    limits = [f"{one['scope']} ${one['spent_usd']} of ${one['limit_usd']}" for one in status["budgets"]]
    console().print(
        facts(
            {
                "run": status["run_id"],
                "workflow": status["workflow"],
                "status": state,
                "items": _counted(items),
                "calls": _counted(calls),
                "attempts": _counted(status["attempts"]),
                "tokens": f"{tokens['input']:,} in ({tokens['cached']:,} cached), {tokens['output']:,} out",
                "cost": f"${status['cost_usd']}{budget}{reserved}{unconfirmed}",
                "budgets": "; ".join(limits) or None,
                "warning": "; ".join(status["warnings"]) or None,
                "began": status["started_at"],
                "ended": status["completed_at"],
                "took": duration(status["duration_seconds"]),
                "left": None if status["eta_seconds"] is None else f"about {duration(status['eta_seconds'])}",
                "bound by": status["bound_by"],
            }
        )
    )


def _counted(counts: Mapping[str, int]) -> str:
    shown = [f"{number:,} {name}" for name, number in counts.items() if number or name in ("total", "completed")]
    return ", ".join(shown) or "none"
