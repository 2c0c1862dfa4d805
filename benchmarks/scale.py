"""One run of very many tiny calls, killed in the middle: shows what grows with the number of items, and what does not.

`python -m benchmarks.scale [--items N]`. The real command runs as a user would run it: its own Valkey, one worker,
SQLite. The simulator answers at once, so that everything measured is ours.
"""

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from redis import Redis

from benchmarks.measuring import MB, kind_of
from orchestrator.config import ConfigManager
from orchestrator.manager import WorkflowManager

PACK = Path(__file__).parent / "tiny"
SAMPLE_S = 1.0
QUERY_EVERY = 10
"""Samples between two looks at the status, which is timed each time."""
TENTHS = 10
Timed = tuple[float, float]
"""Seconds by the clock, and of the processor."""
LONGEST_S = 3 * 3600.0
CONFIG = '[global]\ndefault_provider = "simulator"\n\n[llm_providers.simulator]\ndialect = "simulator"\n'


@dataclass(frozen=True, slots=True)
class Sample:
    """One look: seconds at work, calls completed, and MB by what was looked at (`worker RSS`, `Valkey data`, ...)."""

    at_s: float
    completed: int
    memory_mb: dict[str, float]


@dataclass(slots=True)
class Facts:
    """What a whole run showed. Times are seconds."""

    samples: list[Sample] = field(default_factory=list[Sample])
    first_call_s: float = 0.0
    resumed_s: float = 0.0
    wall_s: float = 0.0
    query_s: list[Timed] = field(default_factory=list[Timed])
    end_query_s: Timed = (0.0, 0.0)
    end_status_s: float = 0.0
    bytes_per_item: float = 0.0


class Bench:
    """A home directory with its input and the processes of one command at a time."""

    def __init__(self, home: Path, items: int) -> None:
        self._home = home
        self._items = items
        self._environment = {
            "LLM_ORCHESTRATOR_HOME": str(home / "data"),
            "LLM_ORCHESTRATOR_CONFIG": str(home / "llm-orchestrator.toml"),
        }
        self._database = home / "data" / "orchestrator.db"
        self._facts = Facts()
        self._active_s = 0.0
        self._pause = threading.Event()

    def run(self) -> Facts:
        """Runs to the middle, kills everything, runs to the end, and looks at what is left."""
        began = time.monotonic()
        started = time.time()
        with self._started() as command:
            self._watch(command, lambda done: done >= self._items // 2)
            self._facts.first_call_s = self._sent_after(0) - started
            _kill_all(command)
        last = self._scalar("SELECT max(id) FROM llm_usage")
        again = time.time()
        with self._started() as command:
            while self._sent_after(last) == 0.0:
                _require_alive(command)
                self._pause.wait(0.02)
            self._facts.resumed_s = self._sent_after(last) - again
            self._watch(command, lambda _: False)
            if command.wait():
                sys.exit(f"the run ended with {command.returncode}\n{(self._home / 'log').read_text('utf-8')[-2000:]}")
        self._facts.wall_s = time.monotonic() - began
        self._look_back()
        return self._facts

    def write_input(self) -> None:
        """Writes the items and the configuration."""
        (self._home / "llm-orchestrator.toml").write_text(CONFIG, "utf-8")
        with (self._home / "items.jsonl").open("w", encoding="utf-8") as file:
            for number in range(self._items):
                file.write(json.dumps({"key": f"item-{number}", "text": f"text number {number}"}) + "\n")

    def _started(self) -> subprocess.Popen[bytes]:
        parts = ("run", str(PACK), "--input", str(self._home / "items.jsonl"), "--yes")
        with (self._home / "log").open("ab") as log:
            return subprocess.Popen(
                self._command(*parts), env=ConfigManager().child_environment(self._environment), stdout=log, stderr=log
            )

    def _command(self, *parts: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator.cli", *parts]

    def _watch(self, command: subprocess.Popen[bytes], is_over: Callable[[int], bool]) -> None:
        """Samples until the command has ended or enough calls are completed; counts the time in between as work."""
        before, deadline = time.monotonic(), time.monotonic() + LONGEST_S
        while command.poll() is None and time.monotonic() < deadline:
            done = self._completed()
            now = time.monotonic()
            self._active_s, before = self._active_s + now - before, now
            self._facts.samples.append(Sample(self._active_s, done, _memory(command.pid)))
            if done and len(self._facts.samples) % QUERY_EVERY == 0:
                self._facts.query_s.append(self._timed_query())
            if is_over(done):
                return
            self._pause.wait(SAMPLE_S)

    def _completed(self) -> int:
        closed = self._scalar("SELECT sum(completed) FROM windows WHERE status = 'closed'")
        return closed + self._scalar(
            "SELECT count(*) FROM windows w JOIN prompt_executions p ON p.window_id = w.id AND p.status = 'completed'"
            " WHERE w.status = 'open'"
        )

    def _sent_after(self, number: int) -> float:
        """When the first attempt behind a number was sent: s since epoch; 0 while there is none."""
        return self._scalar(f"SELECT sent_at FROM llm_usage WHERE id > {number:d} ORDER BY id LIMIT 1")

    def _scalar(self, query: str) -> int:
        if not self._database.exists():
            return 0
        try:
            with closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=30)) as connection:
                row = connection.execute(query).fetchone()
        except sqlite3.OperationalError:
            # The tables are being made at this moment.
            return 0
        return row[0] or 0 if row else 0

    def _timed_query(self) -> Timed:
        config = ConfigManager(environ=ConfigManager().child_environment(self._environment))
        with WorkflowManager(config) as manager:
            run, _ = manager.find_run("latest")
            return _timed(lambda: manager.track_progress(run))

    def _look_back(self) -> None:
        status = self._command("status", "latest", "--json")
        environment = ConfigManager().child_environment(self._environment)

        def ask() -> None:
            told = subprocess.run(status, env=environment, capture_output=True, check=True).stdout
            assert json.loads(told)["calls"]["completed"] == self._items

        self._facts.end_status_s = statistics.median(_timed(ask)[0] for _ in range(3))
        self._facts.end_query_s = statistics.median_low([self._timed_query() for _ in range(3)])
        files = self._database.parent.glob(f"{self._database.name}*")
        self._facts.bytes_per_item = sum(path.stat().st_size for path in files) / self._items


def _memory(root: int) -> dict[str, float]:
    found: dict[str, float] = {}
    try:
        for one in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
            kind = kind_of(one, root)
            memory = one.memory_full_info()
            for name, value in (("RSS", memory.rss), ("PSS", memory.pss)):
                found[f"{kind} {name}"] = found.get(f"{kind} {name}", 0.0) + value / MB
            line = one.cmdline()
            if "--unixsocket" in line:
                with Redis(unix_socket_path=line[line.index("--unixsocket") + 1]) as redis:
                    found["valkey data"] = _used_mb(redis)
    except (psutil.Error, OSError):
        # A process that has just begun, or is about to end.
        return {}
    return found


def _used_mb(redis: Redis) -> float:
    return int(redis.info("memory")["used_memory"]) / MB  # pyright: ignore[reportUnknownMemberType]  # redis-py leaves it open


def _kill_all(command: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    for one in family:
        os.kill(one.pid, signal.SIGKILL)
    psutil.wait_procs(family, 10)


def _require_alive(command: subprocess.Popen[bytes]) -> None:
    if command.poll() is not None:
        sys.exit(f"the second command ended with {command.returncode} before it asked anything")


def _timed(act: Callable[[], object]) -> Timed:
    began, began_cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - began_cpu


def _rates(samples: Sequence[Sample], items: int) -> Iterator[float]:
    """Calls per second of every tenth of the run, on straight lines between samples."""
    marks = [_reached(samples, items * tenth / TENTHS) for tenth in range(TENTHS + 1)]
    for begin, end in zip(marks, marks[1:], strict=False):
        yield items / TENTHS / max(end - begin, 0.001)


def _reached(samples: Sequence[Sample], count: float) -> float:
    before = samples[0]
    for one in samples:
        if one.completed >= count and one.completed > before.completed:
            share = (count - before.completed) / (one.completed - before.completed)
            return before.at_s + max(0.0, share) * (one.at_s - before.at_s)
        if one.completed < count or one.completed == 0:
            before = one
    return samples[-1].at_s


def _grown(samples: Sequence[Sample], name: str) -> float:
    """MB per 100,000 calls: least squares behind the first fifth, while everything still warms up."""
    points = [(one.completed, one.memory_mb[name]) for one in samples if name in one.memory_mb]
    points = [point for point in points if point[0] >= points[-1][0] / 5]
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope * 100_000


def table(facts: Facts, items: int) -> str:
    """What was measured, for people."""
    samples = facts.samples
    lines = [
        f"{items:,} items, one tiny call each, {os.cpu_count()} processors, whole {facts.wall_s:,.0f} s",
        f"  {'first call after the command':44}{facts.first_call_s:>10.2f} s",
        f"  {'calls flow again after killing everything':44}{facts.resumed_s:>10.2f} s",
        f"  {'calls/s in every tenth':44}  {' '.join(f'{rate:,.0f}' for rate in _rates(samples, items))}",
    ]
    for name in sorted({name for one in samples for name in one.memory_mb}):
        most = max(one.memory_mb.get(name, 0.0) for one in samples)
        lines.append(f"  {name:44}{most:>10.1f} MB at most, {_grown(samples, name):+.2f} MB per 100,000 calls")
    slowest = max(facts.query_s, default=(0.0, 0.0))
    for name, (wall_s, cpu_s) in (("at most while it runs", slowest), ("at the end", facts.end_query_s)):
        shown = f"status, the query, {name}"
        lines.append(f"  {shown:44}{wall_s * 1000:>10.1f} ms, of which {cpu_s * 1000:.1f} ms processor time")
    lines += [
        f"  {'status, the whole command, at the end':44}{facts.end_status_s * 1000:>10.0f} ms",
        f"  {'database':44}{facts.bytes_per_item:>10,.0f} bytes per item",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="Measure what grows with a run")
    parser.add_argument("--items", type=int, default=200_000, help="items of the run (default 200,000)")
    parser.add_argument("--folder", type=Path, help="where to work, some 2 GB for a million items (default: temporary)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-", dir=given.folder) as folder:
        bench = Bench(Path(folder), given.items)
        bench.write_input()
        print(table(bench.run(), given.items), flush=True)


if __name__ == "__main__":
    main()
