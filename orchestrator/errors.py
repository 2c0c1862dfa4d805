"""The errors this package raises, the exit codes they end in, and the shape in which a problem is reported.

A `Problem` is one finding that a person can act on: what is wrong, where, and what to do. Checks collect problems
and raise once, so that a user repairs everything in one go. Which error ends the process with which code stands
here, beside the errors; how it is printed is up to the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from orchestrator.money import usd

MAX_PROBLEMS = 50
"""Collectors stop listing here: the first findings explain the rest, and a million bad rows must fit in memory."""


class ExitCode(IntEnum):
    """What the process tells the shell; the numbers are a public contract."""

    OK = 0
    """All work is done and every gate passed."""
    INTERNAL_ERROR = 1
    """A bug of ours."""
    USAGE = 2
    """Wrong command line, or a run name that fits none or several runs."""
    INVALID_INPUT = 3
    """Workflow, pack, items or configuration are invalid; nothing was spent."""
    ITEMS_FAILED = 4
    """More items failed, or have an unknown outcome, than `--max-failures` allows."""
    STOPPED = 5
    """Stopped by a budget or a deadline; the run can be resumed."""
    NOT_READY = 6
    """Database, broker, key or another part of the environment is missing; try again once it is there."""
    GATE_FAILED = 100
    """The run ended, and a quality gate did not pass."""
    INTERRUPTED = 130
    """SIGINT; state is saved."""
    TERMINATED = 143
    """SIGTERM; state is saved."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    Attributes:
        code: Stable kebab-case identifier with its area in front, such as `items.duplicate-key`.
        message: One sentence, without secrets.
        place: Where: `file:line:column`, `item 'key'`, or the name of a setting or variable.
        hint: What to do about it; None when the message says it already.
    """

    code: str
    message: str
    place: str
    hint: str | None = None

    def render(self) -> str:
        """The finding as text: one line, and a second one with the hint if there is one."""
        where = f" {self.place}:" if self.place else ""
        line = f"error[{self.code}]{where} {self.message}"
        return f"{line}\n  help: {self.hint}" if self.hint else line

    def to_json(self) -> dict[str, str | None]:
        """The finding as a JSON object with the keys `code`, `message`, `place` and `hint`."""
        return {"code": self.code, "message": self.message, "place": self.place, "hint": self.hint}


class OrchestratorError(Exception):
    """Base of every error that this package raises on purpose.

    ::

        OrchestratorError
        ├── InvalidInput            what the user gave is wrong; holds all problems
        │   ├── ConfigError         configuration files, environment variables, flags
        │   └── WorkflowError       packs, workflow declarations, templates
        ├── EnvironmentNotReady     database, broker, key or directory is missing; holds all problems
        ├── RunNotFound             a run name that fits no run, or several
        ├── WrongState              what is asked for does not fit what a run or the installation does now
        ├── BudgetExceeded          a reservation that does not fit
        └── AnswerError             a reply that is not a valid answer
    """

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL_ERROR


class _ProblemsError(OrchestratorError):
    """An error that carries every problem found, in the order in which a reader meets them."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(problem.render() for problem in self.problems)


class InvalidInput(_ProblemsError):
    """Something the user gave is wrong; nothing was spent."""

    exit_code = ExitCode.INVALID_INPUT


class ConfigError(InvalidInput):
    """A configuration file, an environment variable or a flag is wrong."""


class WorkflowError(InvalidInput):
    """A pack, its workflow declaration or one of its templates is wrong."""


class EnvironmentNotReady(_ProblemsError):
    """Something outside is missing: a database, a broker, a key, room on a disk. Safe to try again later."""

    exit_code = ExitCode.NOT_READY


class RunNotFound(OrchestratorError):
    """The name given for a run fits none, or several.

    Attributes:
        wanted: What the user typed.
        candidates: The runs it could mean; more than one of them when a prefix is ambiguous, possibly none.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, wanted: str, candidates: Sequence[str] = ()) -> None:
        self.wanted = wanted
        self.candidates = tuple(candidates)
        super().__init__(wanted, self.candidates)

    def __str__(self) -> str:
        if not self.candidates:
            return f"no run is called {self.wanted!r}"
        return f"no single run is called {self.wanted!r}; it could be: {', '.join(self.candidates)}"


class WrongState(OrchestratorError):
    """What is asked for does not fit the state in which a run or the installation is; nothing was changed."""

    exit_code = ExitCode.USAGE


class BudgetExceeded(OrchestratorError):
    """A reservation does not fit into a budget, so nothing was sent.

    Attributes:
        scope: The budget: a run, a provider or `global`.
        limit_nusd: Its limit in nano-USD.
        needed_nusd: Spent, reserved and newly asked for, together, in nano-USD.
    """

    exit_code = ExitCode.STOPPED

    def __init__(self, scope: str, limit_nusd: int, needed_nusd: int) -> None:
        self.scope = scope
        self.limit_nusd = limit_nusd
        self.needed_nusd = needed_nusd
        super().__init__(scope, limit_nusd, needed_nusd)

    def __str__(self) -> str:
        limit, needed = usd(self.limit_nusd), usd(self.needed_nusd)
        return f"budget of {self.scope} is {limit} USD, and {needed} USD would be needed"


class AnswerError(OrchestratorError):
    """A reply cannot be read as the answer that the step asks for.

    Attributes:
        message: What is wrong, in words that a model or a person can act on.
        path: The field inside the answer, such as `scores.novelty`; empty when the whole reply is meant.
    """

    exit_code = ExitCode.ITEMS_FAILED

    def __init__(self, message: str, path: str = "") -> None:
        self.message = message
        self.path = path
        super().__init__(message, path)

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def suggest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that the writer of `word` probably meant, or None when nothing is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for an unknown name: the closest choice, else the list of all choices, sorted."""
    known = sorted(choices)
    meant = suggest(word, known)
    return f"did you mean {meant!r}?" if meant else f"known: {', '.join(known)}"
