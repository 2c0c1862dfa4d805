"""How much a template may read, loop, build and take; and the one function that measures a value.

The caps exist because packs are shared: a template from elsewhere must not be able to stop a worker that holds a
thousand paid calls. They are far above what honest prompts need.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

MAX_VALUE_SIZE = 2_000_000
ELEMENT_SIZE = 16
"""What an element weighs beside its text: about what it takes to walk it."""
MAX_INCLUDES = 200
MAX_RANGE = 10_000
MAX_INTEGER_BITS = 1_024

# Reading the thread clock costs several times a loop step.
_STEPS_PER_CLOCK_READING = 16


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Caps of one engine: characters of a source, characters of a message, loop steps and seconds of CPU a render."""

    source_chars: int = 200_000
    output_chars: int = 2_000_000
    loop_steps: int = 200_000
    cpu_s: float = 1.0


class LimitExceeded(Exception):
    """A cap was reached; translated into `PromptTooLarge` at the border of the package."""


class Meter:
    """Counts the loop steps of one render and stops it when they, or its processor time, run out.

    Time is that of the rendering thread alone, so a busy machine does not make honest templates fail.
    """

    __slots__ = ("_deadline_s", "_limits", "_steps")

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._steps = 0
        self._deadline_s = 0.0

    def step(self) -> None:
        """Count one loop step.

        Raises:
            LimitExceeded: When steps or processor time have run out.
        """
        if self._steps % _STEPS_PER_CLOCK_READING == 0:
            self._check_time()
        self._steps += 1
        if self._steps > self._limits.loop_steps:
            raise LimitExceeded(f"the template loops more than {self._limits.loop_steps} times")

    def _check_time(self) -> None:
        now_s = time.thread_time()
        if not self._deadline_s:
            self._deadline_s = now_s + self._limits.cpu_s
        elif now_s > self._deadline_s:
            raise LimitExceeded(f"rendering takes more than {self._limits.cpu_s} s of processor time")


def weigh(value: object, budget: int = MAX_VALUE_SIZE) -> int:
    """Return the size of a plain value written out: characters, and `ELEMENT_SIZE` for every element.

    Parts that a value holds several times count every time.

    Raises:
        LimitExceeded: When it is more than `budget`; the walk stops there, so its own cost is bounded.
    """
    if isinstance(value, str):
        size = len(value) + ELEMENT_SIZE
    elif isinstance(value, (list, tuple)):
        size = ELEMENT_SIZE
        for element in cast("list[object]", value):
            size += weigh(element, budget - size)
    elif isinstance(value, Mapping):
        size = ELEMENT_SIZE
        for key, element in cast("Mapping[object, object]", value).items():
            size += weigh(key, budget - size)
            size += weigh(element, budget - size)
    else:
        size = ELEMENT_SIZE
    if size > budget:
        raise LimitExceeded(f"the template builds a value of more than {MAX_VALUE_SIZE} characters")
    return size
