"""The pure core: decides everything about a swarm, touches nothing.

Time, randomness and events come in as arguments, actions go out as return values; payload bytes never
pass through.  No module here imports trio, socket, os, time, logging or the global random state, and a
test sees to it.
"""
