"""What the limiter wastes and what it costs: `python -m benchmarks.limiter [--workers 1 4] [--limiter-only]`.

Two loads. The product against a strict service that refuses whatever its bucket of exactly the configured burst does
not hold: how much longer a run takes than the limit demands, how many calls were refused, and the processor time of
all worker processes and of the broker. And the limiter alone, in processes that only ask for permits and settle them.
"""

import argparse
import resource
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
from redis import Redis

from tests.engine import Engine, launch_engine
from tests.packs import ONE
from tests.servers import start_valkey, wait_until

BURST = 20
LATENCY_S = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limiter", description="Measure the limiter")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="worker processes (default: 1 and 4)")
    parser.add_argument("--rpm", type=int, default=1_200, help="requests per minute (default 1200)")
    parser.add_argument("--calls", type=int, default=1_200, help="calls of the run (default 1200)")
    parser.add_argument("--limiter-only", action="store_true", help="leave the product out")
    parser.add_argument("--product-only", action="store_true", help="leave the limiter alone out")
    given = parser.parse_args()
    for workers in given.workers:
        if not given.product_only:
            print(_alone(workers, given.rpm, given.calls), flush=True)
        if not given.limiter_only:
            print(_product(workers, given.rpm, given.calls), flush=True)


def _product(workers: int, rpm: int, calls: int) -> str:
    limits = {"rate_limit_rpm": rpm, "burst": BURST}
    service = {"rpm": rpm, "limiter": "bucket", "burst": BURST, "latency_s": LATENCY_S}
    with launch_engine(providers={"main": limits}, fakes={"main": service}, workers=workers) as engine:
        before_s = _cpu_s(engine)
        run = engine.start_run(calls, ONE)
        # Seldom, because the service answers from this very process.
        wait_until(lambda: engine.status(run)["status"] == "completed", calls / rpm * 120 + 60, 0.5)
        used_s = _cpu_s(engine) - before_s
        log = engine.fake.log()
    took_s = log.answered[-1].mono - log.received[0].mono
    ideal_s = max(0, calls - BURST) / rpm * 60 + LATENCY_S
    refused = log.statuses().get(429, 0)
    return (
        f"{workers} worker(s), {calls} calls at {rpm} rpm, burst {BURST}: {took_s:.2f} s, {took_s / ideal_s:.4f} x "
        f"the ideal {ideal_s:.1f} s; {refused} of {len(log.received)} refused; CPU of workers and broker {used_s:.2f} s"
    )


def _cpu_s(engine: Engine) -> float:
    pids = [worker.pid for worker in engine.workers] + [engine.valkey.pid]
    families = [one for pid in pids for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    return sum(times.user + times.system for times in (one.cpu_times() for one in families))


def _alone(processes: int, rpm: int, calls: int) -> str:
    """Processor time of everything: starting Python, importing, asking, settling, and the server's."""
    with start_valkey() as server, ExitStack() as held:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.limiter_asker", server.url, str(rpm), str(calls // processes)]
        askers = [held.enter_context(subprocess.Popen(command)) for _ in range(processes)]
        if any(asker.wait() for asker in askers):
            raise RuntimeError("an asker failed")
        took_s = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        with Redis.from_url(server.url) as client:
            told = client.info("cpu")
    server_s = told["used_cpu_user"] + told["used_cpu_sys"]
    askers_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (
        f"{processes} process(es), {calls} permits at {rpm} rpm: {took_s:.1f} s; CPU {askers_s + server_s:.2f} s, "
        f"of it {server_s:.2f} s in the server"
    )


if __name__ == "__main__":
    main()
