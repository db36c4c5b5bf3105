"""Pushing: upload sessions in all their forms, mounts, manifests, generic blobs, deletion."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path

import h11
import pytest
import structlog.testing
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, StoreFull
from swarmpull.registry import images as images_module
from swarmpull.registry.app import RegistryLimits
from swarmpull.registry.images import PAGE_MAX
from swarmpull.registry.manifests import (
    DOCKER_MANIFEST,
    MANIFEST_BYTES_MAX,
    OCI_MANIFEST,
    Manifest,
    parse_manifest,
)
from swarmpull.store.blobs import BlobStore, open_store
from swarmpull.store.uploads import Upload, UploadLimits

from .conftest import Registry, serve_registry
from .images import CONFIG_TYPE, LAYER_TYPE, descriptor, make_image, make_index
from .raw import Connection, Reply
from .service import IndexedService

CONTENT = random.Random(3).randbytes(3 * (1 << 20) + 5)
DIGEST = Digest.of(CONTENT)
MISSING = f"sha256:{'0' * 64}"
START = "/v2/a/blobs/uploads/"


async def start(connection: Connection) -> str:
    """Open a session; its location."""
    reply = await connection.request("POST", START)
    assert reply.status == 202
    return reply.headers["location"]


async def assert_blob_is_there(registry: Registry, digest: Digest, content: bytes) -> None:
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}")
    assert (reply.status, reply.body) == (200, content)


def assert_nothing_is_visible(registry: Registry, *digests: Digest) -> None:
    assert list(registry.service.store.list()) == []
    for digest in digests:
        with pytest.raises(BlobNotFound):
            registry.service.store.stat(digest)


def assert_no_session_is_left(registry: Registry) -> None:
    assert registry.service.store.uploads.sessions == 0


def assert_created(reply: Reply, digest: Digest, repository: str = "a") -> None:
    assert reply.status == 201
    assert reply.headers["location"] == f"/v2/{repository}/blobs/{digest}"
    assert reply.headers["docker-content-digest"] == str(digest)
    assert reply.headers["content-length"] == "0"


# --- the ways to upload -----------------------------------------------------------------------


async def test_a_session_says_where_it_is_and_how_far(registry: Registry) -> None:
    async with registry.connect() as connection:
        reply = await connection.request("POST", START)
        assert reply.status == 202
        upload_id = reply.headers["docker-upload-uuid"]
        assert reply.headers["location"] == f"{START}{upload_id}"
        assert reply.headers["range"] == "0-0"
        status = await connection.request("GET", reply.headers["location"])
        assert (status.status, status.body) == (204, b"")
        assert status.headers["docker-upload-uuid"] == upload_id
        assert status.headers["range"] == "0-0"


async def test_one_put_with_the_whole_body(registry: Registry) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        reply = await connection.request("PUT", f"{location}?digest={DIGEST}", body=CONTENT)
    assert_created(reply, DIGEST)
    await assert_blob_is_there(registry, DIGEST, CONTENT)
    assert_no_session_is_left(registry)
    assert f"accept_blob {DIGEST}" in registry.service.asked


async def test_one_post_with_the_whole_body(registry: Registry) -> None:
    reply = await registry.request("POST", f"{START}?digest={DIGEST}", body=CONTENT)
    assert_created(reply, DIGEST)
    await assert_blob_is_there(registry, DIGEST, CONTENT)
    assert_no_session_is_left(registry)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("content_type", [[("Content-Type", "application/octet-stream")], []])
async def test_one_patch_and_an_empty_put(
    registry: Registry, chunked: bool, content_type: list[tuple[str, str]]
) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        patch = await connection.request("PATCH", location, content_type, CONTENT, chunked=chunked)
        assert (patch.status, patch.body) == (202, b"")
        assert patch.headers["range"] == f"0-{len(CONTENT) - 1}"
        put = await connection.request(
            "PUT", f"{patch.headers['location']}?digest={DIGEST}", body=b""
        )
    assert_created(put, DIGEST)
    await assert_blob_is_there(registry, DIGEST, CONTENT)


@pytest.mark.parametrize("last_in_put", [True, False])
@pytest.mark.parametrize("form", ["{}-{}", "bytes {}-{}/*"])
async def test_chunks_with_their_range(registry: Registry, last_in_put: bool, form: str) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        cuts = [0, 1, 1 << 20, len(CONTENT) - 7, len(CONTENT)]
        chunks = [(a, CONTENT[a:b]) for a, b in itertools.pairwise(cuts)]
        final = chunks.pop() if last_in_put else None
        for offset, chunk in chunks:
            content_range = ("Content-Range", form.format(offset, offset + len(chunk) - 1))
            patch = await connection.request("PATCH", location, [content_range], chunk)
            assert patch.status == 202
            assert patch.headers["range"] == f"0-{offset + len(chunk) - 1}"
            location = patch.headers["location"]
        target = f"{location}?digest={DIGEST}"
        if final is None:
            put = await connection.request("PUT", target)
        else:
            offset, chunk = final
            content_range = ("Content-Range", form.format(offset, offset + len(chunk) - 1))
            put = await connection.request("PUT", target, [content_range], chunk)
    assert_created(put, DIGEST)
    await assert_blob_is_there(registry, DIGEST, CONTENT)


@pytest.mark.parametrize("content", [b"", b"x"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_tiny_blobs_are_blobs(registry: Registry, content: bytes, method: str) -> None:
    digest = Digest.of(content)
    async with registry.connect() as connection:
        if method == "POST":
            reply = await connection.request("POST", f"{START}?digest={digest}", body=content)
        else:
            location = await start(connection)
            body: bytes | None = content
            if method == "PATCH":
                assert (await connection.request("PATCH", location, body=content)).status == 202
                body = None
            reply = await connection.request("PUT", f"{location}?digest={digest}", body=body)
    assert_created(reply, digest)
    await assert_blob_is_there(registry, digest, content)


async def test_a_digest_of_sha512_is_verified_too(registry: Registry) -> None:
    digest = Digest.of(CONTENT, "sha512")
    async with registry.connect() as connection:
        reply = await connection.request("POST", f"{START}?digest-algorithm=sha512")
        assert reply.status == 202
        target = f"{reply.headers['location']}?digest={digest}"
        assert_created(await connection.request("PUT", target, body=CONTENT), digest)
    await assert_blob_is_there(registry, digest, CONTENT)


async def test_what_was_pushed_twice_is_there_once(registry: Registry) -> None:
    for _ in range(2):
        reply = await registry.request("POST", f"{START}?digest={DIGEST}", body=CONTENT)
        assert_created(reply, DIGEST)
    assert [stat.digest for stat in registry.service.store.list()] == [DIGEST]


async def test_a_session_is_cancelled(registry: Registry) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        await connection.request("PATCH", location, body=b"content")
        assert (await connection.request("DELETE", location)).status == 204
        for method in ("GET", "PATCH", "DELETE"):
            reply = await connection.request(method, location)
            assert (reply.status, reply.code) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert_no_session_is_left(registry)


# --- chunks that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 5, 11, 1000])
async def test_a_chunk_out_of_order_is_416_and_changes_nothing(
    registry: Registry, first: int
) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        await connection.request("PATCH", location, [("Content-Range", "0-9")], CONTENT[:10])
        wrong = [("Content-Range", f"{first}-{first + 9}")]
        reply = await connection.request("PATCH", location, wrong, b"x" * 10)
        assert (reply.status, reply.code) == (416, "BLOB_UPLOAD_INVALID")
        assert reply.headers["range"] == "0-9"
        assert reply.headers["location"] == location
        status = await connection.request("GET", location)
        assert status.headers["range"] == "0-9"
        rest = [("Content-Range", f"10-{len(CONTENT) - 1}")]
        await connection.request("PATCH", location, rest, CONTENT[10:])
        assert_created(await connection.request("PUT", f"{location}?digest={DIGEST}"), DIGEST)


@pytest.mark.parametrize(
    ("content_range", "chunked", "status", "code"),
    [
        ("0-98", False, 400, "SIZE_INVALID"),
        ("0-100", False, 400, "SIZE_INVALID"),
        ("0-98", True, 400, "SIZE_INVALID"),
        ("0-100", True, 400, "SIZE_INVALID"),
        ("nonsense", False, 400, "BLOB_UPLOAD_INVALID"),
        ("9-0", False, 400, "BLOB_UPLOAD_INVALID"),
        ("0-" + "9" * 300, False, 400, "BLOB_UPLOAD_INVALID"),
    ],
)
async def test_a_chunk_that_is_not_as_long_as_it_says_is_refused(
    registry: Registry, content_range: str, chunked: bool, status: int, code: str
) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        headers = [("Content-Range", content_range)]
        reply = await connection.request("PATCH", location, headers, b"x" * 100, chunked=chunked)
        assert (reply.status, reply.code) == (status, code)
        # The session goes on from where it says it is.
        progress = await connection.request("GET", location)
        received = int(progress.headers["range"].partition("-")[2])
        assert received <= 99


async def test_a_wrong_digest_is_400_and_nothing_becomes_visible(registry: Registry) -> None:
    wrong = Digest.of(b"something else")
    async with registry.connect() as connection:
        location = await start(connection)
        reply = await connection.request("PUT", f"{location}?digest={wrong}", body=CONTENT)
        assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
        assert str(DIGEST) in reply.json()["errors"][0]["message"]
        reply = await connection.request("POST", f"{START}?digest={wrong}", body=CONTENT)
        assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
        reply = await connection.request("PUT", f"/blobs/{wrong}", body=CONTENT)
        assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
    assert_nothing_is_visible(registry, wrong, DIGEST)
    assert_no_session_is_left(registry)


@pytest.mark.parametrize("query", ["", "?digest=", "?digest=sha256:abc", "?digest=md5:abc"])
async def test_closing_a_session_without_a_digest_leaves_it_open(
    registry: Registry, query: str
) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        await connection.request("PATCH", location, body=CONTENT)
        reply = await connection.request("PUT", location + query)
        assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
        assert_created(await connection.request("PUT", f"{location}?digest={DIGEST}"), DIGEST)


@pytest.mark.parametrize(
    "target",
    [
        f"{START}0123456789abcdef0123456789abcdef",
        f"{START}..%2F..%2Flock",
        f"{START}x",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT", "DELETE"])
async def test_an_unknown_session_is_404(registry: Registry, target: str, method: str) -> None:
    reply = await registry.request(method, f"{target}?digest={DIGEST}", body=b"x" * 1000)
    assert (reply.status, reply.code) == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_a_session_belongs_to_its_repository(registry: Registry) -> None:
    async with registry.connect() as connection:
        location = await start(connection)
        reply = await connection.request("GET", location.replace("/v2/a/", "/v2/b/"))
        assert (reply.status, reply.code) == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_a_digest_algorithm_that_is_not_known_is_refused(registry: Registry) -> None:
    reply = await registry.request("POST", f"{START}?digest-algorithm=md5")
    assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
    assert_no_session_is_left(registry)


# --- clients that leave, and disks that are full ----------------------------------------------


async def send_half(connection: Connection, method: str, target: str, size: int) -> None:
    """Announce CONTENT and send its first ``size`` bytes."""
    lines = [("Host", "x"), ("Content-Length", str(len(CONTENT)))]
    await connection.begin(method, target, lines)
    await connection.send(h11.Data(data=CONTENT[:size]))


async def until_busy(registry: Registry, location: str) -> None:
    """Return when a request is writing to the session."""
    upload = registry.service.store.uploads.get("a", location.rpartition("/")[2])
    with trio.fail_after(30):
        while not upload.busy:
            await trio.lowlevel.checkpoint()


async def until_offset(registry: Registry, location: str, expected: int) -> None:
    """Return when the session has come to this offset and is free again."""
    upload = registry.service.store.uploads.get("a", location.rpartition("/")[2])
    with trio.fail_after(30):
        while upload.offset != expected or upload.busy:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_an_upload_that_breaks_off_is_resumed_at_its_offset(
    registry: Registry, method: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with registry.connect() as connection:
            location = await start(connection)
            target = f"{location}?digest={DIGEST}" if method == "PUT" else location
            await send_half(connection, method, target, 1_500_000)
        await until_offset(registry, location, 1_500_000)
        assert_nothing_is_visible(registry, DIGEST)
        async with registry.connect() as connection:
            status = await connection.request("GET", location)
            assert status.headers["range"] == "0-1499999"
            rest = [("Content-Range", f"1500000-{len(CONTENT) - 1}")]
            reply = await connection.request("PATCH", location, rest, CONTENT[1_500_000:])
            assert reply.status == 202
            assert_created(await connection.request("PUT", f"{location}?digest={DIGEST}"), DIGEST)
    await assert_blob_is_there(registry, DIGEST, CONTENT)
    assert logs == []


async def test_a_session_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with (
        open_store(tmp_path, name="test") as store,
        serve_registry(IndexedService(store)) as registry,
        registry.connect() as first,
    ):
        location = await start(first)
        await first.request("PATCH", location, body=CONTENT[:1_000_000])
    async with (
        open_store(tmp_path, name="test") as store,
        serve_registry(IndexedService(store)) as registry,
        registry.connect() as second,
    ):
        status = await second.request("GET", location)
        assert status.headers["range"] == "0-999999"
        target = f"{location}?digest={DIGEST}"
        assert_created(await second.request("PUT", target, body=CONTENT[1_000_000:]), DIGEST)
        await assert_blob_is_there(registry, DIGEST, CONTENT)


@pytest.mark.parametrize("target", [f"{START}?digest={DIGEST}", f"/blobs/{DIGEST}"])
async def test_what_nobody_can_resume_leaves_nothing_when_it_breaks_off(
    registry: Registry, target: str
) -> None:
    method = "POST" if "uploads" in target else "PUT"
    async with registry.connect() as connection:
        await send_half(connection, method, target, 1_500_000)
        with trio.fail_after(30):
            while not registry.service.store.uploads.sessions:
                await trio.lowlevel.checkpoint()
    with trio.fail_after(30):
        while registry.service.store.uploads.sessions:
            await trio.lowlevel.checkpoint()
    assert_nothing_is_visible(registry, DIGEST)


async def test_two_requests_to_one_session_are_kept_apart(registry: Registry) -> None:
    async with registry.connect() as first, registry.connect() as second:
        location = await start(first)
        await send_half(first, "PATCH", location, 10)
        await until_busy(registry, location)
        reply = await second.request("PATCH", location, body=b"x" * 10)
        assert (reply.status, reply.code) == (409, "BLOB_UPLOAD_INVALID")
        assert (await second.request("DELETE", location)).status == 409
        await first.send(h11.Data(data=CONTENT[10:]))
        await first.send(h11.EndOfMessage())
        assert (await first.reply()).headers["range"] == f"0-{len(CONTENT) - 1}"


async def test_a_full_disk_is_507_for_that_request_alone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Upload, data: bytes) -> None:
        raise StoreFull("test", len(data))

    async with registry.connect() as connection:
        location = await start(connection)
        with monkeypatch.context() as patched:
            patched.setattr(Upload, "append", fail)
            reply = await connection.request("PATCH", location, body=CONTENT)
            assert (reply.status, reply.code) == (507, "UNAVAILABLE")
            assert "free disk space" in reply.json()["errors"][0]["message"]
        # The rest of the body was read away, so the connection goes on, and so does the session.
        reply = await connection.request("PUT", f"{location}?digest={DIGEST}", body=CONTENT)
        assert_created(reply, DIGEST)


async def test_too_many_sessions_are_429_with_the_time_to_wait(tmp_path: Path) -> None:
    limits = UploadLimits(sessions=2)
    async with (
        open_store(tmp_path, name="test", upload_limits=limits) as store,
        serve_registry(IndexedService(store)) as registry,
        registry.connect() as client,
    ):
        first = await start(client)
        await start(client)
        reply = await client.request("POST", START)
        assert (reply.status, reply.code) == (429, "TOOMANYREQUESTS")
        assert int(reply.headers["retry-after"]) > 0
        await client.request("DELETE", first)
        await start(client)


async def test_too_many_requests_are_429(store: BlobStore) -> None:
    limits = RegistryLimits(requests=1)
    async with (
        serve_registry(IndexedService(store), limits) as registry,
        registry.connect() as first,
        registry.connect() as second,
    ):
        location = await start(first)
        await send_half(first, "PATCH", location, 10)
        await until_busy(registry, location)
        reply = await second.request("GET", "/v2/")
        assert (reply.status, reply.code) == (429, "TOOMANYREQUESTS")
        assert reply.headers["retry-after"] == "1"
        await first.send(h11.Data(data=CONTENT[10:]))
        await first.send(h11.EndOfMessage())
        assert (await first.reply()).status == 202
        assert (await second.request("GET", "/v2/")).status == 200


# --- mounts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["?mount={}&from=b", "?from=b&mount={}", "?mount={}"])
async def test_a_blob_of_another_repository_is_mounted(registry: Registry, query: str) -> None:
    digest = await registry.add_blob("b", CONTENT)
    # Both as containerd writes it and as others escape it.
    for text in (str(digest), str(digest).replace(":", "%3A")):
        assert_created(await registry.request("POST", START + query.format(text)), digest)
    await assert_blob_is_there(registry, digest, CONTENT)
    assert_no_session_is_left(registry)


@pytest.mark.parametrize("query", [f"?mount={MISSING}&from=b", f"?mount={MISSING}"])
async def test_what_cannot_be_mounted_is_to_be_uploaded(registry: Registry, query: str) -> None:
    async with registry.connect() as connection:
        reply = await connection.request("POST", START + query)
        assert reply.status == 202
        target = f"{reply.headers['location']}?digest={DIGEST}"
        assert_created(await connection.request("PUT", target, body=CONTENT), DIGEST)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("?mount=sha256:abc&from=b", "DIGEST_INVALID"),
        (f"?mount={MISSING}&from=../b", "NAME_INVALID"),
        (f"?mount={MISSING}&from=", "NAME_INVALID"),
    ],
)
async def test_a_malformed_mount_is_refused(registry: Registry, query: str, code: str) -> None:
    reply = await registry.request("POST", START + query)
    assert (reply.status, reply.code) == (400, code)


# --- generic blobs ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_file_is_put_and_got_by_its_digest(registry: Registry, chunked: bool) -> None:
    reply = await registry.request("PUT", f"/blobs/{DIGEST}", body=CONTENT, chunked=chunked)
    assert reply.status == 201
    assert reply.headers["location"] == f"/blobs/{DIGEST}"
    assert reply.headers["docker-content-digest"] == str(DIGEST)
    reply = await registry.request("GET", f"/blobs/{DIGEST}")
    assert reply.body == CONTENT
    assert_no_session_is_left(registry)


async def test_a_file_that_is_there_is_not_written_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await registry.add_blob(None, CONTENT)

    async def fail(self: Upload, data: bytes) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(Upload, "append", fail)
    reply = await registry.request("PUT", f"/blobs/{DIGEST}", body=CONTENT)
    assert reply.status == 200
    # Again, because the request that has brought it may have failed before it was durable.
    assert registry.service.asked == [f"accept_blob {DIGEST}"]


# --- manifests --------------------------------------------------------------------------------


async def test_an_image_is_pushed_and_pulled(registry: Registry) -> None:
    image = make_image(100, 200)
    async with registry.connect() as connection:
        for blob in image.blobs:
            await connection.request("POST", f"{START}?digest={Digest.of(blob)}", body=blob)
        content_type = [("Content-Type", image.media_type)]
        for reference in ("v1", str(image.digest)):
            target = f"/v2/a/manifests/{reference}"
            reply = await connection.request("PUT", target, content_type, image.manifest)
            assert reply.status == 201
            assert reply.headers["location"] == f"/v2/a/manifests/{image.digest}"
            assert reply.headers["docker-content-digest"] == str(image.digest)
            assert "oci-subject" not in reply.headers
            pulled = await connection.request("GET", target)
            assert pulled.body == image.manifest


async def test_a_manifest_is_parsed_off_the_event_loop(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def parse(content: bytes, content_type: str) -> Manifest:
        threads.append(threading.current_thread())
        return parse_manifest(content, content_type)

    monkeypatch.setattr(images_module, "parse_manifest", parse)
    image = make_image(10)
    reply = await registry.request("PUT", "/v2/a/manifests/v1", body=image.manifest)
    assert (reply.status, reply.code) == (400, "MANIFEST_BLOB_UNKNOWN")
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_an_index_needs_its_children(registry: Registry) -> None:
    first, second = make_image(10, seed=1), make_image(10, seed=2)
    index = make_index(first, second)
    await registry.add_image("a", first)
    content_type = [("Content-Type", index.media_type)]
    reply = await registry.request("PUT", "/v2/a/manifests/v1", content_type, index.manifest)
    assert (reply.status, reply.code) == (400, "MANIFEST_BLOB_UNKNOWN")
    assert [error["detail"] for error in reply.json()["errors"]] == [{"digest": str(second.digest)}]
    await registry.add_image("a", second)
    reply = await registry.request("PUT", "/v2/a/manifests/v1", content_type, index.manifest)
    assert reply.status == 201


async def test_an_image_needs_its_blobs_and_is_told_which_are_missing(registry: Registry) -> None:
    image = make_image(10, 20)
    await registry.add_blob("a", image.blobs[0])
    reply = await registry.request("PUT", "/v2/a/manifests/v1", body=image.manifest)
    assert (reply.status, reply.code) == (400, "MANIFEST_BLOB_UNKNOWN")
    details = [error["detail"]["digest"] for error in reply.json()["errors"]]
    assert details == [str(layer) for layer in image.layers]
    assert (await registry.request("GET", "/v2/a/manifests/v1")).status == 404


async def test_a_manifest_may_be_pushed_by_digest_with_tags(registry: Registry) -> None:
    image = make_image(10)
    await registry.add_image("a", image)
    target = f"/v2/a/manifests/{image.digest}?tag=v1&tag=latest"
    async with registry.connect() as connection:
        reply = await connection.request("PUT", target, body=image.manifest)
        assert reply.status == 201
        assert reply.headers["oci-tag"] == "v1, latest"
        for tag in ("v1", "latest"):
            reply = await connection.request("HEAD", f"/v2/a/manifests/{tag}")
            assert reply.headers["docker-content-digest"] == str(image.digest)


async def test_a_manifest_under_its_sha512_digest(registry: Registry) -> None:
    image = make_image(10)
    await registry.add_image("a", image)
    digest = Digest.of(image.manifest, "sha512")
    reply = await registry.request("PUT", f"/v2/a/manifests/{digest}", body=image.manifest)
    assert reply.status == 201
    assert reply.headers["docker-content-digest"] == str(digest)
    assert (await registry.request("GET", f"/v2/a/manifests/{digest}")).body == image.manifest


async def test_the_subject_of_an_artifact_is_acknowledged_even_when_it_is_not_there(
    registry: Registry,
) -> None:
    image = make_image(10, seed=1)
    artifact = make_image(10, seed=2, subject=descriptor(image.manifest, OCI_MANIFEST))
    await registry.add_image("a", make_image(10, seed=2))
    reply = await registry.request("PUT", "/v2/a/manifests/sbom", body=artifact.manifest)
    assert reply.status == 201
    assert reply.headers["oci-subject"] == str(image.digest)


@pytest.mark.parametrize(
    ("reference", "headers", "body", "status", "code"),
    [
        ("v1", [], b"", 400, "MANIFEST_INVALID"),
        ("v1", [], b"not json", 400, "MANIFEST_INVALID"),
        ("v1", [("Content-Type", DOCKER_MANIFEST)], None, 400, "MANIFEST_INVALID"),
        (".v1", [], None, 400, "MANIFEST_INVALID"),
        ("a" * 129, [], None, 400, "MANIFEST_INVALID"),
        ("a%2Fb", [], None, 400, "MANIFEST_INVALID"),
        (f"{MISSING}?tag=.x", [], None, 400, "MANIFEST_INVALID"),
        (MISSING, [], None, 400, "DIGEST_INVALID"),
        ("sha256:baddigeststring", [], None, 400, "DIGEST_INVALID"),
    ],
)
async def test_a_manifest_that_cannot_be_kept_is_refused(
    registry: Registry,
    reference: str,
    headers: list[tuple[str, str]],
    body: bytes | None,
    status: int,
    code: str,
) -> None:
    image = make_image(10)
    await registry.add_image("a", image)
    content = image.manifest if body is None else body
    reply = await registry.request("PUT", f"/v2/a/manifests/{reference}", headers, content)
    assert (reply.status, reply.code) == (status, code)
    assert registry.service.repositories["a"].tags == {}


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_manifest_of_four_mebibytes_is_taken_and_one_byte_more_is_413(
    registry: Registry, chunked: bool
) -> None:
    image = make_image(10)
    await registry.add_image("a", image)
    largest = image.manifest + b" " * (MANIFEST_BYTES_MAX - len(image.manifest))
    async with registry.connect() as connection:
        target = "/v2/a/manifests/v1"
        reply = await connection.request("PUT", target, body=largest, chunked=chunked)
        assert reply.status == 201
        reply = await connection.request("PUT", target, body=largest + b" ", chunked=chunked)
        assert (reply.status, reply.code) == (413, "MANIFEST_INVALID")
        assert (await connection.request("GET", target)).body == largest


async def test_a_manifest_that_is_declared_too_large_is_answered_before_it_is_sent(
    registry: Registry,
) -> None:
    async with registry.connect() as connection:
        lines = [("Host", "x"), ("Content-Length", str(1 << 40))]
        await connection.begin("PUT", "/v2/a/manifests/v1", lines)
        with trio.fail_after(30):
            assert (await connection.head()).status_code == 413


# --- deletion ---------------------------------------------------------------------------------


async def test_a_tag_a_manifest_and_a_blob_are_deleted(registry: Registry) -> None:
    image = make_image(10)
    await registry.add_image("a", image, "v1", "v2")
    async with registry.connect() as connection:
        assert (await connection.request("DELETE", "/v2/a/manifests/v1")).status == 202
        assert (await connection.request("GET", "/v2/a/manifests/v1")).status == 404
        assert (await connection.request("GET", "/v2/a/manifests/v2")).status == 200
        by_digest = f"/v2/a/manifests/{image.digest}"
        assert (await connection.request("DELETE", by_digest)).status == 202
        assert (await connection.request("GET", by_digest)).status == 404
        assert (await connection.request("GET", "/v2/a/manifests/v2")).status == 404
        blob = f"/v2/a/blobs/{image.config}"
        assert (await connection.request("DELETE", blob)).status == 202
        assert (await connection.request("GET", blob)).status == 404


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/v2/a/manifests/v9", 404, "MANIFEST_UNKNOWN"),
        ("/v2/a/manifests/.v9", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/a/manifests/{MISSING}", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/a/blobs/{MISSING}", 404, "BLOB_UNKNOWN"),
        ("/v2/a/blobs/x", 400, "DIGEST_INVALID"),
        ("/v2/a/tags/list", 405, "UNSUPPORTED"),
    ],
)
async def test_deleting_what_is_not_there_says_so(
    registry: Registry, target: str, status: int, code: str
) -> None:
    reply = await registry.request("DELETE", target)
    assert (reply.status, reply.code) == (status, code)


# --- where pushes are not taken ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", START),
        ("POST", f"{START}?digest={DIGEST}"),
        ("POST", f"{START}?mount={DIGEST}&from=b"),
        ("PATCH", f"{START}{'0' * 32}"),
        ("PUT", f"{START}{'0' * 32}?digest={DIGEST}"),
        ("GET", f"{START}{'0' * 32}"),
        ("DELETE", f"{START}{'0' * 32}"),
        ("PUT", "/v2/a/manifests/v1"),
        ("PUT", f"/blobs/{DIGEST}"),
        ("DELETE", "/v2/a/manifests/v1"),
        ("DELETE", f"/v2/a/blobs/{DIGEST}"),
    ],
)
async def test_an_agent_without_push_says_how_to_enable_it(
    read_only: Registry, method: str, target: str
) -> None:
    await read_only.add_image("a", make_image(10), "v1")
    reply = await read_only.request(method, target, body=CONTENT)
    assert (reply.status, reply.code) == (405, "UNSUPPORTED")
    assert reply.headers["allow"] == "GET, HEAD"
    assert "agent.registry.push" in reply.json()["errors"][0]["message"]
    assert (await read_only.request("GET", "/v2/a/manifests/v1")).status == 200


# --- listings ---------------------------------------------------------------------------------


async def test_tags_are_listed_in_pages_that_link_to_the_next(registry: Registry) -> None:
    await registry.add_image("team/app", make_image(10), *(f"v{i}" for i in range(5)))
    async with registry.connect() as connection:
        reply = await connection.request("GET", "/v2/team/app/tags/list")
        assert reply.json() == {"name": "team/app", "tags": ["v0", "v1", "v2", "v3", "v4"]}
        assert reply.headers["content-type"] == "application/json"
        assert "link" not in reply.headers
        pages, target = [], "/v2/team/app/tags/list?n=2"
        while target:
            reply = await connection.request("GET", target)
            pages.append(reply.json()["tags"])
            link = reply.headers.get("link", "")
            target = link.removesuffix('>; rel="next"').removeprefix("<")
    assert pages == [["v0", "v1"], ["v2", "v3"], ["v4"]]


@pytest.mark.parametrize(
    ("query", "tags", "more"),
    [
        ("?n=0", [], False),
        ("?n=5", ["v0", "v1", "v2", "v3", "v4"], False),
        ("?n=1&last=v1", ["v2"], True),
        ("?last=v3", ["v4"], False),
        ("?last=v4", [], False),
        ("?last=nothing", ["v0", "v1", "v2", "v3", "v4"], False),
        ("?n=999999999", ["v0", "v1", "v2", "v3", "v4"], False),
    ],
)
async def test_n_and_last_select_a_page(
    registry: Registry, query: str, tags: list[str], more: bool
) -> None:
    await registry.add_image("a", make_image(10), *(f"v{i}" for i in range(5)))
    reply = await registry.request("GET", f"/v2/a/tags/list{query}")
    assert (reply.status, reply.json()["tags"]) == (200, tags)
    assert ("link" in reply.headers) is more


async def test_a_page_has_an_end_even_when_nobody_asked_for_one(registry: Registry) -> None:
    await registry.add_image("a", make_image(10), *(f"v{i:05}" for i in range(PAGE_MAX + 1)))
    reply = await registry.request("GET", "/v2/a/tags/list")
    assert len(reply.json()["tags"]) == PAGE_MAX
    assert f"last=v{PAGE_MAX - 1:05}" in reply.headers["link"]


@pytest.mark.parametrize("n", ["-1", "x", "1.5", "٣", "1" * 5000])
async def test_a_number_of_results_that_is_none_is_refused(registry: Registry, n: str) -> None:
    await registry.add_image("a", make_image(10), "v1")
    for path in ("/v2/a/tags/list", "/v2/_catalog"):
        target = f"{path}?n={n}".encode().decode("latin-1").replace("\xd9\xa3", "%D9%A3")
        reply = await registry.request("GET", target)
        assert (reply.status, reply.code) == (400, "UNSUPPORTED")


async def test_tags_of_an_unknown_repository_are_404(registry: Registry) -> None:
    for query in ("", "?n=0", "?n=2"):
        reply = await registry.request("GET", f"/v2/unknown/tags/list{query}")
        assert (reply.status, reply.code) == (404, "NAME_UNKNOWN")


async def test_repositories_are_listed_in_pages(registry: Registry) -> None:
    for name in ("b", "a/x", "c"):
        await registry.add_image(name, make_image(10), "v1")
    async with registry.connect() as connection:
        reply = await connection.request("GET", "/v2/_catalog")
        assert reply.json() == {"repositories": ["a/x", "b", "c"]}
        reply = await connection.request("GET", "/v2/_catalog?n=1")
        assert reply.json() == {"repositories": ["a/x"]}
        assert reply.headers["link"] == '</v2/_catalog?n=1&last=a%2Fx>; rel="next"'
        reply = await connection.request("GET", "/v2/_catalog?n=1&last=a%2Fx")
        assert reply.json() == {"repositories": ["b"]}
        reply = await connection.request("GET", "/v2/_catalog?n=0")
        assert reply.json() == {"repositories": []}
        assert "link" not in reply.headers


async def test_referrers_are_an_index_that_can_be_filtered(registry: Registry) -> None:
    image = make_image(10)
    subject = descriptor(image.manifest, OCI_MANIFEST)
    note = {"org.example": "yes"}
    sbom_type = "application/vnd.example.sbom+json"
    sbom = make_image(1, seed=1, artifactType=sbom_type, subject=subject, annotations=note)
    plain = make_image(1, seed=2, subject=subject)
    index = make_index(subject=subject)
    for each in (image, sbom, plain, index):
        await registry.add_image("a", each)
    async with registry.connect() as connection:
        reply = await connection.request("GET", f"/v2/a/referrers/{image.digest}")
        assert reply.headers["content-type"] == "application/vnd.oci.image.index.v1+json"
        assert "oci-filters-applied" not in reply.headers
        document = reply.json()
        assert document["schemaVersion"] == 2
        found = {entry["digest"]: entry for entry in document["manifests"]}
        assert found[str(sbom.digest)] == {
            **descriptor(sbom.manifest, OCI_MANIFEST),
            "artifactType": sbom_type,
            "annotations": note,
        }
        assert found[str(plain.digest)]["artifactType"] == CONFIG_TYPE
        assert "artifactType" not in found[str(index.digest)]
        for text in (sbom_type, sbom_type.replace("+", "%2B")):
            target = f"/v2/a/referrers/{image.digest}?artifactType={text}"
            reply = await connection.request("GET", target)
            assert reply.headers["oci-filters-applied"] == "artifactType"
            assert [e["digest"] for e in reply.json()["manifests"]] == [str(sbom.digest)]
        reply = await connection.request("GET", f"/v2/a/referrers/{image.digest}?artifactType=x/y")
        assert reply.json()["manifests"] == []


async def test_nothing_has_no_referrers_and_a_malformed_digest_is_400(registry: Registry) -> None:
    reply = await registry.request("GET", f"/v2/unknown/referrers/{MISSING}")
    assert (reply.status, reply.json()["manifests"]) == (200, [])
    reply = await registry.request("GET", "/v2/a/referrers/sha256:abc")
    assert (reply.status, reply.code) == (400, "DIGEST_INVALID")


async def test_a_foreign_layer_need_not_be_pushed(registry: Registry) -> None:
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    config, layer = b"{}", b"layer"
    for blob in (config, layer):
        await registry.add_blob("a", blob)
    layers = [descriptor(b"base", foreign, urls=["https://x"]), descriptor(layer, LAYER_TYPE)]
    manifest = {"schemaVersion": 2, "config": descriptor(config, CONFIG_TYPE), "layers": layers}
    body = json.dumps(manifest).encode()
    assert (await registry.request("PUT", "/v2/a/manifests/v1", body=body)).status == 201
