"""LLM Orchestrator: runs human-judgment tasks at scale over LLM providers.

This package decides what to ask, remembers what was answered and accounts for what it cost. It stays light on
purpose, so that `--help`, shell completion and `--version` answer at once; heavy libraries are imported by the
modules that own them.
"""

__version__ = "0.1.0"
