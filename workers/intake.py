"""Decides from which lines of its queues a process takes messages: from each no more than it can soon send.

A run has a line in every queue (`orchestrator.broker`). Whoever takes messages as they come works off a large run
before it meets the small one behind it, and whoever takes as many as it has threads holds shards that others could ask.
So a line is left alone while enough of its calls wait here, and of the others the one with the fewest comes first. A
call counts until it is sent: while it is answered, or waits for its second try, others may come in its place.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count

Line = tuple[str, int]
"""A queue and the number of a line in it."""

MOST_PER_LINE = 400
"""Calls of a line that wait in one process: enough for the tenth of a second in which a line that was full may not be
looked at, at the most calls that a process can send."""
MOST = 1_200
"""Calls of all lines; a line of which none waits is served all the same."""
UNREAD_CALLS = 50
"""What a message counts until its calls are read."""


class Ticket:
    """A message that was taken. Every method may be called from any thread, and repeated."""

    def __init__(self, intake: "Intake", line: Line) -> None:
        self._intake = intake
        self._line = line
        self._unread = UNREAD_CALLS
        self._waiting: set[int] = set()

    def read(self, calls: Iterable[int]) -> None:
        """Says which of its calls are to be sent, by their ids."""
        with self._intake.lock:
            before = self.size()
            self._unread, self._waiting = 0, set(calls)
            self._count(before)

    def begin(self, call: int) -> None:
        """Says that a call does not wait to be sent any more."""
        with self._intake.lock:
            before = self.size()
            self._waiting.discard(call)
            self._count(before)

    def end(self) -> None:
        """Says that nothing of it waits any more."""
        self.read(())

    def give_up_unread(self) -> None:
        """Counts it no more unless it is read; only for the intake, which holds the lock."""
        before = self.size()
        self._unread = 0
        self._count(before)

    def size(self) -> int:
        """How many of its calls wait."""
        return self._unread + len(self._waiting)

    def _count(self, before: int) -> None:
        self._intake.add(self._line, self.size() - before)


class Intake:
    """What one process has taken and not sent yet.

    Messages are taken by Celery's thread, read and ended by the threads of their tasks, and their calls begin on the
    event loop; so everything is counted under a lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._waiting: Counter[Line] = Counter()
        self._tickets: dict[str, Ticket] = {}
        self._turns = count(1)
        self._last_turn: Counter[Line] = Counter()

    def take(self, tag: str, line: Line) -> None:
        """Notes a message that came from a line, by its delivery tag."""
        with self.lock:
            self._tickets[tag] = Ticket(self, line)
            self._last_turn[line] = next(self._turns)
            self.add(line, UNREAD_CALLS)

    def ticket(self, tag: str) -> Ticket:
        """The ticket of a message; one that counts nowhere for a message that nobody noted."""
        return self._tickets.get(tag) or Ticket(Intake(), ("", 0))

    def drop(self, tag: str) -> None:
        """Forgets a message that was acknowledged or rejected. Safe to repeat."""
        ticket = self._tickets.pop(tag, None)
        if ticket is not None:
            ticket.end()

    def forget_unread(self) -> None:
        """Counts messages no more that nobody has read yet; those that are read count from then on.

        For a new connection: of what came by a broken one, some may never be read, and would count for ever.
        """
        with self.lock:
            for ticket in self._tickets.values():
                ticket.give_up_unread()

    def wanted(self, lines: Sequence[Line]) -> list[Line]:
        """Those lines from which the next message may come, best first."""
        with self.lock:
            most = 1 if self._waiting.total() >= MOST else MOST_PER_LINE
            wanted = [line for line in lines if self._waiting[line] < most]
            return sorted(wanted, key=lambda line: (self._waiting[line], self._last_turn[line]))

    def add(self, line: Line, calls: int) -> None:
        """Counts calls of a line; only for its tickets, which hold the lock."""
        self._waiting[line] += calls
        if not self._waiting[line]:
            del self._waiting[line]
