"""What every backend does.  A backend joins by one factory in `HARNESSES`.

The numbers in the comments are the cases of the suite; teardown fails when a test leaves anything in the
backend or behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    InvalidRange,
    ObjectNotFound,
    ObjectReplaced,
    SwarmpullError,
)
from swarmpull.store.backends import Backend, ObjectStat, blob_key, check_key, open_backend, s3
from swarmpull.store.backends.base import CHUNK_BYTES_MAX, KEY_BYTES_MAX, SEGMENT_BYTES_MAX
from swarmpull.store.backends.directory import LOCK_PREFIX, MARKER
from swarmpull.store.backends.impatient import ImpatientBackend
from swarmpull.store.backends.paced import PacedBackend
from swarmpull.store.token_bucket import TokenBucket

from .s3_proxy import Relay
from .s3_server import BUCKET, installed_kinds

MIB = 1 << 20
KEY = "blobs/sha256/ab/abcd"


@attrs.frozen
class Harness:
    """One backend under test.

    Attributes:
        open: a client of the backend; each call gives another one to the same objects.
        failing: while the block runs, the backend fails every operation.
        leftovers: what lies behind the backend beside its objects, by name.
        nested: whether it lists objects whose key begins with another object's and a ``/``.
    """

    open: Callable[[], object]
    failing: Callable[[], AbstractContextManager[None]]
    leftovers: Callable[[], list[str]]
    nested: bool = True

    def listable(self, keys: Iterable[str]) -> list[str]:
        """Keys that it lists when all of them are there, in the order of their bytes."""
        chosen = set(keys)
        if not self.nested:
            parents = {key[:at] for key in chosen for at in range(len(key)) if key[at] == "/"}
            chosen -= parents
        return sorted(chosen, key=str.encode)


def directory_harness(request: pytest.FixtureRequest) -> Harness:
    tmp_path = request.getfixturevalue("tmp_path")
    root = tmp_path / "backend"

    @contextmanager
    def failing() -> Iterator[None]:
        root.rename(tmp_path / "away")
        root.write_text("a file where the directory should be")
        try:
            yield
        finally:
            root.unlink()
            (tmp_path / "away").rename(root)

    def leftovers() -> list[str]:
        ours = (root / "temporary", root / MARKER, *root.glob(f"temporary/{LOCK_PREFIX}*"))
        return [str(path) for path in root.rglob("*") if path not in ours]

    return Harness(lambda: open_backend(root.as_uri()), failing, leftovers)


def s3_harness(request: pytest.FixtureRequest, *, kind: str) -> Harness:
    server = request.getfixturevalue("s3_servers")(kind)
    relay = request.getfixturevalue("relay_to")(server.port)
    options = f"endpoint=127.0.0.1:{relay.port}&secure=false&attempts=2&part_size=5MiB"

    @contextmanager
    def failing() -> Iterator[None]:
        relay.cut()
        try:
            yield
        finally:
            relay.refusing = False

    def leftovers() -> list[str]:
        found = server.uploads()
        server.abort_uploads()
        return found

    # What was cancelled is tidied up however slow this machine is just now.
    request.getfixturevalue("monkeypatch").setattr(s3, "GRACE", 60.0)
    url = f"s3://{BUCKET}?{options}"
    return Harness(lambda: open_backend(url), failing, leftovers, nested=server.kind != "minio")


@pytest.fixture
def relay_to() -> Iterator[Callable[[int], Relay]]:
    """Opens relays to servers, by their ports."""
    with ExitStack() as relays:
        yield lambda port: relays.enter_context(Relay(port))


def paced_harness(request: pytest.FixtureRequest) -> Harness:
    """A directory at a rate that nothing here comes near."""
    inner = directory_harness(request)

    async def open_paced() -> PacedBackend:
        return PacedBackend(await inner.open(), TokenBucket(1e12))

    return attrs.evolve(inner, open=open_paced)


def impatient_harness(request: pytest.FixtureRequest) -> Harness:
    """A directory that is given more time than anything here takes."""
    inner = directory_harness(request)

    async def open_impatient() -> ImpatientBackend:
        return ImpatientBackend(await inner.open(), 600.0)

    return attrs.evolve(inner, open=open_impatient)


HARNESSES = {
    "directory": directory_harness,
    "paced": paced_harness,
    "impatient": impatient_harness,
    # Every S3 server that is installed here; without any, the tests are skipped and say why.
    **{f"s3 {kind}".strip(): partial(s3_harness, kind=kind) for kind in installed_kinds() or [""]},
}


@pytest.fixture(params=sorted(HARNESSES))
def harness(request) -> Harness:
    return HARNESSES[request.param](request)


@pytest.fixture
async def backend(harness: Harness) -> AsyncIterator[Backend]:
    opened = await harness.open()
    yield opened
    for key in await all_keys(opened):
        await opened.delete(key)
    assert harness.leftovers() == []


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        path = tmp_path / "upload"
        path.write_bytes(data)
        return path

    return make


async def all_keys(backend: Backend, prefix: str = "", *, limit: int = 1000) -> list[str]:
    keys: list[str] = []
    more = True
    while more:
        page = await backend.list(prefix, after=keys[-1] if keys else "", limit=limit)
        assert len(page.keys) <= limit
        keys += page.keys
        more = page.more
    return keys


async def read(backend: Backend, key: str, start: int = 0, stop: int | None = None) -> bytes:
    async with backend.open(key, start=start, stop=stop) as chunks:
        parts = [chunk async for chunk in chunks]
    assert all(0 < len(part) <= CHUNK_BYTES_MAX for part in parts)
    return b"".join(parts)


def every_operation(backend: Backend, path: Path, key: str = KEY) -> list[Callable[[], object]]:
    """Each operation of a backend, on one key."""
    return [
        lambda: backend.stat(key),
        lambda: read(backend, key),
        lambda: backend.get_bytes(key),
        lambda: backend.delete(key),
        lambda: backend.get_versioned(key),
        lambda: backend.put_bytes(key, b"x"),
        lambda: backend.put_bytes(key, b"x", if_version=""),
        lambda: backend.put_file(key, path),
    ]


def content(length: int) -> bytes:
    return bytes(range(251)) * (length // 251) + bytes(length % 251)


# --- 1, 14: round trips -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 8 * MIB + 1])
async def test_a_file_comes_back_as_it_was_put(backend, file, length) -> None:
    await backend.put_file(KEY, file(content(length)))

    assert await backend.stat(KEY) == ObjectStat(KEY, length)
    assert await read(backend, KEY) == content(length)


@pytest.mark.parametrize("length", [0, 1, 100_000])
async def test_bytes_come_back_as_they_were_put(backend, length) -> None:
    await backend.put_bytes(KEY, content(length))

    assert await backend.get_bytes(KEY) == content(length)
    assert await backend.stat(KEY) == ObjectStat(KEY, length)


async def test_reads_of_a_version_never_give_another_content(backend) -> None:
    await backend.put_bytes(KEY, b"first content")
    found = await backend.stat(KEY)
    assert found.version
    async with backend.open(KEY, start=2, stop=5, version=found.version) as chunks:
        assert b"".join([chunk async for chunk in chunks]) == b"rst"

    await backend.put_bytes(KEY, b"other content")

    with pytest.raises(ObjectReplaced):
        async with backend.open(KEY, start=2, stop=5, version=found.version) as chunks:
            pass
    assert (await backend.stat(KEY)).version != found.version


async def test_objects_are_seen_by_every_client(backend, harness) -> None:
    await backend.put_bytes(KEY, b"shared")
    other = await harness.open()

    assert await other.get_bytes(KEY) == b"shared"
    assert other.name == backend.name


async def test_small_reads_are_bounded(backend) -> None:
    await backend.put_bytes(KEY, bytes(100))

    assert await backend.get_bytes(KEY, limit=100) == bytes(100)
    with pytest.raises(BackendUnavailable) as caught:
        await backend.get_bytes(KEY, limit=99)
    assert (caught.value.backend, caught.value.key) == (backend.name, KEY)
    assert "100 bytes" in caught.value.reason


# --- 2, 3, 4, 15: nothing is visible before it is whole -----------------------------------------


async def test_a_cancelled_put_leaves_nothing(backend, harness, file) -> None:
    path = file(bytes(256 * MIB))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.put_file, KEY, path)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert await all_keys(backend) == []
    assert harness.leftovers() == []


async def test_a_cancelled_put_over_an_object_keeps_the_old_one(backend, file) -> None:
    await backend.put_bytes(KEY, b"old")
    path = file(bytes(256 * MIB))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.put_file, KEY, path)
        await trio.testing.wait_all_tasks_blocked()
        assert await backend.get_bytes(KEY) == b"old"
        nursery.cancel_scope.cancel()

    assert await backend.get_bytes(KEY) == b"old"


async def test_reading_can_be_cancelled_between_chunks(backend, file) -> None:
    await backend.put_file(KEY, file(bytes(4 * MIB)))
    received = []

    with trio.CancelScope() as scope:
        async with backend.open(KEY) as chunks:
            async for chunk in chunks:
                received.append(chunk)
                scope.cancel()

    assert scope.cancelled_caught
    assert len(received) == 1


async def test_a_file_that_is_not_there_cannot_be_put(backend, tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        await backend.put_file(KEY, tmp_path / "missing")

    assert await all_keys(backend) == []


# --- 7, 8: replacing ----------------------------------------------------------------------------


async def test_putting_again_replaces_the_object(backend, file) -> None:
    await backend.put_bytes(KEY, b"a long first version")
    await backend.put_file(KEY, file(b"second"))
    assert await read(backend, KEY) == b"second"

    await backend.put_bytes(KEY, b"")
    assert await read(backend, KEY) == b""
    assert await all_keys(backend) == [KEY]


async def test_writers_of_one_key_at_once_all_succeed_and_one_stays(backend) -> None:
    versions = [bytes([number]) * 100_000 for number in range(8)]

    async with trio.open_nursery() as nursery:
        for version in versions:
            nursery.start_soon(backend.put_bytes, KEY, version)

    assert await backend.get_bytes(KEY) in versions
    assert await all_keys(backend) == [KEY]


# --- conditional puts ---------------------------------------------------------------------------


async def test_a_put_on_a_condition_happens_if_it_holds(backend) -> None:
    await backend.put_bytes(KEY, b"first", if_version="")
    data, version = await backend.get_versioned(KEY)
    assert data == b"first"

    await backend.put_bytes(KEY, b"second", if_version=version)

    data, later = await backend.get_versioned(KEY)
    assert data == b"second"
    assert later != version


async def test_a_put_on_a_condition_that_does_not_hold_changes_nothing(backend) -> None:
    await backend.put_bytes(KEY, b"first")
    _, version = await backend.get_versioned(KEY)
    await backend.put_bytes(KEY, b"second")

    for condition in (version, ""):
        with pytest.raises(ObjectReplaced) as caught:
            await backend.put_bytes(KEY, b"third", if_version=condition)
        assert caught.value.key == KEY
    assert await backend.get_bytes(KEY) == b"second"

    await backend.delete(KEY)
    with pytest.raises(ObjectReplaced):
        await backend.put_bytes(KEY, b"third", if_version=version)
    assert await all_keys(backend) == []


async def test_versioned_reads_are_bounded(backend) -> None:
    await backend.put_bytes(KEY, bytes(100))

    with pytest.raises(BackendUnavailable, match="100 bytes"):
        await backend.get_versioned(KEY, limit=99)
    with pytest.raises(ObjectNotFound):
        await backend.get_versioned(f"{KEY}-other")


async def test_of_several_that_change_one_object_none_is_lost(backend, harness) -> None:
    """Each adds a line of its own to what it has read."""

    async def add(client: Backend, name: str) -> None:
        for number in range(3):
            done = False
            while not done:
                try:
                    data, version = await client.get_versioned(KEY)
                except ObjectNotFound:
                    data, version = b"", ""
                try:
                    await client.put_bytes(
                        KEY, data + f"{name}{number}\n".encode(), if_version=version
                    )
                except ObjectReplaced:
                    continue
                done = True

    async with trio.open_nursery() as nursery:
        for name in "abcd":
            nursery.start_soon(add, await harness.open(), name)

    lines = (await backend.get_bytes(KEY)).decode().splitlines()
    assert sorted(lines) == [f"{name}{number}" for name in "abcd" for number in range(3)]


async def test_a_reader_never_sees_two_versions_mixed(backend, file) -> None:
    old, new = b"\1" * (4 * MIB), b"\2" * (4 * MIB)
    await backend.put_bytes(KEY, old)

    async with backend.open(KEY) as chunks:
        first = await anext(chunks)
        await backend.put_file(KEY, file(new))
        try:
            rest = [chunk async for chunk in chunks]
        except BackendUnavailable:
            rest = None

    assert rest is None or b"".join([first, *rest]) == old
    assert await read(backend, KEY) == new


# --- 9: ranges ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, None),
        (0, 1),
        (5, 5),
        (MIB - 1, MIB + 1),
        (0, 3 * MIB + 7),
        (3 * MIB + 6, None),
        (3 * MIB + 6, 3 * MIB + 7),
        (3 * MIB + 7, None),
        (3 * MIB + 7, 3 * MIB + 7),
        (3 * MIB + 7, 10**12),
        (10, 10**12),
    ],
)
async def test_a_range_gives_its_bytes(backend, start, stop) -> None:
    data = content(3 * MIB + 7)
    await backend.put_bytes(KEY, data)

    assert await read(backend, KEY, start, stop) == data[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(11, None), (-1, None), (-1, 5), (5, 4), (11, 12)])
async def test_a_range_outside_the_object_is_an_error(backend, start, stop) -> None:
    await backend.put_bytes(KEY, bytes(10))

    with pytest.raises(InvalidRange) as caught:
        await read(backend, KEY, start, stop)

    error = caught.value
    assert (error.key, error.length, error.start, error.stop) == (KEY, 10, start, stop)
    assert KEY in str(error)


# --- 10, 11, 12: missing and deleted objects, many readers ----------------------------------------


async def test_a_missing_object_is_named_in_every_error(backend, file) -> None:
    looking, reading, getting, deleting, *_ = every_operation(backend, file(b""))

    for operation in (looking, reading, getting, deleting):
        with pytest.raises(ObjectNotFound) as caught:
            await operation()
        assert (caught.value.backend, caught.value.key) == (backend.name, KEY)
        assert str(caught.value) == f"backend {backend.name} has no object {KEY}"


async def test_a_deleted_object_is_gone_and_others_stay(backend) -> None:
    await backend.put_bytes("a/b/c", b"1")
    await backend.put_bytes("a/b/d", b"2")

    await backend.delete("a/b/c")

    with pytest.raises(ObjectNotFound):
        await backend.delete("a/b/c")
    assert await all_keys(backend) == ["a/b/d"]
    assert await backend.get_bytes("a/b/d") == b"2"


async def test_deleting_during_a_read_never_gives_short_data(backend) -> None:
    data = content(4 * MIB)
    await backend.put_bytes(KEY, data)

    async with backend.open(KEY) as chunks:
        first = await anext(chunks)
        await backend.delete(KEY)
        try:
            rest = [chunk async for chunk in chunks]
        except (ObjectNotFound, BackendUnavailable):
            rest = None

    assert rest is None or b"".join([first, *rest]) == data


async def test_many_readers_at_once_get_the_same(backend) -> None:
    data = content(3 * MIB)
    await backend.put_bytes(KEY, data)
    same = []

    async def one_reader() -> None:
        same.append(await read(backend, KEY) == data)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(one_reader)

    assert same == [True] * 16


async def test_puts_and_deletes_of_neighbours_do_not_disturb_one_another(backend) -> None:
    async def come_and_go(name: str) -> None:
        for _ in range(30):
            await backend.put_bytes(f"deep/er/{name}", name.encode())
            assert await backend.get_bytes(f"deep/er/{name}") == name.encode()
            await backend.delete(f"deep/er/{name}")

    async with trio.open_nursery() as nursery:
        for name in "abcd":
            nursery.start_soon(come_and_go, name)

    assert await all_keys(backend) == []


# --- 13: listing ----------------------------------------------------------------------------------

ORDERED = ["a", "a!", "a-b/x", "a.d/x", "a/b", "a/b/c", "a/c", "a0", "b", "é/x", "é0", "日本", "😀"]


async def test_keys_are_listed_in_the_order_of_their_bytes(backend, harness) -> None:
    expected = harness.listable(ORDERED)
    for key in reversed(expected):
        await backend.put_bytes(key, key.encode())

    for limit in (1, 2, 3, len(expected), 1000):
        assert await all_keys(backend, limit=limit) == expected
    for key in expected:
        assert await backend.get_bytes(key) == key.encode()


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "a/b/", "a.", "é", "z", "a/b/c", "b/"])
async def test_a_prefix_need_not_end_at_a_segment(backend, harness, prefix) -> None:
    keys = harness.listable(ORDERED)
    for key in keys:
        await backend.put_bytes(key, b"")

    expected = [key for key in keys if key.startswith(prefix)]
    assert await all_keys(backend, prefix) == expected
    assert await all_keys(backend, prefix, limit=1) == expected


async def test_a_page_begins_after_any_text_and_says_whether_more_follow(backend, harness) -> None:
    for key in harness.listable(ORDERED):
        await backend.put_bytes(key, b"")

    page = await backend.list(after="a/b", limit=2)
    assert (page.keys, page.more) == (("a/b/c", "a/c"), True)
    page = await backend.list(after="a/b/", limit=1)
    assert page.keys == ("a/b/c",)
    page = await backend.list(after="日本", limit=1)
    assert (page.keys, page.more) == (("😀",), False)
    page = await backend.list(after="😀")
    assert (page.keys, page.more) == ((), False)
    with pytest.raises(ValueError):
        await backend.list(limit=0)


async def test_one_key_may_be_the_beginning_of_another(backend) -> None:
    keys = ["a", "a/b", "a/b/c"]
    for key in keys:
        await backend.put_bytes(key, key.encode())

    for key in keys:
        assert await backend.get_bytes(key) == key.encode()
    for key in keys:
        # The others stay, whichever goes; some are listed only now.
        await backend.delete(key)
        for other in keys[keys.index(key) + 1 :]:
            assert (await backend.stat(other)).length == len(other)


async def test_a_listing_goes_on_while_objects_are_deleted(backend) -> None:
    keys = [f"d{number % 3}/{number:03}" for number in range(60)]
    for key in keys:
        await backend.put_bytes(key, b"")

    first = await backend.list(limit=10)
    for key in first.keys:
        await backend.delete(key)
    rest = []
    page = first
    while page.more:
        page = await backend.list(after=page.keys[-1], limit=10)
        rest += page.keys

    assert sorted([*first.keys, *rest]) == sorted(keys)


segments = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=6
).filter(lambda segment: segment not in {".", ".."})
keys_of_segments = st.lists(segments, min_size=1, max_size=3).map("/".join)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(keys=st.sets(keys_of_segments, max_size=8), prefix=keys_of_segments, after=keys_of_segments)
async def test_any_keys_are_kept_apart_and_listed_in_order(
    backend, harness, keys, prefix, after
) -> None:
    keys = harness.listable(keys)
    for key in keys:
        await backend.put_bytes(key, key.encode())

    for key in keys:
        assert await backend.get_bytes(key) == key.encode()
    assert await all_keys(backend) == keys
    assert await all_keys(backend, prefix) == [key for key in keys if key.startswith(prefix)]
    page = await backend.list(after=after)
    assert list(page.keys) == [key for key in keys if key.encode() > after.encode()]
    for key in keys:
        await backend.delete(key)


# --- 16: failures ---------------------------------------------------------------------------------


async def test_a_failing_backend_is_named_in_every_error_and_recovers(
    backend, harness, file
) -> None:
    path = file(b"content")
    await backend.put_bytes(KEY, b"kept")

    with harness.failing():
        for operation in every_operation(backend, path):
            with pytest.raises(BackendUnavailable) as caught:
                await operation()
            assert (caught.value.backend, caught.value.key) == (backend.name, KEY)
            assert f"backend {backend.name} failed on {KEY}" in str(caught.value)
        with pytest.raises(BackendUnavailable):
            await backend.list()

    assert await backend.get_bytes(KEY) == b"kept"


# --- keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/../b",
        "../a",
        "a/./b",
        "a\0b",
        "a/\0",
        "x" * (SEGMENT_BYTES_MAX + 1),
        "é" * (SEGMENT_BYTES_MAX // 2 + 1),
        "a/" * (KEY_BYTES_MAX // 2) + "a",
        "\ud800",
    ],
)
async def test_a_malformed_key_is_refused_by_every_operation(backend, file, key) -> None:
    for operation in every_operation(backend, file(b"content"), key):
        with pytest.raises(ValueError):
            await operation()


@pytest.mark.parametrize(
    "key",
    [
        "x" * SEGMENT_BYTES_MAX,
        "a/" * (KEY_BYTES_MAX // 2 - 1) + "ab",
        "...",
        ".a",
        "a b",
        "-",
        "%2e",
    ],
)
async def test_a_key_at_the_bounds_is_kept(backend, key) -> None:
    assert check_key(key) == key
    await backend.put_bytes(key, b"x")

    assert await all_keys(backend) == [key]


def test_the_key_of_a_blob_is_well_formed() -> None:
    for algorithm in ("sha256", "sha512"):
        digest = Digest.of(b"", algorithm)
        key = check_key(blob_key(digest))
        assert key == f"blobs/{algorithm}/{digest.hex[:2]}/{digest.hex}"


def test_every_error_of_a_backend_is_one_of_ours() -> None:
    for error in (ObjectNotFound, InvalidRange, BackendUnavailable):
        assert issubclass(error, SwarmpullError)
