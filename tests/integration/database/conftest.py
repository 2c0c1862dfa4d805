"""A migrated, empty database for every test, once on SQLite and once on Postgres.

The schema is built once per session. On SQLite every test gets a copy of the file; on Postgres the tests share one
database, emptied before each of them, because that takes a tenth of the time that a new one takes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.database import Database
from orchestrator.database.tables import metadata
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
def shared_postgres(postgres_server: PostgresServer) -> Iterator[str]:
    """Address of a migrated Postgres database."""
    name = postgres_server.create()
    database = Database(postgres_server.url(name))
    database.migrate()
    database.close()
    yield postgres_server.url(name)
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
    address: str = request.getfixturevalue("shared_postgres")
    database = Database(address)
    with database.transaction() as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")
    database.close()
    yield address


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
