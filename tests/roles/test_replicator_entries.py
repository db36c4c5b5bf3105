from __future__ import annotations

import attrs
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.roles.replicator_entries import Entries
from swarmpull.store.remote_queue import RemoteChange

CHANGES = st.builds(
    RemoteChange,
    remote=st.sampled_from(["west", "north"]),
    repository=st.just("team/app"),
    tag=st.sampled_from(["v1", "v2", "v3"]),
    time=st.just(1),
    source=st.just("index"),
    enqueued_at=st.just(1.0),
    standby=st.booleans(),
    set_aside=st.booleans(),
)


@given(st.lists(st.tuples(CHANGES, st.booleans()), max_size=30))
def test_the_numbers_are_those_of_the_entries(steps: list[tuple[RemoteChange, bool]]) -> None:
    entries, known = Entries(), {}
    for change, is_removed in steps:
        entry = entries.get(change.key)
        if entry is None:
            entries.add(change, 0.0)
        elif is_removed:
            entries.remove(change.key)
        else:
            entries.replace(entry, change)
        if entry is not None and is_removed:
            del known[change.key]
        else:
            known[change.key] = change

    mine = [change for change in known.values() if not change.standby]
    assert [entry.change for entry in entries] == list(known.values())
    assert [entry.change for entry in entries.mine()] == mine
    assert set(entries.standby) == {key for key, change in known.items() if change.standby}
    assert entries.remotes == {change.remote for change in mine}
    aside = [change for change in mine if change.set_aside]
    assert entries.set_aside_count == len(aside)
    for remote in ("west", "north"):
        assert entries.queued(remote) == sum(change.remote == remote for change in mine)
        assert entries.set_aside(remote) == sum(change.remote == remote for change in aside)


def test_a_change_that_goes_to_another_state_is_counted_once() -> None:
    entries = Entries()
    change = RemoteChange("west", "team/app", "v1", 1, "index", 1.0, standby=True)
    entries.add(change, 0.0)
    entry = entries.get(change.key)
    assert entry is not None
    assert (len(entries), entries.queued("west"), list(entries.mine())) == (1, 0, [])

    entries.replace(entry, attrs.evolve(change, standby=False))
    assert (len(entries), entries.queued("west"), list(entries.mine())) == (1, 1, [entry])
