"""Tests, split by what they need: nothing (unit), sockets (contract), servers (integration, faults), all (e2e)."""
