"""Conditions of steps: what they read, when they hold, how they fail."""

import pytest

from prompts import RenderFailed, TemplateSyntaxProblem, UndefinedVariable, UnsafeTemplate, compile_condition

VALUES = {"triage": {"eligible": True, "relevance": 5, "tags": ["a"]}, "limit": 4}


@pytest.mark.parametrize(
    ("source", "holds"),
    [
        ("triage.eligible", True),
        ("triage.eligible and triage.relevance >= limit", True),
        ("triage.relevance < limit", False),
        ("not triage.eligible or 'a' in triage.tags", True),
        ("triage.tags | length == 0", False),
        ("other is defined and other.x > 3", False),
        ("triage['relevance'] == 5", True),
    ],
)
def test_evaluates(source: str, holds: bool):
    assert compile_condition(source).evaluate(VALUES) is holds


def test_names_and_paths():
    condition = compile_condition("triage.eligible and triage['relevance'] >= limit and a.b.c is defined")
    assert condition.names == {"triage", "limit", "a"}
    assert condition.paths == {"triage.eligible", "triage.relevance", "limit", "a.b.c"}


def test_undefined_is_an_error_with_a_suggestion():
    with pytest.raises(UndefinedVariable) as caught:
        compile_condition("triage.elegible").evaluate(VALUES)
    assert caught.value.name == "triage.elegible"
    assert caught.value.hint == "did you mean 'eligible'?"
    with pytest.raises(UndefinedVariable):
        compile_condition("nothing").evaluate(VALUES)


def test_short_circuit_does_not_read_the_rest():
    assert compile_condition("not triage.eligible and missing.x").evaluate(VALUES) is False


def test_problems_against_samples():
    problems = compile_condition("triage.eligible and ranking.rank <= 3").problems(VALUES)
    assert [(p.line, p.column, p.message) for p in problems] == [(1, 21, "'ranking' is not defined")]
    assert compile_condition("ranking is defined and ranking.rank <= 3").problems(VALUES) == []


@pytest.mark.parametrize(
    ("source", "column"), [("a b", 3), ("a and", 6), ("(a", 3), ("a ==", 5), ("a == 'x", 6), ("a }} b", 3), ("", 1)]
)
def test_syntax_errors_have_a_column(source: str, column: int):
    with pytest.raises(TemplateSyntaxProblem) as caught:
        compile_condition(source)
    assert (caught.value.line, caught.value.column) == (1, column)


@pytest.mark.parametrize("source", ["a.__class__", "f(1)", "a.items()", "a | attr('x')", "self", "a is callable"])
def test_the_sandbox_holds(source: str):
    with pytest.raises(UnsafeTemplate):
        compile_condition(source)


def test_comparing_text_with_a_number_fails_clearly():
    with pytest.raises(RenderFailed):
        compile_condition("x > 3").evaluate({"x": "five"})
