"""Agent, origin, tracker and index: each composes swarm, wire, store, ring and registry in one nursery."""
