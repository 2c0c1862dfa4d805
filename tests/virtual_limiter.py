"""The limiter on virtual time: its scripts run in a real server, but nobody waits, and a seed always tells the same.

A loop of `tests.simulation.clock` lets time pass when nobody has anything to do. The scripts are given that time
instead of the server's own, and every round trip takes a random while of it each way. So minutes of traffic of several
worker processes take a second or two, and what they use of a limit is a number that does not depend on the machine.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from redis import Redis

from tests.servers import ValkeyServer
from tests.simulation.clock import VirtualLoop
from workers.limiter import Limiter

T = TypeVar("T")

START_S = 1_000_000.0
SERVER_AHEAD_S = 777.7
"""The server's clock differs from the loop's, as it does between hosts."""
CLOCK = "redis.call('TIME')"


class VirtualRedis:
    """What the limiter needs of a Redis client, with round trips of `2 * uniform(0, jitter_s)` of virtual time."""

    def __init__(self, client: "Redis[bytes]", jitter_s: float) -> None:
        self._client = client
        self._jitter_s = jitter_s
        self.calls = 0

    def register_script(self, source: str) -> Callable[[Sequence[str], Sequence[Any]], Awaitable[Any]]:
        assert source.count(CLOCK) == 1
        # Arguments behind those that a script reads.
        script = self._client.register_script(source.replace(CLOCK, "{ ARGV[#ARGV - 1], ARGV[#ARGV] }"))
        return lambda keys, args: self._answer(lambda: script(keys, [*args, *self._time()]))

    def time(self) -> Awaitable[tuple[int, int]]:
        return self._answer(self._time)

    def hget(self, *args: Any) -> Awaitable[Any]:
        return self._answer(lambda: self._client.hget(*args))

    def zadd(self, *args: Any, **options: Any) -> Awaitable[Any]:
        return self._answer(lambda: self._client.zadd(*args, **options))

    def pexpire(self, *args: Any) -> Awaitable[Any]:
        return self._answer(lambda: self._client.pexpire(*args))

    def _time(self) -> tuple[int, int]:
        microseconds = round((asyncio.get_running_loop().time() + SERVER_AHEAD_S) * 1e6)
        return microseconds // 1_000_000, microseconds % 1_000_000

    async def _answer(self, call: Callable[[], T]) -> T:
        self.calls += 1
        await asyncio.sleep(random.uniform(0, self._jitter_s))
        answer = call()
        await asyncio.sleep(random.uniform(0, self._jitter_s))
        return answer


class VirtualProcesses:
    """Limiters of several worker processes beside one server."""

    def __init__(self, client: "Redis[bytes]", count: int, jitter_s: float, options: Mapping[str, Any]) -> None:
        self.servers = [VirtualRedis(client, jitter_s) for _ in range(count)]
        self.limiters = [Limiter(server, "test", **options) for server in self.servers]

    async def aclose(self) -> None:
        for one in self.limiters:
            await one.aclose()


def run_virtually(
    server: ValkeyServer,
    scenario: Callable[[list[Limiter]], Coroutine[Any, Any, T]],
    *,
    processes: int = 1,
    seed: int = 1,
    jitter_s: float = 0.002,
    **options: Any,
) -> T:
    """The result of a scenario with limiters of so many processes; the server is emptied before."""

    async def whole() -> T:
        found = VirtualProcesses(client, processes, jitter_s, options)
        try:
            return await scenario(found.limiters)
        finally:
            await found.aclose()

    with Redis.from_url(server.url) as client, _loop() as loop:
        client.flushall()
        random.seed(seed)
        return loop.run_until_complete(whole())


@contextlib.contextmanager
def _loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop(START_S, _never)
    try:
        yield loop
    finally:
        loop.close()


def _never(function: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
    raise AssertionError(f"the limiter asked for a thread: {function} {answer}")
