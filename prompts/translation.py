"""The border: turns what Jinja2 and Python raise inside a template into the errors of this package."""

import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, cast

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.utils import missing

from .errors import (
    PromptError,
    PromptTooLarge,
    RenderFailed,
    TemplateProblem,
    UndefinedVariable,
    UnsafeTemplate,
    did_you_mean,
)
from .limits import LimitExceeded
from .sandbox import MissingValue

OPERATION_ERRORS: Final = (
    TemplateRuntimeError,
    SecurityError,
    LimitExceeded,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
    MemoryError,
)
"""Everything that an operation on plain data raises inside a template."""


def translated(
    error: BaseException,
    template: str,
    source_of: Callable[[str], str],
    values: Mapping[str, object],
    line: int | None = None,
) -> PromptError:
    """Return the error of this package for one raised while rendering.

    Args:
        error: What was raised; its traceback tells the template and the line.
        template: The name to report when no template frame is on the traceback.
        source_of: Gives the text of a template, to find columns and full paths.
        values: What was rendered, to suggest names.
        line: The line to report when no template frame is on the traceback.
    """
    name, line = _place(error.__traceback__, (template, line))
    if isinstance(error, MissingValue):
        return _undefined(error, name, line, source_of(name), values)
    if isinstance(error, LimitExceeded):
        return PromptTooLarge(TemplateProblem(name, line, None, str(error)))
    if isinstance(error, SecurityError):
        return UnsafeTemplate(TemplateProblem(name, line, None, str(error)))
    if isinstance(error, (RecursionError, MemoryError)):
        return PromptTooLarge(TemplateProblem(name, line, None, "the template or its values are nested too deeply"))
    return RenderFailed(TemplateProblem(name, line, None, f"rendering fails on these values: {error}"[:500]))


def _place(traceback: TracebackType | None, place: tuple[str, int | None]) -> tuple[str, int | None]:
    """Return name and line of the innermost template frame, `place` when there is none."""
    while traceback is not None:
        compiled = traceback.tb_frame.f_globals.get("__jinja_template__")
        if isinstance(compiled, Template):
            place = (compiled.name or place[0], compiled.get_corresponding_lineno(traceback.tb_lineno))
        traceback = traceback.tb_next
    return place


def _undefined(
    error: MissingValue, template: str, line: int | None, source: str, values: Mapping[str, object]
) -> UndefinedVariable:
    if error.name is None:
        message = error.message or "a value is not defined"
        return UndefinedVariable(TemplateProblem(template, line, None, message), "")
    name = str(error.name)
    path, column = _written(source, line, name)
    owner: object = error.owner
    if owner is missing:
        hint = did_you_mean(name, values)
    elif isinstance(owner, Mapping):
        hint = did_you_mean(name, map(str, cast("Mapping[object, object]", owner)))
    else:
        hint = "it belongs to a value without fields"
    return UndefinedVariable(TemplateProblem(template, line, column, f"'{path}' is not defined", hint), path)


def _written(source: str, line: int | None, name: str) -> tuple[str, int | None]:
    """Return the dotted path that ends in `name` as the line writes it, and its column."""
    lines = source.split("\n")
    if line is not None and 1 <= line <= len(lines):
        found = re.search(rf"(?<![\w.])(?:\w+\.)*{re.escape(name)}(?!\w)", lines[line - 1])
        if found is not None:
            return found.group(), found.start() + 1
    return name, None
