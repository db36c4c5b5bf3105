"""Same events and seeds, same actions: whatever the hash seed of the interpreter is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Prints a digest of every event and the actions that answered it, of all schedulers of a swarm with faults.
TRACE = """
import hashlib, sys
from swarmpull.sim.options import Policy, SimulationOptions
from swarmpull.sim.simulation import Simulation
from swarmpull.swarm.scheduler import Scheduler

trace = hashlib.sha256()
handle = Scheduler.handle

def traced(self, event, now):
    actions = handle(self, event, now)
    trace.update(repr((self.peer_id, now, event, actions)).encode())
    return actions

Scheduler.handle = traced
options = SimulationOptions(
    hosts=12,
    origins=2,
    size=48 << 20,
    layers=2,
    faults="killed=1,vanished=1,corrupt=1",
    seed=int(sys.argv[1]),
    policy=Policy(sys.argv[2]),
)
Simulation(options).run()
print(trace.hexdigest())
"""


def trace_digest(seed: int, hash_seed: str, policy: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRACE, str(seed), policy],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("policy", ["offers", "pipeline"])
def test_a_run_depends_on_its_seed_alone(policy):
    digest = trace_digest(seed=1, hash_seed="1", policy=policy)
    assert len(digest) == 64
    assert trace_digest(seed=1, hash_seed="2", policy=policy) == digest
    assert trace_digest(seed=2, hash_seed="1", policy=policy) != digest
