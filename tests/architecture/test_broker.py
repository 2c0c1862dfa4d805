"""What producers and workers agree upon: task names, options, and messages that hold ids and nothing else."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.defaults import NAMESPACES, flatten
from redis import Redis

from orchestrator import broker
from orchestrator.config import ConfigManager
from orchestrator.manager import RunRequest, WorkflowManager
from tests.servers import ValkeyServer
from workers.intake import Intake
from workers.tasks import register

ROOT = Path(__file__).parents[2]
KEY = "sk-planted-7d1c5be04a2f4c0f9b"
MARKER = "planted-2b77e0c4"
SHARD = broker.ShardMessage(7, 1, 1, "judge", "simulator", 0, 4)
RELIED_ON = {
    # Pickle would be code execution for whoever reaches the broker.
    "accept_content": ["json"],
    "task_serializer": "json",
    "result_serializer": "json",
    "task_acks_late": True,
    "task_acks_on_failure_or_timeout": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "task_ignore_result": True,
    "task_store_errors_even_if_ignored": False,
    "result_extended": False,
    "task_create_missing_queues": False,
    "worker_disable_rate_limits": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
}


@pytest.fixture
def app() -> Celery:
    return broker.make_app("redis://localhost:1/0", ("openai", "simulator"))


def configured(home: Path) -> ConfigManager:
    environment = {"LLM_ORCHESTRATOR_HOME": str(home), "OPENAI_API_KEY": KEY}
    return ConfigManager(environ=environment, cwd=home, user_config=home / "none.toml")


def test_published_and_registered_task_names_are_the_same(app: Celery, tmp_path: Path) -> None:
    register(app, configured(tmp_path), Intake())
    assert {name for name in app.tasks if not name.startswith("celery.")} == set(broker.TASK_NAMES)


def test_every_option_that_we_rely_on_is_set(app: Celery) -> None:
    assert {name: app.conf.changes.get(name, "not set") for name in RELIED_ON} == RELIED_ON


def test_every_option_that_we_set_exists(app: Celery) -> None:
    """Celery takes a misspelt name without a word."""
    known = {name for name, _ in flatten(NAMESPACES)}
    # Read by Celery's Redis backend, and missing in Celery's own list.
    known |= {"redis_backend_health_check_interval", "deprecated_settings"}
    assert set(app.conf.changes) - known == set()


def test_broker_waits_longer_than_any_call_before_it_delivers_again(app: Celery) -> None:
    options = app.conf.broker_transport_options
    assert options["visibility_timeout"] >= 3600
    # Without them a dead link is waited on for ever.
    assert {"socket_timeout", "socket_connect_timeout", "socket_keepalive", "health_check_interval"} <= options.keys()


def test_runs_at_work_stand_in_lines_of_their_own(valkey: ValkeyServer) -> None:
    app = broker.make_app(valkey.url, ("simulator",), "mine:")
    for before in range(broker.LINES + 1):
        broker.ask_shard(app, SHARD, before).apply_async()
    broker.close_window(app, 1).apply_async()
    with Redis.from_url(valkey.url) as client:
        keys = broker.queue_keys("llm.simulator", "mine:")
        assert [client.llen(key) for key in keys] == [2, *[1] * (broker.LINES - 1)]
        assert [client.llen(key) for key in broker.queue_keys(broker.CONTROL_QUEUE, "mine:")] == [1]


def test_a_second_level_stands_in_the_line_of_the_first(valkey: ValkeyServer) -> None:
    app = broker.make_app(valkey.url, ("simulator",))
    levels = [[broker.ask_shard(app, SHARD, 3)], [broker.ask_shard(app, SHARD, 3)]]
    broker.publish_canvas(app, levels, broker.close_window(app, 1))
    with Redis.from_url(valkey.url) as client:
        message = json.loads(client.lindex(broker.queue_keys("llm.simulator")[3], 0))
    _, _, embedded = json.loads(base64.b64decode(message["body"]))
    second = embedded["chord"]["kwargs"]["header"]["kwargs"]["tasks"]
    assert [task["options"]["priority"] for task in second] == [3]


def test_chord_counters_outlive_a_run_that_waits_for_days(app: Celery) -> None:
    assert app.conf.result_expires >= 7 * 24 * 3600


def test_worker_command_chooses_threads_and_no_gossip() -> None:
    command = broker.worker_command(["llm.simulator"], 4, "one")
    assert command[command.index("--pool") + 1] == "threads"
    assert {"--without-mingle", "--without-gossip"} <= set(command)


def test_messages_hold_ids_and_nothing_else(valkey: ValkeyServer, tmp_path: Path) -> None:
    """Everything that a producer leaves in Redis for 40 items, read back: no key, no item, no prompt, no address."""
    items = tmp_path / "items.jsonl"
    samples = (ROOT / "prompts" / "project_selection" / "items.jsonl").read_text().splitlines()[:40]
    planted = [{"project_name": f"{MARKER}-{number}", "summary": MARKER} for number in range(40)]
    rows = [json.loads(sample) | plant for sample, plant in zip(samples, planted, strict=True)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manager = WorkflowManager(configured(tmp_path), valkey.url)
    try:
        manager.database.migrate()
        wanted = {"reviewer_name": MARKER}
        plan = manager.plan(RunRequest(pack="project_selection", input=str(items), provider="openai", variables=wanted))
        manager.execute_workflow(plan)
    finally:
        manager.close()
    with Redis.from_url(valkey.url, decode_responses=True) as client:
        content = "\n".join(f"{key} {_plain(client, key)}" for key in client.scan_iter())
    assert broker.ASK_SHARD in content, "nothing was published"
    for unwanted in (KEY, MARKER, "sqlite", str(tmp_path)):
        assert unwanted not in content


def _plain(client: Any, key: str) -> str:
    match client.type(key):
        case "list":
            return " ".join(_opened(entry) for entry in client.lrange(key, 0, -1))
        case "hash":
            return json.dumps(client.hgetall(key))
        case "set":
            return json.dumps(sorted(client.smembers(key)))
        case "zset":
            return json.dumps(client.zrange(key, 0, -1))
        case "string":
            return client.get(key)
        case other:
            raise AssertionError(f"{key} is a {other}")


def _opened(entry: str) -> str:
    """A message with its body in plain text."""
    message = json.loads(entry)
    return entry + base64.b64decode(message["body"]).decode()
