"""Splits a template file into its TOML front matter and its body, without moving a single line.

Front matter is optional. It stands between two lines of `+++` at the very top of the file:

    +++
    role = "an experienced maintainer of open-source software"
    description = "Scores one project on six dimensions"
    system = \"\"\"
    Judge by the measured facts only.
    \"\"\"
    +++
    Project: {{ project_name | inert }}

`system` is a template of its own and becomes the system message; `role` completes the sentence "You are ..." that
opens the system message; `description` is for readers and listings. Positions in errors must be those of the
file, therefore both parts are handed on with as many leading lines as the file has before them, in a comment.
"""

import re
import tomllib
from dataclasses import dataclass

from .errors import TemplateProblem, TemplateSyntaxProblem, did_you_mean

_FENCE = "+++"
_KEYS = ("system", "role", "description")
_TOML_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")
_SYSTEM_KEY = re.compile(r"\s*[\"']?system[\"']?\s*=\s*(\"\"\"|''')?(.*)")


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The parts of one template file; `system`, `role` and `description` are None when not given."""

    body: str
    system: str | None = None
    role: str | None = None
    description: str | None = None
    has_front_matter: bool = False


def split_front_matter(name: str, source: str) -> PromptSource:
    """Return the parts of a template file; body and system keep the line numbers of the file.

    Raises:
        TemplateSyntaxProblem: When the front matter is not closed, is not TOML, has an unknown key or a value that
            is not text.
    """
    lines = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[0].rstrip() != _FENCE:
        return PromptSource("\n".join(lines))
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == _FENCE), None)
    if end is None:
        raise _problem(name, 1, None, "the front matter is not closed", "add a line '+++' after it")
    front, body = lines[1:end], lines[end + 1 :]
    values = _read(name, front)
    system = values.get("system")
    role = _phrase(name, "role", values)
    description = _phrase(name, "description", values)
    return PromptSource(
        body=_at_line(end + 2, "\n".join(body)),
        system=None if system is None else _at_line(_system_line(front), system),
        role=role,
        description=description,
        has_front_matter=True,
    )


def _read(name: str, front: list[str]) -> dict[str, str]:
    try:
        values = tomllib.loads("\n".join(front))
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        line, column = (int(place.group(1)) + 1, int(place.group(2))) if place else (len(front) + 1, None)
        message = _TOML_PLACE.sub("", str(error))
        raise _problem(name, line, column, f"the front matter is not TOML: {message}", None) from error
    for key, value in values.items():
        if key not in _KEYS:
            raise _problem(
                name, _line_of(front, key), None, f"unknown front matter key '{key}'", did_you_mean(key, _KEYS)
            )
        if not isinstance(value, str):
            raise _problem(
                name, _line_of(front, key), None, f"front matter key '{key}' must be text", "put it in quotes"
            )
    return values


def _phrase(name: str, key: str, values: dict[str, str]) -> str | None:
    value = values.get(key)
    if value is None or not value.strip():
        return None
    if "{{" in value or "{%" in value:
        raise _problem(
            name, None, None, f"front matter key '{key}' is plain text, not a template", "only 'system' is one"
        )
    return value.strip()


def _line_of(front: list[str], key: str) -> int:
    # Line 1 of the file is the opening fence.
    return next((number for number, line in enumerate(front, 2) if line.lstrip().strip("\"'").startswith(key)), 2)


def _system_line(front: list[str]) -> int:
    for number, line in enumerate(front, 2):
        key = _SYSTEM_KEY.match(line)
        if key is not None:
            # TOML drops a newline right after opening triple quotes: the text begins on the next line.
            return number + 1 if key.group(1) and not key.group(2) else number
    return 2


def _at_line(line: int, text: str) -> str:
    return "{#" + "\n" * (line - 1) + "#}" + text if line > 1 else text


def _problem(name: str, line: int | None, column: int | None, message: str, hint: str | None) -> TemplateSyntaxProblem:
    return TemplateSyntaxProblem(TemplateProblem(name, line, column, message, hint))
