"""From source text to a checked, metered, compiled template, with faults placed by line and column.

Jinja2 reports lines only. The column is found by reading the line's tokens again up to the one that the parser
stopped at, or by looking for the offending name in its line.
"""

import re
from collections.abc import Callable
from typing import Never, TypeVar

from jinja2 import Template, nodes
from jinja2 import TemplateSyntaxError as JinjaSyntaxError
from jinja2.lexer import ignored_tokens
from jinja2.parser import Parser

from .errors import TemplateProblem, TemplateSyntaxProblem, UnsafeTemplate, did_you_mean
from .sandbox import PromptEnvironment, forbidden, metered

_Tree = TypeVar("_Tree", bound=nodes.Node)

# Deeper trees would exhaust the stack of everything that walks them; people write no more than a dozen levels.
_MAX_DEPTH = 100
_UNEXPECTED = re.compile(r"unexpected (?:char )?(['\"])(.+?)\1")
_TAGS = ("if", "elif", "else", "endif", "for", "endfor", "set", "with", "endwith", "include", "raw", "endraw")


def parse_template(environment: PromptEnvironment, name: str, source: str) -> nodes.Template:
    """Return the tree of a template, not yet checked.

    Raises:
        TemplateSyntaxProblem: With the line and, where it can be told, the column.
    """

    def parse(parser: Parser) -> nodes.Template:
        return parser.parse()

    return _parsed(environment, name, source, None, parse)


def parse_expression(environment: PromptEnvironment, name: str, source: str) -> nodes.Expr:
    """Return the tree of a bare expression; otherwise as `parse_template`."""

    def parse(parser: Parser) -> nodes.Expr:
        expression = parser.parse_expression()
        if not parser.stream.eos:
            parser.fail("the expression goes on after its end", parser.stream.current.lineno)
        expression.set_environment(environment)
        return expression

    return _parsed(environment, name, source, "variable", parse)


def _parsed(
    environment: PromptEnvironment, name: str, source: str, state: str | None, parse: Callable[[Parser], _Tree]
) -> _Tree:
    parser: Parser | None = None
    try:
        parser = Parser(environment, source, name, None, state)
        tree = parse(parser)
    except JinjaSyntaxError as error:
        _fail(environment, name, source, state, parser, error)
    except (RecursionError, MemoryError) as error:
        raise TemplateSyntaxProblem(TemplateProblem(name, None, None, "the template is nested too deeply")) from error
    except (ValueError, OverflowError) as error:
        raise TemplateSyntaxProblem(TemplateProblem(name, None, None, f"a number cannot be read: {error}")) from error
    if _is_deeper_than(_MAX_DEPTH, tree):
        raise TemplateSyntaxProblem(TemplateProblem(name, None, None, "the template is nested too deeply"))
    return tree


def _is_deeper_than(depth: int, tree: nodes.Node) -> bool:
    level: list[nodes.Node] = [tree]
    for _ in range(depth):
        level = [child for node in level for child in node.iter_child_nodes()]
        if not level:
            return False
    return True


def compile_tree(environment: PromptEnvironment, name: str, tree: nodes.Template) -> Template:
    """Return the compiled template of a checked tree; the tree is consumed.

    Raises:
        UnsafeTemplate: When the tree uses what the sandbox refuses (the first such place).
        TemplateSyntaxProblem: When Python cannot compile it, for example with more than 20 nested loops.
    """
    try:
        refused = forbidden(tree, environment, name)
        if refused:
            raise UnsafeTemplate(refused[0])
        ready = metered(tree)
        ready.set_environment(environment)
        code = environment.compile(ready, name)
        return environment.template_class.from_code(environment, code, environment.globals)
    except JinjaSyntaxError as error:
        problem = TemplateProblem(name, error.lineno, None, error.message or "the template cannot be compiled")
        raise TemplateSyntaxProblem(problem) from error
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise TemplateSyntaxProblem(TemplateProblem(name, None, None, "the template is nested too deeply")) from error


def column_of(source: str, line: int | None, path: str) -> int | None:
    """Return the column at which `path` (a dotted name) stands in a line, else None."""
    lines = source.split("\n")
    if line is None or not 1 <= line <= len(lines):
        return None
    for wanted in (path, path.rpartition(".")[2]):
        found = re.search(rf"(?<![\w]){re.escape(wanted)}(?!\w)", lines[line - 1])
        if found is not None:
            return found.start() + 1
    return None


def _fail(
    environment: PromptEnvironment,
    name: str,
    source: str,
    state: str | None,
    parser: Parser | None,
    error: JinjaSyntaxError,
) -> Never:
    message = error.message or "the template cannot be read"
    column = _column_of_failure(environment, source, state, parser, error)
    hint = None
    tag = re.search(r"unknown tag '(\w+)'", message)
    if tag is not None:
        hint = did_you_mean(tag.group(1), _TAGS)
    elif "unexpected '}'" in message or "print statement" in message:
        hint = "close the expression with '}}'"
    raise TemplateSyntaxProblem(TemplateProblem(name, error.lineno, column, message.rstrip("."), hint)) from error


def _column_of_failure(
    environment: PromptEnvironment, source: str, state: str | None, parser: Parser | None, error: JinjaSyntaxError
) -> int | None:
    """Walk the tokens of the failing line up to the one that lexer or parser stopped at."""
    lines = source.split("\n")
    if not 1 <= error.lineno <= len(lines):
        return None
    text = lines[error.lineno - 1]
    tokens = _tokens(environment, source, state)
    unexpected = _UNEXPECTED.match(error.message or "")
    if unexpected is not None:
        behind = _end_of(tokens, error.lineno, text)
        at = text.find(unexpected.group(2), behind)
        return (at if at >= 0 else behind) + 1
    if parser is None:
        return None
    try:
        stopped = len(tokens) - len(list(parser.stream))
    except JinjaSyntaxError:
        return None  # a later fault hides how far the parser came
    before = _end_of(tokens[:stopped], error.lineno, text)
    if stopped < len(tokens) and tokens[stopped][0] == error.lineno:
        at = text.find(tokens[stopped][1], before)
        return None if at < 0 else at + 1
    return before + 1


def _tokens(environment: PromptEnvironment, source: str, state: str | None) -> list[tuple[int, str]]:
    """Return line and text of every token that means something, as far as the lexer comes."""
    tokens: list[tuple[int, str]] = []
    try:
        for line, kind, value in environment.lexer.tokeniter(source, None, None, state):
            if kind not in ignored_tokens:
                tokens.append((line, value))
    except JinjaSyntaxError:
        pass  # the caller reports this very fault; the tokens before it are what is wanted
    return tokens


def _end_of(tokens: list[tuple[int, str]], line: int, text: str) -> int:
    """Return the offset behind the last of the tokens that stands in the line."""
    end = 0
    for token_line, value in tokens:
        wanted = value.strip("\n")
        at = text.find(wanted, end) if token_line == line and "\n" not in wanted else -1
        end = at + len(wanted) if at >= 0 else end
    return end
