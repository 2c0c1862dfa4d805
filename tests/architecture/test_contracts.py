"""The shape of the tree: who may import whom, how long a module may get, what is locked and what is packed."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PACKAGES = ("orchestrator", "workers", "providers", "prompts")
MOST_LINES = 400
LONGER = {
    "orchestrator/database/migrations/versions/0001_first_schema.py": "one revision, never edited again",
}
LOCKS = ("requirements.lock", "requirements-dev.lock")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> dict[str, str]:
    """Versions by canonical name; of every requirement that the file holds, on whatever platform."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "# "]
    requirements = [Requirement(line.rstrip(" \\")) for line in lines]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in requirements}


def test_import_contracts_hold() -> None:
    command = [str(BIN / "lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_is_placed_by_a_contract() -> None:
    """A package whose layers are not exhaustive would let a new module import what it likes."""
    contracts = [one for one in project()["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    placed = {one["containers"][0] for one in contracts if one.get("exhaustive")}
    assert placed == {*PACKAGES, "orchestrator.database", "workers.limiter"}


def test_modules_are_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    long = {name for name, lines in lengths.items() if lines > MOST_LINES}
    assert long - LONGER.keys() == set(), "split it, or give the reason why not"
    assert LONGER.keys() - long == set(), "no longer long: take it off the list"


def test_celery_is_never_the_release_that_exits_when_the_broker_does() -> None:
    requirements = {one.name: one for one in map(Requirement, project()["project"]["dependencies"])}
    celery = requirements["celery"]
    assert not celery.specifier.contains("5.7.0")
    # The extras pin exact versions of redis-py that fight with our own.
    assert celery.extras == requirements["kombu"].extras == set()
    assert {"redis", "packaging"} <= requirements.keys()


@pytest.mark.parametrize("name", LOCKS)
def test_lock_answers_the_project(name: str) -> None:
    found = locked(name)
    for requirement in map(Requirement, project()["project"]["dependencies"]):
        version = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}; run make lock"
    assert "hatchling" in found, "the project is installed without build isolation"


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_hashes_and_no_place(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    entries = text.replace("\\\n", " ").splitlines()
    assert [line for line in entries if line and line[0] not in "# " and "--hash=sha256:" not in line] == []


def test_environments_of_users_and_developers_hold_the_same_versions() -> None:
    runtime, development = (locked(name) for name in LOCKS)
    assert runtime.items() <= development.items()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the built wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = directory.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_file_of_the_packages(wheel: set[str]) -> None:
    """Templates, catalogs, Lua and revisions are read at run time; a wheel without them works until it is asked."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert expected - wheel == set()
    assert {".toml", ".j2", ".lua", ".jsonl", ".mako"} <= {Path(name).suffix for name in expected}


def test_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == set(PACKAGES)
    assert not [name for name in wheel if name.endswith((".pyc", ".db", ".env", ".log"))]
