"""Two clusters that trust one another: what is possible between them, and what is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import CertificateError, PushRefused, RpcFailed, RpcUnavailable
from swarmpull.identity import Identity
from swarmpull.patterns import compile_pattern
from swarmpull.roles.rates import Toll
from swarmpull.store.token_bucket import TokenBucket
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire import access, api
from swarmpull.wire.rpc import Method, RpcContext, RpcService, open_rpc_pool, serve_rpc
from swarmpull.wire.tls import Tls, TlsFiles, load_contexts
from tests.roles.peers import make_content, running_node

from .hosts import Authority, unchecked

OFFER = api.OfferRequest(Digest.of(b"x"), "team/app", 1)
HELD = api.HeldRequest(Digest.of(b"x"))
DEADLINE = 60.0


@pytest.fixture(scope="module")
def east(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("east"), "east")


@pytest.fixture(scope="module")
def west(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("west"), "west")


def trusting(files: TlsFiles, **trusted: str) -> Tls:
    """What a role has that trusts other clusters, each with a file of its authorities."""
    load = partial(load_contexts, files, trusted)
    return Tls(WatchedFiles((files.ca, files.cert, files.key), load))


@asynccontextmanager
async def origin_serving(tls: Tls) -> AsyncIterator[str]:
    async def offer(_: api.OfferRequest, context: RpcContext) -> api.OfferReply:
        taker = PeerContact("0" * 32, context.local_host, 1, PeerKind.ORIGIN)
        return api.OfferReply(True, taker)

    async def held(_: api.HeldRequest, __: RpcContext) -> api.HeldReply:
        raise AssertionError("was called by another cluster")

    service = RpcService()
    service.register(api.OFFER_BLOB, offer)
    service.register(api.HELD_BLOB, held)
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            serve = partial(serve_rpc, service, "127.0.0.1", 0, tls=tls)
            host, port = await nursery.start(serve)
            yield f"{host}:{port}"
            nursery.cancel_scope.cancel()


async def test_an_origin_of_a_trusted_cluster_may_offer_and_nothing_else(
    east: Authority, west: Authority
) -> None:
    there = trusting(west.issue("o", "origin"), east=str(east.directory / "ca.crt"))
    here = trusting(east.issue("o", "origin"), west=str(west.directory / "ca.crt"))
    async with (
        origin_serving(there) as address,
        open_rpc_pool(tls=here.towards("west")) as pool,
    ):
        assert (await pool.call(address, api.OFFER_BLOB, OFFER, timeout=20.0)).wanted
        with pytest.raises(RpcFailed, match="another cluster may replicate to it, and nothing"):
            await pool.call(address, api.HELD_BLOB, HELD, timeout=20.0)


async def test_an_origin_of_a_trusted_cluster_offers_only_what_its_entry_names(
    east: Authority, west: Authority
) -> None:
    rules = access.ForeignRules({"east": (compile_pattern("shared/**"),)})
    there = trusting(west.issue("n", "origin"), east=str(east.directory / "ca.crt"))
    here = trusting(east.issue("n", "origin"), west=str(west.directory / "ca.crt"))
    shared = attrs.evolve(OFFER, namespace="shared/app")
    async with (
        origin_serving(Tls(there._files, foreign=rules)) as address,
        open_rpc_pool(tls=here.towards("west")) as pool,
    ):
        with pytest.raises(PushRefused, match="cluster east may not replicate to team/app: repos"):
            await pool.call(address, api.OFFER_BLOB, OFFER, timeout=20.0)
        assert (await pool.call(address, api.OFFER_BLOB, shared, timeout=20.0)).wanted


@attrs.frozen
class HandedOver:
    """Everything, to everybody, as one."""

    sent: Toll = attrs.Factory(lambda: Toll(TokenBucket()))

    def is_for(self, digest: Digest, cluster: str) -> bool:
        return cluster == "west"

    def toll(self, digest: Digest, cluster: str) -> Toll:
        return self.sent


async def test_all_peers_of_another_cluster_share_what_is_sent_to_it(
    tmp_path: Path, east: Authority, west: Authority
) -> None:
    here = trusting(east.issue("taker", "origin"), west=str(west.directory / "ca.crt"))
    there = trusting(west.issue("taker", "origin"), east=str(east.directory / "ca.crt"))
    content = make_content(3 * PIECE_LENGTH_MIN)
    origin = partial(running_node, kind=PeerKind.ORIGIN)
    async with (
        origin(tmp_path / "east", tls=here) as source,
        origin(tmp_path / "one", tls=there) as one,
        origin(tmp_path / "two", tls=there) as two,
    ):
        await source.seed(content)
        handed_over = source.host.handed_over = HandedOver()
        # Only the id of one of them is known from what that cluster has said.
        named = Toll(TokenBucket())
        with source.host.toll(content.digest, one.contact.peer_id, named):
            for taker in (one, two):
                await taker.host.adopt(
                    content.metainfo, "", attrs.evolve(source.contact, host="127.0.0.1")
                )
        assert handed_over.sent.sent == 2 * len(content.data)


STAMP = api.Stamp(1, "east-index")
PUT = api.PutManifestRequest("team/app", "v1", "application/json", b"{}", STAMP)
DELETE = api.DeleteTagRequest("team/app", "v1", STAMP)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (PUT, ""),
        (attrs.evolve(PUT, stamp=None), "changes a tag without the stamp"),
        (attrs.evolve(PUT, stamp=None, reference=str(Digest.of(b"child"))), ""),
        (attrs.evolve(PUT, expect=""), "sets a condition"),
        (attrs.evolve(PUT, repository="teams/app"), "may not replicate to teams/app"),
        (DELETE, ""),
        (attrs.evolve(DELETE, stamp=None), "changes a tag without the stamp"),
        (attrs.evolve(DELETE, reference=str(Digest.of(b"signature"))), ""),
        (attrs.evolve(DELETE, expect="*"), "sets a condition"),
        (attrs.evolve(DELETE, repository="other"), "may not replicate to other"),
        (OFFER, ""),
        (attrs.evolve(OFFER, namespace=""), "names no repository"),
        (api.Empty(), ""),
    ],
)
def test_another_cluster_makes_changes_with_their_stamps_and_nothing_else(
    body: object, reason: str
) -> None:
    caller = Identity("east", "h", frozenset({"index"}))
    refusal = access.ForeignRules({"east": (compile_pattern("team/**"),)}).refuse(caller, body)

    assert reason in refusal
    assert bool(refusal) == bool(reason)
    if "may not replicate" in reason:
        assert access.ForeignRules().refuse(caller, body) == ""


def test_it_is_known_which_repository_each_call_of_another_cluster_is_about() -> None:
    methods = {m.name: m for m in vars(api).values() if isinstance(m, Method)}
    about_none = {api.PING.name, api.DESCRIBE_CLUSTER.name}
    for name in access.FOREIGN_CALLERS.keys() - about_none:
        fields = {field.name for field in attrs.fields(methods[name].request)}
        assert len(fields & {"repository", "namespace"}) == 1, name


async def test_a_cluster_that_is_not_trusted_is_refused(east: Authority, west: Authority) -> None:
    # One authority for both: what separates them is that nobody said that they belong together.
    there = trusting(west.issue("p", "origin"))
    here = trusting(east.issue("p", "origin"), west=str(west.directory / "ca.crt"))
    async with (
        origin_serving(there) as address,
        open_rpc_pool(tls=here.towards("west")) as pool,
    ):
        with pytest.raises(RpcUnavailable, match="refuses our certificate"):
            await pool.call(address, api.OFFER_BLOB, OFFER, timeout=20.0)


async def test_the_authority_of_another_cluster_cannot_vouch_for_ours(
    east: Authority, west: Authority, tmp_path: Path
) -> None:
    # What the authority of west signs is believed about west only, whatever it says.
    forger = Authority.create(tmp_path, "west")
    there = trusting(west.issue("q", "origin"), east=str(forger.directory / "ca.crt"))
    forged = attrs.evolve(forger.issue("q", "origin"), ca=west.issue("r", "origin").ca)
    intruder = unchecked(forged, "west", "q", "origin")
    async with origin_serving(there) as address, open_rpc_pool(tls=intruder) as pool:
        with pytest.raises(RpcUnavailable, match="authority that may not vouch for that cluster"):
            await pool.call(address, api.HELD_BLOB, HELD, timeout=20.0)


async def test_whoever_dials_a_remote_takes_nobody_of_its_own_cluster_for_it(
    east: Authority, west: Authority
) -> None:
    own = trusting(east.issue("s", "origin"), west=str(west.directory / "ca.crt"))
    async with (
        origin_serving(own) as address,
        open_rpc_pool(tls=own.towards("west")) as pool,
    ):
        with pytest.raises(RpcUnavailable, match="is of another cluster than west"):
            await pool.call(address, api.OFFER_BLOB, OFFER, timeout=20.0)


def test_a_certificate_of_another_cluster_is_not_one_of_ours(
    east: Authority, west: Authority
) -> None:
    files = attrs.evolve(west.issue("t", "origin"), ca=str(east.directory / "ca.crt"))

    with pytest.raises(CertificateError, match="signed by an authority of another cluster"):
        load_contexts(files, {"west": str(west.directory / "ca.crt")})
    with pytest.raises(CertificateError, match="holds no certificate"):
        load_contexts(east.issue("u", "origin"), {"west": str(west.directory / "ca.key")})


def test_of_another_cluster_only_indexes_and_origins_are_let_in() -> None:
    for role in ("agent", "tracker", "client"):
        foreign = Identity("west", "h", frozenset({role}))
        assert all(access.refuse_caller(foreign, method, "east") for method in access.CALLERS)
        assert access.refuse_peer(foreign, "east")
    origin = Identity("west", "h", frozenset({"origin"}))
    assert not access.refuse_peer(origin, "east")
    assert not access.refuse_caller(origin, api.ADOPT_BLOB.name, "east")
    assert access.refuse_caller(origin, api.RECORD_MANIFEST.name, "east")
    assert access.FOREIGN_CALLERS.keys() <= access.CALLERS.keys()
