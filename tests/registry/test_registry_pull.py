"""Pulling: manifests, blobs and ranges, whole and cut."""

from __future__ import annotations

import random

import h11
import pytest
import structlog.testing
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, DownloadFailed
from swarmpull.registry.app import RegistryLimits
from swarmpull.registry.body_memory import CHUNK_BYTES, CHUNK_BYTES_MIN
from swarmpull.registry.manifests import OCI_MANIFEST

from .conftest import Registry
from .images import make_image
from .raw import parse_multipart
from .service import FailingReader, IndexedService, WaitingReader

CONTENT = random.Random(1).randbytes(5 * (1 << 20) + 17)
MISSING = f"sha256:{'0' * 64}"


async def test_the_base_says_that_this_is_a_registry(registry: Registry) -> None:
    for target in ("/v2/", "/v2"):
        reply = await registry.request("GET", target)
        assert (reply.status, reply.body) == (200, b"{}")
        assert reply.headers["docker-distribution-api-version"] == "registry/2.0"


# --- manifests --------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tag", [True, False])
async def test_a_manifest_comes_back_byte_for_byte(registry: Registry, by_tag: bool) -> None:
    image = make_image(10)
    await registry.add_image("team/app", image, "v1")
    reference = "v1" if by_tag else str(image.digest)
    reply = await registry.request("GET", f"/v2/team/app/manifests/{reference}")
    assert (reply.status, reply.body) == (200, image.manifest)
    assert reply.headers["content-type"] == OCI_MANIFEST
    assert reply.headers["docker-content-digest"] == str(image.digest)
    assert reply.headers["etag"] == f'"{image.digest}"'
    assert reply.headers["content-length"] == str(len(image.manifest))
    assert "content-encoding" not in reply.headers


async def test_head_of_a_manifest_has_the_headers_of_get_and_fetches_nothing(
    registry: Registry,
) -> None:
    image = make_image(10)
    await registry.add_image("team/app", image, "v1")
    registry.service.asked.clear()
    async with registry.connect() as connection:
        head = await connection.request("HEAD", "/v2/team/app/manifests/v1")
        assert registry.service.asked == ["resolve v1"]
        get = await connection.request("GET", "/v2/team/app/manifests/v1")
    assert (head.status, head.body, head.complete) == (200, b"", True)
    names = ("content-type", "content-length", "docker-content-digest", "etag")
    assert [head.headers[name] for name in names] == [get.headers[name] for name in names]


@pytest.mark.parametrize(
    "headers",
    [
        [("Accept", "application/vnd.docker.distribution.manifest.v2+json")],
        [("Accept", OCI_MANIFEST), ("Accept", "application/json")],
        [("Accept", "text/html;q=0.1")],
        [("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5")],
        [("Range", "bytes=0-")],
        [],
    ],
)
async def test_no_header_makes_a_manifest_another(
    registry: Registry, headers: list[tuple[str, str]]
) -> None:
    image = make_image(10)
    await registry.add_image("a", image, "v1")
    reply = await registry.request("GET", "/v2/a/manifests/v1", headers)
    assert (reply.status, reply.body) == (200, image.manifest)
    assert reply.headers["content-type"] == OCI_MANIFEST


async def test_a_manifest_that_the_client_has_is_not_sent_again(registry: Registry) -> None:
    image = make_image(10)
    await registry.add_image("a", image, "v1")
    known = [("If-None-Match", f'"{image.digest}"')]
    for method in ("GET", "HEAD"):
        reply = await registry.request(method, "/v2/a/manifests/v1", known)
        assert (reply.status, reply.body) == (304, b"")
        assert reply.headers["docker-content-digest"] == str(image.digest)
    other = [("If-None-Match", f'"{MISSING}"')]
    assert (await registry.request("GET", "/v2/a/manifests/v1", other)).status == 200


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/v2/a/manifests/v2", 404, "MANIFEST_UNKNOWN"),
        ("/v2/b/manifests/v1", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/a/manifests/{MISSING}", 404, "MANIFEST_UNKNOWN"),
        ("/v2/a/manifests/.INVALID_MANIFEST_NAME", 404, "MANIFEST_UNKNOWN"),
        ("/v2/a/manifests/x%2F..%2Fy", 404, "MANIFEST_UNKNOWN"),
        ("/v2/a/manifests/sha256:abc", 400, "DIGEST_INVALID"),
        (f"/v2/a/blobs/{MISSING}", 404, "BLOB_UNKNOWN"),
        (f"/blobs/{MISSING}", 404, "BLOB_UNKNOWN"),
        ("/v2/a/blobs/sha256:abc", 400, "DIGEST_INVALID"),
        ("/v2/a/blobs/..%2F..%2Fetc%2Fpasswd", 400, "DIGEST_INVALID"),
        ("/blobs/%2e%2e%2fstore", 400, "DIGEST_INVALID"),
        ("/v2/A/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/../a/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/a/manifests/v1?ns=a%20b", 400, "NAME_INVALID"),
        ("/v2/nothing/here", 404, "UNSUPPORTED"),
    ],
)
async def test_what_is_not_there_is_answered_in_the_form_of_the_specification(
    registry: Registry, target: str, status: int, code: str
) -> None:
    await registry.add_image("a", make_image(10), "v1")
    async with registry.connect() as connection:
        reply = await connection.request("GET", target)
        assert (reply.status, reply.code) == (status, code)
        assert reply.headers["content-type"] == "application/json"
        assert reply.json()["errors"][0]["message"]
        head = await connection.request("HEAD", target)
        assert (head.status, head.body, head.complete) == (status, b"", True)


async def test_a_backend_that_is_down_is_503_so_that_runtimes_try_their_next_mirror(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object, **options: object) -> None:
        raise BackendUnavailable("s3://bucket", "key", "timeout")

    monkeypatch.setattr(IndexedService, "get_manifest", fail)
    reply = await registry.request("GET", "/v2/a/manifests/v1")
    assert (reply.status, reply.code) == (503, "UNAVAILABLE")
    assert "timeout" in reply.json()["errors"][0]["message"]


async def test_a_fault_of_ours_is_500_with_its_traceback_in_the_log_only(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object, **options: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(IndexedService, "get_manifest", fail)
    with structlog.testing.capture_logs() as logs:
        async with registry.connect() as connection:
            reply = await connection.request("GET", "/v2/a/manifests/v1")
            assert (reply.status, reply.code) == (500, "UNKNOWN")
            assert b"secret" not in reply.body
            # The connection and the server go on.
            assert (await connection.request("GET", "/v2/")).status == 200
    assert [entry["event"] for entry in logs] == ["request_failed", "request_refused"]


# --- mirrors ----------------------------------------------------------------------------------


async def test_ns_goes_to_the_service_and_comes_back(registry: Registry) -> None:
    image = make_image(10)
    await registry.add_image("library/app", image, "v1")
    for method, target in [
        ("HEAD", "/v2/library/app/manifests/v1"),
        ("GET", f"/v2/library/app/manifests/{image.digest}"),
        ("HEAD", f"/v2/library/app/blobs/{image.layers[0]}"),
        ("GET", f"/v2/library/app/blobs/{image.layers[0]}"),
    ]:
        registry.service.upstreams.clear()
        reply = await registry.request(method, f"{target}?ns=127.0.0.1%3A5998")
        assert reply.status == 200
        assert registry.service.upstreams == ["127.0.0.1:5998"]
        assert reply.headers["oci-namespace"] == "127.0.0.1:5998"
    reply = await registry.request("GET", f"/v2/library/app/blobs/{MISSING}?ns=docker.io")
    assert reply.headers["oci-namespace"] == "docker.io"
    reply = await registry.request("GET", "/v2/library/app/manifests/v1")
    assert "oci-namespace" not in reply.headers


# --- blobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(CONTENT)]
)
@pytest.mark.parametrize("generic", [True, False])
async def test_a_blob_comes_back_byte_for_byte(
    registry: Registry, size: int, generic: bool
) -> None:
    content = CONTENT[:size]
    digest = await registry.add_blob(None if generic else "a", content)
    reply = await registry.request(
        "GET", f"/blobs/{digest}" if generic else f"/v2/a/blobs/{digest}"
    )
    assert (reply.status, reply.complete) == (200, True)
    assert reply.body == content
    assert reply.headers["content-length"] == str(size)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["docker-content-digest"] == str(digest)
    assert reply.headers["etag"] == f'"{digest}"'
    assert reply.headers["accept-ranges"] == "bytes"


async def test_head_of_a_blob_never_opens_it(registry: Registry) -> None:
    digest = await registry.add_blob("a", CONTENT)
    for target in (f"/v2/a/blobs/{digest}", f"/blobs/{digest}"):
        registry.service.asked.clear()
        reply = await registry.request("HEAD", target)
        assert (reply.status, reply.body, reply.complete) == (200, b"", True)
        assert reply.headers["content-length"] == str(len(CONTENT))
        assert registry.service.asked == [f"stat_blob {digest}"]


async def test_a_large_blob_is_read_in_few_steps(registry: Registry) -> None:
    reads: list[int] = []

    class Counting(WaitingReader):
        async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
            reads.append(size)
            return await super().read_at(offset, size)

    registry.service.wrap = lambda reader: Counting(reader, reader.length)
    digest = await registry.add_blob("a", CONTENT)
    assert (await registry.request("GET", f"/v2/a/blobs/{digest}")).body == CONTENT
    assert reads == [CHUNK_BYTES, CHUNK_BYTES, len(CONTENT) - 2 * CHUNK_BYTES]


async def test_many_at_once_read_in_small_steps(registry: Registry) -> None:
    """What all of them hold in memory is bounded."""
    held: list[int] = []
    everybody = trio.Event()

    class Counting(WaitingReader):
        async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
            held.append(size)
            if len(held) == 64:
                everybody.set()
            await everybody.wait()
            return await super().read_at(offset, size)

    registry.service.wrap = lambda reader: Counting(reader, reader.length)
    digest = await registry.add_blob("a", CONTENT)

    async def get() -> None:
        async with registry.connect() as connection:
            await connection.request("GET", f"/v2/a/blobs/{digest}")

    async with trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(get)
        await everybody.wait()
        assert sum(held) <= RegistryLimits().bodies_bytes + 64 * CHUNK_BYTES_MIN
        assert (held[0], held[-1]) == (CHUNK_BYTES, CHUNK_BYTES_MIN)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-", 0, len(CONTENT)),
        ("bytes=0-1", 0, 2),
        ("bytes=4194304-", 4 << 20, len(CONTENT)),
        ("bytes=1000000-4000000", 1_000_000, 4_000_001),
        ("bytes=-17", len(CONTENT) - 17, len(CONTENT)),
        ("bytes=0-999999999999", 0, len(CONTENT)),
        ("bytes=100-200,999999999-", 100, 201),
    ],
)
async def test_a_range_is_206_with_its_place(
    registry: Registry, header: str, start: int, stop: int
) -> None:
    digest = await registry.add_blob("a", CONTENT)
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", [("Range", header)])
    assert (reply.status, reply.body) == (206, CONTENT[start:stop])
    assert reply.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(CONTENT)}"
    assert reply.headers["content-length"] == str(stop - start)
    assert reply.headers["docker-content-digest"] == str(digest)


async def test_several_ranges_are_parts_in_the_order_of_the_request(registry: Registry) -> None:
    digest = await registry.add_blob("a", CONTENT)
    spans = [(3_000_000, 5_200_000), (0, 10), (10, 20), (len(CONTENT) - 5, len(CONTENT))]
    header = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", [("Range", header)])
    assert (reply.status, reply.complete) == (206, True)
    assert reply.headers["content-length"] == str(len(reply.body))
    assert parse_multipart(reply.headers["content-type"], reply.body) == [
        (f"bytes {start}-{stop - 1}/{len(CONTENT)}", CONTENT[start:stop]) for start, stop in spans
    ]
    assert "content-range" not in reply.headers


async def test_two_thousand_small_ranges_in_one_header_are_answered(registry: Registry) -> None:
    # stargz asks for what it wants to prefetch in one request.
    digest = await registry.add_blob("a", CONTENT)
    header = "bytes=" + ",".join(f"{2000 * i}-{2000 * i + 9}" for i in range(2000))
    assert len(header) > 16 << 10
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", [("Range", header)])
    assert reply.status == 206
    parts = parse_multipart(reply.headers["content-type"], reply.body)
    assert b"".join(content for _, content in parts) == b"".join(
        CONTENT[2000 * i : 2000 * i + 10] for i in range(2000)
    )


@pytest.mark.parametrize(
    "header", [f"bytes={len(CONTENT)}-", "bytes=-0", "bytes=5-4", "bytes=x-y", "bytes=0-,0-"]
)
async def test_an_absurd_range_is_416_with_the_length(registry: Registry, header: str) -> None:
    digest = await registry.add_blob("a", CONTENT)
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", [("Range", header)])
    assert (reply.status, reply.code) == (416, "SIZE_INVALID")
    assert reply.headers["content-range"] == f"bytes */{len(CONTENT)}"


async def test_a_range_of_an_empty_blob_is_the_empty_blob(registry: Registry) -> None:
    digest = await registry.add_blob("a", b"")
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", [("Range", "bytes=0-")])
    assert (reply.status, reply.body) == (200, b"")


async def test_if_range_asks_for_the_whole_where_the_validator_is_another(
    registry: Registry,
) -> None:
    digest = await registry.add_blob("a", CONTENT)
    target, part = f"/v2/a/blobs/{digest}", ("Range", "bytes=0-9")
    same = await registry.request("GET", target, [part, ("If-Range", f'"{digest}"')])
    other = await registry.request("GET", target, [part, ("If-Range", f'"{MISSING}"')])
    assert (same.status, len(same.body)) == (206, 10)
    assert (other.status, len(other.body)) == (200, len(CONTENT))


async def test_a_blob_that_the_client_has_is_not_sent_again(registry: Registry) -> None:
    digest = await registry.add_blob("a", CONTENT)
    known = [("If-None-Match", f'"{digest}"')]
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", known)
    assert (reply.status, reply.body) == (304, b"")


# --- downloads that fail, and clients that leave ----------------------------------------------


@pytest.mark.parametrize("fail_at", [0, 3 << 20])
async def test_a_download_that_fails_cuts_the_body_and_the_connection(
    registry: Registry, fail_at: int
) -> None:
    digest = await registry.add_blob("a", CONTENT)
    error = DownloadFailed(str(digest), "no peer is left")
    registry.service.wrap = lambda reader: FailingReader(reader, fail_at, error)
    with structlog.testing.capture_logs() as logs:
        reply = await registry.request("GET", f"/v2/a/blobs/{digest}")
    assert (reply.status, reply.complete) == (200, False)
    assert reply.headers["content-length"] == str(len(CONTENT))
    assert reply.body == CONTENT[:fail_at]
    assert [(entry["event"], entry["digest"]) for entry in logs] == [
        ("response_cut_short", str(digest))
    ]


async def test_a_failure_between_two_ranges_cuts_the_parts(registry: Registry) -> None:
    digest = await registry.add_blob("a", CONTENT)
    error = DownloadFailed(str(digest), "no peer is left")
    registry.service.wrap = lambda reader: FailingReader(reader, 100, error)
    ranges = [("Range", "bytes=0-9,200-209")]
    reply = await registry.request("GET", f"/v2/a/blobs/{digest}", ranges)
    assert (reply.status, reply.complete) == (206, False)
    assert not reply.body.rstrip().endswith(b"--")


async def test_the_first_bytes_leave_before_the_last_have_arrived(registry: Registry) -> None:
    digest = await registry.add_blob("a", CONTENT)
    reader: list[WaitingReader] = []

    def wrap(inner: object) -> WaitingReader:
        reader.append(WaitingReader(inner, 100))  # type: ignore[arg-type]
        return reader[0]

    registry.service.wrap = wrap
    async with registry.connect() as connection:
        await connection.begin("GET", f"/v2/a/blobs/{digest}", [("Host", "x")])
        await connection.send(h11.EndOfMessage())
        assert (await connection.head()).status_code == 200
        received = b""
        while len(received) < 100:
            received += (await connection.next_event()).data
        assert received == CONTENT[:100]
        await reader[0].waiting.wait()
        reader[0].go_on.set()
        while not isinstance(event := await connection.next_event(), h11.EndOfMessage):
            received += event.data
    assert received == CONTENT


async def test_a_client_that_hangs_up_ends_its_own_response_quietly(registry: Registry) -> None:
    digest = await registry.add_blob("a", CONTENT)
    readers: list[WaitingReader] = []

    def wrap(inner: object) -> WaitingReader:
        readers.append(WaitingReader(inner, 100))  # type: ignore[arg-type]
        return readers[-1]

    registry.service.wrap = wrap
    with structlog.testing.capture_logs() as logs:
        async with registry.connect() as staying, registry.connect() as leaving:
            for connection in (staying, leaving):
                await connection.begin("GET", f"/v2/a/blobs/{digest}", [("Host", "x")])
                await connection.send(h11.EndOfMessage())
                await connection.head()
                await readers[-1].waiting.wait()
            await leaving.stream.aclose()
            with trio.fail_after(30):
                await readers[1].given_up.wait()
            readers[0].go_on.set()
            reply_body = b""
            while not isinstance(event := await staying.next_event(), h11.EndOfMessage):
                reply_body += event.data
    assert reply_body == CONTENT
    assert not readers[0].given_up.is_set()
    assert logs == []


async def test_six_open_ended_ranges_that_are_reset_leave_the_server_well(
    registry: Registry,
) -> None:
    # containerd 2.1 reads 8 MiB of each such answer and resets the connection.
    content = random.Random(2).randbytes(32 << 20)
    digest = await registry.add_blob("a", content)
    window = 4 << 20

    async def fetch(index: int) -> None:
        async with registry.connect() as connection:
            lines = [("Host", "x"), ("Range", f"bytes={index * window}-")]
            await connection.begin("GET", f"/v2/a/blobs/{digest}", lines)
            await connection.send(h11.EndOfMessage())
            assert (await connection.head()).status_code == 206
            received = b""
            while len(received) < window:
                received += (await connection.next_event()).data
            assert received[:window] == content[index * window : (index + 1) * window]
            # Closing with bytes unread is a reset.
            connection.stream.socket.close()

    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            for index in range(6):
                nursery.start_soon(fetch, index)
        assert (await registry.request("GET", "/v2/")).status == 200
    assert logs == []


async def test_a_digest_of_sha512_names_a_blob_too(registry: Registry) -> None:
    digest = Digest.of(b"content", "sha512")
    async with registry.service.store.create() as writer:
        await writer.write(b"content")
        await writer.commit(digest)
    await registry.service.accept_blob("a", digest)
    assert (await registry.request("GET", f"/v2/a/blobs/{digest}")).body == b"content"
