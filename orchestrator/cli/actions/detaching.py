"""`--detach` on one machine: the same command goes on in a session of its own, and this one leaves.

The broker and the worker of local mode live as long as the command that started them, so somebody has to stay. On a
cluster nobody has to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from orchestrator.cli.actions.output import say
from orchestrator.config import ConfigManager
from orchestrator.errors import ExitCode

LAUNCH_S = 600.0
"""A million items take minutes to store; the launch record comes after that."""


def run_detached(config: ConfigManager, arguments: list[str]) -> int:
    """Starts the command again in the background, waits for its launch record, and hands that on.

    Returns:
        0 once the run is at work; the exit code of the command when it ended before.
    """
    directory = config.settings.home / "logs"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    stem = directory / f"detached-{time.time_ns()}"
    records, messages = stem.with_suffix(".jsonl"), stem.with_suffix(".log")
    kept = [argument for argument in arguments if argument not in ("--detach", "--json")]
    command = [sys.executable, "-m", "orchestrator.cli", *kept, "--json", "--progress", "none"]
    with records.open("wb") as out, messages.open("wb") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)  # noqa: S603 - ourselves
    line = _first_line(child, records)
    if line is None:
        sys.stderr.write(messages.read_text(encoding="utf-8"))
        return child.wait() or int(ExitCode.INTERNAL_ERROR)
    if "--json" in arguments:
        sys.stdout.write(line)
    else:
        run_id = json.loads(line)["run_id"]
        say(f"run {run_id} goes on in the background (process {child.pid}); its messages: {messages}")
        say(f"follow it with: llm-orchestrator status {run_id} --watch")
    return int(ExitCode.OK)


def _first_line(child: subprocess.Popen[bytes], records: Path) -> str | None:
    pause = threading.Event()
    deadline = time.monotonic() + LAUNCH_S
    while time.monotonic() < deadline:
        has_ended = child.poll() is not None
        line = records.read_text(encoding="utf-8").partition("\n")
        if line[1]:
            return line[0] + "\n"
        if has_ended:
            return None
        pause.wait(0.05)
    return None
