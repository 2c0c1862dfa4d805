"""Circuit breakers: while a provider answers nobody, as one process sees it, calls wait instead of failing.

An outage is no fault of the calls that meet it. After some failures in a row a breaker opens: calls wait, holding
neither a place nor a permit nor money, and now and then one is sent as a probe. The first answer lets all of them go
on. Only what all calls of a route share is judged here; what a failure means for its own call is decided in
`workers.retry`.

Each process finds out for itself: the state of others is a few probes away, and nothing that is shared can be wrong.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

import structlog

log = structlog.get_logger(__name__)

FAILURES = 10
"""Failures in a row, of two calls at least, that open a breaker: one call may fail for a reason of its own."""
UNREACHED = 3
"""Connections in a row that never came about: no call is the reason for that."""
PROBES_S = (1.0, 30.0)
"""First and longest pause before a probe; each one doubles it. Nobody waits for the end of a probe to send the next: a
provider that is silent may keep one until its deadline."""


@dataclass(slots=True)
class _Waiting:
    turn: asyncio.Future[None]
    may_leave: bool


class Breaker:
    """Of one route: closed while anything is answered, open while nothing is. For one event loop.

    Args:
        provider: for the log.
        model: for the log.
    """

    def __init__(self, provider: str, model: str) -> None:
        self._told = {"provider": provider, "model": model}
        self._failures = 0
        self._unreached = 0
        self._failed: set[int] = set()
        self._is_open = False
        self._opened_at = 0.0
        self._pause_s = PROBES_S[0]
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False
        self._has_probed = False
        self._probes: set[int] = set()
        self._waiting: deque[_Waiting] = deque()
        self._since: dict[int, float] = {}

    @property
    def is_open(self) -> bool:
        """Whether calls wait."""
        return self._is_open

    def waiting(self) -> int:
        """How many calls wait, or are sent to see."""
        return sum(not one.turn.done() for one in self._waiting) + len(self._probes)

    def lets(self, call: int) -> bool:
        """Whether a call may be sent now."""
        return not self._is_open or call in self._probes

    async def passage(self, call: int, *, may_leave: bool) -> bool:
        """Waits until a call may be sent.

        Args:
            call: its id; when it is sent as a probe, whoever sends it says how that ended, or that it did not happen.
            may_leave: it has another route, which it had better take once a probe has failed.

        Returns:
            False when it should leave.
        """
        while not self.lets(call):
            if self._is_due:
                self._is_due = False
                self._probes.add(call)
                self._await_next_probe()
                return True
            if may_leave and self._has_probed:
                return False
            one = _Waiting(asyncio.get_running_loop().create_future(), may_leave)
            self._waiting.append(one)
            try:
                await one.turn
            except asyncio.CancelledError:
                if not one.turn.cancelled() and self._is_due:
                    self._wake_first()
                raise
        return True

    def answered(self) -> None:
        """Says that the provider answered somebody; also a refusal is an answer."""
        self._failures = self._unreached = 0
        self._failed.clear()
        if self._is_open:
            self._close()

    def failed(self, call: int, message: str, *, reached: bool) -> None:
        """Says that a call got no answer.

        Args:
            call: its id.
            message: what was wrong, for the log.
            reached: whether anything of the request may have arrived.
        """
        if self._is_open:
            if call in self._probes:
                self._probes.discard(call)
                self._has_probed = True
                self._send_away()
            return
        self._failures += 1
        self._failed.add(call)
        self._unreached = 0 if reached else self._unreached + 1
        if self._unreached >= UNREACHED or (self._failures >= FAILURES and len(self._failed) > 1):
            self._open(message)

    def ended(self, call: int) -> None:
        """Says that a call is not on its way any more. If it was to be the probe and did not leave, another one is."""
        if call in self._probes:
            self._probes.discard(call)
            self._let_one_go()

    def lasted_s(self, run: int) -> float | None:
        """For how long a run has met this outage; None when there is none."""
        if not self._is_open:
            return None
        now = asyncio.get_running_loop().time()
        return now - self._since.setdefault(run, now)

    def forget(self, run: int) -> None:
        """Lets a run's patience begin anew: it was stopped, and may be resumed."""
        self._since.pop(run, None)

    def _open(self, message: str) -> None:
        self._is_open = True
        self._opened_at = asyncio.get_running_loop().time()
        self._pause_s = PROBES_S[0]
        self._await_next_probe()
        log.warning("provider.unavailable", **self._told, error=message)

    def _close(self) -> None:
        self._cancel_timer()
        self._is_open = self._is_due = self._has_probed = False
        self._probes.clear()
        self._since.clear()
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            _wake(one)
        log.warning(
            "provider.back", **self._told, after_s=round(asyncio.get_running_loop().time() - self._opened_at, 1)
        )

    def _await_next_probe(self) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._let_one_go)
        self._pause_s = min(PROBES_S[1], 2 * self._pause_s)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _let_one_go(self) -> None:
        self._is_due = True
        self._wake_first()

    def _wake_first(self) -> None:
        while self._waiting:
            if _wake(self._waiting.popleft()):
                return

    def _send_away(self) -> None:
        """Wakes those that have somewhere else to go."""
        staying = deque(one for one in self._waiting if not one.may_leave)
        leaving = [one for one in self._waiting if one.may_leave]
        self._waiting = staying
        for one in leaving:
            _wake(one)


def _wake(one: _Waiting) -> bool:
    """Ends a wait; False if it had ended."""
    if one.turn.done():
        return False
    one.turn.set_result(None)
    return True


class Breakers:
    """The breakers of one process, by provider and model."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Breaker] = {}

    def of(self, provider: str, model: str) -> Breaker:
        """The breaker of a route."""
        known = self._known.get((provider, model))
        if known is None:
            known = self._known[provider, model] = Breaker(provider, model)
        return known

    def waiting(self) -> int:
        """How many calls wait for a provider that answers nobody."""
        return sum(one.waiting() for one in self._known.values() if one.is_open)

    def forget(self, run: int) -> None:
        """Lets a run's patience begin anew with each of them."""
        for one in self._known.values():
            one.forget(run)
