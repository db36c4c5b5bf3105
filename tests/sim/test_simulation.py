"""Swarms in simulated time, driven by the code that the roles run."""

from __future__ import annotations

import math

import pytest

from swarmpull.sim.simulation import Simulation, SimulationOptions, SimulationResult, lower_bound
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.scheduler import Scheduler

MIB = 1 << 20


def simulate(**options: float) -> SimulationResult:
    """Run to the end and check what holds of every run."""
    result = Simulation(SimulationOptions(**options)).run()  # type: ignore[arg-type]
    assert result.completed == result.expected == len(result.times)
    assert result.times == tuple(sorted(result.times))
    return result


@pytest.mark.slow
def test_fifty_agents_get_everything_mostly_from_one_another():
    size = 256 * MIB
    result = simulate(hosts=50, origins=2, size=size, check_every=31)

    assert result.expected == 50
    assert result.bytes_from_origins + result.bytes_from_agents >= 50 * size
    # The origins are four times as fast as an agent, and still most bytes are passed on by agents.
    assert result.bytes_from_origins <= 10 * size
    assert result.bytes_from_agents >= 4 * result.bytes_from_origins
    # Nobody gets anything faster than its downlink takes it in.
    assert result.times[0] >= size / 300e6
    # What request queues reach.
    assert result.quantile(0.5) <= 2.5 * result.bound
    assert result.times[-1] <= 3.5 * result.bound
    # The endgame begins early where the pipelines hold most of the blob, and what is under way for the
    # loser is not called back.
    wasted = result.bytes_from_origins + result.bytes_from_agents - 50 * size
    assert wasted <= 0.25 * 50 * size


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_with_killed_vanished_and_corrupt_hosts_every_survivor_finishes(seed):
    result = simulate(
        hosts=40, size=128 * MIB, killed=4, vanished=4, corrupt=3, seed=seed, check_every=31
    )
    assert result.expected == 40 - 8


def test_with_half_of_the_agents_corrupt_everybody_finishes():
    result = simulate(hosts=12, origins=1, size=40 * MIB, corrupt=6, check_every=7)
    assert result.expected == 12


def test_a_run_is_reproduced_to_the_digit_by_its_seed():
    options = {"hosts": 15, "size": 64 * MIB, "killed": 2, "vanished": 1, "corrupt": 1}
    first = simulate(**options, seed=7)
    assert simulate(**options, seed=7) == first
    assert simulate(**options, seed=8).times != first.times


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_swarm_may_be_small(hosts):
    result = simulate(hosts=hosts, origins=1, size=64 * MIB, arrival=0.0, check_every=1)
    assert result.times[0] >= 64 * MIB / 300e6
    assert result.times[-1] <= 1.4 * result.bound


def test_one_host_gets_the_whole_blob_once_from_the_origin():
    result = simulate(hosts=1, origins=1, size=64 * MIB)
    assert result.bytes_from_origins == 64 * MIB
    assert result.bytes_from_agents == 0
    assert result.connections == 1


def test_a_tiny_blob_takes_a_few_round_trips():
    result = simulate(hosts=40, size=20_000, rtt=0.001, check_every=3)
    # Announce, connect, Hellos, claim and piece: five round trips, and some refusals.
    assert result.quantile(0.5) <= 0.010
    assert result.times[-1] <= 0.1


def test_an_empty_blob_takes_no_time_and_no_bytes():
    result = simulate(hosts=5, size=0, check_every=1)
    assert result.times == (0.0,) * 5
    assert result.bytes_from_origins == result.bytes_from_agents == 0


def test_the_last_piece_of_a_blob_may_be_short():
    size = 2 * PIECE_LENGTH_MIN + 1
    result = simulate(hosts=1, origins=1, size=size)
    assert result.bytes_from_origins == size


def test_several_layers_come_side_by_side():
    layers, size = 4, 64 * MIB
    result = simulate(hosts=10, origins=1, size=size, layers=layers, check_every=7)
    assert result.expected == 10
    assert result.bytes_from_origins + result.bytes_from_agents >= 10 * size
    assert result.connections >= layers * 10


def test_late_comers_find_seeders_among_the_agents():
    result = simulate(hosts=20, origins=1, size=64 * MIB, arrival=20.0, check_every=7)
    assert result.bytes_from_agents > 2 * result.bytes_from_origins
    # Most arrive when the others are done, and have the swarm for themselves.
    assert result.quantile(0.5) <= 2.0 * 64 * MIB / 300e6


def test_no_two_complete_agents_stay_connected():
    simulation = Simulation(SimulationOptions(hosts=10, size=32 * MIB, seed=3))
    simulation.run()
    simulation._clock.run(simulation._clock.now + 1.0, lambda: False)
    for host in simulation._hosts.values():
        host.scheduler.check_invariants()
        assert host.scheduler.connection_count == 0


def test_an_invariant_that_breaks_in_the_middle_of_a_run_ends_it(monkeypatch):
    checked = []

    def check(scheduler: Scheduler) -> None:
        checked.append(scheduler)
        assert len(checked) < 50, "drifted"

    monkeypatch.setattr(Scheduler, "check_invariants", check)
    with pytest.raises(AssertionError, match="drifted"):
        simulate(hosts=5, size=64 * MIB, check_every=1)


def test_a_run_that_is_given_up_says_how_far_it_came():
    result = Simulation(SimulationOptions(hosts=5, size=256 * MIB, until=0.3)).run()
    assert result.completed == 0
    assert result.expected == 5
    assert math.isnan(result.quantile(0.5))


def test_the_bound_is_what_the_slowest_part_of_the_swarm_allows():
    # One agent, one origin: the downlink.
    assert lower_bound(SimulationOptions(hosts=1, origins=1, size=300_000_000)) == pytest.approx(
        1.0, rel=0.02
    )
    # A slow origin and many agents: the uplinks together.
    starved = SimulationOptions(hosts=100, origins=1, size=MIB, rate=1e6, origin_rate=1e6)
    assert lower_bound(starved) >= 100 * MIB / 101e6
    # One piece for eight hosts from one: three or four rounds.
    piece = SimulationOptions(hosts=7, origins=1, size=4 * MIB, rate=4.0 * MIB)
    assert lower_bound(piece) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "options",
    [
        {"hosts": 0},
        {"origins": 0},
        {"size": -1},
        {"layers": 0},
        {"rate": 0.0},
        {"rtt": -1.0},
        {"hosts": 3, "killed": 2, "corrupt": 2},
    ],
)
def test_an_experiment_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError):
        SimulationOptions(**options)
