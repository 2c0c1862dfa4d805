"""Logger: events with fields, for people or as JSON lines, on stderr.

Everything goes through the standard library's root handler, ours as well as what other libraries log, so one set of
processors sees every record: secrets are masked and control characters escaped before anything is written. Messages of
HTTP libraries hold whole addresses, those of Celery come with every task: both are kept at WARNING.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO, cast

import structlog

Level = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]

MASK = "***"

_QUIET = ("httpx", "httpcore", "aiohttp", "asyncio", "urllib3", "celery", "kombu", "amqp")
_SECRET_NAMES = re.compile(
    r"(?i)(?:^|[_-])(?:api[_-]?keys?|authorization|password|passwd|secret|credentials?|cookie|x-api-key|x-goog-api-key)$"
    r"|^(?:key|token)$|access_token|refresh_token"
)
_SECRETS = re.compile(
    r"\b(?:sk|gsk|xai|pplx|hf|rk|pk)[-_][A-Za-z0-9_-]{12,}"
    r"|\bAIza[A-Za-z0-9_-]{20,}"
    r"|(?<=\bBearer )[^\s\"',;]{6,}"
    r"|(?<=\bBasic )[A-Za-z0-9+/=]{6,}"
    r"|(?<=[?&]key=)[^\s&\"']+"
    r"|(?i:(?<=api_key=)|(?<=apikey=)|(?<=token=)|(?<=password=))[^\s&\"',;]+"
    r"|(?<=:)[^\s:/@]+(?=@)"
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_DEPTH = 6


class Logger:
    """The owner's door to logging. All methods may be called from any thread."""

    @staticmethod
    def init(level: str = "info", log_format: str = "console", stream: TextIO | None = None) -> None:
        """Set up logging for the whole process. Safe to repeat; the last call wins.

        Args:
            level: `debug`, `info`, `warning` or `error`.
            log_format: `console` for people, `json` for one JSON object per line.
            stream: Where to write; stderr by default, because stdout is for data.
        """
        shared: list[structlog.typing.Processor] = [
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            clean,
        ]
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(log_format)],
            )
        )
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(level.upper())
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.PositionalArgumentsFormatter(),
                *shared,
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=False,
        )

    @staticmethod
    def log_workflow(event: str, run_id: str, **fields: object) -> None:
        """Log a step in the life of a run, such as `run.started`."""
        _logger("orchestrator.workflow").info(event, run_id=run_id, **fields)

    @staticmethod
    def log_llm_call(event: str, call_id: str, **fields: object) -> None:
        """Log a step in the life of a call, such as `call.settled`. Prompt and answer text belong to `log_text`."""
        _logger("orchestrator.call").info(event, call_id=call_id, **fields)

    @staticmethod
    def log_text(event: str, call_id: str, **texts: str) -> None:
        """Log the text of a prompt or an answer, which only shows at level `debug`."""
        _logger("orchestrator.call").debug(event, call_id=call_id, **texts)

    @staticmethod
    def log_errors(event: str, error: BaseException | None = None, **fields: object) -> None:
        """Log a failure, with its traceback if an error is given; tracebacks show no values of variables."""
        _logger("orchestrator.errors").error(event, exc_info=error, **fields)


def clean(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Processor: masks secrets by the name of a field and by their form, and escapes control characters."""
    for name, value in list(event.items()):
        if name == "exception":
            # A traceback keeps its lines; the indent keeps a forged one from looking like a record.
            event[name] = "\n".join(f"  {_cleaned(line, 0)}" for line in str(value).splitlines())
        elif not name.startswith("_"):
            event[name] = MASK if _is_secret(name, value) else _cleaned(value, 0)
    return event


def mask_secrets(text: str) -> str:
    """The text with `***` for everything that has the form of a key, a token or a password in an address."""
    return _SECRETS.sub(MASK, text)


def escape_control(text: str) -> str:
    r"""The text with `\n`, `\x1b` and the like for every character that could end a line or steer a terminal."""
    return text if text.isprintable() else _CONTROL.sub(_escaped, text)


def _logger(name: str) -> structlog.stdlib.BoundLogger:
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(name))


def _renderer(log_format: str) -> structlog.typing.Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer(ensure_ascii=False)
    return structlog.dev.ConsoleRenderer(colors=False)


def _is_secret(name: str, value: object) -> bool:
    return value is not None and _SECRET_NAMES.search(name) is not None


def _cleaned(value: object, depth: int) -> object:
    """A value as plain data, cleaned all through; what is neither text, number nor container becomes its text."""
    match value:
        case None | bool() | int() | float():
            return value
        case Mapping() if depth < _MAX_DEPTH:
            items = cast("Mapping[object, object]", value).items()
            return {
                escape_control(str(name)): MASK if _is_secret(str(name), inner) else _cleaned(inner, depth + 1)
                for name, inner in items
            }
        case list() | tuple() | set() | frozenset() if depth < _MAX_DEPTH:
            return [_cleaned(inner, depth + 1) for inner in cast("list[object]", value)]
        case _:
            return escape_control(mask_secrets(str(value)))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
