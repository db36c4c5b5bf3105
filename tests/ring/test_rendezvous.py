from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.ring.rendezvous import hash_of, order

members_of_a_ring = st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=12, unique=True)
KEYS = [str(Digest.of(str(n).encode())) for n in range(6000)]
RING = [f"10.0.0.{n}:7300" for n in range(1, 7)]


def test_the_hash_is_the_same_everywhere():
    """Golden values: hosts of different versions must agree on who owns a blob."""
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

    assert hash_of(empty, "origin-1:7200") == 0x6E6000FDAFC47B63
    assert hash_of(empty, "origin-2:7200") == 0xC108C90403AA361E
    assert order(empty, ["origin-1:7200", "origin-2:7200", "origin-3:7200"]) == [
        "origin-3:7200",
        "origin-2:7200",
        "origin-1:7200",
    ]


@given(key=st.text(), members=members_of_a_ring)
def test_every_member_is_in_the_order_once(key: str, members: list[str]):
    assert sorted(order(key, members)) == sorted(members)


@given(key=st.text(), members=members_of_a_ring, data=st.data())
def test_the_order_does_not_depend_on_how_members_are_listed(key, members, data):
    shuffled = data.draw(st.permutations(members))

    assert order(key, shuffled + members[:1]) == order(key, members)


@given(key=st.text(), members=members_of_a_ring, data=st.data())
def test_a_member_that_leaves_changes_nothing_among_the_others(key, members, data):
    gone = data.draw(st.sampled_from(members))
    before = order(key, members)
    before.remove(gone)

    assert order(key, [m for m in members if m != gone]) == before


@given(
    key=st.text(),
    weights=st.dictionaries(st.text(min_size=1), st.floats(0.01, 100.0), min_size=1, max_size=8),
    data=st.data(),
)
def test_a_member_that_leaves_changes_nothing_among_the_others_with_weights(key, weights, data):
    gone = data.draw(st.sampled_from(sorted(weights)))
    before = order(key, weights, weights=weights)
    before.remove(gone)

    assert order(key, [m for m in weights if m != gone], weights=weights) == before


@given(key=st.text(), members=members_of_a_ring)
def test_equal_weights_are_no_weights(key: str, members: list[str]):
    assert order(key, members, weights=dict.fromkeys(members, 2.0)) == order(key, members)


def test_members_own_equal_shares():
    shares = Counter(order(key, RING)[0] for key in KEYS)

    # 6000 keys over 6 members: 1000 each, with a standard deviation of 29.
    assert all(abs(shares[member] - 1000) < 5 * 29 for member in RING)


def test_the_share_of_a_lost_member_is_spread_evenly_over_the_others():
    lost = RING[2]
    heirs = Counter(order(key, RING)[1] for key in KEYS if order(key, RING)[0] == lost)

    assert lost not in heirs
    total = sum(heirs.values())
    # Five heirs of a fifth each.
    deviation = math.sqrt(total * 0.2 * 0.8)
    assert all(abs(count - total / 5) < 5 * deviation for count in heirs.values())
    assert len(heirs) == 5


def test_a_weight_of_three_owns_three_times_as_much():
    shares = Counter(order(key, ["a", "b"], weights={"a": 3.0})[0] for key in KEYS)

    # Three quarters of 6000, with a standard deviation of 33.5.
    assert abs(shares["a"] - 4500) < 5 * 33.5


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_not_a_positive_number_is_refused(weight: float):
    with pytest.raises(ValueError, match="weight of ring member a"):
        order("key", ["a", "b"], weights={"a": weight})


def test_a_ring_without_members_has_an_empty_order():
    assert order("key", []) == []
