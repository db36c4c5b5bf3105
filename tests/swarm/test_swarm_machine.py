"""Whole small swarms under arbitrary interleavings, losses and lies.

Safety is checked after every step; at the end nothing goes wrong any more, except that the liars keep lying,
and every download has to finish.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.messages import (
    Bye,
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
from swarmpull.swarm.offers import OfferLimits
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.swarm.uploads import UploadLimits

from .memory_network import Host, Liar, Network, PieceBegins, PieceEnds, settle
from .playbook import metainfo_of

PIECES_MAX = 5
indices = st.integers(-1, PIECES_MAX + 1)
lies: st.SearchStrategy[Message] = st.one_of(
    st.builds(Have, st.integers(0, PIECES_MAX - 1)),
    st.builds(Have, indices),
    st.just(HaveAll()),
    st.just(Want()),
    st.builds(Offer, indices),
    st.builds(Claim, indices),
    st.builds(Pass, indices),
    st.builds(Cancel, indices),
    st.builds(Bye, st.sampled_from(ByeReason)),
)


offer_limits = st.builds(
    lambda slots, ahead_min, more_ahead, inbound: OfferLimits(
        slots=slots, ahead_min=ahead_min, ahead_max=ahead_min + more_ahead, inbound=inbound
    ),
    slots=st.integers(1, 2),
    ahead_min=st.integers(1, 2),
    more_ahead=st.integers(0, 2),
    inbound=st.integers(1, 4),
)
pipeline_limits = st.builds(
    PipelineLimits,
    per_peer=st.integers(1, 4),
    endgame_claimants=st.integers(1, 2),
    uploads=st.builds(
        UploadLimits, slots=st.integers(1, 2), claims_per_connection=st.integers(1, 3)
    ),
)


class SwarmMachine(RuleBasedStateMachine):
    exchanges: st.SearchStrategy[OfferLimits | PipelineLimits]

    @initialize(
        pieces=st.integers(1, PIECES_MAX),
        leechers=st.integers(1, 2),
        liars=st.integers(0, 2),
        per_torrent=st.integers(1, 4),
        dialled=st.integers(1, 4),
        data=st.data(),
    )
    def start(
        self,
        pieces: int,
        leechers: int,
        liars: int,
        per_torrent: int,
        dialled: int,
        data: st.DataObject,
    ) -> None:
        limits = SwarmLimits(
            connections=ConnectionLimits(
                dialled=dialled, per_torrent=per_torrent, per_host=per_torrent
            ),
            exchange=data.draw(self.exchanges),
            stall_timeout=1e6,
        )
        self.network = Network(metainfo_of(pieces))
        for name in "0f"[:liars]:
            Liar(self.network, name)
        for name in "5a1"[: leechers + 1]:
            Host(self.network, name, complete=name == "5", limits=limits)

    # --- the network --------------------------------------------------------------------------

    @rule(choices=st.lists(st.integers(0, 999), min_size=1, max_size=12))
    def things_happen(self, choices: list[int]) -> None:
        for choice in choices:
            steps = self.network.steps()
            if steps:
                steps[choice % len(steps)]()

    @rule(choice=st.integers(0, 99), seconds=st.sampled_from([0.25, 5.0, 60.0]))
    def a_piece_takes_its_time(self, choice: int, seconds: float) -> None:
        ends = [
            (host, end)
            for host in self.network.hosts
            for end in host.links.values()
            if end.incoming is not None and end.number is not None
        ]
        if ends:
            host, end = ends[choice % len(ends)]
            assert end.incoming is not None
            host.dispatch(ev.PieceProgress(end.number, end.incoming[0]))
            self.network.advance(seconds)

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.0, 4.0, 8.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.network.advance(seconds)

    @precondition(lambda self: self.network.next_deadline() < self.network.now + 100.0)
    @rule()
    def the_deadline_comes(self) -> None:
        self.network.advance(max(self.network.next_deadline() - self.network.now, 0.0))

    @precondition(lambda self: self.network.wires)
    @rule(choice=st.integers(0, 99))
    def a_connection_breaks(self, choice: int) -> None:
        self.network.break_wire(self.network.wires[choice % len(self.network.wires)])

    @rule(up=st.booleans())
    def the_tracker_comes_and_goes(self, up: bool) -> None:
        self.network.tracker_is_up = up

    @rule(choice=st.integers(0, 9))
    def a_torrent_is_removed_and_added_again(self, choice: int) -> None:
        self.network.hosts[choice % len(self.network.hosts)].restart_torrent()

    # --- the liars ----------------------------------------------------------------------------

    @precondition(lambda self: self.network.liars)
    @rule(
        who=st.integers(0, 9),
        whom=st.integers(0, 9),
        have=st.integers(0, (1 << PIECES_MAX) - 1),
        extra_pieces=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def a_liar_dials(self, who: int, whom: int, have: int, extra_pieces: int) -> None:
        liar = self.network.liars[who % len(self.network.liars)]
        count = self.network.metainfo.piece_count + extra_pieces
        liar.dial(self.network.hosts[whom % len(self.network.hosts)], liar.hello(have, count))

    @precondition(lambda self: any(liar.ends for liar in self.network.liars))
    @rule(who=st.integers(0, 9), messages=st.lists(lies, min_size=1, max_size=4))
    def a_liar_speaks(self, who: int, messages: list[Message]) -> None:
        self._end_of_a_liar(who).send(*messages)

    @precondition(lambda self: any(liar.ends for liar in self.network.liars))
    @rule(who=st.integers(0, 9))
    def a_liar_says_hello_again(self, who: int) -> None:
        end = self._end_of_a_liar(who)
        assert isinstance(end.owner, Liar)
        end.send(end.owner.hello(0))

    @precondition(lambda self: any(liar.ends for liar in self.network.liars))
    @rule(
        who=st.integers(0, 9),
        index=st.integers(0, PIECES_MAX - 1),
        good=st.booleans(),
        between=st.none() | lies,
    )
    def a_liar_sends_a_piece(
        self, who: int, index: int, good: bool, between: Message | None
    ) -> None:
        end = self._end_of_a_liar(who)
        index %= self.network.metainfo.piece_count
        end.send(PieceBegins(index))
        if between is not None:
            end.send(between)
        end.send(PieceEnds(index, good))

    def _end_of_a_liar(self, who: int):
        ends = [end for liar in self.network.liars for end in liar.ends]
        return ends[who % len(ends)]

    # --- what must hold -----------------------------------------------------------------------

    @invariant()
    def the_connections_of_a_host_are_those_of_its_wires(self) -> None:
        if not hasattr(self, "network"):
            return
        for host in self.network.hosts:
            host.scheduler.check_invariants()
            assert host._open_connections() <= host.links.keys()

    def teardown(self) -> None:
        if not hasattr(self, "network"):
            return
        self.network.tracker_is_up = True
        settle(self.network)
        for host in self.network.hosts:
            host.scheduler.check_invariants()
            assert host.verified
            for end in host.links.values():
                assert isinstance(end.other.owner, Liar), "two complete peers stay connected"


class OfferMachine(SwarmMachine):
    exchanges = offer_limits


class PipelineMachine(SwarmMachine):
    exchanges = pipeline_limits


SETTINGS = settings(
    max_examples=150,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestOffers = OfferMachine.TestCase
TestOffers.settings = SETTINGS
TestPipeline = PipelineMachine.TestCase
TestPipeline.settings = SETTINGS
