"""Servers that tests share: one Valkey and one Postgres per test session, clean for every test."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from redis import Redis

from tests.servers import PostgresServer, ValkeyServer, start_postgres, start_valkey


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but not those that Celery's own use of redis-py causes."""
    config.addinivalue_line("filterwarnings", "ignore:Call to deprecated setex:DeprecationWarning")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What passed tests have to tell, seeds above all: the property `told`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "told":
                terminalreporter.write_line(f"{report.nodeid}: {value}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the workers of a shared installation said to the report of a test that failed."""
    report = yield
    held: dict[str, Any] = getattr(item, "funcargs", {})
    for name, value in held.items() if report.failed else ():
        logs = getattr(getattr(value, "engine", value), "logs", None)
        if callable(logs):
            report.sections.append((f"logs of {name}", str(logs())[-8000:]))
    return report


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """The session's Valkey; tests that stop or restart it start one of their own instead."""
    with start_valkey() as server:
        yield server


@pytest.fixture
def valkey(valkey_server: ValkeyServer) -> ValkeyServer:
    """The session's Valkey, emptied before the test."""
    with Redis.from_url(valkey_server.url) as client:
        client.flushall()
    return valkey_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's Postgres."""
    with start_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of this test's own."""
    name = postgres_server.create()
    yield postgres_server.url(name)
    postgres_server.drop(name)
