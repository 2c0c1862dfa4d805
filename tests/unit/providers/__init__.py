"""The providers, piece by piece and without sockets."""
