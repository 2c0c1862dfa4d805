"""A disk that is full: said clearly, nothing lost, nothing sent meanwhile, and no hand needed once there is room."""

import json
import resource
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from tests.e2e.test_cli_basics import clean_environment, command
from tests.engine import launch_engine
from tests.packs import ONE
from tests.servers import wait_until

CALLS = 200
FULL = "database or disk is full"


def test_a_full_disk_is_a_pause_that_says_so() -> None:
    providers = {"main": {"concurrency": 20}}
    with launch_engine(providers=providers, fakes={"main": {"latency_s": 1.0}}, workers=0) as engine:
        no_space = engine.home / "no-space"
        worker = engine.start_worker(module="tests.faults.faulty_worker", NO_SPACE=str(no_space))
        run = engine.start_run(CALLS, ONE)
        engine.wait_received(20)
        no_space.touch()
        wait_until(lambda: FULL in worker.log(), 30)
        wait_until(lambda: engine.fake.provider.in_flight == 0, 10)
        sent = engine.fake.provider.number
        assert sent < CALLS
        assert engine.status(run)["status"] == "running"
        engine.fake.control(latency_s=0.0)
        no_space.unlink()
        assert engine.wait(run)["calls"]["completed"] == CALLS
        # Answers that came while there was no room for them were kept.
        assert engine.check(run).attempts == {"ok": CALLS}
        assert worker.is_alive()
        with closing(sqlite3.connect(engine.home / "data" / "orchestrator.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_producer_without_room_says_what_to_do_and_its_command_goes_on_afterwards(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    rows = [{"key": f"k{number}", "text": "a long story " * 400} for number in range(150)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack = str(ONE.write(tmp_path))
    arguments = command("run", pack, "--input", str(items), "--provider", "simulator", "--json", "--yes")

    def run(most_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
        """No file of the process may become larger, which is a full disk for everybody without privileges."""

        def limit() -> None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard if most_bytes is None else most_bytes, hard))

        return subprocess.run(
            arguments,
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=limit,
        )

    refused = run(700_000)
    assert refused.returncode == 6, refused.stderr
    assert "database.unavailable" in refused.stderr
    assert "make room on the disk" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = run()
    assert done.returncode == 0, done.stderr
    launch, *_, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert launch["resumed"] is True
    assert (end["status"], end["calls"]["completed"]) == ("completed", 150)
