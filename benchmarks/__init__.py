"""Repeatable measurements of the whole product against the fake provider; README.md explains how to read them."""
