"""What is measured, and what we aim at. Numbers only; how they are measured stands in `measuring`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Metric = Literal["calls_per_s", "asking_s", "cpu_s_per_1000", "asking_cpu_s_per_1000", "peak_mb"]

LABELS: Mapping[Metric, str] = {
    "calls_per_s": "calls/s",
    "asking_s": "s, first send to last answer",
    "cpu_s_per_1000": "CPU s per 1,000 calls",
    "asking_cpu_s_per_1000": "CPU s per 1,000 while asking",
    "peak_mb": "MB (PSS), all processes",
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load.

    Attributes:
        in_flight: calls at the provider at the same time, at most.
        server: options of the fake provider, as on its command line.
        aims: what we want; at least for `calls_per_s`, at most for everything else.
    """

    name: str
    title: str
    calls: int
    in_flight: int
    server: Mapping[str, float]
    aims: Mapping[Metric, float]
    faulty: bool = field(default=False)


SCENARIOS = (
    Scenario(
        name="A",
        title="5,000 calls without latency, 50 in flight: what a call costs us",
        calls=5_000,
        in_flight=50,
        server={},
        aims={"calls_per_s": 2_500, "cpu_s_per_1000": 0.5},
    ),
    Scenario(
        name="B",
        title="4,000 calls of 2 s, 1,000 in flight: what waiting costs us",
        calls=4_000,
        in_flight=1_000,
        server={"latency_s": 2.0},
        aims={"asking_s": 8.8, "peak_mb": 150},
    ),
    Scenario(
        name="C",
        title="2,000 calls of 0.1 s, 100 in flight, 5 % errors and 2 % resets: what faults cost us",
        calls=2_000,
        in_flight=100,
        server={"latency_s": 0.1, "error_500": 0.05, "reset_before": 0.02, "seed": 7},
        aims={"asking_s": 3.4},
        faulty=True,
    ),
)


def item_text(number: int) -> str:
    """The text of one item: a few sentences, different for every number."""
    words = ("steady", "careful", "open", "quick", "plain", "honest", "small")
    told = " ".join(f"Sentence {part} calls it {words[(number + part) % len(words)]}." for part in range(8))
    return f"Text {number}. {told}"
