"""Peer ids and addresses belong to the certificate that announced them first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.swarm.claims import FRESH, Claims
from swarmpull.swarm.peers import PeerContact, PeerKind


def peer(number: int, host: str = "10.0.0.1", port: int = 7100) -> PeerContact:
    return PeerContact(f"{number:032x}", host, port, PeerKind.AGENT)


ORIGIN = PeerContact("f" * 32, "10.0.0.9", 7200, PeerKind.ORIGIN)


@pytest.fixture
def claims() -> Claims:
    claims = Claims(10)
    assert claims.claim(peer(1), "host-1", "10.0.0.1", 0.0) == ""
    return claims


def test_nobody_else_announces_a_peer_id_from_wherever_he_calls(claims: Claims) -> None:
    for contact, called_from in ((peer(1), "10.0.0.1"), (peer(1, "10.0.0.2"), "10.0.0.2")):
        refusal = claims.claim(contact, "host-2", called_from, 12.0)
        assert "peer id " + "0" * 31 + "1 was announced by the certificate of host-1 12 s ago" in (
            refusal
        )
        assert "not by that of host-2" in refusal
    assert claims.refuse_id(peer(1).peer_id, "host-2", 12.0) != ""
    assert claims.refuse_id(peer(1).peer_id, "host-1", 12.0) == ""
    assert claims.refuse_id(peer(2).peer_id, "host-2", 12.0) == ""


def test_nobody_else_announces_an_address_from_another_host(claims: Claims) -> None:
    assert "address 10.0.0.1:7100" in claims.claim(peer(2), "host-2", "10.0.0.2", 1.0)
    # Nothing of it was kept.
    assert claims.claim(peer(2, "10.0.0.2"), "host-2", "10.0.0.2", 1.0) == ""
    assert claims.claim(peer(1), "host-1", "10.0.0.1", 2.0) == ""


def test_an_address_goes_to_whoever_calls_from_there(claims: Claims) -> None:
    assert claims.claim(peer(2), "container-2", "10.0.0.1", 1.0) == ""
    assert "address" in claims.claim(peer(1), "host-1", "10.0.0.3", 2.0)
    claims.check_invariants()


def test_agents_of_one_host_have_ports_of_their_own(claims: Claims) -> None:
    assert claims.claim(peer(2, port=7101), "host-1", "10.0.0.1", 1.0) == ""
    assert claims.claim(peer(3, port=7102), "other", "10.0.0.1", 1.0) == ""
    assert claims.claim(peer(1), "host-1", "10.0.0.1", 1.0) == ""


def test_a_process_that_was_restarted_has_another_id_at_its_address(claims: Claims) -> None:
    assert claims.claim(peer(2), "host-1", "172.16.0.1", 1.0) == ""
    assert len(claims) == 1
    # And one whose host has moved has the same id at another.
    assert claims.claim(peer(2, "10.0.0.5"), "host-1", "10.0.0.5", 2.0) == ""
    assert claims.claim(peer(3), "host-3", "10.0.0.3", 2.0) == ""


def test_what_nobody_announces_any_more_is_free(claims: Claims) -> None:
    assert claims.claim(peer(1), "host-1", "10.0.0.1", 100.0) == ""
    assert claims.claim(peer(1), "host-2", "10.0.0.2", 100.0 + FRESH - 1) != ""
    assert claims.claim(peer(1), "host-2", "10.0.0.2", 100.0 + FRESH) == ""
    assert claims.claim(peer(1), "host-1", "10.0.0.1", 101.0 + FRESH) != ""


def test_what_an_origin_has_said_of_itself_no_agent_announces(claims: Claims) -> None:
    claims.vouch(ORIGIN, 0.0)
    squatter = PeerContact("e" * 32, ORIGIN.host, ORIGIN.port, PeerKind.AGENT)
    assert "by an origin 1 s ago" in claims.claim(squatter, "host-1", "10.0.0.1", 1.0)
    assert claims.claim(ORIGIN, "head-1", "10.0.0.9", 2.0) == ""
    claims.vouch(ORIGIN, 3.0)
    assert "head-1 0 s ago" in claims.claim(ORIGIN, "head-2", "10.0.0.8", 3.0)


def test_an_agent_that_was_there_before_does_not_keep_an_origin_from_its_address(
    claims: Claims,
) -> None:
    origin = PeerContact("f" * 32, "10.0.0.1", 7100, PeerKind.ORIGIN)
    claims.vouch(origin, 1.0)
    assert claims.claim(peer(1), "host-1", "10.0.0.3", 2.0) != ""
    claims.check_invariants()


def test_who_announces_too_much_loses_his_own(claims: Claims) -> None:
    for number in range(100, 200):
        assert claims.claim(peer(number, "10.0.0.2", number), "flood", "10.0.0.2", 1.0) == ""
        claims.check_invariants()
    assert claims.claim(peer(1), "host-2", "10.0.0.2", 2.0) != ""
    # There is room for others, too.
    assert claims.claim(peer(3, "10.0.0.3"), "host-3", "10.0.0.3", 2.0) == ""
    claims.check_invariants()
    assert claims.claim(peer(3, "10.0.0.3"), "host-2", "10.0.0.2", 3.0) != ""


CALLS = st.tuples(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from("abc"), st.integers(1, 3), st.booleans()
)


@given(st.lists(CALLS, max_size=60))
def test_the_books_agree_whatever_is_claimed(calls: list[tuple[int, int, str, int, bool]]) -> None:
    claims = Claims(4)
    for now, (number, host, owner, called_from, is_origin) in enumerate(calls):
        if is_origin:
            claims.vouch(PeerContact(f"{number:032x}", f"h{host}", 1, PeerKind.ORIGIN), now * 30.0)
        else:
            claims.claim(peer(number, f"h{host}", 1), owner, f"h{called_from}", now * 30.0)
        claims.check_invariants()
