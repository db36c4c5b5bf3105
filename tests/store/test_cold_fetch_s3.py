"""A cold blob out of a real S3 server, through a proxy that spoils some of its answers."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.config import Address, PeerListenerConfig, SwarmConfig
from swarmpull.errors import BackendUnavailable, BlobNotFound, ObjectReplaced, StoreFull
from swarmpull.roles import cold_fetch
from swarmpull.roles.cold_blobs import ColdBlobs
from swarmpull.roles.downloads import Download
from swarmpull.roles.swarm_host import open_swarm_host
from swarmpull.store.backends import Backend, blob_key, open_backend
from swarmpull.store.backends.metainfo import metainfo_key
from swarmpull.store.backends.namespaces import Namespaces
from swarmpull.store.blobs import BlobStore, open_store
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.swarm.peers import PeerKind
from swarmpull.telemetry import Metrics

from .conftest import Content, fill, make_content
from .s3_proxy import Fault, FaultyProxy
from .s3_server import BUCKET, S3Server

LOOPBACK = PeerListenerConfig(listen=Address("127.0.0.1", 0))


@attrs.define
class Play:
    cold: ColdBlobs
    store: BlobStore
    backend: Backend
    content: Content
    metrics: Metrics

    async def begin(self) -> Download:
        download = await self.cold.begin(self.content.digest, "", decide=True)
        assert download is not None
        return download

    async def fetch(self) -> None:
        with trio.fail_after(60):
            await (await self.begin()).wait()

    @property
    def bytes_read(self) -> int:
        return int(self.cold._bytes_read._value.get())

    async def check(self) -> None:
        with self.store.open(self.content.digest) as handle:
            assert await handle.read_at(0, handle.length) == self.content.data


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def content() -> Content:
    return make_content(6 * PIECE + 77, seed=5)


@pytest.fixture
async def play(
    tmp_path: Path, proxy: FaultyProxy, content: Content, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Play]:
    async with playing(tmp_path / "store", proxy, content, monkeypatch) as play:
        yield play


@asynccontextmanager
async def playing(
    directory: Path, proxy: FaultyProxy, content: Content, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Play]:
    """An origin with its store in a directory, and a blob that only S3 has."""
    monkeypatch.setattr(cold_fetch, "PAUSE", 0.01)
    options = f"endpoint=127.0.0.1:{proxy.port}&secure=false&attempts=2&read_timeout=5s"
    backend = await open_backend(f"s3://{BUCKET}/cold?{options}")
    await backend.put_bytes(blob_key(content.digest), content.data)
    metrics = Metrics()
    async with (
        open_store(directory, name="origin") as store,
        open_swarm_host(store, PeerKind.ORIGIN, LOOPBACK, SwarmConfig(), metrics) as host,
        trio.open_nursery() as nursery,
    ):
        cold = ColdBlobs(
            store, Namespaces(backend), host, None, nursery, metrics, fetch_connections=3
        )
        yield Play(cold, store, backend, content, metrics)
        nursery.cancel_scope.cancel()
    proxy._faults.clear()
    for key in (await backend.list()).keys:
        await backend.delete(key)


async def test_a_cold_blob_is_read_once_by_ranges(play: Play, proxy: FaultyProxy) -> None:
    await play.fetch()

    await play.check()
    assert play.bytes_read == len(play.content.data)
    reads = [seen for seen in proxy.seen if seen.method == "GET" and "/blobs/" in seen.target]
    assert len(reads) >= 4
    assert all("range" in seen.headers and "if-match" in seen.headers for seen in reads)
    with trio.fail_after(30):
        while proxy.count("PUT", metainfo_key(play.content.digest)) == 0:  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("answer"),
        Fault("answer", status=500, code="InternalError"),
        Fault("reset", after=PIECE // 2),
        Fault("close", after=PIECE // 3),
        Fault("silence", after=PIECE // 4),
    ],
    ids=["slow down", "internal error", "reset", "close", "silence"],
)
async def test_answers_that_are_spoiled_now_and_then_cost_little(
    play: Play, proxy: FaultyProxy, fault: Fault
) -> None:
    proxy.spoil("GET", fault, fault, fault, target="/blobs/")
    await play.fetch()
    await play.check()
    assert play.bytes_read <= len(play.content.data) + 3 * PIECE


async def test_a_server_that_keeps_failing_fails_the_fetch_and_the_next_goes_on(
    play: Play, proxy: FaultyProxy
) -> None:
    # Each of three workers gets half a piece; nothing comes after that.
    proxy.spoil("GET", *[Fault("reset", after=100_000)] * 3, target="/blobs/")
    proxy.spoil("GET", *[Fault("answer")] * 200, target="/blobs/")
    with pytest.raises(BackendUnavailable, match="SlowDown"):
        await play.fetch()
    proxy._faults.clear()

    await play.fetch()

    await play.check()


async def test_an_object_that_is_replaced_while_it_is_fetched_is_an_error(
    play: Play, proxy: FaultyProxy, s3_server: S3Server
) -> None:
    key = f"cold/{blob_key(play.content.digest)}"
    data = bytes(len(play.content.data))

    def replace() -> None:
        s3_server.admin._put_object(BUCKET, key, data, {})

    proxy.spoil("GET", Fault("reset", after=1000, then=replace), target="/blobs/")
    with pytest.raises(ObjectReplaced, match="replaced"):
        await play.fetch()
    assert not play.store.has(play.content.digest)


async def test_an_object_that_is_deleted_while_it_is_fetched_is_an_error(
    play: Play, proxy: FaultyProxy, s3_server: S3Server
) -> None:
    key = f"cold/{blob_key(play.content.digest)}"
    faults = [
        Fault("reset", after=1000, then=lambda: s3_server.admin.remove_object(BUCKET, key)),
        # The others are reset too: what was on its way may be all that they need.
        *[Fault("reset", after=1000)] * 2,
    ]
    proxy.spoil("GET", *faults, target="/blobs/")

    with pytest.raises(ObjectReplaced, match="deleted while it was"):
        await play.fetch()

    assert not play.store.has(play.content.digest)
    with trio.fail_after(10):
        while any((play.store.root / "partials").iterdir()):  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.01)
    await play.backend.put_bytes(blob_key(play.content.digest), play.content.data)
    await play.fetch()
    await play.check()


async def test_a_disk_that_fills_up_midway_fails_the_fetch_and_the_next_goes_on(
    small_disk: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on file systems that cannot reserve room.
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    content = make_content(3 * PIECE, seed=6)
    small = make_content(1000, seed=7)

    async with playing(small_disk, proxy, content, monkeypatch) as play:
        await play.backend.put_bytes(blob_key(small.digest), small.data)
        full = Fault("reset", after=1000, then=partial(fill, small_disk))
        proxy.spoil("GET", full, target="/blobs/")
        with pytest.raises(StoreFull) as caught:
            await play.fetch()

        assert str(content.digest) in str(caught.value)
        assert "free disk space" in str(caught.value)
        (small_disk / "filler").unlink()
        await play.cold.begin(small.digest, "", decide=True)
        assert play.store.has(small.digest)
        await play.fetch()
        await play.check()


def refuse(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no")


async def test_an_object_that_is_not_there_is_not_found(play: Play) -> None:
    await play.backend.delete(blob_key(play.content.digest))
    with pytest.raises(BlobNotFound):
        await play.begin()
