from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmpull.swarm.uploads import UploadLimits, Uploads


def make_uploads(*, slots: int = 1, claims: int = 16, timeout: float = 60.0) -> Uploads:
    return Uploads(UploadLimits(slots=slots, claims_per_connection=claims, send_timeout=timeout))


def drain(uploads: Uploads) -> list[tuple[int, int]]:
    """Send one piece after the other until nothing waits."""
    order = []
    while (upload := uploads.start_next(0.0)) is not None:
        order.append(upload)
        uploads.sent(*upload)
        uploads.check_invariants()
    return order


def test_connections_take_turns_however_much_each_of_them_claims():
    uploads = make_uploads()
    for index in range(4):
        uploads.claim(1, index)
    uploads.claim(2, 0)
    for index in range(2):
        uploads.claim(3, index)

    assert drain(uploads) == [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1), (1, 2), (1, 3)]


def test_a_greedy_connection_cannot_get_ahead_by_claiming_more_while_it_is_served():
    uploads = make_uploads()
    uploads.claim(1, 0)
    uploads.claim(2, 0)
    assert uploads.start_next(0.0) == (1, 0)
    uploads.claim(1, 1)
    uploads.sent(1, 0)
    assert uploads.start_next(0.0) == (2, 0)


def test_no_more_pieces_are_under_way_than_there_are_slots():
    uploads = make_uploads(slots=2)
    for connection in (1, 2, 3):
        uploads.claim(connection, 0)
    assert uploads.start_next(0.0) is not None
    assert uploads.start_next(0.0) is not None
    assert uploads.start_next(0.0) is None
    assert uploads.sending_count == 2
    assert uploads.waiting_count == 1


def test_a_connection_has_one_piece_under_way_even_if_slots_are_free():
    uploads = make_uploads(slots=4)
    uploads.claim(1, 0)
    uploads.claim(1, 1)
    assert uploads.start_next(0.0) == (1, 0)
    assert uploads.start_next(0.0) is None
    uploads.sent(1, 0)
    assert uploads.start_next(0.0) == (1, 1)


def test_claims_beyond_the_limit_and_twice_the_same_are_refused():
    uploads = make_uploads(claims=2)
    assert uploads.claim(1, 0)
    assert not uploads.claim(1, 0)
    assert uploads.claim(1, 1)
    assert not uploads.claim(1, 2)
    assert uploads.claim(2, 2), "the limit is per connection"


def test_a_cancelled_claim_is_not_served_and_makes_room():
    uploads = make_uploads(claims=2)
    uploads.claim(1, 0)
    uploads.claim(1, 1)
    uploads.cancel(1, 0)
    assert uploads.claim(1, 2)
    assert drain(uploads) == [(1, 1), (1, 2)]


def test_a_piece_that_is_claimed_again_while_it_is_under_way_is_sent_once():
    uploads = make_uploads()
    uploads.claim(1, 0)
    assert uploads.start_next(0.0) == (1, 0)
    uploads.cancel(1, 0)
    assert uploads.claim(1, 0)
    uploads.sent(1, 0)
    assert drain(uploads) == []
    assert not uploads.is_busy(1)


def test_the_report_of_another_piece_frees_no_slot():
    uploads = make_uploads()
    uploads.claim(1, 0)
    uploads.start_next(0.0)
    uploads.sent(1, 1)
    uploads.sent(2, 0)
    assert uploads.sending_count == 1


def test_a_dropped_connection_gives_its_slot_and_its_claims_back():
    uploads = make_uploads()
    for connection in (1, 2):
        uploads.claim(connection, 0)
        uploads.claim(connection, 1)
    uploads.start_next(0.0)
    uploads.drop_connection(1)
    assert drain(uploads) == [(2, 0), (2, 1)]
    uploads.drop_connection(1)


def test_a_receiver_that_takes_too_long_over_one_piece_is_stalled():
    uploads = make_uploads(slots=2, timeout=10.0)
    uploads.claim(1, 0)
    uploads.claim(2, 0)
    uploads.start_next(100.0)
    uploads.start_next(105.0)
    assert uploads.stalled(109.9) == []
    assert uploads.stalled(110.0) == [1]
    assert uploads.stalled(115.0) == [1, 2]
    uploads.drop_connection(1)
    uploads.drop_connection(2)
    assert uploads.stalled(1e9) == []


@pytest.mark.parametrize("limit", ["slots", "claims_per_connection", "send_timeout"])
def test_limits_that_would_stop_everything_are_refused(limit):
    with pytest.raises(ValueError):
        UploadLimits(**{limit: 0})


class UploadsMachine(RuleBasedStateMachine):
    """Nobody who waits is overtaken by anybody more than once per turn."""

    @initialize(slots=st.integers(1, 3), claims=st.integers(1, 4))
    def start(self, slots: int, claims: int) -> None:
        self.uploads = make_uploads(slots=slots, claims=claims)
        self.sending: dict[int, int] = {}
        self.waiting: dict[int, list[int]] = {}
        self.overtaken: Counter[tuple[int, int]] = Counter()

    @rule(connection=st.integers(1, 5), index=st.integers(0, 5))
    def claim(self, connection: int, index: int) -> None:
        queue = self.waiting.setdefault(connection, [])
        under_way = self.sending.get(connection) == index
        if self.uploads.claim(connection, index) and not under_way:
            queue.append(index)

    @rule(connection=st.integers(1, 5), index=st.integers(0, 5))
    def cancel(self, connection: int, index: int) -> None:
        self.uploads.cancel(connection, index)
        if index in self.waiting.get(connection, []):
            self.waiting[connection].remove(index)
            self._settled(connection)

    @rule()
    def start_next(self) -> None:
        upload = self.uploads.start_next(0.0)
        ready = [c for c, queue in self.waiting.items() if queue and c not in self.sending]
        if upload is None:
            assert not ready or len(self.sending) == self.uploads._limits.slots
            return
        connection, index = upload
        assert self.waiting[connection].pop(0) == index, "first come, first served"
        self.sending[connection] = index
        self._settled(connection)
        for other in ready:
            if other != connection:
                self.overtaken[other, connection] += 1
                assert self.overtaken[other, connection] <= 1

    @precondition(lambda self: self.sending)
    @rule(data=st.data())
    def sent(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(sorted(self.sending)))
        self.uploads.sent(connection, self.sending.pop(connection))

    @rule(connection=st.integers(1, 5))
    def drop(self, connection: int) -> None:
        self.uploads.drop_connection(connection)
        self.sending.pop(connection, None)
        self.waiting.pop(connection, None)
        self._settled(connection)

    @invariant()
    def both_agree(self) -> None:
        if hasattr(self, "uploads"):
            self.uploads.check_invariants()
            assert self.uploads.sending_count == len(self.sending)
            assert self.uploads.waiting_count == sum(map(len, self.waiting.values()))
            for connection in range(1, 6):
                busy = connection in self.sending or bool(self.waiting.get(connection))
                assert self.uploads.is_busy(connection) == busy

    def _settled(self, connection: int) -> None:
        for pair in [pair for pair in self.overtaken if pair[0] == connection]:
            del self.overtaken[pair]


TestUploads = UploadsMachine.TestCase
TestUploads.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
