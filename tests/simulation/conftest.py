"""Simulations are told in steps and seeds, not in log lines."""

from collections.abc import Iterator

import pytest
import structlog


def say_nothing() -> None:
    """No log lines: there would be a hundred thousand."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = structlog.get_config()
    say_nothing()
    yield
    structlog.configure(**before)
