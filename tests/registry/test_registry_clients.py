"""What real clients send, request by request, as captured from them.

Each table is one client's way to pull or push the same image: request line, the headers that matter, and
what it needs to get back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import attrs
import pytest

from swarmpull.digest import Digest

from .conftest import Registry
from .images import LAYER_TYPE, Image, make_image, make_index
from .raw import Connection, Reply, parse_multipart

Line = tuple[str, str]

CLOSE: Final = ("Connection", "close")
OLD_TYPES: Final = (
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/vnd.docker.distribution.manifest.v1+json",
)
TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    *OLD_TYPES,
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.index.v1+json",
)
ONE_TYPE_A_LINE: Final = tuple(("Accept", media_type) for media_type in TYPES)
ALL_TYPES_IN_A_LINE: Final = (("Accept", ", ".join([*TYPES[:2], *TYPES[4:], "*/*"])),)
REGISTRY_2: Final = ("Docker-Distribution-Api-Version", "registry/2.0")
GZIP: Final = ("Accept-Encoding", "gzip")
ZSTD: Final = ("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5")
OCTETS: Final = ("Content-Type", "application/octet-stream")

IMAGE: Final = make_image(3 << 20, 100, 70_000)
INDEX: Final = make_index(IMAGE, make_image(10, seed=9))
LAYER: Final = IMAGE.blobs[1]


@attrs.frozen
class Step:
    """One request of a client.

    Attributes:
        target: may name ``{manifest}``, ``{index}``, ``{config}``, ``{layer}``.
        lines: headers.
        status: what the client needs.
        body: what the client needs; None when it does not look.
    """

    method: str
    target: str
    lines: tuple[Line, ...] = ()
    status: int = 200
    body: bytes | None = None


def fill(target: str) -> str:
    return target.format(
        manifest=IMAGE.digest, index=INDEX.digest, config=IMAGE.config, layer=IMAGE.layers[0]
    )


PING: Final = Step("GET", "/v2/")
CUT: Final = ("Range", "bytes=1000000-")
AS_MIRROR: Final = "?ns=registry.example"

PULLS: Final[dict[str, tuple[Step, ...]]] = {
    "skopeo 1.9, podman 4.3, buildah 1.28": (
        Step("GET", "/v2/", (REGISTRY_2, CLOSE)),
        Step(
            "GET", "/v2/a/manifests/v1", (*ONE_TYPE_A_LINE, REGISTRY_2, CLOSE), 200, IMAGE.manifest
        ),
        Step("GET", "/v2/a/blobs/{layer}", (GZIP, CLOSE), 200, LAYER),
        Step("GET", "/v2/a/blobs/{config}", (GZIP, CLOSE), 200, IMAGE.blobs[0]),
    ),
    "skopeo 1.18 after a cut": (
        PING,
        Step("GET", "/v2/a/manifests/v1", ONE_TYPE_A_LINE, 200, IMAGE.manifest),
        Step("GET", "/v2/a/blobs/{config}", (GZIP,), 200, IMAGE.blobs[0]),
        Step("GET", "/v2/a/blobs/{layer}", (CUT,), 206, LAYER[1_000_000:]),
    ),
    "skopeo, an index": (
        PING,
        Step("GET", "/v2/a/manifests/multi", ONE_TYPE_A_LINE, 200, INDEX.manifest),
        Step("GET", "/v2/a/manifests/{manifest}", ONE_TYPE_A_LINE, 200, IMAGE.manifest),
    ),
    "dockerd, classic store": (
        Step("GET", "/v2/", (CLOSE,)),
        Step("HEAD", "/v2/a/manifests/v1", (*reversed(ONE_TYPE_A_LINE), CLOSE), 200, b""),
        Step("GET", "/v2/a/manifests/{manifest}", (*ONE_TYPE_A_LINE, CLOSE), 200, IMAGE.manifest),
        Step("GET", "/v2/a/blobs/{config}", (CLOSE,), 200, IMAGE.blobs[0]),
        Step("GET", "/v2/a/blobs/{layer}", (CLOSE,), 200, LAYER),
        Step("GET", "/v2/a/blobs/{layer}", (CUT, CLOSE), 206, LAYER[1_000_000:]),
    ),
    "dockerd, by digest: HEAD without Accept": (
        PING,
        Step("HEAD", "/v2/a/manifests/{manifest}", (), 200, b""),
        Step("GET", "/v2/a/manifests/{manifest}", ONE_TYPE_A_LINE, 200, IMAGE.manifest),
    ),
    "containerd 1.6 and 1.7, as a mirror": (
        Step("HEAD", "/v2/a/manifests/multi" + AS_MIRROR, ALL_TYPES_IN_A_LINE, 200, b""),
        Step("GET", "/v2/a/manifests/{index}" + AS_MIRROR, (), 200, INDEX.manifest),
        Step(
            "GET",
            "/v2/a/manifests/{manifest}" + AS_MIRROR,
            (("Accept", f"{IMAGE.media_type}, */*"),),
            200,
            IMAGE.manifest,
        ),
        Step("GET", "/v2/a/blobs/{config}" + AS_MIRROR, (), 200, IMAGE.blobs[0]),
        Step(
            "GET",
            "/v2/a/blobs/{layer}" + AS_MIRROR,
            (("Accept", f"{LAYER_TYPE}, */*"),),
            200,
            LAYER,
        ),
        Step("GET", "/v2/a/blobs/{layer}" + AS_MIRROR, (CUT,), 206, LAYER[1_000_000:]),
    ),
    "containerd 2.1, chunks in parallel": (
        Step("HEAD", "/v2/a/manifests/v1", (*ALL_TYPES_IN_A_LINE, ZSTD), 200, b""),
        Step(
            "GET", "/v2/a/manifests/{manifest}", (("Range", "bytes=0-"), ZSTD), 200, IMAGE.manifest
        ),
        Step("GET", "/v2/a/blobs/{layer}", (("Range", "bytes=0-"), ZSTD), 206, LAYER),
        Step("GET", "/v2/a/blobs/{layer}", (("Range", "bytes=2097152-"),), 206, LAYER[2 << 20 :]),
    ),
    "crane": (
        PING,
        Step("GET", "/v2/a/manifests/v1", ALL_TYPES_IN_A_LINE, 200, IMAGE.manifest),
        Step("GET", "/v2/a/blobs/{config}", (), 200, IMAGE.blobs[0]),
        Step("GET", "/v2/a/blobs/{layer}", (), 200, LAYER),
    ),
    "oras": (
        Step("GET", "/v2/a/manifests/v1", ALL_TYPES_IN_A_LINE, 200, IMAGE.manifest),
        Step("GET", "/v2/a/blobs/{layer}", (), 200, LAYER),
        Step("GET", "/v2/a/referrers/{manifest}"),
    ),
    "stargz": (
        Step("GET", "/v2/a/blobs/{layer}", (("Range", "bytes=0-1"),), 206, LAYER[:2]),
        Step("GET", "/v2/a/blobs/{layer}", (("Accept-Encoding", "identity"),), 200, LAYER),
    ),
}


@pytest.mark.parametrize("client", PULLS)
async def test_a_pull_of_this_client_gets_what_it_needs(registry: Registry, client: str) -> None:
    await registry.add_image("a", IMAGE, "v1")
    await registry.add_image("a", make_image(10, seed=9))
    await registry.add_image("a", INDEX, "multi")
    keep_alive = CLOSE not in PULLS[client][0].lines
    async with registry.connect() as shared:
        for step in PULLS[client]:
            target = fill(step.target)
            if keep_alive:
                reply = await shared.request(step.method, target, step.lines)
            else:
                reply = await registry.request(step.method, target, step.lines)
            assert (reply.status, reply.complete) == (step.status, True), step
            if step.body is not None:
                assert reply.body == step.body, step
            assert "content-encoding" not in reply.headers
            if step.method == "HEAD":
                # Without these three containerd asks again with GET.
                assert reply.headers["docker-content-digest"].startswith("sha256:")
                assert int(reply.headers["content-length"]) > 0
                assert reply.headers["content-type"] in TYPES
            assert reply.headers.get("oci-namespace") == (
                "registry.example" if AS_MIRROR in target else None
            )


async def test_podman_with_zstd_chunked_gets_its_eight_ranges_as_eight_parts(
    registry: Registry,
) -> None:
    content = random.Random(4).randbytes(2 << 20)
    digest = await registry.add_blob("a", content)
    target = f"/v2/a/blobs/{digest}"
    table = await registry.request("GET", target, [("Range", "bytes=2000000-2097151"), CLOSE])
    assert (table.status, table.body) == (206, content[2_000_000:])
    # The first two touch: the client counts the parts, so they must stay two.
    spans = [(100_000 * i, 100_000 * i + 50_000) for i in range(8)]
    spans[1] = (50_000, 60_000)
    header = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
    reply = await registry.request("GET", target, [("Range", header), CLOSE])
    assert reply.status == 206
    parts = parse_multipart(reply.headers["content-type"], reply.body)
    assert [part for _, part in parts] == [content[start:stop] for start, stop in spans]


# --- pushes -----------------------------------------------------------------------------------

Upload = Callable[[Connection, bytes], object]


async def open_session(connection: Connection, lines: tuple[Line, ...] = ()) -> str:
    reply = await connection.request("POST", "/v2/a/blobs/uploads/", lines)
    assert reply.status == 202
    return reply.headers["location"]


async def assert_absent(connection: Connection, content: bytes) -> None:
    reply = await connection.request("HEAD", f"/v2/a/blobs/{Digest.of(content)}")
    assert reply.status == 404


async def push_like_skopeo(connection: Connection, content: bytes) -> Reply:
    await assert_absent(connection, content)
    location = await open_session(connection)
    patch = await connection.request("PATCH", location, [OCTETS], content)
    assert patch.status == 202
    target = f"{patch.headers['location']}?digest={Digest.of(content)}"
    return await connection.request("PUT", target, [OCTETS], b"")


async def push_like_podman(connection: Connection, content: bytes) -> Reply:
    # It compresses while it sends: neither digest nor length are known before the end.
    await assert_absent(connection, b"uncompressed")
    location = await open_session(connection)
    patch = await connection.request("PATCH", location, [OCTETS], content, chunked=True)
    target = f"{patch.headers['location']}?digest={Digest.of(content)}"
    return await connection.request("PUT", target, [OCTETS], b"")


async def push_like_dockerd(connection: Connection, content: bytes) -> Reply:
    location = await open_session(connection)
    patch = await connection.request("PATCH", location, [], content, chunked=True)
    target = f"{patch.headers['location']}?digest={str(Digest.of(content)).replace(':', '%3A')}"
    put = await connection.request("PUT", target, [], b"")
    head = await connection.request("HEAD", f"/v2/a/blobs/{Digest.of(content)}")
    assert (head.status, head.headers["content-length"]) == (200, str(len(content)))
    return put


async def push_like_containerd(connection: Connection, content: bytes) -> Reply:
    await assert_absent(connection, content)
    location = await open_session(connection)
    return await connection.request(
        "PUT", f"{location}?digest={Digest.of(content)}", [OCTETS], content
    )


async def push_like_crane(connection: Connection, content: bytes) -> Reply:
    await assert_absent(connection, content)
    location = await open_session(connection, (("Content-Type", "application/json"),))
    patch = await connection.request("PATCH", location, [], content)
    target = f"{patch.headers['location']}?digest={Digest.of(content)}"
    return await connection.request("PUT", target)


async def push_by_the_book(connection: Connection, content: bytes) -> Reply:
    location = await open_session(connection, (("Content-Length", "0"),))
    for start in range(0, len(content), 1 << 20):
        chunk = content[start : start + (1 << 20)]
        span = ("Content-Range", f"{start}-{start + len(chunk) - 1}")
        patch = await connection.request("PATCH", location, [OCTETS, span], chunk)
        assert patch.status == 202
        location = patch.headers["location"]
    return await connection.request("PUT", f"{location}?digest={Digest.of(content)}", [OCTETS], b"")


PUSHES: Final = {
    "skopeo": push_like_skopeo,
    "podman, buildah": push_like_podman,
    "dockerd": push_like_dockerd,
    "containerd, docker 26, oras": push_like_containerd,
    "crane": push_like_crane,
    "by the book": push_by_the_book,
}


@pytest.mark.parametrize("client", PUSHES)
async def test_a_push_of_this_client_is_there_afterwards(registry: Registry, client: str) -> None:
    async with registry.connect() as connection:
        assert (await connection.request("GET", "/v2/")).status == 200
        for blob in IMAGE.blobs:
            reply = await PUSHES[client](connection, blob)
            assert (reply.status, reply.body) == (201, b"")
            assert reply.headers["location"] == f"/v2/a/blobs/{Digest.of(blob)}"
        assert (await connection.request("HEAD", "/v2/a/manifests/v1")).status == 404
        content_type = [("Content-Type", IMAGE.media_type)]
        target = "/v2/a/manifests/v1"
        put = await connection.request("PUT", target, content_type, IMAGE.manifest)
        assert put.status == 201
        assert put.headers["docker-content-digest"] == str(IMAGE.digest)
        pulled = await connection.request("GET", target)
        assert pulled.body == IMAGE.manifest
        for blob in IMAGE.blobs:
            got = await connection.request("GET", f"/v2/a/blobs/{Digest.of(blob)}")
            assert got.body == blob
    assert registry.service.store.uploads.sessions == 0


@pytest.mark.parametrize(
    "query", ["?from=base&mount={}", "?mount={}&from=base"], ids=["skopeo, dockerd", "containerd"]
)
async def test_a_push_of_a_known_layer_mounts_it(registry: Registry, query: str) -> None:
    digest = await registry.add_blob("base", LAYER)
    async with registry.connect() as connection:
        assert (await connection.request("HEAD", f"/v2/a/blobs/{digest}")).status == 404
        reply = await connection.request("POST", "/v2/a/blobs/uploads/" + query.format(digest))
        assert (reply.status, reply.headers["location"]) == (201, f"/v2/a/blobs/{digest}")
        assert (await connection.request("HEAD", f"/v2/a/blobs/{digest}")).status == 200


async def test_an_index_is_pushed_children_first(registry: Registry) -> None:
    other = make_image(10, seed=9)
    for image in (IMAGE, other):
        for blob in image.blobs:
            await registry.add_blob("a", blob)

    async def put(connection: Connection, image: Image, reference: str) -> None:
        content_type = [("Content-Type", image.media_type)]
        target = f"/v2/a/manifests/{reference}"
        reply = await connection.request("PUT", target, content_type, image.manifest)
        assert reply.status == 201

    async with registry.connect() as connection:
        for image in (IMAGE, other):
            await put(connection, image, str(image.digest))
        await put(connection, INDEX, "v1")
        assert (await connection.request("GET", "/v2/a/manifests/v1")).body == INDEX.manifest
