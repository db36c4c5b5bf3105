"""The HTTP listener: start, limits, end, and the habits of the server behind it.

Some of these pin what a dependency does and the code works around, so that an upgrade which changes it is
noticed.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import h11
import httpx
import pytest
import structlog.testing
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import StartupError
from swarmpull.registry.app import create_registry_app
from swarmpull.registry.asgi import (
    AsgiApp,
    Client,
    Message,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    answer_lifespan,
    send_response,
    until_disconnect,
)
from swarmpull.registry.server import RECEIVE_BYTES, HttpLimits, serve_http
from swarmpull.store.uploads import Upload

from .conftest import Registry
from .raw import Connection, connect
from .service import IndexedService, WaitingReader

CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303") + b"\x5a" * 505


@asynccontextmanager
async def serving(
    app: AsgiApp, *, drain: trio.Event | None = None, grace: float = 1.0, **limits: Any
) -> AsyncIterator[tuple[str, int]]:
    """A server, which must end by itself within its grace (and a margin for a busy machine)."""
    drain = trio.Event() if drain is None else drain
    async with trio.open_nursery() as nursery:
        serve = partial(
            serve_http, app, "127.0.0.1", 0, drain=drain, grace=grace, limits=HttpLimits(**limits)
        )
        yield await nursery.start(serve)
        drain.set()
        nursery.cancel_scope.deadline = trio.current_time() + grace + 30
    assert not nursery.cancel_scope.cancelled_caught, "the server did not end in time"


async def answer_ok(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


# --- start ------------------------------------------------------------------------------------


async def test_a_free_port_is_found_and_reported() -> None:
    async with serving(answer_ok) as (host, port):
        assert host == "127.0.0.1"
        assert port > 0
        async with httpx.AsyncClient() as client:
            reply = await client.get(f"http://{host}:{port}/")
        assert (reply.status_code, reply.text) == (200, "ok")
        assert "server" not in reply.headers


async def test_a_port_in_use_is_a_startup_error_with_what_to_do() -> None:
    async with serving(answer_ok) as (host, port):
        with pytest.raises(StartupError) as caught:
            await serve_http(answer_ok, host, port, drain=trio.Event(), grace=0)
        assert f"{host}:{port}" in caught.value.reason
        assert "another port" in caught.value.remedy


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_of_another_machine_is_a_startup_error(host: str) -> None:
    with pytest.raises(StartupError):
        await serve_http(answer_ok, host, 0, drain=trio.Event(), grace=0)


# --- end --------------------------------------------------------------------------------------


async def test_draining_closes_the_listener_and_idle_connections() -> None:
    drain = trio.Event()
    async with serving(answer_ok, drain=drain) as (host, port), connect(host, port) as idle:
        assert (await idle.request("GET", "/")).status == 200
        drain.set()
        with trio.fail_after(30):
            assert await idle.stream.receive_some() == b""
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(host, port)


async def test_a_request_under_way_ends_within_the_grace() -> None:
    drain, begun, go_on = trio.Event(), trio.Event(), trio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            begun.set()
            await go_on.wait()
        await answer_ok(scope, receive, send)

    async with serving(slow, drain=drain, grace=30) as address, connect(*address) as connection:
        async with trio.open_nursery() as nursery:

            async def end() -> None:
                await begun.wait()
                drain.set()
                await trio.testing.wait_all_tasks_blocked(0.05)
                go_on.set()

            nursery.start_soon(end)
            reply = await connection.request("GET", "/")
        assert (reply.status, reply.body) == (200, b"ok")


async def answer_while_watching(scope: Scope, receive: Receive, send: Send) -> None:
    """As blobs are answered: whoever sends watches whether the client is still there."""
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    request = Request(scope, receive)
    await request.discard(1)
    response = Response(200, body=b"ok")
    await until_disconnect(request, partial(send_response, request, send, response))


# What is seen in a test may depend on the order in which two tasks happen to run.
OFTEN = 20
# More than any test takes: what waits for it hangs.
LONG = 600.0


async def test_idle_connections_do_not_hold_up_the_end() -> None:
    drain = trio.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            serve = partial(serve_http, answer_while_watching, "127.0.0.1", 0)
            address = await nursery.start(partial(serve, drain=drain, grace=LONG))
            idle = [await stack.enter_async_context(connect(*address)) for _ in range(OFTEN)]
            for connection in idle:
                assert (await connection.request("GET", "/")).status == 200
            drain.set()
            for connection in idle:
                assert await connection.stream.receive_some() == b""


@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "after the head"])
@pytest.mark.parametrize(
    "behind", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["", "pipelined"]
)
async def test_the_connection_of_a_request_under_way_ends_with_its_response(
    begun: bool, behind: bytes
) -> None:
    drain, go_on = trio.Event(), trio.Event()
    arrived = 0

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return

        async def respond() -> None:
            nonlocal arrived
            arrived += 1
            if not begun:
                await go_on.wait()
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await go_on.wait()
            await send({"type": "http.response.body", "body": b"ok"})

        await until_disconnect(Request(scope, receive), respond)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            serve = partial(serve_http, slow, "127.0.0.1", 0)
            address = await nursery.start(partial(serve, drain=drain, grace=LONG))
            busy = [await stack.enter_async_context(connect(*address)) for _ in range(OFTEN)]
            for connection in busy:
                await connection.stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + behind)
            while arrived < OFTEN:
                await trio.lowlevel.checkpoint()
            drain.set()
            go_on.set()
            for connection in busy:
                received = b""
                while chunk := await connection.stream.receive_some():
                    received += chunk
                assert received.count(b"HTTP/1.1 200") == 1
                assert received.endswith(b"\r\n\r\nok")
                assert (b"connection: close" in received) is not begun


async def start_endless(connection: Connection, target: str = "/") -> None:
    await connection.begin("GET", target, [("Host", "x")])
    await connection.send(h11.EndOfMessage())
    await connection.head()


async def stream_for_ever(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    headers = [(b"content-length", str(1 << 40).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})


async def test_a_client_that_does_not_read_cannot_hold_up_the_end() -> None:
    # hypercorn shields its sends from cancellation: its own graceful timeout would never end this.
    async with serving(stream_for_ever, grace=0.2) as address, connect(*address) as stalled:
        await start_endless(stalled)
        await trio.testing.wait_all_tasks_blocked(0.1)


async def test_cancelling_the_server_cuts_a_client_that_does_not_read() -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            serve = partial(serve_http, stream_for_ever, "127.0.0.1", 0)
            address = await nursery.start(partial(serve, drain=trio.Event(), grace=60))
            async with connect(*address) as stalled:
                await start_endless(stalled)
                await trio.testing.wait_all_tasks_blocked(0.1)
                nursery.cancel_scope.cancel()


async def test_connections_of_other_listeners_stay_when_one_ends() -> None:
    async with serving(answer_ok) as address, connect(*address) as staying:
        assert (await staying.request("GET", "/")).status == 200
        async with serving(answer_ok) as other, connect(*other) as ending:
            assert (await ending.request("GET", "/")).status == 200
        assert (await staying.request("GET", "/")).status == 200


@pytest.mark.parametrize(
    "behind", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["", "pipelined"]
)
async def test_what_is_done_for_a_client_that_hangs_up_is_cancelled(behind: bytes) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def respond_for_ever(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return

        async def respond() -> None:
            begun.set()
            try:
                await stream_for_ever(scope, receive, send)
            finally:
                ended.set()

        await until_disconnect(Request(scope, receive), respond)

    with trio.fail_after(60):
        async with serving(respond_for_ever) as address:
            async with connect(*address) as connection:
                await connection.stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + behind)
                await begun.wait()
            await ended.wait()


async def test_what_is_begun_for_a_client_that_has_left_already_is_cancelled() -> None:
    client = Client()
    client.leave()
    with trio.fail_after(60):
        await client.run(trio.sleep_forever)


async def test_a_client_that_takes_nothing_is_cut_off_after_the_stalled_timeout() -> None:
    ended = trio.Event()

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream_for_ever, scope, receive, send)
            while (await receive())["type"] != "http.disconnect":
                pass
            ended.set()
            nursery.cancel_scope.cancel()

    async with serving(watched, stalled_timeout=1.0) as address, connect(*address) as stalled:
        await start_endless(stalled)
        with trio.fail_after(30):
            await ended.wait()


# --- what is no good HTTP ---------------------------------------------------------------------


async def test_a_tls_client_hello_is_answered_with_http_400() -> None:
    # docker probes with TLS first; the containerd store of docker 26 gives up on any other answer.
    async with serving(answer_ok) as address:
        async with connect(*address) as connection:
            await connection.stream.send_all(CLIENT_HELLO)
            answer = b""
            while chunk := await connection.stream.receive_some():
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 400 ")
        async with connect(*address) as connection:
            assert (await connection.request("GET", "/")).status == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500,
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + b"\xff" * 99,
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (1 << 20),
        b"",
    ],
)
async def test_garbage_ends_its_own_connection_and_nothing_else(
    registry: Registry, garbage: bytes
) -> None:
    async with registry.connect() as connection:
        # The server may have closed already.
        with trio.move_on_after(2):
            try:
                await connection.stream.send_all(garbage)
                await connection.stream.send_eof()
                while await connection.stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
    assert (await registry.request("GET", "/v2/")).status == 200


async def test_a_websocket_is_refused(registry: Registry) -> None:
    lines = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Version", "13"),
    ]
    reply = await registry.request("GET", "/v2/", lines)
    assert reply.status == 403


async def test_a_request_head_beyond_the_limit_is_431() -> None:
    async with serving(answer_ok, head_bytes=1000) as address, connect(*address) as connection:
        await connection.stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 2000)
        assert (await connection.stream.receive_some()).startswith(b"HTTP/1.1 431 ")


async def test_a_connection_without_a_request_is_closed_after_the_keep_alive_timeout() -> None:
    async with serving(answer_ok, keep_alive_timeout=0.1) as address, connect(*address) as silent:
        await silent.stream.send_all(b"GET / HTT")
        with trio.fail_after(30):
            assert await silent.stream.receive_some() == b""


async def test_a_connection_is_closed_after_the_keep_alive_timeout_since_its_last_request() -> None:
    async with serving(answer_while_watching, keep_alive_timeout=0.1) as address:
        for _ in range(OFTEN):
            async with connect(*address) as idle:
                assert (await idle.request("GET", "/")).status == 200
                with trio.fail_after(30):
                    assert await idle.stream.receive_some() == b""


async def test_a_connection_takes_more_than_a_thousand_requests() -> None:
    # hypercorn's default closes it after a thousand.
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(answer_ok) as address, connect(*address) as connection:
        received = b""
        for count in range(1, 1011):
            await connection.stream.send_all(request)
            while received.count(b"\r\n\r\nok") < count:
                chunk = await connection.stream.receive_some()
                assert chunk, f"closed after {count - 1} requests"
                received += chunk


# --- bodies -----------------------------------------------------------------------------------


async def test_an_upload_arrives_in_large_chunks() -> None:
    # Pins that hypercorn still reads as much as we tell it to, not 64 KiB.
    sizes: list[int] = []

    async def record(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            message: Message = {"more_body": True}
            while message["more_body"]:
                message = await receive()
                sizes.append(len(message["body"]))
        await answer_ok(scope, receive, send)

    async with serving(record) as address, connect(*address) as connection:
        assert (await connection.request("PUT", "/", body=bytes(32 << 20))).status == 200
    assert 64 << 10 < max(sizes) <= RECEIVE_BYTES
    assert sum(sizes) == 32 << 20


async def test_a_slow_disk_slows_the_client_down_instead_of_filling_the_memory(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Quart would take 16 MiB at any speed, and refuse the rest.
    go_on = trio.Event()
    append = Upload.append

    async def wait(self: Upload, data: bytes) -> None:
        await go_on.wait()
        await append(self, data)

    monkeypatch.setattr(Upload, "append", wait)
    content = random.Random(5).randbytes(48 << 20)
    sent = 0

    async def send() -> None:
        nonlocal sent
        for start in range(0, len(content), 1 << 18):
            await connection.send(h11.Data(data=content[start : start + (1 << 18)]))
            sent += 1 << 18
        await connection.send(h11.EndOfMessage())

    async with registry.connect() as connection:
        connection.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        target = f"/blobs/{Digest.of(content)}"
        length = ("Content-Length", str(len(content)))
        await connection.begin("PUT", target, [("Host", "x"), length])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.2)
            # The queue of the server, and what the kernel holds on both sides.
            assert sent <= 24 << 20
            go_on.set()
        assert (await connection.reply()).status == 201


@pytest.mark.parametrize("size", [1 << 20, 100 << 20])
async def test_an_early_answer_to_a_long_body_arrives_and_leaves_nothing_behind(
    registry: Registry, size: int
) -> None:
    # hypercorn cannot end a response while the queue of its request body is full.
    async with registry.connect() as connection:
        lines = [("Host", "x"), ("Content-Length", str(size))]
        await connection.begin("PATCH", f"/v2/a/blobs/uploads/{'0' * 32}", lines)

        async def send() -> None:
            try:
                for _ in range(size >> 20):
                    await connection.stream.send_all(bytes(1 << 20))
            except trio.BrokenResourceError:
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with trio.fail_after(30):
                reply = await connection.reply()
            assert (reply.status, reply.code) == (404, "BLOB_UPLOAD_UNKNOWN")
            nursery.cancel_scope.cancel()
    # That nothing is left behind shows when the fixture drains the server.


class Exchange:
    """One request given to an application directly, without a server; time may stand still."""

    def __init__(self, method: str, path: str, *, body: tuple[bytes, ...] = ()) -> None:
        self.sent: list[Message] = []
        self._chunks = list(body)
        headers = [(b"transfer-encoding", b"chunked")] if body else []
        self._scope: Scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
        }

    async def receive(self) -> Message:
        if not self._chunks:
            await trio.sleep_forever()
        return {"type": "http.request", "body": self._chunks.pop(0), "more_body": True}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, app: AsgiApp) -> None:
        await app(self._scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def ended(self) -> bool:
        return not self.sent[-1].get("more_body", False)


async def test_a_download_that_takes_hours_is_not_cut(
    registry: Registry, autojump_clock: trio.testing.MockClock
) -> None:
    content = random.Random(6).randbytes(1 << 20)
    digest = await registry.add_blob("a", content)

    class Slow(WaitingReader):
        async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
            await trio.sleep(3600)
            return content[offset : offset + (1 << 17)]

    registry.service.wrap = lambda reader: Slow(reader, 0)
    exchange = Exchange("GET", f"/v2/a/blobs/{digest}")
    await exchange.run(create_registry_app(registry.service))
    assert trio.current_time() >= 8 * 3600
    assert (exchange.status, exchange.ended) == (200, True)
    assert exchange.body == content


async def test_quart_would_cut_it_after_a_minute(autojump_clock: trio.testing.MockClock) -> None:
    # Why blobs do not go through Quart; the admin pages are done sooner.
    from quart_trio import QuartTrio

    app = QuartTrio(__name__)

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await trio.sleep(61)
        yield b"second"

    @app.get("/")
    async def answer() -> Any:
        return body()

    exchange = Exchange("GET", "/")
    await exchange.run(app)
    assert exchange.body == b"first"


async def test_a_client_that_stops_sending_gives_its_session_back_after_a_minute(
    registry: Registry, autojump_clock: trio.testing.MockClock
) -> None:
    upload = await registry.service.store.uploads.create("a")
    exchange = Exchange("PATCH", f"/v2/a/blobs/uploads/{upload.id}", body=(b"first", b"second"))
    with structlog.testing.capture_logs() as logs:
        await exchange.run(create_registry_app(registry.service))
    assert exchange.sent == []
    assert (upload.offset, upload.busy) == (11, False)
    assert 60 <= trio.current_time() < 120
    assert logs == []


async def test_httpx_and_the_server_understand_each_other(registry: Registry) -> None:
    content = random.Random(7).randbytes(20 << 20)
    digest = Digest.of(content)
    async with httpx.AsyncClient(base_url=f"http://{registry.host}:{registry.port}") as client:
        for status in (201, 200):
            reply = await client.put(f"/blobs/{digest}", content=content)
            assert reply.status_code == status
        reply = await client.get(f"/blobs/{digest}", headers={"Range": "bytes=-100"})
        assert (reply.status_code, reply.content) == (206, content[-100:])
        reply = await client.get("/v2/unknown/tags/list")
        assert json.loads(reply.content)["errors"][0]["code"] == "NAME_UNKNOWN"


async def test_a_service_may_be_asked_by_many_at_once(registry: Registry) -> None:
    content = random.Random(8).randbytes(3 << 20)
    digest = await registry.add_blob("a", content)
    assert isinstance(registry.service, IndexedService)

    async def fetch() -> None:
        reply = await registry.request("GET", f"/v2/a/blobs/{digest}")
        assert reply.body == content

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(fetch)


async def test_the_connection_of_a_client_that_is_gone_is_closed_at_once() -> None:
    # hypercorn would keep it for as long as an idle one.
    async with serving(answer_ok, keep_alive_timeout=600) as address:
        for request in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            async with connect(*address) as connection:
                await connection.stream.send_all(request)
                await connection.stream.send_eof()
                with trio.fail_after(30):
                    while await connection.stream.receive_some():
                        pass


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async with serving(answer_ok, connections=2) as address:
        async with connect(*address) as first, connect(*address) as second:
            for connection in (first, second):
                assert (await connection.request("GET", "/")).status == 200
            async with connect(*address) as third:
                with trio.fail_after(30):
                    assert await third.stream.receive_some() == b""
        with trio.fail_after(30):
            while not await is_answered(address):
                await trio.lowlevel.checkpoint()


async def is_answered(address: tuple[str, int]) -> bool:
    """Whether a new connection gets an answer."""
    async with connect(*address) as connection:
        try:
            return (await connection.request("GET", "/")).status == 200
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return False


async def test_a_fault_in_one_connection_ends_that_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hypercorn.protocol import ProtocolWrapper

    async def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    async with serving(answer_ok) as address:
        with structlog.testing.capture_logs() as logs, monkeypatch.context() as patched:
            patched.setattr(ProtocolWrapper, "handle", fail)
            assert not await is_answered(address)
        assert await is_answered(address)
    assert [entry["event"] for entry in logs] == ["connection_failed"]
