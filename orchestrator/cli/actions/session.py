"""Opens what actions work with, configuration and database, and says in one way what is missing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.cli.actions.output import say
from orchestrator.config import ConfigManager
from orchestrator.database import Connection, Database, DatabaseUnavailable, SchemaOutdated, reports
from orchestrator.errors import EnvironmentNotReady, Problem, RunNotFound
from orchestrator.logs import Logger
from orchestrator.settings import Settings

DISK_TROUBLES = ("disk is full", "disk I/O error", "No space left")
"""How SQLite and Postgres tell that there is no room."""
HINT_OF_DISK = "make room on the disk and repeat the command: it goes on where it stands"


def load_config(home: Path | None) -> ConfigManager:
    """The configuration; what is odd about it is said on stderr.

    Raises:
        ConfigError: it is broken.
    """
    config = ConfigManager({"storage.home": home})
    for warning in config.warnings:
        say(f"warning[{warning.code}] {warning.place}: {warning.message}")
    settings = config.settings
    Logger.init("warning" if settings.logging.level == "info" else settings.logging.level, settings.logging.format)
    return config


@contextmanager
def translated(address: str) -> Generator[None]:
    """Turns what a database raises into problems that a person can act on.

    Raises:
        EnvironmentNotReady: the database does not answer, or is not at this release.
    """
    try:
        yield
    except SchemaOutdated as error:
        hint = "run `llm-orchestrator db upgrade`"
        raise EnvironmentNotReady(Problem("database.outdated", str(error), address, hint)) from error
    except DatabaseUnavailable as error:
        reason = (str(error.orig).strip().splitlines() or ["no reason was given"])[0]
        is_about_disk = any(words in reason for words in DISK_TROUBLES)
        hint = HINT_OF_DISK if is_about_disk else "check DATABASE_URL and that the database runs"
        raise EnvironmentNotReady(Problem("database.unavailable", reason, address, hint)) from error


def prepare(database: Database, settings: Settings) -> None:
    """Makes sure that the database can be used: migrated on one machine, checked on a cluster.

    Raises:
        EnvironmentNotReady: it cannot be used.
    """
    with translated(database.address):
        if settings.is_local and not database.is_prepared():
            database.migrate()
        database.check()


@contextmanager
def reading(config: ConfigManager) -> Generator[Connection | None]:
    """A snapshot for reading; None when nothing was ever written here, and then nothing is created either.

    Raises:
        EnvironmentNotReady: the database cannot be used.
    """
    database = Database(config.settings.database_url)
    try:
        with translated(database.address):
            if not has_database(config.settings):
                yield None
                return
            prepare(database, config.settings)
            with database.snapshot() as connection:
                yield connection
    finally:
        database.close()


@contextmanager
def reading_run(config: ConfigManager, name: str) -> Generator[tuple[Connection, int, str]]:
    """A snapshot with the number and the id of a run.

    Raises:
        RunNotFound: the name fits no run, or several.
        EnvironmentNotReady: the database cannot be used.
    """
    with reading(config) as connection:
        if connection is None:
            raise RunNotFound(name)
        run, run_id = reports.find_run(connection, name)
        yield connection, run, run_id


def has_database(settings: Settings) -> bool:
    """Whether there can be anything to read: False for an SQLite file that does not exist yet."""
    url = settings.database_url
    return not url.startswith("sqlite") or Path(url.partition(":///")[2]).exists()
