"""What a worker process writes to its log, as it was configured."""

import json

from tests.engine import launch_engine
from tests.packs import ONE


def test_a_worker_tells_its_life_in_lines_of_json() -> None:
    """Celery brings a logging of its own, with its own level and format, and must not have its way."""
    with launch_engine(settings={"logging": {"format": "json"}}, workers=1) as engine:
        run = engine.start_run(5, ONE)
        engine.wait(run)
        worker = engine.workers[0]
        worker.sigterm()
        # Python warns of a worker that runs as root, and Python's warnings are not log events.
        lines = [line for line in worker.log().splitlines() if line.startswith("{")]
        events = [json.loads(line) for line in lines]
        told = [event["event"] for event in events if event["event"].split(".")[0] in {"worker", "run"}]
        assert told == ["worker.started", "worker.ready", "run.ended", "worker.stopped"]
        assert "celery@" not in worker.log()
        assert " [config]" not in worker.log()
        assert {"timestamp", "level", "logger"} <= events[0].keys()


def test_a_worker_obeys_the_configured_level() -> None:
    settings = {"logging": {"level": "warning"}}
    with launch_engine(settings=settings, workers=0) as engine:
        worker = engine.start_worker(ready=False)
        run = engine.start_run(5, ONE)
        engine.wait(run)
        worker.sigterm()
        assert "[info" not in worker.log()
