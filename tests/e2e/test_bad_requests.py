"""Wrong requests get a clear 4xx in the form of the specification, at once, and change nothing."""

from __future__ import annotations

import json
import random
import socket
import time
from typing import Final

import pytest

from . import web
from .program import Cluster

MIB: Final = 1 << 20
# Nobody asks a backend or a peer that does not answer for what does not exist.
FAST_SECONDS: Final = 2.0
UNKNOWN: Final = web.digest_of(b"content that nobody ever pushed")


@pytest.fixture(params=["origin", "agent 1", "agent 3"])
def port(cluster: Cluster, request) -> int:
    ports = {
        "origin": cluster.ports.origin_registry,
        "agent 1": cluster.registries[0],
        "agent 3": cluster.registries[2],
    }
    return ports[request.param]


def assert_refused(answer: web.Answer, status: int, *codes: str) -> None:
    assert answer.status == status, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "application/json"
    assert answer.codes
    assert set(answer.codes) <= set(codes), answer.text
    for error in answer.json()["errors"]:
        assert error["message"]


# --- uploads ----------------------------------------------------------------------------------


def test_content_under_a_wrong_digest_is_refused_and_not_visible(
    cluster: Cluster, port: int
) -> None:
    digest = web.digest_of(b"what was announced")

    assert_refused(
        web.push_blob(port, "team/wrong", b"what was sent", digest=digest), 400, "DIGEST_INVALID"
    )

    for content in (b"what was announced", b"what was sent"):
        for place in (cluster.ports.origin_registry, *cluster.registries):
            target = f"/v2/team/wrong/blobs/{web.digest_of(content)}"
            assert web.request(place, "GET", target).status == 404


@pytest.mark.parametrize("digest", ["", "sha256:abc", "md5:" + "0" * 32, "sha256:" + "G" * 64])
def test_an_upload_under_what_is_no_digest_is_refused(port: int, digest: str) -> None:
    assert_refused(
        web.push_blob(port, "team/wrong", b"content", digest=digest), 400, "DIGEST_INVALID"
    )


def test_a_truncated_upload_is_not_visible_and_is_resumed(cluster: Cluster, port: int) -> None:
    content = random.Random(port).randbytes(6 * MIB)
    digest, target = web.digest_of(content), web.start_upload(port, "team/resumed")
    send_part_of_a_patch(port, target, content, sent=4 * MIB)

    assert web.request(port, "HEAD", f"/v2/team/resumed/blobs/{digest}").status == 404
    target = send_the_rest(port, target, content)
    assert web.request(port, "PUT", web.with_digest(target, digest), body=b"").status == 201
    for place in (cluster.ports.origin_registry, *cluster.registries):
        assert web.stream(place, f"/v2/team/resumed/blobs/{digest}").digest == digest


def send_the_rest(port: int, target: str, content: bytes) -> str:
    """Continue where the session says it is; returns the target that finishes it.

    The session may still be writing what arrived before the cut.  It then says so, with another
    offset or with a conflict, and is asked again.
    """
    for _ in range(100):
        answer = web.request(port, "GET", target)
        assert answer.status == 204, answer.text
        offset = int(answer.headers["range"].partition("-")[2]) + 1
        headers = {
            "Content-Range": f"{offset}-{len(content) - 1}",
            "Content-Type": "application/octet-stream",
        }
        patched = web.request(port, "PATCH", target, body=content[offset:], headers=headers)
        if patched.status == 202:
            return web.path_of(patched.headers["location"])
        assert patched.status in {409, 416}, patched.text
    raise AssertionError("the session does not get rid of the request that was cut off")


def send_part_of_a_patch(port: int, target: str, content: bytes, *, sent: int) -> None:
    """A PATCH whose connection ends before its body does."""
    head = (
        f"PATCH {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as stream:
        stream.sendall(head.encode() + content[:sent])
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)  # until the other side has noticed


def test_a_chunk_out_of_order_is_refused_and_the_upload_goes_on(port: int) -> None:
    target = web.start_upload(port, "team/chunks")
    ahead = {"Content-Range": "5-9", "Content-Type": "application/octet-stream"}
    answer = web.request(port, "PATCH", target, body=b"56789", headers=ahead)
    assert answer.status == 416

    for start in (0, 5):
        headers = {**ahead, "Content-Range": f"{start}-{start + 4}"}
        chunk = b"0123456789"[start : start + 5]
        answer = web.request(port, "PATCH", target, body=chunk, headers=headers)
        assert answer.status == 202, answer.text
        target = web.path_of(answer.headers["location"])
        assert answer.headers["range"] == f"0-{start + 4}"
    target = web.with_digest(target, web.digest_of(b"0123456789"))
    assert web.request(port, "PUT", target, body=b"").status == 201


def test_a_cancelled_upload_is_unknown_afterwards(port: int) -> None:
    target = web.start_upload(port, "team/cancelled")
    assert web.request(port, "DELETE", target).status == 204

    assert_refused(web.request(port, "GET", target), 404, "BLOB_UPLOAD_UNKNOWN")
    answer = web.request(port, "PUT", web.with_digest(target, web.digest_of(b"x")), body=b"x")
    assert_refused(answer, 404, "BLOB_UPLOAD_UNKNOWN")


@pytest.mark.parametrize("upload", ["0" * 32, "no-such-upload", "..", "%2e%2e%2f%2e%2e%2fetc"])
def test_an_unknown_upload_is_reported(port: int, upload: str) -> None:
    answer = web.request(port, "PATCH", f"/v2/team/app/blobs/uploads/{upload}", body=b"x")

    assert_refused(answer, 404, "BLOB_UPLOAD_UNKNOWN")


# --- unknown content --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "codes"),
    [
        (f"/v2/team/unknown/blobs/{UNKNOWN}", ["BLOB_UNKNOWN", "NAME_UNKNOWN"]),
        (f"/blobs/{UNKNOWN}", ["BLOB_UNKNOWN"]),
        (f"/v2/team/unknown/manifests/{UNKNOWN}", ["MANIFEST_UNKNOWN", "NAME_UNKNOWN"]),
        ("/v2/team/unknown/manifests/latest", ["MANIFEST_UNKNOWN", "NAME_UNKNOWN"]),
        ("/v2/team/unknown/tags/list", ["NAME_UNKNOWN"]),
    ],
)
def test_what_is_unknown_is_reported_at_once(port: int, target: str, codes: list[str]) -> None:
    # What waits for a limit does so each time; a busy machine may take its time now and then.
    took = []
    for _ in range(3):
        started = time.monotonic()
        answer = web.request(port, "GET", target)
        head = web.request(port, "HEAD", target)
        took.append(time.monotonic() - started)

        assert_refused(answer, 404, *codes)
        assert (head.status, head.body) == (404, b"")
    assert min(took) < FAST_SECONDS


# --- manifests --------------------------------------------------------------------------------


def test_a_manifest_whose_blobs_are_missing_is_refused(port: int) -> None:
    repository = "team/missing"
    held, missing = b"{}", b"a layer that was not pushed"
    assert web.push_blob(port, repository, held).status == 201

    answer = web.put_manifest(port, repository, "v1", web.manifest_of(held, [missing]))

    assert_refused(answer, 400, "MANIFEST_BLOB_UNKNOWN")
    assert web.digest_of(missing) in answer.text
    assert web.digest_of(held) not in answer.text
    assert web.get_manifest(port, repository, "v1").status == 404


def test_an_index_whose_images_are_missing_is_refused(port: int) -> None:
    child = web.descriptor_of(b"a manifest that was not pushed", web.OCI_MANIFEST)
    index = {"schemaVersion": 2, "mediaType": web.OCI_INDEX, "manifests": [child]}

    answer = web.put_manifest(
        port, "team/missing", "index", json.dumps(index).encode(), web.OCI_INDEX
    )

    assert_refused(answer, 400, "MANIFEST_BLOB_UNKNOWN")


@pytest.mark.parametrize(
    "content", [b"", b"not JSON", b"[]", b'{"schemaVersion": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_manifest_is_refused(port: int, content: bytes) -> None:
    answer = web.put_manifest(port, "team/invalid", "v1", content)

    assert_refused(answer, 400, "MANIFEST_INVALID")
    assert web.get_manifest(port, "team/invalid", "v1").status == 404


def test_a_manifest_under_the_digest_of_another_is_refused(port: int) -> None:
    config = b"{}"
    assert web.push_blob(port, "team/other", config).status == 201

    answer = web.put_manifest(port, "team/other", UNKNOWN, web.manifest_of(config, []))

    assert_refused(answer, 400, "DIGEST_INVALID")
    assert web.get_manifest(port, "team/other", UNKNOWN).status == 404


def test_a_manifest_above_4_mib_is_refused(port: int) -> None:
    config = b"{}"
    assert web.push_blob(port, "team/huge", config).status == 201
    huge = web.manifest_of(config, [], annotations={"padding": "x" * (4 * MIB)})

    answer = web.put_manifest(port, "team/huge", "v1", huge)

    assert_refused(answer, 413, "MANIFEST_INVALID", "SIZE_INVALID")
    assert web.get_manifest(port, "team/huge", "v1").status == 404


def test_a_manifest_of_almost_4_mib_is_kept(cluster: Cluster) -> None:
    config, origin = b"{}", cluster.ports.origin_registry
    assert web.push_blob(origin, "team/large", config).status == 201
    large = web.manifest_of(config, [], annotations={"padding": "x" * (4 * MIB - 1000)})
    assert len(large) < 4 * MIB

    assert web.put_manifest(origin, "team/large", "v1", large).status == 201

    assert web.get_manifest(cluster.registries[1], "team/large", "v1").body == large


# --- names and paths --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Team/App",
        "team//app",
        "team/app-",
        "team/../../etc",
        "%2e%2e/app",
        "team/%2fetc",
        "a" * 300,
    ],
)
def test_a_name_outside_the_grammar_is_refused(port: int, name: str) -> None:
    for method, rest in (
        ("GET", "manifests/latest"),
        ("GET", f"blobs/{UNKNOWN}"),
        ("POST", "blobs/uploads/"),
    ):
        answer = web.request(port, method, f"/v2/{name}/{rest}")
        assert answer.status in {400, 404}, answer
        assert answer.codes[0] in {"NAME_INVALID", "NAME_UNKNOWN", "UNSUPPORTED"}


@pytest.mark.parametrize("tag", [".hidden", "-x", "a" * 129, "a%2fb", "..", "%00", "sha256:abc"])
def test_a_tag_outside_the_grammar_is_refused(port: int, tag: str) -> None:
    config = b"{}"
    assert web.push_blob(port, "team/tags", config).status == 201

    answer = web.put_manifest(port, "team/tags", tag, web.manifest_of(config, []))

    assert answer.status in {400, 404}, answer
    assert answer.codes
    found = web.get_manifest(port, "team/tags", tag)
    assert found.status in {400, 404}, found


@pytest.mark.parametrize(
    "target",
    [
        "/v2/../../../etc/passwd",
        "/v2/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/v2/team/app/blobs/../../../../../etc/passwd",
        "/v2/team/app/blobs/sha256:..%2f..%2f..%2fetc%2fpasswd",
        "/v2/team/app/manifests/..%2f..%2f..%2fetc%2fpasswd",
        "/v2/team/app/blobs/uploads/..%2f..%2f..%2fetc%2fpasswd",
        "/v2/team/app/referrers/..%2f..%2fetc%2fpasswd",
        "/blobs/..%2f..%2f..%2fetc%2fpasswd",
        "/blobs/../../etc/passwd",
        "/%00",
        "//v2//",
        "/" + "x" * 4000,
    ],
)
def test_a_path_that_climbs_finds_nothing(port: int, target: str) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        body = b"x" if method == "PUT" else None
        answer = web.request(port, method, target, body=body)
        assert 400 <= answer.status < 500, answer
        assert b"root:" not in answer.body


@pytest.mark.parametrize("query", ["n=-1", "n=x", "n=1e9", f"n={'9' * 400}"])
def test_an_absurd_page_length_is_refused_or_bounded(port: int, query: str) -> None:
    web.push_image(port, "team/pages", "v1", [])

    answer = web.request(port, "GET", f"/v2/team/pages/tags/list?{query}")

    assert answer.status in {200, 400}, answer
    if answer.status == 200:
        assert answer.json()["tags"] == ["v1"]
    else:
        assert answer.codes


# --- ranges -----------------------------------------------------------------------------------


@pytest.fixture
def blob(cluster: Cluster) -> tuple[str, bytes]:
    content = b"0123456789" * 100
    assert web.push_blob(cluster.ports.origin_registry, "team/ranged", content).status == 201
    return f"/v2/team/ranged/blobs/{web.digest_of(content)}", content


@pytest.mark.parametrize(
    "header",
    ["bytes=1000-", "bytes=5000-6000", "bytes=9-3", "bytes=-0", f"bytes={'9' * 400}-", "bytes=x-y"],
)
def test_a_range_outside_the_blob_is_refused(
    port: int, blob: tuple[str, bytes], header: str
) -> None:
    target, content = blob

    answer = web.request(port, "GET", target, headers={"Range": header})

    assert answer.status == 416, answer
    assert answer.headers["content-range"] == f"bytes */{len(content)}"


def test_thousands_of_overlapping_ranges_do_not_multiply_the_answer(
    port: int, blob: tuple[str, bytes]
) -> None:
    target, content = blob
    header = "bytes=" + ",".join(["0-999"] * 2000)

    answer = web.request(port, "GET", target, headers={"Range": header})

    assert answer.status in {200, 400, 416, 431}
    assert len(answer.body) <= 2 * len(content)


def test_several_ranges_come_as_parts(port: int, blob: tuple[str, bytes]) -> None:
    target, content = blob

    answer = web.request(port, "GET", target, headers={"Range": "bytes=0-3,500-503,-4"})

    assert answer.status == 206
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    parts = answer.body.split(f"--{boundary}".encode())[1:-1]
    bodies = [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts]
    assert bodies == [content[:4], content[500:504], content[-4:]]


# --- the connection itself --------------------------------------------------------------------


def test_the_tls_probe_of_docker_is_answered_in_http(port: int) -> None:
    """docker tries TLS first and falls back to HTTP only when the answer is HTTP."""
    client_hello = bytes.fromhex("160301007b010000770303") + bytes(32) + b"\x00\x00\x02\x00\x2f"
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as stream:
        stream.sendall(client_hello)
        assert stream.recv(100).startswith(b"HTTP/1.1 400")


def test_a_method_that_an_endpoint_lacks_is_refused_by_name(port: int) -> None:
    answer = web.request(port, "POST", "/v2/team/app/manifests/latest", body=b"x")

    assert answer.status == 405
    assert "GET" in answer.headers["allow"]
