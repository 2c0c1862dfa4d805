"""What can go wrong with a prompt template, as data a caller can print.

Every error carries one `TemplateProblem`: which template, which line of the file as its author sees it
(front matter included), which column where it is known, one sentence, and a hint. Callers that want all
problems of a template at once use `PromptEngine.validate_variables`, which returns the same records.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TemplateProblem:
    """One fault of one template.

    `line` and `column` count from 1; `line` is None when the fault belongs to the whole file, `column` is None
    when the position inside the line is not known. `hint` says what to do, or is None.
    """

    template: str
    line: int | None
    column: int | None
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.template, self.line, self.column) if part is not None)
        return f"{place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class PromptError(Exception):
    """Base of everything this package raises.

    PromptError
    ├── TemplateNotFound        no source of that name
    ├── TemplateSyntaxProblem   Jinja2 or front matter that cannot be read
    ├── UndefinedVariable       a name or attribute that the values do not have
    ├── UnsafeTemplate          a construct the sandbox refuses
    ├── PromptTooLarge          a cap on source, output, loop steps or processor time was reached
    ├── EmptyPrompt             nothing but whitespace was rendered
    └── RenderFailed            an operation failed on these values (sorting mixed types, dividing by zero, ...)
    """

    def __init__(self, problem: TemplateProblem) -> None:
        super().__init__(str(problem))
        self.problem = problem

    @property
    def template(self) -> str:
        """The template at fault, which may be an included one."""
        return self.problem.template

    @property
    def line(self) -> int | None:
        """The line of the file, from 1; None when the fault belongs to the whole file."""
        return self.problem.line

    @property
    def column(self) -> int | None:
        """The column in the line, from 1; None when not known."""
        return self.problem.column

    @property
    def hint(self) -> str | None:
        """What to do about it, or None."""
        return self.problem.hint


class TemplateNotFound(PromptError):
    """The named template is not among the sources."""


class TemplateSyntaxProblem(PromptError):
    """The template or its front matter cannot be parsed."""


class UndefinedVariable(PromptError):
    """A template used a value that does not exist; `name` is its dotted path where that is known."""

    def __init__(self, problem: TemplateProblem, name: str) -> None:
        super().__init__(problem)
        self.name = name


class UnsafeTemplate(PromptError):
    """The template tried something that templates are not allowed to do."""


class PromptTooLarge(PromptError):
    """A size, step or time cap was reached."""


class EmptyPrompt(PromptError):
    """The user message came out empty; sending it would be paying for nothing."""


class RenderFailed(PromptError):
    """An operation in the template does not work on the given values."""


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return a hint naming the closest known name, else the first few known names, else None."""
    candidates = sorted({candidate for candidate in known if not candidate.startswith("~")})
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    if not candidates:
        return None
    shown = ", ".join(candidates[:12])
    return f"known here: {shown}{', ...' if len(candidates) > 12 else ''}"
