"""What PromptEngine promises to a pack author and to the worker that renders."""

import threading

import pytest

from prompts import (
    UNKNOWN,
    EmptyPrompt,
    PromptEngine,
    PromptTooLarge,
    RenderedPrompt,
    RenderFailed,
    RenderLimits,
    TemplateNotFound,
    TemplateSyntaxProblem,
    UndefinedVariable,
    UnsafeTemplate,
)


def render(source: str, **values: object) -> str:
    return PromptEngine({"p": source}).render_prompt("p", values).user


def test_renders_system_role_and_user_message():
    source = '+++\nrole = "a reviewer"\nsystem = "Work for {{ team }}."\n+++\nJudge {{ name }}.\n'
    prompt = PromptEngine({"p": source}).render_prompt("p", {"team": "us", "name": "x"})
    assert prompt == RenderedPrompt("You are a reviewer.\n\nWork for us.", "Judge x.")


def test_system_is_none_without_system_text_and_role():
    assert PromptEngine({"p": "hello"}).render_prompt("p", {}).system is None


@pytest.mark.parametrize("text", ["{{ 7*7 }}", "{% raw %}", "{#", "{% include 'p' %}", "{{ secret }}", "+++"])
def test_template_syntax_inside_values_is_text(text: str):
    assert render("<{{ x }}>", x=text, secret="s") == f"<{text}>"


def test_data_keys_win_over_python_attributes():
    assert render("{{ totals.items }} {{ totals.keys }}", totals={"items": 53, "keys": 2}) == "53 2"


def test_lists_and_mappings_print_as_json():
    assert render("{{ x }}", x={"ä": [1, None, True, "b"]}) == '{"ä": [1, null, true, "b"]}'


def test_loops_conditions_filters_and_includes():
    sources = {
        "p": "{% for k, v in m | items %}{{ loop.index }}{{ k }}={{ v }}{% if not loop.last %}, {% endif %}{% endfor %}"
        "{% include 'tail' %}",
        "tail": " {{ xs | map('upper') | join('-') }} {{ rows | selectattr('ok') | map(attribute='n.d') | list }}",
    }
    values = {"m": {"a": 1, "b": 2}, "xs": ["x", "y"], "rows": [{"ok": True, "n": {"d": 5}}, {"ok": False}]}
    assert PromptEngine(sources).render_prompt("p", values).user == "1a=1, 2b=2 X-Y [5]"


def test_included_templates_see_loop_variables():
    engine = PromptEngine({"p": "{% for x in xs %}{% include 'row' %}{% endfor %}", "row": "[{{ x }}]"})
    assert engine.render_prompt("p", {"xs": [1, 2]}).user == "[1][2]"


@pytest.mark.parametrize("source", ["", "  \n\t", "{% if false %}x{% endif %}", "{# only a comment #}"])
def test_an_empty_prompt_is_an_error(source: str):
    with pytest.raises(EmptyPrompt):
        render(source)


def test_missing_name_has_line_column_and_suggestion():
    with pytest.raises(UndefinedVariable) as caught:
        render("one\ntwo {{ projct_name }}", project_name="x")
    error = caught.value
    assert (error.name, error.line, error.column) == ("projct_name", 2, 8)
    assert error.hint == "did you mean 'project_name'?"


def test_missing_attribute_has_its_dotted_path():
    with pytest.raises(UndefinedVariable) as caught:
        render("a\n\n{{ metrics.comits }}", metrics={"commits": 3})
    assert (caught.value.name, caught.value.line) == ("metrics.comits", 3)
    assert "commits" in (caught.value.hint or "")


def test_missing_name_in_an_include_names_the_include():
    engine = PromptEngine({"p": "\n\n{% include 'inner' %}", "inner": "x\n{{ nope }}"})
    with pytest.raises(UndefinedVariable) as caught:
        engine.render_prompt("p", {})
    assert (caught.value.template, caught.value.line) == ("inner", 2)


def test_lines_count_the_front_matter():
    source = '+++\nrole = "x"\nsystem = """\nfine\n{{ nosystem }}\n"""\n+++\nbody\n{{ nobody }}\n'
    problems = PromptEngine({"p": source}).validate_variables("p", {})
    assert [(p.line, p.column) for p in problems] == [(5, 4), (9, 4)]


def test_default_and_defined_guard_missing_values():
    source = (
        "{{ a | default('-') }}{% if b.c is defined and b.c.d %}{{ b.c.d }}{% endif %}{{ e.f if e is defined else 0 }}"
    )
    assert PromptEngine({"p": source}).validate_variables("p", {"b": {}}) == []
    assert render(source, b={}) == "-0"


def test_guard_does_not_reach_beyond_its_branch():
    source = "{% if a is defined %}{{ a }}{% endif %}\n{{ a }}"
    assert [p.line for p in PromptEngine({"p": source}).validate_variables("p", {})] == [2]


def test_validate_returns_all_problems_at_once():
    source = "{{ x | lenght }}\n{{ nope }}\n{{ m.b }}\n{% for e in rows %}{{ e.item.z }}{{ e.q }}{% endfor %}\n"
    source += "{{ u.any.thing }}"
    available = {"x": "", "m": {"a": 1}, "rows": [{"item": {"y": 1}}, {"q": 2}], "u": UNKNOWN}
    problems = PromptEngine({"p": source}).validate_variables("p", available)
    assert [(p.line, p.message.split("'")[1]) for p in problems] == [
        (1, "lenght"), (2, "nope"), (3, "m.b"), (4, "e.item.z"),
    ]  # fmt: skip
    assert problems[0].hint == "did you mean 'length'?"


def test_set_with_and_loop_names_are_known():
    source = "{% set a = m.x %}{{ a }}{% with b = a %}{{ b }}{% endwith %}"
    source += "{% for c in range(2) %}{{ loop.index0 }}{{ c }}{% endfor %}"
    assert PromptEngine({"p": source}).validate_variables("p", {"m": {"x": 1}}) == []


@pytest.mark.parametrize(
    ("source", "line", "column"),
    [
        ("a\n{{ repo.name }\nb", 2, 14),
        ("{% if x y %}{% endif %}", 1, 9),
        ("ab\n{% fro x in y %}", 2, 4),
        ("{{ a ? b }}", 1, 6),
    ],
)
def test_syntax_errors_have_line_and_column(source: str, line: int, column: int):
    with pytest.raises(TemplateSyntaxProblem) as caught:
        render(source)
    assert (caught.value.line, caught.value.column) == (line, column)


def test_unknown_tag_suggests_the_right_one():
    (problem,) = PromptEngine({"p": "{% fro x in y %}{% endfor %}"}).validate_variables("p", {})
    assert problem.hint == "did you mean 'for'?"


@pytest.mark.parametrize(
    ("front", "part"),
    [
        ('sytem = "x"', "did you mean 'system'"),
        ("role = 3", "must be text"),
        ('role = "{{ x }}"', "plain text"),
        ("role = ", "not TOML"),
        ('system = "{{ x"', "unexpected"),
    ],
)
def test_front_matter_faults(front: str, part: str):
    (problem,) = PromptEngine({"p": f"+++\n{front}\n+++\nbody"}).validate_variables("p", {})
    assert part in str(problem)
    assert problem.line in (2, None)


def test_unclosed_front_matter_is_an_error():
    with pytest.raises(TemplateSyntaxProblem, match="not closed"):
        render('+++\nrole = "x"\nbody')


def test_front_matter_reads_windows_newlines_and_a_byte_order_mark():
    prompt = PromptEngine({"p": '\ufeff+++\r\nrole = "x"\r\n+++\r\nbody\r\n'}).render_prompt("p", {})
    assert prompt == RenderedPrompt("You are x.", "body")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a\\b", "~/x", "./p", "c:x", "a\x00"])
def test_includes_cannot_leave_the_pack(name: str):
    sources = {"p": "{% include '" + name.replace("\\", "\\\\") + "' %}", "b": "b", name: "content"}
    with pytest.raises(UnsafeTemplate, match="reaches out"):
        PromptEngine(sources).load_template("p")


def test_include_cycles_are_named():
    engine = PromptEngine({"a": "{% include 'b' %}", "b": "\n{% include 'a' %}", "self": "{% include 'self' %}"})
    with pytest.raises(TemplateSyntaxProblem, match="a -> b -> a"):
        engine.load_template("a")
    with pytest.raises(TemplateSyntaxProblem, match="self -> self"):
        engine.cache_template("self")


def test_missing_templates_are_suggested():
    engine = PromptEngine({"quality.md.j2": "{% include 'rubrik.j2' %}", "rubric.j2": "x"})
    with pytest.raises(TemplateNotFound, match=r"rubric\.j2"):
        engine.load_template("quality.md.j2")
    with pytest.raises(TemplateNotFound, match=r"quality\.md\.j2"):
        engine.load_template("qualty.md.j2")


def test_operations_that_fail_on_the_values_are_reported_with_their_line():
    for source in ("\n{{ 1 / x }}", "\n{{ m | sort }}", "\n{{ x + 'a' }}"):
        with pytest.raises(RenderFailed) as caught:
            render(source, x=0, m=[1, "a"])
        assert caught.value.line == 2


def test_digest_depends_on_includes_and_nothing_else():
    def digest(inner: str, other: str) -> str:
        return PromptEngine({"p": "{% include 'i' %}", "i": inner, "other": other}).load_template("p").digest

    assert digest("a", "x") == digest("a", "y") != digest("b", "x")


def test_source_and_output_caps():
    with pytest.raises(PromptTooLarge):
        render("x" * 200_001)
    small = PromptEngine({"p": "{% for x in range(50) %}{{ s }}{% endfor %}"}, RenderLimits(output_chars=100))
    with pytest.raises(PromptTooLarge):
        small.render_prompt("p", {"s": "abc"})


def test_rendering_changes_neither_values_nor_sources():
    sources = {"p": "{{ x | sort | join }}{% set x = 1 %}"}
    engine, values = PromptEngine(sources), {"x": ["b", "a"]}
    sources["p"] = "changed"
    assert engine.render_prompt("p", values).user == "ab"
    assert values == {"x": ["b", "a"]}


def test_threads_render_their_own_values():
    engine = PromptEngine({"p": "{% for i in range(20) %}{{ x }}{% endfor %}{% include 'q' %}", "q": "{{ x }}"})
    wrong: list[int] = []

    def work(number: int) -> None:
        if any(engine.render_prompt("p", {"x": number}).user != str(number) * 21 for _ in range(50)):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
