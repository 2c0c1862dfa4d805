"""What people changed while runs go on: read again every two seconds, so that it is in force everywhere within five.

Runs that were paused or cancelled, priorities of runs, and limits of providers are rows; nobody sends a message about
them, and a worker that missed nothing but time is up to date with its next look.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

import structlog

from orchestrator.database import Database, limits, runs
from orchestrator.database.limits import Override
from workers.asking import Gate
from workers.prepared import PreparedRun

log = structlog.get_logger(__name__)

LOOK_S = 2.0
"""Pause between two looks, unless the heartbeat is faster."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What the database says now.

    Attributes:
        stopped: of the runs asked about, those that must not be asked for any more.
        priorities: of the runs asked about.
        overrides: changed limits, by provider.
    """

    stopped: frozenset[int]
    priorities: Mapping[int, int]
    overrides: Mapping[str, Override]


async def read_orders(database: Database, at_work: set[int], known: set[int]) -> Orders:
    """Reads what concerns this process.

    Args:
        database: where to.
        at_work: runs of which it has shards.
        known: runs that it has compiled.
    """

    def read() -> Orders:
        with database.snapshot() as connection:
            return Orders(
                stopped=frozenset(runs.runs_not_running(connection, at_work)),
                priorities=runs.priorities(connection, known),
                overrides=limits.overrides(connection),
            )

    return await asyncio.to_thread(read)


class ChangingLimits:
    """Keeps the gates of a process at the limits in force.

    Args:
        gates: by provider; replaced in place when their limits change, so that whoever holds an old one can tell.
    """

    def __init__(self, gates: dict[str, Gate]) -> None:
        self._gates = gates
        self._configured = dict(gates)
        self._in_force: dict[str, Override] = {}

    def apply(self, overrides: Mapping[str, Override]) -> bool:
        """Puts limits in force; True if any of this process's providers has others than before."""
        mine = {name: override for name, override in overrides.items() if name in self._gates}
        if mine == self._in_force:
            return False
        for name in mine.keys() | self._in_force.keys():
            wanted = mine.get(name, Override())
            if wanted != self._in_force.get(name, Override()):
                self._gates[name] = _changed(self._configured[name], wanted)
                log.warning("limits.changed", provider=name, paused=self._gates[name].paused, **wanted.as_dict())
        self._in_force = mine
        return True


def _changed(gate: Gate, wanted: Override) -> Gate:
    chosen = wanted.as_dict()
    for name, value in chosen.items():
        # Where the configuration set this limit: for each model, or for all of an account together.
        place = "shared" if getattr(gate.shared, name) is not None else "limits"
        values: dict[str, int | None] = {name: value or None}
        if name in ("rpm", "tpm"):
            # A burst was chosen for another rate.
            values[f"{name}_burst"] = None
        gate = replace(gate, **{place: replace(getattr(gate, place), **values)})
    # Whoever sets limits of a provider that the configuration pauses wants it to go on.
    return replace(gate, paused=wanted.is_paused() or (gate.paused and not chosen))


def set_priorities(prepared: Mapping[int, PreparedRun], priorities: Mapping[int, int]) -> list[int]:
    """Gives compiled runs the priorities of now; returns those that had others."""
    changed = [run for run, priority in priorities.items() if prepared[run].priority != priority]
    for run in changed:
        prepared[run].priority = priorities[run]
    return changed
