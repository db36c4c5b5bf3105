"""Offer and claim: what a host asks for, what it offers, and what it sends to whom."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.messages import (
    ByeReason,
    Cancel,
    Claim,
    Have,
    HaveAll,
    Message,
    Offer,
    Pass,
    Want,
)
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.offers import (
    LAPSES_MAX,
    OFFER_PATIENCE,
    OFFER_TIMEOUT,
    WANT_PATIENCE,
    WANTS_FOR_ROOM,
    OfferLimits,
)
from swarmpull.swarm.picker import PickerLimits
from swarmpull.swarm.scheduler import LEECHING_TICK, SEEDING_TICK, SwarmLimits
from swarmpull.swarm.timing import PROGRESS_TIMEOUT_MIN, TIMEOUT_INITIAL, TIMEOUT_MIN
from swarmpull.swarm.torrent import SILENCE_MIN

from .playbook import (
    OWN,
    Play,
    cancel,
    claims,
    claims_in_order,
    close,
    contact,
    hello,
    is_due,
    metainfo_of,
    offer,
    offers,
    passes,
    tells,
    tells_all,
    uploads,
    want,
    wants,
)

FIRST_TIMEOUT = 2 * TIMEOUT_INITIAL


def host(
    have: str,
    *,
    seed: int = 0,
    window_share: float = 0.5,
    stall_timeout: float = 1e6,
    **limits: float,
) -> Play:
    """A host with one torrent, whose peers stay, however idle; it sends one piece and promises two more."""
    limits = {"slots": 1, "ahead_min": 2} | limits
    play = Play(
        have,
        limits=SwarmLimits(
            connections=ConnectionLimits(idle_timeout=1e6),
            exchange=OfferLimits(**limits),
            picker=PickerLimits(window_share=window_share),
            stall_timeout=stall_timeout,
        ),
        seed=seed,
    )
    play >> play.added()
    return play


def seeder(peers: str = "", *, pieces: int = 4, **limits: float) -> Play:
    """A seeder with peers that have nothing, connected as 1, 2, ... in that order."""
    play = host("#" * pieces, **limits)
    for connection, name in enumerate(peers, start=1):
        play >> play.connected(connection, name, "." * pieces)
    return play


def add(play: Play, name: str, pieces: int, *, complete: bool) -> Metainfo:
    """One more torrent on the same host."""
    metainfo = metainfo_of(pieces, name)
    have = (1 << pieces) - 1 if complete else 0
    play >> ev.TorrentAdded(metainfo, "", have, verified=complete, announce=False)
    return metainfo


def join(play: Play, metainfo: Metainfo, connection: int, name: str, has: str) -> list[act.Action]:
    return play >> ev.PeerConnected(connection, hello(metainfo, name, has), contact(name), None)


def say(play: Play, connection: int, *messages: Message) -> list[act.Action]:
    return [action for message in messages for action in play >> play.says(connection, message)]


def proved(play: Play, connection: int) -> None:
    """A peer offers and gives a piece."""
    [index] = claims_in_order(play >> play.says(connection, Offer()))
    play >> ev.PieceReceived(connection, index)
    play >> ev.PieceStored(connection, play.digest, index)


def pull(play: Play, connection: int, index: int) -> list[act.Action]:
    """A peer wants, is offered, and claims."""
    say(play, connection, Want())
    return say(play, connection, Claim(index))


# --- wanting ----------------------------------------------------------------------------------


def test_a_want_goes_to_a_peer_that_has_something_we_lack_and_to_no_other():
    play = host("#..")
    assert wants(play >> play.connected(1, "a", "##.")) == [1]
    assert wants(play >> play.connected(2, "b", "#..")) == []
    assert play >> play.says(2, Have(2)) == [want(2)]
    assert play >> play.says(2, Have(1)) == [], "once is enough"


def test_a_peer_that_becomes_complete_is_wanted():
    play = host("..")
    play >> play.connected(1, "a", "..")
    assert play >> play.says(1, HaveAll()) == [want(1)]


def test_a_seeder_wants_nothing():
    play = seeder("a")
    assert play >> play.says(1, Have(0)) == []


def test_one_want_brings_one_offer_and_a_claim_asks_for_the_next():
    play = host("....")
    play >> play.connected(1, "a", "####")
    proved(play, 1)
    first, second = play >> play.says(1, Offer())
    assert isinstance(first.message, Claim)
    assert second == want(1)
    play >> play.says(1, Offer())
    [last] = play >> play.says(1, Offer())
    assert isinstance(last.message, Claim), "and nothing is left to want"
    torrent = play.scheduler.torrent(play.digest)
    assert sorted(torrent.peers[1].claims) == list(bitfield.indices(torrent.full & ~torrent.have))


def test_a_peer_that_has_given_nothing_yet_is_asked_for_one_piece_at_a_time():
    play = host("....")
    play >> play.connected(1, "a", "####")
    [claimed] = claims_in_order(play >> play.says(1, Offer()))
    assert wants(play.wait_until(play.now + 1.0)) == []
    assert wants(play >> ev.PieceReceived(1, claimed)) == [1]
    assert wants(play >> play.says(1, Offer())) == [1], "it gave one"


def test_an_offer_of_somebody_who_has_nothing_for_us_is_passed():
    play = host("#.")
    play >> play.connected(1, "a", "#.")
    assert play >> play.says(1, Offer()) == [passes(1)]


def test_an_offer_that_finds_no_room_is_passed_and_wanted_again_when_there_is_room():
    play = host("....", inbound=1)
    play >> play.connected(1, "a", "####")
    play >> play.connected(2, "b", "####")
    [claimed] = claims_in_order(play >> play.says(1, Offer()))
    assert play >> play.says(2, Offer()) == [passes(2)]
    assert sorted(wants(play.piece(1, claimed))) == [1, 2]


def test_every_torrent_may_have_one_claim_however_many_others_download():
    play = host("..", inbound=1)
    other = add(play, "another", 2, complete=False)
    play >> play.connected(1, "a", "##")
    play >> play.says(1, Offer())
    assert wants(join(play, other, 2, "a", "##")) == [2]
    assert len(claims_in_order(play >> play.says(2, Offer()))) == 1
    assert play >> play.says(2, Offer()) == [passes(2)], "and no second one"


def test_claims_of_all_torrents_together_stay_within_the_limit():
    play = host("." * 8, inbound=3)
    others = [add(play, f"blob {number}", 8, complete=False) for number in range(4)]
    play >> play.connected(100, "a", "#" * 8)
    for connection, metainfo in enumerate(others, start=101):
        join(play, metainfo, connection, "a", "#" * 8)
    for _ in range(4):
        for connection in range(100, 105):
            play >> play.says(connection, Offer())
    claimed = [t.claimed for t in play.scheduler.statistics()]
    assert sum(claimed) <= 3 + 4
    assert min(claimed) == 1, "each torrent gets on"


@pytest.mark.parametrize(
    ("round_trip", "claimed"),
    [(0.0, 2), (0.02, 2), (0.05, 3), (0.1, 4), (1.0, 4)],
)
def test_more_is_claimed_where_pieces_come_faster_than_answers(round_trip: float, claimed: int):
    pieces = 60
    play = host("#" + "." * (pieces - 1), inbound=2)
    play >> play.connected(1, "0", "." * pieces)
    for _ in range(20):
        assert play >> play.says(1, Want()) == [offer(1)]
        play.after(round_trip) >> play.says(1, Pass())
    for connection in range(2, 8):
        play >> play.connected(connection, f"{connection + 4:x}", "#" * pieces)
    for count in range(20):  # twenty in a second
        connection = 2 + count % 6
        play.after(0.05)
        proved(play, connection)
    made = [claims_in_order(play >> play.says(2 + n % 6, Offer())) for n in range(12)]

    assert sum(map(len, made)) == claimed


def test_no_more_wants_are_out_than_the_room_is_worth():
    play = host("." * 20, inbound=2)
    asked = []
    play >> play.connected(1, "a", "#" * 20)
    play >> play.says(1, Offer())
    for connection in range(2, 15):
        asked += wants(play >> play.connected(connection, f"{connection:x}", "#" * 20))
    assert len(asked) == WANTS_FOR_ROOM


def test_wants_that_nobody_answers_do_not_use_up_the_wants():
    play = host("." * 20, inbound=2)
    play >> play.connected(1, "a", "#" * 20)
    play >> play.says(1, Offer())
    asked = []
    others = set(range(2, 15)) - {int(OWN, 16), 0xA}
    for connection in sorted(others):
        asked += wants(play >> play.connected(connection, f"{connection:x}", "#" * 20))
    before = play.now
    more = wants(play.wait())
    assert is_due(play.now, before + WANT_PATIENCE)
    assert set(more) == others - set(asked)
    play.wait_until(play.now + 10 * WANT_PATIENCE)
    assert claims(play >> play.says(asked[2], Offer())), "a late offer is as good"


def test_wants_for_a_torrent_with_nothing_left_to_claim_do_not_hold_up_another():
    play = host(".", inbound=2)
    for connection, name in enumerate("abcdef01", start=1):
        play >> play.connected(connection, name, "#")
    assert claims(play >> play.says(1, Offer())) == {1: [0]}
    other = add(play, "another", 20, complete=False)
    join(play, other, 11, "a", "#" * 20)
    play >> play.says(11, Offer())
    play.piece(1, 0)
    assert wants(join(play, other, 12, "b", "#" * 20)) == [12]


def test_a_piece_that_is_lost_on_the_disk_is_wanted_again():
    play = host(".")
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    assert play >> ev.PieceReceived(1, 0) == []
    assert play >> ev.PieceLost(play.digest, 0) == [want(1)]


def test_after_a_wrong_piece_somebody_else_is_wanted():
    play = host(".")
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    play >> play.connected(2, "b", "#")
    play >> ev.PieceReceived(1, 0)
    assert play >> play.rejected(1, 0) == [close(1, ByeReason.CORRUPT, "piece 0"), want(2)]


# --- choosing ---------------------------------------------------------------------------------


def chosen(play: Play, suggested: int = -1) -> int:
    [index] = claims_in_order(play >> play.says(1, Offer(suggested)))
    return index


def test_the_suggested_piece_is_claimed():
    picks = set()
    for seed in range(20):
        play = host("....", seed=seed)
        play >> play.connected(1, "a", "####")
        picks.add(chosen(play, 2))
    assert picks == {2}


def test_without_a_suggestion_the_rarest_piece_is_claimed():
    for seed in range(20):
        play = host("....", seed=seed)
        play >> play.connected(1, "a", "####")
        play >> play.connected(2, "b", "#.##")
        assert chosen(play) == 1


@pytest.mark.parametrize("suggested", [0, 3], ids=["had", "not there"])
def test_a_suggestion_that_is_of_no_use_is_replaced(suggested):
    play = host("#...")
    play >> play.connected(1, "a", "###.")
    play >> play.connected(2, "b", ".#..")
    assert chosen(play, suggested) == 2


def test_a_suggestion_that_is_claimed_elsewhere_is_replaced():
    play = host("..")
    play >> play.connected(1, "a", "##")
    play >> play.connected(2, "b", "##")
    assert claims(play >> play.says(2, Offer(0))) == {2: [0]}
    assert chosen(play, 0) == 1


def test_a_suggestion_comes_before_what_a_reader_waits_for():
    # As long as nobody has a piece every reader waits for it; the own one may come from others.
    play = host("." * 8, window_share=1.0)
    play >> ev.ReaderMoved(play.digest, 1, 5)
    play >> play.connected(1, "a", "#" * 8)
    assert chosen(play, 2) == 2


def test_a_reader_comes_first_where_nothing_is_suggested():
    play = host("." * 8, window_share=1.0)
    play >> ev.ReaderMoved(play.digest, 1, 5)
    play >> play.connected(1, "a", "#" * 8)
    assert claims(play >> play.says(1, Offer())) == {1: [5]}


# --- offering ---------------------------------------------------------------------------------


def test_a_want_is_offered_a_slot_at_once_while_there_is_room():
    play = seeder("ab", ahead_min=1, ahead_max=1)
    assert list(offers(play >> play.says(1, Want()))) == [1]
    assert play >> play.says(2, Want()) == [], "one promise at a time"
    assert play >> play.says(1, Want()) == [], "an offer is out to it"


def test_a_want_is_answered_once_however_often_it_is_said():
    play = seeder("ab", ahead_min=1, ahead_max=1)
    play >> play.says(1, Want())
    for _ in range(100):
        assert play >> play.says(2, Want()) == []
    assert play.scheduler.uplink().wanting == 1
    assert list(offers(play >> play.says(1, Pass()))) == [2]
    assert play >> play.says(2, Pass()) == []


def test_a_claim_is_served_at_once_when_the_uplink_is_free():
    play = seeder("a")
    play >> play.says(1, Want())
    assert play >> play.says(1, Claim(2)) == [act.SendPiece(1, play.digest, 2)]


def test_a_claim_without_an_offer_is_passed():
    play = seeder("a")
    assert play >> play.says(1, Claim(2)) == [passes(1, 2)]
    assert uploads(pull(play, 1, 2)) == [(1, 2)]
    assert play >> play.says(1, Claim(3)) == [passes(1, 3)], "one offer, one claim"


def test_a_claim_of_a_piece_that_is_not_there_is_passed():
    play = host("#.")
    play >> play.connected(1, "a", "..")
    assert play >> play.says(1, Want()) == [offer(1)]
    assert play >> play.says(1, Claim(1)) == [passes(1, 1)]


def test_one_piece_is_sent_at_a_time_and_the_next_without_a_pause():
    play = seeder("abc", slots=1, ahead_min=2)
    assert list(offers(say(play, 1, Want()) + say(play, 2, Want()))) == [1, 2]
    assert uploads(say(play, 1, Claim(0))) == [(1, 0)]
    assert uploads(say(play, 2, Claim(1))) == []
    assert uploads(play >> ev.PieceSent(1, 0)) == [(2, 1)]


def test_as_many_pieces_are_sent_at_once_as_there_are_slots_and_one_on_a_connection():
    play = seeder("abc", slots=2, ahead_min=4)
    assert uploads(pull(play, 1, 0)) == [(1, 0)]
    assert uploads(pull(play, 1, 1)) == [], "one piece at a time on a connection"
    assert uploads(pull(play, 2, 0)) == [(2, 0)]
    assert uploads(pull(play, 3, 0)) == []
    assert uploads(play >> ev.PieceSent(2, 0)) == [(3, 0)]
    assert uploads(play >> ev.PieceSent(1, 0)) == [(1, 1)]


def test_peers_take_turns():
    play = seeder("abc", ahead_min=1, ahead_max=1)
    order = []
    started = [action for c in (1, 2, 3) for action in say(play, c, Want())]
    for _ in range(9):
        [connection] = offers(started)
        order.append(connection)
        started = say(play, connection, Pass(), Want())
    assert order == [1, 2, 3] * 3


def test_a_pass_gives_the_slot_to_the_next():
    play = seeder("ab", ahead_min=1, ahead_max=1)
    play >> play.says(1, Want())
    play >> play.says(2, Want())
    assert list(offers(play >> play.says(1, Pass()))) == [2]


def test_an_offer_that_is_not_answered_lapses():
    play = seeder("ab", ahead_min=1, ahead_max=1)
    play >> play.says(1, Want())
    play >> play.says(2, Want())
    assert list(offers(play.wait())) == [2], "its place goes to another"
    assert is_due(play.now, 100.0 + OFFER_PATIENCE, SEEDING_TICK)
    play.wait_until(100.0 + OFFER_TIMEOUT + SEEDING_TICK)
    assert play >> play.says(1, Claim(0)) == [passes(1, 0)], "too late"


def test_an_answer_counts_after_its_place_was_offered_to_another():
    play = seeder("ab", ahead_min=1, ahead_max=1)
    play >> play.says(1, Want())
    play >> play.says(2, Want())
    assert list(offers(play.wait())) == [2]
    assert uploads(play >> play.says(1, Claim(0))) == [(1, 0)]


def test_a_peer_that_wants_and_never_answers_is_dropped():
    play = seeder("ab")
    actions = []
    for _ in range(LAPSES_MAX):
        play >> play.says(1, Want())
        pull(play, 2, 0)
        play >> ev.PieceSent(2, 0)
        actions += play.wait_until(play.now + OFFER_TIMEOUT + SEEDING_TICK)
    assert close(1, ByeReason.STALLED) in actions
    assert play.scheduler.connection_count == 1, "the one that answers stays"


def test_promises_grow_while_the_uplink_runs_dry_and_shrink_when_claims_pile_up():
    names = "0123467abcd"
    play = seeder(names, pieces=40, ahead_min=2, ahead_max=6)
    waiting = list(range(1, len(names) + 1))
    for connection in waiting:
        play >> play.says(connection, Want())

    def promised() -> int:
        return play.scheduler.uplink().offered + play.scheduler.uplink().claimed

    def answer(count: int) -> None:
        for connection in list(play.scheduler._exchange._offers)[:count]:
            say(play, connection, Claim(0), Want())

    most = 0
    answer(1)
    for _ in range(10):  # only one peer at a time has answered when a piece is through
        [connection] = play.scheduler._exchange._sending
        play >> ev.PieceSent(connection, 0)
        assert promised() <= 6
        most = max(most, promised())
        answer(1)
    assert most == 6

    answer(6)
    for _ in range(10):  # everybody answers at once
        [connection] = play.scheduler._exchange._sending
        play >> ev.PieceSent(connection, 0)
        answer(6)
    assert promised() <= 3


def test_bounds_of_the_promises_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError):
        OfferLimits(ahead_min=5, ahead_max=4)


@pytest.mark.parametrize("limit", ["slots", "ahead_min", "ahead_max", "inbound", "send_timeout"])
def test_limits_that_would_stop_everything_are_refused(limit):
    with pytest.raises(ValueError):
        OfferLimits(**{limit: 0})


@given(
    wanting=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=40),
    ahead=st.integers(1, 4),
    slots=st.integers(1, 3),
)
def test_a_huge_layer_does_not_starve_a_small_blob(
    wanting: list[tuple[int, int]], ahead: int, slots: int
) -> None:
    """A peer waits for no more offers than other torrents and peers of its own have a turn."""
    limits = OfferLimits(slots=slots, ahead_min=ahead, ahead_max=ahead)
    play = Play("####", limits=SwarmLimits(exchange=limits))
    torrents = [add(play, f"blob {number}", 4, complete=True) for number in range(3)]
    for number, metainfo in enumerate(torrents):
        for peer in range(6):
            join(play, metainfo, 10 * number + peer, f"{peer + 10:x}", "....")
    waiting: dict[int, int] = {}
    open_offers: list[int] = []

    def take(actions: list[act.Action]) -> None:
        for connection in offers(actions):
            waiting.pop(connection)
            open_offers.append(connection)
            for other in waiting:
                if other // 10 != connection // 10:
                    waiting[other] += 1

    for number, peer in wanting:
        connection = 10 * number + peer
        if connection not in waiting and connection not in open_offers:
            waiting[connection] = 0
            take(say(play, connection, Want()))
    for _ in range(100):
        if not open_offers:
            break
        take(say(play, open_offers.pop(0), Pass()))
        # Torrents take turns: n-th in its own line waits for n turns of the two others at most.
        for connection, passed_by in waiting.items():
            own = [c for c in waiting if c // 10 == connection // 10]
            assert passed_by <= 2 * (6 - len(own) + own.index(connection) + 1)
    assert not waiting, "everybody had a turn"


def test_torrents_take_turns_however_many_want_the_one():
    play = seeder("0123467ab", ahead_min=1, ahead_max=1)
    for connection in range(1, 10):
        play >> play.says(connection, Want())
    small = add(play, "small", 1, complete=True)
    join(play, small, 50, "a", ".")
    play >> play.says(50, Want())
    served = []
    for _ in range(3):
        [connection] = play.scheduler._exchange._offers
        served.append(connection)
        say(play, connection, Pass())
    assert 50 in served[:3]


# --- suggestions ------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_a_seeder_suggests_each_piece_once_before_any_twice(
    pieces: int, peers: int, seed: int
) -> None:
    play = seeder("abcdef"[: peers + 1], pieces=pieces, seed=seed, ahead_min=1, ahead_max=1)
    suggested: list[int] = []
    while len(suggested) < pieces:
        connection = len(suggested) % peers + 1
        [index] = offers(say(play, connection, Want())).values()
        suggested.append(index)
        assert uploads(say(play, connection, Claim(index))) == [(connection, index)]
        play >> ev.PieceSent(connection, index)
    assert sorted(suggested) == list(range(pieces))


def test_when_everything_was_given_once_nothing_is_suggested():
    play = seeder("ab", pieces=2)
    for _ in range(2):
        [index] = offers(say(play, 1, Want())).values()
        say(play, 1, Claim(index))
        play >> ev.PieceSent(1, index)
    assert offers(say(play, 2, Want())) == {2: -1}


def test_a_piece_that_was_given_without_being_suggested_is_not_suggested_after_that():
    for seed in range(10):
        play = seeder("ab", pieces=2, seed=seed)
        pull(play, 1, 0)
        assert offers(say(play, 2, Want())) == {2: 1}


def test_a_single_peer_chooses_for_itself():
    play = seeder("a")
    assert offers(say(play, 1, Want())) == {1: -1}


def test_what_a_neighbour_has_is_not_suggested():
    play = host("####")
    play >> play.connected(1, "a", "##..")
    play >> play.connected(2, "b", "....")
    play >> play.says(1, Have(2))
    assert offers(say(play, 2, Want())) == {2: 3}


def test_what_a_newcomer_brings_is_not_suggested_any_more():
    play = seeder("ab")
    [first] = offers(say(play, 1, Want())).values()
    others = "".join("." if index == first else "#" for index in range(4))
    play >> play.connected(3, "c", others)
    assert offers(say(play, 2, Want())) == {2: -1}


def test_a_peer_that_becomes_complete_ends_the_suggestions():
    play = host("####")
    play >> play.connected(1, "a", "....")
    play >> play.connected(2, "b", "....")
    pull(play, 1, 0)
    play >> play.says(1, HaveAll())
    assert offers(say(play, 2, Want())) == {2: -1}


@pytest.mark.parametrize(
    "how", ["passed", "claimed another", "lapsed", "left", "lost", "cancelled"]
)
def test_a_suggestion_that_was_not_taken_is_open_again(how):
    play = host("##", ahead_min=3)
    play >> play.connected(1, "a", "#.")  # it lacks piece 1 alone
    play >> play.connected(2, "b", "#.")
    play >> play.connected(3, "c", "#.")
    if how == "cancelled":
        pull(play, 3, 0)  # the uplink is busy
        play.scheduler._exchange._ungiven[play.scheduler.torrent(play.digest)] |= 2
    assert offers(say(play, 1, Want())) == {1: 1}
    if how == "passed":
        play >> play.says(1, Pass())
    elif how == "claimed another":
        play >> play.says(1, Claim(0))
    elif how == "lapsed":
        play.wait_until(play.now + OFFER_TIMEOUT + SEEDING_TICK)
    elif how == "left":
        play >> ev.PeerDisconnected(1)
    elif how == "lost":
        assert uploads(say(play, 1, Claim(1))) == [(1, 1)]
        play >> ev.PeerDisconnected(1)
    else:
        assert uploads(say(play, 1, Claim(1), Cancel(1))) == []
    assert offers(say(play, 2, Want())) == {2: 1}


def test_suggestions_begin_anew_when_a_torrent_is_removed_and_added_again():
    play = seeder("ab", pieces=2)
    for _ in range(2):
        [index] = offers(say(play, 1, Want())).values()
        say(play, 1, Claim(index))
        play >> ev.PieceSent(1, index)
    play >> ev.TorrentRemoved(play.digest)
    play >> play.added()
    play >> play.connected(3, "c", "..")
    play >> play.connected(4, "d", "..")
    assert offers(say(play, 3, Want()))[3] in (0, 1)


# --- peers that leave, stall or are late --------------------------------------------------------


def test_a_peer_that_leaves_gives_back_what_was_promised_to_it():
    play = seeder("abc", ahead_min=1, ahead_max=1)
    pull(play, 1, 0)
    pull(play, 2, 0)
    play >> play.says(3, Want())
    assert uploads(play >> ev.PeerDisconnected(1)) == [(2, 0)]
    assert play.scheduler.uplink().offered == 1
    play >> ev.PeerDisconnected(3)
    assert play.scheduler.uplink().offered == 0
    assert play >> ev.PieceSent(1, 0) == []


def test_a_peer_that_left_while_it_waited_in_line_is_offered_nothing():
    play = seeder("abc", ahead_min=1, ahead_max=1)
    for connection in (1, 2, 3):
        play >> play.says(connection, Want())
    assert play >> ev.PeerDisconnected(2) == []
    assert play.scheduler.uplink().wanting == 1
    assert list(offers(play >> play.says(1, Pass()))) == [3]


def test_what_a_peer_owed_that_left_is_wanted_elsewhere():
    play = host("..")
    play >> play.connected(1, "a", "##")
    say(play, 1, Offer(0), Offer(1))
    assert wants(play >> play.connected(2, "b", "##")) == []
    assert play >> ev.PeerDisconnected(1) == [want(2)]
    assert len(claims_in_order(say(play, 2, Offer(), Offer()))) == 2


def test_a_late_claim_is_taken_back_and_the_piece_claimed_elsewhere():
    play = host(".")
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    play >> play.connected(2, "b", "#")
    play >> ev.PeerDisconnected(2)
    actions = play.wait_until(100.0 + FIRST_TIMEOUT)
    assert cancel(1, 0) in actions
    assert wants(actions) == [1]


def test_an_overdue_claim_stands_and_the_piece_is_claimed_elsewhere_as_well():
    play = host("..", inbound=1)
    play >> play.connected(1, "a", "#.")
    assert claims(play >> play.says(1, Offer())) == {1: [0]}
    play >> play.connected(2, "b", "##")
    assert claims(play >> play.says(2, Offer())) == {}, "there is no room"
    actions = play.wait()
    assert is_due(play.now, 100.0 + TIMEOUT_INITIAL)
    assert actions == [want(2)], "what is overdue takes no room, and nothing is taken back yet"
    assert claims(play >> play.says(2, Offer())) == {2: [1]}, "first what nobody has claimed"
    play >> ev.PieceReceived(2, 1)
    assert claims(play >> play.says(2, Offer())) == {2: [0]}
    play >> play.connected(3, "c", "##")
    assert claims(play >> play.says(3, Offer())) == {}, "two are enough"
    assert play >> ev.PieceReceived(1, 0) == [cancel(2, 0)], "whoever is first"


def test_a_reader_does_not_wait_for_an_overdue_piece():
    play = host("....", window_share=1.0)
    play >> ev.ReaderMoved(play.digest, 1, 0)
    play >> play.connected(1, "a", "####")
    assert claims(play >> play.says(1, Offer())) == {1: [0]}
    play.wait_until(100.0 + TIMEOUT_INITIAL + LEECHING_TICK)
    play >> play.connected(2, "b", "####")
    assert claims(play >> play.says(2, Offer())) == {2: [0]}


def test_claims_of_one_moment_of_weakness_count_once_even_if_they_are_late_in_different_ticks():
    play = host("....")
    play >> play.connected(1, "a", "####")
    play >> play.says(1, Offer())
    play.after(2 * LEECHING_TICK) >> play.says(1, Offer())
    play.wait_until(play.now + FIRST_TIMEOUT + 4 * LEECHING_TICK)
    torrent = play.scheduler.torrent(play.digest)
    assert torrent.claimed == 0, "both are late"
    assert torrent.peers[1].late_in_a_row == 1
    play >> play.says(1, Offer())
    play.wait_until(play.now + 2 * FIRST_TIMEOUT + LEECHING_TICK)
    assert 1 not in torrent.peers, "this one was claimed after the first warning"


# --- slow links ---------------------------------------------------------------------------------


def trickle(
    play: Play, seconds: float, *arriving: tuple[int, int], every: float = 1.0
) -> list[act.Action]:
    """Bytes of these pieces, as connection and index, keep arriving."""
    actions: list[act.Action] = []
    until = play.now + seconds
    while play.now < until:
        actions += play.wait_until(play.now + every)
        for connection, index in arriving:
            actions += play >> ev.PieceProgress(connection, index)
    return actions


def test_a_piece_of_which_bytes_keep_arriving_is_not_late_however_long_it_takes():
    play = host(".")
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    assert trickle(play, 300.0, (1, 0)) == []
    assert play >> ev.PieceReceived(1, 0) == []
    assert play.scheduler.torrent(play.digest).peers[1].late_in_a_row == 0
    play >> play.stored(1, 0)
    assert play.progress == "#"


def test_a_piece_that_stops_arriving_is_late_after_all():
    play = host(".")
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    trickle(play, 100.0, (1, 0))
    stopped = play.now
    assert play.wait() == [cancel(1, 0), want(1)]
    assert is_due(play.now, stopped + PROGRESS_TIMEOUT_MIN)


def test_a_link_that_was_fast_a_moment_ago_may_become_slow():
    play = host("..")
    play >> play.connected(1, "a", "##")
    [index] = claims_in_order(play >> play.says(1, Offer()))
    play.after(0.014) >> ev.PieceReceived(1, index)
    play >> play.stored(1, index)
    [index] = claims_in_order(play >> play.says(1, Offer()))
    assert play.after(0.3) >> ev.PieceProgress(1, index) == []
    assert trickle(play, 60.0, (1, index), every=5.0) == [], "16 KiB may take seconds, too"


def test_what_waits_behind_a_piece_that_is_arriving_is_not_late_either():
    play = host("...")
    play >> play.connected(1, "a", "###")
    proved(play, 1)
    first, second = claims_in_order(say(play, 1, Offer(), Offer()))
    play.after(0.3) >> ev.PieceProgress(1, first)
    assert cancel(1, second) not in trickle(play, 100.0, (1, first))
    assert play.scheduler.torrent(play.digest).peers[1].late_in_a_row == 0


def test_a_slow_piece_is_overdue_all_the_same_and_takes_no_room():
    play = host("..", inbound=1)
    play >> play.connected(1, "a", "#.")
    play >> play.says(1, Offer())
    play >> play.connected(2, "b", "##")
    assert want(2) in trickle(play, TIMEOUT_INITIAL + 1.0, (1, 0))
    assert claims(play >> play.says(2, Offer())) == {2: [1]}
    play >> ev.PieceReceived(2, 1)
    assert claims(play >> play.says(2, Offer())) == {2: [0]}
    assert play >> ev.PieceReceived(2, 0) == [cancel(1, 0)]


def test_before_any_piece_has_come_a_slow_one_is_not_claimed_twice():
    # It may be as fast as they get here: everything would be sent twice over a slow link.
    play = host(".", inbound=1)
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    play >> play.connected(2, "b", "#")
    assert want(2) not in trickle(play, 3 * TIMEOUT_INITIAL, (1, 0))
    assert claims(play >> play.says(2, Offer())) == {}


def test_no_more_peers_may_trickle_than_half_of_the_buffers_are_for():
    play = host("." * 8, inbound=2)
    arriving = []
    for connection, name in enumerate("abcd", start=1):
        play >> play.connected(connection, name, "#" * 8)
    while len(arriving) < 4:
        for connection in {1, 2, 3, 4} - {c for c, _ in arriving}:
            arriving += [(connection, i) for i in claims_in_order(say(play, connection, Offer()))]
        trickle(play, 0.5, *arriving, every=0.5)
    late = [a.connection for a in trickle(play, 40.0, *arriving) if is_cancel(a)]
    assert sorted(set(late)) == [3, 4], "the first two are waited for"


def is_cancel(action: act.Action) -> bool:
    return isinstance(action, act.Send) and isinstance(action.message, Cancel)


def test_progress_of_a_piece_that_was_taken_back_does_not_excuse_the_next():
    play = host("..")
    play >> play.connected(1, "a", "##")
    [taken_back] = claims_in_order(play >> play.says(1, Offer()))
    play.wait_until(play.now + FIRST_TIMEOUT + LEECHING_TICK)
    assert claims(play >> play.says(1, Offer(1 - taken_back))) == {1: [1 - taken_back]}
    actions = trickle(play, 2 * FIRST_TIMEOUT + LEECHING_TICK, (1, taken_back))
    assert close(1, ByeReason.STALLED) in actions


def test_a_download_does_not_stall_while_bytes_arrive_and_does_when_they_stop():
    play = host(".", stall_timeout=30.0)
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    assert trickle(play, 120.0, (1, 0)) == []
    heard = play.now
    actions = play.wait_until(heard + 30.0 + LEECHING_TICK)
    assert isinstance(actions[-1], act.Fail)
    assert "no piece for 30 s" in actions[-1].reason


def test_a_peer_whose_piece_is_arriving_is_neither_idle_nor_evicted():
    limits = SwarmLimits(connections=ConnectionLimits(idle_timeout=30.0, per_torrent=1, dialled=1))
    play = Play(".", limits=limits)
    play >> play.added()
    play >> play.connected(1, "a", "#")
    play >> play.says(1, Offer())
    trickle(play, 60.0, (1, 0))
    assert play >> play.connected(2, "b", "#") == [close(2, ByeReason.BUSY, "no room")]


@pytest.mark.parametrize("event", [ev.PieceProgress, ev.SendProgress])
def test_progress_that_is_told_too_late_is_ignored(event: type):
    play = host(".")
    assert play >> event(1, 0) == []
    play >> play.connected(1, "a", "#")
    assert play >> event(1, 0) == []


def test_a_receiver_that_goes_on_taking_bytes_is_not_dropped():
    play = seeder("a", send_timeout=20.0)
    pull(play, 1, 0)
    for _ in range(10):
        assert play.wait_until(play.now + 15.0) == []
        play >> ev.SendProgress(1, 0)
    moved = play.now
    assert play.wait() == [close(1, ByeReason.STALLED)]
    assert is_due(play.now, moved + 20.0, SEEDING_TICK)


def test_answers_that_come_late_because_the_link_is_slow_cost_no_connection():
    play = seeder("a")
    for index in range(2 * LAPSES_MAX):
        play >> play.says(1, Want())
        assert play.wait_until(play.now + OFFER_TIMEOUT + SEEDING_TICK) == []
        assert play >> play.says(1, Claim(index % 4)) == [passes(1, index % 4)]


# --- what is taken back ---------------------------------------------------------------------------


def test_a_cancelled_claim_is_not_sent_and_the_promise_goes_to_another():
    play = seeder("abc", ahead_min=1, ahead_max=1)
    pull(play, 1, 0)
    pull(play, 2, 1)
    play >> play.says(3, Want())
    assert list(offers(play >> play.says(2, Cancel(1)))) == [3]
    assert uploads(play >> ev.PieceSent(1, 0)) == []


def test_a_piece_that_is_cancelled_and_claimed_again_while_it_is_sent_is_sent_once():
    play = seeder("a")
    assert uploads(pull(play, 1, 0)) == [(1, 0)]
    play >> play.says(1, Cancel(0))
    assert uploads(pull(play, 1, 0)) == []
    assert uploads(play >> ev.PieceSent(1, 0)) == []
    assert play.scheduler.uplink().sending == 0


def test_a_lapsed_offer_does_not_keep_a_leecher_from_its_only_seeder():
    play = host(".")
    play >> play.connected(1, "a", "#")
    assert claims(play >> play.says(1, Offer())) == {1: [0]}
    play >> play.says(1, Pass(0))
    assert want(1) in play.wait_until(play.now + 1.0)
    assert claims(play >> play.says(1, Offer())) == {1: [0]}


def test_a_peer_that_offers_and_then_passes_is_not_asked_as_fast_as_it_can_pass():
    play = host(".")
    play >> play.connected(1, "a", "#")
    said = 0
    for _ in range(1000):
        said += len(say(play, 1, Offer(), Pass(0)))
    assert said < 1100, "it is passed in turn"


def test_a_receiver_that_stalls_does_not_hold_up_the_others():
    play = seeder("abc", slots=1, send_timeout=60.0)
    pull(play, 1, 0)
    pull(play, 2, 1)
    assert uploads(play.wait()) == [(2, 1)]
    assert play.now <= 100.0 + TIMEOUT_INITIAL + SEEDING_TICK
    play >> ev.PieceSent(2, 1)
    assert uploads(pull(play, 3, 0)) == [(3, 0)]
    assert uploads(pull(play, 2, 2)) == [], "that one does not stall"
    play >> ev.PieceSent(3, 0)
    actions = play.wait_until(100.0 + 60.0 + SEEDING_TICK)
    assert close(1, ByeReason.STALLED) in actions


def test_a_piece_that_a_slow_receiver_takes_is_suggested_to_another_meanwhile():
    play = seeder("abc", pieces=2, slots=1, ahead_min=1, ahead_max=1)
    given = []
    for connection in (1, 2):
        [offered] = play >> play.says(connection, Want())
        given.append(offered.message.index)
        play >> play.says(connection, Claim(given[-1]))
    assert sorted(given) == [0, 1], "each once"
    play.wait_until(play.now + TIMEOUT_INITIAL + SEEDING_TICK)
    assert play >> play.says(3, Want()) == [offer(3, given[0])], "it may never arrive"


def test_a_fast_uplink_notices_a_stalled_receiver_fast():
    play = seeder("ab", slots=1)
    for _ in range(50):
        pull(play, 2, 0)
        play.after(0.03) >> ev.PieceSent(2, 0)
    pull(play, 1, 0)
    pull(play, 2, 1)
    began = play.now
    assert uploads(play.wait()) == [(2, 1)]
    assert play.now <= began + TIMEOUT_MIN + SEEDING_TICK


def test_a_slow_uplink_does_not_split_itself_up():
    play = seeder("ab", slots=1, ahead_min=4, ahead_max=4)
    most = 0
    for _ in range(40):
        for connection in (1, 2):
            pull(play, connection, 0)
        sending = list(play.scheduler._exchange._sending)
        most = len(sending)
        play.wait_until(play.now + 20.0)
        play >> ev.PieceSent(sending[0], 0)
    assert most == 1


def test_a_receiver_that_does_not_take_its_piece_is_dropped():
    play = seeder("a", send_timeout=20.0)
    pull(play, 1, 0)
    assert play.wait() == [close(1, ByeReason.STALLED)]
    assert is_due(play.now, 120.0, SEEDING_TICK)


# --- the end of a download ----------------------------------------------------------------------


def test_a_download_from_one_seeder_from_beginning_to_end():
    play = host("..")
    play >> play.connected(1, "a", "##")
    for _ in range(2):
        [index] = claims_in_order(play >> play.says(1, Offer()))
        play >> ev.PieceReceived(1, index)
        last = play >> play.stored(1, index)
    assert last == [tells_all([1]), act.Finish(play.digest)]
    assert play >> ev.BlobVerified(play.digest) == [close(1, ByeReason.USELESS)]


def test_two_leechers_give_each_other_what_they_get():
    play = host("..")
    play >> play.connected(1, "a", "..")
    play >> play.connected(2, "b", "#.")
    play >> play.says(2, Offer())
    play >> ev.PieceReceived(2, 0)
    assert play >> play.stored(2, 0) == [tells([1], 0)], "who has it need not hear of it"
    assert play >> play.says(1, Want()) == [offer(1)], "a leecher suggests nothing"
    assert uploads(say(play, 1, Claim(0))) == [(1, 0)]


def test_wants_that_are_open_when_a_torrent_is_complete_are_answered_and_count_no_more():
    play = host(".", inbound=4)
    play >> play.connected(1, "a", "#")
    play >> play.connected(2, "b", "#")
    play >> play.connected(3, "c", ".")
    play >> play.says(1, Offer())
    play.piece(1, 0)
    assert play >> play.says(2, Offer()) == [passes(2)]
    assert play.scheduler._exchange._wants == 0


def test_a_peer_that_waits_in_line_and_becomes_complete_is_offered_nothing():
    play = host("#.", ahead_min=1, ahead_max=1)
    play >> play.connected(1, "a", "..")
    play >> play.connected(2, "b", "..")
    play >> play.says(1, Want())
    play >> play.says(2, Want())
    play >> play.says(2, HaveAll())
    assert offers(play >> play.says(1, Pass())) == {}
    assert play.scheduler.uplink().wanting == 0


@pytest.mark.parametrize("answer", [Pass(), Claim(0), None])
def test_a_peer_that_becomes_complete_while_it_is_offered_a_slot_is_let_go(answer):
    play = seeder("a", pieces=1)
    play >> play.says(1, Want())
    assert play >> play.says(1, HaveAll()) == []
    actions = [] if answer is None else say(play, 1, answer)
    if uploads(actions):
        actions = play >> ev.PieceSent(1, 0)
    actions += play.wait_until(play.now + OFFER_TIMEOUT + 2 * SEEDING_TICK)
    assert actions[-1] == close(1, ByeReason.USELESS)


def test_a_blob_of_one_piece_comes_from_its_only_seeder_although_an_offer_lapsed():
    play = seeder("a", pieces=1)
    play >> play.says(1, Want())
    play.wait_until(play.now + OFFER_TIMEOUT + SEEDING_TICK)
    assert say(play, 1, Claim(0), Want()) == [passes(1, 0), offer(1)]
    assert uploads(say(play, 1, Claim(0))) == [(1, 0)]


# --- draining -----------------------------------------------------------------------------------


def test_a_drain_ends_what_is_being_sent_and_promises_nothing_more():
    play = seeder("abc", slots=1, ahead_min=4)
    pull(play, 1, 0)
    pull(play, 2, 0)
    play >> play.says(3, Want())
    assert play >> ev.DrainStarted() == [
        close(2, ByeReason.DRAINING),
        close(3, ByeReason.DRAINING),
    ]
    assert play >> play.says(1, Want()) == []
    assert play >> play.says(1, Claim(1)) == [passes(1, 1)]
    assert play >> ev.PieceSent(1, 0) == [close(1, ByeReason.DRAINING)]


def test_a_draining_host_wants_and_claims_nothing():
    play = host("#.")
    play >> play.connected(1, "a", ".#")
    pull(play, 1, 0)
    play >> ev.DrainStarted()
    assert play >> play.says(1, Offer()) == [passes(1)]
    assert play >> play.says(1, Have(1)) == []


def test_a_drain_does_not_wait_for_a_receiver_that_stalls():
    play = seeder("a", send_timeout=20.0)
    pull(play, 1, 0)
    play >> ev.DrainStarted()
    assert play.wait() == [close(1, ByeReason.STALLED)]
    assert is_due(play.now, 120.0, SEEDING_TICK)


# --- liars --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [Want(), Offer(), Offer(1), Claim(1), Pass(), Pass(1), Cancel(1), Have(1), HaveAll()],
    ids=repr,
)
@pytest.mark.parametrize("have", ["....", "#...", "####"], ids=["empty", "some", "seeder"])
def test_saying_the_same_thing_for_ever_takes_no_memory_and_gets_no_advantage(message, have):
    play = host(have)
    play >> play.connected(1, "a", "....")
    play >> play.connected(2, "b", "....")
    answers = 0
    for _ in range(200):
        answers += len(play >> play.says(1, message))
    assert answers <= 201, "at most one word for each"
    exchange = play.scheduler._exchange
    held = (exchange._ready, exchange._offers, exchange._sending, exchange._lines)
    assert sum(map(len, held)) <= 4
    assert play.scheduler.uplink().wanting <= 1
    if play.scheduler.connection_count == 2:
        expected = [offer(2)] if have != "####" else [offer(2, i) for i in range(4)]
        [answer] = play >> play.says(2, Want())
        assert answer == offer(2) or answer in expected


def test_claims_that_were_not_offered_are_never_sent():
    play = seeder("ab", pieces=4)
    for _ in range(50):
        for index in range(4):
            assert uploads(say(play, 1, Claim(index))) == []
    assert uploads(pull(play, 2, 0)) == [(2, 0)]


def test_a_peer_that_only_takes_offers_and_never_answers_has_one_of_them_at_a_time():
    play = seeder("ab", ahead_min=2, ahead_max=2)
    for _ in range(20):
        say(play, 1, Want())
    assert list(offers(say(play, 2, Want()))) == [2]


def test_offers_that_nobody_asked_for_take_no_more_claims_than_there_is_room():
    play = host("." * 20, inbound=4)
    play >> play.connected(1, "a", "#" * 20)
    for _ in range(100):
        play >> play.says(1, Offer())
    assert play.scheduler.torrent(play.digest).statistics().claimed == 4
    assert wants(play.wait_until(play.now + 60.0)), "and they are taken back in the end"


# --- pieces of different lengths ----------------------------------------------------------------


def test_what_small_blobs_take_says_nothing_of_pieces_of_64_mib():
    play = host(".")
    play >> play.connected(1, "a", "#")
    [index] = claims_in_order(play >> play.says(1, Offer()))
    play.after(0.05).piece(1, index)
    metainfo = metainfo_of(4, "huge")
    metainfo = attrs.evolve(metainfo, length=4 << 26, piece_length=1 << 26)
    play >> ev.TorrentAdded(metainfo, "", 0, verified=False, announce=False)
    join(play, metainfo, 2, "a", "####")
    play >> play.says(2, Offer())
    actions = play.wait_until(play.now + 6.0)
    assert cancel(2, 0) not in actions
    assert play.scheduler.torrent(metainfo.digest).claimed != 0


# --- what a piece may keep from others while it comes --------------------------------------------


def test_a_piece_that_is_not_overdue_keeps_what_it_holds():
    play = host("..")
    play >> play.connected(1, "a", "##")
    [index] = claims_in_order(play >> play.says(1, Offer()))

    assert play.scheduler.patience(1, index) == float("inf")


def test_silence_is_allowed_an_overdue_piece_for_as_long_as_pieces_usually_take():
    play = host("....")
    play >> play.connected(1, "a", "####")
    [index] = claims_in_order(play >> play.says(1, Offer()))
    play.wait_until(play.now + TIMEOUT_INITIAL + LEECHING_TICK)
    assert play.scheduler.patience(1, index) == TIMEOUT_INITIAL

    play >> play.connected(2, "b", "####")
    proved(play, 2)
    assert play.scheduler.patience(1, index) == SILENCE_MIN, "pieces come at once, but links hiccup"


def test_silence_is_allowed_a_peer_that_has_given_pieces_for_as_long_as_those_took():
    play = host("....")
    play >> play.connected(1, "a", "####")
    play >> play.connected(2, "b", "####")
    [slow] = claims_in_order(play >> play.says(1, Offer()))
    for _ in range(3):
        play.after(1.0) >> ev.PieceProgress(1, slow)
    play.piece(1, slow)
    proved(play, 2)
    [index] = claims_in_order(play >> play.says(1, Offer()))
    play >> play.says(1, Pass(index))

    assert play.scheduler.patience(1, index) > 3.0


def test_nothing_is_allowed_a_connection_that_is_gone():
    assert host("..").scheduler.patience(7, 0) == 0.0
