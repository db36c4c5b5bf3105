"""An origin hands blobs to the origins of other clusters.

The other origin says whether it needs the bytes.  If so it is asked to adopt the blob, the call that a push
to an agent uses, with this origin as the seeder: it fetches by verified piece, and after any interruption
goes on from what it has.  A blob that only our backend has is handed over while it is fetched, from the
moment when all its piece hashes are known: they stand beside it there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    ProtocolError,
    RpcUnavailable,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.roles.cluster import ADOPT_TIMEOUT, LOOKUP_TIMEOUT
from swarmpull.roles.downloads import Download
from swarmpull.roles.foreign_pools import ForeignPools
from swarmpull.roles.origin_content import OriginContent
from swarmpull.roles.rates import Toll
from swarmpull.roles.shared_work import SharedWork
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.holds import Pin
from swarmpull.store.token_bucket import TokenBucket
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.listen import parse_address
from swarmpull.wire.rpc import RpcPool

log = structlog.get_logger()

# Blobs that are handed over to one cluster at the same time; the others wait.
HAND_OVERS_MAX: Final = 16
# Seconds without a byte sent after which the other origin is asked whether it answers at all, and for which
# its answer is waited for.
PROBE_INTERVAL: Final = 15.0
PROBE_PATIENCE: Final = 10.0
# How long one call may wait, in seconds.
WAIT_MAX: Final = 10.0
# Origins of the other cluster that are tried for one blob.
OWNERS_MAX: Final = 8


@attrs.define(eq=False)
class _HandOver:
    """One that is under way: how far it is."""

    length: int
    toll: Toll


class HandOvers:
    """The hand-overs of one origin.

    They go on when whoever asked for them leaves: another index may ask for the same a moment later.
    """

    def __init__(
        self,
        content: OriginContent,
        host: SwarmHost,
        pools: ForeignPools,
        nursery: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        self._content = content
        self._host = host
        host.handed_over = self
        self._pools = pools
        self._work: SharedWork[api.HandOverReply] = SharedWork(nursery)
        # One that hangs does not hold up the others.
        self._places: dict[str, trio.CapacityLimiter] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._under_way: dict[tuple[Digest, str, str], _HandOver] = {}
        self._sent = metrics.counter(
            "origin_handed_over_bytes_total",
            "Bytes of blobs that were sent to origins of other clusters.",
            ["remote"],
        )

    async def hand_over(self, request: api.HandOverRequest) -> api.HandOverReply:
        """Have an origin of another cluster adopt a blob; answer when it has, or how far it is.

        Raises:
            ProtocolError: an owner is no address.
            BlobNotFound: this cluster does not have the blob.
            RpcUnavailable: none of the origins there answers.
            SwarmpullError: what they say: PushRefused, StoreFull, DownloadFailed...
        """
        key = (request.digest, request.namespace, request.remote)
        seconds = request.seconds if 0 <= request.seconds <= WAIT_MAX else WAIT_MAX
        _check_owners(request.owners)
        rate = request.rate
        self._bucket(request.remote).set_rate(rate if rate is not None and rate > 0 else math.inf)
        with trio.move_on_after(seconds):
            return await self._work.run(key, partial(self._hand_over, request))
        now = self._under_way.get(key)
        if now is None:
            # It waits for its place, or has just ended.
            return api.HandOverReply(done=False, sent=0, length=0)
        return api.HandOverReply(done=False, sent=now.toll.sent, length=now.length)

    def is_for(self, digest: Digest, cluster: str) -> bool:
        """Whether a blob is being handed over to a cluster: then its origins may fetch it here."""
        return any(each == digest and remote == cluster for each, _, remote in self._under_way)

    def toll(self, digest: Digest, cluster: str) -> Toll:
        """Of what is sent of a blob to a cluster: of the hand-over, while it lasts; its rate holds anyway."""
        for (each, _, remote), now in self._under_way.items():
            if each == digest and remote == cluster:
                return now.toll
        return Toll(self._bucket(cluster))

    async def _hand_over(
        self, request: api.HandOverRequest, key: tuple[Digest, str, str]
    ) -> api.HandOverReply:
        places = self._places.setdefault(request.remote, trio.CapacityLimiter(HAND_OVERS_MAX))
        async with places:
            with (
                self._content.store.hold(request.digest, Pin.SENDING),
                self._counted(request, key) as progress,
            ):
                progress.length = await self._content.stat(request.digest, request.namespace)
                await self._to_any(request, progress)
        return api.HandOverReply(done=True, sent=progress.toll.sent, length=progress.length)

    @contextmanager
    def _counted(
        self, request: api.HandOverRequest, key: tuple[Digest, str, str]
    ) -> Iterator[_HandOver]:
        progress = _HandOver(0, Toll(self._bucket(request.remote)))
        self._under_way[key] = progress
        try:
            yield progress
        finally:
            del self._under_way[key]
            self._sent.labels(request.remote).inc(progress.toll.sent)

    async def _to_any(self, request: api.HandOverRequest, progress: _HandOver) -> None:
        """Hand it to the first origin that can have it.  One that is full or silent is passed over."""
        failure: SwarmpullError | None = None
        for owner in request.owners[:OWNERS_MAX]:
            try:
                await self._to(owner, request, progress)
            except (RpcUnavailable, StoreFull, StoreUnavailable) as error:
                log.info(
                    "hand_over_passed_on",
                    digest=str(request.digest),
                    remote=request.remote,
                    owner=owner,
                    reason=str(error),
                )
                # What is wrong with the owner tells more than that another one does not answer.
                if failure is None or isinstance(failure, RpcUnavailable):
                    failure = error
            else:
                return
        raise failure or RpcUnavailable(
            request.remote, api.ADOPT_BLOB.name, "none of its origins is known"
        )

    async def _to(self, owner: str, request: api.HandOverRequest, progress: _HandOver) -> None:
        digest, namespace = request.digest, request.namespace
        pool = self._pools.of(request.remote)
        offer = api.OfferRequest(digest, namespace, progress.length)
        reply = await pool.call(owner, api.OFFER_BLOB, offer, timeout=LOOKUP_TIMEOUT)
        if not reply.wanted:
            return
        self._check_peer_tls(owner, reply)
        metainfo, download = await self._seeded(digest, namespace)
        adopt = api.AdoptRequest(metainfo, namespace, self._host.contact)
        with self._host.toll(digest, reply.taker.peer_id, progress.toll):
            await _Adoption(pool, owner, adopt, progress.toll, download).make()
        log.info(
            "blob_handed_over",
            digest=str(digest),
            remote=request.remote,
            owner=owner,
            sent=progress.toll.sent,
        )

    async def _seeded(self, digest: Digest, namespace: str) -> tuple[Metainfo, Download | None]:
        """Seed a blob; what it is, and how it comes here if it is on its way.

        Raises what `OriginContent.ensure_local` does.
        """
        while not self._content.store.has(digest):
            download = await self._content.cold.begin(digest, namespace, decide=False)
            if download is not None:
                return await download.hashes.wait_complete(), download
        metainfo = await self._content.store.metainfo(digest)
        self._host.seed(metainfo, namespace)
        return metainfo, None

    def _check_peer_tls(self, owner: str, reply: api.OfferReply) -> None:
        """Say at once what else would only be in the logs: no piece would ever get through."""
        here = self._host.speaks_tls
        if reply.tls is not None and reply.tls != here:
            ours, theirs = (("in plain", "by TLS")[speaks] for speaks in (here, reply.tls))
            reason = f"pieces go {ours} here and {theirs} there: set tls.peer alike in both"
            raise RpcUnavailable(owner, api.OFFER_BLOB.name, reason)

    def _bucket(self, remote: str) -> TokenBucket:
        return self._buckets.setdefault(remote, TokenBucket())


@attrs.define(eq=False)
class _Adoption:
    """One call that has an origin of another cluster adopt a blob, for as long as it can come to anything."""

    pool: RpcPool
    owner: str
    request: api.AdoptRequest
    toll: Toll
    download: Download | None
    _failure: SwarmpullError | None = None

    async def make(self) -> None:
        """Return when the blob is there.

        Raises:
            RpcUnavailable: the origin does not answer any more.
            SwarmpullError: why the blob does not come here any more, or what the origin says.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._probe, nursery.cancel_scope)
            if self.download is not None:
                nursery.start_soon(_cancel_when_failed, self.download, nursery.cancel_scope)
            try:
                await self.pool.call(
                    self.owner, api.ADOPT_BLOB, self.request, timeout=ADOPT_TIMEOUT
                )
            except SwarmpullError as error:
                # Raised below: out of the nursery it would come wrapped in a group.
                self._failure = error
            nursery.cancel_scope.cancel()
        if self.download is not None and self.download.failed:
            # It tells more than what the other side makes of it.
            await self.download.wait()
        if self._failure is not None:
            raise self._failure

    async def _probe(self, scope: trio.CancelScope) -> None:
        """End the call when the origin takes nothing and answers nothing."""
        sent = -1
        while True:
            await trio.sleep(PROBE_INTERVAL)
            if self.toll.sent == sent:
                # It may have all of it, and copy it to others there.
                try:
                    await self.pool.call(self.owner, api.PING, api.Empty(), timeout=PROBE_PATIENCE)
                except RpcUnavailable as error:
                    self._failure = error
                    scope.cancel()
                    return
                except SwarmpullError as error:
                    # Any answer will do.
                    log.debug("hand_over_probed", owner=self.owner, answer=str(error))
            sent = self.toll.sent


async def _cancel_when_failed(download: Download, scope: trio.CancelScope) -> None:
    await download.wait_ended()
    if download.failed:
        scope.cancel()


def _check_owners(owners: tuple[str, ...]) -> None:
    try:
        for owner in owners:
            parse_address(owner)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
