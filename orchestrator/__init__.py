"""Decides what to ask; remembers what was answered and what it cost.

The door of the package: the names below are public and stay. They are looked up when they are first used, because
`import orchestrator` stands at the beginning of every command, and help must not wait for SQLAlchemy and Celery.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.config import ConfigManager
    from orchestrator.database import Database
    from orchestrator.files import FileManager
    from orchestrator.logs import Logger
    from orchestrator.manager import WorkflowManager
    from orchestrator.orchestration import WorkflowOrchestrator
    from orchestrator.plans import RunRequest
    from orchestrator.results import ResultProcessor

__version__ = "0.1.0"
__all__ = [
    "ConfigManager",
    "Database",
    "FileManager",
    "Logger",
    "ResultProcessor",
    "RunRequest",
    "WorkflowManager",
    "WorkflowOrchestrator",
    "__version__",
]

_HOMES = {
    "ConfigManager": "orchestrator.config",
    "Database": "orchestrator.database",
    "FileManager": "orchestrator.files",
    "Logger": "orchestrator.logs",
    "ResultProcessor": "orchestrator.results",
    "RunRequest": "orchestrator.plans",
    "WorkflowManager": "orchestrator.manager",
    "WorkflowOrchestrator": "orchestrator.orchestration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
