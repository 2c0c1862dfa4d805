"""Bad input is told whole and at once, each fault with its code, its place and a way out, before anything is spent.

The table runs in this process against the same manager that the command line calls; a few cases go through a real
process, which adds exit codes, streams and what is left on disk.
"""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import ConfigManager
from orchestrator.errors import ConfigError, EnvironmentNotReady, ExitCode, InvalidInput, Problem
from orchestrator.manager import RunRequest, WorkflowManager

ROOT = Path(__file__).parents[2]
CANARY = "sk-proj-canary0123456789abcdef0123456789abcdef"

WORKFLOW = """name = "picks"
version = "1"
item_key = "id"

[variables.topic]
default = "tools"

[[steps]]
name = "look"
prompt = "look.md.j2"
answer = { fields = { score = { type = "integer", minimum = 0, maximum = 10 } } }

[[steps]]
name = "check"
prompt = "check.md.j2"
needs = ["look"]
when = "look.score >= 5"

[[steps]]
name = "order"
kind = "reduce"
needs = ["look"]
reduce = { rule = "rank", step = "look", weights = { score = 1 } }
"""
PACK: Mapping[str, str | bytes] = {
    "pack/workflow.toml": WORKFLOW,
    "pack/look.md.j2": "Judge {{ title }} as one of {{ topic }}.\n",
    "pack/check.md.j2": "Is {{ look.score }} right for {{ item.title }}?\n",
    "items.csv": "id,title\na,Alpha\nb,Beta\n",
}


@dataclass(frozen=True)
class Case:
    """A way to be wrong.

    Attributes:
        changes: files on top of `PACK`; None takes one away.
        expected: code and end of the place of every problem.
        hint: part of what the first problem says to do.
    """

    expected: tuple[tuple[str, str], ...]
    changes: Mapping[str, str | bytes | None] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    hint: str = ""
    exit_code: ExitCode = ExitCode.INVALID_INPUT


def declared(old: str, new: str) -> dict[str, str]:
    assert old in WORKFLOW
    return {"pack/workflow.toml": WORKFLOW.replace(old, new)}


def items(content: str | bytes, name: str = "items.csv") -> dict[str, Any]:
    return {"changes": {name: content}, "request": {"input": name}}


def look(template: str) -> dict[str, str]:
    return {"pack/look.md.j2": template}


UNPRICED = '[llm_providers.mine]\ndialect = "openai"\nbase_url = "http://localhost:1/v1"\ndefault_model = "m"\n'

CASES: dict[str, Case] = {
    # The pack as a whole.
    "no-such-pack": Case((("pack.missing", "picsk"),), request={"pack": "picsk"}),
    "misspelt-pack": Case(
        (("pack.missing", "project_selecton"),),
        request={"pack": "project_selecton"},
        hint="did you mean 'project_selection'?",
    ),
    "pack-is-a-file": Case((("pack.not-a-folder", "items.csv"),), request={"pack": "items.csv"}),
    "pack-without-workflow": Case((("pack.no-workflow", "pack"),), {"pack/workflow.toml": None}),
    "pack-name-with-nul": Case((("pack.missing", r"'a\x00b'"),), request={"pack": "a\0b"}),
    "pack-and-items-missing": Case(
        (("pack.missing", "nowhere"), ("items.unreadable", "none.csv")),
        request={"pack": "nowhere", "input": "none.csv"},
    ),
    # The declaration.
    "declaration-empty": Case((("workflow.missing-key", "workflow.toml"),) * 3, {"pack/workflow.toml": ""}),
    "declaration-not-toml": Case((("toml.syntax", "workflow.toml:2:4"),), {"pack/workflow.toml": 'name = "w"\nx =\n'}),
    "declaration-yaml": Case((("toml.syntax", "workflow.toml:1:5"),), {"pack/workflow.toml": "name: w\n"}),
    "declaration-not-utf8": Case((("file.encoding", "workflow.toml:1:9"),), {"pack/workflow.toml": b"name = '\xe4'\n"}),
    "declaration-twice-the-key": Case(
        (("toml.duplicate-key", "workflow.toml:2:1"),), declared('version = "1"\n', 'name = "again"\n')
    ),
    "unknown-key": Case(
        (("workflow.unknown-key", ":12:1"),),
        declared('\n[[steps]]\nname = "check"', 'tiemout_s = 5\n\n[[steps]]\nname = "check"'),
        hint="did you mean 'timeout_s'?",
    ),
    "unknown-key-in-field": Case(
        (("workflow.unknown-key", "workflow.toml:11:51"),),
        declared("minimum = 0", "minimun = 0"),
        hint="did you mean 'minimum'?",
    ),
    "wrong-type": Case((("workflow.bad-value", ":17:1"),), declared('when = "look.score >= 5"', "repeats = '2'")),
    "wrong-kind": Case(
        (("workflow.bad-value", "workflow.toml:21:1"),), declared('"reduce"', '"redcue"'), hint="did you mean 'reduce'?"
    ),
    "cycle": Case(
        (("workflow.cycle", ""),),
        declared('prompt = "look.md.j2"', 'prompt = "look.md.j2"\nneeds = ["check"]'),
    ),
    "unknown-need": Case(
        (("workflow.unknown-step", "workflow.toml:16:10"),),
        declared('needs = ["look"]\nwhen', 'needs = ["lok"]\nwhen'),
        hint="did you mean 'look'?",
    ),
    "duplicate-step": Case(
        (("workflow.duplicate-name", ":25:1"),),
        {"pack/workflow.toml": WORKFLOW + '[[steps]]\nname = "check"\nprompt = "look.md.j2"\n'},
    ),
    "reserved-name": Case((("workflow.reserved-name", "workflow.toml:14:1"),), declared('"check"', '"item"')),
    "name-is-a-path": Case((("workflow.bad-name", "workflow.toml:14:1"),), declared('"check"', '"../check"')),
    "weights": Case((("workflow.bad-weights", "workflow.toml:23:42"),), declared("score = 1 }", "score = 0 }")),
    "unknown-field": Case(
        (("workflow.unknown-field", "workflow.toml:23:54"),),
        declared("weights = { score", "weights = { scroe"),
        hint="did you mean 'score'?",
    ),
    "impossible-range": Case((("workflow.answer", ":11:51"),), declared("minimum = 0", "minimum = 11")),
    "budget-of-the-pack": Case(
        (("workflow.bad-budget", "workflow.toml:9:1"),),
        declared('default = "tools"\n', 'default = "tools"\n\n[budget]\nmax_usd = "much"\n'),
    ),
    "missing-template": Case(
        (("pack.missing-file", "workflow.toml:10:1"),), {"pack/look.md.j2": None}, hint="did you mean 'check.md.j2'?"
    ),
    "missing-schema": Case(
        (("pack.missing-file", "workflow.toml:17:12"),),
        declared('when = "look.score >= 5"', 'answer = { schema = "a.json" }'),
    ),
    "template-outside": Case(
        (("pack.missing-file", "workflow.toml:10:1"),), declared('"look.md.j2"', '"../../etc/passwd"')
    ),
    # Templates.
    "undefined-variable": Case(
        (("template.invalid", "look.md.j2:1:4"),), look("{{ titel }}"), hint="did you mean 'title'?"
    ),
    "undefined-attribute": Case(
        (("template.invalid", "check.md.j2:2:5"),),
        {"pack/check.md.j2": "a\n.{{ look.scroe }}"},
        hint="did you mean 'score'?",
    ),
    "syntax-of-a-template": Case((("template.invalid", "look.md.j2:2:10"),), look("fine\n{{ title }")),
    "block-that-never-ends": Case((("template.invalid", "look.md.j2:1:16"),), look("{% if title %}x")),
    "unknown-filter": Case((("template.invalid", "look.md.j2:1"),), look("{{ title | shout }}")),
    "escape-from-the-sandbox": Case(
        (*[("template.invalid", "look.md.j2:1")] * 4, ("template.invalid", "look.md.j2:1:7")),
        look("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ),
    "include-outside": Case((("template.invalid", "look.md.j2:1:13"),), look("{% include '../../../etc/passwd' %}")),
    "include-absolute": Case((("template.invalid", "look.md.j2:1:13"),), look("{% include '/etc/passwd' %}")),
    "include-itself": Case((("template.invalid", "look.md.j2:1:13"),), look("{% include 'look.md.j2' %}")),
    "include-missing": Case((("template.invalid", "look.md.j2:1:13"),), look("{% include 'rules.j2' %}")),
    "condition": Case(
        (("workflow.bad-condition", "workflow.toml:17:1"),),
        declared("look.score >= 5", "look.scor >= 5"),
        hint="did you mean 'score'?",
    ),
    "condition-syntax": Case((("workflow.bad-condition", ":17:1"),), declared("look.score >= 5", "look.score >=")),
    # Items.
    "no-items": Case((("items.unreadable", "none.csv"),), request={"input": "none.csv"}),
    "no-sample-items": Case((("items.none", "pack"),), request={"input": None}, hint="--input"),
    "items-are-a-folder": Case((("items.not-regular", "pack"),), request={"input": "pack"}),
    "items-empty": Case((("items.empty", "items.csv"),), **items("")),
    "items-header-alone": Case((("items.empty", "items.csv"),), **items("id,title\n")),
    "duplicate-key-of-items": Case((("items.duplicate-key", ":4"),), **items("id,title\na,x\nb,y\na,z\n")),
    "blank-key": Case((("items.blank-key", "items.csv:3"),), **items("id,title\na,x\n  ,y\n")),
    "key-field-missing": Case((("items.missing-key", "items.csv:2"),), **items("ident,title\na,x\nb,y\n")),
    "key-too-long": Case((("items.bad-key", "items.csv:2"),), **items(f"id,title\n{'k' * 201},x\n")),
    "ragged": Case((("items.ragged", ":3"), ("items.ragged", ":4")), **items("id,title\na,x\nb\nc,y,z\nd,w\n")),
    "quote-never-closed": Case((("items.csv", "items.csv:3"),), **items('id,title\na,x\nb,"y\n')),
    "header-twice": Case((("items.header", "items.csv:1"),), **items("id,title,title\na,x,y\n")),
    "items-not-utf8": Case((("items.encoding", "items.csv:3:3"),), **items(b"id,title\na,x\nb,\xe4\n")),
    "items-utf16": Case((("items.encoding", "items.csv"),), **items("id,title\na,x\n".encode("utf-16"))),
    "jsonl-broken-lines": Case(
        (("items.json", "items.jsonl:2:12"), ("items.json", "items.jsonl:4:1")),
        **items('{"id":"a","title":"x"}\n{"id":"b", }\n{"id":"c","title":"y"}\nnope\n', "items.jsonl"),
    ),
    "jsonl-of-numbers": Case((("items.not-an-object", ":1"),), **items("1\n", "items.jsonl")),
    "limit-zero": Case((("items.bad-selection", "--limit"),), request={"limit": 0}),
    "sample-negative": Case((("items.bad-selection", "--sample"),), request={"sample": -3}),
    # What was asked for on the command line.
    "unknown-variable": Case(
        (("variable.unknown", "--var topci"),), request={"variables": {"topci": "x"}}, hint="did you mean 'topic'?"
    ),
    "variable-of-wrong-type": Case(
        (("variable.bad-value", "--var topic"),),
        declared('default = "tools"', 'type = "integer"\ndefault = 1'),
        {"variables": {"topic": "many"}},
    ),
    "required-variable": Case(
        (("variable.bad-value", "--var topic"),), declared('default = "tools"', "required = true")
    ),
    "budget-zero": Case((("budget.invalid", "--budget"),), request={"budget_usd": Decimal(0)}),
    "budget-no-number": Case((("budget.invalid", "--budget"),), request={"budget_usd": Decimal("NaN")}),
    "budget-too-small-to-exist": Case((("budget.invalid", "--budget"),), request={"budget_usd": Decimal("1e-12")}),
    "unknown-provider": Case(
        (("route.unknown-provider", "--provider"),),
        request={"provider": "simulatr"},
        hint="did you mean 'simulator'?",
    ),
    "unknown-model": Case(
        (("route.unknown-price", "step 'look'"), ("route.unknown-price", "step 'check'")),
        request={"provider": "openai", "model": "gpt-6-soll"},
        environ={"OPENAI_API_KEY": CANARY},
        hint="did you mean 'gpt-6-sol'?",
    ),
    "unknown-price": Case(
        (("route.unknown-price", "step 'look'"), ("route.unknown-price", "step 'check'")),
        request={"provider": "mine"},
        config=UNPRICED,
        hint="cost_per_1k_input_tokens",
    ),
    # The installation.
    "unknown-setting": Case(
        (("config.unknown-key", "llm-orchestrator.toml:2:1"),),
        config='[global]\ndefault_provder = "openai"\n',
        hint="did you mean 'default_provider'?",
    ),
    "setting-of-wrong-type": Case(
        (("config.invalid-value", "llm-orchestrator.toml:2:1"),), config='[worker]\nlanes = "four"\n'
    ),
    "key-in-a-file": Case(
        (("config.literal-key", "llm-orchestrator.toml:2:1"),),
        config=f'[llm_providers.openai]\napi_key = "{CANARY}"\n',
        hint="api_key_env",
    ),
    "database-of-another-kind": Case(
        (("config.bad-address", "DATABASE_URL"),), environ={"DATABASE_URL": "mysql://root:hunter2@db/x"}
    ),
    "broker-of-another-kind": Case(
        (("config.bad-address", "REDIS_URL"),), environ={"REDIS_URL": "amqp://guest:hunter2@mq"}
    ),
    "missing-key": Case(
        (("key.missing", "OPENAI_API_KEY"),),
        request={"provider": "openai"},
        config="[llm_providers.openai]\n",
        hint="OPENAI_API_KEY",
        exit_code=ExitCode.NOT_READY,
    ),
    "missing-key-of-a-provider-that-is-named-nowhere": Case(
        (("key.missing", "--provider"),),
        request={"provider": "openai"},
        hint="OPENAI_API_KEY",
        exit_code=ExitCode.NOT_READY,
    ),
    "database-away": Case(
        (("database.unavailable", "127.0.0.1:1/x"),),
        environ={"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"},
        exit_code=ExitCode.NOT_READY,
    ),
    "database-is-a-folder": Case(
        (("database.unavailable", "pack"),),
        environ={"DATABASE_URL": "sqlite:///pack"},
        exit_code=ExitCode.NOT_READY,
    ),
    "database-is-no-database": Case(
        (("database.unavailable", "items.csv"),),
        {"items.csv": "id,title\n" + "".join(f"{n},{'x' * 40}\n" for n in range(40))},
        environ={"DATABASE_URL": "sqlite:///items.csv"},
        exit_code=ExitCode.NOT_READY,
    ),
    # Several at once, from every corner.
    "everything": Case(
        (
            ("items.bad-selection", "--limit"),
            ("items.ragged", "bad.csv:3"),
            ("items.blank-key", "bad.csv:4"),
            ("items.duplicate-key", "bad.csv:5"),
            ("workflow.unknown-key", "workflow.toml:15:1"),
            ("workflow.bad-value", "workflow.toml:16:1"),
            ("workflow.answer", "workflow.toml:11:51"),
            ("workflow.bad-condition", "workflow.toml:18:1"),
            ("pack.missing-file", "workflow.toml:13:1"),
            ("template.invalid", "look.md.j2:1:4"),
            ("template.invalid", "look.md.j2:2:4"),
            ("variable.unknown", "--var colour"),
            ("budget.invalid", "--budget"),
            ("route.unknown-provider", "--provider"),
        ),
        {
            "pack/workflow.toml": WORKFLOW.replace("minimum = 0", "minimum = 20")
            .replace('prompt = "check.md.j2"\n', 'promt = "chek.md.j2"\nrepeats = "2"\n')
            .replace("look.score >= 5", "look.scroe >= 5"),
            "pack/look.md.j2": "{{ titel }}\n{{ topci }}",
            "bad.csv": "id,title\na,x\nb\n ,y\na,z\n",
        },
        {
            "input": "bad.csv",
            "limit": -1,
            "variables": {"colour": "red"},
            "budget_usd": Decimal(-5),
            "provider": "simulatro",
        },
    ),
}


def write(directory: Path, case: Case) -> None:
    for name, content in {**PACK, **case.changes}.items():
        if content is None:
            continue
        path = directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.config:
        (directory / "llm-orchestrator.toml").write_text(case.config)


def plan(directory: Path, case: Case) -> None:
    """Plans a run as the command line does, in the current directory."""
    home = {"LLM_ORCHESTRATOR_HOME": str(directory / "state")}
    config = ConfigManager(cwd=directory, environ={**home, **case.environ}, user_config=directory / "no-user.toml")
    request: dict[str, Any] = {"pack": "pack", "input": "items.csv", **case.request}
    with WorkflowManager(config) as manager:
        manager.plan(RunRequest(**request))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_right_is_planned(directory: Path):
    case = Case(())
    write(directory, case)
    plan(directory, case)
    assert not (directory / "state").exists()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_told_at_once(case: Case, directory: Path):
    write(directory, case)
    with pytest.raises((InvalidInput, EnvironmentNotReady)) as caught:
        plan(directory, case)
    problems = caught.value.problems
    assert_told(problems, case)
    assert caught.value.exit_code == case.exit_code
    assert not (directory / "state").exists(), "nothing was written"


def assert_told(problems: tuple[Problem, ...], case: Case) -> None:
    """Exactly the expected problems, in any order, each of them fit to be read."""
    left = list(problems)
    for code, place in case.expected:
        found = next((one for one in left if one.code == code and one.place.endswith(place)), None)
        assert found is not None, f"{code} at {place} is not among {[(one.code, one.place) for one in left]}"
        left.remove(found)
    assert left == []
    text = str("\n".join(one.render() for one in problems))
    for secret in (CANARY, "hunter2"):
        assert secret not in text
    for one in problems:
        assert one.message
        assert "\n" not in one.message
        assert len(one.message) < 500
    assert not case.hint or case.hint in (next(one.hint for one in problems if one.code == case.expected[0][0]) or "")


def test_missing_keys_are_told_beside_other_problems(directory: Path):
    """A person who repairs the template must not learn of the key only then."""
    case = Case(
        (("template.invalid", "look.md.j2:1:4"), ("key.missing", "OPENAI_API_KEY")),
        look("{{ titel }}"),
        {"provider": "openai"},
        config="[llm_providers.openai]\n",
    )
    write(directory, case)
    with pytest.raises(InvalidInput) as caught:
        plan(directory, case)
    assert_told(caught.value.problems, case)


def test_a_million_bad_rows_are_counted_and_a_few_are_shown(directory: Path):
    case = Case(())
    rows = "".join(f"k{n}\n" for n in range(20_000))
    write(directory, Case((), {"items.csv": "id,title\n" + rows}))
    with pytest.raises(InvalidInput) as caught:
        plan(directory, case)
    assert len(caught.value.problems) == 50


def test_a_symbolic_link_out_of_the_pack_is_refused(directory: Path):
    case = Case((("pack.link-outside", "secret.j2"),))
    write(directory, case)
    (directory / "pack" / "secret.j2").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput) as caught:
        plan(directory, case)
    assert_told(caught.value.problems, case)


def test_a_pipe_instead_of_a_file_does_not_hang(directory: Path):
    case = Case((("items.not-regular", "pipe.csv"),), request={"input": "pipe.csv"})
    write(directory, case)
    os.mkfifo(directory / "pipe.csv")
    with pytest.raises(InvalidInput) as caught:
        plan(directory, case)
    assert_told(caught.value.problems, case)


def test_a_broken_configuration_is_told_before_anything_is_opened(directory: Path):
    write(directory, CASES["unknown-setting"])
    with pytest.raises(ConfigError):
        plan(directory, CASES["unknown-setting"])


def call(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own, without the machine's configuration."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}  # noqa: TID251
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=directory,
        env=kept | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": "/nonexistent"} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def attempts(directory: Path) -> int:
    """Rows in the ledger; 0 where there is no database."""
    path = directory / "data" / "orchestrator.db"
    if not path.exists():
        return 0
    with sqlite3.connect(path) as connection:
        (count,) = connection.execute("SELECT count(*) FROM llm_usage").fetchone()
    connection.close()
    return count


def test_the_command_prints_everything_and_leaves_with_3(directory: Path):
    write(directory, CASES["everything"])
    done = call(
        directory, "run", "pack", "--input", "bad.csv", "--var", "colour=red", "--provider", "simulatro", "--yes"
    )
    assert done.returncode == ExitCode.INVALID_INPUT
    assert done.stdout == ""
    for code, _ in CASES["everything"].expected:
        if code not in ("items.bad-selection", "budget.invalid"):
            assert f"error[{code}]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (directory / "data" / "orchestrator.db").exists()


def test_the_command_tells_problems_as_data(directory: Path):
    write(directory, CASES["undefined-variable"])
    done = call(directory, "validate", "pack", "--input", "items.csv", "--json")
    assert done.returncode == ExitCode.INVALID_INPUT
    told = json.loads(done.stdout)
    assert told["valid"] is False
    (problem,) = told["problems"]
    assert (problem["code"], problem["hint"]) == ("template.invalid", "did you mean 'title'?")
    assert problem["place"].endswith("look.md.j2:1:4")


@pytest.mark.parametrize(
    ("environ", "arguments", "told"),
    [
        ({}, ("--provider", "openai"), "error[key.missing] OPENAI_API_KEY"),
        ({"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"}, (), "error[database.unavailable]"),
        ({"REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"}, (), "error["),
    ],
    ids=["key", "database", "broker"],
)
def test_the_command_leaves_with_6_when_something_outside_is_missing(
    directory: Path, environ: dict[str, str], arguments: tuple[str, ...], told: str
):
    write(directory, Case((), config="[llm_providers.openai]\n" if arguments else ""))
    if "REDIS_URL" in environ:
        assert call(directory, "db", "upgrade", **environ).returncode == 0
    done = call(directory, "run", "pack", "--input", "items.csv", "--yes", *arguments, **environ)
    assert done.returncode == ExitCode.NOT_READY, done.stderr
    assert told in done.stderr
    assert "help:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert attempts(directory) == 0


@pytest.mark.parametrize("arguments", [("run",), ("run", "pack", "--limit", "many"), ("rnu", "pack"), ("run", "--no")])
def test_wrong_usage_leaves_with_2(directory: Path, arguments: tuple[str, ...]):
    done = call(directory, *arguments)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
