"""A cluster as an operator starts it: the Procfile's processes under honcho, a broker, Postgres, and the command line.

Nothing here imports the product. It is used through its command, its environment variables and Flower's pages, and a
text that is planted in items and prompts must not turn up in anything that Flower shows.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psutil
import pytest

from tests.servers import PostgresServer, free_port, start_valkey, wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STARTED = ("control", "simulator", "simulator", "flower")
MARKER = "planted-5f0c2a91"
PASSWORD = "open-sesame-31"
ITEMS = 40
START_S, RUN_S, STOP_S = 40.0, 60.0, 30.0


@dataclass
class Cluster:
    """Processes under honcho, and the means to use them."""

    honcho: subprocess.Popen[bytes]
    environment: dict[str, str]
    flower_url: str
    log_file: Path

    @property
    def log(self) -> str:
        """Everything that the processes printed."""
        return self.log_file.read_text(errors="replace")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the product's command in a process of its own."""
        return run_command(self.environment, *arguments)

    def flower(self, path: str, password: str | None = PASSWORD) -> tuple[int, str]:
        """Status and text of one of Flower's pages."""
        request = urllib.request.Request(f"{self.flower_url}{path}")
        if password is not None:
            word = base64.b64encode(f"flower:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {word}")
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def workers(self) -> list[str]:
        """Names of the workers that Flower hears."""
        try:
            status, text = self.flower("/workers?json=1")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return []
        return [worker["hostname"] for worker in json.loads(text)["data"]] if status == 200 else []

    def is_watched(self) -> bool:
        """Whether Flower sees tasks: it switches their events on a few seconds after it began."""
        done = self.command("run", "project_selection", "--provider", "simulator", "--limit", "1", "--detach", "--json")
        assert done.returncode == 0, done.stderr
        return self.flower("/api/tasks")[1] != "{}"

    def processes(self) -> list[psutil.Process]:
        """Honcho and everything below it."""
        parent = psutil.Process(self.honcho.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> None:
        """What a supervisor does; safe to repeat."""
        if self.honcho.poll() is None:
            self.honcho.send_signal(signal.SIGTERM)
            self.honcho.wait(STOP_S)


def run_command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "llm-orchestrator"), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=environment["LLM_ORCHESTRATOR_HOME"],
        check=False,
    )


@pytest.fixture(scope="module")
def cluster(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control worker, two workers for the simulator, and Flower; at the end, proof that nothing is left of them."""
    home = tmp_path_factory.mktemp("cluster")
    database = postgres_server.create()
    port = free_port()
    log_file = home / "honcho.log"
    with ExitStack() as stack:
        stack.callback(postgres_server.drop, database)
        valkey = stack.enter_context(start_valkey())
        environment = {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # noqa: TID251
            "HOME": str(home),
            "LLM_ORCHESTRATOR_HOME": str(home),
            "REDIS_URL": valkey.url,
            "DATABASE_URL": postgres_server.url(database),
            "FLOWER_PORT": str(port),
            "FLOWER_BASIC_AUTH": f"flower:{PASSWORD}",
            # A name of this test's own, so that its processes are found wherever they went.
            "CLUSTER_UNDER_TEST": database,
        }
        upgraded = run_command(environment, "db", "upgrade")
        assert upgraded.returncode == 0, upgraded.stderr
        command = [str(BIN / "honcho"), "--app-root", str(ROOT), "--env", "no-such-file", "start"]
        command += ["--concurrency", "simulator=2", *dict.fromkeys(STARTED)]
        log = stack.enter_context(log_file.open("wb"))
        honcho = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
        started = Cluster(honcho, environment, f"http://127.0.0.1:{port}", log_file)
        stack.callback(started.stop)
        try:
            wait_until(lambda: len(started.workers()) == 3 or honcho.poll() is not None, START_S, 0.2)
            wait_until(started.is_watched, START_S, 0.2)
        except TimeoutError:
            pytest.fail(started.log)
        assert honcho.poll() is None, started.log
        yield started
        # Tests run in random order, so the end of the cluster is examined where it has its place.
        before = started.processes()
        assert len(before) > len(STARTED)
        started.stop()
        psutil.wait_procs(before, timeout=STOP_S)
        left = [process.info for process in psutil.process_iter(["pid", "cmdline"]) if _belongs(process, database)]
        assert left == []


@pytest.fixture(scope="module")
def finished_run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The status object of a run that one process began, the workers carried out, and others watched."""
    items = tmp_path_factory.mktemp("items") / "items.jsonl"
    samples = (ROOT / "prompts" / "project_selection" / "items.jsonl").read_text().splitlines()[:ITEMS]
    rows = [json.loads(line) | {"summary": f"A library; {MARKER}"} for line in samples]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--provider", "simulator", "--input", str(items), "--var", f"reviewer_name={MARKER}"]
    begun = time.monotonic()
    launched = cluster.command("run", "project_selection", *arguments, "--detach", "--json")
    assert launched.returncode == 0, launched.stderr
    launch = json.loads(launched.stdout)
    assert launch["event"] == "launch"
    while True:
        asked = cluster.command("status", launch["run_id"], "--json")
        assert asked.returncode == 0, asked.stderr
        status = json.loads(asked.stdout)
        if status["status"] not in ("pending", "running"):
            return status
        assert time.monotonic() - begun < RUN_S, f"{status}\n{cluster.log}"


def test_a_detached_run_is_carried_out_by_the_workers_of_the_procfile(
    cluster: Cluster, finished_run: dict[str, Any]
) -> None:
    assert finished_run["status"] == "completed", cluster.log
    assert finished_run["items"] == {"total": ITEMS, "completed": ITEMS, "failed": 0, "skipped": 0}
    assert finished_run["attempts"]["sent"] == 0
    assert finished_run["attempts"]["ok"] == finished_run["calls"]["completed"] > ITEMS
    results = cluster.command("results", finished_run["run_id"], "--step", "pre_assessment", "--format", "jsonl")
    assert results.returncode == 0, results.stderr
    assert {row["status"] for row in map(json.loads, results.stdout.splitlines())} == {"completed"}
    assert len(results.stdout.splitlines()) == ITEMS


def test_the_planted_text_was_in_the_prompts(cluster: Cluster, finished_run: dict[str, Any]) -> None:
    """Without it the next test would prove nothing."""
    results = cluster.command("results", finished_run["run_id"], "--format", "jsonl")
    key = json.loads(results.stdout.splitlines()[0])["item_key"]
    explained = cluster.command("show", finished_run["run_id"], key, "--json")
    assert explained.returncode == 0, explained.stderr
    assert MARKER in explained.stdout
    assert "Simulated judgment" in explained.stdout


def test_flower_shows_workers_and_tasks_by_ids_only(cluster: Cluster, finished_run: dict[str, Any]) -> None:
    workers = cluster.workers()
    status, text = cluster.flower("/api/workers?refresh=1")
    assert status == 200
    assert set(json.loads(text)) == set(workers)
    assert len(workers) == 3
    status, text = cluster.flower("/api/tasks?limit=500")
    assert status == 200
    tasks: dict[str, Any] = json.loads(text)
    # A task that ran while its events were switched on is known by its end alone, and has no name.
    tasks = {task: known for task, known in tasks.items() if known["name"]}
    assert {known["name"] for known in tasks.values()} == {
        "llm_orchestrator.ask_shard",
        "llm_orchestrator.close_window",
    }
    some = list(tasks)[:5]
    query = {"draw": 1, "start": 0, "length": 100, "search[value]": "", "order[0][column]": 0, "order[0][dir]": "asc"}
    query |= {"columns[0][data]": "name"}
    pages = ["/", "/workers?json=1", "/tasks", f"/tasks/datatable?{urlencode(query)}", "/broker", "/metrics"]
    pages += ["/api/task/types", "/api/queues/length", "/api/workers?refresh=1"]
    pages += [f"/worker/{quote(name)}" for name in workers]
    pages += [address for task in some for address in (f"/task/{task}", f"/api/task/info/{task}")]
    shown = {"/api/tasks": text}
    for page in pages:
        status, shown[page] = cluster.flower(page)
        assert status == 200, f"{page}: {status}"
    assert some[0] in shown[f"/tasks/datatable?{urlencode(query)}"]
    for page, content in shown.items():
        assert MARKER not in content, page
        # Every answer of the simulator begins so, and so does no page of Flower's.
        assert "Simulated judgment" not in content, page
        assert PASSWORD not in content, page
        assert "postgresql" not in content, page


@pytest.mark.parametrize(
    "page", ["/", "/workers", "/tasks", "/tasks/datatable", "/broker", "/api/workers", "/api/tasks", "/api/task/types"]
)
def test_flower_wants_a_password(cluster: Cluster, page: str) -> None:
    assert cluster.flower(page, password=None)[0] == 401
    assert cluster.flower(page, password="guessed")[0] == 401


def test_flower_listens_on_loopback_only(cluster: Cluster) -> None:
    port = int(cluster.environment["FLOWER_PORT"])
    listening = [
        connection.laddr.ip
        for process in cluster.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]


def test_no_password_and_no_text_stands_in_a_command_line_or_a_log(
    cluster: Cluster, finished_run: dict[str, Any]
) -> None:
    for text in (cluster.log, *(" ".join(process.cmdline()) for process in cluster.processes())):
        assert MARKER not in text
        assert PASSWORD not in text


def test_workers_of_this_host_are_found_healthy(cluster: Cluster) -> None:
    script = [str(ROOT / "deploy" / "healthcheck.sh")]
    done = subprocess.run(["sh", *script], env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_worker_of_an_unknown_queue_is_refused(cluster: Cluster) -> None:
    refused = cluster.command("worker", "--queues", "llm.simulatr")
    assert refused.returncode == 2
    assert "llm.simulator" in refused.stderr


def _belongs(process: psutil.Process, name: str) -> bool:
    try:
        return process.environ().get("CLUSTER_UNDER_TEST") == name
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
