"""What is pinned when a run begins, so that every worker asks the same questions until it ends.

A `RunSpec` holds the pack's files, the variables, the routes with their prices, and the sizes of the pieces. It travels
in the run's row and nowhere else: a worker on another machine needs no copy of the pack, and a pack that is edited
during a run changes nothing.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

from orchestrator import planning
from orchestrator.declaration import read_workflow
from orchestrator.workflow import WORKFLOW_FILE, Workflow
from providers.pricing import Price

SPEC_VERSION = 1


@dataclass(frozen=True, slots=True)
class Route:
    """One way to ask: provider, model and parameters, with the price that was known when the run began.

    Attributes:
        reason: why it was chosen, for `explain`.
        price: None when nobody knows it and the operator allowed that; such calls are booked at zero.
    """

    provider: str
    model: str
    max_output_tokens: int
    temperature: float | None
    seed: int | None
    price: Price | None
    reason: str


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything a worker needs to know of a run.

    Attributes:
        pack_files: text by file name, `workflow.toml` included.
        routes: by step name, the primary route first; only for steps that ask.
        cache_ttl_s: seconds; 0 turns the cache off.
        min_output_tokens: the cap of an answer never shrinks below it, however little is left of a budget.
        retry_unknown: calls whose last attempt has an unknown outcome are sent again, unless their step says otherwise.
        steps: names of the steps that are done; None for all that the declaration has.
    """

    workflow: Workflow
    pack_files: Mapping[str, str]
    variables: Mapping[str, Any]
    routes: Mapping[str, tuple[Route, ...]]
    window_size: int
    shard_size: int
    lanes: int
    cache_ttl_s: int
    min_output_tokens: int = 64
    retry_unknown: bool = True
    steps: frozenset[str] | None = None

    def to_json(self) -> str:
        """JSON text that `from_json` reads back.

        `steps` repeats, in the order of work, what reports want to know without reading the pack.
        """
        return json.dumps(
            {
                "spec_version": SPEC_VERSION,
                "steps": [
                    _step_to_json(self.workflow, segment, name)
                    for segment in planning.segments(self.workflow)
                    for name in (*segment.item_steps(), *segment.reduces)
                ],
                "pack_files": dict(self.pack_files),
                "variables": dict(self.variables),
                "routes": {step: [_route_to_json(route) for route in routes] for step, routes in self.routes.items()},
                "window_size": self.window_size,
                "shard_size": self.shard_size,
                "lanes": self.lanes,
                "cache_ttl_s": self.cache_ttl_s,
                "min_output_tokens": self.min_output_tokens,
                "retry_unknown": self.retry_unknown,
                "only": None if self.steps is None else sorted(self.steps),
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> "RunSpec":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it was written by a release with another version of this text.
        """
        data = json.loads(text)
        if data["spec_version"] != SPEC_VERSION:
            raise ValueError(f"the run was begun by another release (spec version {data['spec_version']})")
        workflow, _ = read_workflow(data["pack_files"][WORKFLOW_FILE], WORKFLOW_FILE)
        whole = cls(
            workflow=workflow,
            pack_files=data["pack_files"],
            variables=data["variables"],
            routes={
                step: tuple(_route_from_json(route) for route in routes) for step, routes in data["routes"].items()
            },
            window_size=data["window_size"],
            shard_size=data["shard_size"],
            lanes=data["lanes"],
            cache_ttl_s=data["cache_ttl_s"],
            min_output_tokens=data["min_output_tokens"],
            retry_unknown=data["retry_unknown"],
        )
        return whole if data["only"] is None else whole.only(frozenset(data["only"]))

    def only(self, steps: Set[str]) -> "RunSpec":
        """The same run with some of its steps; the caller names every step that they need."""
        return replace(
            self,
            workflow=self.workflow.only(steps),
            routes={name: routes for name, routes in self.routes.items() if name in steps},
            steps=frozenset(steps),
        )

    def template_label(self, file: str) -> str:
        """A template's name with its version: the first 12 hex digits of the hash of its text."""
        return f"{file}@{sha256(self.pack_files[file].encode()).hexdigest()[:12]}"


def _step_to_json(workflow: Workflow, segment: planning.Segment, name: str) -> dict[str, Any]:
    step = workflow.step(name)
    return {
        "name": name,
        "kind": step.kind,
        "segment": segment.number,
        "calls": step.repeats if step.asks() else 0,
        "top": step.reduce.top if step.reduce else None,
        "scored_step": step.reduce.step if step.reduce else None,
    }


def _route_to_json(route: Route) -> dict[str, Any]:
    return asdict(route) | {"price": None if route.price is None else route.price.to_json()}


def _route_from_json(data: dict[str, Any]) -> Route:
    price = data["price"]
    values: dict[str, Any] = {**data, "price": None if price is None else Price.from_json(price)}
    return Route(**values)
