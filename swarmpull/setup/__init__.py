"""Configuration of a host's container runtime, so that it pulls through the agent.

What is to be written is planned from texts alone (`plan`, one module for each runtime); `apply` reads and
writes files.
"""
