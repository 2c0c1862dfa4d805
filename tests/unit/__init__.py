"""Behaviour without sockets and servers."""
