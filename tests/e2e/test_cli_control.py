"""Commands of live control and of keeping data, as processes on one machine, without a broker of their own."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.cli.actions.scaffold import write_pack
from tests.e2e.test_cli_basics import call, data


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with one run that has ended."""
    write_pack(tmp_path, is_forced=False, as_json=False)
    done = call("run", "./triage", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_changes_are_shown_and_recorded_with_who_made_them(project: Path) -> None:
    assert data(call("priority", "latest", "-3", "--as", "ann", "--json", cwd=project))["changed"] is True
    assert data(call("priority", "latest", "-3", "--json", cwd=project))["changed"] is False
    assert data(call("budget", "set", "global", "7.5", "--as", "ann", "--json", cwd=project))["limit_usd"] == "7.50"
    scopes = {one["scope"] for one in data(call("budget", "show", "latest", "--json", cwd=project))}
    assert {"global", "run:1", "workflow:triage"} <= scopes
    assert data(call("limits", "set", "simulator", "--rpm", "0", "--json", cwd=project))["paused"] is True
    assert data(call("limits", "show", "--json", cwd=project))[0]["changed"] == {"rpm": 0}
    assert data(call("limits", "set", "simulator", "--clear", "--json", cwd=project))["changed"] == {}
    assert call("limits", "set", "simulater", "--rpm", "1", cwd=project).returncode == 3
    assert call("limits", "set", "simulator", cwd=project).returncode == 2
    told = data(call("audit", "list", "--json", cwd=project))
    assert [row["action"] for row in reversed(told)] == ["run.priority", "budget.set", "limits.set", "limits.set"]
    assert {row["actor"] for row in told[2:]} == {"ann"}
    assert len(data(call("audit", "list", "--run", "latest", "--json", cwd=project))) == 1


def test_a_changed_audit_log_is_found_with_exit_code_1(project: Path) -> None:
    for number in ("1", "2"):
        assert call("priority", "latest", number, cwd=project).returncode == 0
    assert data(call("audit", "verify", "--json", cwd=project))["sound"] is True
    with closing(sqlite3.connect(project / "data" / "orchestrator.db")) as connection, connection:
        connection.execute("UPDATE audit_log SET actor = 'nobody' WHERE id = 1")
    broken = call("audit", "verify", cwd=project)
    assert broken.returncode == 1
    assert "row 1" in broken.stderr
    assert json.loads(call("audit", "verify", "--json", cwd=project).stdout)["broken_row"] == 1


def test_what_was_backed_up_comes_back_after_it_was_erased(project: Path) -> None:
    before = call("results", cwd=project).stdout
    assert data(call("backup", "-o", "copy.db", "--json", cwd=project))["bytes"] > 0
    assert call("backup", "-o", "copy.db", cwd=project).returncode == 3
    assert call("erase", "--run", "latest", cwd=project).returncode == 2
    assert call("erase", "--item", "nobody", "--yes", cwd=project).returncode == 3
    assert data(call("erase", "--item", "R-101", "--yes", "--json", cwd=project))["runs"][0]["items"] == 1
    assert "R-101" not in call("results", cwd=project).stdout
    old = data(call("retention", "--older-than", "0d", "--dry-run", "--json", cwd=project))
    assert [one["items"] for one in old] == [5]
    assert data(call("retention", "--older-than", "90d", "--yes", "--json", cwd=project))["runs"] == []
    assert data(call("retention", "--older-than", "0d", "--yes", "--json", cwd=project))["runs"][0]["files"] == 3
    assert "R-105" not in (project / "data" / "results" / "latest" / "triage-results.json").read_text()
    (project / "no.db").write_text("no database")
    assert call("restore", "no.db", "--yes", cwd=project).returncode == 3
    assert call("restore", "copy.db", "--yes", cwd=project).returncode == 0
    assert call("results", cwd=project).stdout == before
    assert data(call("retention", "--older-than", "0d", "--delete", "--yes", "--json", cwd=project)) == {"removed": 1}
    assert data(call("runs", "list", "--json", cwd=project)) == []


def test_retrying_a_run_in_which_nothing_failed_asks_nothing(project: Path) -> None:
    done = call("retry", "latest", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "completed"
    assert data(call("audit", "list", "--json", cwd=project)) == []
