"""The Jinja2 environment of the package: strict, immutable, and closed to everything but plain data.

Three fences, each enough for most attacks alone. Reading: the compiler admits only the node types listed here,
refuses calls (except `range`, `loop.cycle`, `loop.changed`), macros, imports, inheritance and recursive loops.
Looking up: `a.b` and `a['b']` read mappings and lists, never Python attributes, so an object that strays into the
values cannot be explored. Building: loops, `~`, list displays and arithmetic are metered, and nothing but plain
data can be printed.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

from jinja2 import StrictUndefined, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError, UndefinedError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing
from jinja2.visitor import NodeTransformer

from .analysis import LOOP_ATTRIBUTES
from .errors import TemplateProblem, did_you_mean
from .filters import allowed_filters, allowed_tests, to_text
from .limits import MAX_INTEGER_BITS, MAX_RANGE, MAX_VALUE_SIZE, LimitExceeded, weigh

_STATEMENTS = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.For,
    nodes.If,
    nodes.Assign,
    nodes.With,
    nodes.Include,
)
_EXPRESSIONS = (
    nodes.Const,
    nodes.Name,
    nodes.Tuple,
    nodes.List,
    nodes.Dict,
    nodes.Pair,
    nodes.Keyword,
    nodes.CondExpr,
    nodes.Filter,
    nodes.Test,
    nodes.Call,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
    nodes.Concat,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Neg,
    nodes.Pos,
    nodes.Add,
    nodes.Sub,
    nodes.Mul,
    nodes.Div,
    nodes.FloorDiv,
    nodes.Mod,
    nodes.Pow,
)
_CALLABLELOOP_ATTRIBUTES = frozenset({"cycle", "changed"})
_MAX_BASE = 1_000_000
_MAX_EXPONENT = 64
_RESERVED_NAMES = frozenset({"self", "super", "caller", "varargs", "kwargs"})


class MissingValue(UndefinedError):
    """An undefined value was used.

    `name` is the missing key (None when a filter found nothing), `owner` what lacks it (`missing` for the values).
    """

    def __init__(self, owner: object, name: object, message: str | None = None) -> None:
        super().__init__(message)
        self.owner = owner
        self.name = name


class StrictValue(StrictUndefined):
    """A strict undefined whose error remembers which key of which value is missing."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: object = missing,
        name: str | None = None,
        exc: type[TemplateRuntimeError] = UndefinedError,
    ) -> None:
        remembering = cast("type[TemplateRuntimeError]", partial(MissingValue, obj, name))
        super().__init__(hint, obj, name, remembering)


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox described above; made once per engine and never changed after."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Constant folding would run filters and arithmetic at compile time, outside the meter.
        super().__init__(
            undefined=StrictValue,
            finalize=to_text,
            optimized=False,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            auto_reload=False,
        )
        self.globals.clear()
        cast("dict[str, object]", self.globals)["range"] = _range
        self.filters.clear()
        self.filters.update(allowed_filters())
        self.tests.clear()
        self.tests.update(allowed_tests())

    def getattr(self, obj: object, attribute: str) -> object:
        """Return the key `attribute` of a mapping, or one of the named attributes of a loop; else an undefined."""
        # The exact type first: an abstract check costs more than the rest of a lookup, and prompts look up a lot.
        if type(obj) is dict or isinstance(obj, Mapping):
            members = cast("Mapping[str, object]", obj)
            if attribute in members:
                return members[attribute]
        elif isinstance(obj, LoopContext) and attribute in LOOP_ATTRIBUTES:
            return cast("object", getattr(obj, attribute))
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: object, argument: object) -> object:
        """Return the element of a mapping by key or of a list or text by position; else an undefined."""
        try:
            if isinstance(obj, (Mapping, list, tuple, str)):
                return cast("Mapping[object, object]", obj)[argument]
        except (LookupError, TypeError):
            pass
        return self.undefined(obj=obj, name=argument)  # pyright: ignore[reportArgumentType] names may be numbers

    def is_safe_callable(self, obj: object) -> bool:
        """Admit `range` and the two methods of a loop; the compiler has refused every other call already."""
        owner = getattr(obj, "__self__", None)
        return obj is _range or isinstance(owner, LoopContext)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Do arithmetic within the caps.

        Raises:
            LimitExceeded: When the result would be larger than a prompt can use.
            SecurityError: For `%` on text, which is string formatting.
        """
        match operator, left, right:
            case "%", str(), _:
                raise SecurityError("text cannot be formatted with %")
            case "**", int() | float(), int() | float() if abs(right) > _MAX_EXPONENT or abs(left) > _MAX_BASE:
                raise LimitExceeded(f"a power needs a base up to {_MAX_BASE} and an exponent up to {_MAX_EXPONENT}")
            case "*", _, int():
                _check_size(weigh(left) * right if _is_sequence(left) else 0)
            case "*", int(), _:
                _check_size(weigh(right) * left if _is_sequence(right) else 0)
            case "+", _, _ if _is_sequence(left) and _is_sequence(right):
                _check_size(weigh(left) + weigh(right))
            case _:
                pass
        result = cast("object", super().call_binop(context, operator, left, right))
        if isinstance(result, int) and result.bit_length() > MAX_INTEGER_BITS:
            raise LimitExceeded("a number grows too large")
        return result


def _is_sequence(value: object) -> bool:
    return isinstance(value, (str, list, tuple))


def _check_size(size: int) -> None:
    if size > MAX_VALUE_SIZE:
        raise LimitExceeded(f"the template builds a value of more than {MAX_VALUE_SIZE} characters")


def _range(*arguments: int) -> Sequence[int]:
    numbers = range(*arguments)
    if len(numbers) > MAX_RANGE:
        raise LimitExceeded(f"range is limited to {MAX_RANGE} numbers")
    return numbers


def forbidden(tree: nodes.Node, environment: PromptEnvironment, template: str) -> list[TemplateProblem]:
    """Return one problem for every construct of the tree that templates may not use, in the order of lines."""
    found: list[TemplateProblem] = []
    for node in walk(tree):
        refusal = _refusal(node, environment)
        if refusal is not None:
            message, hint = refusal
            found.append(TemplateProblem(template, node.lineno or None, None, message, hint))
    return sorted(found, key=lambda problem: problem.line or 0)


def walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    """Yield every node of a tree, in no particular order and however deep it is nested."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.iter_child_nodes())


def _refusal(node: nodes.Node, environment: PromptEnvironment) -> tuple[str, str | None] | None:
    match node:
        case nodes.Name(name=name) if name in _RESERVED_NAMES or name.startswith("__"):
            return f"the name '{name}' is not available in templates", None
        case nodes.Getattr(attr=key) | nodes.Getitem(arg=nodes.Const(value=str(key))) if key.startswith("__"):
            return f"the attribute '{key}' is not available in templates", "templates read data, not Python objects"
        case nodes.Call() if not _is_allowed_call(node):
            return "templates cannot call functions or methods", _call_hint(node)
        case nodes.Filter(name=name) if name not in environment.filters or name.startswith("~"):
            return f"there is no filter '{name}'", did_you_mean(name, environment.filters)
        case nodes.Test(name=name) if name not in environment.tests:
            return f"there is no test '{name}'", did_you_mean(name, environment.tests)
        case nodes.For(recursive=True):
            return "recursive loops are not available in templates", None
        case nodes.Include() if not _is_plain_include(node):
            return "an include names one file of the pack in quotes", "for example {% include 'rubric.md.j2' %}"
        case _ if not isinstance(node, _STATEMENTS + _EXPRESSIONS):
            kind = type(node).__name__
            return f"the construct '{kind}' is not available in templates", "use if, for, set, with and include"
        case _:
            return None


def _is_allowed_call(call: nodes.Call) -> bool:
    if call.dyn_args is not None or call.dyn_kwargs is not None:
        return False
    match call.node:
        case nodes.Name(name="range"):
            return True
        case nodes.Getattr(node=nodes.Name(name="loop"), attr=attribute):
            return attribute in _CALLABLELOOP_ATTRIBUTES
        case _:
            return False


def _call_hint(call: nodes.Call) -> str:
    if isinstance(call.node, nodes.Getattr) and not call.node.attr.startswith("__"):
        attribute = call.node.attr
        return f"use a filter, such as '| {'items' if attribute == 'items' else 'join'}', instead of '.{attribute}()'"
    return "filters change values; only range() can be called"


def _is_plain_include(include: nodes.Include) -> bool:
    name = include.template
    return (
        isinstance(name, nodes.Const)
        and isinstance(name.value, str)
        and include.with_context
        and not include.ignore_missing
    )


class _Metering(NodeTransformer):
    """Puts the metering filters where a template loops or builds."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast("nodes.Expr", node.iter), "~steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), "~concat")

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        storing = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if storing else _filtered(node, "~bounded")

    visit_Tuple = visit_Dict = visit_List


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def metered(tree: nodes.Template) -> nodes.Template:
    """Insert the metering filters into a checked tree, in place, and return it."""
    transformed = _Metering().visit(tree)
    return cast("nodes.Template", transformed)
