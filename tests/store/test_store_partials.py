"""Partial blobs: pieces in any order, kept over restarts, committed when the whole is right."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, DigestMismatch, StoreUnavailable
from swarmpull.store.blobs import BlobStat, open_store
from swarmpull.store.hashing import FileHasher
from swarmpull.swarm import bitfield
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.swarm.metainfo import BlobShape, Metainfo


def data_path(root: Path, digest: Digest) -> Path:
    return root / "partials" / f"{digest.algorithm}-{digest.hex}.data"


def pieces_path(root: Path, digest: Digest) -> Path:
    return root / "partials" / f"{digest.algorithm}-{digest.hex}.pieces"


async def store_all(partial, content) -> None:
    for index in range(content.metainfo.piece_count):
        assert await partial.store_piece(index, content.piece(index))


async def wait_hashed(partial, offset: int) -> None:
    """The prefix is hashed in threads, which no testing clock knows of."""
    with trio.fail_after(30):
        while partial._hasher.offset < offset:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("length", [0, 1, PIECE, PIECE + 1, 2 * PIECE + 1])
async def test_a_blob_arrives_piece_by_piece(store, content_of, length, algorithm) -> None:
    content = content_of(length, algorithm=algorithm)

    async with await store.open_partial(content.metainfo) as partial:
        assert partial.have == 0
        await store_all(partial, content)
        assert partial.complete
        with pytest.raises(BlobNotFound):
            store.stat(content.digest)
        stat = await partial.commit()

    assert stat == BlobStat(content.digest, length)
    assert await store.metainfo(content.digest) == content.metainfo
    with store.open(content.digest) as handle:
        assert os.pread(handle.fileno(), length + 1, 0) == content.data
    assert os.listdir(store.root / "partials") == []


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(5)),
    restart_after=st.integers(0, 5),
    at_once=st.booleans(),
)
def test_any_order_of_pieces_with_a_restart_anywhere_gives_the_blob(
    content_of, order, restart_after, at_once
) -> None:
    content = content_of(4 * PIECE + 17)

    async def store_pieces(root: Path, indices: list[int]) -> int:
        async with (
            open_store(root, name="one") as store,
            await store.open_partial(content.metainfo) as partial,
        ):
            async with trio.open_nursery() as nursery:
                for index in indices:
                    if at_once:
                        nursery.start_soon(partial.store_piece, index, content.piece(index))
                    else:
                        await partial.store_piece(index, content.piece(index))
            return partial.have

    async def main(root: Path) -> None:
        first, second = order[:restart_after], order[restart_after:]
        assert await store_pieces(root, first) == sum(1 << index for index in first)
        assert await store_pieces(root, second) == bitfield.full(5)
        async with (
            open_store(root, name="one") as store,
            await store.open_partial(content.metainfo) as partial,
        ):
            assert await partial.commit() == BlobStat(content.digest, len(content.data))

    with tempfile.TemporaryDirectory() as directory:
        trio.run(main, Path(directory))


async def test_room_for_the_whole_blob_is_reserved_at_once(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        status = os.fstat(partial.fileno())

    assert status.st_size == len(blob.data)
    assert status.st_blocks * 512 >= len(blob.data)


async def test_a_wrong_piece_is_refused_and_nothing_is_written(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        wrong = bytearray(blob.piece(1))
        wrong[-1] ^= 1
        assert not await partial.store_piece(1, wrong)
        assert not await partial.store_piece(1, blob.piece(1)[:-1])
        assert not await partial.store_piece(1, b"")
        assert not await partial.store_piece(1, blob.piece(0))
        assert partial.have == 0
        assert os.pread(partial.fileno(), PIECE, PIECE) == bytes(PIECE)

        assert await partial.store_piece(1, memoryview(bytearray(blob.piece(1))))
        assert partial.have == 0b10


async def test_a_piece_that_is_stored_cannot_be_spoiled(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        assert await partial.store_piece(1, blob.piece(1))
        assert not await partial.store_piece(1, bytes(PIECE))
        assert await partial.store_piece(1, blob.piece(1))
        assert await partial.read_at(PIECE, PIECE) == blob.piece(1)


@pytest.mark.parametrize("index", [-1, 3, 1 << 40])
async def test_a_piece_that_the_blob_does_not_have_is_an_error(store, blob, index) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        with pytest.raises(IndexError):
            await partial.store_piece(index, blob.piece(0))


async def test_only_stored_pieces_can_be_read(store, blob) -> None:
    end = len(blob.data)
    async with await store.open_partial(blob.metainfo) as partial:
        await partial.store_piece(0, blob.piece(0))
        await partial.store_piece(2, blob.piece(2))

        assert await partial.read_at(PIECE - 10, 10) == blob.data[PIECE - 10 : PIECE]
        assert await partial.read_at(2 * PIECE, end - 2 * PIECE) == blob.piece(2)
        for offset, size in ((PIECE - 1, 2), (PIECE, 1), (2 * PIECE - 1, 2)):
            with pytest.raises(ValueError, match=f"piece 1 of {blob.digest} is not stored"):
                await partial.read_at(offset, size)
        for offset, size in ((-1, 1), (end, 1), (0, -1)):
            with pytest.raises(ValueError, match="outside"):
                await partial.read_at(offset, size)


async def test_pieces_that_no_longer_match_are_dropped_on_resume(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
    with data_path(store.root, blob.digest).open("r+b") as file:
        file.seek(PIECE + 5)
        file.write(b"damage")

    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0b101
    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0b101, "the damaged piece was claimed again"
        assert await partial.store_piece(1, blob.piece(1))
        await partial.commit()

    assert store.stat(blob.digest).length == len(blob.data)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
async def test_a_partial_without_a_good_record_begins_anew(store, blob, damage) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
    path = pieces_path(store.root, blob.digest)
    path.write_bytes(path.read_bytes()[:100] if damage is None else damage)

    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0
        await store_all(partial, blob)
        await partial.commit()


async def test_a_record_that_lacks_its_end_claims_what_it_says(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
    path = pieces_path(store.root, blob.digest)
    path.write_bytes(path.read_bytes()[:-2])

    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0b001


async def test_a_data_file_that_was_cut_loses_only_the_pieces_cut_off(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
    os.truncate(data_path(store.root, blob.digest), PIECE + 1)

    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0b001
        await store_all(partial, blob)
        await partial.commit()


async def test_metainfo_of_another_shape_begins_anew(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
    other = Metainfo(blob.digest, len(blob.data), 2 * PIECE, bytes(64))

    async with await store.open_partial(other) as partial:
        assert partial.have == 0
    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0


async def test_metainfo_with_other_hashes_keeps_the_pieces_that_match(store, blob) -> None:
    hashes = blob.metainfo.piece_hashes
    wrong = Metainfo(blob.digest, len(blob.data), PIECE, bytes(32) + hashes[32:])
    async with await store.open_partial(wrong) as partial:
        assert not await partial.store_piece(0, blob.piece(0))
        assert await partial.store_piece(1, blob.piece(1))

    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0b010


async def test_a_second_opening_of_one_partial_is_a_clear_error(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        with pytest.raises(RuntimeError, match=f"partial of {blob.digest} is open already"):
            await store.open_partial(blob.metainfo)
        await partial.store_piece(0, blob.piece(0))

    again = await store.open_partial(blob.metainfo)
    assert again.have == 1
    await partial.aclose()
    with pytest.raises(RuntimeError):
        await store.open_partial(blob.metainfo)
    await again.aclose()


async def test_two_openings_at_once_give_one_partial_and_one_error(store, blob) -> None:
    opened, refused = [], []

    async def open_it() -> None:
        try:
            opened.append(await store.open_partial(blob.metainfo))
        except RuntimeError as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_it)
        nursery.start_soon(open_it)

    assert (len(opened), len(refused)) == (1, 1)
    await opened[0].aclose()


async def test_a_cancelled_opening_can_be_tried_again(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.open_partial, blob.metainfo)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    async with await store.open_partial(blob.metainfo) as partial:
        assert partial.have == 0b111


async def test_committing_too_early_is_an_error_and_loses_nothing(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await partial.store_piece(1, blob.piece(1))
        with pytest.raises(ValueError, match=f"2 pieces of {blob.digest} are missing"):
            await partial.commit()
        assert partial.have == 0b010


async def test_pieces_that_match_wrong_metainfo_never_become_a_blob(store, blob) -> None:
    claimed = Digest.of(b"something else")
    lie = Metainfo(claimed, blob.metainfo.length, PIECE, blob.metainfo.piece_hashes)

    async with await store.open_partial(lie) as partial:
        await store_all(partial, blob)
        with pytest.raises(DigestMismatch) as caught:
            await partial.commit()
        with pytest.raises(ValueError, match="discarded"):
            await partial.commit()

    assert (caught.value.expected, caught.value.actual) == (str(claimed), str(blob.digest))
    assert list(store.list()) == []
    assert os.listdir(store.root / "partials") == []


async def test_committing_a_blob_that_is_here_already_succeeds(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
        async with store.create() as writer:
            await writer.write(blob.data)
            await writer.commit(blob.digest)

        assert await partial.commit() == store.stat(blob.digest)

    assert os.listdir(store.root / "partials") == []


async def test_committing_twice_or_at_once_gives_the_same_blob(store, blob) -> None:
    stats = []

    async def commit() -> None:
        stats.append(await partial.commit())

    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit)
            nursery.start_soon(commit)
        await commit()

    assert stats == [BlobStat(blob.digest, len(blob.data))] * 3


async def test_a_committed_partial_can_be_read_until_it_is_closed(store, blob) -> None:
    partial = await store.open_partial(blob.metainfo)
    await store_all(partial, blob)
    await partial.commit()

    assert await partial.read_at(0, 100) == blob.data[:100]
    assert os.pread(partial.fileno(), 100, PIECE) == blob.data[PIECE : PIECE + 100]
    assert await partial.store_piece(0, blob.piece(0)), "a late piece of the endgame"

    await partial.aclose()
    await partial.aclose()
    with pytest.raises(ValueError, match="closed"):
        partial.fileno()
    with pytest.raises(ValueError, match="closed"):
        await partial.store_piece(0, blob.piece(0))


async def test_a_partial_can_be_opened_again_while_the_committed_one_is_still_read(
    store, blob
) -> None:
    async with await store.open_partial(blob.metainfo) as first:
        await store_all(first, blob)
        await first.commit()
        await store.delete(blob.digest)
        async with await store.open_partial(blob.metainfo) as second:
            assert second.have == 0
            assert await first.read_at(0, 10) == blob.data[:10]


async def test_discarding_removes_what_was_fetched(store, blob) -> None:
    partial = await store.open_partial(blob.metainfo)
    await partial.store_piece(0, blob.piece(0))

    await partial.discard()
    await partial.discard()

    assert os.listdir(store.root / "partials") == []
    async with await store.open_partial(blob.metainfo) as again:
        assert again.have == 0


async def test_discarding_after_the_commit_keeps_the_blob(store, blob) -> None:
    partial = await store.open_partial(blob.metainfo)
    await store_all(partial, blob)
    await partial.commit()

    await partial.discard()

    assert store.stat(blob.digest).length == len(blob.data)


async def test_closing_while_a_piece_is_written_lets_it_end(store, blob) -> None:
    partial = await store.open_partial(blob.metainfo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial.store_piece, 0, blob.piece(0))
        await trio.testing.wait_all_tasks_blocked()
        await partial.aclose()

    async with await store.open_partial(blob.metainfo) as again:
        assert again.have == 1


async def test_the_prefix_is_hashed_while_pieces_arrive(store, blob, monkeypatch) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await partial.store_piece(1, blob.piece(1))
        await partial.store_piece(0, blob.piece(0))
        await wait_hashed(partial, 2 * PIECE)
        await partial.store_piece(2, blob.piece(2))
        await wait_hashed(partial, len(blob.data))

        def advance(*args):
            pytest.fail("the commit reads again what was hashed")

        monkeypatch.setattr(FileHasher, "advance", advance)
        await partial.commit()


async def test_a_piece_in_its_turn_is_hashed_from_memory(store, blob, monkeypatch) -> None:
    def advance(*args):
        pytest.fail("what was in memory is read from the disk")

    monkeypatch.setattr(FileHasher, "advance", advance)
    async with await store.open_partial(blob.metainfo) as partial:
        for index in range(3):
            await partial.store_piece(index, blob.piece(index))
            await partial.hash_stored(index, blob.piece(index))
            assert partial._hasher.offset == min((index + 1) * PIECE, len(blob.data))
        await partial.commit()


async def test_a_piece_out_of_turn_is_not_hashed_from_memory(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        for index in (1, 0, 2):
            await partial.store_piece(index, blob.piece(index))
            await partial.hash_stored(index, blob.piece(index))
        await partial.commit()  # which would find another digest


async def test_a_gap_is_never_hashed_over(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await partial.store_piece(0, blob.piece(0))
        await partial.store_piece(2, blob.piece(2))
        await wait_hashed(partial, PIECE)
        await trio.testing.wait_all_tasks_blocked()
        assert partial._hasher.offset == PIECE


async def test_a_failure_of_hashing_ahead_comes_out_at_the_commit(store, blob) -> None:
    partial = await store.open_partial(blob.metainfo)
    await partial.store_piece(1, blob.piece(1))
    await partial.store_piece(2, blob.piece(2))
    os.truncate(data_path(store.root, blob.digest), 0)
    await partial.store_piece(0, blob.piece(0))

    with pytest.raises(StoreUnavailable) as caught:
        await partial.commit()
    assert caught.value.store == "agent-1"
    await partial.aclose()

    async with await store.open_partial(blob.metainfo) as again:
        assert again.have == 0b001


async def test_partials_left_open_are_closed_and_kept_when_the_store_closes(tmp_path, blob) -> None:
    async with open_store(tmp_path, name="one") as store:
        partial = await store.open_partial(blob.metainfo)
        await partial.store_piece(0, blob.piece(0))
    with pytest.raises(ValueError, match="closed"):
        partial.fileno()

    async with (
        open_store(tmp_path, name="one") as store,
        await store.open_partial(blob.metainfo) as again,
    ):
        assert again.have == 1


async def test_a_file_system_that_cannot_reserve_room_is_good_enough(
    store, blob, monkeypatch
) -> None:
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    async with await store.open_partial(blob.metainfo) as partial:
        await store_all(partial, blob)
        await partial.commit()

    assert store.stat(blob.digest).length == len(blob.data)


# --- pieces that make the metainfo grow -------------------------------------------------------


def shape_of(content) -> BlobShape:
    return BlobShape.of(content.digest, len(content.data))


async def write_piece(partial, index: int, data: bytes, *, step: int = 1 << 20) -> bool:
    writer = partial.piece_writer(index)
    for start in range(0, len(data), step):
        await writer.write(memoryview(data)[start : start + step])
    assert writer.left == 0
    return await writer.finish()


async def test_a_blob_whose_hashes_are_not_known_is_written_piece_by_piece(store, blob) -> None:
    async with await store.open_partial(shape_of(blob)) as partial:
        for index in (2, 0, 1):
            assert await write_piece(partial, index, blob.piece(index), step=700_001)
        assert [index for index, _ in partial.metainfo.entries_since(0, 9)] == [2, 0, 1]
        await partial.commit()
    assert await store.metainfo(blob.digest) == blob.metainfo


async def test_pieces_and_their_hashes_survive_a_restart(tmp_path, blob) -> None:
    async with (
        open_store(tmp_path, name="one") as store,
        await store.open_partial(shape_of(blob)) as partial,
    ):
        await write_piece(partial, 1, blob.piece(1))
    async with (
        open_store(tmp_path, name="one") as store,
        await store.open_partial(shape_of(blob)) as partial,
    ):
        assert partial.have == 0b10
        assert partial.metainfo.piece_hash(1) == blob.metainfo.piece_hash(1)
        assert partial.metainfo.piece_hash(0) is None


async def test_a_kept_piece_is_checked_against_what_is_known_now(tmp_path, blob) -> None:
    async with (
        open_store(tmp_path, name="one") as store,
        await store.open_partial(shape_of(blob)) as partial,
    ):
        await write_piece(partial, 0, bytes(PIECE))
        await write_piece(partial, 1, blob.piece(1))
    async with (
        open_store(tmp_path, name="one") as store,
        await store.open_partial(blob.metainfo) as partial,
    ):
        assert partial.have == 0b10


async def test_a_written_piece_that_does_not_match_is_not_stored(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        assert not await write_piece(partial, 1, bytes(PIECE))
        assert partial.have == 0
        assert await write_piece(partial, 1, blob.piece(1))
        assert partial.have == 0b10


async def test_writing_a_stored_piece_again_never_spoils_it(store, blob) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        await partial.store_piece(1, blob.piece(1))
        assert not await write_piece(partial, 1, bytes(PIECE))
        assert await partial.read_at(PIECE, PIECE) == blob.piece(1)


async def test_half_a_piece_counts_as_none(store, blob) -> None:
    async with await store.open_partial(shape_of(blob)) as partial:
        writer = partial.piece_writer(0)
        await writer.write(blob.piece(0)[:1000])
        with pytest.raises(ValueError, match="bytes of piece 0 are missing"):
            await writer.finish()
        with pytest.raises(ValueError, match="for the last"):
            await writer.write(bytes(PIECE))
        assert partial.have == 0


async def test_a_piece_from_a_peer_needs_a_hash_that_is_known(store, blob) -> None:
    async with await store.open_partial(shape_of(blob)) as partial:
        assert not await partial.store_piece(0, blob.piece(0))
        partial.metainfo.add(0, blob.metainfo.piece_hash(0))
        assert await partial.store_piece(0, blob.piece(0))


async def test_a_condemned_partial_is_gone_when_it_is_closed(store, blob) -> None:
    async with await store.open_partial(shape_of(blob)) as partial:
        await write_piece(partial, 0, blob.piece(0))
        partial.condemn()
    assert os.listdir(store.root / "partials") == []
    async with await store.open_partial(shape_of(blob)) as partial:
        assert partial.have == 0
