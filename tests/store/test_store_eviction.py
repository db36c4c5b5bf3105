"""A store keeps to its limits, on real files."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, StoreFull
from swarmpull.store.blobs import open_store
from swarmpull.store.eviction import Limits, Reason
from swarmpull.store.holds import Pin
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.telemetry import Metrics

START = 1_700_000_000.0
DAY = 86400.0


@attrs.define
class Clock:
    """A clock that is set by hand."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def opened(root: Path, clock: Clock, **limits):
    async with open_store(root, name="agent", limits=Limits(**limits), clock=clock) as store:
        yield store


async def put(store, content) -> Digest:
    async with store.create() as writer:
        await writer.write(content.data)
        await writer.commit(content.digest)
    return content.digest


async def read(store, digest: Digest) -> None:
    with store.open(digest) as handle:
        await handle.read_at(0, handle.length)


def reasons(removals) -> list[tuple[Digest, Reason]]:
    return [(removal.entry.digest, removal.reason) for removal in removals]


def set_mtime(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def abandon(root: Path, content, at: float) -> None:
    """As if the last piece of a closed partial had come then."""
    for path in (root / "partials").glob(f"*{content.digest.hex}*"):
        set_mtime(path, at)


# --- times ----------------------------------------------------------------------------------------


async def test_a_blob_expires_after_its_ttl_however_much_it_is_used(
    tmp_path, clock, content_of, check_disk
) -> None:
    async with opened(tmp_path, clock, ttl=DAY) as store:
        digest = await put(store, content_of(1000))
        clock.now += DAY
        await read(store, digest)
        assert await store.janitor.sweep() == []

        clock.now += 1
        assert reasons(await store.janitor.sweep()) == [(digest, Reason.TTL)]
        assert not store.has(digest)
        assert store.janitor.bytes("blob") == 0
    check_disk(tmp_path)
    assert not list((tmp_path / "blobs").rglob("*.metainfo"))


async def test_reading_keeps_a_blob_from_its_idle_timeout_and_metainfo_does_not(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock, idle_timeout=100.0) as store:
        used, offered = await put(store, content_of(1000)), await put(store, content_of(2000))
        clock.now += 90
        await read(store, used)
        await store.metainfo(offered)
        clock.now += 20

        assert reasons(await store.janitor.sweep()) == [(offered, Reason.IDLE)]
        assert store.has(used)


@pytest.mark.parametrize("swept", [False, True])
async def test_times_survive_a_restart(tmp_path, clock, content_of, swept) -> None:
    async with opened(tmp_path, clock) as store:
        first, second = await put(store, content_of(1000)), await put(store, content_of(2000))
        clock.now += 500
        await read(store, first)
        if swept:
            await store.janitor.sweep()
    clock.now += 500

    async with opened(tmp_path, clock) as store:
        found = {entry.digest: entry for entry in store.janitor.entries()}
        assert found[first].set_at == pytest.approx(START)
        assert found[first].used_at == pytest.approx(START + 500)
        assert found[second].used_at == pytest.approx(START)
        assert store.janitor.bytes("blob") == 3000


async def test_reading_through_the_mount_changes_no_time(tmp_path, clock, content_of) -> None:
    async with opened(tmp_path, clock) as store:
        digest = await put(store, content_of(1000))
        path = store.path(digest)
    os.utime(path, (START + 9e6, path.stat().st_mtime))
    path.read_bytes()

    async with opened(tmp_path, clock) as store:
        (found,) = store.janitor.entries()
        assert (found.set_at, found.used_at) == (pytest.approx(START), pytest.approx(START))


async def test_metainfo_that_is_computed_again_does_not_make_a_blob_look_used(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock) as store:
        digest = await put(store, content_of(1000))
        path = store.path(digest)
        path.with_name(path.name + ".metainfo").write_bytes(b"damaged")
        clock.now += 500
        await store.metainfo(digest)

    async with opened(tmp_path, clock) as store:
        (found,) = store.janitor.entries()
        assert found.used_at == pytest.approx(START)


async def test_the_use_of_a_blob_is_written_once_a_round_and_not_at_each_read(
    tmp_path, clock, content_of, monkeypatch
) -> None:
    async with opened(tmp_path, clock) as store:
        digest = await put(store, content_of(1000))
        calls = []
        real = os.utime
        monkeypatch.setattr(os, "utime", lambda *args: (calls.append(args), real(*args)))
        for _ in range(50):
            clock.now += 1
            await read(store, digest)
        assert calls == []
        await store.janitor.sweep()
        assert len(calls) == 1
        await store.janitor.sweep()
        assert len(calls) == 1


async def test_a_clock_that_goes_back_expires_nothing_and_keeps_nothing_for_ever(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock, idle_timeout=100.0) as store:
        digest = await put(store, content_of(1000))
        clock.now -= 365 * DAY
        assert await store.janitor.sweep() == []
        clock.now += 101
        assert reasons(await store.janitor.sweep()) == [(digest, Reason.IDLE)]


async def test_times_in_the_future_count_as_now_after_a_restart(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock) as store:
        digest = await put(store, content_of(1000))
    clock.now -= 365 * DAY

    async with opened(tmp_path, clock, ttl=100.0) as store:
        assert await store.janitor.sweep() == []
        clock.now += 101
        assert reasons(await store.janitor.sweep()) == [(digest, Reason.TTL)]


# --- what is in use -------------------------------------------------------------------------------


async def test_an_open_reader_keeps_its_blob_and_the_next_round_takes_it(
    tmp_path, clock, blob
) -> None:
    async with opened(tmp_path, clock, ttl=10.0) as store:
        await put(store, blob)
        clock.now += 11
        with store.open(blob.digest) as handle:
            assert await store.janitor.sweep() == []
            (found,) = store.janitor.entries()
            assert found.pinned == "reading"
            assert await handle.read_at(0, len(blob.data)) == blob.data
        assert len(await store.janitor.sweep()) == 1


async def test_a_blob_that_is_deleted_under_a_reader_stays_right_for_it(
    tmp_path, clock, blob
) -> None:
    async with opened(tmp_path, clock) as store:
        await put(store, blob)
        with store.open(blob.digest) as handle:
            await store.delete(blob.digest)
            assert store.janitor.bytes("blob") == 0
            assert await handle.read_at(0, len(blob.data)) == blob.data
        with pytest.raises(BlobNotFound):
            store.open(blob.digest)


async def test_holds_are_counted(tmp_path, clock, content_of) -> None:
    async with opened(tmp_path, clock, ttl=10.0) as store:
        content = content_of(1000)
        with store.hold(content.digest, Pin.NOT_WRITTEN_BACK):
            await put(store, content)
            clock.now += 11
            with store.hold(content.digest, Pin.NOT_WRITTEN_BACK):
                pass
            assert await store.janitor.sweep() == []
        assert len(await store.janitor.sweep()) == 1


async def test_users_of_the_store_are_asked_and_told_without_a_gap(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock, ttl=10.0) as store:
        kept, gone = await put(store, content_of(1000)), await put(store, content_of(2000))
        clock.now += 11
        told = []

        def forget(digest: Digest) -> None:
            told.append((digest, store.has(digest)))

        with store.janitor.attached(lambda: {kept: Pin.SENDING}, forget):
            await store.janitor.sweep()

        assert told == [(gone, False)]
        assert store.has(kept)


async def test_a_pushed_blob_is_held_until_its_request_has_taken_over(
    tmp_path, clock, content_of
) -> None:
    content = content_of(1000)
    async with opened(tmp_path, clock, ttl=10.0) as store:
        upload = await store.uploads.create("team/app")
        async with upload.writing():
            await upload.append(content.data)
            await upload.finish(content.digest)
            clock.now += 11
            assert await store.janitor.sweep() == []
        assert len(await store.janitor.sweep()) == 1


# --- partials and leftovers -----------------------------------------------------------------------


async def test_an_abandoned_partial_expires_and_an_open_one_does_not(
    tmp_path, clock, blob, content_of
) -> None:
    other = content_of(PIECE + 1, seed=1)
    async with opened(tmp_path, clock, partial_ttl=100.0) as store:
        for content in (blob, other):
            async with await store.open_partial(content.metainfo) as partial:
                await partial.store_piece(0, content.piece(0))
            abandon(tmp_path, content, START - 101)
    async with opened(tmp_path, clock, partial_ttl=100.0) as store:
        assert store.janitor.bytes("partial") >= len(blob.data) + len(other.data)
        async with await store.open_partial(blob.metainfo) as partial:
            assert reasons(await store.janitor.sweep()) == [(other.digest, Reason.ABANDONED)]
            assert partial.have == 1
        assert len(os.listdir(tmp_path / "partials")) == 2
        assert store.janitor.bytes("partial") >= len(blob.data)


async def test_a_partial_counts_with_all_that_it_will_take_until_it_is_a_blob(
    tmp_path, clock, blob
) -> None:
    async with opened(tmp_path, clock) as store:
        async with await store.open_partial(blob.metainfo) as partial:
            assert store.janitor.bytes("partial") == len(blob.data)
            for index in range(3):
                await partial.store_piece(index, blob.piece(index))
            await partial.commit()
            assert store.janitor.bytes("partial") == 0
            assert store.janitor.bytes("blob") == len(blob.data)
        async with await store.open_partial(blob.metainfo) as partial:
            await partial.discard()
        assert store.janitor.bytes("partial") == 0


async def test_uploads_and_temporary_files_count_while_they_are_there(
    tmp_path, clock, content_of
) -> None:
    content = content_of(3 << 20)
    async with opened(tmp_path, clock) as store:
        upload = await store.uploads.create("team/app")
        async with upload.writing():
            await upload.append(content.data)
        assert store.janitor.bytes("upload") == 3 << 20
    async with opened(tmp_path, clock) as store:
        assert store.janitor.bytes("upload") == 3 << 20
        await store.uploads.get("team/app", upload.id).cancel()
        assert store.janitor.bytes("upload") == 0
        async with store.create() as writer:
            await writer.write(content.data)
            assert store.janitor.bytes("temporary") == 3 << 20
        assert store.janitor.bytes("temporary") == 0


async def test_a_crash_between_a_blob_and_its_sidecar_leaves_nothing_for_long(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock) as store:
        digest = await put(store, content_of(1000))
        path = store.path(digest)
    path.rename(tmp_path / "temporary" / "taken-out")

    async with opened(tmp_path, clock) as store:
        assert not store.has(digest)
        assert store.janitor.entries() == []
    assert [each for each in tmp_path.rglob("*") if digest.hex in each.name] == []
    assert os.listdir(tmp_path / "temporary") == []


async def test_a_blob_that_was_removed_by_hand_leaves_the_books(
    tmp_path, clock, content_of
) -> None:
    async with opened(tmp_path, clock, ttl=10.0) as store:
        digest = await put(store, content_of(1000))
        store.path(digest).unlink()
        clock.now += 11
        await store.janitor.sweep()
        assert store.janitor.bytes("blob") == 0


# --- the watermark --------------------------------------------------------------------------------


async def test_a_download_evicts_what_was_used_longest_ago(tmp_path, clock, content_of) -> None:
    contents = [content_of(PIECE, seed=seed) for seed in range(5)]
    new = content_of(PIECE, seed=9)
    async with opened(tmp_path, clock, high=5 * PIECE, low=3 * PIECE) as store:
        for content in contents:
            clock.now += 1
            await put(store, content)
        clock.now += 1
        await read(store, contents[0].digest)

        async with await store.open_partial(new.metainfo):
            left = [content for content in contents if store.has(content.digest)]
            assert left == [contents[0], contents[4]]
            assert os.listdir(tmp_path / "temporary") == []


async def test_what_cannot_fit_is_refused_by_name_and_evicts_nothing(
    tmp_path, clock, content_of
) -> None:
    content, big = content_of(PIECE), content_of(3 * PIECE, seed=1)
    metrics = Metrics()
    limits = Limits(high=2 * PIECE, low=PIECE, key="agent.store.max_bytes")
    async with open_store(tmp_path, name="agent", limits=limits, metrics=metrics) as store:
        await put(store, content)
        with pytest.raises(StoreFull, match=r"agent\.store\.max_bytes \(8388608 bytes\)") as caught:
            await store.open_partial(big.metainfo)

        assert caught.value.needed == 3 * PIECE
        assert store.has(content.digest)
        assert store.janitor.bytes("partial") == 0
        assert os.listdir(tmp_path / "partials") == []
    assert b"swarmpull_store_refused_total 1.0" in metrics.render()[0]


async def test_two_downloads_at_once_do_not_get_the_same_room(tmp_path, clock, content_of) -> None:
    contents = [content_of(2 * PIECE, seed=seed) for seed in range(3)]
    outcomes = []

    async def begin(store, content) -> None:
        try:
            outcomes.append(await store.open_partial(content.metainfo))
        except StoreFull as error:
            outcomes.append(error)

    async with opened(tmp_path, clock, high=5 * PIECE, low=5 * PIECE) as store:
        await put(store, content_of(PIECE, seed=9))
        async with trio.open_nursery() as nursery:
            for content in contents:
                nursery.start_soon(begin, store, content)
        assert sum(isinstance(outcome, StoreFull) for outcome in outcomes) == 1
        assert sum(map(store.janitor.bytes, ("blob", "partial"))) <= 5 * PIECE


async def test_a_push_evicts_and_is_refused_when_the_rest_is_in_use(
    tmp_path, clock, content_of
) -> None:
    contents = [content_of(PIECE, seed=seed) for seed in range(2)]
    new = content_of(PIECE, seed=9)
    async with opened(tmp_path, clock, high=2 * PIECE, low=2 * PIECE) as store:
        for content in contents:
            await put(store, content)
        upload = await store.uploads.create("team/app")
        with store.open(contents[0].digest), store.open(contents[1].digest):
            with pytest.raises(StoreFull):
                async with upload.writing():
                    await upload.append(new.data)
            assert upload.offset == 0
        async with upload.writing():
            await upload.append(new.data)
            await upload.finish(new.digest)
        assert sum(store.has(content.digest) for content in contents) == 1
        assert store.janitor.bytes("blob") == 2 * PIECE
        assert store.janitor.bytes("upload") == 0


async def test_a_full_disk_evicts_before_it_refuses(small_disk, clock, content_of) -> None:
    contents = [content_of(2 * PIECE, seed=seed) for seed in range(2)]
    async with opened(small_disk, clock) as store:
        for content in contents:
            clock.now += 1
            await put(store, content)
        new = content_of(3 * PIECE, seed=9)
        async with await store.open_partial(new.metainfo) as partial:
            for index in range(3):
                assert await partial.store_piece(index, new.piece(index))
            await partial.commit()
        assert [store.has(content.digest) for content in contents] == [False, True]


async def test_the_janitor_sweeps_at_once_and_every_minute(
    tmp_path, clock, content_of, autojump_clock
) -> None:
    async with opened(tmp_path, clock, ttl=10.0) as store, trio.open_nursery() as nursery:
        digest = await put(store, content_of(1000))
        nursery.start_soon(store.janitor.run)
        await trio.sleep(1)
        assert store.has(digest)
        clock.now += 60
        await trio.sleep(61)
        assert not store.has(digest)
        nursery.cancel_scope.cancel()


async def test_bytes_and_evictions_are_metrics(tmp_path, clock, content_of) -> None:
    metrics = Metrics()
    limits = Limits(ttl=10.0, high=1e9, low=1e8)
    async with open_store(
        tmp_path, name="agent", limits=limits, metrics=metrics, clock=clock
    ) as store:
        await put(store, content_of(1000))
        text = metrics.render()[0].decode()
        assert 'swarmpull_store_bytes{kind="blob"} 1000.0' in text
        assert "swarmpull_store_high_watermark_bytes 1e+09" in text
        clock.now += 11
        await store.janitor.sweep()
        text = metrics.render()[0].decode()
        assert 'swarmpull_store_bytes{kind="blob"} 0.0' in text
        assert 'swarmpull_store_evictions_total{reason="ttl"} 1.0' in text
        assert 'swarmpull_store_evicted_bytes_total{reason="ttl"} 1000.0' in text
        assert 'swarmpull_store_evictions_total{reason="room"} 0.0' in text
