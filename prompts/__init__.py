"""Turns a pack's templates and values into messages for a model; knows nothing else of the product.

The public names are re-exported here; `prompts.engine` and `prompts.conditions` hold the two entry points. The
folders beside the modules are the packs that ship: a `workflow.toml`, its templates, sample items and a README.
"""

from .analysis import UNKNOWN
from .conditions import Condition, compile_condition
from .engine import PromptEngine, PromptTemplate, RenderedPrompt
from .errors import (
    EmptyPrompt,
    PromptError,
    PromptTooLarge,
    RenderFailed,
    TemplateNotFound,
    TemplateProblem,
    TemplateSyntaxProblem,
    UndefinedVariable,
    UnsafeTemplate,
)
from .limits import RenderLimits

__all__ = [
    "UNKNOWN",
    "Condition",
    "EmptyPrompt",
    "PromptEngine",
    "PromptError",
    "PromptTemplate",
    "PromptTooLarge",
    "RenderFailed",
    "RenderLimits",
    "RenderedPrompt",
    "TemplateNotFound",
    "TemplateProblem",
    "TemplateSyntaxProblem",
    "UndefinedVariable",
    "UnsafeTemplate",
    "compile_condition",
]
