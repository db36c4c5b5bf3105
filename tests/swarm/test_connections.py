from __future__ import annotations

import math

import pytest

from swarmpull.swarm.connections import (
    BACKOFFS_MAX,
    DIAL_TIMEOUT,
    KNOWN_PEERS_MAX,
    Admission,
    ConnectionLimits,
    ConnectionTable,
    HostPlaces,
)
from swarmpull.swarm.peers import PeerContact, PeerKind

from .playbook import OWN, contact

ACCEPT, BUSY, DUPLICATE = Admission.ACCEPT, Admission.BUSY, Admission.DUPLICATE


def make_table(known: str = "", *, host: HostPlaces | None = None, **limits: float):
    table = ConnectionTable(OWN * 32, ConnectionLimits(**limits), host or HostPlaces(100))
    table.learn(tuple(map(contact, known)))
    return table


def dialled(table: ConnectionTable, wanted: int = 20, now: float = 0.0) -> str:
    names = "".join(chosen.peer_id[0] for chosen in table.dials(wanted, now))
    table.check_invariants()
    return names


def test_peers_are_dialled_in_the_order_of_the_handout():
    assert dialled(make_table("c1a")) == "c1a"


def test_no_more_are_dialled_than_are_wanted_and_allowed():
    assert dialled(make_table("abcdef"), wanted=2) == "ab"
    assert dialled(make_table("abcdef", per_torrent=3)) == "abc"
    assert dialled(make_table("abcdef", host=HostPlaces(4))) == "abcd"


def test_a_pending_dial_takes_a_place_like_an_active_connection():
    host = HostPlaces(100)
    table = make_table("abcdef", host=host, per_torrent=3)
    assert dialled(table, wanted=2) == "ab"
    table.connected("a" * 32, 1)
    assert host.taken == 2
    assert dialled(table, wanted=20) == "c"
    assert dialled(table, wanted=20) == ""


def test_the_places_of_the_host_are_shared_by_its_torrents():
    host = HostPlaces(3)
    one, other = make_table("abc", host=host), make_table("abc", host=host)
    assert dialled(one, wanted=2) == "ab"
    assert dialled(other) == "a"
    assert other.admit("f" * 32) is BUSY
    one.close()
    assert host.taken == 1
    assert other.admit("f" * 32) is ACCEPT


def test_this_host_does_not_dial_itself():
    assert dialled(make_table(f"a{OWN}b")) == "ab"


def test_nobody_is_dialled_twice():
    table = make_table("ab")
    assert dialled(table) == "ab"
    table.connected("a" * 32, 1)
    table.learn((contact("a"), contact("b")))
    assert dialled(table) == ""


def test_a_peer_that_could_not_be_reached_is_left_alone_for_twice_as_long_each_time():
    table = make_table("a", backoff_initial=1.0, backoff_max=5.0)
    now = 0.0
    for pause in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert dialled(table, now=now) == "a"
        table.dial_failed("a" * 32, now)
        assert table.next_deadline(now) == now + pause
        assert dialled(table, now=now + pause - 0.01) == ""
        now += pause


def test_a_connection_alone_does_not_end_the_doubling():
    # Whoever accepts every connection and never gives anything is tried less and less often.
    table = make_table("a", backoff_initial=1.0)
    for number, (now, pause) in enumerate([(0.0, 1.0), (10.0, 2.0), (20.0, 4.0)]):
        assert dialled(table, now=now) == "a"
        table.connected("a" * 32, number)
        table.check_invariants()
        assert table.next_deadline(now) == math.inf, "nothing is due while it is connected"
        table.lost("a" * 32, now)
        assert dialled(table, now=now + pause - 0.1) == ""
    assert dialled(table, now=24.0) == "a"


def test_a_piece_ends_the_doubling():
    table = make_table("a", backoff_initial=1.0)
    for now in (0.0, 10.0, 20.0):
        assert dialled(table, now=now) == "a"
        table.dial_failed("a" * 32, now)
    assert dialled(table, now=30.0) == "a"
    table.connected("a" * 32, 1)
    table.proved("a" * 32)
    table.lost("a" * 32, 40.0)
    assert dialled(table, now=40.9) == ""
    assert dialled(table, now=41.0) == "a"


def test_those_who_were_tried_wait_until_everybody_else_had_a_turn():
    table = make_table("abc", per_torrent=1, backoff_initial=1.0)
    tried = ""
    for now in range(0, 60, 10):
        name = dialled(table, now=float(now))
        tried += name
        if name == "b":
            table.dial_failed("b" * 32, now + 1.0)
        else:
            table.connected(name * 32, now)
            table.lost(name * 32, now + 1.0)
        table.learn(tuple(map(contact, "abc")))
    assert tried == "abcabc"


def test_a_dial_that_is_never_reported_on_gives_its_place_back():
    host = HostPlaces(100)
    table = make_table("a", host=host)
    assert dialled(table, now=1.0) == "a"
    assert table.next_deadline(1.0) == 1.0 + DIAL_TIMEOUT
    table.expire(1.0 + DIAL_TIMEOUT)
    assert host.taken == 0
    assert table.is_backed_off("a" * 32, 1.0 + DIAL_TIMEOUT)


def test_newcomers_are_admitted_until_the_torrent_or_the_host_is_full():
    host = HostPlaces(3)
    table = make_table("a", host=host, per_torrent=2)
    assert table.admit("b" * 32) is ACCEPT
    table.connected("b" * 32, 1)
    dialled(table)
    assert table.admit("c" * 32) is BUSY, "one active, one pending"
    host.taken = 3
    assert make_table(host=host).admit("c" * 32) is BUSY


def test_nobody_is_connected_twice():
    table = make_table()
    table.connected("a" * 32, 1)
    assert table.admit("a" * 32) is DUPLICATE
    assert table.admit(OWN * 32) is DUPLICATE


def test_of_two_dials_at_once_the_one_of_the_smaller_id_stands():
    table = make_table("1a")
    dialled(table)
    assert table.admit("a" * 32) is DUPLICATE, "ours stands"
    assert table.admit("1" * 32) is ACCEPT, "theirs stands"


def test_a_peer_that_took_our_place_by_dialling_us_is_not_counted_twice():
    host = HostPlaces(100)
    table = make_table("1", host=host)
    dialled(table)
    table.connected("1" * 32, 1)
    table.dial_failed("1" * 32, 0.0)
    assert host.taken == table.active_count == 1
    assert not table.is_backed_off("1" * 32, 0.0)
    table.check_invariants()


def test_a_peer_that_could_not_be_reached_may_still_reach_us_but_one_that_was_lost_must_wait():
    table = make_table("ab")
    dialled(table)
    table.dial_failed("a" * 32, 0.0)
    assert table.is_backed_off("a" * 32, 0.5)
    assert not table.is_refused("a" * 32, 0.5)
    table.connected("b" * 32, 1)
    table.lost("b" * 32, 0.0)
    assert table.is_refused("b" * 32, 0.5)
    assert not table.is_refused("b" * 32, 1.0)


def test_a_ban_outlasts_failures_that_come_after_it():
    table = make_table("a", corrupt_backoff=300.0)
    dialled(table)
    table.ban("a" * 32, 0.0)
    table.dial_failed("a" * 32, 1.0)
    assert table.is_banned("a" * 32, 299.0)
    assert table.is_refused("a" * 32, 299.0)
    assert dialled(table, now=299.0) == ""
    assert dialled(table, now=300.0) == "a"


def test_old_back_offs_are_forgotten():
    table = make_table("a", backoff_initial=1.0, backoff_max=10.0)
    table.connected("b" * 32, 1)
    table.lost("b" * 32, 0.0)
    table.expire(10.9)
    assert len(table._backoffs) == 1
    table.expire(11.1)
    assert len(table._backoffs) == 0


def test_memory_is_bounded_however_many_peers_come_and_go():
    table = make_table()
    for number in range(BACKOFFS_MAX + 50):
        name = f"{number:032x}"
        table.learn((PeerContact(name, "h", 1, PeerKind.AGENT),))
        table.connected(name, number)
        table.lost(name, 0.0)
    table.check_invariants()
    assert len(table._known) == KNOWN_PEERS_MAX
    assert len(table._backoffs) == BACKOFFS_MAX
    assert table.is_backed_off(f"{BACKOFFS_MAX + 49:032x}", 0.5), "the oldest go first"


@pytest.mark.parametrize("limit", ["per_torrent", "per_host", "backoff_initial", "idle_timeout"])
def test_limits_that_would_stop_everything_are_refused(limit):
    with pytest.raises(ValueError):
        ConnectionLimits(**{limit: 0})
