from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.ring.rendezvous import order
from swarmpull.ring.repair import ABSENT, NOT_QUEUED, WRITTEN, Copy, Queued, missing_copies

RING = ["a", "b", "c", "d"]


def plan(said: dict[str, int], *, own: str = "a", rank: int = 0, gone: str = "", copies: int = 3):
    return missing_copies(
        [Queued("blob", "digest", rank)],
        lambda _: RING,
        {member: {"blob": answer} for member, answer in said.items()},
        own={own} if own else set(),
        gone=set(gone),
        copies=copies,
    )


def test_what_all_owners_have_is_not_repaired():
    assert plan({"b": 1, "c": 2, "d": ABSENT}) == []


def test_an_owner_that_lacks_a_blob_is_to_get_it():
    assert plan({"b": ABSENT, "c": 2}) == [Copy("blob", "b", 2)]


def test_an_owner_that_is_gone_is_replaced_by_the_next():
    assert plan({"b": 1, "d": ABSENT}, gone="c") == [Copy("blob", "d", 4)]


def test_an_owner_that_does_not_say_is_waited_for():
    assert plan({"b": 1, "d": ABSENT}) == []


def test_one_repairs_and_the_others_leave_it_to_that_one():
    said = {"b": 1, "c": ABSENT}
    assert plan(said) == [Copy("blob", "c", 3)]
    assert plan({"a": 0, "c": ABSENT}, own="b", rank=1) == []
    # Until that one is gone.
    assert plan({"c": ABSENT, "d": ABSENT}, own="b", rank=1, gone="a") == [
        Copy("blob", "c", 3),
        Copy("blob", "d", 4),
    ]


def test_of_two_of_the_same_rank_the_first_of_the_ring_repairs():
    """A blob that was pushed to two origins."""
    assert plan({"b": 0, "c": ABSENT}) != []
    assert plan({"a": 0, "c": ABSENT}, own="b") == []


def test_what_was_written_is_left_alone():
    assert plan({"a": WRITTEN, "c": ABSENT}, own="b", rank=1) == []


def test_a_copy_that_nobody_would_write_is_none():
    """It came there because somebody read it, and may be evicted."""
    assert plan({"b": NOT_QUEUED, "c": 2}) == [Copy("blob", "b", 2)]
    # On one that is no owner it says nothing about those that are.
    assert plan({"b": ABSENT, "c": 2, "d": NOT_QUEUED}) == [Copy("blob", "b", 2)]


def test_an_origin_that_is_not_in_its_own_list_repairs_too():
    assert plan({"a": ABSENT, "b": 1, "c": 2}, own="") == [Copy("blob", "a", 1)]


@pytest.mark.parametrize("copies", [3, 10])
def test_no_more_copies_than_members(copies: int):
    assert len(plan({"b": ABSENT, "c": ABSENT, "d": ABSENT}, copies=copies)) == min(copies, 4) - 1


members = st.integers(1, 7).map(lambda count: [f"origin-{number}" for number in range(count)])


@given(
    members=members,
    copies=st.integers(2, 4),
    blobs=st.lists(st.text("abcdef0123456789", min_size=4), unique=True, max_size=5),
    data=st.data(),
)
def test_after_a_round_all_healthy_owners_have_what_anybody_had(members, copies, blobs, data):
    """Whoever has what: all who are there repair in turn, each by what it is told."""
    gone = set(data.draw(st.lists(st.sampled_from(members), unique=True)))
    alive = [member for member in members if member not in gone]
    queues: dict[str, dict[str, int]] = {}
    for member in alive:
        held = data.draw(st.lists(st.sampled_from(blobs), unique=True)) if blobs else []
        queues[member] = {blob: data.draw(st.integers(0, 3)) for blob in held}
    unqueued = data.draw(st.sampled_from([ABSENT, NOT_QUEUED]))
    had = {blob for queue in queues.values() for blob in queue}

    made: list[tuple[str, Copy[str]]] = []
    for own in alive:
        answers = {
            other: {blob: queues[other].get(blob, unqueued) for blob in blobs}
            for other in alive
            if other != own
        }
        mine = [Queued(blob, blob, rank) for blob, rank in queues[own].items()]
        found = missing_copies(
            mine,
            lambda digest: order(digest, members),
            answers,
            own={own},
            gone=gone,
            copies=copies,
        )
        made += [(own, copy) for copy in found]
    for _, copy in made:
        assert copy.key not in queues[copy.member], "it had it already, or somebody else gave it"
        queues[copy.member][copy.key] = copy.rank

    for blob in had:
        owners = [each for each in order(blob, members) if each not in gone][:copies]
        assert all(blob in queues[owner] for owner in owners)
        assert len({own for own, copy in made if copy.key == blob}) <= 1, "one repairs"
