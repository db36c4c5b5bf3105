"""Small swarms, with every invariant of the core checked as they run."""

from __future__ import annotations

import math

import attrs
import pytest

from swarmpull.sim.faults import FaultKind
from swarmpull.sim.result import SimulationResult
from swarmpull.sim.simulation import Policy, Simulation, SimulationOptions

pytestmark = pytest.mark.sim

SMALL = SimulationOptions(
    hosts=30, origins=2, size=64 << 20, layers=2, arrival=0.1, until=300.0, check_every=500
)


def simulate(options: SimulationOptions = SMALL, **changes: object) -> SimulationResult:
    return Simulation(attrs.evolve(options, **changes)).run()


# The classic policy claims the last pieces twice.
@pytest.mark.parametrize(
    ("policy", "waste"),
    [(Policy.OFFERS, 1.05), (Policy.PIPELINE, 1.5)],
    ids=lambda value: getattr(value, "value", ""),
)
def test_everybody_gets_everything(policy: Policy, waste: float) -> None:
    result = simulate(policy=policy)

    assert result.completed == result.expected == 30
    assert result.pieces == 30 * 16
    sent = result.bytes_from_origins + result.bytes_from_agents
    assert 30 * SMALL.size <= sent <= waste * 30 * SMALL.size
    assert result.copies_from_origins >= 1


def test_no_host_is_faster_than_its_link() -> None:
    result = simulate()

    assert result.times[0] >= SMALL.size / SMALL.rate
    assert all(first <= last for first, last in zip(result.first_bytes, result.times, strict=True))


def test_the_shares_of_the_uplinks_time_make_a_whole() -> None:
    result = simulate()

    for uplinks in (result.agent_uplinks, result.origin_uplinks):
        assert sum(uplinks.values()) == pytest.approx(1.0)
        assert uplinks["sending"] > 0.1
    assert result.samples[-1].copied == 1.0
    assert result.samples[-1].high == 1.0


@pytest.mark.parametrize(
    "faults",
    [
        "slow=10%x10",
        "killed=10%",
        "vanished=5%",
        "late=10%@2s",
        "corrupt=5%",
        "stalling=5%",
        "overlong=10%",
        "greedy=5%",
        "chatty=5%",
        "delayed=10%x20",
        "origin-killed=1@0.1s",
        "tracker-killed=5@0.05s",
        "tracker-killed=5@0.05s-2s",
        "origin-frozen=1@0.05s-20s",
        "origin-slow=1x10000",
        "frozen=10%@0.1s-20s",
        "restarted=20%@0.15s-0.5s",
        "wiped=20%@0.15s-0.5s",
        "lost=5%",
        "partition=20%@0.05s-0.3s",
        "slow=5%x10,killed=5%,corrupt=1,greedy=1,chatty=1,origin-killed=1,partition=5%@0.1s-1s",
    ],
)
def test_every_survivor_finishes_whatever_goes_wrong(faults: str) -> None:
    result = simulate(faults=faults)

    assert result.completed == result.expected
    assert result.gave_up == 0


def test_who_dies_or_lies_is_not_waited_for() -> None:
    result = simulate(faults="killed=3,vanished=2,chatty=4,late=1@1s,slow=1x2")

    assert result.expected == 30 - 3 - 2 - 4
    assert len(result.times) == result.expected - 1
    assert len(result.faulty_times) == 1


def test_what_overlong_peers_send_is_never_stored_and_costs_them_their_connections() -> None:
    honest, lied_to = simulate(), simulate(faults="overlong=5")

    assert lied_to.dropped > honest.dropped
    assert lied_to.pieces <= 30 * 16
    assert lied_to.quantile(1.0) < 3 * honest.quantile(1.0)


def test_a_long_round_trip_is_filled_with_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    far = {"rtt": 0.05, "size": 256 << 20, "check_every": 500}
    growing = simulate(**far)
    monkeypatch.setattr("swarmpull.swarm.timing.PathTiming.pieces", lambda _: 0)
    constant = simulate(**far)

    assert growing.quantile(0.5) < 0.9 * constant.quantile(0.5)


def test_a_slow_host_takes_as_much_longer_as_its_link() -> None:
    result = simulate(faults="slow=2x10")

    assert result.faulty_times[0] >= 10 * SMALL.size / SMALL.rate
    assert result.quantile(0.5) < 2 * result.bound


def test_hosts_in_a_partition_wait_until_it_ends() -> None:
    result = simulate(faults="partition=3@0s-5s")

    assert result.faulty_times[0] > 4.8
    assert result.times[-1] < 4.0


def test_who_is_restarted_goes_on_and_who_is_wiped_begins_anew() -> None:
    whole = 30 * 16
    calm, restarted, wiped = (
        simulate(faults=faults) for faults in ("", "restarted=9@0.2s-3s", "wiped=9@0.2s-3s")
    )

    assert calm.pieces == restarted.pieces == whole
    assert whole < wiped.pieces <= whole + 9 * 16
    for result in (restarted, wiped):
        assert len(result.faulty_times) == 9
        assert 2.9 < result.faulty_times[-1] < 3.5
        assert result.last_finish > 3.0 > result.makespan


def test_a_reader_goes_on_where_its_host_was_killed() -> None:
    result = simulate(faults="restarted=5@0.2s-1s,wiped=5@0.2s-1s", readers=True, reader_rate=200e6)

    assert result.completed == result.expected


def test_a_frozen_origin_sends_nothing_and_is_missed_by_nobody() -> None:
    calm, frozen = simulate(), simulate(faults="origin-frozen=1@0s-20s")

    assert frozen.times[-1] < 1.5 * calm.times[-1]
    assert frozen.last_finish < 2.0


def test_what_a_frozen_host_was_sending_comes_when_it_goes_on() -> None:
    result = simulate(
        hosts=1, origins=1, size=256 << 20, layers=1, faults="origin-frozen=1@0.5s-4s"
    )

    assert result.completed == 1
    assert result.times[0] > 3.0
    assert result.pieces == 64


def test_downloads_begin_with_an_origin_when_no_tracker_answers() -> None:
    result = simulate(hosts=3, arrival=0.0, faults="tracker-killed=5@0s-60s")

    assert result.completed == 3
    assert result.last_finish < 60.0
    assert result.announces == 0


def test_those_who_begin_while_no_tracker_answers_become_one_swarm() -> None:
    """An origin tells each of those that are connected to it, or all would wait for that origin."""
    result = simulate(hosts=100, origins=3, arrival=0.5, faults="tracker-killed=5@0s-60s")

    assert result.completed == 100
    assert result.quantile(1.0) < 1.2 * result.bound
    assert result.copies_from_origins < 20


def test_lost_packets_take_time_and_no_more() -> None:
    calm, lossy = simulate(), simulate(faults="lost=5%")

    assert lossy.completed == lossy.expected
    assert lossy.pieces == calm.pieces
    assert lossy.quantile(0.5) > 2 * calm.quantile(0.5)
    assert lossy.longest_wait > 0.2, "the least time after which a message is repeated"


def test_faults_of_one_kind_hit_one_origin_after_the_other() -> None:
    faults = "origin-killed=1@0s-0.1s,origin-killed=1@0s"
    result = simulate(hosts=3, origins=2, arrival=0.0, faults=faults)

    assert result.completed == 3


def test_readers_get_the_first_byte_sooner() -> None:
    size = 512 << 20
    without, reading = (
        simulate(size=size, layers=1, readers=readers, check_every=0) for readers in (False, True)
    )

    assert reading.completed == reading.expected
    # The first ones have it early either way: seeders begin at the beginning.
    assert reading.first_bytes[27] < without.first_bytes[27] / 2


def test_a_slow_reader_does_not_hold_up_its_download() -> None:
    result = simulate(readers=True, reader_rate=10e6)

    assert result.completed == result.expected
    assert result.times[-1] < SMALL.size / 10e6


def test_many_images_are_each_pulled_by_so_many_hosts() -> None:
    result = simulate(images=20, pullers=3, size=16 << 20, layers=1, arrival=1.0)

    assert result.completed == result.expected == 60
    assert result.pieces == 60 * 4
    assert result.copies_from_origins >= 1
    assert result.makespan >= result.times[0]


def test_jitter_does_not_reorder_a_connection() -> None:
    result = simulate(jitter=0.02, check_every=100)

    assert result.completed == result.expected


def test_a_busy_receiver_holds_up_its_senders_unless_the_network_takes_everything() -> None:
    bounded, endless = (simulate(buffer=buffer) for buffer in (0, math.inf))

    assert bounded.agent_uplinks["the receiver is slower"] > 0
    assert endless.agent_uplinks["the receiver is slower"] == 0


def test_the_same_seed_gives_the_same_result_and_another_one_does_not() -> None:
    faults = "slow=10%x3,chatty=1,killed=1"
    first, again, other = (simulate(seed=seed, faults=faults) for seed in (7, 7, 8))

    assert first == again
    assert first.times != other.times


def test_looking_at_a_swarm_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    often = simulate()
    monkeypatch.setattr("swarmpull.sim.simulation.SAMPLES", 3)

    assert simulate().times == often.times


def test_progress_ends_at_everything() -> None:
    told: list[float] = []

    Simulation(SMALL).run(told.append)

    assert told == sorted(told)
    assert told[0] == 0.0
    assert told[-1] > 0.9


def test_a_swarm_without_its_only_origin_gives_up_in_time() -> None:
    result = simulate(hosts=4, origins=1, faults="origin-killed=1@0s")

    assert result.completed == 0
    assert result.gave_up == result.expected


def test_every_kind_of_fault_is_simulated_here() -> None:
    [mark] = test_every_survivor_finishes_whatever_goes_wrong.pytestmark
    tried = " ".join(mark.args[1])

    assert all(f"{kind.value}=" in tried for kind in FaultKind)


@pytest.mark.parametrize("origin_rate", [1e5, 1e9], ids=["slow origin", "fast origin"])
def test_links_on_which_a_piece_takes_most_of_a_minute_carry_everything(origin_rate: float) -> None:
    result = simulate(
        hosts=5, origins=1, size=12 << 20, layers=1, rate=1e5, origin_rate=origin_rate, until=3600.0
    )

    assert result.completed == result.expected == 5
    assert result.gave_up == 0
    sent = result.bytes_from_origins + result.bytes_from_agents
    assert sent <= 1.5 * 5 * (12 << 20), "little is sent twice"
