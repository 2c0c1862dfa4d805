"""Whole runs in virtual time: the real decisions against a real database, with everything around them made up."""
