"""Conditions of a workflow step: one sandboxed expression over earlier answers, such as `triage.relevance >= 4`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from jinja2 import Template, Undefined, nodes

from .analysis import missing_uses, read_paths
from .compiling import column_of, compile_tree, parse_expression
from .errors import TemplateProblem, TemplateSyntaxProblem
from .sandbox import PromptEnvironment
from .translation import OPERATION_ERRORS, translated

_RESULT = "_condition_result"
_ENVIRONMENT = PromptEnvironment()


@dataclass(frozen=True, slots=True)
class Condition:
    """A compiled condition.

    Attributes:
        source: The expression as written.
        names: Top-level names it reads.
        paths: Dotted paths it reads, each as long as written (`triage.relevance`).
    """

    source: str
    names: frozenset[str]
    paths: frozenset[str]
    _template: Template
    _tree: nodes.Expr

    def evaluate(self, values: Mapping[str, object]) -> bool:
        """Return whether the condition holds.

        Raises:
            UndefinedVariable: When it reads a name or attribute that `values` lacks and that decides the outcome.
            RenderFailed: When an operation does not work on the values, such as comparing text with a number.
        """
        context = self._template.new_context(dict(values))
        try:
            for _ in self._template.root_render_func(context):
                pass
            result = context.vars[_RESULT]
            if isinstance(result, Undefined):
                str(result)
            return bool(result)
        except OPERATION_ERRORS as error:
            raise translated(error, "condition", lambda _: self.source, values, line=1) from error

    def problems(self, available: Mapping[str, object]) -> list[TemplateProblem]:
        """Return everything the condition reads that `available` (sample values) does not have."""
        return [
            TemplateProblem(
                "condition",
                use.line,
                column_of(self.source, use.line, use.path),
                f"'{use.path}' is not defined",
                use.hint,
            )
            for use in missing_uses(self._tree, available, "condition", lambda _: self._tree)
        ]


def compile_condition(source: str) -> Condition:
    """Return the condition that `source`, an expression without braces, states.

    Raises:
        TemplateSyntaxProblem: When it cannot be parsed; with the column.
        UnsafeTemplate: When it uses what the sandbox refuses.
    """
    if not source.strip():
        problem = TemplateProblem("condition", 1, 1, "the condition is empty", "leave it out to run the step always")
        raise TemplateSyntaxProblem(problem)
    tree = parse_expression(_ENVIRONMENT, "condition", source)
    paths = read_paths(tree)
    names = frozenset(path.partition(".")[0] for path in paths)
    # The tree of the template is transformed while it compiles; the one that is kept for analysis must not be.
    assigned = parse_expression(_ENVIRONMENT, "condition", source)
    body = nodes.Assign(nodes.Name(_RESULT, "store", lineno=1), assigned, lineno=1)
    template = compile_tree(_ENVIRONMENT, "condition", nodes.Template([cast("nodes.Node", body)], lineno=1))
    return Condition(source, names, paths, template, tree)
