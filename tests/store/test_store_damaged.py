"""A file that changes on the disk is found out by whoever reads it, and not handed out as what it was."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import attrs
import pytest
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, DigestMismatch, StoreUnavailable
from swarmpull.store import blobs, sidecars
from swarmpull.store.blobs import BlobStore
from swarmpull.store.durable import read_exactly
from swarmpull.store.holds import Pin
from swarmpull.store.piece_check import PieceCheck
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE

STEP = PIECE // 4


async def put(store: BlobStore, content) -> None:
    async with store.create() as writer:
        await writer.write(content.data)
        await writer.commit(content.digest)


def flip(store: BlobStore, content, at: int) -> None:
    """Change one bit, as a disk does: the time of the file stays."""
    path = store.path(content.digest)
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content.data[at] ^ 0x10]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def read_in_steps(store: BlobStore, content, step: int = STEP) -> bytes:
    """What a reader got before it was told that something is wrong."""
    read = bytearray()
    with store.open(content.digest) as handle:
        while len(read) < handle.length:
            try:
                read += await handle.read_at(len(read), step)
            except StoreUnavailable:
                break
    return bytes(read)


@pytest.mark.parametrize("piece", [0, 1, 2])
async def test_no_damaged_piece_is_read_to_its_end(store: BlobStore, blob, piece: int) -> None:
    await put(store, blob)
    flip(store, blob, piece * PIECE + 7)

    with structlog.testing.capture_logs() as logs:
        read = await read_in_steps(store, blob)

    assert piece * PIECE <= len(read) < blob.metainfo.piece_offset(piece) + len(blob.piece(piece))
    assert read[: piece * PIECE] == blob.data[: piece * PIECE]
    assert not store.has(blob.digest)
    assert [entry["event"] for entry in logs] == ["blob_damaged"]
    # It can come again, and is read to its end.
    await put(store, blob)
    assert await read_in_steps(store, blob) == blob.data


async def test_a_read_of_several_pieces_at_once_is_checked(store: BlobStore, blob) -> None:
    await put(store, blob)
    flip(store, blob, PIECE + 1)
    assert await read_in_steps(store, blob, step=3 * PIECE) == b""
    assert not store.has(blob.digest)


async def test_a_small_blob_that_is_damaged_is_not_read_at_all(
    store: BlobStore, content_of
) -> None:
    content = content_of(414)
    await put(store, content)
    flip(store, content, 100)
    assert await read_in_steps(store, content) == b""
    with pytest.raises(BlobNotFound):
        store.open(content.digest)


@pytest.mark.parametrize("with_metainfo", [True, False])
async def test_a_small_blob_comes_with_its_metainfo_only_if_it_is_right(
    store: BlobStore, content_of, with_metainfo
) -> None:
    content = content_of(414)
    await put(store, content)
    for path in (store.root / "blobs").rglob("*.metainfo"):
        if not with_metainfo:
            path.unlink()
    assert await store.read_small(content.digest, 414) == (content.metainfo, content.data)
    assert await store.read_small(content.digest, 413) == (content.metainfo, None)

    flip(store, content, 100)

    with pytest.raises(StoreUnavailable, match="was damaged on the disk, and removed"):
        await store.read_small(content.digest, 414)
    assert not store.has(content.digest)


async def test_the_swarm_is_told_before_the_name_is_free(store: BlobStore, blob) -> None:
    forgotten = []
    await put(store, blob)
    flip(store, blob, 0)
    with store.janitor.attached(dict, forgotten.append):
        await read_in_steps(store, blob)
    assert forgotten == [blob.digest]


async def test_a_blob_that_came_anew_does_not_go_with_the_damaged_one(
    store: BlobStore, blob
) -> None:
    await put(store, blob)
    flip(store, blob, 0)
    with store.open(blob.digest) as old:
        await put(store, blob)
        with pytest.raises(StoreUnavailable, match=f"{blob.digest} was damaged on the disk"):
            await old.read_at(0, PIECE)
    assert await read_in_steps(store, blob) == blob.data


async def test_examining_a_damaged_blob_removes_it(store: BlobStore, blob) -> None:
    forgotten = []
    await put(store, blob)
    await store.verify(blob.digest)
    flip(store, blob, 2 * PIECE)
    with store.janitor.attached(dict, forgotten.append), pytest.raises(DigestMismatch):
        await store.verify(blob.digest)
    assert forgotten == [blob.digest]
    assert not store.has(blob.digest)


@pytest.mark.parametrize("state", ["missing", "torn", "of another blob"])
async def test_examining_a_blob_whose_piece_hashes_are_of_no_use_goes_by_its_digest(
    store: BlobStore, blob, state: str
) -> None:
    await put(store, blob)
    path = store.path(blob.digest).with_name(f"{blob.digest.hex}.metainfo")
    if state == "missing":
        path.unlink()
    elif state == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        wrong = attrs.evolve(blob.metainfo, piece_hashes=bytes(len(blob.metainfo.piece_hashes)))
        path.write_bytes(sidecars.encode(wrong))

    await store.verify(blob.digest)

    assert store.path(blob.digest).read_bytes() == blob.data
    flip(store, blob, 0)
    with pytest.raises(DigestMismatch):
        await store.verify(blob.digest)
    assert not store.has(blob.digest)


async def test_memory_that_fails_does_not_cost_the_blob(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be all that there is of it."""
    await put(store, blob)
    with monkeypatch.context() as failing:

        def misread(descriptor: int, offset: int, size: int) -> bytes:
            data = bytearray(read_exactly(descriptor, offset, size))
            data[0] ^= 0x10
            return bytes(data)

        failing.setattr(blobs, "read_exactly", misread)
        with (
            structlog.testing.capture_logs() as logs,
            store.open(blob.digest) as handle,
            pytest.raises(StoreUnavailable, match="was misread, though its file is right"),
        ):
            await handle.read_at(0, blob.metainfo.piece_length)
        assert [entry["event"] for entry in logs] == ["blob_misread"]

        digests = [Digest.of(b"something else"), blob.digest]

        async def misread_first(*_: object) -> Digest:
            return digests.pop(0)

        async def misread_pieces(*_: object) -> bool:
            return False

        failing.setattr(blobs, "matches_pieces", misread_pieces)
        failing.setattr(blobs, "compute_digest", misread_first)
        await store.verify(blob.digest)
        assert not digests
    assert await read_in_steps(store, blob) == blob.data


async def test_what_begins_inside_a_piece_is_checked_from_the_next_one_on(
    store: BlobStore, blob
) -> None:
    await put(store, blob)
    flip(store, blob, 5)
    with store.open(blob.digest) as handle:
        # Nobody knows what the first bytes of this piece were.
        assert await handle.read_at(10, PIECE) == blob.data[10 : 10 + PIECE]
        assert await handle.read_at(10 + PIECE, PIECE) == blob.data[10 + PIECE : 10 + 2 * PIECE]
    assert store.has(blob.digest)
    await read_in_steps(store, blob)


async def test_a_blob_without_metainfo_is_read_unchecked(
    store: BlobStore, blob, tmp_path: Path
) -> None:
    await put(store, blob)
    store.path(blob.digest).with_name(f"{blob.digest.hex}.metainfo").unlink()
    assert await read_in_steps(store, blob) == blob.data


async def test_a_file_that_was_cut_short_does_not_pass_for_the_blob(store: BlobStore, blob) -> None:
    await put(store, blob)
    os.truncate(store.path(blob.digest), 2 * PIECE)
    assert await read_in_steps(store, blob) == b""
    assert not store.has(blob.digest)


def unreadable(monkeypatch: pytest.MonkeyPatch, at: int, error: int = errno.EIO) -> None:
    """One sector can no longer be read, by whoever reads a blob."""

    pread, preadv = os.pread, os.preadv

    def read(descriptor: int, size: int, offset: int) -> bytes:
        if offset <= at < offset + size:
            raise OSError(error, os.strerror(error))
        return pread(descriptor, size, offset)

    def read_into(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= at < offset + sum(map(len, buffers)):
            raise OSError(error, os.strerror(error))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(os, "preadv", read_into)


@pytest.mark.parametrize("error", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
async def test_a_blob_of_which_a_sector_cannot_be_read_is_fetched_anew(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    await put(store, blob)
    with monkeypatch.context() as failing, structlog.testing.capture_logs() as logs:
        unreadable(failing, PIECE + 7, error)
        assert len(await read_in_steps(store, blob)) == PIECE

    assert not store.has(blob.digest)
    assert [entry["event"] for entry in logs] == ["blob_damaged"]
    await put(store, blob)
    assert await read_in_steps(store, blob) == blob.data


async def test_examining_a_blob_that_cannot_be_read_removes_it(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, blob)
    unreadable(monkeypatch, 2 * PIECE)
    with pytest.raises(StoreUnavailable, match=os.strerror(errno.EIO)):
        await store.verify(blob.digest)
    assert not store.has(blob.digest)


async def test_a_small_blob_that_cannot_be_read_is_removed_by_who_asks_for_its_metainfo(
    store: BlobStore, content_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(414)
    await put(store, content)
    unreadable(monkeypatch, 100)
    with pytest.raises(StoreUnavailable, match=os.strerror(errno.EIO)):
        await store.read_small(content.digest, 1000)
    assert not store.has(content.digest)


async def test_metainfo_cannot_be_made_of_what_cannot_be_read(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, blob)
    store.path(blob.digest).with_name(f"{blob.digest.hex}.metainfo").unlink()
    unreadable(monkeypatch, PIECE)
    with pytest.raises(StoreUnavailable, match=os.strerror(errno.EIO)):
        await store.metainfo(blob.digest)
    assert not store.has(blob.digest)


async def test_metainfo_that_cannot_be_read_is_made_anew_and_the_blob_stays(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, blob)
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name.endswith(".metainfo"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", read)
        # A blob that waits for the backend is verified before it is written there.
        with store.hold(blob.digest, Pin.NOT_WRITTEN_BACK):
            await store.verify(blob.digest)
        await store.verify(blob.digest)
        assert await store.metainfo(blob.digest) == blob.metainfo
    assert await read_in_steps(store, blob) == blob.data


async def test_what_waits_for_the_backend_stays_though_it_cannot_be_read(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the only copy, and the disk may think better of it."""
    await put(store, blob)
    with store.hold(blob.digest, Pin.NOT_WRITTEN_BACK), monkeypatch.context() as failing:
        unreadable(failing, 0)
        assert await read_in_steps(store, blob) == b""
        with pytest.raises(StoreUnavailable):
            await store.verify(blob.digest)
    assert await read_in_steps(store, blob) == blob.data


async def test_a_disk_that_fails_otherwise_costs_no_blob(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, blob)
    with monkeypatch.context() as failing:
        unreadable(failing, 0, errno.ENXIO)
        assert await read_in_steps(store, blob) == b""
    assert await read_in_steps(store, blob) == blob.data


@pytest.mark.parametrize(
    "harm", [flip, lambda store, blob, at: os.truncate(store.path(blob.digest), at)]
)
async def test_no_metainfo_is_made_of_a_damaged_blob(store: BlobStore, blob, harm) -> None:
    """It would vouch for the damage, to all peers."""
    await put(store, blob)
    store.path(blob.digest).with_name(f"{blob.digest.hex}.metainfo").unlink()
    assert await store.metainfo(blob.digest) == blob.metainfo

    store.path(blob.digest).with_name(f"{blob.digest.hex}.metainfo").unlink()
    harm(store, blob, PIECE)
    with pytest.raises(BlobNotFound):
        await store.metainfo(blob.digest)
    assert not store.has(blob.digest)


async def test_a_blob_that_comes_anew_at_that_moment_does_not_go_with_the_damaged_one(
    store: BlobStore, blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, blob)
    flip(store, blob, 0)
    tree = store.janitor._tree
    source = tree.temporary_path()
    source.write_bytes(blob.data)
    install = threading.Thread(target=tree.install, args=(source, blob.metainfo))
    samestat = os.path.samestat

    def install_after_the_look(*statuses: os.stat_result) -> bool:
        same = samestat(*statuses)
        install.start()
        install.join(0.5)  # it waits for the removal, or has been here before that
        return same

    monkeypatch.setattr(os.path, "samestat", install_after_the_look)
    with pytest.raises(DigestMismatch):
        await store.verify(blob.digest)
    await trio.to_thread.run_sync(install.join)

    assert await read_in_steps(store, blob) == blob.data


@pytest.mark.parametrize(
    ("reads", "agrees"),
    [
        # each (from, to), in eighths of a piece; the damage is in the first and in the second piece
        ([(0, 4), (4, 8)], [True, False]),
        ([(0, 4), (6, 8)], [True, True]),
        ([(2, 8)], [True]),
        ([(2, 16)], [False]),
        ([(2, 12), (12, 16)], [True, False]),
        ([(0, 4), (0, 8)], [True, False]),
        ([(0, 4), (8, 16), (4, 8)], [True, False, True]),
        ([(16, 17)], [True]),
        ([(0, 24)], [False]),
    ],
)
def test_pieces_are_checked_that_are_read_from_end_to_end(blob, reads, agrees) -> None:
    damaged = bytearray(blob.data)
    damaged[0] ^= 1
    damaged[PIECE] ^= 1
    check = PieceCheck(lambda: blob.metainfo, len(blob.data))
    found = []
    for start, stop in reads:
        first, last = start * PIECE // 8, min(stop * PIECE // 8, len(damaged))
        found.append(check.agrees(first, bytes(damaged[first:last])))
    assert found == agrees
