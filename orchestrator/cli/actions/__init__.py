"""What commands do. Heavy modules, imported through `orchestrator.cli.lazy` when a command runs."""
