"""End-to-end tests: the real program, real sockets, real container clients."""
