"""What is special to the S3 backend: its URL, faults on the way to the server, uploads in parts."""

from __future__ import annotations

import os
import random
import shutil
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import attrs
import minio.time
import pytest
import trio
import trio.testing

from swarmpull.errors import BackendUnavailable, ObjectNotFound, ObjectReplaced, StartupError
from swarmpull.store.backends import S3Backend, open_backend, s3
from swarmpull.store.backends.s3_client import Call, _Watched, multipart_etag
from swarmpull.store.s3_location import parse_location

from .s3_proxy import Fault, FaultyProxy
from .s3_server import ACCESS_KEY, BUCKET, S3Server, credentials

MIB = 1 << 20
# Below the read timeout of 30 s, far above what anything here takes.
PROMPTLY = 20.0
SLOW_DOWN = Fault("answer")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(s3, "BACKOFF_MIN", 0.001)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
async def backend(s3_server: S3Server, proxy: FaultyProxy):
    """A backend behind the proxy; nothing may be left in the bucket."""
    opened = await open_backend(url_of(proxy.port, "under/here", "part_size=5MiB"))
    assert isinstance(opened, S3Backend)
    proxy.seen.clear()
    yield opened
    proxy._faults.clear()
    for key in (await opened.list()).keys:
        await opened.delete(key)
    assert s3_server.uploads() == []


def url_of(port: int, prefix: str = "", options: str = "", bucket: str = BUCKET) -> str:
    return f"s3://{bucket}/{prefix}?endpoint=127.0.0.1:{port}&secure=false&{options}"


def random_bytes(length: int) -> bytes:
    return random.Random(length).randbytes(length)


async def read(backend: S3Backend, key: str, start: int = 0, stop: int | None = None) -> bytes:
    async with backend.open(key, start=start, stop=stop) as chunks:
        return b"".join([chunk async for chunk in chunks])


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """Four parts, the last one short."""
    path = tmp_path / "big"
    path.write_bytes(random_bytes(16 * MIB + 5))
    return path


# --- the URL --------------------------------------------------------------------------------------


def test_a_url_says_all_but_the_credentials() -> None:
    location = parse_location(
        "s3://bucket/some/prefix/?endpoint=minio:9000&secure=false&region=here&profile=team"
        "&part_size=64MiB&connections=8&connect_timeout=1s&read_timeout=500ms&attempts=3&ordered=false"
    )

    assert (location.bucket, location.prefix) == ("bucket", "some/prefix/")
    assert (location.endpoint, location.secure) == ("minio:9000", False)
    assert (location.region, location.profile) == ("here", "team")
    assert (location.part_size, location.connections) == (64 * MIB, 8)
    assert (location.connect_timeout, location.read_timeout) == (1.0, 0.5)
    assert (location.attempts, location.ordered) == (3, False)
    assert location.name == "s3://bucket/some/prefix/?endpoint=minio:9000"


def test_a_bucket_alone_is_one_of_amazon(monkeypatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    location = parse_location("s3://bucket")

    assert (location.endpoint, location.secure) == ("s3.amazonaws.com", True)
    assert (location.region, location.prefix) == ("eu-central-1", "")
    assert location.name == "s3://bucket/"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3://a/b", "not the name of a bucket"),
        ("s3://bucket?bukket=x", "no option 'bukket'"),
        ("s3://bucket?secret_key=TOPSECRET", "no option 'secret_key'"),
        ("s3://key:TOPSECRET@bucket/x", "holds credentials"),
        ("s3://bucket?secure=yes", "true or false"),
        ("s3://bucket?endpoint=http://host:9000", "without a scheme"),
        ("s3://bucket?part_size=1MiB", "from 5MiB to 1GiB"),
        ("s3://bucket?part_size=big", "a size such as"),
        ("s3://bucket?read_timeout=0", "more than nothing"),
        ("s3://bucket?read_timeout=30", "a duration with its unit"),
        ("s3://bucket?attempts=0", "from 1 to 999"),
        ("s3://bucket?attempts=1&attempts=2", "given twice"),
        ("s3://bucket?credentials_file=relative", "absolute path"),
        ("s3://bucket?credentials_env=1", "name of a variable"),
        ("s3://bucket?credentials_env=A&profile=b", "two places"),
        ("s3://bucket/a//b", "prefix"),
        ("s3://bucket/../b", "prefix"),
        ("s3://bucket/a#b", "'#'"),
    ],
)
async def test_a_wrong_url_is_refused_without_telling_secrets(url, said) -> None:
    with pytest.raises(StartupError) as caught:
        await open_backend(url)

    assert said in str(caught.value)
    assert caught.value.remedy
    assert "TOPSECRET" not in str(caught.value)


# --- starting -------------------------------------------------------------------------------------


async def test_a_missing_bucket_is_said_at_the_start(s3_server) -> None:
    with pytest.raises(StartupError, match=r"NoSuchBucket.*create the bucket"):
        await open_backend(url_of(s3_server.port, bucket="missing-bucket"))


@pytest.mark.parametrize("keys", [(ACCESS_KEY, "wrong"), ("nobody", "wrong"), ("", "")])
async def test_wrong_credentials_are_said_at_the_start(s3_server, keys) -> None:
    with credentials(*keys), pytest.raises(StartupError, match="check AWS_ACCESS_KEY_ID"):
        await open_backend(url_of(s3_server.port))


async def test_a_clock_that_is_wrong_is_said_at_the_start(s3_server, monkeypatch) -> None:
    now = minio.time.utcnow
    monkeypatch.setattr(minio.time, "utcnow", lambda: now() - timedelta(hours=1))

    with pytest.raises(StartupError, match=r"RequestTimeTooSkewed.*set this host's clock"):
        await open_backend(url_of(s3_server.port))


async def test_credentials_come_from_a_profile(s3_server, tmp_path, monkeypatch) -> None:
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    file = tmp_path / "credentials"
    file.write_text(f"[team]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    with credentials("nobody", "wrong"):
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        backend = await open_backend(url_of(s3_server.port, options="profile=team"))

        assert (await backend.list()).keys == ()


async def test_credentials_come_from_a_file_or_variables_of_one_backend(
    s3_server, tmp_path, monkeypatch
) -> None:
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("TEAM_ACCESS_KEY_ID", key)
    monkeypatch.setenv("TEAM_SECRET_ACCESS_KEY", secret)
    with credentials("nobody", "wrong"):
        for options in (f"credentials_file={file}", "credentials_env=TEAM"):
            backend = await open_backend(url_of(s3_server.port, options=options))
            assert (await backend.list()).keys == ()
        for options, looked in (
            (f"credentials_file={file}&profile=other", f"profile other in {file}"),
            ("credentials_env=NONE", "NONE_ACCESS_KEY_ID"),
        ):
            with pytest.raises(StartupError) as caught:
                await open_backend(url_of(s3_server.port, options=options))
            assert looked in str(caught.value)
            assert secret not in str(caught.value)


async def test_a_server_that_does_not_answer_yet_is_no_reason_not_to_start(
    s3_server, proxy
) -> None:
    proxy.refusing = True
    backend = await open_backend(url_of(proxy.port, options="attempts=2"))

    with pytest.raises(BackendUnavailable):
        await backend.list()
    proxy.refusing = False
    assert (await backend.list()).keys == ()


async def test_a_bucket_that_goes_away_does_not_look_empty(s3_server, monkeypatch) -> None:
    monkeypatch.setattr(s3, "BUCKET_BELIEVED", 0.0)
    s3_server.admin.make_bucket("short-lived")
    backend = await open_backend(url_of(s3_server.port, bucket="short-lived"))
    s3_server.admin.remove_bucket("short-lived")

    for operation in (backend.stat, backend.get_bytes, backend.delete, backend.list):
        with pytest.raises(BackendUnavailable, match="bucket short-lived does not exist: create"):
            await operation("a")


# --- names ----------------------------------------------------------------------------------------


async def test_objects_are_where_the_documentation_says(backend, s3_server) -> None:
    await backend.put_bytes("blobs/sha256/ab/abc1", b"content")
    await backend.put_bytes("a[b\\c", b"")

    stat = s3_server.admin.stat_object(BUCKET, "under/here/blobs/sha256/ab/abc1")
    assert stat.size == 7
    assert s3_server.admin.stat_object(BUCKET, "under/here/a[0b[1c").size == 0
    assert backend.name.startswith(f"s3://{BUCKET}/under/here/?endpoint=127.0.0.1:")


async def test_objects_that_are_not_ours_are_left_alone(backend, s3_server) -> None:
    foreign = ["elsewhere", "under/here2", "under/here/a[b"]
    for name in foreign:
        s3_server.admin._put_object(BUCKET, name, b"x", {})
    await backend.put_bytes("a", b"")

    assert (await backend.list()).keys == ("a",)
    assert (await backend.list(limit=1)).keys == ("a",)
    for name in foreign:
        s3_server.admin.remove_object(BUCKET, name)


async def test_pages_are_followed_to_the_end(backend, monkeypatch) -> None:
    monkeypatch.setattr(s3, "PAGE_MAX", 3)
    keys = tuple(f"k{number:02}" for number in range(10))
    for key in keys:
        await backend.put_bytes(key, b"")

    for ordered in (True, False):
        backend._ordered = ordered
        assert (await backend.list()).keys == keys
        page = await backend.list(after="k01", limit=7)
        assert (page.keys, page.more) == (keys[2:9], True)
        page = await backend.list(after="k01", limit=8)
        assert (page.keys, page.more) == (keys[2:], False)


async def test_a_page_goes_on_with_the_token_of_the_one_before(backend, monkeypatch) -> None:
    keys = tuple(f"k{number:02}" for number in range(10))
    for key in keys:
        await backend.put_bytes(key, b"")
    backend._ordered = True
    first = await backend.list(limit=4)
    assert (first.keys, first.more, len(backend._tokens)) == (keys[:4], True, 1)
    second = await backend.list(after=first.keys[-1], limit=4)
    assert (second.keys, second.more) == (keys[4:8], True)
    monkeypatch.setattr(s3, "TOKEN_AGE", 0.0)
    # Not with an old one: what was put since then has to be in it.
    last = await backend.list(after=second.keys[-1], limit=4)
    assert (last.keys, last.more, backend._tokens) == (keys[8:], False, {})


async def test_a_listing_in_another_order_is_found_out(backend, s3_server) -> None:
    if s3_server.kind == "minio":
        pytest.skip("MinIO keeps the order")
    backend._ordered = True
    await backend.put_bytes("a/b", b"")
    await backend.put_bytes("a-b", b"")

    with pytest.raises(BackendUnavailable, match="ordered=false"):
        await backend.list()
    backend._ordered = None
    assert (await backend.list()).keys == ("a-b", "a/b")


# --- errors that pass -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        SLOW_DOWN,
        Fault("answer", status=500, code="InternalError"),
        Fault("answer", status=429, code="TooManyRequests"),
        Fault("answer", status=400, code="RequestTimeout"),
        Fault("reset"),
        Fault("close"),
    ],
    ids=lambda fault: f"{fault.end}-{fault.code}",
)
async def test_what_passes_is_tried_again(backend, proxy, fault) -> None:
    proxy.spoil("PUT", fault, fault)
    await backend.put_bytes("a", b"content")
    proxy.spoil("GET", fault, fault)
    assert await backend.get_bytes("a") == b"content"
    proxy.spoil("GET", fault, fault)
    assert await read(backend, "a", 3) == b"tent"
    proxy.spoil("GET", fault, fault)
    assert (await backend.list()).keys == ("a",)
    proxy.spoil("DELETE", fault, fault)
    await backend.delete("a")

    assert proxy.count("PUT") == 3
    assert proxy.count("GET", "under/here/a") == 6


async def test_patience_has_an_end_and_the_code_is_told(backend, proxy) -> None:
    proxy.spoil("GET", *[SLOW_DOWN] * 5)

    with pytest.raises(BackendUnavailable) as caught:
        await backend.get_bytes("a")

    assert (caught.value.backend, caught.value.key) == (backend.name, "a")
    assert caught.value.reason == "SlowDown: Please reduce your request rate."
    assert proxy.count("GET") == 5


async def test_waits_grow_from_attempt_to_attempt(backend, proxy, monkeypatch) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(s3, "BACKOFF_MIN", 1.0)
    monkeypatch.setattr(s3.trio, "sleep", note)
    proxy.spoil("GET", *[SLOW_DOWN] * 5)

    with pytest.raises(BackendUnavailable):
        await backend.get_bytes("a")

    for wait, longest in zip(waits, [1, 2, 4, 5], strict=True):
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (403, "RequestTimeTooSkewed")])
async def test_a_refusal_is_told_at_once(backend, proxy, status, code) -> None:
    refusal = Fault("answer", status=status, code=code, text="No.")
    proxy.spoil("GET", refusal)
    with pytest.raises(BackendUnavailable) as caught:
        await backend.get_bytes("a")
    assert caught.value.reason == f"{code}: No."
    assert proxy.count("GET") == 1

    proxy.spoil("HEAD", refusal)
    with pytest.raises(BackendUnavailable, match="AccessDenied"):
        await backend.stat("a")
    assert proxy.count("HEAD") == 1


async def test_a_put_that_minio_denies_beside_deletes_is_tried_again(backend, proxy) -> None:
    refusal = Fault("answer", status=403, code="AccessDenied", text="No.")
    proxy.spoil("PUT", attrs.evolve(refusal, server="MinIO"))
    await backend.put_bytes("a", b"content")
    assert await backend.get_bytes("a") == b"content"
    assert proxy.count("PUT") == 2

    proxy.spoil("PUT", refusal)
    with pytest.raises(BackendUnavailable, match="AccessDenied"):
        await backend.put_bytes("b", b"content")
    assert proxy.count("PUT") == 3


async def test_a_missing_object_is_not_asked_for_again(backend, proxy) -> None:
    with pytest.raises(ObjectNotFound):
        await backend.get_bytes("a")

    assert proxy.count("GET") == 1


async def test_an_answer_that_is_not_of_s3_is_an_error_with_its_status(backend, proxy) -> None:
    proxy.spoil("GET", Fault("answer", status=404, code="</not xml"))

    with pytest.raises(BackendUnavailable, match="status 404"):
        await backend.get_bytes("a")


# --- bodies that break off ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["reset", "close"])
async def test_a_body_that_breaks_off_is_continued_where_it_was(backend, proxy, end) -> None:
    data = random_bytes(3 * MIB + 17)
    await backend.put_bytes("a", data)
    proxy.spoil("GET", Fault(end, after=MIB + 5000), Fault(end, after=100), Fault(end, after=1))

    assert await read(backend, "a") == data

    first, *more = [seen for seen in proxy.seen if seen.method == "GET"]
    assert "if-match" not in first.headers
    assert len(more) == 3
    for request in more:
        assert request.headers["if-match"]
        start = int(request.headers["range"].removeprefix("bytes=").partition("-")[0])
        assert start > 0


async def test_a_range_that_breaks_off_ends_where_it_should(backend, proxy) -> None:
    data = random_bytes(4 * MIB)
    await backend.put_bytes("a", data)
    proxy.spoil("GET", Fault("reset", after=1_500_000))

    assert await read(backend, "a", 1000, 3_000_000) == data[1000:3_000_000]
    assert proxy.seen[-1].headers["range"].endswith("-2999999")


async def test_a_body_that_always_breaks_off_is_an_error(backend, proxy) -> None:
    await backend.put_bytes("a", bytes(MIB))
    proxy.spoil("GET", *[Fault("close", after=0)] * 6)

    with pytest.raises(BackendUnavailable):
        await read(backend, "a")


async def test_small_objects_that_break_off_are_read_again(backend, proxy) -> None:
    data = random_bytes(300_000)
    await backend.put_bytes("a", data)
    proxy.spoil("GET", Fault("close", after=200_000), Fault("reset", after=200_000))

    assert await backend.get_bytes("a") == data


async def test_a_replaced_object_is_never_mixed_with_the_old_one(backend, proxy, s3_server) -> None:
    await backend.put_bytes("a", b"\1" * (2 * MIB))

    def replace() -> None:
        s3_server.admin._put_object(BUCKET, "under/here/a", b"\2" * (2 * MIB), {})

    proxy.spoil("GET", Fault("reset", after=MIB, then=replace))

    with pytest.raises(BackendUnavailable, match="replaced while it was read"):
        await read(backend, "a")


async def test_an_object_that_is_deleted_midway_is_an_error_of_the_read(
    backend, proxy, s3_server
) -> None:
    await backend.put_bytes("a", bytes(2 * MIB))

    def delete() -> None:
        s3_server.admin.remove_object(BUCKET, "under/here/a")

    proxy.spoil("GET", Fault("reset", after=MIB, then=delete))

    with pytest.raises(BackendUnavailable, match="deleted while it was read"):
        await read(backend, "a")


# --- cancellation and servers that hang -----------------------------------------------------------------


async def test_a_read_from_a_silent_server_can_be_cancelled(backend, proxy) -> None:
    await backend.put_bytes("a", bytes(4 * MIB))
    proxy.spoil("GET", Fault("silence", after=3 * MIB))
    received = 0

    with trio.fail_after(PROMPTLY), trio.CancelScope() as scope:
        async with backend.open("a") as chunks, trio.open_nursery() as nursery:
            nursery.start_soon(cancel_when, lambda: received == 3 * MIB, scope)
            async for chunk in chunks:
                received += len(chunk)

    assert scope.cancelled_caught
    assert received == 3 * MIB
    # The connection is closed too, so the thread has ended and its place is free.
    assert await trio.to_thread.run_sync(proxy.seen[-1].left.wait, PROMPTLY)
    await wait_until_no_thread_is_used(backend)


async def cancel_when(condition, scope: trio.CancelScope) -> None:
    while not condition():  # noqa: ASYNC110 - a thread sets it
        await trio.sleep(0.01)
    await trio.testing.wait_all_tasks_blocked(0.05)
    scope.cancel()


async def wait_until_no_thread_is_used(backend: S3Backend) -> None:
    with trio.fail_after(PROMPTLY):
        while backend._threads.borrowed_tokens:  # noqa: ASYNC110 - has no event
            await trio.sleep(0.01)


@pytest.mark.parametrize("operation", ["stat", "get_bytes", "delete", "list", "open", "put_bytes"])
async def test_any_wait_for_a_silent_server_can_be_cancelled(s3_server, operation) -> None:
    async with silent_server() as port:
        backend = S3Backend(parse_location(url_of(port)))
        operations = {
            "open": lambda: read(backend, "a"),
            "put_bytes": lambda: backend.put_bytes("a", bytes(8 * MIB)),
        }
        with trio.fail_after(PROMPTLY):
            with trio.move_on_after(0.2) as scope:
                await operations.get(operation, lambda: getattr(backend, operation)("a"))()
            assert scope.cancelled_caught
        await wait_until_no_thread_is_used(backend)


async def test_opening_does_not_wait_for_a_silent_server(s3_server, monkeypatch) -> None:
    monkeypatch.setattr(s3, "STARTUP_PATIENCE", 0.2)
    async with silent_server() as port:
        with trio.fail_after(PROMPTLY):
            backend = await open_backend(url_of(port))
        await wait_until_no_thread_is_used(backend)


async def test_a_silent_server_fails_a_request_after_the_read_timeout(s3_server) -> None:
    async with silent_server() as port:
        backend = S3Backend(parse_location(url_of(port, "", "read_timeout=100ms&attempts=2")))

        with trio.fail_after(PROMPTLY), pytest.raises(BackendUnavailable, match="timed out"):
            await backend.get_bytes("a")


async def test_what_was_not_sent_of_a_cancelled_request_is_not_sent_later(s3_server) -> None:
    data = random_bytes(8 * MIB)
    received = bytearray()
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        backend = S3Backend(parse_location(url_of(listener.socket.getsockname()[1])))
        scope = trio.CancelScope()

        async def put() -> None:
            with scope:
                await backend.put_bytes("a", data)

        nursery.start_soon(put)
        with trio.fail_after(PROMPTLY):
            async with await listener.accept() as stream:
                # Nobody reads on, so a part of it stays with the client.
                received += await stream.receive_some(1)
                await trio.testing.wait_all_tasks_blocked(0.05)
                scope.cancel()
                await wait_until_no_thread_is_used(backend)
                # A reset, and no end of the stream as after all bytes.
                with suppress(trio.BrokenResourceError):
                    while chunk := await stream.receive_some():
                        received += chunk

    assert scope.cancelled_caught
    assert len(received) < len(data)


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """Takes connections and says nothing."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        yield listener.socket.getsockname()[1]


# --- TLS --------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The certificate of 127.0.0.1, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    path = tmp_path / "certificate"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    name = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
    ]
    made = ["-keyout", str(path.with_suffix(".key")), "-out", str(path.with_suffix(".crt"))]
    subprocess.run(["openssl", "req", *options, *name, *made], check=True, capture_output=True)
    path.write_bytes(path.with_suffix(".key").read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture
def tls_proxy(s3_server: S3Server, certificate: Path) -> Iterator[FaultyProxy]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with FaultyProxy(s3_server.port, tls=context) as proxy:
        yield proxy


def tls_url_of(port: int) -> str:
    return f"s3://{BUCKET}/tls?endpoint=127.0.0.1:{port}&part_size=5MiB"


async def test_tls_is_the_default_and_works_alike(
    tls_proxy, certificate, big_file, monkeypatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    backend = await open_backend(tls_url_of(tls_proxy.port))
    data = big_file.read_bytes()

    await backend.put_file("a", big_file)
    tls_proxy.spoil("GET", Fault("close", after=3 * MIB))
    assert await read(backend, "a") == data
    tls_proxy.spoil("GET", Fault("silence", after=3 * MIB))
    received = 0
    with trio.fail_after(PROMPTLY), trio.CancelScope() as scope:
        async with backend.open("a") as chunks, trio.open_nursery() as nursery:
            nursery.start_soon(cancel_when, lambda: received >= 2 * MIB, scope)
            async for chunk in chunks:
                received += len(chunk)
    assert scope.cancelled_caught
    await wait_until_no_thread_is_used(backend)

    await backend.delete("a")


async def test_a_certificate_that_nobody_signed_is_refused_at_once(tls_proxy) -> None:
    with pytest.raises(StartupError, match="CERTIFICATE_VERIFY_FAILED"):
        await open_backend(tls_url_of(tls_proxy.port))

    assert tls_proxy.seen == []


async def test_a_server_without_tls_is_refused_at_once_and_what_to_do_is_said(s3_server) -> None:
    with pytest.raises(StartupError, match="secure=false"):
        await open_backend(tls_url_of(s3_server.port))


# --- uploads in parts -------------------------------------------------------------------------------------


async def test_a_big_file_goes_up_in_parts_and_comes_back(backend, proxy, big_file) -> None:
    proxy.spoil("PUT", SLOW_DOWN, Fault("reset"), target="partNumber=2")
    proxy.spoil("POST", SLOW_DOWN, target="uploadId")

    await backend.put_file("a", big_file)

    assert await read(backend, "a") == big_file.read_bytes()
    assert proxy.count("PUT", "partNumber") == 4 + 2
    assert proxy.count("DELETE") == 0


async def test_a_part_that_cannot_be_sent_fails_the_upload_and_leaves_nothing(
    backend, proxy, big_file, s3_server
) -> None:
    await backend.put_bytes("a", b"old")
    proxy.spoil("PUT", Fault("answer", status=403, code="AccessDenied"), target="partNumber=3")

    with pytest.raises(BackendUnavailable, match="AccessDenied"):
        await backend.put_file("a", big_file)

    assert s3_server.uploads() == []
    assert await backend.get_bytes("a") == b"old"


@pytest.mark.parametrize("code", ["InternalError", "AccessDenied"])
async def test_an_upload_that_fails_after_the_status_is_not_taken_for_done(
    backend, proxy, big_file, s3_server, code
) -> None:
    proxy.spoil("POST", Fault("answer", status=200, code=code), target="uploadId")

    if code == "InternalError":
        await backend.put_file("a", big_file)
        assert await read(backend, "a") == big_file.read_bytes()
    else:
        with pytest.raises(BackendUnavailable, match=code):
            await backend.put_file("a", big_file)
        assert s3_server.uploads() == []


async def test_an_upload_whose_last_answer_is_lost_is_done(backend, proxy, big_file) -> None:
    # The server completes it, and knows it no more when it is asked again.
    proxy.spoil("POST", Fault("close"), target="uploadId")
    gone = Fault("answer", status=404, code="NoSuchUpload")
    proxy.spoil("POST", gone, target="uploadId")

    await backend.put_file("a", big_file)

    assert await read(backend, "a") == big_file.read_bytes()
    assert proxy.count("HEAD") == 1


@pytest.mark.parametrize("silent", ["uploads", "partNumber=2", "uploadId"])
async def test_an_upload_to_a_silent_server_can_be_cancelled_and_leaves_nothing(
    backend, proxy, big_file, s3_server, silent, monkeypatch
) -> None:
    monkeypatch.setattr(s3, "GRACE", 0.5)
    method = "PUT" if silent.startswith("part") else "POST"
    fallen_silent = threading.Event()
    proxy.spoil(method, Fault("silence", then=fallen_silent.set), target=silent)

    with trio.fail_after(PROMPTLY), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_when, fallen_silent.is_set, scope)
            await backend.put_file("a", big_file)

    assert scope.cancelled_caught
    await wait_until_no_thread_is_used(backend)
    if silent == "uploads":
        # The answer with the id was lost: the lifecycle rule is for such uploads.
        s3_server.abort_uploads()


async def test_an_upload_that_is_cancelled_before_its_thread_knows_it_was_sent_leaves_nothing(
    backend, proxy, big_file, s3_server, monkeypatch
) -> None:
    """The server has begun it, and the thread that asked has not run since it sent the last byte."""
    cancelled = threading.Event()
    cancel, getresponse = Call.cancel, _Watched.getresponse

    def cancel_and_tell(call: Call, **how: bool) -> bool:
        try:
            return cancel(call, **how)
        finally:
            cancelled.set()

    def getresponse_late(connection: _Watched) -> object:
        if not cancelled.is_set():
            assert cancelled.wait(10)
        return getresponse(connection)

    monkeypatch.setattr(s3, "GRACE", 60.0)
    monkeypatch.setattr(Call, "cancel", cancel_and_tell)
    monkeypatch.setattr(_Watched, "getresponse", getresponse_late)

    def begun() -> bool:
        return any(seen.method == "POST" and seen.answered for seen in proxy.seen)

    with trio.fail_after(PROMPTLY), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_when, begun, scope)
            await backend.put_file("a", big_file)

    assert scope.cancelled_caught
    assert proxy.count("DELETE", "uploadId") == 1
    assert s3_server.uploads() == []


async def test_parts_in_memory_are_bounded_over_all_uploads(
    backend, proxy, big_file, monkeypatch
) -> None:
    at_once = 0
    most = 0
    send = s3.S3Client.put_part

    def counted(*arguments: object) -> str:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return send(*arguments)
        finally:
            at_once -= 1

    monkeypatch.setattr(s3.S3Client, "put_part", counted)

    async with trio.open_nursery() as nursery:
        for key in "abc":
            nursery.start_soon(backend.put_file, key, big_file)

    assert 1 < most <= s3.PARTS_AT_ONCE
    for key in "abc":
        assert await read(backend, key) == big_file.read_bytes()


def test_very_long_files_get_longer_parts() -> None:
    backend = S3Backend(parse_location("s3://bucket?region=here"))

    assert backend._part_size(1 << 30) == 16 * MIB
    length = 5 << 40
    assert length / backend._part_size(length) <= s3.PARTS_MAX


def test_the_etag_of_parts_is_the_hash_of_their_hashes() -> None:
    # printf '' | md5sum, twice, xxd -r -p, md5sum
    empty = '"d41d8cd98f00b204e9800998ecf8427e"'

    assert multipart_etag([empty, empty]) == '"5873dd45edd01f09c1ef2e7819369e8e-2"'
    assert multipart_etag(["no hash"]) == ""


# --- conditional puts -------------------------------------------------------------------------------


async def test_a_conditional_put_whose_answer_was_lost_is_not_taken_for_one_of_others(
    backend, proxy
) -> None:
    await backend.put_bytes("a", b"first", if_version="")
    assert backend.conditional is True
    _, version = await backend.get_versioned("a")
    proxy.spoil("PUT", Fault("reset"))

    await backend.put_bytes("a", b"second", if_version=version)

    assert await backend.get_bytes("a") == b"second"
    proxy.spoil("PUT", SLOW_DOWN)
    with pytest.raises(ObjectReplaced):
        await backend.put_bytes("a", b"third", if_version=version)


@pytest.mark.parametrize("status", [0, 501])
async def test_a_server_without_conditional_puts_is_found_out(
    backend, monkeypatch, capsys, status
) -> None:
    """It ignores the condition, or refuses it; then what is there is looked at before the put."""
    put = s3.S3Client.put

    def ignoring(
        client: s3.S3Client, name: str, data: bytes, condition: dict[str, str] | None = None
    ) -> None:
        if condition and status:
            raise s3.S3Failure("NotImplemented", "no conditions", status=status)
        put(client, name, data)

    monkeypatch.setattr(s3.S3Client, "put", ignoring)
    await backend.put_bytes("a", b"first", if_version="")
    _, version = await backend.get_versioned("a")
    await backend.put_bytes("a", b"second", if_version=version)

    assert backend.conditional is False
    assert "no conditional puts" in capsys.readouterr().out
    with pytest.raises(ObjectReplaced):
        await backend.put_bytes("a", b"third", if_version=version)
    with pytest.raises(ObjectReplaced):
        await backend.put_bytes("a", b"third", if_version="")
    assert (await backend.list()).keys == ("a",)
