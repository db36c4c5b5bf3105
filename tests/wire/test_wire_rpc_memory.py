from hypothesis import given
from hypothesis import strategies as st

from swarmpull.wire.rpc_memory import RpcMemory


def test_nobody_has_to_go_up_to_the_limit_and_beyond_it_who_has_the_most():
    memory = RpcMemory(80)
    memory.set("a", 50)
    memory.set("b", 10)
    memory.set("c", 20)
    assert memory.bytes == 80
    assert memory.too_greedy() == []
    memory.set("b", 11)
    assert memory.too_greedy() == ["a"]
    assert memory.ended == 1


def test_as_many_go_as_free_an_eighth_of_the_limit():
    memory = RpcMemory(80)
    for number in range(81):
        memory.set(number, 1)
    assert len(memory.too_greedy()) == 11


def test_what_is_kept_for_nobody_is_not_remembered():
    memory = RpcMemory(80)
    memory.set("a", 50)
    memory.set("a", 0)
    memory.set("b", 0)
    assert (memory.bytes, memory.held_by("a")) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_after_those_have_gone_the_others_are_within_the_limit_and_none_had_more(changes):
    memory, held = RpcMemory(100), {}
    for holder, count in changes:
        held[holder] = count
        memory.set(holder, count)
        gone = memory.too_greedy()
        least = min((held[each] for each in gone), default=None)
        for each in gone:
            memory.set(each, 0)
            del held[each]
        assert memory.bytes == sum(held.values()) <= 100
        assert least is None or all(count <= least for count in held.values())
