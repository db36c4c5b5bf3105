"""The tracker: knows in memory who takes part in which swarm, and brings peers together.

It keeps nothing on disk.  After a restart, or when another tracker takes over a blob, the table fills
again from the announces of the hosts that lost the other one, or from their next, within a minute.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import attrs
import structlog
import trio

from swarmpull.config import Config, TrackerConfig
from swarmpull.digest import Digest
from swarmpull.errors import ProtocolError
from swarmpull.ring.membership import Membership
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.cluster import OriginClient
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.hash_log import HashLog, HashPolls, complete_growth
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.roles.ring_metrics import RingMetrics
from swarmpull.roles.security import open_tls
from swarmpull.roles.serving import serve_role
from swarmpull.roles.tracker_metainfo import MetainfoLimits, MetainfoSource
from swarmpull.swarm.claims import Claims
from swarmpull.swarm.handout import Handout, HandoutLimits, HandoutStatistics, PeerTable
from swarmpull.swarm.peers import AnnounceState, PeerContact
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.handouts import encode_announce_reply
from swarmpull.wire.rpc import RpcContext, RpcService, open_rpc_pool

log = structlog.get_logger()

# An origin does not announce; it stays in the table for so long after it last said that it has a blob.
# That is how long a dead origin is handed out at most.
ORIGIN_LIFETIME: Final = 15.0
# Every announce forgets whose time is up; this is for a tracker to which nobody talks any more.
EXPIRY_PAUSE_MIN: Final = 1.0
EXPIRY_PAUSE_MAX: Final = 30.0
# Calls that wait for piece hashes, of all blobs: as many as may wait for peers.
HASH_POLLS_MAX: Final = 10_000
# Hosts whose contact is the same object for all their blobs, some 500 bytes each: more than one tracker has
# connections; beyond it each blob has one of its own, and nothing else changes.  With TLS as many are bound
# to the certificate that announced them.
CONTACTS_MAX: Final = 32_768
_HANDOUT_BUCKETS: Final = (0, 1, 2, 5, 10, 20, 49)
_WATCH_BUCKETS: Final = (0.001, 0.01, 0.1, 0.5, 2.0, 10.0, 29.9)

_PEER_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
# A host name has at most 253 characters (RFC 1035, section 2.3.4), an address fewer.
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]{1,253}", re.ASCII)
# Repository names have at most 255 characters, that of an upstream registry before them as many.
_NAMESPACE_LENGTH_MAX: Final = 512


class _Contacts:
    """One object for each host that announces, however many blobs it has: of the ``limit`` latest hosts."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._contacts: dict[PeerContact, PeerContact] = {}

    def one_for(self, contact: PeerContact) -> PeerContact:
        """What is equal to ``contact``: itself, when it is the first of its kind."""
        known = self._contacts.setdefault(contact, contact)
        if len(self._contacts) > self._limit:
            del self._contacts[next(iter(self._contacts))]
        return known


class Tracker:
    """The answers of one tracker."""

    def __init__(
        self, table: PeerTable, claims: Claims, metainfo: MetainfoSource, metrics: Metrics
    ) -> None:
        self._table = table
        self._claims = claims
        self._metainfo = metainfo
        self._polls = HashPolls(HASH_POLLS_MAX)
        self._contacts = _Contacts(CONTACTS_MAX)
        self._process = f"{random.getrandbits(64):016x}"
        self._begun_at = trio.current_time()
        metrics.gauge(
            "tracker_hash_polls",
            "Agents that wait for piece hashes of a blob that is being fetched.",
        ).set_function(lambda: len(self._polls))
        self._seconds = metrics.histogram(
            "tracker_watch_seconds", "Time for which one leecher waited for peers.", _WATCH_BUCKETS
        )
        announces = metrics.counter(
            "tracker_announces_total", "Announces, by state of the announcer.", ["state"]
        )
        self._messages = metrics.counter(
            "tracker_held_announces_total",
            "Messages that announced many blobs at once; each blob counts as an announce, too.",
        )
        self._refused = metrics.counter(
            "tracker_announces_refused_total",
            "Messages refused because peer id or address are those of another certificate.",
        )
        self._announces = {state: announces.labels(state.value) for state in AnnounceState}
        self._handouts = metrics.histogram(
            "tracker_handout_peers", "Peers handed out to one leecher.", _HANDOUT_BUCKETS
        )

    def announce_at_once(self, request: api.AnnounceRequest, context: RpcContext) -> bytes | None:
        """The encoded answer to an announce without metainfo; None for others, and when that is wanted."""
        if _must_find(request) or self._wants_metainfo(request):
            return None
        handout = self._enter(request, self._contact(request, context))
        return encode_announce_reply(
            handout.peers, handout.interval, handout.position, self._process, self._age()
        )

    async def announce(
        self, request: api.AnnounceRequest, context: RpcContext
    ) -> api.AnnounceReply:
        """Answer one announce.  Raises what `MetainfoSource.get` does when metainfo is wanted."""
        contact = self._contact(request, context)
        if not _must_find(request):
            wanted = self._wants_metainfo(request)
            return attrs.evolve(self._reply(self._enter(request, contact)), wanted=wanted)
        digest = request.digest
        # What is cached may be answered while somebody has the blob; else an origin must get it.
        use_cache = self._table.seeders(digest) > 0
        get = self._metainfo.get if request.growing else self._metainfo.get_settled
        found = await get(digest, request.namespace, use_cache=use_cache)
        reply = self._reply(self._enter(request, contact))
        if isinstance(found, HashLog):
            return attrs.evolve(reply, growth=found.since("", 0))
        return attrs.evolve(reply, metainfo=found, content=self._metainfo.content(digest))

    def _wants_metainfo(self, request: api.AnnounceRequest) -> bool:
        """Whether the announcer, which has the blob, is to give its metainfo."""
        is_complete = request.state is AnnounceState.COMPLETE
        return is_complete and bool(self._metainfo.wanted((request.digest,)))

    def _contact(self, request: api.AnnounceRequest, context: RpcContext) -> PeerContact:
        """The announcer's contact; one and the same object for all blobs that it announces."""
        contact = self._own_contact(request.peer, context)
        _check_namespace(request.namespace)
        return contact

    def _own_contact(self, peer: PeerContact, context: RpcContext) -> PeerContact:
        """As `_contact`.  Raises ProtocolError when it is somebody else's, or nobody could dial it."""
        contact = self._contacts.one_for(_checked_contact(peer, context))
        if context.caller is not None:
            now, owner = trio.current_time(), context.caller.name
            self._check(self._claims.claim(contact, owner, context.remote_host, now))
        return contact

    def _check(self, refusal: str) -> None:
        if refusal:
            self._refused.inc()
            log.info("announce_refused", reason=refusal)
            raise ProtocolError(refusal)

    def _enter(self, request: api.AnnounceRequest, contact: PeerContact) -> Handout:
        digest, state = request.digest, request.state
        self._announces[state].inc()
        handout = self._table.announce(digest, contact, state, trio.current_time())
        if state is AnnounceState.LEECHING:
            self._handouts.observe(len(handout.peers))
            if not self._table.has_origin(digest):
                self._metainfo.seek_origin(digest, request.namespace)
        return handout

    def _reply(self, handout: Handout) -> api.AnnounceReply:
        return api.AnnounceReply(
            handout.peers,
            handout.interval,
            position=handout.position,
            process=self._process,
            age=self._age(),
        )

    def _age(self) -> float:
        return trio.current_time() - self._begun_at

    def announce_held_at_once(
        self, request: api.AnnounceHeldRequest, context: RpcContext
    ) -> api.AnnounceHeldReply:
        """Answer a host that has many blobs.  Raises ProtocolError for too many."""
        contact = self._own_contact(request.peer, context)
        if len(request.digests) > api.HELD_BLOBS_MAX:
            raise ProtocolError(
                f"{len(request.digests)} blobs in one announce, the limit is {api.HELD_BLOBS_MAX}"
            )
        self._announces[AnnounceState.COMPLETE].inc(len(request.digests))
        self._messages.inc()
        handout = self._table.announce_held(request.digests, contact, trio.current_time())
        leechers = itertools.starmap(api.BlobLeechers, handout.leechers.items())
        wanted = self._metainfo.wanted(request.digests)
        return api.AnnounceHeldReply(
            handout.interval, tuple(leechers), self._process, self._age(), wanted
        )

    async def announce_held(
        self, request: api.AnnounceHeldRequest, context: RpcContext
    ) -> api.AnnounceHeldReply:
        return self.announce_held_at_once(request, context)

    async def give_metainfo(
        self, request: api.GiveMetainfoRequest, context: RpcContext
    ) -> api.Empty:
        """Take metainfo that an agent was asked for."""
        if self._metainfo.hear(request.metainfo):
            digest, giver = str(request.metainfo.digest), str(context.caller or context.remote_host)
            log.info("metainfo_of_an_agent", digest=digest, giver=giver)
        return api.Empty()

    async def hashes(self, request: api.HashesRequest, _: RpcContext) -> api.Growth:
        """Answer when more piece hashes are known than the caller has.

        Raises what `MetainfoSource.get` does, and why there will be no more hashes.
        """
        _check_namespace(request.namespace)
        found = await self._metainfo.get(request.digest, request.namespace, use_cache=True)
        if isinstance(found, HashLog):
            return await self._polls.answer(found, request)
        return complete_growth(found, request)

    def end_polls(self) -> None:
        """Answer all calls that wait for hashes: they would hold up the drain."""
        self._polls.end()

    async def watch(self, request: api.WatchRequest, context: RpcContext) -> api.WatchReply:
        """Answer when somebody has appeared, or when there is no more waiting."""
        begun_at = trio.current_time()
        if context.caller is not None:
            self._check(self._claims.refuse_id(request.peer_id, context.caller.name, begun_at))
        ended = trio.Event()
        watch = self._table.watch(
            request.digest,
            request.peer_id,
            request.position,
            request.seconds,
            begun_at,
            ended.set,
        )
        if watch.is_open:
            try:
                with trio.move_on_at(watch.until):
                    await ended.wait()
            finally:
                self._table.close_watch(watch)
            self._seconds.observe(trio.current_time() - begun_at)
        return api.WatchReply(watch.peers, watch.position)


def _must_find(request: api.AnnounceRequest) -> bool:
    """Whether the answer takes more than what is in the table."""
    return request.want_metainfo and request.state is not AnnounceState.STOPPED


def _checked_contact(peer: PeerContact, context: RpcContext) -> PeerContact:
    """The announcer's contact with its host filled in.  Raises ProtocolError if nobody could dial it."""
    contact = peer.seen_at(context.remote_host)
    if _PEER_ID.fullmatch(contact.peer_id) is None:
        raise ProtocolError(f"peer id {contact.peer_id[:80]!r} is not 32 lower-case hex digits")
    if _HOST.fullmatch(contact.host) is None:
        raise ProtocolError(f"peer host {contact.host[:80]!r} is not a host name or an address")
    if not 0 < contact.port <= 65535:
        raise ProtocolError(f"peer port {contact.port} is not a TCP port")
    if context.caller is not None and contact.kind.value not in context.caller.roles:
        raise ProtocolError(f"{context.caller} must not announce itself as {contact.kind.value}")
    return contact


def _check_namespace(namespace: str) -> None:
    if len(namespace) > _NAMESPACE_LENGTH_MAX:
        raise ProtocolError(f"a namespace of {len(namespace)} characters")


async def run_tracker(
    config: Config,
    settings: TrackerConfig,
    *,
    drain: trio.Event,
    changes: ConfigChanges | None = None,
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and the requests under way have ended.

    Raises:
        StartupError: a listener cannot be bound.
    """
    metrics = Metrics()
    table, claims = PeerTable(HandoutLimits(), random.Random()), Claims(CONTACTS_MAX)
    _show_table(metrics, table)
    async with (
        open_tls("tracker", config.tls, metrics) as tls,
        open_rpc_pool(tls=tls) as pool,
        trio.open_nursery() as background,
    ):
        cluster = config.cluster
        members = open_ring(pool, cluster.origins, "origin", cluster.weights_by_member())
        if changes is not None:
            changes.follow(origins=members)
        await background.start(members.run)
        metainfo = MetainfoSource(
            OriginClient(RingMetrics(metrics).show(RingClient(pool, members))),
            background,
            on_seeder=partial(_add_origin, table, claims),
            limits=MetainfoLimits(),
            metrics=metrics,
        )
        background.start_soon(_expire, table)
        tracker = Tracker(table, claims, metainfo, metrics)
        background.start_soon(_end_waits, table, tracker, drain)
        service = RpcService()
        service.register(api.ANNOUNCE, tracker.announce, at_once=tracker.announce_at_once)
        service.register(
            api.ANNOUNCE_HELD, tracker.announce_held, at_once=tracker.announce_held_at_once
        )
        service.register(api.GIVE_METAINFO, tracker.give_metainfo)
        service.register(api.WATCH, tracker.watch)
        service.register(api.HASHES, tracker.hashes)
        await serve_role(
            "tracker",
            settings,
            service,
            tls=tls,
            metrics=metrics,
            readiness=partial(_readiness, members),
            status=partial(_status, table, members),
            drain=drain,
            grace=config.drain_timeout,
            task_status=task_status,
        )
        background.cancel_scope.cancel()


def _add_origin(table: PeerTable, claims: Claims, digest: Digest, seeder: PeerContact) -> None:
    now = trio.current_time()
    claims.vouch(seeder, now)
    table.add_seeder(digest, seeder, now, lifetime=ORIGIN_LIFETIME)


async def _expire(table: PeerTable) -> None:
    while True:
        pause = table.next_deadline() - trio.current_time()
        await trio.sleep(min(max(pause, EXPIRY_PAUSE_MIN), EXPIRY_PAUSE_MAX))
        table.expire(trio.current_time())


async def _end_waits(table: PeerTable, tracker: Tracker, drain: trio.Event) -> None:
    """They would hold up the drain; who waits announces itself to another tracker soon."""
    await drain.wait()
    table.end_watches()
    tracker.end_polls()


def _readiness(members: Membership) -> list[str]:
    """Without an origin no download can begin; that an origin is slow is not this tracker's state."""
    if members.members:
        return []
    if not members.entries:
        return ["no origin is known: set cluster.origins"]
    return [f"cluster.origins does not resolve: {', '.join(members.entries)}"]


def _status(table: PeerTable, members: Membership) -> dict[str, Any]:
    statistics = table.statistics()
    return {
        "swarms": attrs.asdict(statistics) | {"peers": statistics.peers},
        "origins": {
            "members": list(members.members),
            "unhealthy": list(members.unhealthy()),
        },
    }


def _show_table(metrics: Metrics, table: PeerTable) -> None:
    shown: dict[str, tuple[str, Callable[[HandoutStatistics], int]]] = {
        "torrents": ("Blobs that any peer has announced.", lambda now: now.torrents),
        "seeders": ("Completed agents, in all torrents.", lambda now: now.seeders),
        "origins": ("Origins, in all torrents.", lambda now: now.origins),
        "leechers": ("Agents in progress, in all torrents.", lambda now: now.leechers),
        "peers_expired": ("Peers forgotten because they fell silent.", lambda now: now.expired),
        "peers_replaced": ("Peers whose process was restarted.", lambda now: now.replaced),
        "peers_dropped": ("Peers dropped because a table was full.", lambda now: now.dropped),
        "watches": ("Leechers that wait for peers to appear.", lambda now: now.watching),
        "watches_refused": (
            "Watches refused: there were too many, or of no leecher.",
            lambda now: now.watches_refused,
        ),
        "newcomers_told": (
            "Peers that appeared, each for every watch that told of it.",
            lambda now: now.told,
        ),
    }
    for name, (meaning, value) in shown.items():
        gauge = metrics.gauge(f"tracker_{name}", meaning)
        gauge.set_function(partial(_value, table, value))


def _value(table: PeerTable, value: Callable[[HandoutStatistics], int]) -> float:
    return value(table.statistics())
