"""Tests of the simulator, and of the engine by means of it."""
