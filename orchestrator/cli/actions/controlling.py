"""Actions that change runs, budgets and limits while runs go on. None of them needs a broker."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from orchestrator.cli.actions.output import console, put_json, say, table
from orchestrator.cli.actions.session import has_database, load_config, prepare, translated
from orchestrator.config import ConfigManager
from orchestrator.database.budgets import Budget
from orchestrator.database.limits import Override
from orchestrator.manager import WorkflowManager
from orchestrator.money import usd, usd_or_none
from orchestrator.settings import LLMProviderConfig


def pause(name: str, *, home: Path | None, actor: str | None, as_json: bool) -> None:
    """Pauses a run. Safe to repeat."""
    _move(name, home, actor, as_json, WorkflowManager.pause, "paused")


def cancel(name: str, *, home: Path | None, actor: str | None, as_json: bool) -> None:
    """Ends a run for good. Safe to repeat."""
    _move(name, home, actor, as_json, WorkflowManager.cancel, "cancelled")


def set_priority(name: str, number: int, *, home: Path | None, actor: str | None, as_json: bool) -> None:
    """Gives a run another priority. Safe to repeat."""
    with _managing(load_config(home), actor) as manager:
        _, run_id = manager.find_run(name)
        changed = manager.set_priority(run_id, number)
    if as_json:
        put_json({"run_id": run_id, "changed": changed, "priority": number})
    else:
        say(f"run {run_id} has the priority {number}" + ("" if changed else " already"))


def show_budgets(name: str | None, *, home: Path | None, as_json: bool) -> None:
    """Shows budgets."""
    config = load_config(home)
    found: list[Budget] = []
    if has_database(config.settings) or name is not None:
        with _managing(config, None) as manager:
            found = manager.budgets(name)
    shown = [_budget(one) for one in found]
    if as_json:
        put_json(shown)
        return
    rows = [[one["scope"], *(one[key] for key in _MONEY)] for one in shown]
    console().print(table(("budget", "limit $>", "spent $>", "in flight $>", "free $>"), rows))


_MONEY = ("limit_usd", "spent_usd", "reserved_usd", "free_usd")


def _budget(one: Budget) -> dict[str, str | None]:
    return {
        "scope": one.scope,
        "limit_usd": usd_or_none(one.limit_nusd),
        "spent_usd": usd(one.used_nusd()),
        "reserved_usd": usd(one.reserved_nusd),
        "free_usd": usd_or_none(one.free_nusd()),
    }


def set_budget(name: str, limit: Decimal | None, *, home: Path | None, actor: str | None, as_json: bool) -> None:
    """Changes a limit. Safe to repeat."""
    with _managing(load_config(home), actor) as manager:
        after = _budget(manager.set_budget(name, limit))
    if as_json:
        put_json(after)
    else:
        told = "no limit" if after["limit_usd"] is None else f"a limit of ${after['limit_usd']}"
        say(f"{after['scope']} has {told}, of which ${after['spent_usd']} are spent")


def show_limits(*, home: Path | None, as_json: bool) -> None:
    """Shows limits of providers."""
    config = load_config(home)
    changed: Mapping[str, Override] = {}
    if has_database(config.settings):
        with _managing(config, None) as manager:
            changed = manager.limits()
    shown = [_limits(one, changed.get(name, Override())) for name, one in config.settings.providers.items()]
    if as_json:
        put_json(shown)
        return
    rows = [
        [
            one["provider"] + (" (paused)" if one["paused"] else ""),
            *(one["in_force"][key] for key in ("rpm", "tpm", "concurrency")),
            ", ".join(f"{key} {number}" for key, number in one["changed"].items()),
        ]
        for one in shown
    ]
    console().print(table(("provider", "rpm>", "tpm>", "in flight>", "changed by hand"), rows))


def _limits(one: LLMProviderConfig, changed: Override) -> dict[str, Any]:
    configured = {"rpm": one.rate_limit_rpm, "tpm": one.rate_limit_tpm, "concurrency": one.concurrency}
    in_force = configured | changed.as_dict()
    return {
        "provider": one.name,
        "configured": configured,
        "changed": changed.as_dict(),
        "in_force": in_force,
        "paused": changed.is_paused() if changed.as_dict() else 0 in configured.values(),
    }


def set_limits(
    provider: str,
    wanted: Mapping[str, int | None],
    *,
    home: Path | None,
    is_cleared: bool,
    actor: str | None,
    as_json: bool,
) -> None:
    """Changes limits of a provider. Safe to repeat."""
    config = load_config(home)
    with _managing(config, actor) as manager:
        after = manager.clear_limits(provider) if is_cleared else manager.set_limits(provider, **wanted)
    shown = _limits(config.settings.providers[provider], after)
    if as_json:
        put_json(shown)
    else:
        told = ", ".join(
            f"{key} {'no limit' if number is None else number}" for key, number in shown["in_force"].items()
        )
        say(f"{provider}{' is paused' if shown['paused'] else ''}: {told}")


def _move(
    name: str,
    home: Path | None,
    actor: str | None,
    as_json: bool,
    verb: Callable[[WorkflowManager, str], bool],
    state: str,
) -> None:
    with _managing(load_config(home), actor) as manager:
        run, run_id = manager.find_run(name)
        changed = verb(manager, run_id)
        status = manager.track_progress(run)
    if as_json:
        put_json({"run_id": run_id, "changed": changed, "status": status["status"], "reason": status["reason"]})
    elif changed:
        say(f"run {run_id} is {state}")
    else:
        say(f"run {run_id} was {status['status']} already")


@contextmanager
def _managing(config: ConfigManager, actor: str | None) -> Generator[WorkflowManager]:
    with WorkflowManager(config, actor=actor) as manager, translated(manager.database.address):
        prepare(manager.database, config.settings)
        yield manager
