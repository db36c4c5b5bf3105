"""What an upstream registry may do to us, one request at a time, over real sockets."""

from __future__ import annotations

import base64
import json
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog
import trio
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    InvalidRange,
    ManifestNotFound,
    ObjectNotFound,
    UpstreamBusy,
    UpstreamRefused,
)
from swarmpull.registry.http import ClientLimits
from swarmpull.registry.upstream import Patience, Upstream, open_upstream
from swarmpull.registry.upstream_auth import Challenge, parse_challenges
from swarmpull.registry.upstream_credentials import Credentials
from swarmpull.store.backends.base import CHUNK_BYTES_MAX, blob_key

from .roles import MANIFEST_TYPE, manifest_of
from .upstream_server import BASIC, PASSWORD, USER, FakeUpstream, Reply, fake_upstream

CONTENT = random.Random(7).randbytes(3 * CHUNK_BYTES_MAX + 77)
DIGEST = Digest.of(CONTENT)
KEY = blob_key(DIGEST)
REPOSITORY = "team/app"
QUICK = Patience(attempts=4, backoff_min=0.001, backoff_max=0.004, retry_after_max=2.0)
BOB = Credentials("here", USER, PASSWORD)


@pytest.fixture
async def server() -> AsyncIterator[FakeUpstream]:
    async with fake_upstream() as server:
        server.add_blob(REPOSITORY, CONTENT)
        server.add_image(REPOSITORY, "v1", b"config", b"layer")
        yield server


@asynccontextmanager
async def client(
    server: FakeUpstream, credentials: Credentials | None = None, **options: Any
) -> AsyncIterator[Upstream]:
    options.setdefault("patience", QUICK)
    async with open_upstream(server.url, credentials or Credentials("here"), **options) as upstream:
        yield upstream


async def read(upstream: Upstream, start: int = 0, stop: int | None = None) -> bytes:
    content = bytearray()
    async with upstream.backend(REPOSITORY).open(KEY, start=start, stop=stop) as chunks:
        async for chunk in chunks:
            assert 0 < len(chunk) <= CHUNK_BYTES_MAX
            content += chunk
    return bytes(content)


# --- blobs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, None),
        (0, len(CONTENT) + 9),
        (5, 17),
        (len(CONTENT) - 1, None),
        (7, 7),
        (len(CONTENT), None),
    ],
)
async def test_any_range_of_a_blob_can_be_read(server, start, stop) -> None:
    async with client(server) as upstream:
        assert (await upstream.backend(REPOSITORY).stat(KEY)).length == len(CONTENT)
        assert await read(upstream, start, stop) == CONTENT[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (len(CONTENT) + 1, None), (9, 3)])
async def test_a_range_outside_of_the_blob_is_refused(server, start, stop) -> None:
    async with client(server) as upstream:
        with pytest.raises(InvalidRange):
            await read(upstream, start, stop)


async def test_a_blob_that_the_upstream_lacks_is_not_found(server) -> None:
    key = blob_key(Digest.of(b"another"))
    async with client(server) as upstream:
        backend = upstream.backend(REPOSITORY)
        with pytest.raises(ObjectNotFound):
            await backend.stat(key)
        with pytest.raises(ObjectNotFound):
            async with backend.open(key):
                pass
        with pytest.raises(ObjectNotFound):
            await backend.get_bytes("no/blob/at/all")


async def test_nothing_is_written_to_an_upstream(server, tmp_path: Path) -> None:
    async with client(server) as upstream:
        backend = upstream.backend(REPOSITORY)
        for write in (
            backend.put_bytes(KEY, b"x"),
            backend.put_file(KEY, tmp_path / "file"),
            backend.delete(KEY),
        ):
            with pytest.raises(BackendUnavailable, match="only pulled from"):
                await write
    assert server.seen == []


async def test_a_body_that_breaks_off_is_continued_where_it_did(server) -> None:
    for cut in (1 << 20, 700_000, 0):
        server.fail(1, "GET .*/blobs/", Reply(200, {}, CONTENT, cut=cut))
        server.rules[-1] = ranged(server.rules[-1])
    async with client(server) as upstream:
        assert await read(upstream) == CONTENT
    ranges = [seen.headers.get("range") for seen in server.seen]
    assert ranges[0] is None
    assert len(ranges) == 4
    assert server.sent == len(CONTENT), "no byte was sent twice"


def ranged(rule):
    """The same fault, for whatever range is asked for."""

    def cut(seen):
        reply = rule(seen)
        if reply is None or "range" not in seen.headers:
            return reply
        start = int(seen.headers["range"].removeprefix("bytes=").partition("-")[0])
        extent = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        return attrs.evolve(
            reply, status=206, headers={"Content-Range": extent}, body=CONTENT[start:]
        )

    return cut


async def test_a_server_without_ranges_is_read_from_the_start_again(server) -> None:
    server.fail(1, "GET .*/blobs/", Reply(200, {}, CONTENT, cut=1 << 20))
    server.fail(1, "GET .*/blobs/", Reply(200, {}, CONTENT))
    async with client(server) as upstream:
        assert await read(upstream) == CONTENT


async def test_bodies_that_keep_breaking_off_without_a_byte_are_given_up(server) -> None:
    server.fail(99, "GET .*/blobs/", Reply(200, {}, CONTENT, cut=0))
    async with client(server) as upstream:
        with pytest.raises(BackendUnavailable) as caught:
            await read(upstream)
    assert caught.value.backend == f"{server.url}"
    assert len(server.seen) == QUICK.attempts


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(206, {"Content-Range": "bytes 7-9/10"}, b"abc"), "another range"),
        (Reply(206, {}, b"abc"), "another range"),
        (Reply(206, {"Content-Range": "bytes 5-7/" + "9" * 5000}, b"abc"), "another range"),
        (Reply(418, {}, b"[" * 50_000), "HTTP 418"),
        (Reply(200, {"Content-Encoding": "gzip"}, b"abc"), "compresses"),
        (Reply(418, {}, b'{"errors": [{"code": "X", "message": "tea"}]}'), "HTTP 418 X: tea"),
    ],
)
async def test_an_answer_that_makes_no_sense_is_an_error_at_once(server, reply, reason) -> None:
    server.fail(99, "GET .*/blobs/", reply)
    async with client(server) as upstream:
        with pytest.raises(BackendUnavailable, match=reason):
            await read(upstream, 5)
    assert len(server.seen) == 1


async def test_a_server_that_is_not_there_is_asked_several_times(server) -> None:
    with structlog.testing.capture_logs() as logs:
        limits = ClientLimits(connect=1.0, silence=1.0)
        gone = attrs.evolve(server, port=1)
        async with client(gone, limits=limits) as upstream:
            with pytest.raises(BackendUnavailable, match="refused"):
                await upstream.backend(REPOSITORY).stat(KEY)
    assert [entry["failed"] for entry in logs if entry["event"] == "upstream_retry"] == [1, 2, 3]


async def test_a_server_that_hangs_is_given_up_after_the_time_for_silence(
    nursery: trio.Nursery,
) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, say_nothing, listeners)
    silent = FakeUpstream(port=listeners[0].socket.getsockname()[1])
    patience = attrs.evolve(QUICK, attempts=2)
    async with client(silent, limits=ClientLimits(silence=0.05), patience=patience) as upstream:
        with pytest.raises(BackendUnavailable, match="Timeout"):
            await read(upstream)
    nursery.cancel_scope.cancel()


async def say_nothing(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


# --- patience -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_an_upstream_that_asks_for_a_moment_gets_it(server, status) -> None:
    server.fail(1, "GET", Reply(status, {"Retry-After": "1"}))
    began = trio.current_time()
    async with client(server) as upstream:
        assert await read(upstream) == CONTENT
    assert trio.current_time() - began >= 1.0


async def test_an_upstream_that_asks_for_an_hour_is_left_alone(server) -> None:
    server.fail(1, "GET", Reply(429, {"Retry-After": "3600"}))
    async with client(server) as upstream:
        with pytest.raises(UpstreamBusy) as caught:
            await read(upstream)
        assert caught.value.retry_after == 3600.0
        # Also for other requests, which are not even sent.
        with pytest.raises(UpstreamBusy) as caught:
            await upstream.head_manifest(REPOSITORY, "v1")
        assert 3590.0 < caught.value.retry_after <= 3600.0
    assert len(server.seen) == 1


async def test_a_date_may_be_asked_for_too(server) -> None:
    server.fail(1, "GET", Reply(429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}))
    async with client(server) as upstream:
        with pytest.raises(UpstreamBusy) as caught:
            await read(upstream)
    assert caught.value.retry_after == 86400.0


async def test_a_server_error_passes(server) -> None:
    server.fail(3, "GET", Reply(502, {}, b"<html>bad gateway</html>"))
    async with client(server) as upstream:
        assert await read(upstream) == CONTENT


# --- logins ---------------------------------------------------------------------------------------


async def test_a_token_is_fetched_once_and_used_until_it_expires(server) -> None:
    server.login = "token"
    async with client(server) as upstream:
        for _ in range(3):
            assert await read(upstream) == CONTENT
        await upstream.head_manifest(REPOSITORY, "v1")
    tokens = [seen for seen in server.seen if seen.path == "/token"]
    assert len(tokens) == 1
    assert tokens[0].query == {"service": ["fake"], "scope": [f"repository:{REPOSITORY}:pull"]}
    assert "authorization" not in tokens[0].headers
    assert len(server.seen) == 1 + 1 + 4


async def test_credentials_go_to_the_token_service_and_only_the_token_to_the_registry(
    server,
) -> None:
    server.login = "token"
    async with client(server, BOB) as upstream:
        await read(upstream)
    for seen in server.seen:
        sent = seen.headers.get("authorization")
        assert (sent == BASIC) == (seen.path == "/token")


async def test_a_token_that_is_no_longer_taken_is_replaced(server) -> None:
    server.login = "token"
    async with client(server) as upstream:
        await read(upstream)
        server.tokens.clear()
        assert await read(upstream) == CONTENT
    assert [seen.path for seen in server.seen].count("/token") == 2


async def test_a_token_is_replaced_when_its_time_is_over(server) -> None:
    server.login = "token"
    server.expires_in = 0.001
    async with client(server) as upstream:
        await read(upstream)
        await trio.sleep(0.002)
        server.seen.clear()
        await read(upstream)
    assert "authorization" not in server.seen[0].headers, "the old one is not even tried"


async def test_many_requests_at_once_share_one_token(server) -> None:
    server.login = "token"
    async with client(server) as upstream, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(read, upstream)
    assert [seen.path for seen in server.seen].count("/token") == 1


async def test_basic_authentication_from_every_source(server, tmp_path: Path) -> None:
    server.login = "basic"
    secret = tmp_path / "password"
    secret.write_text(f"{PASSWORD}\n")
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    docker = tmp_path / "config.json"
    docker.write_text(json.dumps({"auths": {"https://here/v2/": {"auth": auth}}}))
    for credentials in (
        BOB,
        Credentials("here", USER, password_file=str(secret)),
        Credentials("here", docker_config=str(docker)),
    ):
        server.seen.clear()
        async with client(server, credentials) as upstream:
            assert await read(upstream) == CONTENT
            assert await read(upstream, 5, 9) == CONTENT[5:9]
        assert len(server.seen) == 3, "what it wants is known from then on"


@pytest.mark.parametrize(
    ("credentials", "reason"),
    [
        (Credentials("here"), "there are none"),
        (Credentials("here", USER, "wrong"), "does not take"),
        (
            Credentials("here", USER, password_file="/does/not/exist"),
            "/does/not/exist: No such file",
        ),
        (Credentials("here", docker_config="/dev/null"), "not a file of docker login"),
    ],
)
async def test_without_the_right_credentials_the_upstream_refuses(
    server, credentials, reason
) -> None:
    server.login = "basic"
    async with client(server, credentials) as upstream:
        with pytest.raises(UpstreamRefused, match=reason) as caught:
            await read(upstream)
    assert "wrong" not in str(caught.value)


async def test_a_wrong_password_is_refused_by_the_token_service(server) -> None:
    server.login = "token"
    async with client(server, Credentials("here", USER, "wrong")) as upstream:
        with pytest.raises(
            UpstreamRefused, match="token service does not take this user"
        ) as caught:
            await read(upstream)
    assert "wrong" not in repr(caught.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"[" * 500_000, b'{"token": ""}', b'{"token": "a\\r\\nb: c"}', b'{"token": 7}'],
)
async def test_what_is_no_token_is_not_sent_on(server, body) -> None:
    server.login = "token"
    server.fail(99, "/token", Reply(200, {}, body))
    async with client(server) as upstream:
        with pytest.raises(UpstreamRefused, match="no token"):
            await read(upstream)


async def test_a_token_service_that_fails_for_a_moment_is_asked_again(server) -> None:
    server.login = "token"
    server.fail(2, "/token", Reply(503))
    async with client(server) as upstream:
        assert await read(upstream) == CONTENT


def test_docker_hub_has_its_own_name_in_the_file_of_docker_login(tmp_path: Path) -> None:
    auth = base64.b64encode(b"hub:key").decode()
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": auth}}}))

    async def basic(registry: str) -> str | None:
        found = await Credentials(registry, docker_config=str(file)).find()
        return None if found is None else found.basic

    assert trio.run(basic, "docker.io") == f"Basic {auth}"
    assert trio.run(basic, "quay.io") is None


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ('Basic realm="a, b"', [Challenge("basic", {"realm": "a, b"})]),
        (
            'Bearer realm="https://a/t?x=1",service="s",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://a/t?x=1",
                        "service": "s",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (
            'Negotiate, Basic realm=x, Bearer realm="q\\"uoted"',
            [
                Challenge("negotiate", {}),
                Challenge("basic", {"realm": "x"}),
                Challenge("bearer", {"realm": 'q"uoted'}),
            ],
        ),
        ("", []),
        ("?!", []),
    ],
)
def test_challenges_are_read(header, challenges) -> None:
    assert list(parse_challenges(header)) == challenges


@given(st.text(max_size=200) | st.text(alphabet=' ,="\\\\aB', max_size=200))
def test_whatever_a_challenge_is_reading_it_ends(header) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme


@pytest.mark.parametrize("realm", ["", "http://[", "file:///etc/passwd", "//x", "http://x:y/"])
async def test_a_realm_that_is_no_address_is_not_asked(server, realm) -> None:
    refusal = Reply(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'})
    server.fail(99, "GET", refusal)
    async with client(server, BOB) as upstream:
        with pytest.raises((UpstreamRefused, BackendUnavailable), match="token service"):
            await read(upstream)
    assert "/token" not in "".join(server.lines)


# --- redirects ------------------------------------------------------------------------------------


async def test_a_redirect_to_another_host_is_followed_without_our_credentials(server) -> None:
    server.login = "basic"
    async with fake_upstream() as bucket:
        bucket.add_blob(REPOSITORY, CONTENT)
        location = f"http://{bucket.address}/v2/{REPOSITORY}/blobs/{DIGEST}?signature=secret"
        blob = Reply(307, {"Location": location})
        server.rules.append(
            lambda seen: (
                blob if "/blobs/" in seen.path and "authorization" in seen.headers else None
            )
        )
        async with client(server, BOB) as upstream:
            assert await read(upstream, 3, 9) == CONTENT[3:9]
            assert await upstream.backend(REPOSITORY).stat(KEY)
        assert [seen.line.split()[0] for seen in bucket.seen] == ["GET", "HEAD"]
        assert all("authorization" not in seen.headers for seen in bucket.seen)
        assert bucket.seen[0].headers["range"] == "bytes=3-8"


async def test_what_is_signed_or_secret_is_in_no_log(server, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    server.login = "token"
    location = f"http://{server.address}/v2/elsewhere/blobs/{DIGEST}?signature=SIGNED"
    server.blobs["elsewhere", str(DIGEST)] = CONTENT
    moved = Reply(307, {"Location": location})
    server.rules.append(
        lambda seen: moved if REPOSITORY in seen.path and "authorization" in seen.headers else None
    )
    server.fail(1, "GET .*/elsewhere/", Reply(500))
    with structlog.testing.capture_logs() as logs:
        async with client(server, BOB) as upstream:
            assert await read(upstream) == CONTENT
    for secret in ("SIGNED", PASSWORD, BASIC, *server.tokens):
        assert secret not in caplog.text + repr(logs)


async def test_a_redirect_within_the_registry_keeps_them(server) -> None:
    server.login = "basic"
    server.blobs["elsewhere", str(DIGEST)] = CONTENT
    moved = Reply(307, {"Location": f"/v2/elsewhere/blobs/{DIGEST}"})
    server.rules.append(
        lambda seen: moved if REPOSITORY in seen.path and "authorization" in seen.headers else None
    )
    async with client(server, BOB) as upstream:
        assert await read(upstream) == CONTENT


@pytest.mark.parametrize(
    "location", ["http://[", "http://h:99999999/", "file:///etc/passwd", "x://"]
)
async def test_a_redirect_to_what_is_no_address_is_an_error(server, location) -> None:
    server.fail(99, "GET", Reply(302, {"Location": location}))
    async with client(server) as upstream:
        with pytest.raises(BackendUnavailable, match="redirects to what is no"):
            await read(upstream)


async def test_redirects_end_somewhere(server) -> None:
    server.fail(99, "GET", Reply(302, {"Location": "/v2/again"}))
    async with client(server) as upstream:
        with pytest.raises(BackendUnavailable, match="more than 5 times"):
            await read(upstream)
    assert len(server.seen) == 6


async def test_a_bucket_that_refuses_is_no_login_of_ours(server) -> None:
    async with fake_upstream() as bucket:
        bucket.fail(99, "GET", Reply(403, {}, b"expired"))
        server.fail(
            99, "GET", Reply(307, {"Location": f"http://{bucket.address}/x?signature=secret"})
        )
        async with client(server, BOB) as upstream:
            with pytest.raises(UpstreamRefused, match="HTTP 403 expired") as caught:
                await read(upstream)
    assert "secret" not in str(caught.value)


# --- manifests ------------------------------------------------------------------------------------


async def test_a_manifest_is_found_by_tag_and_by_digest(server) -> None:
    content = manifest_of(b"config", b"layer")
    async with client(server) as upstream:
        for reference in ("v1", str(Digest.of(content))):
            descriptor = await upstream.head_manifest(REPOSITORY, reference)
            manifest = await upstream.get_manifest(REPOSITORY, reference)
            assert manifest.content == content
            assert manifest.descriptor == descriptor
            assert descriptor.digest == Digest.of(content)
        with pytest.raises(ManifestNotFound):
            await upstream.head_manifest(REPOSITORY, "v2")
        with pytest.raises(ManifestNotFound):
            await upstream.get_manifest(REPOSITORY, "v2")


async def test_what_has_not_changed_is_said_so(server) -> None:
    async with client(server) as upstream:
        first = await upstream.head_manifest(REPOSITORY, "v1")
        assert await upstream.head_manifest(REPOSITORY, "v1", known=first) is first
    assert server.seen[1].headers["if-none-match"] == f'"{first.digest}"'


async def test_a_registry_whose_head_says_little_is_asked_for_the_content(server) -> None:
    server.fail(1, "HEAD", Reply(200, {"Content-Type": "application/json"}))
    async with client(server) as upstream:
        descriptor = await upstream.head_manifest(REPOSITORY, "v1")
    assert descriptor.digest == Digest.of(manifest_of(b"config", b"layer"))
    assert [line.split()[0] for line in server.lines] == ["HEAD", "GET"]


async def test_a_manifest_that_is_not_what_its_digest_says_is_refused(server) -> None:
    other = manifest_of(b"other", b"layer")
    digest = str(Digest.of(manifest_of(b"config", b"layer")))
    server.manifests[REPOSITORY, digest] = other
    async with client(server) as upstream:
        with pytest.raises(BackendUnavailable, match="hashes to"):
            await upstream.get_manifest(REPOSITORY, digest)
        server.fail(1, "GET", Reply(200, {"Docker-Content-Digest": digest}, other))
        with pytest.raises(BackendUnavailable, match="hashes to"):
            await upstream.get_manifest(REPOSITORY, "v1")


async def test_a_media_type_that_could_not_be_passed_on_is_not_believed(server) -> None:
    content = manifest_of(b"config", b"layer")
    odd = {"Content-Type": "a b", "Docker-Content-Digest": str(Digest.of(content))}
    server.fail(1, "HEAD", Reply(200, odd, content))
    async with client(server) as upstream:
        assert (await upstream.head_manifest(REPOSITORY, "v1")).media_type == MANIFEST_TYPE


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b" " * ((4 << 20) + 1)])
async def test_what_is_no_manifest_is_refused(server, body) -> None:
    server.fail(1, "GET", Reply(200, {}, body))
    async with client(server) as upstream:
        with pytest.raises(BackendUnavailable, match=r"of no use|more than"):
            await upstream.get_manifest(REPOSITORY, "v1")


async def test_a_manifest_that_breaks_off_is_fetched_again(server) -> None:
    server.fail(2, "GET", Reply(200, {}, manifest_of(b"config", b"layer"), cut=20))
    async with client(server) as upstream:
        manifest = await upstream.get_manifest(REPOSITORY, "v1")
    assert manifest.content == manifest_of(b"config", b"layer")
