"""Measures the scenarios, prints a table for each, and writes JSON when asked.

`python -m benchmarks [A B C D E] [--rounds N] [--json FILE]`
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import killing, limiter
from benchmarks.measuring import Measured, fake_provider, measure
from benchmarks.scenarios import LABELS, SCENARIOS, Metric, Scenario, item_text
from orchestrator.declaration import read_workflow
from orchestrator.logs import Logger
from orchestrator.workflow import WORKFLOW_FILE, object_schema

OTHERS: Mapping[str, Callable[[int], tuple[str, Any]]] = {"D": limiter.report, "E": killing.report}
"""Scenarios with several workers, and yardsticks of their own: the table over so many rounds, and all numbers."""

PACK = Path(__file__).parent / "pack"
MODEL = "bench-model"
NOTHING_LOST = 0.999
"""Share of calls that must be answered; faults may use up all the tries of a few."""

TOO_SHORT_TO_SEE = 0.01
"""Processor time while asking is sampled, and the yardstick may be over between two samples."""


def main() -> None:
    """Runs the chosen scenarios; exits with 1 when a run lost calls or asked something else than the yardstick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the product against its aims")
    names = [*(one.name for one in SCENARIOS), *OTHERS]
    parser.add_argument("scenarios", nargs="*", metavar="NAME", help=f"{', '.join(names)}; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the median counts (default 3)")
    parser.add_argument("--json", type=Path, help="file for the numbers of every run")
    given = parser.parse_args()
    wanted = given.scenarios or names
    if strangers := set(wanted) - set(names):
        parser.error(f"no scenario is called {', '.join(sorted(strangers))}")
    chosen = [one for one in SCENARIOS if one.name in wanted]
    results: dict[str, Any] = {}
    for scenario in chosen:
        pairs = [_round(scenario) for _ in range(given.rounds)]
        print(_table(scenario, pairs), flush=True)
        results[scenario.name] = [{"product": _plain(ours), "plain": _plain(plain)} for ours, plain in pairs]
    Logger.init("warning")
    for name in (one for one in OTHERS if one in wanted):
        table, results[name] = OTHERS[name](given.rounds)
        print(table, flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _round(scenario: Scenario) -> tuple[Measured, Measured]:
    """One run of the product and one of the yardstick, each with a fresh provider and a fresh home."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        _write_items(scenario, place / "items.jsonl")
        _write_requests(scenario, place / "requests.jsonl")
        plain_log, log = place / "plain.log", place / "product.log"
        with fake_provider(scenario.server, plain_log) as url:
            command = ["benchmarks.plain", f"{url}/chat/completions", str(place / "requests.jsonl")]
            plain = measure([*command, str(scenario.in_flight)], {}, plain_log)
        with fake_provider(scenario.server, log) as url:
            _write_config(scenario, url, place / "llm-orchestrator.toml")
            environment = {
                "LLM_ORCHESTRATOR_CONFIG": str(place / "llm-orchestrator.toml"),
                "LLM_ORCHESTRATOR_HOME": str(place / "home"),
            }
            command = ["benchmarks.product", str(PACK), str(place / "items.jsonl"), str(place / "worker.log")]
            ours = measure(command, environment, log)
        _check(scenario, ours, plain, place / "worker.log")
        return ours, plain


def _check(scenario: Scenario, ours: Measured, plain: Measured, log: Path) -> None:
    if ours.prompts != plain.prompts or len(ours.prompts) != scenario.calls:
        sys.exit(f"{scenario.name}: the product asked {len(ours.prompts)} questions that are not the yardstick's")
    for who, one in (("the product", ours), ("the plain client", plain)):
        if one.completed < scenario.calls * (NOTHING_LOST if scenario.faulty else 1):
            sys.exit(f"{scenario.name}: {who} answered {one.completed} of {scenario.calls}\n{log.read_text('utf-8')}")


def _write_items(scenario: Scenario, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(scenario.calls):
            file.write(json.dumps({"key": f"item-{number}", "text": item_text(number)}) + "\n")


def _write_requests(scenario: Scenario, path: Path) -> None:
    """Bodies as our OpenAI dialect writes them; that the questions are the same is checked afterwards."""
    workflow, _ = read_workflow((PACK / WORKFLOW_FILE).read_text("utf-8"), WORKFLOW_FILE)
    fields = workflow.steps[0].answer.fields
    assert fields is not None
    _, front, template = (PACK / "judge.md.j2").read_text("utf-8").split("+++\n")
    system = front.strip().removeprefix('system = "').removesuffix('"')
    with path.open("w", encoding="utf-8") as file:
        for number in range(scenario.calls):
            user = template.replace("{{ item.text }}", item_text(number)).strip()
            body = {
                "model": MODEL,
                "max_tokens": 200,
                "temperature": 0.0,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "strict": True, "schema": object_schema(fields)},
                },
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            }
            file.write(json.dumps(body) + "\n")


def _write_config(scenario: Scenario, url: str, path: Path) -> None:
    path.write_text(
        f"""[global]
default_provider = "fake"

[worker]
concurrency = {scenario.in_flight}

[llm_providers.fake]
dialect = "openai"
base_url = "{url}"
default_model = "{MODEL}"
cost_per_1k_tokens = 0.001
""",
        encoding="utf-8",
    )


def _values(scenario: Scenario, one: Measured) -> dict[Metric, float]:
    return {
        "calls_per_s": scenario.calls / one.asking_s,
        "asking_s": one.asking_s,
        "cpu_s_per_1000": one.cpu_s / scenario.calls * 1000,
        "asking_cpu_s_per_1000": one.asking_cpu_s / scenario.calls * 1000,
        "peak_mb": one.peak_mb,
    }


def _table(scenario: Scenario, pairs: Sequence[tuple[Measured, Measured]]) -> str:
    ours = [_values(scenario, one) for one, _ in pairs]
    plain = [_values(scenario, one) for _, one in pairs]
    lines = [f"\n{scenario.name}. {scenario.title} (median of {len(pairs)})"]
    lines.append(f"  {'':32}{'measured':>10}{'aim':>10}{'':>9}{'plain':>10}{'ratio':>8}")
    for metric, label in LABELS.items():
        value, yardstick = (statistics.median(one[metric] for one in side) for side in (ours, plain))
        ratio = statistics.median(
            one[metric] / max(other[metric], TOO_SHORT_TO_SEE) for one, other in zip(ours, plain, strict=True)
        )
        aim = scenario.aims.get(metric)
        verdict = "" if aim is None else ("met" if _is_met(metric, value, aim) else "MISSED")
        shown = "" if aim is None else f"{aim:,.1f}"
        lines.append(f"  {label:32}{value:>10,.2f}{shown:>10}{verdict:>9}{yardstick:>10,.2f}{ratio:>8.2f}")
    middle = sorted((one for one, _ in pairs), key=lambda one: one.cpu_s)[len(pairs) // 2]
    lines.append(f"  whole command {middle.wall_s:.1f} s")
    lines.append(
        f"  CPU s by process: {_shares(middle.cpu_by_process)}; MB at the peak: {_shares(middle.peak_by_process)}"
    )
    return "\n".join(lines)


def _is_met(metric: Metric, value: float, aim: float) -> bool:
    return value >= aim if metric == "calls_per_s" else value <= aim


def _shares(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(parts.items()))


def _plain(one: Measured) -> dict[str, Any]:
    values = asdict(one)
    values.pop("prompts")
    return values


if __name__ == "__main__":
    main()
