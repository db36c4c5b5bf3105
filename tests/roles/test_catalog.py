from __future__ import annotations

import time
from collections.abc import Callable
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
    BlobNotFound,
    ManifestInvalid,
    ManifestNotFound,
    ManifestReferencesMissing,
    PushRefused,
    RepositoryNotFound,
)
from swarmpull.registry.names import is_repository
from swarmpull.roles import catalog as catalog_module
from swarmpull.roles import catalog_objects
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_objects import UNSETTLED, unsettled_key
from swarmpull.roles.unsettled_tags import UnsettledTags
from swarmpull.store.backends import Backend, open_backend
from swarmpull.wire.api import DeleteTagRequest, Descriptor, RecordManifestRequest, Stamp, TagChange

MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG, LAYER = Digest.of(b"config"), Digest.of(b"layer")


def digest(number: int) -> Digest:
    return Digest.of(f"manifest {number}".encode())


def describe(number: int, **fields: object) -> Descriptor:
    return Descriptor(digest(number), MEDIA_TYPE, 100 + number, **fields)  # type: ignore[arg-type]


def request(
    number: int = 1, repository: str = "team/app", **fields: object
) -> RecordManifestRequest:
    manifest = fields.pop("manifest", None) or describe(number)
    return RecordManifestRequest(repository, manifest, **fields)  # type: ignore[arg-type]


@pytest.fixture
async def backend(tmp_path: Path) -> Backend:
    return await open_backend((tmp_path / "backend").as_uri())


@pytest.fixture
async def catalog(backend: Backend) -> Catalog:
    return Catalog(backend)


# --- tags and manifests -----------------------------------------------------------------------


async def test_a_recorded_manifest_is_found_by_tag_and_by_digest(catalog):
    await catalog.record_manifest(request(1, tag="v1"))

    assert await catalog.resolve("team/app", "v1") == describe(1)
    assert await catalog.resolve("team/app", str(digest(1))) == describe(1)


async def test_everything_is_found_by_another_process(catalog, backend):
    await catalog.link_blob("team/app", LAYER)
    await catalog.record_manifest(request(1, tag="v1", blobs=(LAYER,)))

    other = Catalog(backend)
    assert await other.resolve("team/app", "v1") == describe(1)
    assert await other.has_blob("team/app", LAYER)


async def test_a_manifest_without_a_tag_is_found_by_digest_only(catalog):
    await catalog.record_manifest(request(1))

    assert await catalog.resolve("team/app", str(digest(1))) == describe(1)
    assert (await catalog.list_tags("team/app", "", 10)).names == ()


async def test_a_tag_moves_and_the_former_manifest_stays(catalog):
    await catalog.record_manifest(request(1, tag="latest"))
    await catalog.record_manifest(request(2, tag="latest"))

    assert await catalog.resolve("team/app", "latest") == describe(2)
    assert await catalog.resolve("team/app", str(digest(1))) == describe(1)


@pytest.mark.parametrize("reference", ["v2", str(digest(9)), "sha256:short", "no/tag", ""])
async def test_an_unknown_reference_is_not_found(catalog, reference):
    await catalog.record_manifest(request(1, tag="v1"))

    with pytest.raises(ManifestNotFound) as caught:
        await catalog.resolve("team/app", reference)
    assert (caught.value.repository, caught.value.reference) == ("team/app", reference)


@pytest.mark.parametrize(
    "repository", ["team/ap", "team", "team/app/sub", "../team/app", "Team", "_tags", "", "a" * 251]
)
async def test_an_unknown_repository_is_said_to_be_unknown(catalog, repository):
    await catalog.record_manifest(request(1, tag="v1"))

    with pytest.raises(RepositoryNotFound):
        await catalog.resolve(repository, "v1")
    with pytest.raises(RepositoryNotFound):
        await catalog.resolve(repository, str(digest(1)))
    with pytest.raises(RepositoryNotFound):
        await catalog.list_tags(repository, "", 10)
    with pytest.raises(RepositoryNotFound):
        await catalog.delete_manifest(repository, digest(1))
    with pytest.raises(RepositoryNotFound):
        await catalog.delete_tag(DeleteTagRequest(repository, "v1"))
    with pytest.raises(BlobNotFound):
        await catalog.unlink_blob(repository, LAYER)
    assert not await catalog.has_blob(repository, LAYER)
    assert await catalog.list_referrers(repository, digest(1)) == ()


@pytest.mark.parametrize("repository", ["../x", "Team", "_tags", "", "a//b", "a" * 256, "a" * 251])
async def test_a_name_that_cannot_be_kept_is_refused(catalog, repository):
    with pytest.raises(PushRefused):
        await catalog.record_manifest(request(1, repository, tag="v1"))
    with pytest.raises(PushRefused):
        await catalog.link_blob(repository, LAYER)
    assert (await catalog.list_repositories("", 10)).names == ()


async def test_a_tag_outside_the_grammar_is_refused(catalog):
    with pytest.raises(ManifestInvalid, match="not a tag"):
        await catalog.record_manifest(request(1, tag="../v1"))
    assert (await catalog.list_repositories("", 10)).names == ()


async def test_repositories_whose_names_begin_with_one_another_are_apart(catalog):
    names = ["a", "a/b", "a/b/c", "a-b", "a/blobs", "a/tags"]
    for number, name in enumerate(names):
        await catalog.link_blob(name, LAYER)
        await catalog.record_manifest(request(number, name, tag=f"v{number}", blobs=(LAYER,)))

    for number, name in enumerate(names):
        assert (await catalog.list_tags(name, "", 10)).names == (f"v{number}",)
        assert await catalog.resolve(name, f"v{number}") == describe(number)
        with pytest.raises(ManifestNotFound):
            await catalog.resolve(name, str(digest(number + 1)))
    await catalog.delete_manifest("a", digest(0))
    assert await catalog.resolve("a/b", "v1") == describe(1)


@given(st.from_regex(r"[a-z0-9_./-]{1,40}", fullmatch=True).filter(is_repository))
def test_no_component_of_a_name_begins_with_an_underscore(name):
    """The keys of the catalog rely on it."""
    assert not any(component.startswith("_") for component in name.split("/"))


# --- references -------------------------------------------------------------------------------


async def test_all_that_is_missing_is_named_and_nothing_is_recorded(catalog):
    await catalog.link_blob("team/app", CONFIG)
    pushed = request(1, tag="v1", blobs=(CONFIG, LAYER, LAYER), manifests=(digest(7), digest(8)))

    with pytest.raises(ManifestReferencesMissing) as caught:
        await catalog.record_manifest(pushed)

    assert caught.value.missing == (str(LAYER), str(digest(7)), str(digest(8)))
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("team/app", "v1")
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("team/app", str(digest(1)))


async def test_references_can_be_checked_before(catalog):
    await catalog.link_blob("team/app", LAYER)
    await catalog.record_manifest(request(1))

    await catalog.check_references("team/app", (LAYER,), (digest(1),))
    with pytest.raises(ManifestReferencesMissing) as caught:
        await catalog.check_references("team/app", (LAYER, CONFIG), (digest(1),))
    assert caught.value.missing == (str(CONFIG),)


async def test_many_references_are_checked_in_their_order(catalog):
    blobs = tuple(Digest.of(bytes([n])) for n in range(100))
    for blob in blobs[::2]:
        await catalog.link_blob("team/app", blob)

    with pytest.raises(ManifestReferencesMissing) as caught:
        await catalog.check_references("team/app", blobs, ())
    assert caught.value.missing == tuple(map(str, blobs[1::2]))


async def test_lists_that_are_nested_too_deeply_are_refused(catalog):
    await catalog.record_manifest(request(0))
    for level in range(1, catalog_objects.LEVELS_MAX):
        await catalog.record_manifest(request(level, manifests=(digest(0), digest(level - 1))))
    deepest = catalog_objects.LEVELS_MAX - 1

    with pytest.raises(ManifestInvalid) as caught:
        await catalog.record_manifest(request(99, manifests=(digest(0), digest(deepest)), tag="v1"))
    for named in (digest(99), digest(deepest)):
        assert str(named) in str(caught.value)
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("team/app", "v1")


@pytest.mark.parametrize("fields", [{"manifests": (digest(1),)}, {"subject": digest(1)}])
async def test_a_manifest_that_refers_to_itself_is_refused(catalog, fields):
    await catalog.record_manifest(request(1))

    with pytest.raises(ManifestInvalid, match=f"{digest(1)} refers to itself"):
        await catalog.record_manifest(request(1, **fields))


async def test_an_artifact_of_an_unknown_type_is_recorded_as_any_other(catalog):
    manifest = Descriptor(digest(5), "application/vnd.example.unheard-of.v3+json", 7, "text/x")
    await catalog.record_manifest(request(5, manifest=manifest, tag="odd"))

    assert await catalog.resolve("team/app", "odd") == manifest


async def test_blobs_of_another_repository_do_not_count(catalog):
    await catalog.link_blob("other", LAYER)

    with pytest.raises(ManifestReferencesMissing):
        await catalog.record_manifest(request(1, blobs=(LAYER,)))


async def test_blobs_come_and_go(catalog):
    assert not await catalog.has_blob("team/app", LAYER)
    await catalog.link_blob("team/app", LAYER)
    await catalog.link_blob("team/app", LAYER)
    assert await catalog.has_blob("team/app", LAYER)

    await catalog.unlink_blob("team/app", LAYER)
    assert not await catalog.has_blob("team/app", LAYER)
    with pytest.raises(BlobNotFound):
        await catalog.unlink_blob("team/app", LAYER)


# --- deleting ---------------------------------------------------------------------------------


async def test_a_deleted_manifest_takes_its_tags_with_it(catalog):
    await catalog.record_manifest(request(1, tag="v1"))
    await catalog.record_manifest(request(1, tag="latest"))
    await catalog.record_manifest(request(2, tag="v2"))

    await catalog.delete_manifest("team/app", digest(1))

    assert (await catalog.list_tags("team/app", "", 10)).names == ("v2",)
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("team/app", str(digest(1)))
    with pytest.raises(ManifestNotFound):
        await catalog.delete_manifest("team/app", digest(1))


async def test_all_of_many_tags_are_removed(catalog):
    for number in range(40):
        await catalog.record_manifest(request(number % 2, tag=f"v{number:02}"))

    await catalog.delete_manifest("team/app", digest(0))

    names = (await catalog.list_tags("team/app", "", 100)).names
    assert names == tuple(f"v{number:02}" for number in range(1, 40, 2))


async def test_a_deleted_tag_leaves_the_manifest(catalog):
    await catalog.record_manifest(request(1, tag="v1"))

    await catalog.delete_tag(DeleteTagRequest("team/app", "v1"))

    assert await catalog.resolve("team/app", str(digest(1))) == describe(1)
    for tag in ("v1", "../v1", str(digest(1))):
        with pytest.raises(ManifestNotFound):
            await catalog.delete_tag(DeleteTagRequest("team/app", tag))


# --- listing ----------------------------------------------------------------------------------


async def test_tags_are_listed_in_byte_order_by_pages(catalog):
    tags = ["b", "a", "B", "a.1", "a-1", "10", "9", "_x"]
    for tag in tags:
        await catalog.record_manifest(request(1, tag=tag))
    ordered = tuple(sorted(tags, key=str.encode))

    first = await catalog.list_tags("team/app", "", 3)
    second = await catalog.list_tags("team/app", first.names[-1], 3)
    third = await catalog.list_tags("team/app", second.names[-1], 3)

    assert first.names + second.names + third.names == ordered
    assert (first.more, second.more, third.more) == (True, True, False)
    assert (await catalog.list_tags("team/app", "a0", 2)).names == ("b",)
    assert (await catalog.list_tags("team/app", "zzz", 2)).names == ()


async def test_repositories_are_listed_in_byte_order_by_pages(catalog):
    names = ["b", "a/b", "a", "a-b", "a/b/c", "ab", "a.b", "a0", "a__b", "a/0"]
    for name in names:
        await catalog.link_blob(name, LAYER)
    ordered = sorted(names, key=str.encode)

    listed: list[str] = []
    more = True
    while more:
        page = await catalog.list_repositories(listed[-1] if listed else "", 2)
        listed += page.names
        more = page.more

    assert listed == ordered


async def test_no_object_lies_below_another_where_minio_would_not_list_it(catalog, backend):
    for number, name in enumerate(["a", "a/b", "a/b/c"]):
        await catalog.link_blob(name, LAYER)
        await catalog.record_manifest(request(number, name, tag="v1", subject=digest(9)))

    keys = (await backend.list()).keys
    assert len(keys) >= 15
    assert not [key for key in keys for other in keys if key.startswith(f"{other}/")]


repositories = st.from_regex(r"[a-z0-9_./-]{1,12}", fullmatch=True).filter(is_repository)


@given(st.lists(repositories, min_size=2, max_size=2))
def test_markers_sort_as_the_repositories_do(names):
    first, second = sorted(names)

    assert catalog_objects.marker_name(first) <= catalog_objects.marker_name(second)
    assert catalog_objects.marked(catalog_objects.marker_name(first)) == first


async def test_an_empty_page_is_a_page(catalog):
    assert (await catalog.list_repositories("", 10)) == catalog_module.ListReply((), more=False)
    await catalog.record_manifest(request(1, tag="v1"))
    assert (await catalog.list_tags("team/app", "", 0)).names == ()
    assert (await catalog.list_tags("team/app", "", -5)).names == ()


async def test_a_page_is_bounded_whatever_was_asked_for(catalog, monkeypatch):
    monkeypatch.setattr(catalog_module, "PAGE_MAX", 3)
    for number in range(5):
        await catalog.record_manifest(request(1, tag=f"v{number}"))

    page = await catalog.list_tags("team/app", "", 1_000_000)
    assert (page.names, page.more) == (("v0", "v1", "v2"), True)


# --- referrers --------------------------------------------------------------------------------


async def test_referrers_are_listed_with_what_clients_filter_by(catalog):
    signature = describe(2, artifact_type="application/x.signature", annotations={"a": "ü"})
    await catalog.record_manifest(request(2, manifest=signature, subject=digest(1)))
    await catalog.record_manifest(request(3, subject=digest(1)))
    await catalog.record_manifest(request(4, subject=digest(5)))

    found = await catalog.list_referrers("team/app", digest(1))

    assert set(map(str, found)) == {str(signature), str(describe(3))}
    assert await catalog.list_referrers("team/app", digest(99)) == ()


async def test_a_deleted_referrer_is_listed_no_more(catalog):
    await catalog.record_manifest(request(2, subject=digest(1)))
    await catalog.delete_manifest("team/app", digest(2))

    assert await catalog.list_referrers("team/app", digest(1)) == ()


def stamped(at: int) -> RecordManifestRequest:
    """A put in another cluster of what refers to manifest 1."""
    return request(2, subject=digest(1), stamp=Stamp(at, "west"))


async def referring(catalog: Catalog) -> list[Digest]:
    return [each.digest for each in await catalog.list_referrers("team/app", digest(1))]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (2, 3, 1)])
async def test_of_puts_and_deletions_of_a_referrer_the_latest_counts(catalog, order):
    for at in order:
        if at == 2:
            await catalog.delete_referrer("team/app", digest(2), Stamp(2, "east"))
        else:
            await catalog.record_manifest(stamped(at))
    assert await referring(catalog) == [digest(2)]

    await catalog.delete_referrer("team/app", digest(2), Stamp(3, "east"))
    assert await referring(catalog) == [digest(2)]
    await catalog.delete_referrer("team/app", digest(2), Stamp(4, "east"))
    await catalog.record_manifest(stamped(4))
    assert await referring(catalog) == []
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("team/app", str(digest(2)))


async def test_what_is_done_to_a_referrer_here_is_later_than_what_is_known_of_it(catalog):
    ahead = time.time_ns() + 10**12
    await catalog.record_manifest(stamped(ahead))
    await catalog.delete_manifest("team/app", digest(2))
    await catalog.record_manifest(stamped(ahead))
    assert await referring(catalog) == []

    await catalog.record_manifest(request(2, subject=digest(1)))
    assert await referring(catalog) == [digest(2)]


async def test_a_deletion_elsewhere_takes_the_tags_that_are_older_and_no_others(catalog):
    for name, at in (("old", 10), ("new", 30)):
        await catalog.record_manifest(attrs.evolve(stamped(at), tag=name, stamp=Stamp(at, "west")))
        await catalog.delete_referrer("team/app", digest(2), Stamp(20, "east"))

    # What was moved to another manifest after the deletion, which is heard of later, stays so.
    assert (await catalog.tags.log("team/app", "old")).changes[-1].stamp == Stamp(20, "east")
    assert (await catalog.resolve("team/app", "new")).digest == digest(2)


async def test_another_cluster_deletes_referrers_and_no_images(catalog):
    await catalog.record_manifest(request(1, tag="v1"))
    with pytest.raises(PushRefused, match="refers to no other one"):
        await catalog.delete_referrer("team/app", digest(1), Stamp(time.time_ns(), "east"))
    with pytest.raises(PushRefused, match="more than a day ahead"):
        await catalog.delete_referrer("team/app", digest(2), Stamp(1 << 62, "east"))
    assert await catalog.resolve("team/app", "v1") == describe(1)


@pytest.mark.parametrize("changes", range(3))
async def test_a_deletion_elsewhere_that_was_cut_off_can_be_repeated(backend, changes):
    await Catalog(backend).record_manifest(stamped(1))
    with pytest.raises(BackendUnavailable):
        await Catalog(FaultyBackend(backend, changes)).delete_referrer(
            "team/app", digest(2), Stamp(2, "east")
        )

    await Catalog(backend).delete_referrer("team/app", digest(2), Stamp(2, "east"))
    with pytest.raises(ManifestNotFound):
        await Catalog(backend).resolve("team/app", str(digest(2)))
    assert not (await backend.list("repositories/team/app/_referrers/")).keys


async def test_a_referrer_that_a_former_version_put_is_older_than_any_deletion(catalog, backend):
    await catalog.record_manifest(request(2, subject=digest(1)))
    await backend.put_bytes(catalog_objects.referrer_key("team/app", digest(1), digest(2)), b"{}")

    change = await catalog.last_change_of_referrer("team/app", digest(2), Stamp(7, "here"))
    assert change == TagChange(Stamp(7, "here"), digest(2))
    # To a cluster that has deleted it, it does not come back.
    sent = await catalog.referrer_stamp("team/app", digest(1), digest(2))
    assert sent is not None
    assert sent.time == 1
    await catalog.delete_referrer("team/app", digest(2), Stamp(8, "east"))
    assert await referring(catalog) == []


async def test_a_subject_has_a_bounded_number_of_referrers(catalog, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 2)
    for number in (2, 3):
        await catalog.record_manifest(request(number, subject=digest(1)))

    with pytest.raises(PushRefused, match="2 referrers"):
        await catalog.record_manifest(request(4, subject=digest(1)))
    await catalog.record_manifest(request(3, subject=digest(1), tag="again"))
    assert len(await catalog.list_referrers("team/app", digest(1))) == 2


async def test_annotations_of_all_referrers_together_are_bounded(catalog, monkeypatch):
    monkeypatch.setattr(catalog_module, "ANNOTATION_BYTES_MAX", 100)
    for number in range(30):
        manifest = describe(number, annotations={"key": "x" * 27})
        await catalog.record_manifest(request(number, manifest=manifest, subject=digest(99)))

    found = await catalog.list_referrers("team/app", digest(99))

    assert len(found) == 30
    assert [bool(descriptor.annotations) for descriptor in found] == [True] * 3 + [False] * 27


async def test_an_entry_too_long_to_keep_is_refused(catalog):
    manifest = describe(1, annotations={"key": "x" * (6 << 20)})

    with pytest.raises(ManifestInvalid, match="too many to keep"):
        await catalog.record_manifest(request(1, manifest=manifest))


async def test_half_a_surrogate_pair_is_refused(catalog):
    manifest = describe(1, annotations={"key": "\ud800"})

    with pytest.raises(ManifestInvalid, match="Unicode"):
        await catalog.record_manifest(request(1, manifest=manifest))


# --- concurrency, crashes, faults -------------------------------------------------------------


@attrs.define
class FaultyBackend:
    """Passes everything on, and stops for good after a number of changes, as kill -9 would."""

    inner: Backend
    changes_left: int = 1 << 30
    before_change: Callable[[str], object] = lambda _key: None

    @property
    def name(self) -> str:
        return self.inner.name

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        self._count(key)
        await self.inner.put_bytes(key, data, if_version=if_version)

    async def delete(self, key: str) -> None:
        self._count(key)
        await self.inner.delete(key)

    def _count(self, key: str) -> None:
        self.before_change(key)
        if not self.changes_left:
            raise BackendUnavailable(self.name, key, "killed")
        self.changes_left -= 1


async def is_readable(catalog: Catalog) -> None:
    """Every tag resolves, every listed referrer too."""
    try:
        tags = (await catalog.list_tags("team/app", "", 100)).names
    except RepositoryNotFound:
        return
    for tag in tags:
        found = await catalog.resolve("team/app", tag)
        assert await catalog.resolve("team/app", str(found.digest)) == found
    for referrer in await catalog.list_referrers("team/app", digest(0)):
        assert await catalog.resolve("team/app", str(referrer.digest)) == referrer
    assert (await catalog.list_repositories("", 10)).names == ("team/app",)


async def is_settled(backend: Backend) -> None:
    """After two looks the tags that are listed are those that are there, and nothing is left to look at."""
    unsettled = UnsettledTags(backend, Catalog(backend))
    for _ in range(2):
        await unsettled.look()
    logs = {tag: await Catalog(backend).tags.log("team/app", tag) for tag in ("v1", "v2", "v3")}
    page = await backend.list("repositories/team/app/_tags/")
    listed = [key.rpartition("/")[2] for key in page.keys]
    assert listed == [tag for tag, log in logs.items() if log.digest is not None]
    assert (await backend.list(UNSETTLED)).keys == ()


async def change_repeatedly(catalog: Catalog) -> None:
    await catalog.link_blob("team/app", LAYER)
    await catalog.record_manifest(request(1, tag="v1", subject=digest(0), blobs=(LAYER,)))
    await catalog.record_manifest(request(2, tag="v1", subject=digest(0), blobs=(LAYER,)))
    await catalog.record_manifest(request(2, tag="v2", subject=digest(0)))
    await catalog.delete_manifest("team/app", digest(2))
    await catalog.record_manifest(request(1, tag="v3", subject=digest(0)))
    await catalog.delete_tag(DeleteTagRequest("team/app", "v3"))
    await catalog.unlink_blob("team/app", LAYER)


async def test_a_kill_between_any_two_changes_leaves_a_readable_state(tmp_path):
    changes = 0
    finished = False
    while not finished:
        inner = await open_backend((tmp_path / str(changes)).as_uri())
        try:
            await change_repeatedly(Catalog(FaultyBackend(inner, changes)))
        except BackendUnavailable:
            pass
        else:
            finished = True
        await is_readable(Catalog(inner))
        await is_settled(inner)
        await is_readable(Catalog(inner))
        # Whatever was cut off is made whole by doing it again.
        await Catalog(inner).link_blob("team/app", LAYER)
        await Catalog(inner).record_manifest(request(1, tag="again", subject=digest(0)))
        assert await Catalog(inner).resolve("team/app", "again") == describe(1)
        await is_readable(Catalog(inner))
        changes += 1

    assert changes > 12, "every step was cut off once"


@pytest.mark.parametrize("changes", range(4))
async def test_a_delete_that_was_cut_off_can_be_repeated(backend, changes):
    catalog = Catalog(backend)
    for tag in ("v1", "v2"):
        await catalog.record_manifest(request(1, tag=tag, subject=digest(0)))

    with pytest.raises(BackendUnavailable):
        await Catalog(FaultyBackend(backend, changes)).delete_manifest("team/app", digest(1))
    await catalog.delete_manifest("team/app", digest(1))

    assert (await catalog.list_tags("team/app", "", 10)).names == ()
    assert await catalog.list_referrers("team/app", digest(0)) == ()
    assert not (await backend.list("repositories/team/app/_referrers/")).keys
    with pytest.raises(ManifestNotFound):
        await catalog.resolve("team/app", str(digest(1)))


async def test_concurrent_puts_to_one_tag_are_made_one_after_the_other(backend):
    keys: list[str] = []
    catalog = Catalog(FaultyBackend(backend, before_change=keys.append))
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(catalog.record_manifest, request(number, tag="latest"))

    assert sum(key.endswith("_tags/latest") for key in keys) == 1
    changes = [key for key in keys if key.startswith("repositories/") and "_tags" not in key]
    assert len(changes) == 40
    assert all("_manifests" in key for key in changes[::2])
    assert all(key.endswith("_changes/latest") for key in changes[1::2])
    last = Digest.parse("sha256:" + changes[-2].rpartition("/")[2])
    assert (await catalog.resolve("team/app", "latest")).digest == last


async def test_a_delete_and_a_put_of_the_same_manifest_do_not_mix(backend):
    for _ in range(10):
        catalog = Catalog(backend)
        await catalog.record_manifest(request(1, tag="v1"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.delete_manifest, "team/app", digest(1))
            nursery.start_soon(catalog.record_manifest, request(1, tag="v2"))
        await is_readable(catalog)


async def test_locks_do_not_outlive_their_use(backend):
    catalog = Catalog(backend)
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(catalog.record_manifest, request(1, f"r{number % 3}", tag="v1"))
    with trio.move_on_after(0):
        await catalog.record_manifest(request(1, tag="v1"))

    assert not len(catalog._locks)


async def test_other_repositories_do_not_wait(backend):
    catalog = Catalog(backend)
    async with catalog._locks.hold("busy"):
        with trio.fail_after(30):
            await catalog.record_manifest(request(1, "free", tag="v1"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"digest": "x"}', b"\xff", b"3"])
async def test_a_damaged_object_is_a_fault_of_the_backend(catalog, backend, content):
    await catalog.record_manifest(request(1, tag="v1"))
    for kind in ("_changes", "_tags"):
        await backend.put_bytes(f"repositories/team/app/{kind}/v1", content)
        with pytest.raises(BackendUnavailable, match=rf"{kind}/v1.*damaged"):
            await catalog.resolve("team/app", "v1")
        await backend.delete(f"repositories/team/app/{kind}/v1")


async def test_a_backend_that_is_gone_is_not_an_empty_one(catalog, tmp_path):
    await catalog.record_manifest(request(1, tag="v1"))
    await catalog.check_backend()
    (tmp_path / "backend").rename(tmp_path / "elsewhere")

    with pytest.raises(BackendUnavailable):
        await catalog.resolve("team/app", "v1")
    with pytest.raises(BackendUnavailable):
        await catalog.record_manifest(request(2, tag="v2", blobs=(LAYER,)))
    with pytest.raises(BackendUnavailable):
        await catalog.check_backend()


@given(st.lists(st.integers(0, 40), max_size=40))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_work_on_many_objects_keeps_their_order_and_its_bound(items):
    running = 0

    async def double(item: int) -> int:
        nonlocal running
        running += 1
        assert running <= catalog_module.CONCURRENCY
        await trio.lowlevel.checkpoint()
        running -= 1
        return 2 * item

    assert trio.run(catalog_module._map, double, items) == [2 * item for item in items]


async def test_a_change_under_way_is_not_taken_for_one_that_was_cut_off(backend):
    catalog = Catalog(backend)
    await catalog.record_manifest(request(1, tag="v1"))
    unsettled = UnsettledTags(backend, catalog)
    key = unsettled_key("team/app", "v1", "somebody")
    await backend.put_bytes(key, b"{}")
    await backend.delete("repositories/team/app/_tags/v1")
    await unsettled.look()
    assert (await backend.list(UNSETTLED)).keys == (key,)
    await backend.put_bytes(UNSETTLED + "nonsense", b"{}")
    await unsettled.look()
    assert (await catalog.list_tags("team/app", "", 10)).names == ("v1",)
    assert (await backend.list(UNSETTLED)).keys == (UNSETTLED + "nonsense",)


async def test_a_tag_that_cannot_be_settled_does_not_hold_up_the_others(backend):
    catalog = Catalog(backend)
    for tag in ("damaged", "v1"):
        await catalog.record_manifest(request(1, tag=tag))
        await backend.put_bytes(unsettled_key("team/app", tag, "somebody"), b"{}")
        await backend.delete(f"repositories/team/app/_tags/{tag}")
    await backend.put_bytes("repositories/team/app/_changes/damaged", b"{")
    unsettled = UnsettledTags(backend, catalog)
    for _ in range(2):
        await unsettled.look()
    assert (await catalog.list_tags("team/app", "", 10)).names == ("v1",)
    left = unsettled_key("team/app", "damaged", "somebody")
    assert (await backend.list(UNSETTLED)).keys == (left,)


async def test_a_referrer_that_another_index_enters_meanwhile_has_room(backend, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    wanted = request(1, subject=LAYER)
    looking = trio.Event()

    class Slow(Catalog):
        async def _put_at(self, repository: str, subject: Digest, digest: Digest) -> int | None:
            found = await super()._put_at(repository, subject, digest)
            looking.set()
            await Catalog(backend, "other").record_manifest(wanted)
            return found

    await Slow(backend, "one").record_manifest(wanted)
    assert looking.is_set()
    assert await Catalog(backend).list_referrers("team/app", LAYER) == (describe(1),)
