"""What is special to the directory backend, and how a backend is found by its URL."""

from __future__ import annotations

import os
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from swarmpull.errors import BackendUnavailable, ObjectNotFound, StartupError
from swarmpull.store import backend_urls, backends
from swarmpull.store.backends import DirectoryBackend, directory, open_backend
from swarmpull.store.backends.directory import MARKER


async def test_the_files_are_where_the_documentation_says(tmp_path) -> None:
    backend = await open_backend(tmp_path.as_uri())
    await backend.put_bytes("blobs/sha256/ab/abc1", b"content")

    assert (tmp_path / "blobs.d/sha256.d/ab.d/abc1.o").read_bytes() == b"content"
    assert backend.name == tmp_path.as_uri()


async def test_files_that_are_not_ours_are_left_alone(tmp_path) -> None:
    backend = await open_backend(tmp_path.as_uri())
    await backend.put_bytes("a/b", b"")
    (tmp_path / "README").write_text("not ours")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.d" / "note.txt").write_text("not ours")
    (tmp_path / "a.d" / "directory.o").mkdir()
    (tmp_path / "file.d").write_text("not a directory")
    (tmp_path / ".o").write_text("an empty segment")
    (tmp_path / os.fsdecode(b"\xff.o")).touch()

    assert (await backend.list()).keys == ("a/b",)
    await backend.delete("a/b")
    assert (tmp_path / "a.d" / "note.txt").exists()


async def test_deleting_removes_the_directories_that_became_empty(tmp_path) -> None:
    backend = await open_backend(tmp_path.as_uri())
    await backend.put_bytes("a/b/c/d", b"")
    await backend.put_bytes("a/x", b"")

    await backend.delete("a/b/c/d")
    assert sorted(os.listdir(tmp_path / "a.d")) == ["x.o"]
    await backend.delete("a/x")
    assert sorted(os.listdir(tmp_path)) == [MARKER, "temporary"]


async def test_a_put_whose_object_is_deleted_at_once_has_happened(tmp_path, monkeypatch) -> None:
    backend = await open_backend(tmp_path.as_uri())
    sync_directory = directory.sync_directory

    def delete_first(path: Path) -> None:
        if path.name == "a.d":
            (path / "b.o").unlink()
            path.rmdir()
        sync_directory(path)

    monkeypatch.setattr(directory, "sync_directory", delete_first)
    await backend.put_bytes("a/b", b"content")

    assert (await backend.list()).keys == ()


async def test_a_directory_that_vanished_does_not_look_empty(tmp_path) -> None:
    backend = await open_backend((tmp_path / "mounted").as_uri())
    await backend.put_bytes("a", b"")
    with pytest.raises(ObjectNotFound):
        await backend.stat("b")
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")

    for operation in (backend.stat("a"), backend.get_bytes("a"), backend.list()):
        with pytest.raises(BackendUnavailable, match="mounted"):
            await operation


async def test_a_file_system_that_is_unmounted_does_not_look_empty_and_swallows_nothing(
    tmp_path,
) -> None:
    mount_point = tmp_path / "mounted"
    backend = await open_backend(mount_point.as_uri())
    await backend.put_bytes("a", b"x")
    mount_point.rename(tmp_path / "elsewhere")
    mount_point.mkdir()  # what is left when a file system is gone

    for operation in (
        backend.stat("a"),
        backend.get_bytes("a"),
        backend.delete("a"),
        backend.list(),
        backend.put_bytes("b", b"x"),
        backend.put_file("b", tmp_path / "elsewhere" / "a.o"),
    ):
        with pytest.raises(BackendUnavailable, match="not mounted"):
            await operation

    assert os.listdir(mount_point) == []
    mount_point.rmdir()
    (tmp_path / "elsewhere").rename(mount_point)
    assert await backend.get_bytes("a") == b"x"


async def test_a_file_system_that_is_unmounted_inside_a_listing_does_not_end_it(
    tmp_path, monkeypatch
) -> None:
    mount_point = tmp_path / "mounted"
    backend = await open_backend(mount_point.as_uri())
    for key in ("a/1", "b/1"):
        await backend.put_bytes(key, b"x")
    scandir = os.scandir

    def unmount_below(directory):
        if Path(directory).name == "b.d":
            mount_point.rename(tmp_path / "elsewhere")
        return scandir(directory)

    monkeypatch.setattr(os, "scandir", unmount_below)
    with pytest.raises(BackendUnavailable, match="not mounted"):
        await backend.list()


async def test_a_file_system_that_fails_when_it_is_asked_whether_it_is_mounted_is_unavailable(
    tmp_path,
) -> None:
    backend = await open_backend(tmp_path.as_uri())
    (tmp_path / MARKER).unlink()
    # Any error but ENOENT, as of a server of files that is gone.
    (tmp_path / MARKER).symlink_to("x" * 300)

    for operation in (backend.stat("a"), backend.get_bytes("a"), backend.list()):
        with pytest.raises(BackendUnavailable, match="name too long"):
            await operation


async def test_the_event_loop_never_waits_for_the_file_system(tmp_path, monkeypatch) -> None:
    backend = await open_backend(tmp_path.as_uri())
    (tmp_path / "source").write_bytes(b"x")
    calls: dict[str, set[int]] = {}

    def watch(name: str) -> None:
        original = getattr(os, name)

        def call(*args, **options):
            calls.setdefault(name, set()).add(threading.get_ident())
            return original(*args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("stat", "fstat", "open", "unlink", "rename", "fsync", "scandir"):
        watch(name)
    await backend.put_bytes("a", b"x")
    await backend.put_file("b", tmp_path / "source")
    async with backend.open("b") as chunks:
        assert b"".join([chunk async for chunk in chunks]) == b"x"
    with pytest.raises(ObjectNotFound):
        await backend.stat("missing")
    assert (await backend.list()).keys == ("a", "b")
    await backend.delete("a")

    assert calls.keys() >= {"stat", "fstat", "open", "scandir"}
    assert threading.get_ident() not in set().union(*calls.values())


async def test_a_directory_that_must_exist_is_not_begun(tmp_path) -> None:
    url = f"{tmp_path.as_uri()}?create=false"
    for _ in range(2):
        with pytest.raises(StartupError, match=r"not mounted, or was never used.*mount it"):
            await open_backend(url)
        assert os.listdir(tmp_path) == []

    (tmp_path / MARKER).touch()
    await (await open_backend(url)).put_bytes("a", b"x")

    assert await (await open_backend(tmp_path.as_uri())).get_bytes("a") == b"x"
    assert await (await open_backend(url)).get_bytes("a") == b"x"


async def test_a_put_makes_the_temporary_directory_again(tmp_path) -> None:
    backend = await open_backend(tmp_path.as_uri())
    (tmp_path / "temporary").rmdir()

    await backend.put_bytes("a", b"x")

    assert await backend.get_bytes("a") == b"x"


async def test_a_full_disk_fails_the_put_and_gives_the_room_back(small_disk, tmp_path) -> None:
    backend = await open_backend(small_disk.as_uri())
    await backend.put_bytes("a", b"kept")
    (tmp_path / "big").write_bytes(bytes(32 << 20))

    with pytest.raises(BackendUnavailable, match="No space left"):
        await backend.put_file("a", tmp_path / "big")

    assert await backend.get_bytes("a") == b"kept"
    assert os.listdir(small_disk / "temporary") == []
    await backend.put_bytes("b", bytes(8 << 20))


async def test_opening_removes_old_leftovers_and_keeps_puts_in_progress(tmp_path) -> None:
    await open_backend(tmp_path.as_uri())
    for name, age in (("old", 25 * 3600), ("new", 60)):
        (tmp_path / "temporary" / name).write_bytes(b"half")
        stamp = time.time() - age
        os.utime(tmp_path / "temporary" / name, (stamp, stamp))

    await open_backend(tmp_path.as_uri())

    assert os.listdir(tmp_path / "temporary") == ["new"]


async def test_a_url_with_escapes_names_its_directory(tmp_path) -> None:
    directory = tmp_path / "with space & ümlaut"
    backend = await open_backend(directory.as_uri())

    assert isinstance(backend, DirectoryBackend)
    assert backend.root == directory
    assert directory.is_dir()


@pytest.mark.parametrize(
    "url",
    [
        "file://host/dir",
        "file:relative/dir",
        "file:///dir?option=1",
        "file:///dir#x",
        "file:",
        "file://",
    ],
)
async def test_a_file_url_that_is_not_an_absolute_directory_is_refused(url) -> None:
    with pytest.raises(StartupError, match="file:///absolute/path"):
        await open_backend(url)


@pytest.mark.parametrize(
    "url", ["ftp://user:secret@host/x", "/just/a/path", "", "s4://key:secret@h/b"]
)
async def test_an_unknown_scheme_says_what_is_allowed_and_no_secret(url) -> None:
    with pytest.raises(StartupError) as caught:
        await open_backend(url)

    assert "file" in caught.value.remedy
    assert "secret" not in str(caught.value)


async def test_a_directory_that_cannot_be_used_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StartupError, match="cannot be used"):
        await open_backend((tmp_path / "file" / "below").as_uri())


async def fake_backend(url: str) -> DirectoryBackend:
    return DirectoryBackend(Path("/" + url.removeprefix("fake://")))


async def test_other_schemes_come_from_installed_packages(monkeypatch) -> None:
    point = EntryPoint("fake", f"{__name__}:fake_backend", backends.ENTRY_POINT_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: fake_backend)
    monkeypatch.setattr(
        backend_urls, "entry_points", lambda group: [point] if group == point.group else []
    )

    backend = await open_backend("fake://somewhere")

    assert isinstance(backend, DirectoryBackend)
    assert backend.root == Path("/somewhere")
    with pytest.raises(StartupError) as caught:
        await open_backend("other://x")
    assert caught.value.remedy == "installed are: fake, file, s3"
