"""Hosts that appear are linked at once, and not with the next announce of those who lack peers."""

from __future__ import annotations

import attrs
import pytest

from swarmpull.sim.simulation import Simulation, SimulationOptions
from swarmpull.sim.workload import Host
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.scheduler import Scheduler
from swarmpull.swarm.torrent import STARVED_AFTER

pytestmark = pytest.mark.sim

RTT = 0.02
# The news of a peer takes one round trip, the connection and the Hellos two, offer and claim another two.
LINKED = 5 * RTT
# No origin: who seeds is an agent that appears when a test says so.
OPTIONS = SimulationOptions(
    hosts=2, origins=1, size=64 << 20, rtt=RTT, arrival=0.0, until=60.0, check_every=1
)


class LateSeeder(Simulation):
    """The first agent has everything, and appears after so many seconds; the others want it.

    ``dies_after``: an origin is there until then.
    """

    def __init__(
        self, options: SimulationOptions, appears_after: float, *, dies_after: float = 0.0
    ) -> None:
        super().__init__(options)
        seeder = self._agents[0]
        self._pulls = [pull for pull in self._pulls if pull.host is not seeder]
        self._clock.at(dies_after, self._kill, self._origins[0], False)
        self._clock.at(appears_after, self._appear, seeder)

    def _appear(self, seeder: Host) -> None:
        for blob in self._blobs:
            have = bitfield.full(blob.piece_count)
            added = ev.TorrentAdded(blob.metainfo, "", have, verified=True, announce=True)
            self._dispatch(seeder, added)


# An announce is due every three seconds from the start.
@pytest.mark.parametrize("appears_after", [0.3, 1.0, 2.5, 3.1, 40.0])
def test_a_leecher_without_peers_gets_a_piece_as_soon_as_a_seeder_appears(appears_after) -> None:
    result = LateSeeder(OPTIONS, appears_after).run()

    # A leecher without readers takes its first pieces in any order: this is that of the first in the blob.
    [first] = result.first_bytes
    assert appears_after < first < appears_after + LINKED + OPTIONS.size / OPTIONS.rate
    assert result.times[0] < appears_after + 0.5


def test_a_leecher_whose_only_peer_died_gets_on_as_soon_as_another_appears() -> None:
    slow = attrs.evolve(OPTIONS, origin_rate=8e6)
    result = LateSeeder(slow, 2.0, dies_after=1.0).run()

    assert 0 < result.bytes_from_origins < 16e6
    assert result.times[0] < 2.5, "its announce was due after three seconds"


def test_one_who_waits_asks_seldom() -> None:
    result = LateSeeder(OPTIONS, 50.0).run()

    assert result.completed == 1
    assert result.watches == 3, "two that waited, and one while it had the seeder only"


def test_of_many_without_peers_none_waits_for_its_announce() -> None:
    alone = LateSeeder(attrs.evolve(OPTIONS, hosts=10, check_every=50), 1.0).run()

    assert alone.completed == 9
    assert alone.first_bytes[-1] < 1.0 + 0.5
    assert alone.watches <= 3 * 9


def test_those_who_wait_at_a_tracker_that_dies_hear_of_newcomers_from_its_successor() -> None:
    replaced = attrs.evolve(OPTIONS, trackers=1, faults="tracker-killed=1@1s")
    result = LateSeeder(replaced, 2.0).run()

    assert result.completed == 1
    assert result.first_bytes[0] < 2.0 + LINKED + 0.3, "the announce was due after three seconds"


def test_a_swarm_that_lacks_nobody_does_not_wait() -> None:
    options = attrs.evolve(OPTIONS, hosts=100, origins=5, arrival=0.1, check_every=0)

    assert Simulation(options).run().watches < 10


def test_hosts_that_know_only_each_other_get_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who arrive after the death of the tracker, and nobody tells the others of it."""
    monkeypatch.setattr(Scheduler, "_tracker_lost", lambda *_: None)
    island = SimulationOptions(
        hosts=400,
        origins=5,
        size=64 << 22,
        layers=2,
        faults="slow=5%x10,killed=2%,origin-killed=1,tracker-killed=1",
        seed=2,
    )
    result = Simulation(island).run()

    assert result.completed == result.expected
    assert STARVED_AFTER < result.times[-1] < STARVED_AFTER + 2.0, "and not after half a minute"
