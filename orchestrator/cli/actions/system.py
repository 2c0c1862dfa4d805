"""Actions that keep an installation going: settings, database, cache, workers, checks, versions."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Iterable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from orchestrator import __version__, health
from orchestrator.broker import all_queues, worker_command
from orchestrator.cli.actions.output import Refused, console, facts, put_json, say, table
from orchestrator.cli.actions.session import load_config, prepare, reading, translated
from orchestrator.config import ConfigManager
from orchestrator.database import Database, cache, revisions
from orchestrator.errors import EnvironmentNotReady, ExitCode, Problem, did_you_mean
from orchestrator.money import usd
from orchestrator.settings import LLMProviderConfig
from providers.catalog import load_catalog, provider_names

_MARKS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}


def show_config(*, home: Path | None, with_sources: bool, as_json: bool) -> None:
    """Shows every setting, and where it comes from."""
    config = load_config(home)
    origins = config.sources
    if as_json:
        shown = {
            name: {"value": _plain(value), "source": origins.get(name)} if with_sources else _plain(value)
            for name, value in config.values().items()
        }
        put_json(shown)
        return
    columns = ("setting", "value", "source") if with_sources else ("setting", "value")
    rows = [[name, _plain(value), origins.get(name)][: len(columns)] for name, value in config.values().items()]
    console().print(table(columns, rows))


def _plain(value: object) -> Any:
    """A setting as JSON data; amounts stay exact as text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {name: _plain(inner) for name, inner in cast("dict[str, object]", value).items()}
        case list() | tuple():
            return [_plain(inner) for inner in cast("Iterable[object]", value)]
        case _:
            return str(value)


def list_providers(*, home: Path | None, is_complete: bool, as_json: bool) -> None:
    """Lists providers; of keys only their number is told."""
    config = load_config(home)
    shown = [_provider(config, one) for one in config.settings.providers.values()]
    if is_complete:
        known = {one["name"] for one in shown}
        shown += [
            {"name": name, "enabled": False, "key_variable": row.key_env}
            for name, row in load_catalog().providers.items()
            if name not in known
        ]
    if as_json:
        put_json(shown)
        return
    rows = [
        [
            one["name"] + (" (default)" if one.get("default") else ""),
            one.get("dialect"),
            one.get("default_model"),
            one.get("keys", f"set {one.get('key_variable')}" if one.get("key_variable") else ""),
            one.get("rate_limit_rpm"),
            one.get("rate_limit_tpm"),
            one.get("concurrency"),
        ]
        for one in shown
    ]
    console().print(table(("provider", "dialect", "model", "keys", "rpm>", "tpm>", "in flight>"), rows))


def _provider(config: ConfigManager, one: LLMProviderConfig) -> dict[str, Any]:
    return {
        "name": one.name,
        "enabled": True,
        "default": one.name == config.settings.default_provider,
        "dialect": one.dialect,
        "base_url": one.base_url,
        "default_model": one.default_model,
        "keys": len(one.api_keys),
        "local": one.local,
        "rate_limit_rpm": one.rate_limit_rpm,
        "rate_limit_tpm": one.rate_limit_tpm,
        "rate_limit_itpm": one.rate_limit_itpm,
        "rate_limit_otpm": one.rate_limit_otpm,
        "rate_limit_rpd": one.rate_limit_rpd,
        "shared_limits": list(one.shared_limits),
        "concurrency": one.concurrency,
        "timeout_seconds": one.timeout_s,
        "queue": f"llm.{one.name}",
    }


def upgrade_database(*, home: Path | None, as_json: bool) -> None:
    """Brings the database to this release."""
    database = Database(load_config(home).settings.database_url)
    try:
        with translated(database.address):
            database.migrate()
            _tell_revision(database, as_json)
    finally:
        database.close()


def check_database(*, home: Path | None, as_json: bool) -> None:
    """Proves that the database is at this release."""
    database = Database(load_config(home).settings.database_url)
    try:
        with translated(database.address):
            if not database.is_prepared():
                database.check()
            _tell_revision(database, as_json)
    finally:
        database.close()


def _tell_revision(database: Database, as_json: bool) -> None:
    revision = revisions.current_revision(database.engine)
    if as_json:
        put_json({"database": database.address, "revision": revision, "ready": True})
    else:
        say(f"{database.address} is at revision {revision}")


def show_cache(*, home: Path | None, as_json: bool) -> None:
    """Shows how much is kept, and what it saved."""
    kept = {"entries": 0, "expired": 0, "bytes": 0, "hits": 0, "saved_nusd": 0}
    saved: list[cache.Savings] = []
    with reading(load_config(home)) as connection:
        if connection is not None:
            kept, saved = cache.stats(connection), cache.savings(connection)
    total = usd(kept.pop("saved_nusd"))
    if as_json:
        runs = [{"run_id": one.run_id, "hits": one.hits, "saved_usd": usd(one.saved_nusd)} for one in saved]
        put_json({**kept, "saved_usd": total, "runs": runs})
        return
    out = console()
    out.print(facts({**{name: f"{number:,}" for name, number in kept.items()}, "saved": f"${total}"}))
    if saved:
        rows = [[one.run_id, f"{one.hits:,}", usd(one.saved_nusd)] for one in saved]
        out.print(table(("run", "hits>", "saved $>"), rows))


def purge_cache(*, home: Path | None, everything: bool, older_than: timedelta | None, as_json: bool) -> None:
    """Removes answers that have expired, or were kept for longer than a time, or all of them."""
    config = load_config(home)
    database = Database(config.settings.database_url)
    try:
        prepare(database, config.settings)
        with translated(database.address), database.transaction() as connection:
            removed = cache.purge(connection, everything=everything, older_than=older_than)
    finally:
        database.close()
    if as_json:
        put_json({"removed": removed})
    else:
        say(f"{removed:,} answers removed")


def become_worker(*, home: Path | None, queues: str | None, concurrency: int | None) -> None:
    """Replaces this process by a Celery worker, so that signals reach it without a middleman.

    Raises:
        EnvironmentNotReady: there is no cluster to work for, or its database is not ready.
    """
    config = load_config(home)
    settings = config.settings
    if settings.redis_url is None:
        hint = "set REDIS_URL; on one machine `llm-orchestrator run` starts its own worker"
        raise EnvironmentNotReady(Problem("broker.missing", "a worker needs a broker to listen to", "REDIS_URL", hint))
    wanted = _queues_to_serve(config, queues)
    if not wanted:
        say(f"nothing to serve: no provider of {queues} is configured here; waiting to be stopped")
        stops = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        signal.sigwait(stops)
        return
    database = Database(settings.database_url)
    try:
        prepare(database, settings)
    finally:
        database.close()
    own = {"LLM_ORCHESTRATOR_HOME": str(settings.home)}
    if concurrency is not None:
        own["LLM_ORCHESTRATOR_WORKER_CONCURRENCY"] = str(concurrency)
    command = [sys.executable, *worker_command(wanted, settings.worker.shards, f"worker-{os.getpid()}")]
    say(f"serving {', '.join(wanted)}")
    os.execve(sys.executable, command, config.child_environment(own))  # noqa: S606 - our own program, no shell


def _queues_to_serve(config: ConfigManager, queues: str | None) -> list[str]:
    """The queues asked for, less those of providers that nobody configured.

    A Procfile names the queues of all providers, and a process that ended for want of a key would take all others with
    it.

    Raises:
        Refused: there is no such queue at all.
    """
    configured = all_queues(config.settings.providers)
    if queues is None:
        return list(configured)
    known = {*configured, *all_queues(provider_names())}
    wanted = [name.strip() for name in queues.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise Refused(f"there is no queue {name!r}; {did_you_mean(name, known)}")
    for name in wanted:
        if name not in configured:
            say(f"leaving out {name}: its provider is not configured here")
    return [name for name in wanted if name in configured]


def examine(*, home: Path | None, as_json: bool) -> int:
    """Checks everything that a run needs; the exit code tells whether anything failed."""
    checks = health.examine(load_config(home))
    has_failed = any(check.level == "fail" for check in checks)
    if as_json:
        put_json({"ready": not has_failed, "checks": [check.to_json() for check in checks]})
    else:
        rows = [[_MARKS[check.level], check.name, check.detail, check.fix] for check in checks]
        console().print(table(("", "check", "found", "what to do"), rows))
    return int(ExitCode.NOT_READY if has_failed else ExitCode.OK)


def show_versions(*, as_json: bool) -> None:
    """Shows versions."""
    shown = {
        "llm-orchestrator": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("celery", "kombu", "sqlalchemy", "httpx", "redis")},
    }
    if as_json:
        put_json(shown)
    else:
        console().print(facts(shown))
