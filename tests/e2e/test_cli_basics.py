"""The command line as a process: what it prints where, and which code it ends with."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import lazy
from orchestrator.cli.actions.running import exit_code
from orchestrator.cli.actions.scaffold import write_pack

HEAVY = ("celery", "kombu", "sqlalchemy", "alembic", "httpx", "aiohttp", "redis", "jinja2", "rich")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", *arguments]


def clean_environment(**extra: str) -> dict[str, str]:
    """Nothing of the machine's own configuration reaches the process."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}  # noqa: TID251
    return kept | {"PYTHONPATH": str(Path(lazy.__file__).parents[2]), "XDG_CONFIG_HOME": "/nonexistent"} | extra


def call(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def data(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the pack that `init` writes, and one run of it."""
    directory = tmp_path_factory.mktemp("project")
    write_pack(directory, is_forced=False, as_json=False)
    done = call("run", "./triage", "--json", cwd=directory)
    assert done.returncode == 0, done.stderr
    (directory / "run.jsonl").write_text(done.stdout)
    return directory


@pytest.mark.parametrize("name", sorted(lazy.COMMANDS))
def test_every_command_is_declared(name: str) -> None:
    assert lazy.declared_commands(name) is not None


@pytest.mark.parametrize("name", sorted(lazy.ACTIONS))
def test_every_action_exists(name: str) -> None:
    module, function = lazy.ACTIONS[name].split(":")
    assert callable(getattr(importlib.import_module(f"orchestrator.cli.actions.{module}"), function))


def loaded_by(*arguments: str, cwd: Path) -> set[str]:
    """The modules that a process holds once the command is done; importlib's own imports are not in -X importtime."""
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr))\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "from orchestrator.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("packs", "list", "--help"), ("--version",)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    loaded = loaded_by(*arguments, cwd=tmp_path)
    assert "typer" in loaded
    assert not loaded.intersection(HEAVY)


def test_a_command_loads_only_the_module_that_declares_it(tmp_path: Path) -> None:
    declaring = {f"orchestrator.cli.{declared.module}" for declared in lazy.COMMANDS.values()}
    assert loaded_by("cost", "--help", cwd=tmp_path) & declaring == {"orchestrator.cli.costs"}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("rnu",), "did you mean 'run'?"),
        (("run", "project_selection", "--budgte", "1"), "--budget"),
        (("runs", "lst"), "'list'"),
        (("run", "project_selection", "--max-failures", "lots"), "--max-failures"),
        (("run", "project_selection", "--budget", "-1"), "--budget"),
        (("run", "project_selection", "--var", "novalue"), "NAME=VALUE"),
        (("run", "project_selection", "--new", "--resume", "latest"), "exclude"),
        (("status",), "latest"),
        (("show", "latest", "x"), "latest"),
        (("results", "--format", "pdf"), "jsonl"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_hint(arguments: tuple[str, ...], hint: str, tmp_path: Path) -> None:
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert hint in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_reading_creates_nothing(tmp_path: Path) -> None:
    assert data(call("runs", "list", "--json", cwd=tmp_path)) == []
    assert data(call("cost", "--json", cwd=tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_pack_ends_with_3_and_all_problems_as_json_lines(tmp_path: Path) -> None:
    pack = tmp_path / "bad"
    pack.mkdir()
    (pack / "workflow.toml").write_text('name = "Bad Name"\nversion = "1"\nstep = []\n')
    done = call("run", "./bad", "--json", cwd=tmp_path)
    assert done.returncode == 3
    problems = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(problems) >= 2
    assert {"code", "message", "place", "hint"} == set(problems[0])
    found = call("validate", "./bad", "--json", cwd=tmp_path)
    assert found.returncode == 3
    assert json.loads(found.stdout)["valid"] is False


@pytest.mark.parametrize(
    ("environment", "arguments", "code"),
    [
        ({"DATABASE_URL": "postgresql://nobody:hidden@127.0.0.1:1/none"}, ("status",), "database.unavailable"),
        ({"REDIS_URL": "redis://127.0.0.1:1"}, ("run", "project_selection"), "database.outdated"),
        ({}, ("worker",), "broker.missing"),
    ],
)
def test_a_missing_environment_ends_with_6(
    environment: Mapping[str, str], arguments: tuple[str, ...], code: str, tmp_path: Path
) -> None:
    done = call(*arguments, cwd=tmp_path, **environment)
    assert done.returncode == 6
    assert f"error[{code}]" in done.stderr
    assert "hidden" not in done.stderr


def test_a_run_launches_first_and_is_done_last(project: Path) -> None:
    records = [json.loads(line) for line in (project / "run.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["launch", "done"]
    assert records[0]["run_id"] == records[1]["run_id"]
    assert records[1]["items"] == {"total": 5, "completed": 5, "failed": 0, "skipped": 0}


def test_every_reading_command_writes_json(project: Path) -> None:
    status = data(call("status", "--json", cwd=project))
    assert status["status"] == "completed"
    assert data(call("runs", "list", "--json", cwd=project))[0]["run_id"] == status["run_id"]
    assert data(call("cost", "--json", cwd=project))[0]["cost_usd"] == status["cost_usd"]
    assert data(call("show", "latest", "R-101", "--json", cwd=project))["calls"][0]["step"] == "judge"
    assert data(call("explain", "latest", "order", "--json", cwd=project))["ranking"][0]["rank"] == 1
    assert data(call("config", "show", "--sources", "--json", cwd=project))["worker.lanes"]["source"] == "default"
    assert data(call("cache", "stats", "--json", cwd=project))["entries"] >= 0
    assert data(call("doctor", "--json", cwd=project))["ready"] is True
    assert data(call("db", "check", "--json", cwd=project))["ready"] is True


def test_commands_that_need_no_run_write_json(tmp_path: Path) -> None:
    assert "project_selection" in [pack["name"] for pack in data(call("packs", "list", "--json", cwd=tmp_path))]
    providers = data(call("providers", "list", "--json", "--all", cwd=tmp_path))
    assert {"simulator", "openai"} <= {provider["name"] for provider in providers}
    assert data(call("estimate", "project_selection", "--json", cwd=tmp_path))["calls"] > 0
    assert "celery" in data(call("version", "--json", cwd=tmp_path))


def test_results_in_every_text_format(project: Path) -> None:
    rows = [json.loads(line) for line in call("results", cwd=project).stdout.splitlines()]
    assert [row["item_key"] for row in rows] == ["R-101", "R-102", "R-103", "R-104", "R-105", None]
    assert call("results", "-o", "out.csv", cwd=project).returncode == 0
    with (project / "out.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["judge"] * 5 + ["order"]
    assert call("results", "--format", "md", "--step", "order", cwd=project).stdout.startswith("# ")
    assert call("results", "-o", "out.parquet", cwd=project).returncode == 0
    assert call("results", "--step", "nothing", cwd=project).returncode == 2


def test_a_budget_stops_a_run_with_5_and_the_run_can_be_resumed_or_cancelled(tmp_path: Path) -> None:
    """None of the verbs needs a broker of its own, and each may be repeated."""
    write_pack(tmp_path, is_forced=False, as_json=False)
    stopped = call("run", "./triage", "--budget", "0.0001", "--json", cwd=tmp_path)
    assert stopped.returncode == 5, stopped.stderr
    assert json.loads(stopped.stdout.splitlines()[-1])["reason"] == "budget"
    assert data(call("pause", "latest", "--json", cwd=tmp_path))["changed"] is False
    resumed = call("resume", "latest", "--budget", "1", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "5 of 5 items completed" in resumed.stdout
    assert "simulated" in resumed.stdout
    other = ("run", "./triage", "--budget", "0.0001", "--var", "product=another", "--json")
    again = call(*other, cwd=tmp_path)
    assert json.loads(again.stdout.splitlines()[0])["resumed"] is False
    assert data(call("cancel", "latest", "--json", cwd=tmp_path))["status"] == "cancelled"
    assert data(call("cancel", "latest", "--json", cwd=tmp_path))["changed"] is False


def test_an_expensive_run_is_not_begun_without_consent(tmp_path: Path) -> None:
    write_pack(tmp_path, is_forced=False, as_json=False)
    items = [json.dumps({"id": f"R-{number}", "customer": "c", "text": "t"}) for number in range(20_000)]
    (tmp_path / "many.jsonl").write_text("\n".join(items))
    done = call("run", "./triage", "--input", "many.jsonl", "--budget", "100", cwd=tmp_path)
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert data(call("runs", "list", "--json", cwd=tmp_path)) == []


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_nothing_but_plain_text_reaches_a_pipe(environment: Mapping[str, str], project: Path) -> None:
    for arguments in (("status",), ("show", "latest", "R-101"), ("--help",)):
        done = call(*arguments, cwd=project, **environment)
        assert "\x1b" not in done.stdout + done.stderr


def test_a_closed_pipe_is_no_error(project: Path) -> None:
    process = subprocess.Popen(
        command("results"), cwd=project, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 0
    process.stderr.close()


def test_init_overwrites_nothing_unasked(project: Path) -> None:
    before = (project / "triage" / "workflow.toml").read_text()
    done = call("init", cwd=project)
    assert done.returncode == 3
    assert "init.exists" in done.stderr
    assert (project / "triage" / "workflow.toml").read_text() == before


@pytest.mark.parametrize(
    ("status", "failed", "allowed", "code"),
    [
        ("paused: budget", 0, "0", 5),
        ("paused: internal_error", 0, "0", 1),
        ("paused: provider_unavailable", 0, "0", 6),
        ("paused: provider_key", 0, "0", 6),
        ("completed", 0, "0", 0),
        ("completed", 1, "0", 4),
        ("completed", 2, "2", 0),
        ("completed", 2, "0.1", 4),
        ("completed", 1, "0.1", 0),
        ("failed", 0, "10", 4),
        ("paused", 0, "0", 5),
        ("cancelled", 0, "0", 5),
    ],
)
def test_the_end_of_a_run_has_an_exit_code(status: str, failed: int, allowed: str, code: int) -> None:
    state, _, reason = status.partition(": ")
    told = {"status": state, "reason": reason or None, "items": {"total": 10, "failed": failed}}
    assert exit_code(told, allowed) == code
