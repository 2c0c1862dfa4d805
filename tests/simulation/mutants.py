"""Small lies told to the product, to see whether the simulation notices: functions with a changed place."""

import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def mutate(patch: pytest.MonkeyPatch, owner: Any, name: str, *changes: tuple[str, str]) -> None:
    """Replaces a function or method by a copy whose source is changed, until the patch is undone.

    Raises:
        AssertionError: the source does not contain what is to be changed: the mutant has to follow the product.
    """
    function: Callable[..., Any] = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert old in source, f"{name} does not say {old!r} any more"
        source = source.replace(old, new)
    names = owner.__dict__ if isinstance(owner, ModuleType) else inspect.unwrap(function).__globals__
    made: dict[str, Any] = {}
    exec(compile(source, f"<mutant of {name}>", "exec"), names, made)
    patch.setattr(owner, name, made[name])
