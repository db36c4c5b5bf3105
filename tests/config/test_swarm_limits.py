"""The defaults of the configuration are those that are simulated."""

from __future__ import annotations

import attrs
import pytest

from swarmpull.config import SwarmConfig
from swarmpull.roles.swarm_host import limits_of
from swarmpull.sim.options import Policy
from swarmpull.sim.simulation import default_limits
from swarmpull.swarm.limits import HostLimits
from swarmpull.swarm.peers import PeerKind


@pytest.mark.parametrize("kind", PeerKind)
def test_the_simulator_runs_with_the_limits_that_hosts_run_with(kind: PeerKind) -> None:
    assert limits_of(SwarmConfig(), kind) == default_limits(kind, Policy.OFFERS)


@pytest.mark.parametrize("field", attrs.fields(HostLimits), ids=lambda field: field.name)
def test_a_configured_limit_reaches_the_core(field: attrs.Attribute[int]) -> None:
    config = attrs.evolve(SwarmConfig(), **{field.name: 7})
    assert any(limits_of(config, kind) != HostLimits().of(kind) for kind in PeerKind)
