"""What a tag is, and was: stamps, history, and changes that come from other clusters."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    ManifestNotFound,
    PushRefused,
    RepositoryNotFound,
    TagChanged,
    TagImmutable,
)
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_objects import MANIFESTS
from swarmpull.roles.tag_log import CHANGES_MAX, LOG_BYTES_MAX, TagLog, pack_log, unpack_log
from swarmpull.store.backends import Backend, open_backend
from swarmpull.wire.api import (
    DeleteTagRequest,
    Descriptor,
    PendingChange,
    RecordManifestRequest,
    Stamp,
    TagChange,
)

# An hour ahead.
FAR = time.time_ns() + 3600 * 10**9


def digest(number: int) -> Digest:
    return Digest.of(f"manifest {number}".encode())


def put(number: int, tag: str = "v1", **fields: object) -> RecordManifestRequest:
    manifest = Descriptor(digest(number), "type", number)
    return RecordManifestRequest("app", manifest, tag, **fields)  # type: ignore[arg-type]


def delete(tag: str = "v1", **fields: object) -> DeleteTagRequest:
    return DeleteTagRequest("app", tag, **fields)  # type: ignore[arg-type]


@pytest.fixture
async def backend(tmp_path: Path) -> Backend:
    return await open_backend((tmp_path / "backend").as_uri())


@pytest.fixture
async def catalog(backend: Backend) -> Catalog:
    return Catalog(backend, "index1")


async def digests(catalog: Catalog, tag: str = "v1") -> list[Digest | None]:
    return [change.digest for change in (await catalog.tag_log("app", tag)).changes]


async def tags(catalog: Catalog) -> tuple[str, ...]:
    return (await catalog.list_tags("app", "", 100)).names


@attrs.define
class Watching:
    """Keeps what it is told."""

    catalog: Catalog
    told: list[object] = attrs.Factory(list)
    refuses: bool = False

    async def changing(self, repository: str, tag: str, change: TagChange) -> None:
        known = await self.catalog.tags.log(repository, tag)
        assert known.latest != change, "before it is made"
        if self.refuses:
            raise PushRefused("not now")
        self.told.append(("changing", repository, tag, change))

    async def changed(self, repository: str, tag: str, change: TagChange) -> None:
        assert (await self.catalog.tags.log(repository, tag)).latest == change
        self.told.append(("changed", repository, tag, change))


# --- history ----------------------------------------------------------------------------------


async def test_history_has_every_change_with_time_and_source(catalog, backend):
    await catalog.record_manifest(put(1, by="alice"))
    await Catalog(backend, "index2").record_manifest(put(2, by="bob"))
    await catalog.delete_tag(delete(by="carol"))
    await catalog.record_manifest(put(1))

    changes = (await catalog.tag_log("app", "v1")).changes
    assert [change.digest for change in changes] == [digest(1), digest(2), None, digest(1)]
    assert [change.by for change in changes] == ["alice", "bob", "carol", ""]
    assert [change.stamp.source for change in changes] == ["index1", "index2", "index1", "index1"]
    times = [change.stamp.time for change in changes]
    assert times == sorted(set(times))


async def test_the_history_of_a_deleted_tag_stays(catalog):
    await catalog.record_manifest(put(1))
    await catalog.delete_tag(delete())

    assert await digests(catalog) == [digest(1), None]
    assert await tags(catalog) == ()
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("app", "v1")
    with pytest.raises(ManifestNotFound):
        await catalog.delete_tag(delete())


async def test_a_deleted_manifest_is_in_the_history_of_its_tags(catalog):
    await catalog.record_manifest(put(1))
    await catalog.record_manifest(put(2, "v2"))
    await catalog.delete_manifest("app", digest(1), by="alice")

    assert await digests(catalog) == [digest(1), None]
    assert (await catalog.tag_log("app", "v1")).changes[-1].by == "alice"
    assert await digests(catalog, "v2") == [digest(2)]


async def test_a_put_of_what_the_tag_is_changes_nothing(catalog):
    await catalog.record_manifest(put(1))
    before = await catalog.tag_log("app", "v1")
    watching = Watching(catalog)
    catalog.tags.watchers.append(watching)

    await catalog.record_manifest(put(1))

    assert await catalog.tag_log("app", "v1") == before
    assert watching.told == []


async def test_only_the_last_changes_are_kept(catalog):
    for number in range(CHANGES_MAX + 3):
        await catalog.record_manifest(put(number))

    assert await digests(catalog) == [digest(number) for number in range(3, CHANGES_MAX + 3)]
    assert (await catalog.resolve("app", "v1")).digest == digest(CHANGES_MAX + 2)


async def test_what_never_was_has_no_history(catalog):
    with pytest.raises(RepositoryNotFound):
        await catalog.tag_log("app", "v1")
    await catalog.record_manifest(put(1))
    for tag in ("v2", "../v1", str(digest(1))):
        with pytest.raises(ManifestNotFound):
            await catalog.tag_log("app", tag)


async def test_tags_of_former_versions_are_read_moved_and_deleted(catalog, backend):
    for tag in ("v1", "v2", "v3"):
        await catalog.record_manifest(put(1, tag))
        await backend.delete(f"repositories/app/_changes/{tag}")
        content = json.dumps({"digest": str(digest(1)), "changed_at": 1000.5}).encode()
        await backend.put_bytes(f"repositories/app/_tags/{tag}", content)

    assert (await catalog.resolve("app", "v1")).digest == digest(1)
    (change,) = (await catalog.tag_log("app", "v1")).changes
    assert change == TagChange(Stamp(1_000_500_000_000, ""), digest(1), "")
    await catalog.record_manifest(put(2, "v1"))
    assert await digests(catalog) == [digest(1), digest(2)]
    await catalog.delete_tag(delete("v2"))
    assert await digests(catalog, "v2") == [digest(1), None]
    await catalog.delete_manifest("app", digest(1))
    assert await tags(catalog) == ("v1",)


async def test_a_put_that_was_cut_off_before_the_listing_is_made_whole(catalog, backend):
    await catalog.record_manifest(put(1))
    await backend.delete("repositories/app/_tags/v1")

    await catalog.record_manifest(put(1))
    assert await tags(catalog) == ("v1",)

    await catalog.delete_tag(delete())
    await backend.put_bytes("repositories/app/_tags/v1", b"{}")
    with pytest.raises(ManifestNotFound):
        await catalog.delete_tag(delete())
    assert await tags(catalog) == ()


# --- changes of other clusters ----------------------------------------------------------------


async def test_a_change_with_a_stamp_counts_only_if_it_is_later(catalog):
    await catalog.record_manifest(put(1, stamp=Stamp(100, "b")))

    await catalog.record_manifest(put(2, stamp=Stamp(99, "z")))
    await catalog.record_manifest(put(3, stamp=Stamp(100, "a")))
    assert (await catalog.resolve("app", "v1")).digest == digest(1)
    await catalog.record_manifest(put(4, stamp=Stamp(100, "c")))
    assert (await catalog.resolve("app", "v1")).digest == digest(4)
    await catalog.delete_tag(delete(stamp=Stamp(98, "z")))
    assert (await catalog.resolve("app", "v1")).digest == digest(4)

    assert await digests(catalog) == [None, digest(2), digest(3), digest(1), digest(4)]


async def test_a_deletion_that_comes_before_the_earlier_put_counts(catalog):
    await catalog.delete_tag(delete(stamp=Stamp(100, "b")))
    await catalog.record_manifest(put(1, stamp=Stamp(50, "b")))

    with pytest.raises(ManifestNotFound):
        await catalog.resolve("app", "v1")
    assert await tags(catalog) == ()


async def test_a_stamp_more_than_a_day_ahead_is_refused(catalog):
    await catalog.record_manifest(put(1))
    for time_ns in (time.time_ns() + 2 * 86_400 * 10**9, 1 << 63):
        with pytest.raises(PushRefused, match="more than a day ahead"):
            await catalog.record_manifest(put(2, stamp=Stamp(time_ns, "z")))
        with pytest.raises(PushRefused, match="more than a day ahead"):
            await catalog.delete_tag(delete(stamp=Stamp(time_ns, "z")))
    assert (await catalog.resolve("app", "v1")).digest == digest(1)


async def test_a_change_made_here_is_later_than_whatever_came_from_a_clock_that_is_ahead(catalog):
    await catalog.record_manifest(put(1, stamp=Stamp(FAR, "z")))
    await catalog.record_manifest(put(2))

    assert (await catalog.resolve("app", "v1")).digest == digest(2)
    assert (await catalog.tag_log("app", "v1")).changes[-1].stamp == Stamp(FAR + 1, "index1")


async def test_a_later_put_of_the_same_manifest_has_the_later_stamp(catalog):
    """Or a third change, between the two, would win in one cluster and lose in another."""
    await catalog.record_manifest(put(1, stamp=Stamp(100, "a")))
    await catalog.record_manifest(put(1, stamp=Stamp(200, "b")))
    await catalog.record_manifest(put(2, stamp=Stamp(150, "c")))

    assert (await catalog.resolve("app", "v1")).digest == digest(1)


changes = st.builds(
    TagChange,
    st.builds(Stamp, st.integers(0, 60), st.sampled_from("ab")),
    st.one_of(st.none(), st.integers(0, 3).map(digest)),
)


@given(st.lists(changes, max_size=80), st.randoms(use_true_random=False))
def test_the_order_in_which_changes_arrive_does_not_matter(made, random):
    first, second = TagLog(), TagLog()
    for change in made:
        first = first.with_change(change)
    random.shuffle(made)
    for change in made:
        second = second.with_change(change)

    assert first == second
    assert len(first.changes) <= CHANGES_MAX
    if first.changes:
        assert unpack_log(pack_log(first)) == first


def test_the_longest_log_fits_its_bound():
    name = "\u20ac" * 160
    log = TagLog()
    for number in range(CHANGES_MAX):
        sha512 = Digest.of(b"x", "sha512")
        log = log.with_change(TagChange(Stamp((1 << 63) - number - 1, name), sha512, name))

    assert len(log.changes) == CHANGES_MAX
    assert len(pack_log(log)) <= LOG_BYTES_MAX


# --- several processes ------------------------------------------------------------------------


@attrs.define
class Slow:
    """Gives way before every change, so that others come in between."""

    inner: Backend

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        await trio.lowlevel.checkpoint()
        await self.inner.put_bytes(key, data, if_version=if_version)


async def test_of_concurrent_puts_at_several_indexes_one_wins_and_none_is_lost(tmp_path):
    url = (tmp_path / "backend").as_uri()
    catalogs = [Catalog(Slow(await open_backend(url)), f"index{n}") for n in range(3)]
    async with trio.open_nursery() as nursery:
        for number in range(18):
            nursery.start_soon(catalogs[number % 3].record_manifest, put(number))

    history = await digests(catalogs[0])
    assert sorted(history, key=str) == sorted(map(digest, range(18)), key=str)
    for catalog in catalogs:
        assert (await catalog.resolve("app", "v1")).digest == history[-1]
        assert await tags(catalog) == ("v1",)


async def test_the_listing_agrees_with_the_tag_after_concurrent_puts_and_deletes(tmp_path):
    url = (tmp_path / "backend").as_uri()
    catalogs = [Catalog(Slow(await open_backend(url)), f"index{n}") for n in range(2)]

    async def put_and_delete(catalog: Catalog, number: int) -> None:
        for turn in range(4):
            await catalog.record_manifest(put(2 * turn + number))
            with suppress(ManifestNotFound):
                await catalog.delete_tag(delete())

    for turn in range(4):
        async with trio.open_nursery() as nursery:
            for number, catalog in enumerate(catalogs):
                nursery.start_soon(put_and_delete, catalog, number)
            if turn % 2:
                nursery.start_soon(catalogs[0].record_manifest, put(99))
        is_there = (await catalogs[0].tags.log("app", "v1")).digest is not None
        assert await tags(catalogs[1]) == (("v1",) if is_there else ())


# --- watchers ---------------------------------------------------------------------------------


async def test_a_watcher_knows_of_a_change_before_it_is_made_and_before_it_is_acknowledged(catalog):
    watching = Watching(catalog)
    catalog.tags.watchers.append(watching)

    await catalog.record_manifest(put(1, by="alice"))
    await catalog.delete_tag(delete())
    await catalog.record_manifest(put(2, stamp=Stamp(5, "z")))  # too late to count

    made = (await catalog.tag_log("app", "v1")).changes[1:]
    expected = [(when, "app", "v1", change) for change in made for when in ("changing", "changed")]
    assert watching.told == expected


async def test_a_change_that_a_watcher_refuses_is_not_made(catalog):
    catalog.tags.watchers.append(Watching(catalog, refuses=True))

    with pytest.raises(PushRefused, match="not now"):
        await catalog.record_manifest(put(1))

    assert await tags(catalog) == ()


async def test_watchers_know_of_a_manifest_that_refers_to_another_one_and_has_no_tag(catalog):
    told = []

    class Looking:
        """Says no to the first one."""

        async def changing(self, repository: str, tag: str, change: TagChange) -> None:
            with pytest.raises((ManifestNotFound, RepositoryNotFound)):
                await catalog.resolve(repository, tag)
            told.append(("changing", tag, change.digest, change.by))
            if len(told) == 1:
                raise PushRefused("not now")

        async def changed(self, repository: str, tag: str, change: TagChange) -> None:
            referrers = await catalog.list_referrers(repository, digest(9))
            assert change.digest in [each.digest for each in referrers]
            told.append(("changed", tag, change.digest, change.by))

    catalog.tags.watchers.append(Looking())
    signature = attrs.evolve(put(1, by="alice", subject=digest(9)), tag=None)
    with pytest.raises(PushRefused, match="not now"):
        await catalog.record_manifest(signature)
    assert await catalog.list_referrers("app", digest(9)) == ()
    await catalog.record_manifest(signature)
    # Neither does this one refer to anything.
    await catalog.record_manifest(attrs.evolve(put(2), tag=None))

    expected = (str(digest(1)), digest(1), "alice")
    assert told == [(when, *expected) for when in ("changing", "changing", "changed")]


async def test_what_refers_to_a_manifest_that_waits_for_the_backend_waits_too(catalog, monkeypatch):
    await catalog.record_manifest(attrs.evolve(put(1, subject=digest(9)), tag=None))
    assert await catalog.referrers_to_send("app", digest(9)) == (digest(1),)

    async def is_down(prefix: str, **_: object) -> object:
        raise BackendUnavailable("backend", prefix, "down")

    monkeypatch.setattr(catalog._backend, "list", is_down)
    with pytest.raises(BackendUnavailable):
        await catalog.referrers_to_send("app", digest(9))
    catalog.pending.add(PendingChange(manifest=put(9, stamp=Stamp(1, "x")), at=1))
    assert await catalog.referrers_to_send("app", digest(9)) == ()


async def test_a_tag_that_others_make_and_delete_for_ever_is_given_up(catalog, monkeypatch):
    number = 0

    async def flickering(_repository: str, _tag: str) -> TagLog:
        nonlocal number
        number += 1
        change = TagChange(
            Stamp(number, "x"), digest(number) if number > 2 and number % 2 else None
        )
        return TagLog((change,))

    async def flickering_read(repository: str, tag: str) -> tuple[TagLog, str]:
        return await flickering(repository, tag), ""

    monkeypatch.setattr(catalog.tags, "_read", flickering_read)
    with pytest.raises(BackendUnavailable, match="again and again"):
        await catalog.tags.put(
            "app", "v1", Descriptor(digest(0), "type", 0), stamp=Stamp(FAR, "x"), by=""
        )


# --- conditions, immutable repositories -------------------------------------------------------


async def test_a_put_on_a_condition_happens_if_the_tag_is_that(catalog):
    await catalog.record_manifest(put(1, expect=""))
    await catalog.record_manifest(put(2, expect=str(digest(1))))
    await catalog.record_manifest(put(3, expect="*"))

    assert await digests(catalog) == [digest(1), digest(2), digest(3)]


@pytest.mark.parametrize("expect", ["", str(digest(9))])
async def test_a_change_on_a_condition_that_does_not_hold_changes_nothing(catalog, expect):
    await catalog.record_manifest(put(1))

    for change in (
        lambda: catalog.record_manifest(put(2, expect=expect)),
        lambda: catalog.delete_tag(delete(expect=expect)),
    ):
        with pytest.raises(TagChanged) as caught:
            await change()
        assert (caught.value.expected, caught.value.actual) == (expect, str(digest(1)))
    assert await digests(catalog) == [digest(1)]


async def test_a_tag_that_has_to_be_there_and_is_not(catalog):
    for expect in ("*", str(digest(1))):
        with pytest.raises(TagChanged) as caught:
            await catalog.record_manifest(put(1, expect=expect))
        assert caught.value.actual == ""
    assert await catalog.resolve("app", str(digest(1)))
    assert await tags(catalog) == ()


async def test_a_put_that_is_repeated_succeeds_on_its_condition(catalog):
    """The answer to the first may have been lost."""
    await catalog.record_manifest(put(1, expect=""))
    await catalog.record_manifest(put(1, expect=""))

    assert await digests(catalog) == [digest(1)]


async def test_of_puts_on_one_condition_one_happens(tmp_path):
    url = (tmp_path / "backend").as_uri()
    catalogs = [Catalog(Slow(await open_backend(url)), f"index{n}") for n in range(2)]
    happened = []

    async def create(catalog: Catalog, number: int) -> None:
        with suppress(TagChanged):
            await catalog.record_manifest(put(number, expect=""))
            happened.append(digest(number))

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(create, catalogs[number % 2], number)

    assert await digests(catalogs[0]) == happened
    assert len(happened) == 1


async def test_tags_of_an_immutable_repository_stay(backend):
    catalog = Catalog(backend, "index1", ("other", "ap*"))
    await catalog.record_manifest(put(1))
    await catalog.record_manifest(put(1))

    changes = [
        lambda: catalog.record_manifest(put(2)),
        lambda: catalog.record_manifest(put(2, stamp=Stamp(FAR, "z"))),
        lambda: catalog.delete_tag(delete()),
        lambda: catalog.delete_manifest("app", digest(1)),
    ]
    for change in changes:
        with pytest.raises(TagImmutable) as caught:
            await change()
        assert caught.value.digest == str(digest(1))
    assert await digests(catalog) == [digest(1)]
    assert (await catalog.resolve("app", "v1")).digest == digest(1)

    await catalog.record_manifest(put(2, "v2"))
    assert await tags(catalog) == ("v1", "v2")


async def test_a_deletion_that_is_refused_leaves_no_record(backend):
    catalog = Catalog(backend, "index1", ("ap*",), records_deletions=True)
    await catalog.record_manifest(put(1))
    with pytest.raises(TagImmutable):
        await catalog.delete_manifest("app", digest(1))
    # A journal would take what was acknowledged before it for deleted.
    assert not await catalog.deleted_at("app", MANIFESTS, digest(1))


async def test_other_repositories_are_not_immutable(backend):
    catalog = Catalog(backend, "index1", ("app/*", "ap"))
    await catalog.record_manifest(put(1))
    await catalog.record_manifest(put(2))

    assert (await catalog.resolve("app", "v1")).digest == digest(2)


# --- the manifest in the object of the tag ----------------------------------------------------


async def test_a_tag_is_resolved_with_one_read(catalog, backend, monkeypatch):
    described = Descriptor(digest(1), "type", 1, "artifact", {"key": "value"})
    await catalog.record_manifest(RecordManifestRequest("app", described, "v1"))
    read: list[str] = []
    get_bytes = type(backend).get_bytes

    async def noted(self, key, **more):
        read.append(key)
        return await get_bytes(self, key, **more)

    monkeypatch.setattr(type(backend), "get_bytes", noted)
    assert await catalog.resolve("app", "v1") == described
    assert read == ["repositories/app/_changes/v1"]
    await catalog.record_manifest(put(2))
    assert await catalog.resolve("app", "v1") == Descriptor(digest(2), "type", 2)
    # An older change that comes late is not what the tag is.
    await catalog.record_manifest(put(3, stamp=Stamp(1, "elsewhere")))
    assert await catalog.resolve("app", "v1") == Descriptor(digest(2), "type", 2)


async def test_a_tag_whose_object_lacks_its_manifest_is_resolved_with_two(catalog, backend):
    long = Descriptor(digest(1), "type", 1, None, {"key": "x" * 5000})
    await catalog.record_manifest(RecordManifestRequest("app", long, "v1"))
    assert await catalog.resolve("app", "v1") == long
    # As former versions wrote it.
    await catalog.record_manifest(put(2))
    fields = json.loads(await backend.get_bytes("repositories/app/_changes/v1"))
    del fields["manifest"]
    await backend.put_bytes("repositories/app/_changes/v1", json.dumps(fields).encode())
    assert await catalog.resolve("app", "v1") == Descriptor(digest(2), "type", 2)
