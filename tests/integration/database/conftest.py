"""A migrated, empty database for every test, once on SQLite and once on Postgres.

The schema is built once per session and cloned per test: a file copy here, `CREATE DATABASE ... TEMPLATE` there.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.database import Database
from tests.integration.database.stage import Stage
from tests.servers import PostgresServer

KINDS = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file that nobody has open."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> Iterator[str]:
    """Name of a migrated Postgres database that nobody is connected to."""
    name = postgres_server.create()
    database = Database(postgres_server.url(name))
    database.migrate()
    database.close()
    yield name
    postgres_server.drop(name)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which database the test runs on."""
    return request.param


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a migrated database."""
    if kind == "sqlite":
        path = tmp_path / "runs.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create(request.getfixturevalue("postgres_template"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def empty_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a database that was never migrated."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'runs.db'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A migrated database."""
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def stage(database: Database) -> Stage:
    """A running run of four items with one open window and a call for each item, without a limit."""
    return Stage.with_calls(database, 4)
