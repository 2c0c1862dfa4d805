"""The product as one command would run it: plan, private Valkey, one worker, follow to the end.

Run as a process of its own: `python -m benchmarks.product PACK ITEMS.jsonl LOG`. Configuration comes from the
environment.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from orchestrator.config import ConfigManager
from orchestrator.local import LocalEngine
from orchestrator.logs import Logger
from orchestrator.manager import RunRequest, WorkflowManager

FOLLOW_S = 0.5


def main() -> None:
    """Runs the pack over the items and prints how many calls were completed."""
    pack, items, log = sys.argv[1:]
    config = ConfigManager()
    Logger.init("warning")
    with WorkflowManager(config) as manager:
        manager.database.migrate()
        plan = manager.plan(RunRequest(pack=pack, input=items))
        with LocalEngine(config, Path(log)) as engine:
            manager.use_broker(engine.redis_url)
            started = manager.execute_workflow(plan)
            status = _follow(manager, engine, started.run)
    print(json.dumps({"completed": status["calls"]["completed"], "attempts": status["attempts"]}))


def _follow(manager: WorkflowManager, engine: LocalEngine, run: int) -> dict[str, Any]:
    pause = threading.Event()
    while (status := manager.track_progress(run))["status"] in ("pending", "running"):
        engine.poll()
        pause.wait(FOLLOW_S)
    return status


if __name__ == "__main__":
    main()
