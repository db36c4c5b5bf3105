"""The model of the network: what links and the clock do."""

from __future__ import annotations

import math

import pytest

from swarmpull.sim.network import Clock, Link


def test_things_happen_in_the_order_of_time_and_then_of_scheduling() -> None:
    clock, happened = Clock(), []
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "never")):
        clock.at(when, happened.append, name)

    clock.run(until=5.0)

    assert happened == ["a", "b", "c"]
    assert clock.now == 2.0


def test_a_clock_that_is_stopped_lets_nothing_more_happen() -> None:
    clock, happened = Clock(), []

    def stop() -> None:
        clock.stopped = True

    clock.at(1.0, stop)
    clock.at(2.0, happened.append, "late")

    clock.run(until=math.inf)

    assert happened == []


def test_an_uplink_sends_one_piece_after_the_other() -> None:
    link = Link(up_rate=100.0, down_rate=100.0)

    assert link.send(200, now=1.0) == (1.0, 3.0)
    assert link.send(100, now=1.5) == (3.0, 4.0)
    assert link.send(100, now=9.0) == (9.0, 10.0)
    assert link.bytes_sent == 400


def test_a_piece_from_an_equal_sender_arrives_with_its_last_byte() -> None:
    link = Link(100.0, 100.0)

    assert link.receive(200, first_at=1.0, last_at=3.0) == 3.0


def test_a_slower_receiver_takes_its_own_time() -> None:
    link = Link(100.0, 10.0)

    assert link.receive(100, first_at=1.0, last_at=2.0) == 11.0
    assert link.receive(100, first_at=2.0, last_at=3.0) == 21.0


def test_a_slow_sender_leaves_the_rest_of_the_downlink_to_others() -> None:
    link = Link(100.0, 100.0)

    assert link.receive(100, first_at=0.0, last_at=10.0) == 10.0
    assert link.receive(100, first_at=0.0, last_at=1.0) == 2.0


@pytest.mark.parametrize(("buffer", "rid_at"), [(0, 11.0), (50, 6.0), (math.inf, 0.0)])
def test_a_sender_waits_for_all_that_the_buffer_does_not_hold(buffer: float, rid_at: float) -> None:
    assert Link(100.0, 10.0).pressed_back(11.0, buffer) == rid_at
