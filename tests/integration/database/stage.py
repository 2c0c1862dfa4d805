"""A run in a database that a test drives call by call, through the same doors that workers and producers use."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, func, select, update

from orchestrator.database import Database, batches, budgets, costs, fleet, intake, ledger, runs, windows
from orchestrator.database.batches import Claim, ClaimAnswer, Claimed, Settlement
from orchestrator.database.budgets import Budget
from orchestrator.database.ledger import Usage
from orchestrator.database.runs import CallEnd
from orchestrator.database.tables import budgets as budget_rows
from orchestrator.database.tables import llm_usage, prompt_executions, workers

STEP = "score"
PROVIDER = "simulator"
_tokens = itertools.count(1)


def run_values(run_id: str) -> dict[str, Any]:
    """A row of `workflow_executions` that demands nothing of its readers."""
    return {
        "run_id": run_id,
        "workflow_id": "picks",
        "project_name": "things",
        "status": "pending",
        "started_at": datetime.now(UTC),
        "metadata": "{}",
        "workflow_version": "1",
        "pack_hash": "0" * 64,
        "identity": "1" * 64,
        "spec": "{}",
    }


def call_row(run: int, ordinal: int, step: str = STEP, repeat: int = 0) -> dict[str, Any]:
    """A row of `prompt_executions` as the orchestrator writes it."""
    return {
        "workflow_execution_id": run,
        "prompt_name": step,
        "prompt_template": f"{step}.md.j2@0",
        "llm_provider": PROVIDER,
        "llm_model": "sim-1",
        "item_ordinal": ordinal,
        "repeat": repeat,
    }


@dataclass
class Stage:
    """One run with one open window.

    Attributes:
        calls: ids of its calls, by ordinal.
        budget: id of the run's budget.
    """

    database: Database
    run: int
    window: int
    calls: list[int]
    budget: int
    queues: str = field(default="llm.simulator")

    @classmethod
    def with_calls(cls, database: Database, count: int, limit_nusd: int | None = None, name: str = "run-1") -> "Stage":
        """A running run with `count` items, each with one pending call."""
        with database.transaction() as connection:
            run = intake.create_run(connection, run_values(name), limit_nusd)
            intake.add_items(connection, run, [(n, f"item-{n}", f'{{"n":{n}}}') for n in range(count)])
            (window,) = intake.add_windows(connection, run, 0, [(0, count - 1)])
            runs.move_run(connection, run, "running", None, sources=("pending",))
            windows.open_pending(connection, window, [call_row(run, ordinal) for ordinal in range(count)])
            found = connection.execute(
                select(prompt_executions.c.id)
                .where(prompt_executions.c.workflow_execution_id == run)
                .order_by(prompt_executions.c.item_ordinal)
            )
            calls = list(found.scalars())
            budget = budgets.find_budget(connection, budgets.run_scope(run)).id
        return cls(database, run, window, calls, budget)

    def wish(self, ordinal: int, worst: int = 100, worker: str = "w1", **changes: Any) -> Claim:
        """A wish to claim the call of an item, with a token of its own."""
        values: dict[str, Any] = {
            "call": self.calls[ordinal],
            "run": self.run,
            "step": STEP,
            "provider": PROVIDER,
            "model": "sim-1",
            "worker": worker,
            "token": next(_tokens),
            "worst_nusd": worst,
            "budget_ids": (self.budget,),
            "price_source": "test",
        }
        return Claim(**values | changes)

    def claim(self, *wishes: Claim) -> list[ClaimAnswer]:
        """Claims in a transaction of their own."""
        with self.database.transaction() as connection:
            return batches.claim(connection, wishes)

    def claimed(self, ordinal: int, worst: int = 100, worker: str = "w1", **changes: Any) -> Claimed:
        """Claims the call of an item; it must be granted."""
        (answer,) = self.claim(self.wish(ordinal, worst, worker, **changes))
        assert isinstance(answer, Claimed), answer
        return answer

    def settlement(
        self, ordinal: int, grant: Claimed, usage: Usage, end: CallEnd, worker: str = "w1", **changes: Any
    ) -> Settlement:
        """The outcome of an attempt at the call of an item."""
        return Settlement(self.calls[ordinal], grant.number, grant.fence, worker, usage, end, **changes)

    def settle(self, *settlements: Settlement) -> list[bool]:
        """Settles in a transaction of its own."""
        return self.database.save_prompt_execution(settlements)

    def complete(self, ordinal: int, cost: int = 40, worker: str = "w1") -> None:
        """Asks and answers the call of an item."""
        grant = self.claimed(ordinal, worker=worker)
        usage = Usage("ok", input_tokens=10, output_tokens=5, cost_nusd=cost)
        assert self.settle(self.settlement(ordinal, grant, usage, CallEnd("completed", result='{"n":1}'), worker)) == [
            True
        ]

    def close(self, ordinal: int, end: CallEnd, held: tuple[int, str] | None = None) -> bool:
        """Moves a call without an attempt."""
        with self.database.transaction() as connection:
            return batches.close(connection, [batches.Closing(self.calls[ordinal], end, held=held)])[0]

    def move(self, to: runs.RunStatus, *sources: runs.RunStatus) -> bool:
        """Moves the run."""
        with self.database.transaction() as connection:
            return runs.move_run(connection, self.run, to, None, sources=sources)

    def row(self, ordinal: int) -> Row[Any]:
        """The call of an item as it stands."""
        with self.database.snapshot() as connection:
            return connection.execute(
                select(prompt_executions).where(prompt_executions.c.id == self.calls[ordinal])
            ).one()

    def attempts(self, ordinal: int) -> Sequence[Row[Any]]:
        """The attempts at the call of an item, in order."""
        query = select(llm_usage).where(llm_usage.c.prompt_execution_id == self.calls[ordinal])
        with self.database.snapshot() as connection:
            return connection.execute(query.order_by(llm_usage.c.number)).all()

    def money(self) -> Budget:
        """The run's budget as it stands."""
        with self.database.snapshot() as connection:
            return budgets.find_budget(connection, budgets.run_scope(self.run))

    def set_limit(self, limit_nusd: int | None) -> Budget:
        """Changes the run's limit."""
        with self.database.transaction() as connection:
            return budgets.set_limit(connection, budgets.run_scope(self.run), limit_nusd)

    def register(self, worker: str = "w1", lease_s: float = 60.0) -> None:
        """Enters a worker."""
        with self.database.transaction() as connection:
            fleet.register(connection, worker, self.queues, "1", lease_s)

    def kill(self, worker: str = "w1") -> None:
        """Lets a worker's last heartbeat lie so far back that it counts as dead."""
        with self.database.transaction() as connection:
            connection.execute(update(workers).where(workers.c.id == worker).values(heartbeat_at=1.0))

    def free_dead(self) -> fleet.Freed:
        """Frees what dead workers held."""
        with self.database.transaction() as connection:
            return fleet.free_dead(connection)

    def check_books(self) -> None:
        """What must hold at any time: no budget is overspent, and attempts, calls and budget tell the same sums."""
        with self.database.snapshot() as connection:
            booked = connection.execute(
                select(func.coalesce(func.sum(llm_usage.c.cost_nusd), 0)).where(
                    llm_usage.c.workflow_execution_id == self.run
                )
            ).scalar_one()
            held = connection.execute(
                select(func.coalesce(func.sum(llm_usage.c.reserved_nusd), 0)).where(
                    llm_usage.c.workflow_execution_id == self.run, llm_usage.c.status.in_(ledger.OPEN_ATTEMPT)
                )
            ).scalar_one()
            of_calls = connection.execute(
                select(func.coalesce(func.sum(prompt_executions.c.cost_nusd), 0)).where(
                    prompt_executions.c.workflow_execution_id == self.run
                )
            ).scalar_one()
            budget = connection.execute(select(budget_rows).where(budget_rows.c.id == self.budget)).one()
            totals = costs.totals(connection, self.run)
        assert booked == budget.spent_nusd + budget.excess_nusd
        assert booked == of_calls
        assert booked == totals["cost_nusd"]
        assert held == budget.reserved_nusd
        taken, overhang = budget.spent_nusd + budget.reserved_nusd, budget.overhang_nusd
        assert budget.limit_nusd is None or taken <= budget.limit_nusd + overhang
        assert overhang == 0 or taken == budget.limit_nusd + overhang
