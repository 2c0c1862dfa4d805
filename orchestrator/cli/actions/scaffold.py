"""Writes a first pack and example settings from the files in `orchestrator/cli/starter`."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from orchestrator.cli.actions.output import put_json, say
from orchestrator.errors import EnvironmentNotReady, InvalidInput, Problem

# Names that begin with a dot are kept without it, so that no tool takes the originals for its own.
_TARGETS = {"env.example": ".env.example", "gitignore": ".gitignore"}


def write_pack(directory: Path, *, is_forced: bool, as_json: bool) -> None:
    """Writes the files of the starter; all or none when some of them are there already.

    Raises:
        InvalidInput: files would be overwritten and that was not asked for.
        EnvironmentNotReady: the directory cannot be written.
    """
    texts = dict(_starter(resources.files("orchestrator.cli") / "starter", Path()))
    if (directory / ".gitignore").exists():
        # Somebody's project has one already, and ours is only a suggestion.
        del texts[Path(".gitignore")]
    there = [path for path in texts if (directory / path).exists()]
    if there and not is_forced:
        hint = "name another directory, or use --force"
        raise InvalidInput(
            Problem("init.exists", "would be overwritten", str(directory / path), hint) for path in there
        )
    try:
        for path, text in texts.items():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = Problem("init.cannot-write", error.strerror or str(error), str(error.filename or directory))
        raise EnvironmentNotReady(problem) from error
    pack = directory / "triage"
    if as_json:
        put_json({"directory": str(directory), "pack": str(pack), "files": [str(directory / path) for path in texts]})
        return
    for path in texts:
        say(f"wrote {directory / path}")
    say(f"next: llm-orchestrator validate {_argument(pack)} && llm-orchestrator run {_argument(pack)}")


def _starter(folder: Traversable, below: Path) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if entry.is_dir():
            found += _starter(entry, below / entry.name)
        else:
            found.append((below / _TARGETS.get(entry.name, entry.name), entry.read_text(encoding="utf-8")))
    return found


def _argument(pack: Path) -> str:
    """The pack as it must be typed: with a slash, since a bare name means a shipped pack."""
    return str(pack) if "/" in str(pack) else f"./{pack}"
