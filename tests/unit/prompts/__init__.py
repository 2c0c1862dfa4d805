"""Tests of the prompts package: engine, conditions, sandbox, fencing and the packs that ship."""
