"""PromptEngine: a pack's template texts in, messages for a model out.

It owns the compiled templates of one pack and nothing else: no files, no settings, no database. Values are data:
template syntax inside them is text like any other, and only plain data (what JSON can say) can be printed. The
sandbox is in `sandbox`, what templates may use in `filters`, how untrusted text is fenced in `fence`.
"""

import hashlib
import re
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from jinja2 import BaseLoader, Environment, Template, nodes
from jinja2 import TemplateNotFound as JinjaTemplateNotFound

from .analysis import missing_uses
from .compiling import column_of, compile_tree, parse_template
from .errors import (
    EmptyPrompt,
    PromptError,
    PromptTooLarge,
    TemplateNotFound,
    TemplateProblem,
    TemplateSyntaxProblem,
    UnsafeTemplate,
    did_you_mean,
)
from .filters import METER
from .frontmatter import PromptSource, split_front_matter
from .limits import MAX_INCLUDES, LimitExceeded, Meter, RenderLimits
from .sandbox import PromptEnvironment, forbidden, walk
from .translation import OPERATION_ERRORS, translated

# Names that a file system could take for a way out of the pack.
_OUTSIDE = re.compile(r"(^|/)\.\.?(/|$)|[\\:\x00]")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One compiled prompt.

    Attributes:
        name: Its name among the sources.
        role: Who the model is asked to be, completing "You are ..."; None when not given.
        description: For readers and listings; None when not given.
        includes: Every template it includes, directly or not, sorted.
        digest: SHA-256 (hex) over its text and the texts of its includes: the version of the prompt.
        body: The compiled user message.
        system: The compiled system text; None when not given.
    """

    name: str
    role: str | None
    description: str | None
    includes: tuple[str, ...]
    digest: str
    body: Template
    system: Template | None


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The messages of one call; `system` is None when the template has neither system text nor role."""

    system: str | None
    user: str


class PromptEngine:
    """Loads, checks and renders the prompts of one pack.

    Safe to share between threads: templates compile once, under a lock, and rendering changes nothing.

    Args:
        sources: Template texts by name; copied. An include can name these and nothing else.
        limits: Caps on sources and renders.
    """

    def __init__(self, sources: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        self._sources = dict(sources)
        self._limits = limits or RenderLimits()
        self._environment = PromptEnvironment()
        self._environment.loader = _IncludeLoader(self._sources)
        self._prompts: dict[str, PromptTemplate] = {}
        self._lock = threading.RLock()

    def load_template(self, name: str) -> PromptTemplate:
        """Return the compiled prompt `name`, compiling it and its includes the first time.

        Raises:
            TemplateNotFound: The prompt or a template it includes is not among the sources.
            TemplateSyntaxProblem: Its text or front matter cannot be read, or includes form a cycle.
            UnsafeTemplate: It uses what the sandbox refuses.
            PromptTooLarge: Its text is larger than the cap.
        """
        prompt = self._prompts.get(name)
        if prompt is None:
            with self._lock:
                prompt = self._prompts.get(name) or self._compile(name)
                self._prompts[name] = prompt
        return prompt

    def cache_template(self, name: str) -> None:
        """Compile the prompt `name` ahead of its first use; raises as `load_template`, safe to repeat."""
        self.load_template(name)

    def render_prompt(self, name: str, values: Mapping[str, object]) -> RenderedPrompt:
        """Return the messages that the prompt `name` makes of `values`.

        The same values give the same messages, byte for byte. White space around a message is cut off.

        Raises:
            UndefinedVariable: A name or attribute is missing; with line and a suggestion.
            EmptyPrompt: The user message is empty or white space.
            PromptTooLarge, UnsafeTemplate, RenderFailed: See `PromptError`; and what `load_template` raises.
        """
        prompt = self.load_template(name)
        user = self._render(prompt.body, values)
        if not user:
            problem = TemplateProblem(name, None, None, "the prompt is empty", "check its conditions with these values")
            raise EmptyPrompt(problem)
        system = "" if prompt.system is None else self._render(prompt.system, values)
        opening = f"You are {prompt.role.rstrip('.')}." if prompt.role else ""
        return RenderedPrompt("\n\n".join(part for part in (opening, system) if part) or None, user)

    def validate_variables(self, name: str, available: Mapping[str, object]) -> list[TemplateProblem]:
        """Return every problem of the prompt `name`, without raising and without rendering.

        Reported are faults of syntax and front matter, refused constructs, includes that are missing or form a cycle,
        and every name or attribute that `available` does not have, in system text, body and includes.

        Args:
            name: A prompt among the sources.
            available: A sample value for every top-level name; `analysis.UNKNOWN` for a shape not known yet.
        """
        try:
            trees = self._trees(name)
            problems = [fault for tree_name, tree in trees for fault in forbidden(tree, self._environment, tree_name)]
            problems += self._undefined(name, available)
            if not problems:
                self.load_template(name)
        except PromptError as error:
            return [error.problem]
        return problems

    def _undefined(self, name: str, available: Mapping[str, object]) -> list[TemplateProblem]:
        def included(inner: str) -> nodes.Node:
            return self._parse(inner, self._parts(inner).body)

        parts = self._parts(name)
        texts = [text for text in (parts.system, parts.body) if text is not None]
        uses = [use for text in texts for use in missing_uses(self._parse(name, text), available, name, included)]
        problems = {
            TemplateProblem(
                use.template,
                use.line,
                column_of(self._sources[use.template], use.line, use.path),
                f"'{use.path}' is not defined",
                use.hint,
            ): None
            for use in uses
        }
        return list(problems)

    def _render(self, template: Template, values: Mapping[str, object]) -> str:
        context = template.new_context({**values, METER: Meter(self._limits)})
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.root_render_func(context):
                pieces.append(piece)
                size += len(piece)
                if size > self._limits.output_chars:
                    raise LimitExceeded(f"the prompt is larger than {self._limits.output_chars} characters")
        except OPERATION_ERRORS as error:
            raise translated(error, template.name or "", self._source, values) from error
        return "".join(pieces).strip()

    def _compile(self, name: str) -> PromptTemplate:
        trees = self._trees(name)
        includes = tuple(sorted({tree_name for tree_name, _ in trees} - {name}))
        for included in includes:
            self._environment.get_template(included)
        parts = self._parts(name)
        texts = "\0".join(f"{part}\0{self._sources[part]}" for part in (name, *includes))
        return PromptTemplate(
            name=name,
            role=parts.role,
            description=parts.description,
            includes=includes,
            digest=hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest(),
            body=compile_tree(self._environment, name, self._parse(name, parts.body)),
            system=None
            if parts.system is None
            else compile_tree(self._environment, name, self._parse(name, parts.system)),
        )

    def _source(self, name: str) -> str:
        source = self._sources.get(name)
        if source is None:
            message = f"there is no template '{name}'"
            raise TemplateNotFound(TemplateProblem(name, None, None, message, did_you_mean(name, self._sources)))
        if len(source) > self._limits.source_chars:
            message = f"the template is larger than {self._limits.source_chars} characters"
            raise PromptTooLarge(TemplateProblem(name, None, None, message))
        return source

    def _parts(self, name: str) -> PromptSource:
        return split_front_matter(name, self._source(name))

    def _parse(self, name: str, text: str) -> nodes.Template:
        return parse_template(self._environment, name, text)

    def _trees(self, name: str) -> list[tuple[str, nodes.Template]]:
        """Return name and tree of the prompt's texts and of everything it includes.

        Raises:
            TemplateSyntaxProblem, TemplateNotFound, UnsafeTemplate: Also for includes that are missing, reach out of
                the pack or come back to a template that is being included.
        """
        found: list[tuple[str, nodes.Template]] = []
        self._gather(name, (), found)
        return found

    def _gather(self, name: str, chain: tuple[str, ...], found: list[tuple[str, nodes.Template]]) -> None:
        parts = self._parts(name)
        for text in (parts.system, parts.body):
            if text is None:
                continue
            tree = self._parse(name, text)
            found.append((name, tree))
            if len(found) > MAX_INCLUDES:
                message = f"the prompt includes more than {MAX_INCLUDES} templates, repeated ones counted"
                raise PromptTooLarge(TemplateProblem((*chain, name)[0], None, None, message))
            for line, inner in _includes(tree):
                self._check_include(name, line, inner, (*chain, name))
                self._gather(inner, (*chain, name), found)

    def _check_include(self, name: str, line: int, inner: str, chain: tuple[str, ...]) -> None:
        place = (name, line, column_of(self._sources[name], line, inner))
        if inner.startswith(("/", "~")) or _OUTSIDE.search(inner):
            raise UnsafeTemplate(TemplateProblem(*place, f"the include '{inner}' reaches out of the pack"))
        if inner in chain:
            circle = " -> ".join((*chain[chain.index(inner) :], inner))
            raise TemplateSyntaxProblem(TemplateProblem(*place, f"includes form a cycle: {circle}"))
        if inner not in self._sources:
            hint = did_you_mean(inner, self._sources)
            raise TemplateNotFound(TemplateProblem(*place, f"there is no template '{inner}' to include", hint))
        if self._parts(inner).has_front_matter:
            message = f"the included template '{inner}' has front matter"
            raise TemplateSyntaxProblem(TemplateProblem(*place, message, "only a whole prompt can have it"))


def _includes(tree: nodes.Template) -> list[tuple[int, str]]:
    """Return line and name of every include that names its template in quotes."""
    return [
        (node.lineno, node.template.value)
        for node in walk(tree)
        if isinstance(node, nodes.Include)
        and isinstance(node.template, nodes.Const)
        and isinstance(node.template.value, str)
    ]


class _IncludeLoader(BaseLoader):
    """Hands included templates, checked and metered like prompts, to Jinja2."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = sources

    def load(self, environment: Environment, name: str, globals: MutableMapping[str, object] | None = None) -> Template:
        source = self._sources.get(name)
        if source is None or not isinstance(environment, PromptEnvironment):
            raise JinjaTemplateNotFound(name)
        return compile_tree(environment, name, parse_template(environment, name, source))
