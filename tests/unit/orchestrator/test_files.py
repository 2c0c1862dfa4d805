"""Packs are read with care, and files are written whole, privately and without destroying earlier ones."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentNotReady, WorkflowError
from orchestrator.files import FileManager, make_private, write_atomically

DAY = date(2026, 11, 22)


@pytest.fixture
def files(tmp_path: Path) -> FileManager:
    return FileManager(tmp_path / "home")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    root = tmp_path / "rank"
    (root / "parts").mkdir(parents=True)
    (root / "workflow.toml").write_text("name = 'rank'\n")
    (root / "judge.md.j2").write_text("\ufeffJudge {{ item.name }}\n")
    (root / "parts" / "rules.j2").write_text("Be fair.\n")
    (root / "items.csv").write_text("id\na\n")
    (root / "README.md").write_text("About it.\n")
    (root / "logo.png").write_bytes(b"\x89PNG\x00")
    return root


def codes(files: FileManager, pack: str | Path) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        files.load_prompts(pack)
    return [problem.code for problem in caught.value.problems]


def test_a_folder_is_read_whole(files: FileManager, pack: Path) -> None:
    loaded = files.load_prompts(pack)
    assert (loaded.name, loaded.root, loaded.workflow_text) == ("rank", pack, "name = 'rank'\n")
    assert dict(loaded.files) == {"judge.md.j2": "Judge {{ item.name }}\n", "parts/rules.j2": "Be fair.\n"}
    assert loaded.sample_items == pack / "items.csv"
    assert files.load_prompts(f"{pack}/../rank") == loaded


def test_the_digest_covers_what_changes_behaviour(files: FileManager, pack: Path) -> None:
    before = files.load_prompts(pack).sha256
    (pack / "README.md").write_text("Something else.\n")
    (pack / "items.csv").write_text("id\nb\n")
    assert files.load_prompts(pack).sha256 == before
    (pack / "judge.md.j2").rename(pack / "jury.md.j2")
    assert files.load_prompts(pack).sha256 != before


def test_shipped_packs_are_found_by_name(files: FileManager) -> None:
    assert files.list_packs()
    for name in files.list_packs():
        loaded = files.load_prompts(name)
        assert loaded.name == name
        assert loaded == files.load_prompts(name.replace("_", "-"))
        assert loaded.sample_items is not None


def test_every_problem_of_a_pack_is_reported(files: FileManager, pack: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (pack / "out.txt").symlink_to(tmp_path / "secret.txt")
    (pack / "gone.txt").symlink_to(tmp_path / "gone")
    (pack / "latin.j2").write_bytes(b"\xe9")
    (pack / "large.j2").write_bytes(b"x" * 1_000_001)
    (pack / "JUDGE.md.j2").write_text("x")
    os.mkfifo(pack / "pipe.j2")
    (pack / "workflow.toml").unlink()
    assert sorted(codes(files, pack)) == [
        "file.encoding",
        "file.not-regular",
        "file.too-large",
        "pack.broken-link",
        "pack.case-clash",
        "pack.link-outside",
        "pack.no-workflow",
    ]


def test_links_inside_a_pack_are_fine(files: FileManager, pack: Path) -> None:
    (pack / "same.j2").symlink_to("judge.md.j2")
    assert files.load_prompts(pack).files["same.j2"] == "Judge {{ item.name }}\n"


def test_too_many_files_are_refused(files: FileManager, pack: Path) -> None:
    for number in range(501):
        (pack / f"{number}.txt").touch()
    assert codes(files, pack) == ["pack.too-large"]


def test_what_is_no_pack(files: FileManager, pack: Path) -> None:
    assert codes(files, "no/such/pack") == ["pack.missing"]
    assert codes(files, "bad\x00name") == ["pack.missing"]
    assert codes(files, pack / "workflow.toml") == ["pack.not-a-folder"]
    with pytest.raises(WorkflowError, match="did you mean 'project_selection'"):
        files.load_prompts("project_selecton")


def test_results_of_one_day_do_not_destroy_each_other(files: FileManager) -> None:
    first = files.save_results(DAY, "project_selection", {"run_id": "run-1", "cost_usd": Decimal("0.10")})
    second = files.save_results(DAY, "project_selection", {"run_id": "run-2", "at": datetime(2026, 1, 1, tzinfo=UTC)})
    day = files.home / "results" / "2026-11-22"
    assert first == day / "project-selection-results-run-1.json"
    assert json.loads(first.read_text()) == {"run_id": "run-1", "cost_usd": "0.10"}
    latest = files.home / "results" / "latest" / "project-selection-results.json"
    for path in (second, day / "project-selection-results.json", latest):
        assert json.loads(path.read_text()) == {"run_id": "run-2", "at": "2026-01-01T00:00:00+00:00"}
    assert len(list(day.iterdir())) == 3


def test_results_can_come_in_pieces(files: FileManager) -> None:
    path = files.save_results(DAY, "rank", iter(['{"a":', " 1}"]), run_id="r")
    assert json.loads(path.read_text()) == {"a": 1}


def test_names_cannot_leave_the_directory(files: FileManager) -> None:
    path = files.save_results(DAY, "../../etc/x", {"run_id": "../y"})
    assert path == files.home / "results" / "2026-11-22" / "etc-x-results-y.json"


def test_what_is_written_is_for_the_owner_only(files: FileManager) -> None:
    before = os.umask(0)
    try:
        path = files.save_results(DAY, "rank", {"run_id": "r"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in (path.parent, files.home / "results", files.home):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_atomically(target, [b"old"])

    def broken() -> Iterator[bytes]:
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentNotReady, match="No space left"):
        write_atomically(target, broken())
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_home_that_cannot_be_made_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentNotReady, match="LLM_ORCHESTRATOR_HOME"):
        make_private(tmp_path / "file" / "home")


def test_backups_hold_all_results(files: FileManager) -> None:
    assert files.backup_data() is None
    files.save_results(DAY, "rank", {"run_id": "r"})
    archive = files.backup_data(datetime(2026, 11, 22, 1, 2, 3, tzinfo=UTC))
    assert archive == files.home / "backups" / "results-20261122T010203Z.tar.gz"
    with tarfile.open(archive) as opened:
        assert "results/2026-11-22/rank-results-r.json" in opened.getnames()


def test_cleanup_takes_old_cache_files_only(files: FileManager, tmp_path: Path) -> None:
    assert files.cleanup_cache(timedelta(days=1)) == 0
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    for name in ("old", "new"):
        write_atomically(files.home / "cache" / "llm-responses" / name, [b"x"])
    (files.home / "cache" / "link").symlink_to(outside)
    for path in (files.home / "cache" / "llm-responses" / "old", outside / "keep"):
        os.utime(path, (0, 0))
    assert files.cleanup_cache(timedelta(days=1)) == 1
    assert [path.name for path in (files.home / "cache" / "llm-responses").iterdir()] == ["new"]
    assert (outside / "keep").exists()
