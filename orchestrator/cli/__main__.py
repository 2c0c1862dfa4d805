"""Runs the command line as `python -m orchestrator.cli`."""

from orchestrator.cli.entry import main

main()
