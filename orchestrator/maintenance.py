"""What an operator does to the data of an installation: back it up, restore it, erase it, let it go after a time.

Each act that changes or copies data leaves a row in the audit log, with hashed keys where an item is meant.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from orchestrator.config import ConfigManager
from orchestrator.database import AnyRow, Connection, Database, audit, copying, erasing, reports, revisions, speed
from orchestrator.database.audit import Change
from orchestrator.database.runs import OPEN_RUN
from orchestrator.errors import EnvironmentNotReady, InvalidInput, Problem, WrongState
from orchestrator.files import make_private, write_atomically
from orchestrator.reports.document import document_pieces

BACKUPS = "backups"
_HEAD_BYTES = 4096
"""How far into a result file the id of its run stands at most."""


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased in one run: how many items, and how many result files were written anew."""

    run_id: str
    items: int
    files: int


class Maintenance:
    """Looks after the data of one installation.

    Args:
        config: the configuration.
        database: its database; the caller closes it.
        actor: who does it, for the audit log.
    """

    def __init__(self, config: ConfigManager, database: Database, actor: str) -> None:
        self._config = config
        self._home = config.settings.home
        self._database = database
        self._actor = actor

    def backup(self, output: Path | None = None) -> Path:
        """Copies the database into a file that does not exist yet, also while runs go on; returns its path.

        Args:
            output: None is a file below `backups/` in the home directory, named by the time.

        Raises:
            InvalidInput: the file exists.
            EnvironmentNotReady: it cannot be written; or, for Postgres, `pg_dump` is not here or fails.
        """
        is_sqlite = self._database.engine.dialect.name == "sqlite"
        suffix = "db" if is_sqlite else "dump"
        target = (output or self._home / BACKUPS / f"orchestrator-{_stamp()}.{suffix}").absolute()
        if target.exists():
            raise InvalidInput(Problem("backup.exists", "the file exists already", str(target), "name another one"))
        self._note("data.backup", subject=str(target))
        make_private(target.parent)
        # mkdtemp makes a directory that nobody else may enter; a rename then puts the whole copy in place.
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=target.parent) as scratch:
            copy = Path(scratch) / "copy"
            if is_sqlite:
                copying.copy_out(self._database.engine, copy)
            else:
                self._run_postgres("pg_dump", "--format=custom", f"--file={copy}")
            copy.chmod(0o600)
            copy.rename(target)
        return target

    def restore(self, file: Path) -> Path | None:
        """Replaces the database by a backup.

        Returns:
            Where the present content was put; None if there was none.

        Raises:
            WrongState: workers are alive.
            InvalidInput: the file is no backup, or of a newer release.
            EnvironmentNotReady: for Postgres, `pg_restore` is not here or fails.
        """
        engine = self._database.engine
        if engine.dialect.name == "sqlite":
            self._require_known(file)
        elif not file.is_file():
            raise InvalidInput(Problem("backup.missing", "no such file", str(file)))
        kept = None
        if self._database.is_prepared():
            with self._database.snapshot() as connection:
                alive = speed.live_workers(connection)
            if alive:
                names = ", ".join(worker["id"] for worker in alive)
                raise WrongState(
                    f"workers are alive: {names}; stop them first, or wait until their leases have run out"
                )
            kept = self.backup(self._home / BACKUPS / f"before-restore-{_stamp()}")
        if engine.dialect.name == "sqlite":
            copying.copy_in(engine, file)
        else:
            self._run_postgres("pg_restore", "--clean", "--if-exists", "--single-transaction", "--no-owner", str(file))
        self._database.migrate()
        self._note("data.restore", subject=str(file.absolute()))
        return kept

    def erase(self, *, run: tuple[int, str] | None = None, item: str | None = None) -> list[Erased]:
        """Erases texts about items: of a whole run, of one item in a run, or of one item in all runs.

        Safe to repeat.

        Args:
            run: number and id; None for all that hold the item.
            item: its key; None for all items of the run.

        Raises:
            WrongState: a run that holds them has not ended.
            InvalidInput: no run holds such an item.
        """
        with self._database.transaction() as connection:
            erasing.prepare(connection)
            rows = self._concerned(connection, run, item)
            counts = [self._erase(connection, row, item) for row in rows]
        written = [(row, count, self._write_files(row)) for row, count in zip(rows, counts, strict=True)]
        erasing.scrub(self._database.engine)
        return [Erased(row.run_id, count, files) for row, count, files in written]

    def find_run(self, name: str) -> tuple[int, str]:
        """Number and id of a run.

        Raises:
            RunNotFound: none fits, or several do.
        """
        with self._database.snapshot() as connection:
            return reports.find_run(connection, name)

    def old_runs(self, age: timedelta, *, erased: bool) -> list[AnyRow]:
        """Runs that ended so long ago: columns id, run_id, status, items_total, completed_at.

        Args:
            age: how long ago at least.
            erased: also those whose texts are gone already.
        """
        with self._database.snapshot() as connection:
            return erasing.ended_before(connection, age.total_seconds(), erased=erased)

    def delete(self, rows: Sequence[AnyRow]) -> int:
        """Removes ended runs, their costs and their result files; returns how many."""
        for row in rows:
            with self._database.transaction() as connection:
                erasing.prepare(connection)
                erasing.delete_run(connection, row.id)
                change = Change(self._actor, "run.delete", row.run_id, old={"status": row.status})
                audit.append(connection, change)
            for path in self._files_of(row.run_id):
                path.unlink(missing_ok=True)
        if rows:
            erasing.scrub(self._database.engine)
        return len(rows)

    def backups(self) -> int:
        """How many backups lie below the home directory; what was erased since is still in them."""
        folder = self._home / BACKUPS
        return sum(1 for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0

    def _concerned(self, connection: Connection, run: tuple[int, str] | None, item: str | None) -> list[AnyRow]:
        rows = erasing.runs_with(connection, item) if item is not None else erasing.runs_by_number(connection, run)
        rows = [row for row in rows if run is None or row.id == run[0]]
        if not rows:
            place = "all runs" if run is None else run[1]
            raise InvalidInput(Problem("item.unknown", "no run holds an item with that key", place))
        working = [row.run_id for row in rows if row.status in OPEN_RUN]
        if working:
            raise WrongState(f"not ended yet: {', '.join(working)}; wait, or cancel them first")
        return rows

    def _erase(self, connection: Connection, row: AnyRow, item: str | None) -> int:
        if item is None:
            count, subject = erasing.erase_run(connection, row.id), None
        else:
            count, subject = int(erasing.erase_item(connection, row.id, item)), erasing.hashed_key(row.run_id, item)
        audit.append(connection, Change(self._actor, "data.erase", row.run_id, subject, new={"items": count}))
        return count

    def _write_files(self, row: AnyRow) -> int:
        """Writes the result files of a run anew, now without the texts."""
        paths = list(self._files_of(row.run_id))
        for path in paths:
            with self._database.snapshot() as connection:
                pieces = document_pieces(connection, row.id, status=reports.status(connection, row.id))
                write_atomically(path, (piece.encode() for piece in pieces))
        return len(paths)

    def _files_of(self, run_id: str) -> Iterator[Path]:
        told = f'"run_id": {json.dumps(run_id)}'.encode()
        for path in sorted((self._home / "results").rglob("*.json")):
            with path.open("rb") as file:
                if told in file.read(_HEAD_BYTES):
                    yield path

    def _require_known(self, file: Path) -> None:
        if not file.is_file():
            raise InvalidInput(Problem("backup.missing", "no such file", str(file)))
        try:
            revision = copying.revision_of(file)
        except copying.NotACopy as error:
            raise InvalidInput(Problem("backup.unusable", str(error), str(file))) from error
        if not revisions.is_known(revision):
            message = f"it is of revision {revision}, which this release does not know"
            raise InvalidInput(Problem("backup.newer", message, str(file), "install a newer release"))

    def _run_postgres(self, program: str, *arguments: str) -> None:
        address, password = copying.postgres_address(self._database.engine)
        command = [program, f"--dbname={address}", *arguments]
        if shutil.which(program) is None:
            hint = f"install the client programs of Postgres, or run elsewhere: {' '.join(command)}"
            raise EnvironmentNotReady(Problem("postgres.no-client", f"{program} is not installed", program, hint))
        # The password goes by the environment: a command line can be read by everybody on the machine.
        secret = {} if password is None else {"PGPASSWORD": password}
        done = subprocess.run(  # noqa: S603 - a fixed program, and no shell
            command, env=self._config.child_environment(secret), capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines() or ["no reason was given"]
            raise EnvironmentNotReady(Problem("postgres.client-failed", reason[-1], program))

    def _note(self, action: str, subject: str) -> None:
        if self._database.is_prepared():
            with self._database.transaction() as connection:
                audit.append(connection, Change(self._actor, action, subject=subject))


def _stamp() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{os.getpid()}"
