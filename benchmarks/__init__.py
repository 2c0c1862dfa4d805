"""Repeatable measurements of the whole product against the fake provider; `python -m benchmarks` runs them, README.md explains."""
