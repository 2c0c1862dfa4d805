"""Finds, without rendering, every name and attribute of a template that the values cannot supply.

The walk carries a scope of sample values: a loop variable is an element of the list it runs over, a `set` name the
value of its expression. Where a shape is not known (`UNKNOWN`) nothing is claimed. What an author guards
(`is defined`, `| default(...)`) is not reported, and what a guard proves holds inside its branch only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from jinja2 import nodes

from .errors import did_you_mean


class Unknown:
    """The type of `UNKNOWN`."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = Unknown()
"""Given as a sample value, it says: this name exists, its shape is not known before the run."""

LOOP_ATTRIBUTES: Final = frozenset(
    {
        *("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"),
        *("previtem", "nextitem", "cycle", "changed"),
    }
)
_SAME_ELEMENTS = frozenset({"list", "sort", "unique", "reverse", "select", "reject", "selectattr", "rejectattr"})
_LOOP: Final[Mapping[str, object]] = {name: UNKNOWN for name in LOOP_ATTRIBUTES}


@dataclass(frozen=True, slots=True)
class Use:
    """A value used where the samples do not have it: in which template and line, by which dotted path, and a hint."""

    template: str
    path: str
    line: int
    hint: str | None


@dataclass(slots=True)
class _Analysis:
    template: str
    included: Callable[[str], nodes.Node]
    scopes: list[dict[str, object]]
    missing: list[Use] = field(default_factory=list["Use"])
    guarded: list[str] = field(default_factory=list[str])


def missing_uses(
    tree: nodes.Node, available: Mapping[str, object], template: str, included: Callable[[str], nodes.Node]
) -> list[Use]:
    """Return every use in `tree` of a name or attribute that `available` lacks, in the order of the text.

    Args:
        tree: A parsed template or expression.
        available: Sample values by top-level name.
        template: The name of the template that `tree` is of.
        included: Gives the tree of an included template.
    """
    analysis = _Analysis(template, included, [dict(available), {}])
    _visit(tree, analysis)
    return analysis.missing


def dotted_path(node: nodes.Node) -> str | None:
    """Return `a.b.c` for a chain of names, attributes and constant keys, else None."""
    match node:
        case nodes.Name(name=name):
            return name
        case nodes.Getattr(node=owner, attr=key) | nodes.Getitem(node=owner, arg=nodes.Const(value=str(key))):
            base = dotted_path(owner)
            return None if base is None else f"{base}.{key}"
        case _:
            return None


def read_paths(tree: nodes.Node) -> frozenset[str]:
    """Return the longest dotted paths that an expression reads."""
    found: set[str] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        path = dotted_path(node)
        if path is not None and not (isinstance(node, nodes.Name) and node.ctx != "load"):
            found.add(path)
        else:
            waiting.extend(node.iter_child_nodes())
    return frozenset(found)


def _visit(node: nodes.Node, analysis: _Analysis) -> None:
    match node:
        case nodes.If():
            _value(node.test, analysis)
            _under(_proofs(node.test), node.body, analysis)
            for branch in [*node.elif_, *node.else_]:
                _visit(branch, analysis)
        case nodes.For():
            _visit_for(node, analysis)
        case nodes.With():
            values = [_value(value, analysis) for value in node.values]
            analysis.scopes.append({})
            for target, value in zip(node.targets, values, strict=True):
                _bind(target, value, analysis)
            _visit_all(node.body, analysis)
            analysis.scopes.pop()
        case nodes.Assign():
            _bind(node.target, _value(node.node, analysis), analysis)
        case nodes.Include(template=nodes.Const(value=str(name))):
            outer, analysis.template = analysis.template, name
            _visit(analysis.included(name), analysis)
            analysis.template = outer
        case nodes.Expr():
            _value(node, analysis)
        case _:
            _visit_all(node.iter_child_nodes(), analysis)


def _visit_all(children: Iterable[nodes.Node], analysis: _Analysis) -> None:
    for child in children:
        _visit(child, analysis)


def _visit_for(node: nodes.For, analysis: _Analysis) -> None:
    element = _element(_value(node.iter, analysis))
    analysis.scopes.append({"loop": _LOOP})
    _bind(node.target, element, analysis)
    proofs: list[str] = []
    if node.test is not None:
        _value(node.test, analysis)
        proofs = _proofs(node.test)
    _under(proofs, node.body, analysis)
    analysis.scopes.pop()
    _visit_all(node.else_, analysis)


def _under(proofs: list[str], body: Sequence[nodes.Node], analysis: _Analysis) -> None:
    analysis.guarded.extend(proofs)
    _visit_all(body, analysis)
    del analysis.guarded[len(analysis.guarded) - len(proofs) :]


def _proofs(test: nodes.Node) -> list[str]:
    """Return the paths that must exist where `test` holds."""
    match test:
        case nodes.And():
            return _proofs(test.left) + _proofs(test.right)
        case nodes.Test(name="defined"):
            path = dotted_path(test.node)
            return [] if path is None else [path]
        case _:
            return []


def _bind(target: nodes.Node, value: object, analysis: _Analysis) -> None:
    match target:
        case nodes.Name(name=name):
            analysis.scopes[-1][name] = value
        case nodes.Tuple(items=items):
            parts = cast("list[object]", value) if isinstance(value, (list, tuple)) else []
            for position, item in enumerate(items):
                _bind(item, parts[position] if position < len(parts) else UNKNOWN, analysis)
        case _:
            pass


def _element(value: object) -> object:
    """Return a sample element of a list: for mappings one that has the keys of all of them."""
    if not isinstance(value, (list, tuple)) or not value:
        return UNKNOWN
    elements = cast("list[object]", value)
    if not all(isinstance(element, Mapping) for element in elements):
        return elements[0]
    merged: dict[str, object] = {}
    for element in reversed(elements):
        merged.update(cast("Mapping[str, object]", element))
    return merged


def _value(node: nodes.Node, analysis: _Analysis) -> object:
    """Return the sample value of an expression (UNKNOWN when it cannot be told) and note what is missing in it."""
    match node:
        case nodes.Const(value=value):
            return cast("object", value)
        case nodes.Name(name=name):
            return _lookup(name, node, analysis)
        case (
            nodes.Getattr(node=owner, attr=key)
            | nodes.Getitem(node=owner, arg=nodes.Const(value=(str() | int()) as key))
        ):
            return _member(node, _value(owner, analysis), key, analysis)
        case nodes.Test(name="defined" | "undefined"):
            return True
        case nodes.Filter(name=name) if node.node is not None:
            return _filtered(name, node, analysis)
        case nodes.List(items=items) | nodes.Tuple(items=items):
            return [_value(item, analysis) for item in items]
        case _:
            _visit_operands(node, analysis)
            return UNKNOWN


def _visit_operands(node: nodes.Node, analysis: _Analysis) -> None:
    match node:
        case nodes.And():
            _value(node.left, analysis)
            _under(_proofs(node.left), [node.right], analysis)
        case nodes.CondExpr():
            _value(node.test, analysis)
            _under(_proofs(node.test), [node.expr1], analysis)
            if node.expr2 is not None:
                _value(node.expr2, analysis)
        case _:
            for child in node.iter_child_nodes():
                _value(child, analysis)


def _lookup(name: str, node: nodes.Node, analysis: _Analysis) -> object:
    for scope in reversed(analysis.scopes):
        if name in scope:
            return scope[name]
    if name != "range":
        known = {key for scope in analysis.scopes for key in scope}
        _note(name, node, did_you_mean(name, known), analysis)
    return UNKNOWN


def _member(node: nodes.Node, owner: object, key: str | int, analysis: _Analysis) -> object:
    match owner:
        case Mapping():
            members = cast("Mapping[object, object]", owner)
            if key in members:
                return members[key]
            hint = did_you_mean(str(key), map(str, members))
        case list() | tuple() if isinstance(key, int):
            return _element(cast("object", owner))
        case Unknown():
            return UNKNOWN
        case str() if isinstance(key, int):
            return UNKNOWN
        case _:
            hint = f"it is {type(owner).__name__}, which has no fields"
    _note(dotted_path(node) or str(key), node, hint, analysis)
    return UNKNOWN


def _filtered(name: str, node: nodes.Filter, analysis: _Analysis) -> object:
    operand = cast("nodes.Node", node.node)
    already = len(analysis.missing)
    value = _value(operand, analysis)
    if name in {"default", "d"}:
        del analysis.missing[already:]
        value = UNKNOWN
    for argument in [*node.args, *node.kwargs]:
        _value(argument.value if isinstance(argument, nodes.Keyword) else argument, analysis)
    if name in _SAME_ELEMENTS:
        return value
    if name in {"first", "last", "min", "max"}:
        return _element(value)
    if name in {"items", "dictsort"} and isinstance(value, Mapping) and value:
        return list(cast("Mapping[str, object]", value).items())
    return UNKNOWN


def _note(path: str, node: nodes.Node, hint: str | None, analysis: _Analysis) -> None:
    proved = any(path == guard or guard.startswith(f"{path}.") for guard in analysis.guarded)
    if not proved:
        analysis.missing.append(Use(analysis.template, path, node.lineno, hint))
