"""The blobs of an origin: its store in front of a directory backend."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    DownloadFailed,
    ObjectNotFound,
    StoreUnavailable,
)
from swarmpull.roles.cold_blobs import ColdBlobs
from swarmpull.roles.origin_content import OriginContent
from swarmpull.roles.shared_work import SharedWork
from swarmpull.store.backends import open_backend
from swarmpull.store.backends.base import blob_key
from swarmpull.store.backends.directory import DirectoryBackend
from swarmpull.store.backends.namespaces import Namespaces
from swarmpull.store.blobs import BlobStore
from swarmpull.swarm.peers import PeerKind
from swarmpull.telemetry import Metrics

from .peers import running_node, until

# One piece, and so copied whole; `test_cold_blobs` has those that are fetched by ranges.
DATA = bytes(range(256)) * 10_000
BLOB = Digest.of(DATA)


@attrs.define
class Counted:
    """A backend whose reads are counted, and may have to wait."""

    backend: DirectoryBackend
    reads: int = 0
    open_now: int = 0
    open_most: int = 0
    gate: trio.Event | None = None

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def open(self, key: str, **where: object):
        self.reads += 1
        return self._open(key, **where)

    @attrs.define
    class _Reading:
        outer: Counted
        inner: object

        async def __aenter__(self):
            self.outer.open_now += 1
            self.outer.open_most = max(self.outer.open_most, self.outer.open_now)
            if self.outer.gate is not None:
                await self.outer.gate.wait()
            return await self.inner.__aenter__()

        async def __aexit__(self, *exc):
            self.outer.open_now -= 1
            return await self.inner.__aexit__(*exc)

    def _open(self, key: str, **where: object):
        return self._Reading(self, self.backend.open(key, **where))


@attrs.define
class Play:
    content: OriginContent
    store: BlobStore
    backend: Counted
    root: Path

    async def add(self, data: bytes = DATA) -> Digest:
        async with self.store.create() as writer:
            await writer.write(data)
            return (await writer.commit(Digest.of(data))).digest

    async def put(self, digest: Digest, data: bytes) -> None:
        await self.backend.backend.put_bytes(blob_key(digest), data)

    def nothing_is_left(self) -> bool:
        return not list((self.root / "store" / "temporary").iterdir())


@pytest.fixture
async def play(tmp_path: Path) -> AsyncIterator[Play]:
    backend = Counted(await open_backend((tmp_path / "backend").as_uri()))
    async with (
        running_node(tmp_path / "store", kind=PeerKind.ORIGIN) as node,
        trio.open_nursery() as nursery,
    ):
        store, metrics, namespaces = node.store, Metrics(), Namespaces(backend)
        cold = ColdBlobs(store, namespaces, node.host, None, nursery, metrics, fetch_connections=2)
        content = OriginContent(store, namespaces, node.host, cold, nursery, metrics)
        yield Play(content, store, backend, tmp_path)
        nursery.cancel_scope.cancel()


async def test_a_blob_is_found_on_the_disk_or_in_the_backend(play: Play) -> None:
    on_disk = await play.add()
    in_backend = Digest.of(b"only there")
    await play.put(in_backend, b"only there")

    assert await play.content.stat(on_disk, "") == len(DATA)
    assert await play.content.stat(in_backend, "") == 10
    assert play.backend.reads == 0, "a question about the length fetches nothing"


async def test_a_blob_that_nobody_has_is_not_found(play: Play) -> None:
    for ask in (play.content.stat, play.content.ensure_local):
        with pytest.raises(BlobNotFound) as caught:
            await ask(BLOB, "")
        assert caught.value.where.startswith("file://")
    assert play.nothing_is_left()


async def test_concurrent_requests_share_one_fetch(play: Play) -> None:
    await play.put(BLOB, DATA)
    play.backend.gate = trio.Event()

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(play.content.ensure_local, BLOB, "")
        await trio.testing.wait_all_tasks_blocked()
        play.backend.gate.set()

    assert play.backend.reads == 1
    assert play.store.stat(BLOB).length == len(DATA)


async def test_a_fetch_goes_on_when_those_who_wait_give_up(play: Play) -> None:
    await play.put(BLOB, DATA)
    play.backend.gate = trio.Event()
    with trio.move_on_after(0.05):
        await play.content.ensure_local(BLOB, "")
    play.backend.gate.set()

    await play.content.ensure_local(BLOB, "")

    assert play.backend.reads == 1


async def test_only_so_many_blobs_are_fetched_at_once(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play.content.cold, "_copies", trio.CapacityLimiter(3))
    blobs = [f"blob {number}".encode() for number in range(10)]
    for data in blobs:
        await play.put(Digest.of(data), data)
    play.backend.gate = trio.Event()

    async with trio.open_nursery() as nursery:
        for data in blobs:
            nursery.start_soon(play.content.ensure_local, Digest.of(data), "")
        await until(lambda: play.backend.open_now == 3)
        play.backend.gate.set()

    assert play.backend.open_most == 3
    assert play.backend.reads == 10


async def test_a_corrupt_object_is_refused_and_nothing_is_visible(play: Play) -> None:
    await play.put(BLOB, DATA[:-1] + b"x")

    with pytest.raises(BackendUnavailable, match="corrupt, it hashes to sha256") as caught:
        await play.content.ensure_local(BLOB, "")

    assert BLOB.hex in caught.value.key
    assert play.content.is_corrupt(BLOB, "")
    with pytest.raises(BlobNotFound):
        play.store.stat(BLOB)
    assert play.nothing_is_left()


async def test_a_corrupt_object_of_the_right_length_is_replaced_by_the_next_push(
    play: Play,
) -> None:
    await play.put(BLOB, DATA[:-1] + b"x")
    with pytest.raises(BackendUnavailable):
        await play.content.ensure_local(BLOB, "")
    await play.add()

    await play.content.make_durable(BLOB, "")

    assert await play.backend.get_bytes(blob_key(BLOB)) == DATA
    assert not play.content.is_corrupt(BLOB, "")


async def test_a_truncated_object_is_replaced_by_the_next_push(play: Play) -> None:
    await play.put(BLOB, DATA[:100])
    await play.add()

    await play.content.make_durable(BLOB, "")

    assert await play.backend.get_bytes(blob_key(BLOB)) == DATA


async def test_what_the_backend_has_is_not_written_again(play: Play) -> None:
    await play.add()
    await play.content.make_durable(BLOB, "")
    file = play.backend.backend._path(blob_key(BLOB))
    written_at = file.stat().st_mtime_ns

    await play.content.make_durable(BLOB, "")

    assert file.stat().st_mtime_ns == written_at


async def test_a_process_without_descriptors_fails_the_write_and_nothing_else(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    await play.add()
    open_for_real = os.open

    def fail(path: Path, *args: int) -> int:
        if str(path).endswith(BLOB.hex):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_for_real(path, *args)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StoreUnavailable, match="Too many open files"):
        await play.content.make_durable(BLOB, "")
    monkeypatch.undo()

    await play.content.make_durable(BLOB, "")

    assert await play.backend.get_bytes(blob_key(BLOB)) == DATA


async def test_what_is_corrupt_in_the_backend_counts_as_missing(play: Play) -> None:
    await play.put(BLOB, DATA[:-1] + b"x")
    assert await play.content.stat(BLOB, "") == len(DATA), "nobody knows yet"
    with pytest.raises(BackendUnavailable):
        await play.content.ensure_local(BLOB, "")

    with pytest.raises(BlobNotFound):
        await play.content.stat(BLOB, "")

    await play.add()
    assert await play.content.stat(BLOB, "") == len(DATA)


@pytest.mark.parametrize("there", [DATA, None], ids=["in the backend", "nowhere else"])
@pytest.mark.parametrize("damaged", [DATA[:1000], DATA[:-1] + b"x"], ids=["cut", "changed"])
async def test_what_was_damaged_on_the_disk_never_gets_into_the_backend(
    play: Play, damaged: bytes, there: bytes | None
) -> None:
    if there is not None:
        await play.put(BLOB, there)
    await play.add()
    play.store.path(BLOB).write_bytes(damaged)

    if there is None or len(damaged) < len(DATA):
        with pytest.raises(BlobNotFound):
            await play.content.make_durable(BLOB, "")
        assert not play.store.has(BLOB)
    else:
        await play.content.make_durable(BLOB, "")  # nothing to write

    if there is None:
        with pytest.raises(ObjectNotFound):
            await play.backend.get_bytes(blob_key(BLOB))
    else:
        assert await play.backend.get_bytes(blob_key(BLOB)) == DATA


async def test_what_is_not_on_the_disk_cannot_be_made_durable(play: Play) -> None:
    with pytest.raises(BlobNotFound):
        await play.content.make_durable(BLOB, "")


async def test_an_answer_never_comes_from_work_that_was_cancelled() -> None:
    async def never(_: Digest) -> int:
        await trio.sleep_forever()
        raise AssertionError

    async with trio.open_nursery() as waiting, trio.open_nursery() as working:
        shared: SharedWork[int] = SharedWork(working)

        async def want() -> None:
            with pytest.raises(DownloadFailed, match="shuts down"):
                await shared.run(BLOB, never)

        waiting.start_soon(want)
        await trio.testing.wait_all_tasks_blocked()
        working.cancel_scope.cancel()
