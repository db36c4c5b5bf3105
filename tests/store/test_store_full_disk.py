"""A full disk is an error for one request; everything else goes on."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from swarmpull.errors import StoreFull, StoreUnavailable
from swarmpull.store.blobs import BlobStat, open_store
from swarmpull.store.disk import Disk
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE

from .conftest import fill

# More than the 24 MiB of the small disk.
TOO_LONG = 7 * PIECE


async def put(store, content) -> BlobStat:
    async with store.create() as writer:
        for start in range(0, len(content.data), PIECE):
            await writer.write(content.data[start : start + PIECE])
        return await writer.commit(content.digest)


def free_bytes(path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


async def test_a_blob_that_does_not_fit_is_refused_and_another_fits(
    small_disk, content_of, check_disk
) -> None:
    small, big = content_of(PIECE), content_of(TOO_LONG)
    async with open_store(small_disk, name="agent-1") as store:
        before = free_bytes(small_disk)
        with pytest.raises(StoreFull) as caught:
            await put(store, big)

        assert caught.value.store == "agent-1"
        assert caught.value.needed == PIECE
        assert free_bytes(small_disk) == before
        assert await put(store, small) == BlobStat(small.digest, PIECE)
    check_disk(small_disk)


async def test_a_partial_reserves_its_room_or_is_refused_at_once(small_disk, content_of) -> None:
    small, big = content_of(2 * PIECE), content_of(TOO_LONG)
    async with open_store(small_disk, name="agent-1") as store:
        before = free_bytes(small_disk)
        with pytest.raises(StoreFull) as caught:
            await store.open_partial(big.metainfo)

        assert caught.value.needed == TOO_LONG
        assert free_bytes(small_disk) == before
        assert os.listdir(small_disk / "partials") == []
        async with await store.open_partial(small.metainfo) as partial:
            fill(small_disk)
            assert await partial.store_piece(0, small.piece(0))
            assert await partial.store_piece(1, small.piece(1))
            os.unlink(small_disk / "filler")
            await partial.commit()


async def test_a_piece_without_reserved_room_is_refused_and_not_claimed(
    small_disk, content_of, monkeypatch
) -> None:
    content = content_of(2 * PIECE)

    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    async with (
        open_store(small_disk, name="agent-1") as store,
        await store.open_partial(content.metainfo) as partial,
    ):
        assert await partial.store_piece(0, content.piece(0))
        fill(small_disk)
        with pytest.raises(StoreFull) as caught:
            await partial.store_piece(1, content.piece(1))
        assert caught.value.needed == PIECE
        assert partial.have == 0b01
        os.unlink(small_disk / "filler")
        assert await partial.store_piece(1, content.piece(1))
        await partial.commit()


async def test_an_upload_on_a_full_disk_keeps_what_it_had_and_goes_on_later(
    small_disk, content_of
) -> None:
    content = content_of(3 * PIECE)
    async with open_store(small_disk, name="agent-1") as store:
        upload = await store.uploads.create("team/app")
        async with upload.writing():
            await upload.append(content.data[:PIECE])
        fill(small_disk)
        with pytest.raises(StoreFull):
            async with upload.writing():
                await upload.append(content.data[PIECE : 2 * PIECE])
        assert upload.offset == PIECE
        assert (small_disk / "uploads" / f"{upload.id}.data").stat().st_size == PIECE

        os.unlink(small_disk / "filler")
        async with upload.writing():
            await upload.append(content.data[PIECE:])
            assert await upload.finish(content.digest) == BlobStat(content.digest, 3 * PIECE)


async def test_the_last_bytes_of_a_request_are_refused_on_leaving(small_disk, content_of) -> None:
    content = content_of(100_000)
    async with open_store(small_disk, name="agent-1") as store:
        upload = await store.uploads.create("team/app")
        fill(small_disk)
        with pytest.raises(StoreFull):
            async with upload.writing():
                await upload.append(content.data)
        assert upload.offset == 0
        assert not upload.busy

        with trio.CancelScope() as scope:
            async with upload.writing():
                await upload.append(content.data)
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught, "the full disk hides that the client went away"
        assert upload.offset == 0

        os.unlink(small_disk / "filler")
        await upload.append(content.data)
        await upload.finish(content.digest)


async def test_a_session_that_cannot_be_kept_is_not_opened(small_disk) -> None:
    async with open_store(small_disk, name="agent-1") as store:
        fill(small_disk)
        with pytest.raises(StoreFull):
            await store.uploads.create("team/app")

        assert store.uploads.sessions == 0
        assert os.listdir(small_disk / "uploads") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_quota_is_a_full_disk(number) -> None:
    disk = Disk("agent-1", trio.CapacityLimiter(1), trio.CapacityLimiter(1))

    def fail() -> None:
        raise OSError(number, "full")

    with pytest.raises(StoreFull) as caught:
        await disk.run(fail, needed=17)
    assert (caught.value.store, caught.value.needed) == ("agent-1", 17)
    assert isinstance(caught.value.__cause__, OSError)


async def test_other_errors_of_the_disk_are_not_a_full_disk() -> None:
    disk = Disk("agent-1", trio.CapacityLimiter(1), trio.CapacityLimiter(1))

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", "/data/x")

    with pytest.raises(StoreUnavailable) as caught:
        await disk.run(fail)
    assert "Input/output error" in str(caught.value)
