"""Scenario D: what the limiter wastes and what it costs, beside a service that refuses what its bucket does not hold.

That bucket has exactly the configured burst. Measured are how much longer a run takes than the limit demands, how many
calls were refused, and the processor time of all worker processes and of the broker.

`python -m benchmarks.limiter [--workers 1 4] [--alone]` prints one run of each; with `--alone` the limiter has the
processes to itself: they only ask for permits and settle them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from redis import Redis

from benchmarks import tables
from benchmarks.measuring import fake_provider
from orchestrator.logs import Logger
from tests.engine import Engine, launch_engine
from tests.fakes.provider_log import ProviderLog, read_log
from tests.packs import ONE
from tests.servers import start_valkey, wait_until

RPM, CALLS, BURST, LATENCY_S = 1_200, 1_200, 20, 0.3
SERVICE = {"rpm": RPM, "limiter": "bucket", "burst": BURST, "latency_s": LATENCY_S}
IDEAL_S = (CALLS - BURST) / RPM * 60 + LATENCY_S
WORKERS = (1, 4)
MOST_OVER_IDEAL = 1.02
MOST_ALONE_CPU_S = 5.0


@dataclass(frozen=True)
class Kept:
    """One run under the limit.

    Attributes:
        took_s: from the first request that arrived to the last answer that left.
        refused: requests that the service turned away.
        cpu_s: of whoever asked; of the product all workers and the broker, from the start of the run to its end.
    """

    took_s: float
    refused: int
    cpu_s: float


def report(rounds: int) -> tuple[str, Any]:
    """The table over so many rounds, and the numbers of every run."""
    found: dict[int, list[Kept]] = {workers: [] for workers in WORKERS}
    plain: list[Kept] = []
    for _ in range(rounds):
        for workers in WORKERS:
            if workers == WORKERS[0]:
                # At the same time, because a minute of twenty calls a second disturbs nobody.
                with _pacing(plain):
                    found[workers].append(run_under_limit(workers))
            else:
                found[workers].append(run_under_limit(workers))
    alone = [run_alone(WORKERS[-1]) for _ in range(rounds)]
    lines = [
        f"\nD. {CALLS:,} calls of {LATENCY_S} s at a strict {RPM:,} RPM, burst {BURST}: what a limit costs us"
        f" (median of {rounds})",
        tables.HEAD,
    ]
    for workers, kept in found.items():
        who = "1 worker" if workers == 1 else f"{workers} workers"
        took, paced = [one.took_s for one in kept], [one.took_s for one in plain]
        lines.append(tables.line(f"{who}: s, first send to last answer", took, IDEAL_S * MOST_OVER_IDEAL, plain=paced))
        lines.append(
            tables.line(f"{who}: times the ideal {IDEAL_S:.1f} s", [s / IDEAL_S for s in took], MOST_OVER_IDEAL)
        )
        refused = [one.refused for one in kept]
        lines.append(tables.line(f"{who}: refused", refused, 0, plain=[one.refused for one in plain], digits=0))
        cpu = [one.cpu_s for one in kept]
        lines.append(tables.line(f"{who}: CPU s with the broker", cpu, plain=[one.cpu_s for one in plain]))
    lines.append(tables.line(f"limiter alone, {WORKERS[-1]} processes: CPU s", alone, MOST_ALONE_CPU_S))
    numbers = {f"workers={workers}": [asdict(one) for one in kept] for workers, kept in found.items()}
    return "\n".join(lines), numbers | {"plain": [asdict(one) for one in plain], "alone_cpu_s": alone}


def run_under_limit(workers: int) -> Kept:
    """One run of the product."""
    limits = {"rate_limit_rpm": RPM, "burst": BURST}
    with launch_engine(providers={"main": limits}, fakes={"main": SERVICE}, workers=workers) as engine:
        before_s = _cpu_s(engine)
        run = engine.start_run(CALLS, ONE)
        # Seldom, because the service answers from this very process.
        wait_until(lambda: engine.status(run)["status"] == "completed", 4 * IDEAL_S, 0.5)
        used_s = _cpu_s(engine) - before_s
        return _kept(engine.fake.log(), used_s)


def _kept(log: ProviderLog, cpu_s: float) -> Kept:
    return Kept(log.answered[-1].mono - log.received[0].mono, log.statuses().get(429, 0), cpu_s)


def _cpu_s(engine: Engine) -> float:
    pids = [worker.pid for worker in engine.workers] + [engine.valkey.pid]
    families = [one for pid in pids for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    return sum(times.user + times.system for times in (one.cpu_times() for one in families))


@contextmanager
def _pacing(found: list[Kept]) -> Generator[None]:
    """The plain client at work while the block runs, with a service of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log = Path(folder) / "plain.log"
        with fake_provider(SERVICE, log) as url:
            command = [sys.executable, "-m", "benchmarks.pacing", f"{url}/chat/completions"]
            command += [str(CALLS), str(RPM), str(BURST)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
                yield
                told = json.loads(client.communicate()[0])
            found.append(_kept(read_log(log), told["cpu_s"]))


def run_alone(processes: int) -> float:
    """Processor time of everything: starting Python, importing, asking, settling, and the server's."""
    with start_valkey() as server, ExitStack() as held:
        command = [sys.executable, "-m", "benchmarks.limiter_asker", server.url, str(RPM), str(CALLS // processes)]
        askers = [held.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)) for _ in range(processes)]
        asked = [json.loads(asker.communicate()[0])["cpu_s"] for asker in askers]
        with Redis.from_url(server.url) as client:
            told = client.info("cpu")
    return sum(asked) + told["used_cpu_user"] + told["used_cpu_sys"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limiter", description="Measure the limiter")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="worker processes (default: 1 and 4)")
    parser.add_argument("--alone", action="store_true", help="the limiter without the product")
    given = parser.parse_args()
    Logger.init("warning")
    for workers in given.workers:
        began = time.monotonic()
        if given.alone:
            print(
                f"{workers} process(es): CPU {run_alone(workers):.2f} s in {time.monotonic() - began:.1f} s", flush=True
            )
        else:
            print(f"{workers} worker(s): {run_under_limit(workers)}, ideal {IDEAL_S:.1f} s", flush=True)


if __name__ == "__main__":
    main()
