"""Providers that answer nobody for a while: calls wait for them, go elsewhere, or their run is paused; none fails."""

import json
from collections.abc import Iterator

import pytest

from orchestrator.manager import StartedRun
from tests.engine import Engine, launch_engine
from tests.fakes.provider_server import running_server
from tests.packs import ONE, one_step
from tests.servers import free_port, wait_until

CALLS = 60
CONCURRENCY = 8
DOWN = {"error_500": 1.0}
UP = {"error_500": 0.0}


@pytest.fixture(scope="module")
def installation() -> Iterator[Engine]:
    limits = {"main": {"concurrency": CONCURRENCY}}
    with launch_engine(providers=limits, settings={"worker": {"outage_seconds": 60.0}}, workers=1) as engine:
        yield engine


@pytest.fixture
def engine(installation: Engine) -> Engine:
    return installation.calm()


def events(engine: Engine, name: str) -> int:
    return engine.logs().count(name)


def interrupted(engine: Engine, salt: str) -> StartedRun:
    """A run whose provider goes away in the middle of it, which its worker has noticed."""
    engine.fake.control(latency_s=0.1)
    run = engine.start_run(CALLS, ONE, salt=salt)
    # Once calls are answered, what the tests before this one did to the provider is over.
    engine.wait_calls(run, CALLS // 4)
    known = events(engine, "provider.unavailable")
    engine.fake.control(**DOWN)
    wait_until(lambda: events(engine, "provider.unavailable") == known + 1, 20)
    return run


def test_an_outage_is_a_delay_and_no_call_fails_for_it(engine: Engine) -> None:
    run = interrupted(engine, "outage")
    # Those that were on their way come back first; then there is a probe after one second, two, four.
    wait_until(lambda: engine.fake.provider.in_flight == 0)
    before = engine.fake.provider.number
    wait_until(lambda: engine.fake.provider.number >= before + 2, 20)
    wait_until(lambda: engine.status(run)["bound_by"] == "outage", 10)
    engine.fake.control(**UP)
    status = engine.wait(run)
    assert (status["calls"]["completed"], status["calls"]["failed"]) == (CALLS, 0)
    history = engine.check(run, repeats=4 * CONCURRENCY)
    # Without a breaker, the 45 calls that were left would have failed with four attempts each.
    assert 10 <= history.attempts["retryable"] <= 4 * CONCURRENCY
    assert events(engine, "provider.back") == events(engine, "provider.unavailable")
    print(f"an outage of {status['duration_seconds']} s: {history.attempts['retryable']} attempts found it")


def test_calls_with_another_route_take_it_while_the_first_one_answers_nobody(engine: Engine) -> None:
    engine.fake.control(**DOWN)
    run = engine.start_run(CALLS, one_step(fallback=True), salt="elsewhere")
    status = engine.wait(run)
    assert (status["calls"]["completed"], status["calls"]["failed"]) == (CALLS, 0)
    engine.check(run, repeats=2 * CALLS)
    # Most of them never tried the first route.
    assert engine.fake.provider.number < CALLS
    assert engine.fakes["spare"].provider.number == CALLS
    told = engine.rows(
        "SELECT DISTINCT error_code FROM prompt_executions WHERE workflow_execution_id = :run", run=run.run
    )
    assert {row.error_code for row in told} <= {None, "unavailable"}


def test_a_run_that_is_paused_in_an_outage_does_not_wait_for_its_end(engine: Engine) -> None:
    run = interrupted(engine, "stopped")
    assert engine.manager.pause(run.run_id)
    wait_until(lambda: engine.status(run)["calls"]["running"] == 0, 10)
    engine.fake.control(**UP)
    engine.manager.resume(run.run_id)
    assert engine.wait(run)["calls"]["completed"] == CALLS
    engine.check(run, repeats=4 * CONCURRENCY)


def test_patience_has_an_end_and_then_the_run_waits_for_a_person() -> None:
    settings, limits = {"worker": {"outage_seconds": 2.0}}, {"main": {"concurrency": CONCURRENCY}}
    with launch_engine(settings=settings, providers=limits, workers=2) as engine:
        engine.fake.control(latency_s=0.1)
        run = engine.start_run(400, ONE, salt="patience")
        engine.wait_calls(run, 20)
        engine.fake.control(**DOWN)
        status = engine.wait(run, "paused")
        assert status["reason"] == "provider_unavailable"
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0, 10)
        assert engine.status(run)["calls"]["failed"] == 0
        # Nothing has changed, so it is paused again.
        engine.manager.resume(run.run_id)
        engine.wait(run, "paused")
        # A probe of the other worker may still be on its way, and pause the run once more.
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0, 10)
        engine.fake.control(**UP)
        engine.manager.resume(run.run_id)
        assert engine.wait(run)["calls"] == engine.status(run)["calls"] | {"completed": 400, "failed": 0}
        engine.check(run, repeats=800)


def test_a_provider_that_cannot_be_reached_costs_no_call_its_tries_and_is_found_when_it_comes() -> None:
    """Also when its step allows only two tries: nothing has left."""
    port = free_port()
    address = {"main": {"base_url": f"http://127.0.0.1:{port}/v1"}}
    with launch_engine(providers=address, workers=1) as engine:
        run = engine.start_run(CALLS, one_step(attempts=2), salt="nobody there")
        wait_until(lambda: "provider.unavailable" in engine.logs(), 20)
        wait_until(lambda: engine.status(run)["bound_by"] == "outage", 10)
        with running_server(port=port, log=str(engine.home / "main.log")):
            status = engine.wait(run)
        assert (status["calls"]["completed"], status["calls"]["failed"]) == (CALLS, 0)
        assert status["attempts"]["unknown"] == 0


def test_a_wrong_address_is_told_soon_because_nothing_was_ever_answered_from_there() -> None:
    address = {"main": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}
    settings = {"worker": {"outage_seconds": 3.0}}
    with launch_engine(providers=address, settings=settings, workers=1) as engine:
        run = engine.start_run(CALLS, ONE)
        status = engine.wait(run, "paused")
        assert status["reason"] == "provider_unavailable"
        assert "could not connect" in json.dumps(status)
