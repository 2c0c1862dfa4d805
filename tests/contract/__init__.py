"""Every implementation of a role passes the same tests."""
