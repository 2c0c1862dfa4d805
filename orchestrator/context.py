"""What a template or a condition sees: one flat namespace, built the same way wherever a prompt is rendered.

From weak to strong: the item's fields, the variables, the answers under the names of their steps and aliases, and the
reserved names. A stronger one hides a weaker one of the same name. Values are plain JSON data and nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.workflow import Workflow

Values = dict[str, Any]


def item_context(
    workflow: Workflow, step: str, variables: Mapping[str, Any], item: Mapping[str, Any], answers: Mapping[str, Any]
) -> Values:
    """Names for an item step.

    Args:
        workflow: the declaration.
        step: name of the step that asks.
        variables: values of all declared variables.
        item: fields of the item.
        answers: what earlier steps said, by step: answers about this item, answers of reduce steps, and for a ranking
            `{"rank": ..., "score": ...}` of this item. Steps that said nothing are left out.
    """
    return {
        **item,
        **variables,
        **_named(workflow, answers),
        "item": dict(item),
        "answers": dict(answers),
        "workflow": workflow.name,
        "step": step,
    }


def reduce_context(
    workflow: Workflow,
    step: str,
    variables: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    totals: Mapping[str, int],
    answers: Mapping[str, Any],
) -> Values:
    """Names for a reduce step that asks.

    Args:
        workflow: the declaration.
        step: name of the step that asks.
        variables: values of all declared variables.
        entries: best first: `rank`, `score`, `key`, `item` and `answers` (by step) of each.
        totals: `items`, `completed`, `failed`, `skipped`, `ranked`.
        answers: what earlier reduce steps said, by step.
    """
    return {
        **variables,
        **_named(workflow, answers),
        "entries": [dict(entry) for entry in entries],
        "totals": dict(totals),
        "answers": dict(answers),
        "workflow": workflow.name,
        "step": step,
    }


def _named(workflow: Workflow, answers: Mapping[str, Any]) -> Values:
    aliases = {step.alias: answers[step.name] for step in workflow.steps if step.alias and step.name in answers}
    return {**answers, **aliases}
