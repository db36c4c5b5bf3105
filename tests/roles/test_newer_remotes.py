"""A remote that runs a newer version: what it adds does no harm, and what it changed is waited for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import SwarmpullError
from swarmpull.roles import replicator
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcContext, RpcService, serve_rpc
from swarmpull.wire.rpc_messages import Method, RpcHello, pack
from tests.ports import free_ports

from .roles import Cluster, whole_cluster
from .test_replicator import LAYER, digest_at, east_under, until

# What a stand-in for the index of a remote does at a port until it is cancelled.
StandIn = Callable[..., Awaitable[None]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "BACKOFF_MAX", 0.5)
    monkeypatch.setattr("swarmpull.store.retry_schedule.PROBE_MAX", 0.3)


@attrs.frozen
class LogOfTomorrow:
    """A reply that has lost what we need."""

    revisions: tuple[str, ...] = ("one",)


@attrs.frozen
class NewerLog(api.TagLogReply):
    signed_by: str = "somebody"


@attrs.frozen
class NewerDescription(api.ClusterDescription):
    regions: tuple[str, ...] = ("west-1", "west-2")


class QuotaOfTomorrow(SwarmpullError):
    """An error that this version does not know."""


async def another_version(port: int, **started: Any) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1024)
            await stream.send_all(pack(RpcHello(1, version=2)))
            await stream.send_eof()

    await trio.serve_tcp(greet, port, host="127.0.0.1", **started)


async def without_the_call(port: int, **started: Any) -> None:
    await serve_rpc(RpcService(), "127.0.0.1", port, **started)


async def another_reply(port: int, **started: Any) -> None:
    async def tag_log(_request: api.ReferenceRequest, _context: RpcContext) -> LogOfTomorrow:
        return LogOfTomorrow()

    service = RpcService()
    service.register(Method(api.TAG_LOG.name, api.ReferenceRequest, LogOfTomorrow), tag_log)
    await serve_rpc(service, "127.0.0.1", port, **started)


async def another_error(port: int, **started: Any) -> None:
    async def tag_log(_request: api.ReferenceRequest, _context: RpcContext) -> api.TagLogReply:
        raise QuotaOfTomorrow("the quota of tomorrow is used up")

    service = RpcService()
    service.register(api.TAG_LOG, tag_log)
    await serve_rpc(service, "127.0.0.1", port, **started)


async def with_more_fields(port: int, west: Cluster, **started: Any) -> None:
    """An index whose replies say more than we know; that of ``west`` gives the answers."""
    index, origin = (west.roles[name].address("rpc") for name in ("index", "origin"))

    def forward(method: Method[Any, Any], newer: type[Any]) -> None:
        async def handle(request: Any, _context: RpcContext) -> Any:
            reply = await west.pool.call(index, method, request, timeout=10.0)
            return newer(**attrs.asdict(reply, recurse=False))

        service.register(Method(method.name, method.request, newer), handle)

    async def describe(_request: api.Empty, _context: RpcContext) -> NewerDescription:
        return NewerDescription((origin,))

    service = RpcService()
    forward(api.TAG_LOG, NewerLog)
    service.register(Method(api.DESCRIBE_CLUSTER.name, api.Empty, NewerDescription), describe)
    forward(api.CHECK_REFERENCES, api.Empty)
    await serve_rpc(service, "127.0.0.1", port, **started)


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (another_version, "speaks RPC version 2, this side 1"),
        (without_the_call, "index.tag_log"),
        (another_reply, "changes"),
        (another_error, "the quota of tomorrow is used up"),
    ],
)
async def test_what_a_newer_remote_does_otherwise_is_told_and_waited_for(
    tmp_path: Path, stand_in: StandIn, reason: str
) -> None:
    (port,) = free_ports(1)
    async with whole_cluster(tmp_path / "west") as west, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def until_it_is_mended(**started: Any) -> None:
            with scope:
                await stand_in(port, **started)

        await nursery.start(until_it_is_mended)
        remote = f"127.0.0.1:{port}"
        async with east_under(tmp_path / "east", remote_index=remote, indexes=1) as east:
            digest = await east.push()

            async def has_failed_twice() -> bool:
                entries = (await east.replication(0))["entries"]
                return entries[0]["attempts"] >= 2

            await until(has_failed_twice)
            document = await east.replication(0)
            assert reason in document["entries"][0]["failure"]
            assert document["remotes"][0]["failing"], "the others need not all try"
            assert not document["set_aside"], "nobody has to do anything here"

            scope.cancel()
            await nursery.start(partial(with_more_fields, port, west))
            await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)
            assert await digest_at(west) == digest
            reply = await west.get("origin", f"/v2/team/app/blobs/{Digest.of(LAYER)}")
            assert reply.content == LAYER
        nursery.cancel_scope.cancel()
