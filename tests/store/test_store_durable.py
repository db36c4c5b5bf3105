"""The order of flushing and renaming, which no crash of a process alone can show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarmpull.store.backends import open_backend
from swarmpull.store.durable import make_directory, publish, read_exactly, write_all


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """Each flush and rename with the name of its file; temporary names are shown as one."""
    made: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        made.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(path: Path, target: Path) -> Path:
        made.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    return made


def check_published(calls, source_folder: Path, target: Path) -> None:
    at = calls.index(("rename", str(target)))
    flushed_before = [name for what, name in calls[:at] if what == "flush"]
    flushed_after = [name for what, name in calls[at:] if what == "flush"]
    assert any(Path(name).parent == source_folder for name in flushed_before)
    assert str(target.parent.parent) in flushed_before, "a new directory was not flushed"
    assert str(target.parent) in flushed_after


def blob_path(store, blob) -> Path:
    return store.root / "blobs" / "sha256" / blob.digest.hex[:2] / blob.digest.hex


async def test_a_written_blob_is_flushed_before_and_after_it_gets_its_name(
    store, blob, calls
) -> None:
    calls.clear()
    async with store.create() as writer:
        await writer.write(blob.data)
        assert calls == []
        await writer.commit(blob.digest)

    check_published(calls, store.root / "temporary", blob_path(store, blob))


async def test_a_fetched_blob_is_flushed_before_and_after_it_gets_its_name(
    store, blob, calls
) -> None:
    async with await store.open_partial(blob.metainfo) as partial:
        for index in range(3):
            await partial.store_piece(index, blob.piece(index))
        await partial.commit()

    check_published(calls, store.root / "partials", blob_path(store, blob))


async def test_an_upload_is_flushed_before_and_after_it_gets_its_name(store, blob, calls) -> None:
    upload = await store.uploads.create("team/app")
    await upload.append(blob.data)
    await upload.finish(blob.digest)

    check_published(calls, store.root / "uploads", blob_path(store, blob))


async def test_an_object_is_flushed_before_and_after_it_gets_its_name(tmp_path, calls) -> None:
    backend = await open_backend(tmp_path.as_uri())
    calls.clear()

    await backend.put_bytes("a/b", b"content")

    check_published(calls, tmp_path / "temporary", tmp_path / "a.d" / "b.o")


async def test_a_deleted_object_stays_deleted(tmp_path, calls) -> None:
    backend = await open_backend(tmp_path.as_uri())
    await backend.put_bytes("a/b", b"")
    await backend.put_bytes("a/c", b"")
    calls.clear()

    await backend.delete("a/b")
    assert calls == [("flush", str(tmp_path / "a.d"))]
    await backend.delete("a/c")
    assert calls[1:] == [("flush", str(tmp_path))]


def test_publishing_replaces_what_is_there(tmp_path) -> None:
    (tmp_path / "source").write_text("new")
    (tmp_path / "target").write_text("old")

    publish(tmp_path / "source", tmp_path / "target")

    assert (tmp_path / "target").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_directories_are_made_with_their_parents_and_never_over_a_file(tmp_path) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()

    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_directory(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "file" / "below")


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 2), offset))

    with (tmp_path / "file").open("w+b") as file:
        write_all(file.fileno(), b"0123456789", 5)
        assert read_exactly(file.fileno(), 5, 10) == b"0123456789"
        assert read_exactly(file.fileno(), 15, 0) == b""
        with pytest.raises(OSError, match="ends at 15"):
            read_exactly(file.fileno(), 10, 6)
