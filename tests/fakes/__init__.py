"""Stand-ins for the world outside: services that are strict, run over real sockets and keep their own records."""
