"""A network that breaks between a worker and the database, the broker, or a provider.

One worker reaches all three through proxies of ours (`tests.fakes.tcp_proxy`). What is asked of the provider is held,
so that every fault comes while calls are in flight, however slow the machine is, and ends when it was seen.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from orchestrator.manager import StartedRun
from tests.engine import Engine, launch_engine
from tests.fakes.tcp_proxy import TcpProxy, running_proxy
from tests.packs import ONE, SURVEY, Pack
from tests.servers import PostgresServer, wait_until

CONCURRENCY = 10
CALLS = 30
IN_FLIGHT = 3
"""So many calls at least are in flight when a fault comes."""
LATENCY_S = 0.1
IMPATIENT = Pack(ONE.workflow.replace("timeout_s = 20", "timeout_s = 1"), ONE.templates, calls_per_item=1)


@dataclass(frozen=True, slots=True)
class Network:
    """An engine whose first worker has nothing but proxies around it."""

    engine: Engine
    postgres: TcpProxy
    redis: TcpProxy
    provider: TcpProxy

    def start(self, salt: str, pack: Pack = ONE) -> StartedRun:
        """Begins a run and returns when calls have left the worker; none is answered before `let_answer`."""
        self.provider.stall()
        run = self.engine.start_run(CALLS, pack, salt=salt)
        wait_until(lambda: self.provider.held >= IN_FLIGHT, 30)
        return run

    def let_answer(self) -> None:
        """Lets the calls in flight be answered; shows that no others follow them, as they would otherwise at once."""
        fake = self.engine.fake.provider
        before = fake.number
        self.provider.heal()
        wait_until(lambda: fake.number >= before + IN_FLIGHT and fake.in_flight == 0, 20)
        threading.Event().wait(3 * LATENCY_S)
        assert fake.number <= before + CONCURRENCY


@pytest.fixture(scope="module")
def network(postgres_server: PostgresServer) -> Iterator[Network]:
    with ExitStack() as held:
        name = postgres_server.create()
        held.callback(postgres_server.drop, name)
        target = ("127.0.0.1", postgres_server.port)
        postgres = held.enter_context(running_proxy(target, is_postgres=True))
        redis, provider = held.enter_context(running_proxy()), held.enter_context(running_proxy())
        engine = held.enter_context(
            launch_engine(
                database_url=postgres_server.url(name),
                providers={
                    "main": {"concurrency": CONCURRENCY, "base_url": f"http://127.0.0.1:{provider.port}/v1"},
                },
                fakes={"main": {"latency_s": LATENCY_S}},
                settings={"worker": {"shard_size": 10}},
                workers=0,
            )
        )
        held.callback(engine.manager.close)
        redis.target, provider.target = engine.valkey.socket_path, ("127.0.0.1", engine.fake.port)
        through = postgres_server.url(name).replace(f":{postgres_server.port}/", f":{postgres.port}/")
        engine.start_worker(DATABASE_URL=through, REDIS_URL=f"redis://127.0.0.1:{redis.port}/0")
        yield Network(engine, postgres, redis, provider)
        assert engine.workers[0].is_alive()


@pytest.mark.parametrize(
    ("times", "words"),
    [
        pytest.param(3, ("INSERT INTO llm_usage",), id="of claims"),
        pytest.param(3, ("UPDATE llm_usage",), id="of settlements"),
        # It is not published, and its silence is noticed after some seconds.
        pytest.param(1, ("UPDATE windows", "round"), id="of a round"),
    ],
)
def test_a_commit_whose_reply_is_lost_is_neither_lost_nor_made_twice(
    network: Network, times: int, words: tuple[str, ...]
) -> None:
    lost = network.postgres.lost_commits
    for _ in range(times):
        network.postgres.lose_commit(*words)
    run = network.engine.start_run(20, SURVEY, salt=" ".join(words))
    assert network.engine.wait(run)["status"] == "completed"
    assert network.postgres.lost_commits == lost + times
    history = network.engine.check(run)
    assert history.attempts == {"ok": 41}
    assert history.received == 41


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_worker_without_its_database_sends_nothing_and_keeps_its_answers(network: Network, fault: str) -> None:
    run = network.start(f"database {fault}")
    getattr(network.postgres, fault)()
    network.let_answer()
    assert network.engine.status(run)["calls"]["completed"] == 0
    network.postgres.heal()
    assert network.engine.wait(run)["calls"]["completed"] == CALLS
    assert network.engine.check(run).attempts == {"ok": CALLS}


def test_a_worker_whose_database_was_silent_for_longer_than_its_lease_goes_on(network: Network) -> None:
    """Nobody else is there who could have taken it for dead, and it must not do so itself."""
    run = network.start("database silent")
    network.postgres.stall()
    network.let_answer()
    dead = "SELECT count(*) FROM workers WHERE heartbeat_at < EXTRACT(epoch FROM clock_timestamp()) - lease_seconds"
    wait_until(lambda: network.engine.rows(dead)[0][0] == 1, 20)
    network.postgres.heal()
    assert network.engine.wait(run)["calls"]["completed"] == CALLS
    assert network.engine.check(run).attempts == {"ok": CALLS}


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_worker_without_its_broker_sends_nothing_and_goes_on_afterwards(network: Network, fault: str) -> None:
    run = network.start(f"broker {fault}")
    getattr(network.redis, fault)()
    network.let_answer()
    # What was in flight is booked without the broker.
    wait_until(lambda: network.engine.status(run)["calls"]["completed"] >= IN_FLIGHT)
    network.redis.heal()
    assert network.engine.wait(run)["calls"]["completed"] == CALLS
    assert network.engine.check(run).attempts == {"ok": CALLS}


def test_calls_that_are_cut_off_their_provider_are_booked_and_asked_again(network: Network) -> None:
    fake = network.engine.fake
    fake.control(latency_s=3.0)
    run = network.engine.start_run(CALLS, ONE, salt="provider cut")
    wait_until(lambda: fake.provider.in_flight == CONCURRENCY, 30)
    network.provider.cut()
    fake.control(latency_s=LATENCY_S)
    network.provider.heal()
    assert network.engine.wait(run)["calls"]["completed"] == CALLS
    # It had got all of them; and who was refused meanwhile had sent nothing.
    history = network.engine.check(run, unknown=CONCURRENCY, repeats=CONCURRENCY)
    assert (history.attempts["unknown"], history.repeated) == (CONCURRENCY, CONCURRENCY)
    wait_until(lambda: fake.provider.in_flight == 0)


def test_calls_that_a_provider_never_answers_end_by_their_deadline(network: Network) -> None:
    run = network.start("provider stall", IMPATIENT)
    wait_until(lambda: network.engine.status(run)["attempts"]["unknown"] > 0, 20)
    network.provider.heal()
    assert network.engine.wait(run)["calls"]["completed"] == CALLS
    history = network.engine.check(run, unknown=3 * CALLS, repeats=3 * CALLS)
    assert history.attempts["unknown"] > 0
    assert history.repeated <= history.attempts["unknown"]
