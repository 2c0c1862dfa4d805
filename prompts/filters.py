"""The filters and tests that templates may use, each safe on any plain value and bounded in what it builds.

The list is an allow-list: what is not here does not exist for a template. Left out on purpose: `attr`, `format`,
`center`, `batch`, `slice`, `random`, `pprint`, `xmlattr`, `urlize` (escape routes, unbounded growth, or answers that
differ from render to render). Filters whose names begin with `~` cannot be written in a template; the compiler
inserts them (see `sandbox`).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from jinja2 import Environment, Undefined, pass_context, pass_environment
from jinja2 import filters as builtin
from jinja2.runtime import Context
from jinja2.tests import TESTS as BUILTIN_TESTS

from .fence import DEFAULT_LIMIT, INLINE_LIMIT, fence, inert
from .limits import MAX_VALUE_SIZE, LimitExceeded, Meter, weigh

METER = "~meter"
_MAX_INDENT = 40
_MAX_DIGITS = 15

_ALLOWED_TESTS = frozenset(
    {
        *(
            "boolean",
            "defined",
            "divisibleby",
            "even",
            "false",
            "float",
            "in",
            "integer",
            "iterable",
            "lower",
            "mapping",
        ),
        *("none", "number", "odd", "sequence", "string", "true", "undefined", "upper"),
        *("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">="),
    }
)
_SAFE_BUILTIN_FILTERS = (
    *("d", "default", "first", "float", "int", "last", "list", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("select", "selectattr", "sort", "unique"),
)


def to_text(value: object) -> str:
    """Write a plain value out: text as it is, lists and mappings as JSON.

    Raises:
        TypeError: When the value is not plain data (text, number, boolean, null, list, mapping), so that no
            object of the program can be printed into a prompt.
        LimitExceeded: When it is too large.
    """
    if type(value) is str:
        return value
    kind = type(value)
    if kind is int or kind is float or kind is bool or value is None:
        return str(value)
    if isinstance(value, Undefined):
        return str(value)  # a strict undefined raises here, with its name
    if isinstance(value, (list, tuple, Mapping)):
        return to_json(cast("object", value))
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"a template can print text, numbers, lists and mappings, not {kind.__name__}")


def to_json(value: object, indent: int | None = None) -> str:
    """Return JSON of a plain value, keys in their given order; `indent` as in `json.dumps`, at most 8."""
    if isinstance(value, Undefined):
        str(value)
    weigh(value)
    spaces = None if indent is None else max(0, min(indent, 8))
    return json.dumps(value, ensure_ascii=False, indent=spaces, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, object]", value))
    raise TypeError(f"a template can print text, numbers, lists and mappings, not {type(value).__name__}")


def bounded(value: object) -> object:
    """Return `value` if written out it stays below the cap."""
    weigh(value)
    return value


def concatenate(parts: Iterable[object]) -> str:
    """Join the operands of `~`."""
    return _join_texts([to_text(part) for part in parts], "")


@pass_context
def loop_steps(context: Context, iterable: Iterable[object]) -> Iterator[object]:
    """Hand out the elements of a loop, each paid for with a step of the render's meter."""
    meter = cast("Meter", context.resolve_or_missing(METER))
    for element in iterable:
        meter.step()
        yield element


def _join_texts(texts: list[str], separator: str) -> str:
    size = sum(map(len, texts)) + len(separator) * len(texts)
    if size > MAX_VALUE_SIZE:
        raise LimitExceeded(f"the template builds a value of more than {MAX_VALUE_SIZE} characters")
    return separator.join(texts)


@pass_environment
def _join(environment: Environment, value: Iterable[object], d: str = "", attribute: str | int | None = None) -> str:
    get = builtin.make_attrgetter(environment, attribute)
    parts = value if attribute is None else map(get, value)
    return _join_texts([to_text(part) for part in parts], to_text(d))


def _replace(value: object, old: str, new: str, count: int = -1) -> str:
    text, old, new = to_text(value), to_text(old), to_text(new)
    found = text.count(old) if count < 0 else min(count, text.count(old))
    if len(text) + found * len(new) > MAX_VALUE_SIZE:
        raise LimitExceeded(f"the template builds a value of more than {MAX_VALUE_SIZE} characters")
    return text.replace(old, new, count)


def _truncate(value: object, length: int = 255, killwords: bool = False, end: str = "...") -> str:
    text = to_text(value)
    if len(text) <= length:
        return text
    kept = text[: max(0, length - len(end))]
    return (kept if killwords else kept.rsplit(" ", 1)[0]) + end


def _indent(value: object, width: int = 4, first: bool = False, blank: bool = False) -> str:
    lines = to_text(value).splitlines()
    margin = " " * max(0, min(width, _MAX_INDENT))
    indented = [margin + line if line or blank else line for line in lines]
    if lines and not first:
        indented[0] = lines[0]
    return _join_texts(indented, "\n")


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    digits = max(-_MAX_DIGITS, min(precision, _MAX_DIGITS))
    if method != "common":
        raise ValueError("round knows the method 'common' only")
    return round(value, digits) if digits else float(round(value))


def _length(value: object) -> int:
    if isinstance(value, Undefined):
        str(value)
    if isinstance(value, (str, list, tuple, Mapping, range)):
        return len(cast("str", value))
    raise TypeError(f"{type(value).__name__} has no length")


def _items(value: object) -> list[tuple[object, object]]:
    if isinstance(value, Undefined):
        str(value)
    if not isinstance(value, Mapping):
        raise TypeError(f"items needs a mapping, not {type(value).__name__}")
    return list(cast("Mapping[object, object]", value).items())


def _dictsort(value: object, by: str = "key", reverse: bool = False) -> list[tuple[object, object]]:
    position = {"key": 0, "value": 1}[by]
    return sorted(_items(value), key=lambda pair: cast("str", pair[position]), reverse=reverse)


@pass_environment
def _sum(
    environment: Environment, iterable: Iterable[object], attribute: str | int | None = None, start: float = 0
) -> float:
    get = builtin.make_attrgetter(environment, attribute)
    numbers = list(iterable if attribute is None else map(get, iterable))
    if not all(isinstance(number, (int, float)) for number in [*numbers, start]):
        raise TypeError("sum adds numbers only")
    return sum(cast("list[float]", numbers), start)


def _fenced(value: object, label: str = "data", limit: int = DEFAULT_LIMIT) -> str:
    text = to_json(cast("object", value), 1) if isinstance(value, (list, tuple, Mapping)) else to_text(value)
    return fence(text, label, limit)


def _inert(value: object, limit: int = INLINE_LIMIT) -> str:
    return inert(to_text(value), limit)


def _on_text(change: Callable[[str], object]) -> Callable[[object], object]:
    def apply(value: object) -> object:
        return change(to_text(value))

    return apply


def _trim(value: object, chars: str | None = None) -> str:
    return to_text(value).strip(chars)


def _absolute(value: float) -> float:
    return abs(value)


def allowed_filters() -> dict[str, Callable[..., object]]:
    """Return a fresh mapping of every filter, the compiler's own included."""
    own: dict[str, Callable[..., object]] = {
        "abs": _absolute,
        "capitalize": _on_text(str.capitalize),
        "count": _length,
        "dictsort": _dictsort,
        "fenced": _fenced,
        "indent": _indent,
        "inert": _inert,
        "items": _items,
        "join": _join,
        "length": _length,
        "lower": _on_text(str.lower),
        "replace": _replace,
        "round": _round,
        "string": to_text,
        "sum": _sum,
        "title": _on_text(builtin.do_title),
        "tojson": to_json,
        "trim": _trim,
        "truncate": _truncate,
        "untrusted": _fenced,
        "upper": _on_text(str.upper),
        "wordcount": _on_text(lambda text: len(text.split())),
        "~bounded": bounded,
        "~concat": concatenate,
        "~steps": loop_steps,
    }
    for name in _SAFE_BUILTIN_FILTERS:
        own[name] = cast("Callable[..., object]", builtin.FILTERS[name])
    return own


def allowed_tests() -> dict[str, Callable[..., bool]]:
    """Return a fresh mapping of every test; `callable`, `sameas`, `escaped`, `filter` and `test` are left out."""
    return {name: cast("Callable[..., bool]", BUILTIN_TESTS[name]) for name in _ALLOWED_TESTS}
