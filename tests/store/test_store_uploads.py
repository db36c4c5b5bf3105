"""Upload sessions: several requests, restarts, limits."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, PushRefused, UploadBusy, UploadNotFound
from swarmpull.store.blobs import BlobStat, open_store
from swarmpull.store.uploads import UploadLimits
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE


async def append_in_chunks(upload, data: bytes, chunk: int = 65536) -> None:
    for start in range(0, len(data), chunk):
        await upload.append(data[start : start + chunk])


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("length", [0, 1, 2 * PIECE, 2 * PIECE + 1])
async def test_an_upload_becomes_a_blob(store, content_of, length, algorithm) -> None:
    content = content_of(length, algorithm=algorithm)
    upload = await store.uploads.create("team/app")

    async with upload.writing():
        await append_in_chunks(upload, content.data)
        stat = await upload.finish(content.digest)

    assert stat == BlobStat(content.digest, length) == store.stat(content.digest)
    assert await store.metainfo(content.digest) == content.metainfo
    assert os.listdir(store.root / "uploads") == []
    with pytest.raises(UploadNotFound):
        store.uploads.get("team/app", upload.id)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 1_500_000), max_size=4), min_size=1, max_size=4),
    restarts=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_any_split_into_chunks_requests_and_restarts_gives_the_blob(
    content_of, requests, restarts
) -> None:
    content = content_of(sum(map(sum, requests)))
    parts = iter_parts(content.data, requests)

    async def send(store, upload_id: str | None, request: list[bytes]) -> str:
        upload = (
            store.uploads.get("team/app", upload_id)
            if upload_id
            else await store.uploads.create("team/app")
        )
        before = upload.offset
        async with upload.writing():
            for part in request:
                await upload.append(part)
        assert upload.offset == before + sum(map(len, request))
        return upload.id

    async def main(root: Path) -> None:
        pending, upload_id = list(parts), None
        while pending:
            async with open_store(root, name="one") as store:
                while pending:
                    upload_id = await send(store, upload_id, pending.pop(0))
                    if restarts[len(pending) % 4]:
                        break
        async with open_store(root, name="one") as store:
            upload = store.uploads.get("team/app", upload_id)
            assert upload.offset == len(content.data)
            await upload.finish(content.digest)
            assert await store.metainfo(content.digest) == content.metainfo

    with tempfile.TemporaryDirectory() as directory:
        trio.run(main, Path(directory))


def iter_parts(data: bytes, requests: list[list[int]]) -> list[list[bytes]]:
    parts, offset = [], 0
    for request in requests:
        parts.append([])
        for size in request:
            parts[-1].append(data[offset : offset + size])
            offset += size
    return parts


async def test_small_chunks_gather_before_they_are_written(store) -> None:
    upload = await store.uploads.create("team/app")
    path = store.root / "uploads" / (upload.id + ".data")

    async with upload.writing():
        await upload.append(b"x" * 1000)
        assert (upload.offset, path.stat().st_size) == (1000, 0)
        await upload.append(b"x" * (1 << 20))
        assert path.stat().st_size == upload.offset == 1000 + (1 << 20)
        await upload.append(b"y")
    assert path.stat().st_size == upload.offset == 1001 + (1 << 20)

    await upload.cancel()


async def test_a_session_is_found_again_after_a_restart(tmp_path, blob) -> None:
    async with open_store(tmp_path, name="one") as store:
        upload = await store.uploads.create("team/app")
        async with upload.writing():
            await upload.append(blob.data[:5_000_000])

    async with open_store(tmp_path, name="one") as store:
        again = store.uploads.get("team/app", upload.id)
        assert (again.repository, again.offset) == ("team/app", 5_000_000)
        await again.append(blob.data[5_000_000:])
        assert await again.finish(blob.digest) == BlobStat(blob.digest, len(blob.data))


async def test_a_client_that_hangs_up_loses_nothing_that_arrived(store, blob) -> None:
    upload = await store.uploads.create("team/app")

    with trio.CancelScope() as scope:
        async with upload.writing():
            await upload.append(blob.data[:1000])
            scope.cancel()
            await trio.sleep_forever()

    assert (store.root / "uploads" / (upload.id + ".data")).stat().st_size == 1000
    async with upload.writing():
        await upload.append(blob.data[1000:])
        await upload.finish(blob.digest)


async def test_only_one_request_writes_at_a_time(store, blob) -> None:
    upload = await store.uploads.create("team/app")

    async with upload.writing():
        with pytest.raises(UploadBusy, match=upload.id):
            async with upload.writing():
                pytest.fail("two writers")
        await upload.append(blob.data)
    async with upload.writing():
        await upload.finish(blob.digest)


async def test_a_failed_request_lets_the_next_one_in_with_its_own_error(store) -> None:
    upload = await store.uploads.create("team/app")

    with pytest.raises(KeyError, match="mine"):
        async with upload.writing():
            raise KeyError("mine")

    async with upload.writing():
        await upload.cancel()


@pytest.mark.parametrize(
    "upload_id",
    ["", "x", "../../etc/passwd", "0" * 31, "0" * 32, "A" * 32, "0" * 32 + "\n", "\0" * 32],
)
async def test_an_unknown_or_malformed_id_is_not_found(store, upload_id) -> None:
    with pytest.raises(UploadNotFound) as caught:
        store.uploads.get("team/app", upload_id)

    assert caught.value.upload_id == upload_id


async def test_a_session_belongs_to_its_repository(store) -> None:
    upload = await store.uploads.create("team/app")

    with pytest.raises(UploadNotFound):
        store.uploads.get("team/other", upload.id)
    assert store.uploads.get("team/app", upload.id) is upload

    await upload.cancel()


async def test_wrong_content_ends_the_session_and_nothing_is_visible(store, blob) -> None:
    wrong = Digest.of(b"other")
    upload = await store.uploads.create("team/app")
    await upload.append(blob.data)

    with pytest.raises(DigestMismatch) as caught:
        await upload.finish(wrong)

    assert (caught.value.expected, caught.value.actual) == (str(wrong), str(blob.digest))
    assert list(store.list()) == []
    assert os.listdir(store.root / "uploads") == []
    for operation in (upload.finish(blob.digest), upload.append(b"x"), upload.cancel()):
        with pytest.raises(UploadNotFound):
            await operation


async def test_cancelling_removes_the_session_and_its_content(store, blob) -> None:
    upload = await store.uploads.create("team/app")
    async with upload.writing():
        await upload.append(blob.data)
        await upload.cancel()

    assert os.listdir(store.root / "uploads") == []
    with pytest.raises(UploadNotFound):
        store.uploads.get("team/app", upload.id)


async def test_two_uploads_of_one_blob_both_succeed(store, blob) -> None:
    uploads = [await store.uploads.create("team/app") for _ in range(2)]
    for upload in uploads:
        await upload.append(blob.data)

    async with trio.open_nursery() as nursery:
        for upload in uploads:
            nursery.start_soon(upload.finish, blob.digest)

    assert list(store.list()) == [BlobStat(blob.digest, len(blob.data))]


async def test_finishing_twice_at_once_finishes_once(store, blob) -> None:
    upload = await store.uploads.create("team/app")
    await upload.append(blob.data)
    results = []

    async def finish() -> None:
        try:
            results.append(await upload.finish(blob.digest))
        except UploadNotFound as error:
            results.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        nursery.start_soon(finish)

    assert sorted(type(result).__name__ for result in results) == ["BlobStat", "UploadNotFound"]


async def test_sessions_are_limited(tmp_path) -> None:
    limits = UploadLimits(sessions=2)
    async with open_store(tmp_path, name="one", upload_limits=limits) as store:
        first = await store.uploads.create("a")
        await store.uploads.create("a")
        with pytest.raises(PushRefused, match="2 uploads are open in store one"):
            await store.uploads.create("a")
        await first.cancel()
        await store.uploads.create("a")
        assert store.uploads.sessions == 2


async def test_idle_sessions_make_room_but_never_one_in_use(tmp_path) -> None:
    limits = UploadLimits(sessions=2, idle_timeout=-1.0)
    async with open_store(tmp_path, name="one", upload_limits=limits) as store:
        used = await store.uploads.create("a")
        async with used.writing():
            idle = await store.uploads.create("a")
            await store.uploads.create("a")
            with pytest.raises(UploadNotFound):
                store.uploads.get("a", idle.id)
            assert store.uploads.get("a", used.id) is used


async def test_at_the_limit_what_was_given_up_makes_room_earlier(tmp_path) -> None:
    limits = UploadLimits(sessions=2, crowded_timeout=60.0)
    async with open_store(tmp_path, name="one", upload_limits=limits) as store:
        given_up = await store.uploads.create("a")
        given_up.used_at -= 61.0
        await store.uploads.create("a")
        assert store.uploads.get("a", given_up.id) is given_up
        await store.uploads.create("a")
        with pytest.raises(UploadNotFound):
            store.uploads.get("a", given_up.id)
        with pytest.raises(PushRefused):
            await store.uploads.create("a")


async def test_the_age_of_a_session_outlives_the_process(tmp_path) -> None:
    async with open_store(tmp_path, name="one") as store:
        upload = await store.uploads.create("a")
    os.utime(tmp_path / "uploads" / (upload.id + ".data"), (1000.0, 1000.0))

    async with open_store(tmp_path, name="one") as store:
        assert store.uploads.get("a", upload.id).used_at == 1000.0
        await store.uploads.create("a")
        with pytest.raises(UploadNotFound):
            store.uploads.get("a", upload.id)


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b'{"repository": 5}', b"\xff\xff", b"null", None]
)
async def test_a_session_that_cannot_be_read_is_removed(tmp_path, damage) -> None:
    async with open_store(tmp_path, name="one") as store:
        bad = await store.uploads.create("a")
        good = await store.uploads.create("a")
    session = tmp_path / "uploads" / (bad.id + ".session")
    assert json.loads(session.read_bytes()) == {"repository": "a"}
    if damage is None:
        (tmp_path / "uploads" / (bad.id + ".data")).unlink()
    else:
        session.write_bytes(damage)

    async with open_store(tmp_path, name="one") as store:
        assert store.uploads.get("a", good.id).offset == 0
        with pytest.raises(UploadNotFound):
            store.uploads.get("a", bad.id)
        assert len(os.listdir(tmp_path / "uploads")) == 2
