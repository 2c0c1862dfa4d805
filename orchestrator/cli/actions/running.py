"""Starts runs and follows them to their end: on one machine with an engine of its own, else through a cluster.

Whatever ends this process, the run stays as it is: everything is in the database, and the same command goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.cli.actions.asking import confirm_cost, confirm_retry, print_estimate, request_of
from orchestrator.cli.actions.detaching import run_detached
from orchestrator.cli.actions.output import put_event, say
from orchestrator.cli.actions.progress import Display, open_display
from orchestrator.cli.actions.session import has_database, load_config, prepare, translated
from orchestrator.cli.actions.summary import print_summary
from orchestrator.cli.actions.watching import AT_WORK
from orchestrator.cli.options import Asked, Follow
from orchestrator.config import ConfigManager
from orchestrator.database import reports
from orchestrator.errors import ExitCode, InvalidInput, Problem
from orchestrator.health import require_broker
from orchestrator.local import LocalEngine
from orchestrator.manager import Plan, StartedRun, WorkflowManager
from orchestrator.money import usd, usd_or_none

LOOK_S = 0.25
"""How often a run is looked at: often enough that a small one does not wait for us."""
LARGE_INPUT_BYTES = 16_000_000
"""From this size on, checking the input takes long enough to start the engine meanwhile."""
LOCAL_LOG = "logs/local.log"


class Terminated(BaseException):
    """SIGTERM came; like `KeyboardInterrupt`, nobody should catch it by accident."""


@dataclass(slots=True)
class _Session:
    """A manager that can execute, and the engine behind it; None on a cluster."""

    config: ConfigManager
    manager: WorkflowManager
    engine: LocalEngine | None = None

    def start_engine(self, held: ExitStack) -> None:
        """Makes sure that there is a broker: our own on one machine. Safe to repeat."""
        if self.engine is not None:
            return
        if self.config.settings.is_local:
            self.engine = held.enter_context(LocalEngine(self.config, self.config.settings.home / LOCAL_LOG))
            self.manager.use_broker(self.engine.redis_url)
        else:
            require_broker(self.config.settings)


def run(
    asked: Asked,
    follow: Follow,
    *,
    home: Path | None,
    is_agreed: bool,
    is_new: bool,
    resume: str | None,
    arguments: list[str],
) -> int:
    """Plans a run, asks before it costs much, starts it, and follows it; returns the exit code."""
    config = load_config(home)
    if follow.detach and config.settings.is_local:
        return run_detached(config, arguments)
    with _opened(config) as (session, held):
        with translated(session.manager.database.address):
            _prepare_existing(session)
            _start_early(session, held, asked)
            plan = session.manager.plan(request_of(asked))
            prepare(session.manager.database, config.settings)
            continued = _continued(session.manager, plan, resume, is_new=is_new)
        print_estimate(plan, continued)
        confirm_cost(plan, is_agreed=is_agreed)

        def start() -> StartedRun:
            session.start_engine(held)
            return session.manager.execute_workflow(plan, resume=continued)

        def launched(started: StartedRun) -> None:
            put_event(
                "launch",
                run_id=started.run_id,
                workflow=plan.workflow.name,
                resumed=started.resumed,
                items=plan.estimate.items,
                calls=plan.estimate.calls,
                likely_cost_usd=usd(plan.estimate.cost_nusd),
                worst_cost_usd=usd(plan.estimate.worst_nusd),
                budget_usd=usd_or_none(plan.budget_nusd),
                simulated=plan.simulated,
            )

        return _execute(session, start, launched, follow)


def resume(
    name: str,
    budget_usd: Decimal | None,
    follow: Follow,
    *,
    home: Path | None,
    actor: str | None,
    arguments: list[str],
) -> int:
    """Takes a run up again and follows it; returns the exit code."""
    config = load_config(home)
    if follow.detach and config.settings.is_local:
        return run_detached(config, arguments)
    with _opened(config, actor) as (session, held):
        prepare(session.manager.database, config.settings)
        session.manager.find_run(name)

        def start() -> StartedRun:
            session.start_engine(held)
            return session.manager.resume(name, budget_usd)

        def launched(started: StartedRun) -> None:
            put_event("launch", run_id=started.run_id, resumed=True)

        return _execute(session, start, launched, follow)


def retry(
    name: str,
    follow: Follow,
    *,
    home: Path | None,
    actor: str | None,
    failed: bool,
    unknown: bool,
    is_agreed: bool,
    arguments: list[str],
) -> int:
    """Asks calls that failed again and follows the run; returns the exit code."""
    config = load_config(home)
    with _opened(config, actor) as (session, held):
        prepare(session.manager.database, config.settings)
        run, run_id = session.manager.find_run(name)
        confirm_retry(session.manager.track_progress(run), is_agreed=is_agreed)
        if follow.detach and config.settings.is_local:
            return run_detached(config, [*arguments, "--yes"])

        def start() -> StartedRun:
            session.start_engine(held)
            retried = session.manager.retry(run_id, failed=failed, unknown=unknown)
            say(f"{retried.failed:,} calls are asked again, {retried.following:,} are decided anew behind them")
            return StartedRun(run, run_id, resumed=True)

        def launched(started: StartedRun) -> None:
            put_event("launch", run_id=started.run_id, resumed=True)

        return _execute(session, start, launched, follow)


@contextmanager
def _opened(config: ConfigManager, actor: str | None = None) -> Generator[tuple[_Session, ExitStack]]:
    # The engine is entered into the stack last, so it is stopped before the manager closes the database.
    with _sigterm_raises(), WorkflowManager(config, actor=actor) as manager, ExitStack() as held:
        yield _Session(config, manager), held


def _prepare_existing(session: _Session) -> None:
    """On a cluster, and where there is a database already, planning needs it at this release."""
    settings = session.config.settings
    if not settings.is_local or has_database(settings):
        prepare(session.manager.database, settings)


def _start_early(session: _Session, held: ExitStack, asked: Asked) -> None:
    """Starts the engine while a large input is checked, which takes about as long, unless it would find work to do."""
    settings, path = session.config.settings, Path(asked.input or "-")
    if not settings.is_local or not path.is_file() or path.stat().st_size < LARGE_INPUT_BYTES:
        return
    database = session.manager.database
    prepare(database, settings)
    with database.snapshot() as connection:
        is_idle = not reports.list_runs(connection, 1, "running")
    if is_idle:
        session.start_engine(held)


def _continued(manager: WorkflowManager, plan: Plan, wanted: str | None, *, is_new: bool) -> str | None:
    """The run that is continued; None for a new one."""
    if wanted is None:
        return None if is_new else plan.unfinished
    run, run_id = manager.find_run(wanted)
    with manager.database.snapshot() as connection:
        identity = reports.identity(connection, run)
    if identity != plan.identity:
        message = f"run {run_id} was begun with another pack, other items, variables or models"
        raise InvalidInput(Problem("run.other-identity", message, "--resume", "leave --resume out to begin a new run"))
    return run_id


def _execute(
    session: _Session, start: Callable[[], StartedRun], launched: Callable[[StartedRun], None], follow: Follow
) -> int:
    started: StartedRun | None = None
    try:
        with translated(session.manager.database.address):
            with open_display(follow.progress) as display:
                started = start()
                if follow.as_json:
                    launched(started)
                else:
                    display.note(f"run {started.run_id} {'goes on' if started.resumed else 'has begun'}")
                if follow.detach:
                    return _detached(started, follow)
                status = _follow(session, started.run, display)
            if session.engine is not None:
                session.engine.stop(session.config.settings.worker.drain_s)
            return _ended(session, started, status, follow)
    except (KeyboardInterrupt, Terminated) as stopped:
        _leave(session, started)
        return int(ExitCode.TERMINATED if isinstance(stopped, Terminated) else ExitCode.INTERRUPTED)


def _follow(session: _Session, run: int, display: Display) -> dict[str, Any]:
    pause = threading.Event()
    is_told = False
    while True:
        status = session.manager.track_progress(run)
        if status["status"] not in AT_WORK:
            return status
        display.show(status)
        if session.engine is not None:
            session.engine.poll()
        elif status["bound_by"] == "workers" and not is_told:
            is_told = True
            display.note("no worker is there; start one with: llm-orchestrator worker")
        pause.wait(LOOK_S)


def _ended(session: _Session, started: StartedRun, status: dict[str, Any], follow: Follow) -> int:
    if follow.as_json:
        put_event("done", **status)
    else:
        print_summary(session.manager.database, session.config.settings, started.run, status)
    return int(exit_code(status, follow.max_failures))


def exit_code(status: dict[str, Any], max_failures: str) -> ExitCode:
    """What the end of a run means to the shell."""
    reason = str(status.get("reason"))
    match status["status"]:
        case "completed":
            items = status["items"]
            allowed = float(max_failures) * items["total"] if "." in max_failures else float(max_failures)
            return ExitCode.ITEMS_FAILED if items["failed"] > allowed else ExitCode.OK
        case "failed":
            return ExitCode.ITEMS_FAILED
        case "paused" if reason == "internal_error":
            return ExitCode.INTERNAL_ERROR
        case "paused" if reason.startswith("provider_"):
            # A key, a quota, a model name, or nobody there: nothing that a larger budget would mend.
            return ExitCode.NOT_READY
        case _:
            return ExitCode.STOPPED


def _detached(started: StartedRun, follow: Follow) -> int:
    if not follow.as_json:
        say(f"follow it with: llm-orchestrator status {started.run_id} --watch")
    return int(ExitCode.OK)


def _leave(session: _Session, started: StartedRun | None) -> None:
    """Stops in good order, and at once when told a second time."""
    if started is None:
        say("stopped; repeat the same command to go on")
    elif session.engine is None:
        say(f"run {started.run_id} goes on without us: llm-orchestrator status {started.run_id} --watch")
    else:
        say(f"stopping; go on with: llm-orchestrator resume {started.run_id}")
    if session.engine is None:
        return
    try:
        session.engine.stop(session.config.settings.worker.drain_s)
    except (KeyboardInterrupt, Terminated):
        session.engine.stop_now()


@contextmanager
def _sigterm_raises() -> Generator[None]:
    def terminate(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
