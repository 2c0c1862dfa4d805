"""Begins a run over many items in a process of its own, so that its memory can be measured; prints its number."""

import json
import sys
from pathlib import Path

import psutil

from orchestrator.config import ConfigManager
from orchestrator.manager import RunRequest, WorkflowManager

FIRST_ITEMS = 3_000


def main(home: Path, pack: str, items: str) -> None:
    process = psutil.Process()
    memory: dict[str, int] = {}

    def sample(stored: int) -> None:
        if stored >= FIRST_ITEMS:
            memory.setdefault("early", process.memory_info().rss)
        memory["late"] = process.memory_info().rss

    config = ConfigManager(cwd=home, user_config=home / "none.toml")
    with WorkflowManager(config) as manager:
        plan = manager.plan(RunRequest(pack=pack, input=items, provider="simulator"))
        run = manager.execute_workflow(plan, on_stored=sample)
    print(json.dumps({"run": run.run, "run_id": run.run_id, **memory}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
