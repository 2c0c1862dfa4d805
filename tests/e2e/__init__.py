"""Tests of the whole product, as a person meets it."""
