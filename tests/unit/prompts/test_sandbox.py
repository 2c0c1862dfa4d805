"""Nothing but data comes out of a template, and no template takes more than its share."""

import time
import tracemalloc

import jinja2
import pytest

from prompts import PromptEngine, PromptError, RenderLimits


class Secret:
    """An object of the program that strayed into the values."""

    token = "canary-1234"

    def __str__(self) -> str:
        return self.token

    def __repr__(self) -> str:
        return self.token

    def __format__(self, spec: str) -> str:
        return self.token

    def method(self) -> str:
        return self.token

    def items(self) -> list[tuple[str, str]]:
        return [("token", self.token)]


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ ''['__cla' + 'ss__']['__mro__'] }}",
    "{% set k = '_' * 2 ~ 'class' ~ '_' * 2 %}{{ x[k] }}",
    "{{ x.__init__.__globals__ }}",
    "{{ x.method() }}",
    "{{ x.method }}",
    "{{ x.token }}",
    "{{ x['token'] }}",
    "{{ x }}",
    "{{ [x] }}",
    "{{ {'a': x} }}",
    "{{ x ~ '' }}",
    "{{ 'a' + x }}",
    "{{ x | string }}",
    "{{ x | upper }}",
    "{{ x | tojson }}",
    "{{ x | fenced }}",
    "{{ x | inert }}",
    "{{ [x] | join }}",
    "{{ [x] | map(attribute='token') | first }}",
    "{{ [x] | map('string') | list }}",
    "{{ [x] | selectattr('token') | list | length / 0 }}",
    "{{ [x] | sum(attribute='token') }}",
    "{{ x | items }}",
    "{{ x | dictsort }}",
    "{{ x | attr('token') }}",
    "{{ '%s' % x }}",
    "{{ '{0.token}'.format(x) }}",
    "{{ '{0.token}' | format(x) }}",
    "{{ ''.format_map({'a': x}) }}",
    "{% set f = ''.format %}{{ f(x) }}",
    "{{ ['{0.token}'] | map('format', x) | list }}",
    "{{ [''] | map(attribute='__class__') | first }}",
    "{{ lipsum.__globals__ }}",
    "{{ lipsum() }}",
    "{{ cycler('a').next }}",
    "{{ joiner() }}",
    "{{ namespace(a=1) }}",
    "{{ dict(a=1) }}",
    "{{ self._TemplateReference__context }}",
    "{{ self }}",
    "{{ loop.__class__ }}{% for a in [1] %}{{ loop._iterable }}{% endfor %}",
    "{% for a in [1] %}{{ loop }}{% endfor %}",
    "{% for a in [1] %}{{ loop.__init__ }}{% endfor %}",
    "{% for a in [1] recursive %}{{ loop([x]) }}{% endfor %}",
    "{{ range.__self__ }}",
    "{{ range }}",
    "{{ (1).real.__class__ }}",
    "{{ config }}",
    "{{ request.application }}",
    "{% import 'p' as p %}{{ p.__loader__ }}",
    "{% from 'p' import x %}",
    "{% extends 'p' %}",
    "{% block b %}{{ super() }}{% endblock %}",
    "{% macro m() %}{{ caller }}{% endmacro %}{{ m.__globals__ }}",
    "{% call f() %}{% endcall %}",
    "{% include x %}",
    "{% include ['p', 'q'] %}",
    "{{ x | pprint }}",
    "{{ x | safe }}",
    "{{ x | list }}",
    "{{ environment }}",
    "{{ context.environment }}",
    "{{ x | map('~concat') | list }}",
    "{{ (x,) | first | default(1) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_fail_and_reveal_nothing(source: str):
    with pytest.raises(PromptError) as caught:
        PromptEngine({"t": source, "p": "x"}).render_prompt("t", {"x": Secret()})
    assert Secret.token not in str(caught.value)


BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ 9**9**9**9 }}",
    "{{ 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64 * 2**64"
    " * 2**64 * 2**64 * 2**64 * 2**64 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | indent(10**9, true) }}{{ 1/0 }}",
    "{{ 'a' | replace('', 'b' * 100000) | replace('', 'b' * 100000) }}",
    "{{ (['a' * 100000] * 1000) | join('b' * 100000) }}",
    "{{ range(10**9) | list }}",
    "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
    "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% if 'x' in big %}{% endif %}{{ big | upper | lower | trim }}{% endfor %}",
    "{% set a = 'a' * 1000 %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}",
    "{% set a = 'a' * 1000 %}" + "{% set a = a + a %}" * 40 + "{{ a }}",
    "{% set a = [1] %}" + "{% set a = [a, a, a, a, a, a, a, a, a, a] %}" * 30 + "{{ a }}",
    "{% set a = [1] %}{% set b = [1] %}" + "{% set a = [a, a, a, a] %}{% set b = [b, b, b, b] %}" * 30 + "{{ a == b }}",
    "{% set a = {'x': 1} %}" + "{% set a = {'x': a, 'y': a, 'z': a} %}" * 40 + "{{ a | tojson }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 5 | round(-1000000000) / 0 }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{% for a in range(9999) %}{{ big }}{% endfor %}",
    "{% set a %}{% for a in range(9999) %}{{ big }}{% endfor %}{% endset %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{{ " + "1+" * 50000 + "1 }}",
    "{{ " + "9" * 50000 + " }}",
    "{{ a" + ".b" * 50000 + " }}",
    "{{ a" + "|trim" * 30000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for x in [1] %}" * 25 + "{% endfor %}" * 25,
    "{{ [[[1]]] | sum(start=[]) }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_bombs_end_quickly(source: str):
    engine = PromptEngine({"t": source})
    started_s = time.thread_time()
    with pytest.raises(PromptError):
        engine.render_prompt("t", {"big": "y" * 1_000_000})
    assert time.thread_time() - started_s < 2.5


# Those that are large as text only make the parser work, which tracing slows down tenfold.
@pytest.mark.parametrize("source", [bomb for bomb in BOMBS if len(bomb) < 10_000])
def test_bombs_stay_small(source: str):
    big = "y" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(PromptError):
            PromptEngine({"t": source}, RenderLimits(loop_steps=20_000)).render_prompt("t", {"big": big})
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", BOMBS)
def test_validating_a_bomb_ends_without_raising(source: str):
    PromptEngine({"t": source}).validate_variables("t", {"big": "y"})


def test_a_chain_of_includes_cannot_multiply_without_end():
    sources = {f"t{n}": ("{% include 't" + str(n + 1) + "' %}") * 10 for n in range(8)} | {"t8": "x"}
    with pytest.raises(PromptError):
        PromptEngine(sources).render_prompt("t0", {})


def test_the_filters_and_globals_of_jinja_are_gone():
    assert tuple(map(int, jinja2.__version__.split("."))) >= (3, 1, 6)
    for name in ("attr", "format", "xmlattr", "urlize", "pprint", "random", "center", "batch", "slice", "groupby"):
        (problem,) = PromptEngine({"t": "{{ 'a' | " + name + " }}"}).validate_variables("t", {})
        assert f"no filter '{name}'" in problem.message
