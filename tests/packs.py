"""Small packs for the engine's tests, written to a folder when they are used."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

_SCORE = """
[steps.answer]
format = "json"
[steps.answer.fields.score]
type = "integer"
minimum = 0
maximum = 10
[steps.answer.fields.reason]
type = "string"
"""


@dataclass(frozen=True, slots=True)
class Pack:
    """A declaration and its templates.

    Attributes:
        calls_per_item: calls that each item causes when no condition skips any.
        reduce_calls: calls of steps that look at all items.
    """

    workflow: str
    templates: tuple[tuple[str, str], ...]
    calls_per_item: int
    reduce_calls: int = 0

    def write(self, root: Path) -> Path:
        """Writes the pack to a folder named after its content; safe to repeat."""
        folder = root / sha256(repr(self).encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "workflow.toml").write_text(self.workflow)
        for name, text in self.templates:
            (folder / name).write_text(text)
        return folder


def one_step(
    *, attempts: int = 4, reasks: int = 1, fallback: bool = False, cache: bool = False, tokens: int = 60
) -> Pack:
    """One question about every item."""
    head = f"""
name = "single"
version = "1"
item_key = "key"
[routing]
max_output_tokens = {tokens}
{'fallback = ["spare"]' if fallback else ""}
[[steps]]
name = "judge"
prompt = "judge.md.j2"
retry = {{ attempts = {attempts}, reasks = {reasks} }}
cache = {str(cache).lower()}
timeout_s = 20
"""
    return Pack(head + _SCORE, (("judge.md.j2", "How good is this? {{ text }}"),), calls_per_item=1)


ONE = one_step()

SURVEY = Pack(
    f"""
name = "survey"
version = "1"
item_key = "key"
[routing]
max_output_tokens = 60
[[steps]]
name = "judge"
prompt = "judge.md.j2"
timeout_s = 20
cache = false
{_SCORE}
[[steps]]
name = "review"
prompt = "review.md.j2"
needs = ["judge"]
timeout_s = 20
cache = false
{_SCORE}
[[steps]]
name = "ranking"
kind = "reduce"
needs = ["review"]
[steps.reduce]
rule = "rank"
step = "review"
weights = {{ score = 1 }}
[[steps]]
name = "report"
kind = "reduce"
needs = ["review", "ranking"]
prompt = "report.md.j2"
timeout_s = 20
cache = false
[steps.reduce]
rule = "llm"
ranking = "ranking"
top = 3
""",
    (
        ("judge.md.j2", "How good is this? {{ text }}"),
        ("review.md.j2", "Is a score of {{ judge.score }} right for this? {{ text }}"),
        ("report.md.j2", "Explain: {% for entry in entries %}{{ entry.key }} {{ entry.score }} {% endfor %}"),
    ),
    calls_per_item=2,
    reduce_calls=1,
)

CHOOSY = Pack(
    SURVEY.workflow.replace('needs = ["judge"]', 'needs = ["judge"]\nwhen = "size < 4"', 1),
    SURVEY.templates,
    calls_per_item=2,
    reduce_calls=1,
)
"""SURVEY, but only the first four items are reviewed."""

GRAPH = Pack(
    f"""
name = "graph"
version = "1"
item_key = "key"
[routing]
max_output_tokens = 60
[[steps]]
name = "first"
prompt = "first.md.j2"
timeout_s = 20
cache = false
{_SCORE}
[[steps]]
name = "left"
prompt = "left.md.j2"
needs = ["first"]
timeout_s = 20
cache = false
{_SCORE}
[[steps]]
name = "right"
prompt = "right.md.j2"
needs = ["first"]
repeats = 2
timeout_s = 20
cache = false
{_SCORE}
[[steps]]
name = "last"
prompt = "last.md.j2"
needs = ["left", "right"]
timeout_s = 20
cache = false
{_SCORE}
""",
    (
        ("first.md.j2", "First: {{ text }}"),
        ("left.md.j2", "Left: {{ first.score }} {{ text }}"),
        ("right.md.j2", "Right: {{ first.score }} {{ text }}"),
        ("last.md.j2", "Last: {{ left.score }} {{ right.score }} {{ text }}"),
    ),
    calls_per_item=5,
)
"""Three levels with two steps side by side, one of them asked twice."""
