"""A whole installation of a test's own: broker, database, strict fake providers and real worker processes.

Tests start runs through `WorkflowManager`, as the command line does, and look at the outcome from outside: in the
database, in the worker's log, and in the books of the fake providers (`tests.history` compares them).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from redis import Redis
from sqlalchemy import text

from orchestrator.broker import all_queues, worker_command
from orchestrator.config import ConfigManager
from orchestrator.manager import RunRequest, StartedRun, WorkflowManager
from tests.fakes.provider_server import RunningServer, running_server
from tests.fakes.provider_service import ServerOptions
from tests.history import History, check_history
from tests.packs import SURVEY, Pack
from tests.servers import ValkeyServer, start_valkey, wait_until

ROOT = Path(__file__).parent.parent
INPUT_USD_PER_1K, OUTPUT_USD_PER_1K = "0.01", "0.03"
ENDED = ("completed", "failed", "cancelled")
GENEROUS = {"rate_limit_rpm": 6_000_000, "rate_limit_tpm": 90_000_000_000, "concurrency": 5_000, "burst": 100_000}
HEARTBEAT_S, LEASE_S = 0.4, 2.0
GOOD_BEHAVIOUR = {option.name: option.default for option in fields(ServerOptions) if option.name != "log"}


@dataclass
class Worker:
    """A worker process and its log."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill9(self) -> None:
        """Ends it as a crash would."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.process.wait(10)

    def sigterm(self, timeout_s: float = 30.0) -> float:
        """Stops it in good order; returns the seconds it took."""
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        self.process.wait(timeout_s)
        return time.monotonic() - began

    def log(self) -> str:
        return self.log_file.read_text("utf-8", errors="replace")

    def on_record(self, engine: "Engine") -> int:
        """Attempts of it that are on record as sent.

        The first of them may be answered and not settled, and the last may not have left: they may be a few more than
        can be in flight.
        """
        query = "SELECT count(*) FROM llm_usage WHERE status = 'sent' AND worker_id LIKE :worker"
        return engine.rows(query, worker=f"%:{self.pid}:%")[0][0]

    def has_in_flight(self, engine: "Engine", calls: int = 5) -> bool:
        """Whether so many of its calls are at a provider now."""
        return self.on_record(engine) >= calls

    def is_ready(self) -> bool:
        """Whether it takes messages; one that is not may find that another took them all."""
        assert self.is_alive(), f"the worker ended early:\n{self.log()[-3000:]}"
        return "worker.ready" in self.log()


@dataclass
class Engine:
    """What `launch_engine` gives to a test."""

    home: Path
    config: ConfigManager
    manager: WorkflowManager
    valkey: ValkeyServer
    fakes: dict[str, RunningServer]
    environment: dict[str, str]
    workers: list[Worker] = field(default_factory=list[Worker])

    @property
    def fake(self) -> RunningServer:
        """The provider that is asked first."""
        return self.fakes["main"]

    def start_worker(
        self, queues: Sequence[str] | None = None, *, ready: bool = True, module: str = "celery", **environment: str
    ) -> Worker:
        """Starts a worker on all queues, or on some.

        Args:
            queues: to listen on; None is all of them.
            ready: wait until it takes messages.
            module: that is run in place of Celery's own, to start a worker with a fault in it.
            environment: variables of this worker alone.
        """
        number = len(self.workers)
        log_file = self.home / f"worker{number}.log"
        listened = all_queues(self.config.settings.providers) if queues is None else queues
        arguments = worker_command(listened, self.config.settings.worker.shards, f"w{number}")
        command = [sys.executable, *(module if argument == "celery" else argument for argument in arguments)]
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.home,
                env=self.environment | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        worker = Worker(process, log_file)
        self.workers.append(worker)
        if ready:
            wait_until(worker.is_ready, 30)
        return worker

    def start_run(
        self,
        items: int = 10,
        pack: Pack = SURVEY,
        *,
        budget_usd: str | None = None,
        salt: str = "",
        **request: Any,
    ) -> StartedRun:
        """Begins a run over so many made-up items; `salt` makes them differ from those of other runs."""
        file = self.home / f"items-{items}-{salt or 'plain'}.jsonl"
        with file.open("w") as lines:
            for number in range(items):
                row = {"key": f"k{number}", "text": f"{salt} item number {number}", "size": number}
                lines.write(json.dumps(row) + "\n")
        budget = None if budget_usd is None else Decimal(budget_usd)
        folder = pack.write(self.home / "packs")
        plan = self.manager.plan(RunRequest(pack=str(folder), input=str(file), budget_usd=budget, **request))
        return self.manager.execute_workflow(plan)

    @contextmanager
    def with_flags(self, flags: Mapping[str, object]) -> Iterator["Engine"]:
        """The same installation for a producer that was started with these flags."""
        config = ConfigManager(flags, cwd=self.home, environ=self.environment, user_config=self.home / "none.toml")
        with WorkflowManager(config) as manager:
            yield replace(self, config=config, manager=manager)

    def status(self, run: StartedRun) -> dict[str, Any]:
        return self.manager.track_progress(run.run)

    def wait(self, run: StartedRun, *statuses: str, timeout_s: float = 40.0) -> dict[str, Any]:
        """Waits until the run has ended, or has one of the given statuses; returns its status object."""
        wanted = statuses or ENDED
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self.status(run)["status"] in wanted, timeout_s, 0.05)
        status = self.status(run)
        assert status["status"] in wanted, f"not {wanted} after {timeout_s} s: {status}\n{self.logs()[-6000:]}"
        return status

    def wait_calls(self, run: StartedRun, completed: int, timeout_s: float = 30.0) -> None:
        """Waits until so many calls are completed."""
        wait_until(lambda: self.status(run)["calls"]["completed"] >= completed, timeout_s, 0.02)

    def wait_received(self, requests: int, timeout_s: float = 30.0) -> None:
        """Waits until the first provider has received so many requests."""
        wait_until(lambda: self.fake.provider.number >= requests, timeout_s, 0.01)

    def rows(self, query: str, **values: Any) -> list[Any]:
        """Rows of a query, for looking at what no public name tells."""
        with self.manager.database.snapshot() as connection:
            return list(connection.execute(text(query), values))

    def redis(self) -> Redis:
        return Redis.from_url(self.valkey.url)

    def check(self, run: StartedRun, **allowed: Any) -> History:
        """Runs the history checker (`tests.history`) over a run."""
        return check_history(self.manager.database, run.run, [fake.log() for fake in self.fakes.values()], **allowed)

    def logs(self) -> str:
        return "\n".join(f"== worker {at}\n{worker.log()}" for at, worker in enumerate(self.workers))

    def calm(self) -> "Engine":
        """The installation as it was at first, for the next test that shares it: nothing is on its way any more.

        What the last test left behind would take up the faults that the next one scripts, and count as its requests.
        """
        for row in self.rows("SELECT run_id FROM workflow_executions WHERE status IN ('pending', 'running', 'paused')"):
            self.manager.cancel(row.run_id)
        left = "SELECT count(*) FROM llm_usage WHERE status IN ('reserved', 'sent')"
        for fake in self.fakes.values():
            fake.control(reset=True, **GOOD_BEHAVIOUR)
        wait_until(lambda: self.rows(left)[0][0] == 0, 30, 0.02)
        for name, fake in self.fakes.items():
            fake.control(reset=True)
            self.manager.clear_limits(name)
        return self

    def stop(self) -> None:
        """Ends every worker at once."""
        for worker in self.workers:
            if worker.is_alive():
                worker.kill9()


@contextmanager
def launch_engine(
    *,
    database_url: str | None = None,
    providers: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    fakes: Mapping[str, Mapping[str, Any]] | None = None,
    workers: int = 1,
    aof: bool = False,
) -> Iterator[Engine]:
    """An installation that is gone at the end, whatever happened.

    Args:
        database_url: None is SQLite in the home directory.
        providers: settings of `main` and `spare` in the configuration file, on top of generous limits.
        settings: further sections of the configuration file.
        fakes: options of the fake services behind `main`, `spare` and whatever other provider is named
            (`ServerOptions`).
        workers: how many to start, on all queues.
        aof: the broker keeps what it holds on disk.
    """
    home = Path(tempfile.mkdtemp(prefix="eng", dir="/tmp"))
    with ExitStack() as held:
        held.callback(shutil.rmtree, home, ignore_errors=True)
        valkey = held.enter_context(start_valkey(aof=aof))
        options = {"main": {}, "spare": {}, **(fakes or {})}
        servers = {
            name: held.enter_context(running_server(log=str(home / f"{name}.log"), **dict(own)))
            for name, own in options.items()
        }
        sections: dict[str, Mapping[str, Any]] = {
            "global": {"default_provider": "main"},
            "worker": {"heartbeat_seconds": HEARTBEAT_S, "lease_seconds": LEASE_S, "drain_seconds": 8.0},
        }
        for section, values in (settings or {}).items():
            sections[section] = {**sections.get(section, {}), **values}
        for name, server in servers.items():
            own = dict((providers or {}).get(name, {}))
            sections[f"llm_providers.{name}"] = {**_provider(server), **own}
        (home / "llm-orchestrator.toml").write_text(_toml(sections))
        environment = {
            "PATH": os.environ["PATH"],  # noqa: TID251 - the environment of a process that we start
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": valkey.url,
            "LLM_ORCHESTRATOR_HOME": str(home / "data"),
            **({} if database_url is None else {"DATABASE_URL": database_url}),
        }
        config = ConfigManager(cwd=home, environ=environment, user_config=home / "none.toml")
        manager = held.enter_context(WorkflowManager(config))
        manager.database.migrate()
        engine = Engine(home, config, manager, valkey, servers, environment)
        held.callback(engine.stop)
        started = [engine.start_worker(ready=False) for _ in range(workers)]
        for worker in started:
            wait_until(worker.is_ready, 30)
        try:
            yield engine
        except BaseException:
            print(engine.logs()[-8000:])
            raise


def _provider(server: RunningServer) -> dict[str, Any]:
    return {
        "dialect": "openai",
        "base_url": server.base_url,
        "default_model": "fake-model",
        "cost_per_1k_input_tokens": float(INPUT_USD_PER_1K),
        "cost_per_1k_output_tokens": float(OUTPUT_USD_PER_1K),
        **GENEROUS,
    }


def _toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        # Numbers, booleans, strings and lists of strings are written alike in TOML and JSON.
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
