"""The command line: one module per noun declares its commands, `actions` does what they say.

The declarations import Typer and nothing heavy, so that help and completion answer at once; a command reaches its
action through `lazy`, the only door between the two.
"""

from orchestrator.cli.entry import main

__all__ = ["main"]
