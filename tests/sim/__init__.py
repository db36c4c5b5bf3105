"""Tests of the simulator, and of the engine at the size of a swarm."""
