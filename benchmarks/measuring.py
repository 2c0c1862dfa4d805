"""Runs a command beside a fake provider and measures it: time, processor time and memory over all its processes.

Times come from the provider's book, so that both sides are measured by the same clock at the same place. Processor
time is what the kernel accounts to the command and to every process it started and waited for. Memory is the largest
sum of PSS seen (what is shared between processes counts once), sampled.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.config import ConfigManager
from tests.fakes.provider_log import ProviderLog, read_log

SAMPLE_S = 0.2
MB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Measured:
    """What one command took.

    Attributes:
        completed: calls with an answer, as the command says.
        wall_s: from its start to its end.
        asking_s: from the first request that arrived to the last answer that left.
        cpu_s: of all its processes, start and end included.
        asking_cpu_s: of these, between first request and last answer, to a fifth of a second.
        cpu_by_process: CPU seconds by kind of process, as last seen.
        peak_mb: MB of PSS of all its processes together.
        peak_by_process: MB by kind of process at that moment.
        prompts: hashes of what was asked.
    """

    completed: int
    wall_s: float
    asking_s: float
    cpu_s: float
    asking_cpu_s: float
    cpu_by_process: Mapping[str, float]
    peak_mb: float
    peak_by_process: Mapping[str, float]
    prompts: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Sample:
    wall: float
    cpu_s: Mapping[str, float]
    pss_mb: Mapping[str, float]


@contextmanager
def fake_provider(options: Mapping[str, float], log: Path) -> Generator[str]:
    """Serves from a process of its own while the block runs; yields the base URL."""
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "tests.fakes.provider_server", "--log", str(log), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["base_url"]
        finally:
            server.terminate()


def measure(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Measured:
    """Runs `python -m COMMAND` to its end; it prints one JSON object with `completed`.

    Raises:
        RuntimeError: the command failed.
    """
    samples: list[_Sample] = []
    ended = threading.Event()
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=ConfigManager().child_environment(environment),
        stdout=subprocess.PIPE,
        text=True,
    )
    sampler = threading.Thread(target=_sample, args=(process.pid, samples, ended))
    sampler.start()
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - started
    ended.set()
    sampler.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return _measured(json.loads(told)["completed"], wall_s, used.ru_utime + used.ru_stime, samples, read_log(log))


def _measured(completed: int, wall_s: float, cpu_s: float, samples: Sequence[_Sample], log: ProviderLog) -> Measured:
    first, last = log.received[0], log.answered[-1]
    largest = max(samples, key=lambda sample: sum(sample.pss_mb.values()))
    return Measured(
        completed=completed,
        wall_s=wall_s,
        asking_s=last.mono - first.mono,
        cpu_s=cpu_s,
        asking_cpu_s=_cpu_at(samples, last.wall) - _cpu_at(samples, first.wall),
        cpu_by_process={
            kind: max(sample.cpu_s.get(kind, 0.0) for sample in samples) for kind in samples[-1].cpu_s or largest.cpu_s
        },
        peak_mb=sum(largest.pss_mb.values()),
        peak_by_process=largest.pss_mb,
        prompts=frozenset(line.prompt_hash for line in log.received),
    )


def _cpu_at(samples: Sequence[_Sample], wall: float) -> float:
    """CPU seconds of all processes at a moment, on a straight line between the samples around it."""
    before = max((one for one in samples if one.wall <= wall), key=lambda one: one.wall, default=samples[0])
    after = min((one for one in samples if one.wall > wall), key=lambda one: one.wall, default=samples[-1])
    low, high = sum(before.cpu_s.values()), sum(after.cpu_s.values())
    if after.wall <= before.wall:
        return low
    return low + (high - low) * (wall - before.wall) / (after.wall - before.wall)


def _sample(pid: int, samples: list[_Sample], ended: threading.Event) -> None:
    family: dict[int, tuple[str, psutil.Process]] = {}
    while not ended.is_set():
        cpu_s: dict[str, float] = {}
        pss_mb: dict[str, float] = {}
        wall = time.time()
        try:
            root = psutil.Process(pid)
            for one in (root, *root.children(recursive=True)):
                # A process has its parent's name until it has become a program of its own.
                family[one.pid] = (kind_of(one, pid), one)
                times = one.cpu_times()
                kind = family[one.pid][0]
                cpu_s[kind] = cpu_s.get(kind, 0.0) + times.user + times.system
                pss_mb[kind] = pss_mb.get(kind, 0.0) + one.memory_full_info().pss / MB
        except psutil.Error:
            pass
        else:
            samples.append(_Sample(wall, cpu_s, pss_mb))
        ended.wait(SAMPLE_S)


def kind_of(process: psutil.Process, root: int) -> str:
    """What a process of a command is: `command` for the one with the pid `root`, `worker`, `valkey` or `other`."""
    if process.pid == root:
        return "command"
    line = process.cmdline()
    if "celery" in line:
        return "worker"
    return "valkey" if line and "valkey" in Path(line[0]).name else "other"
