"""What remains of a bug: a short apology, and a report file with the traceback but without the values in it."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from pathlib import Path

from orchestrator import __version__
from orchestrator.logs import mask_secrets


def write_report(error: Exception) -> None:
    """Writes the report to a file that only its owner can read, and says where it is."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    lines = [
        f"llm-orchestrator {__version__}, Python {platform.python_version()} on {platform.platform()}",
        f"command: {command}",
        "",
        mask_secrets("".join(traceback.format_exception(error))),
    ]
    handle, name = tempfile.mkstemp(prefix="llm-orchestrator-crash-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    kind = type(error).__name__
    sys.stderr.write(
        f"error[internal] Sorry, that is a bug of ours ({kind}). What is stored is not affected.\n"
        f"  help: a report without secrets is in {Path(name)}; please send it to the maintainers\n"
    )
