"""FileManager: reads workflow packs, and keeps results, backups and caches below the home directory.

Files are a second, readable copy of what the database knows. They are written to a temporary name and renamed, so a
reader never meets half a file, and are for the operator only: directories 0700, files 0600. The database itself is
backed up by the database package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import BinaryIO, cast

from orchestrator.errors import EnvironmentNotReady, InvalidInput, Problem, WorkflowError, did_you_mean
from orchestrator.plain_text import decode_text, read_bytes

WORKFLOW_FILE = "workflow.toml"
MAX_PACK_FILES = 500
MAX_PACK_BYTES = 5_000_000

_TEXT_SUFFIXES = frozenset({".j2", ".md", ".txt", ".toml", ".json"})
_SAMPLE_NAMES = tuple(f"items.{suffix}" for suffix in ("jsonl", "csv", "tsv", "json", "parquet"))
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class PackFiles:
    """A pack as it lay on disk.

    Attributes:
        name: The folder's name.
        root: The folder.
        workflow_text: Content of `workflow.toml`.
        files: Every other text file by its path inside the pack, with `/`; templates, schemas, but no README.
        sha256: Digest of `workflow_text` and `files`, in hex: two packs with the same digest behave the same.
        sample_items: The pack's own items, or None when it has none.
    """

    name: str
    root: Path
    workflow_text: str
    files: Mapping[str, str]
    sha256: str
    sample_items: Path | None


class FileManager:
    """Everything that lives below one home directory, and the packs that ship with the product.

    Args:
        home: Created when something is written first, not before.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def list_packs(self) -> tuple[str, ...]:
        """Names of the packs that ship with the product, sorted."""
        return tuple(sorted(_shipped()))

    def load_prompts(self, pack: str | Path) -> PackFiles:
        """Read a pack: a shipped one by its name (`-` and `_` are the same), any other by its folder.

        Raises:
            WorkflowError: No such pack, or files in it that cannot be used; with all problems.
        """
        root = _root_of(pack)
        problems: list[Problem] = []
        texts = dict(_texts(root, problems))
        workflow = root / WORKFLOW_FILE
        if not workflow.exists() and not workflow.is_symlink():
            problems.append(Problem("pack.no-workflow", f"the pack has no {WORKFLOW_FILE}", str(root)))
        if problems:
            raise WorkflowError(problems)
        samples = (root / name for name in _SAMPLE_NAMES)
        return PackFiles(
            name=root.name,
            root=root,
            workflow_text=texts[WORKFLOW_FILE],
            files={name: text for name, text in sorted(texts.items()) if name != WORKFLOW_FILE},
            sha256=_digest(texts),
            sample_items=next((path for path in samples if path.is_file()), None),
        )

    def save_results(
        self,
        run_date: date,
        workflow: str,
        document: Mapping[str, object] | Iterable[str],
        run_id: str | None = None,
    ) -> Path:
        """Write a run's results and return the path of the run's own file. Safe to repeat.

        Three files get the same content: `results/<date>/<workflow>-results-<run>.json`, which no other run touches,
        `results/<date>/<workflow>-results.json`, which is the day's last run, and the one in `results/latest/`.

        Args:
            run_date: The day under which the results are filed.
            workflow: Name of the workflow; underscores become hyphens.
            document: The results; or, for more than memory holds, their JSON text in pieces.
            run_id: By default the document's `run_id`.

        Raises:
            EnvironmentNotReady: The files cannot be written; what was there before is unharmed.
        """
        name = f"{_slug(workflow)}-results"
        day = self.home / "results" / run_date.isoformat()
        whole = cast("Mapping[str, object]", document) if isinstance(document, Mapping) else None
        run = run_id or str((whole or {}).get("run_id", ""))
        own = day / (f"{name}-{_slug(run)}.json" if run else f"{name}.json")
        pieces = cast("Iterable[str]", document) if whole is None else [_json(whole)]
        write_atomically(own, (piece.encode() for piece in pieces))
        for copy in {day / f"{name}.json", self.home / "results" / "latest" / f"{name}.json"} - {own}:
            with own.open("rb") as file:
                write_atomically(copy, iter(lambda source=file: source.read(1 << 20), b""))
        return own

    def backup_data(self, now: datetime | None = None) -> Path | None:
        """Pack the results into `backups/results-<UTC time>.tar.gz`; None when there are no results yet.

        Raises:
            EnvironmentNotReady: The archive cannot be written.
        """
        results = self.home / "results"
        if not results.is_dir():
            return None
        stamp = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
        target = self.home / "backups" / f"results-{stamp}.tar.gz"

        def pack(file: BinaryIO) -> None:
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                archive.add(results, arcname="results")

        _write(target, pack)
        return target

    def cleanup_cache(self, older_than: timedelta, now: datetime | None = None) -> int:
        """Delete cache files that were last changed before `older_than`, and return how many. Safe to repeat."""
        cache = self.home / "cache"
        limit_s = ((now or datetime.now(UTC)) - older_than).timestamp()
        stale = [path for path in _files_below(cache) if path.lstat().st_mtime < limit_s]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)


def write_atomically(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file so that it has its old or its new content and nothing between, whatever happens.

    Raises:
        EnvironmentNotReady: The file cannot be written; its old content is unharmed.
    """

    def write(file: BinaryIO) -> None:
        file.writelines(pieces)

    _write(path, write)


def make_private(directory: Path) -> None:
    """Create a directory and the missing ones above it, for the owner only. Safe to repeat.

    Raises:
        EnvironmentNotReady: It cannot be created.
    """
    with _translated(directory):
        for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)


def _write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    make_private(path.parent)
    with _translated(path):
        # mkstemp makes the file 0600; it stands beside its target, because a rename works within one file system.
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


@contextmanager
def _translated(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        hint = "make room, or set LLM_ORCHESTRATOR_HOME to a directory that can be written"
        problem = Problem("files.unwritable", f"cannot be written: {error.strerror or error}", str(path), hint)
        raise EnvironmentNotReady(problem) from error


def _json(document: Mapping[str, object]) -> str:
    """The document as JSON; decimals are strings, as everywhere in our JSON."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2, default=_json_value) + "\n"


def _json_value(value: object) -> object:
    match value:
        case Decimal():
            return format(value, "f")
        case datetime() | date():
            return value.isoformat()
        case Mapping():
            return dict(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        case _:
            raise TypeError(f"{type(value).__name__} has no form in JSON")


def _slug(name: str) -> str:
    """A file name that is safe everywhere: letters, digits, dots and hyphens."""
    return _UNSAFE.sub("-", name).strip(".-")[:100] or "unnamed"


def _files_below(directory: Path) -> Iterator[Path]:
    """All files and links below a directory; links are not followed."""
    for folder, _, names in os.walk(directory, followlinks=False):
        yield from (Path(folder) / name for name in names)


def _shipped() -> dict[str, Path]:
    packages = Path(str(resources.files("prompts")))
    return {path.name: path for path in packages.iterdir() if (path / WORKFLOW_FILE).is_file()}


def _root_of(pack: str | Path) -> Path:
    """The folder of a pack. A bare name means the shipped pack, even when a folder of that name is at hand."""
    shipped = _shipped()
    if (known := shipped.get(str(pack).replace("-", "_"))) is not None:
        return known
    try:
        root = Path(pack).resolve()
        if root.is_dir():
            return root
    except (OSError, ValueError) as error:
        raise WorkflowError(Problem("pack.missing", "is no name of a folder", repr(str(pack)))) from error
    if root.exists():
        raise WorkflowError(Problem("pack.not-a-folder", "a pack is a folder", str(pack), "name the folder itself"))
    raise WorkflowError(Problem("pack.missing", "no such pack", str(pack), did_you_mean(str(pack), shipped)))


def _texts(root: Path, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Path inside the pack -> content, of every text file; what cannot be used goes into `problems`."""
    total = 0
    folded: dict[str, str] = {}
    for count, path in enumerate(_pack_paths(root), 1):
        name = path.relative_to(root).as_posix()
        place = str(path)
        if count > MAX_PACK_FILES or total > MAX_PACK_BYTES:
            message = f"more than {MAX_PACK_FILES} files or {MAX_PACK_BYTES:,} bytes"
            problems.append(Problem("pack.too-large", message, str(root)))
            return
        if (other := folded.setdefault(name.casefold(), name)) != name:
            problems.append(Problem("pack.case-clash", f"differs from {other!r} in case only", place))
            continue
        try:
            data = _read_inside(root, path, place)
            total += len(data)
            yield name, decode_text(data, place)
        except InvalidInput as error:
            problems.extend(error.problems)


def _pack_paths(root: Path) -> Iterator[Path]:
    """Files that make up the pack, sorted. Hidden ones, Python caches, READMEs and sample items do not."""
    for path in sorted(_files_below(root)):
        parts = path.relative_to(root).parts
        if any(part.startswith((".", "__")) for part in parts) or path.suffix not in _TEXT_SUFFIXES:
            continue
        if path.stem.upper() != "README" and not (len(parts) == 1 and path.name in _SAMPLE_NAMES):
            yield path


def _read_inside(root: Path, path: Path, place: str) -> bytes:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidInput(Problem("pack.broken-link", "the link leads nowhere", place)) from error
    if not target.is_relative_to(root.resolve()):
        raise InvalidInput(Problem("pack.link-outside", "the link leads out of the pack", place, "copy the file"))
    return read_bytes(path, place)


def _digest(texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        for part in (name, text):
            data = part.encode()
            # The length keeps the end of one part from being read as the beginning of the next.
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
