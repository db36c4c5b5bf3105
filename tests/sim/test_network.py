from __future__ import annotations

import pytest

from swarmpull.sim.network import Clock, Link


def run(clock: Clock, until: float = 100.0) -> None:
    clock.run(until, lambda: False)


def test_things_happen_in_the_order_of_time_and_then_of_scheduling():
    clock, happened = Clock(), []
    for when, name in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")]:
        clock.at(when, happened.append, name)
    run(clock)
    assert happened == ["a", "b", "c", "d"]
    assert clock.now == 2.0
    assert clock.processed == 4


def test_nothing_happens_in_the_past():
    clock, happened = Clock(), []
    clock.at(5.0, lambda: clock.at(1.0, lambda: happened.append(clock.now)))
    run(clock)
    assert happened == [5.0]


def test_a_run_ends_at_its_limit_or_when_it_is_told_to():
    clock, happened = Clock(), []
    for when in (1.0, 2.0, 3.0, 4.0):
        clock.at(when, happened.append, when)
    clock.run(3.0, lambda: len(happened) == 2)
    assert happened == [1.0, 2.0]
    clock.run(3.0, lambda: False)
    assert happened == [1.0, 2.0, 3.0]


def test_an_uplink_sends_one_after_the_other_at_its_rate():
    link = Link(up_rate=100.0, down_rate=100.0)
    assert link.send(50, now=1.0) == (1.0, 1.5)
    assert link.send(100, now=1.2) == (1.5, 2.5)
    assert link.send(10, now=9.0) == (9.0, 9.1)
    assert link.bytes_sent == 160


def test_bytes_that_come_at_the_pace_of_the_receiver_are_in_with_the_last_one():
    assert Link(100.0, 100.0).receive(100, first_at=1.0, last_at=2.0) == 2.0


def test_a_slow_sender_decides_and_so_does_a_slow_receiver():
    assert Link(100.0, 1000.0).receive(100, first_at=1.0, last_at=2.0) == 2.0
    assert Link(100.0, 10.0).receive(100, first_at=1.0, last_at=2.0) == 11.0


def test_two_senders_share_the_downlink_of_their_receiver():
    link = Link(100.0, 100.0)
    assert link.receive(100, first_at=1.0, last_at=2.0) == 2.0
    assert link.receive(100, first_at=1.5, last_at=2.5) == 3.0
    assert link.receive(100, first_at=10.0, last_at=11.0) == pytest.approx(11.0)
