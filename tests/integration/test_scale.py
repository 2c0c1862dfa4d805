"""Memory that depends on the size of a window, and not on the number of items."""

import json
import subprocess
import sys
import time

import psutil

from orchestrator.manager import StartedRun
from tests.engine import launch_engine
from tests.packs import one_step
from tests.servers import wait_until

ITEMS, EARLY = 10_000, 3_000
MIB = 1024 * 1024


def test_ten_thousand_items_go_through_flat_memory() -> None:
    """Producer, worker and broker are measured after the first 3,000 items and at the end."""
    settings = {"worker": {"window_size": 500, "lanes": 4}, "llm_providers.simulator": {"dialect": "simulator"}}
    with launch_engine(settings=settings, workers=1) as engine:
        items = engine.home / "items.jsonl"
        with items.open("w") as lines:
            for number in range(ITEMS):
                lines.write(json.dumps({"key": f"k{number}", "text": f"item number {number} " * 10}) + "\n")
        pack = one_step().write(engine.home / "packs")
        worker, began = psutil.Process(engine.workers[0].pid), time.monotonic()
        command = [sys.executable, "-m", "tests.integration.producer_process", str(engine.home), str(pack), str(items)]
        producer = subprocess.Popen(command, cwd=engine.home, env=engine.environment, stdout=subprocess.PIPE)

        def completed() -> int:
            found = engine.rows("SELECT count(*) FROM prompt_executions WHERE status = 'completed'")
            return found[0][0]

        with engine.redis() as redis:
            wait_until(lambda: completed() >= EARLY, 60, 0.1)
            early_worker, early_redis = worker.memory_info().rss, int(redis.info("memory")["used_memory"])
            output, _ = producer.communicate(timeout=60)
            made = json.loads(output.splitlines()[-1])
            run = StartedRun(made["run"], made["run_id"], resumed=False)
            most_redis = [early_redis]

            def has_ended() -> bool:
                most_redis.append(int(redis.info("memory")["used_memory"]))
                return engine.status(run)["status"] == "completed"

            wait_until(has_ended, 90, 0.1)
        took_s = time.monotonic() - began
        grown_worker = (worker.memory_info().rss - early_worker) / MIB
        grown_producer = (made["late"] - made["early"]) / MIB
        print(
            f"{ITEMS} calls in {took_s:.1f} s ({ITEMS / took_s:.0f} a second with storing); grown since {EARLY}: "
            f"worker {grown_worker:.1f} MiB to {worker.memory_info().rss / MIB:.0f}, producer {grown_producer:.1f} MiB "
            f"to {made['late'] / MIB:.0f}, Redis at most {max(most_redis) / MIB:.1f} MiB"
        )
        assert engine.check(run).calls == {"completed": ITEMS}
        assert grown_worker < 30
        assert grown_producer < 20
        assert max(most_redis) / MIB < 12
