"""Whole blobs: written, verified, read, listed, deleted."""

from __future__ import annotations

import errno
import os
from types import NoneType

import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    DigestMismatch,
    LengthMismatch,
    StartupError,
    StoreFull,
    StoreUnavailable,
)
from swarmpull.store import content as content_module
from swarmpull.store.blobs import BlobStat, BlobStore, open_store
from swarmpull.store.eviction import Limits
from swarmpull.store.hashing import PieceHasher
from swarmpull.store.ledger import TEMPORARY
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE

OTHER = Digest.of(b"other")


async def put(store: BlobStore, content, *, chunk: int = 300_000) -> BlobStat:
    async with store.create() as writer:
        for start in range(0, len(content.data), chunk):
            await writer.write(content.data[start : start + chunk])
        return await writer.commit(content.digest, length=len(content.data))


async def read_all(store: BlobStore, digest: Digest) -> bytes:
    with store.open(digest) as handle:
        parts = []
        offset = 0
        while offset < handle.length:
            parts.append(await handle.read_at(offset, 1 << 20))
            offset += len(parts[-1])
        return b"".join(parts)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 1])
async def test_a_blob_comes_back_as_it_was_written(store, content_of, length, algorithm) -> None:
    content = content_of(length, algorithm=algorithm)

    stat = await put(store, content)

    assert stat == BlobStat(content.digest, length)
    assert store.stat(content.digest) == stat
    assert await read_all(store, content.digest) == content.data
    assert await store.metainfo(content.digest) == content.metainfo
    assert list(store.list()) == [stat]


@pytest.mark.parametrize("length", [0, 1, 50_000])
async def test_a_small_blob_is_put_in_one_step(store, content_of, length) -> None:
    content = content_of(length)

    for _ in range(2):  # once more is no error
        assert await store.put([(content.metainfo, content.data)]) == [None]

    assert await read_all(store, content.digest) == content.data
    assert await store.metainfo(content.digest) == content.metainfo
    assert store.janitor.bytes("blob") == length
    assert store.janitor.bytes(TEMPORARY) == 0
    assert list((store.root / "temporary").iterdir()) == []


async def test_a_put_that_the_disk_refuses_leaves_nothing(store, blob, monkeypatch) -> None:
    def fail(path) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(content_module, "sync_file", fail)

    [failure] = await store.put([(blob.metainfo, blob.data)])
    assert isinstance(failure, StoreUnavailable)

    assert not store.has(blob.digest)
    assert store.janitor.bytes(TEMPORARY) == 0
    assert list((store.root / "temporary").iterdir()) == []


async def test_of_several_that_are_put_one_that_the_disk_refuses_leaves_the_others(
    store, content_of, monkeypatch
) -> None:
    contents = [content_of(length) for length in (10, 20, 30)]
    sync_file = content_module.sync_file

    def fail_once(path) -> None:
        if path.stat().st_size == 20:
            raise OSError(errno.EIO, "this block is gone")
        sync_file(path)

    monkeypatch.setattr(content_module, "sync_file", fail_once)

    failures = await store.put([(each.metainfo, each.data) for each in contents])

    assert [type(failure) for failure in failures] == [NoneType, StoreUnavailable, NoneType]
    assert [store.has(each.digest) for each in contents] == [True, False, True]
    assert store.janitor.bytes("blob") == 40
    assert store.janitor.bytes(TEMPORARY) == 0
    assert list((store.root / "temporary").iterdir()) == []


async def test_of_several_that_are_put_those_for_which_there_is_room_are_kept(
    store, content_of
) -> None:
    small, large = content_of(1000), content_of(5000)
    store.janitor.limits = Limits(high=4000.0, low=4000.0)

    failures = await store.put([(large.metainfo, large.data), (small.metainfo, small.data)])

    assert [type(failure) for failure in failures] == [StoreFull, NoneType]
    assert failures[0].blob == str(large.digest)
    assert store.has(small.digest)
    assert store.janitor.bytes(TEMPORARY) == 0


async def test_what_is_not_committed_is_not_visible_and_does_not_remain(store, blob) -> None:
    async with store.create() as writer:
        await writer.write(blob.data)
        assert list(store.list()) == []
        with pytest.raises(BlobNotFound):
            store.stat(blob.digest)

    assert os.listdir(store.root / "temporary") == []
    assert list(store.list()) == []


async def test_a_cancelled_write_leaves_nothing(store, blob) -> None:
    with trio.CancelScope() as scope:
        async with store.create() as writer:
            await writer.write(blob.data)
            scope.cancel()
            await writer.write(blob.data)

    assert scope.cancelled_caught
    assert os.listdir(store.root / "temporary") == []


async def test_content_that_is_not_its_digest_is_refused(store, blob) -> None:
    async with store.create() as writer:
        await writer.write(blob.data)
        with pytest.raises(DigestMismatch) as caught:
            await writer.commit(OTHER)

    assert (caught.value.expected, caught.value.actual) == (str(OTHER), str(blob.digest))
    assert str(OTHER) in str(caught.value)
    assert list(store.list()) == []


async def test_content_of_another_length_is_refused(store, blob) -> None:
    async with store.create() as writer:
        await writer.write(blob.data)
        with pytest.raises(LengthMismatch) as caught:
            await writer.commit(blob.digest, length=len(blob.data) + 1)

    assert caught.value.actual == len(blob.data)
    assert list(store.list()) == []


async def test_committing_a_blob_that_is_here_repairs_it(store, blob) -> None:
    await put(store, blob)
    path = store.root / "blobs" / "sha256" / blob.digest.hex[:2] / blob.digest.hex
    path.write_bytes(b"x" * len(blob.data))

    await put(store, blob)

    assert await read_all(store, blob.digest) == blob.data
    assert [stat.digest for stat in store.list()] == [blob.digest]


async def test_a_copy_that_was_truncated_behind_our_back_is_replaced(store, blob) -> None:
    await put(store, blob)
    path = store.root / "blobs" / "sha256" / blob.digest.hex[:2] / blob.digest.hex
    os.truncate(path, 10)

    await put(store, blob)

    assert await read_all(store, blob.digest) == blob.data


async def test_writers_of_one_digest_at_once_both_succeed_with_one_copy(store, blob) -> None:
    async with store.create() as first, store.create() as second:
        await first.write(blob.data)
        await second.write(blob.data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.commit, blob.digest)
            nursery.start_soon(second.commit, blob.digest)

    assert list(store.list()) == [BlobStat(blob.digest, len(blob.data))]
    assert await read_all(store, blob.digest) == blob.data


async def test_pieces_of_another_length_are_hashed_in_a_second_pass(
    store, blob, monkeypatch
) -> None:
    monkeypatch.setattr(PieceHasher, "piece_hashes", lambda hasher: None)
    await put(store, blob)

    assert await store.metainfo(blob.digest) == blob.metainfo


async def test_a_committed_writer_takes_no_more(store, blob) -> None:
    async with store.create() as writer:
        await writer.write(blob.data)
        await writer.commit(blob.digest)
        with pytest.raises(ValueError, match="committed already"):
            await writer.write(b"more")


async def test_a_blob_that_is_not_here_is_named_in_every_error(store) -> None:
    async def opening() -> None:
        store.open(OTHER)

    async def looking_up() -> None:
        store.stat(OTHER)

    for operation in (opening, looking_up):
        with pytest.raises(BlobNotFound) as caught:
            await operation()
        assert str(caught.value) == f"blob {OTHER} not found in agent-1"
    for operation in (store.delete, store.metainfo):
        with pytest.raises(BlobNotFound) as caught:
            await operation(OTHER)
        assert str(caught.value) == f"blob {OTHER} not found in agent-1"


async def test_reads_stop_at_the_end_and_refuse_what_lies_outside(store, blob) -> None:
    await put(store, blob)
    end = len(blob.data)

    with store.open(blob.digest) as handle:
        assert await handle.read_at(end - 1, 100) == blob.data[-1:]
        assert await handle.read_at(PIECE - 3, 6) == blob.data[PIECE - 3 : PIECE + 3]
        for offset, size in ((end, 1), (-1, 5), (0, 0)):
            with pytest.raises(ValueError, match="bytes at"):
                await handle.read_at(offset, size)


async def test_a_truncated_file_is_an_error_and_never_short_data(store, blob) -> None:
    await put(store, blob)

    with store.open(blob.digest) as handle:
        os.truncate(store.root / "blobs/sha256" / blob.digest.hex[:2] / blob.digest.hex, 100)
        with pytest.raises(StoreUnavailable) as caught:
            await handle.read_at(0, 200)

    assert caught.value.store == "agent-1"
    assert "truncated" in str(caught.value)
    assert not store.has(blob.digest)


async def test_an_open_blob_stays_readable_after_it_was_deleted(store, blob) -> None:
    await put(store, blob)

    with store.open(blob.digest) as handle:
        await store.delete(blob.digest)
        assert await handle.read_at(0, len(blob.data)) == blob.data

    with pytest.raises(BlobNotFound):
        store.open(blob.digest)
    assert [path for path in (store.root / "blobs").rglob("*") if path.is_file()] == []


async def test_a_closed_handle_says_so_and_closing_twice_is_allowed(store, blob) -> None:
    await put(store, blob)
    handle = store.open(blob.digest)

    handle.close()
    handle.close()

    with pytest.raises(ValueError, match="closed"):
        handle.fileno()
    with pytest.raises(ValueError, match="closed"):
        await handle.read_at(0, 1)


async def test_closing_during_a_read_lets_the_read_end(store, blob) -> None:
    await put(store, blob)
    handle = store.open(blob.digest)
    got = []

    async def read() -> None:
        got.append(await handle.read_at(0, len(blob.data)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        handle.close()
        # Without the count of users this file would get the number that the thread reads from.
        other = os.open(os.devnull, os.O_RDONLY)

    os.close(other)
    assert got == [blob.data]


async def test_many_readers_share_a_blob(store, blob) -> None:
    await put(store, blob)
    same = []

    async def read() -> None:
        same.append(await read_all(store, blob.digest) == blob.data)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(read)

    assert same == [True] * 20


async def test_the_list_is_in_order_and_survives_deletes_and_strange_files(
    store, content_of
) -> None:
    contents = [content_of(10 + seed, seed=seed) for seed in range(20)]
    contents += [content_of(10, seed=seed, algorithm="sha512") for seed in range(3)]
    for content in contents:
        await put(store, content)
    expected = sorted(content.digest for content in contents)
    (store.root / "blobs" / "README").write_text("not ours")
    (store.root / "blobs" / "sha256" / "zz").mkdir()

    listing = store.list()
    seen = [next(listing).digest]
    await store.delete(expected[-1])
    seen += [stat.digest for stat in listing]

    assert seen == expected[:-1]
    (store.root / "blobs" / "README").unlink()


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty", "another"])
async def test_a_damaged_sidecar_is_computed_again(store, blob, content_of, damage) -> None:
    await put(store, blob)
    path = store.root / "blobs/sha256" / blob.digest.hex[:2] / (blob.digest.hex + ".metainfo")
    good = path.read_bytes()
    other = content_of(5)
    await put(store, other)
    other_path = store.root / "blobs/sha256" / other.digest.hex[:2] / other.digest.hex
    damaged = {
        "missing": None,
        "cut": good[:-40],
        "flipped": good[:-50] + bytes([good[-50] ^ 1]) + good[-49:],
        "empty": b"",
        "another": other_path.with_name(other_path.name + ".metainfo").read_bytes(),
    }[damage]
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)

    assert await store.metainfo(blob.digest) == blob.metainfo
    assert path.read_bytes() == good


async def test_metainfo_asked_for_at_once_is_computed_once(store, blob, monkeypatch) -> None:
    await put(store, blob)
    path = store.root / "blobs/sha256" / blob.digest.hex[:2] / (blob.digest.hex + ".metainfo")
    path.unlink()
    computed = []
    real = store._tree.save_metainfo
    monkeypatch.setattr(
        type(store._tree), "save_metainfo", lambda tree, metainfo: computed.append(real(metainfo))
    )

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(store.metainfo, blob.digest)

    assert len(computed) == 1


async def test_a_failing_disk_is_an_error_of_that_request_and_the_store_recovers(
    store, blob
) -> None:
    shard = store.root / "blobs" / "sha256" / blob.digest.hex[:2]
    shard.write_text("a file where the directory should be")

    async with store.create() as writer:
        await writer.write(blob.data)
        with pytest.raises(StoreUnavailable) as caught:
            await writer.commit(blob.digest)
        assert caught.value.store == "agent-1"
        with pytest.raises(StoreUnavailable):
            store.stat(blob.digest)
        shard.unlink()
        await writer.commit(blob.digest)

    assert await read_all(store, blob.digest) == blob.data


async def test_waiting_for_a_thread_can_be_cancelled(store, blob) -> None:
    await put(store, blob)
    threads = store._disk.foreground

    with store.open(blob.digest) as handle:
        for worker in range(int(threads.total_tokens)):
            threads.acquire_on_behalf_of_nowait(worker)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(handle.read_at, 0, 10)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        for worker in range(int(threads.total_tokens)):
            threads.release_on_behalf_of(worker)
        assert scope.cancelled_caught
        assert await handle.read_at(0, 10) == blob.data[:10]


async def test_the_number_of_threads_is_bounded(store, blob, monkeypatch) -> None:
    await put(store, blob)
    busiest = 0
    real = os.pread

    def pread(*args):
        nonlocal busiest
        busiest = max(busiest, int(store._disk.foreground.borrowed_tokens))
        return real(*args)

    monkeypatch.setattr(os, "pread", pread)
    with store.open(blob.digest) as handle:
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(handle.read_at, 0, 1 << 20)

    assert 1 <= busiest <= 4


# --- opening ----------------------------------------------------------------------------------


async def test_a_store_keeps_its_blobs_over_a_restart(tmp_path, blob) -> None:
    async with open_store(tmp_path / "deep" / "store", name="one") as store:
        await put(store, blob)

    async with open_store(tmp_path / "deep" / "store", name="one") as store:
        assert await read_all(store, blob.digest) == blob.data


async def test_a_second_opening_is_refused_with_the_directory_and_the_owner(tmp_path) -> None:
    async with open_store(tmp_path, name="one"):
        with pytest.raises(StartupError) as caught:
            async with open_store(tmp_path, name="two"):
                pytest.fail("two owners of one directory")

    assert str(tmp_path) in caught.value.reason
    assert str(os.getpid()) in caught.value.reason
    async with open_store(tmp_path, name="two"):
        pass


async def test_a_root_that_cannot_be_a_directory_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")

    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError) as caught:
            async with open_store(root, name="one"):
                pytest.fail("opened")
        assert str(root) in caught.value.reason
        assert "\n" not in str(caught.value)


async def test_opening_removes_what_a_crash_has_left_and_nothing_else(tmp_path, blob) -> None:
    async with open_store(tmp_path, name="one") as store:
        await put(store, blob)
    (tmp_path / "temporary" / "half").write_bytes(b"half a blob")
    (tmp_path / "temporary" / "folder").mkdir()
    (tmp_path / "temporary" / "folder" / "file").write_bytes(b"x")
    (tmp_path / "partials" / f"sha256-{OTHER.hex}.data").write_bytes(b"no record")
    (tmp_path / "partials" / f"sha256-{blob.digest.hex}.pieces").write_bytes(b"no data")
    (tmp_path / "partials" / "notes.txt").write_text("not ours")

    async with open_store(tmp_path, name="one") as store:
        assert os.listdir(tmp_path / "temporary") == []
        assert os.listdir(tmp_path / "partials") == ["notes.txt"]
        assert await read_all(store, blob.digest) == blob.data


async def test_an_error_in_the_block_comes_out_as_it_is(tmp_path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_store(tmp_path, name="one"):
            raise KeyError("mine")

    async with open_store(tmp_path, name="one"):
        pass


async def test_a_cancelled_block_ends_and_gives_the_lock_back(tmp_path) -> None:
    with trio.CancelScope() as scope:
        async with open_store(tmp_path, name="one"):
            scope.cancel()
            await trio.sleep_forever()

    assert scope.cancelled_caught
    async with open_store(tmp_path, name="one"):
        pass
