"""What the product believes to be its broker, its limiter and its providers."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisAway

import workers.client
import workers.outcomes
import workers.prepared
import workers.reconciler
import workers.runtime
from orchestrator import broker
from orchestrator.broker import ShardMessage
from providers import errors
from providers.messages import ChatReply, ChatRequest, Usage
from tests.simulation.clock import ACTOR
from tests.simulation.process import Killed, Process, Worker, Writer
from workers.limiter import LimiterUnavailable, Permit, Pool, Refused

if TYPE_CHECKING:
    from tests.simulation.world import World


@dataclass
class Canvas:
    """A chain of groups of messages: the next one is sent when as many of the last were done as it had."""

    groups: list[list[ShardMessage]]
    window: int
    generation: int
    open: int = 0


class Broker:
    """Carries messages, badly: late, twice, out of order, not at all; and at times it forgets everything."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.generation = 0
        self.has_marker = False
        self.queued: Counter[str] = Counter()

    def publish(self, groups: Sequence[Sequence[ShardMessage]], window: int) -> None:
        self._next(Canvas([list(group) for group in groups], window, self.generation))

    def forget(self) -> None:
        self.generation += 1
        self.has_marker = False
        self.queued.clear()

    def _next(self, canvas: Canvas) -> None:
        if not canvas.groups:
            self._send(canvas, None)
            return
        group = canvas.groups.pop(0)
        canvas.open = len(group)
        for message in group:
            self._send(canvas, message)

    def _send(self, canvas: Canvas, message: ShardMessage | None) -> None:
        world = self._world
        copies = 1
        if world.has_fault(0.02):
            world.step("message lost")
            copies = 0
        elif world.has_fault(0.04):
            world.step("message duplicated")
            copies = 2
        for _ in range(copies):
            delay_s = world.latency_s()
            if world.has_fault(0.04):
                world.step("message delayed")
                delay_s = world.random.uniform(1, 60)
            queue = self._queue(message)
            self.queued[queue] += 1
            world.loop.call_later(delay_s, self._deliver, canvas, message)

    def _queue(self, message: ShardMessage | None) -> str:
        name = broker.CONTROL_QUEUE if message is None else broker.provider_queue(message.provider)
        return self._world.config.settings.queue_prefix + name

    def _deliver(self, canvas: Canvas, message: ShardMessage | None) -> None:
        world = self._world
        if canvas.generation != self.generation:
            return
        ready = [one for one in world.workers if not one.is_dead and (message is None or one.free_slots)]
        if not ready:
            world.loop.call_later(0.5, self._deliver, canvas, message)
            return
        self.queued[self._queue(message)] -= 1
        worker = world.random.choice(ready)
        world.step("deliver")
        worker.begin(self._work(worker, canvas, message))

    async def _work(self, worker: Worker, canvas: Canvas, message: ShardMessage | None) -> None:
        try:
            if message is None:
                await worker.close_window(canvas.window)
                return
            worker.free_slots -= 1
            try:
                await worker.ask(message)
            finally:
                worker.free_slots += 1
        except (Killed, asyncio.CancelledError):
            raise
        except Exception as error:
            # As in Celery, a header task that fails ends its chord.
            self._world.note_error(error)
            return
        if canvas.generation == self.generation:
            canvas.open -= 1
            if canvas.open == 0:
                self._next(canvas)


class FakeRedis:
    """The three things that the runtime asks of Redis itself."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def set(self, _name: str, _value: str, *, nx: bool) -> bool:
        assert nx
        self._fail()
        was_missing = not self._world.broker.has_marker
        self._world.broker.has_marker = True
        return was_missing

    def pipeline(self, *, transaction: bool) -> "FakePipeline":
        assert not transaction
        return FakePipeline(self._fail, self._world.broker.queued)

    async def aclose(self) -> None:
        pass

    def _fail(self) -> None:
        if self._world.is_broker_away:
            raise RedisAway("simulated")


class FakePipeline:
    """Tells the lengths of queues."""

    def __init__(self, fail: Callable[[], None], queued: Mapping[str, int]) -> None:
        self._fail = fail
        self._queued = queued
        self._asked: list[str] = []

    def llen(self, name: str) -> None:
        self._asked.append(name)

    async def execute(self) -> list[int]:
        self._fail()
        return [self._queued[name] for name in self._asked]


class FakeLimiter:
    """Gives permits after a while, refuses some, and is away when the broker is."""

    def __init__(self, world: "World", process: Process) -> None:
        self._world = world
        self._process = process
        self._not_before: dict[str, float] = {}

    async def permit(self, pool: Pool, *_: Any, permit_id: str, **__: Any) -> Permit | Refused:
        world = self._world
        world.step("permit")
        if world.is_broker_away:
            raise LimiterUnavailable
        if world.has_fault(0.01):
            return Refused(world.random.choice((0.5, 5.0, 90.0)), "rpm")
        wait_s = world.random.choice((0.0, 0.0, 0.5, 2.0))
        send_at = max(world.loop.time() + wait_s, self._not_before.get(pool.key, -math.inf))
        return Permit(permit_id, pool, send_at, {})

    async def wait_until_due(self, permit: Permit) -> bool:
        await asyncio.sleep(permit.send_at - self._world.loop.time())
        await self._process.awake()
        if self._world.is_broker_away and self._world.has_fault(0.5):
            raise LimiterUnavailable
        return not self._world.has_fault(0.01)

    async def penalise(self, pool: Pool, retry_after_s: float) -> None:
        self._not_before[pool.key] = self._world.loop.time() + retry_after_s

    def settle(self, *_: Any) -> None:
        pass

    def adopt(self, *_: Any) -> None:
        pass

    def release_unsent(self, *_: Any) -> None:
        pass

    async def renew_all(self, lease_s: float) -> None:
        if self._world.is_broker_away:
            raise LimiterUnavailable

    async def aclose(self) -> None:
        pass


class FakeProvider:
    """Answers in time, late, wrongly, not at all, or with an error of any class."""

    def __init__(self, world: "World", process: Process, name: str) -> None:
        self._world = world
        self._process = process
        self.name = name

    async def send(self, request: ChatRequest) -> ChatReply:
        world = self._world
        world.note_sent(request.attempt_id)
        self._process.reach("sent")
        random = world.random
        if world.loop.time() < world.provider_away_until.get(self.name, 0.0):
            await asyncio.sleep(0.1)
            await self._process.awake()
            world.step("answers nobody")
            if random.random() < 0.3:
                raise errors.ConnectionFailed(self.name, "refused", sent=False)
            raise errors.Unavailable(self.name, "down", billed="no")
        if world.has_fault(0.03):
            world.step("provider hangs")
            await asyncio.sleep(request.timeout_s)
            await self._process.awake()
            raise errors.TimedOut(self.name, "no reply")
        await asyncio.sleep(random.choice((0.1, 0.5, 2.0)) if not world.has_fault(0.03) else random.uniform(5, 19))
        await self._process.awake()
        world.step("reply")
        self._process.reach("replied")
        used = Usage(random.randint(1, 40), random.randint(1, request.max_output_tokens))
        if world.has_fault(0.08):
            raise self._error(used)
        reply = self._reply(request, used)
        world.replies[request.attempt_id] = reply
        return reply

    async def look_up(self, attempt_id: str, _timeout_s: float) -> ChatReply | None:
        await asyncio.sleep(0.1)
        await self._process.awake()
        return self._world.replies.get(attempt_id)

    async def aclose(self) -> None:
        pass

    def _error(self, used: Usage) -> errors.ProviderError:
        random = self._world.random
        self._world.step("provider error")
        kind = random.choice(
            (
                *(errors.RateLimited, errors.Unavailable, errors.TimedOut, errors.ConnectionFailed) * 3,
                *(errors.MalformedReply, errors.ContextTooLong, errors.RequestRejected, errors.ContentRefused) * 2,
                *(errors.QuotaExhausted, errors.AuthenticationFailed, errors.ModelNotFound),
            )
        )
        return kind(
            self.name,
            "simulated",
            retry_after_s=random.choice((None, 0.2, 4.0, 100.0)),
            sent=random.random() < 0.9,
            billed=random.choice(("no", "no", "yes", "unknown")),
            usage=random.choice((None, used)),
        )

    def _reply(self, request: ChatRequest, used: Usage) -> ChatReply:
        world = self._world
        text, cost, refusal, usage = (
            json.dumps({"score": world.random.randint(0, 10), "reason": "so"}),
            None,
            None,
            used,
        )
        if world.has_fault(0.05):
            world.step("bad answer")
            text, refusal = world.random.choice((("nonsense", None), ("", None), ("{}", None), ("", "I may not")))
        if world.has_fault(0.02):
            world.step("overcharge")
            cost = 10**12 if world.random.random() < 0.2 else 10**7
        if world.has_fault(0.02):
            usage = None
        return ChatReply(text, "stop", usage, request.model, cost_nusd=cost, refusal=refusal)


@contextmanager
def doors_of(world: "World") -> Any:
    """Puts the world in the place of everything outside the process."""

    def of_process(make: Any) -> Any:
        return lambda *_, **__: make(world, ACTOR.get())

    def publish(app: Any, groups: Any, window: int) -> None:
        process: Process = app
        process.reach("publish")
        if world.is_broker_away:
            raise OperationalError("simulated")
        world.step("publish")
        world.broker.publish(groups, window)
        process.reach("published")

    redis = type("Redis", (), {"from_url": staticmethod(lambda *_, **__: FakeRedis(world))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker, "publish_canvas", publish)
        patch.setattr(broker, "ask_shard", lambda _app, message, _before: message)
        patch.setattr(broker, "close_window", lambda _app, window: window)
        patch.setattr(workers.client, "monotonic", world.loop.time)
        patch.setattr(workers.outcomes, "monotonic", world.loop.time)
        patch.setattr(workers.prepared, "monotonic", world.loop.time)
        patch.setattr(workers.reconciler, "monotonic", world.loop.time)
        patch.setattr(workers.runtime, "Redis", redis)
        patch.setattr(workers.runtime, "Limiter", of_process(FakeLimiter))
        patch.setattr(workers.runtime, "Database", lambda *_: ACTOR.get().database)
        patch.setattr(workers.runtime, "BatchWriter", Writer)
        patch.setattr(workers.runtime, "open_provider", lambda one, _: FakeProvider(world, ACTOR.get(), one.name))
        patch.setattr(workers.runtime, "save_run", lambda *_: world.step("save"))
        yield
