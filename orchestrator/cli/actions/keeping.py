"""Actions on what was stored: audit, backup, restore, erase, retention."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from orchestrator.cli.actions.asking import confirm
from orchestrator.cli.actions.output import console, put_json, say, table
from orchestrator.cli.actions.session import load_config, prepare, reading, translated
from orchestrator.control import default_actor
from orchestrator.database import AnyRow, Database, audit, reports
from orchestrator.database.times import iso
from orchestrator.errors import ExitCode
from orchestrator.maintenance import Erased, Maintenance


def list_audit(*, home: Path | None, run: str | None, limit: int, as_json: bool) -> None:
    """Lists changes, newest first."""
    shown: list[dict[str, Any]] = []
    with reading(load_config(home)) as connection:
        if connection is not None:
            run_id = None if run is None else reports.find_run(connection, run)[1]
            shown = audit.entries(connection, run_id, limit)
    if as_json:
        put_json(shown)
        return
    names = ("at", "actor", "action", "run", "subject", "old", "new")
    console().print(
        table(("when", "who", "what", "run", "about", "before", "after"), ([r[n] for n in names] for r in shown))
    )


def verify_audit(*, home: Path | None, head: str | None, as_json: bool) -> int:
    """Checks the chain; the exit code is 1 if it is broken."""
    with reading(load_config(home)) as connection:
        found = audit.Verdict(0, audit.FIRST) if connection is None else audit.verify(connection, head)
    if as_json:
        shown = {"rows": found.rows, "head": found.head, "broken_row": found.broken, "reason": found.reason}
        put_json({"sound": found.reason is None, **shown})
    elif found.reason is None:
        say(f"{found.rows:,} rows, all as they were written; the last has the hash {found.head}")
    elif found.broken is None:
        say(f"the audit log was changed: {found.reason}")
    else:
        say(f"the audit log was changed at row {found.broken}: {found.reason}")
    return int(ExitCode.OK if found.reason is None else ExitCode.INTERNAL_ERROR)


def backup(*, home: Path | None, output: Path | None, actor: str | None, as_json: bool) -> None:
    """Copies the database into a file."""
    with _keeping(home, actor) as keeper:
        path = keeper.backup(output)
    if as_json:
        put_json({"file": str(path), "bytes": path.stat().st_size})
    else:
        say(f"{path} holds {path.stat().st_size:,} bytes")


def restore(file: Path, *, home: Path | None, actor: str | None, is_agreed: bool, as_json: bool) -> None:
    """Replaces the database by a backup."""
    if not is_agreed:
        confirm(f"Replace the database by {file}?", "this replaces the database; agree with --yes")
    with _keeping(home, actor, is_new=True) as keeper:
        kept = keeper.restore(file)
    if as_json:
        put_json({"restored": str(file), "kept": None if kept is None else str(kept)})
    else:
        say(f"restored from {file}" + ("" if kept is None else f"; what was there is in {kept}"))


def erase(
    *, home: Path | None, item: str | None, run: str | None, actor: str | None, is_agreed: bool, as_json: bool
) -> None:
    """Erases texts about items."""
    with _keeping(home, actor) as keeper:
        if not is_agreed:
            confirm("Erase these texts for good?", "this erases for good; agree with --yes")
        done = keeper.erase(run=None if run is None else keeper.find_run(run), item=item)
        _tell_erased(done, keeper.backups(), as_json=as_json)


def apply_retention(
    *,
    home: Path | None,
    age: timedelta,
    is_deleting: bool,
    is_dry: bool,
    actor: str | None,
    is_agreed: bool,
    as_json: bool,
) -> None:
    """Erases the texts of old runs, or removes these runs."""
    with _keeping(home, actor) as keeper:
        rows = keeper.old_runs(age, erased=is_deleting)
        if rows and not is_dry and not is_agreed:
            verb = "Remove" if is_deleting else "Erase the texts of"
            confirm(f"{verb} {len(rows):,} runs for good?", f"{len(rows):,} runs are concerned; agree with --yes")
        if is_dry:
            _tell_old(rows, as_json=as_json)
        elif is_deleting:
            removed = keeper.delete(rows)
            put_json({"removed": removed}) if as_json else say(f"{removed:,} runs removed")
        else:
            done = [one for row in rows for one in keeper.erase(run=(row.id, row.run_id))]
            _tell_erased(done, keeper.backups(), as_json=as_json)


def _tell_old(rows: Sequence[AnyRow], *, as_json: bool) -> None:
    shown = [{"run_id": row.run_id, "items": row.items_total, "completed_at": iso(row.completed_at)} for row in rows]
    if as_json:
        put_json(shown)
    else:
        console().print(table(("run", "items>", "ended"), ([*row.values()] for row in shown)))


def _tell_erased(done: list[Erased], backups: int, *, as_json: bool) -> None:
    if as_json:
        runs = [{"run_id": one.run_id, "items": one.items, "files": one.files} for one in done]
        put_json({"runs": runs, "backups": backups})
        return
    for one in done:
        say(f"run {one.run_id}: {one.items:,} items erased, {one.files:,} result files written anew")
    if done and backups:
        say(f"warning: {backups:,} backups still hold what was erased")


@contextmanager
def _keeping(home: Path | None, actor: str | None, *, is_new: bool = False) -> Generator[Maintenance]:
    config = load_config(home)
    database = Database(config.settings.database_url)
    try:
        if not is_new:
            prepare(database, config.settings)
        with translated(database.address):
            yield Maintenance(config, database, actor or default_actor())
    finally:
        database.close()
