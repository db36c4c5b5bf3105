"""What stands between a backend and its S3 server: a relay that can be cut, a proxy that spoils answers.

Both run in a thread with a loop of its own, so that tests without a loop can use them too.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, Self

import attrs
import trio

CHUNK: Final = 1 << 16
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]
STREAM_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


@attrs.frozen
class Fault:
    """What happens to one answer.

    Attributes:
        end: how the answer ends: as an answer of the proxy, reset, closed, or in silence.
        after: bytes of the body that get through; -1: not even the head does.
        status, code, text, server: of the answer of the proxy.
        then: runs when the answer ends, before the connection does.
    """

    end: Literal["answer", "reset", "close", "silence"]
    after: int = -1
    status: int = 503
    code: str = "SlowDown"
    text: str = "Please reduce your request rate."
    then: Callable[[], None] = lambda: None
    server: str = ""


@attrs.define
class Seen:
    """One request that came by."""

    method: str
    target: str
    headers: dict[str, str]
    answered: int = 0
    left: threading.Event = attrs.field(factory=threading.Event)


class Relay:
    """Passes bytes on between its port and that of a server.

    Attributes:
        port: where it listens.
        refusing: new connections are closed at once.
    """

    def __init__(self, server_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.refusing = False
        self._server_port = server_port
        self._tls = tls
        self._ready = threading.Event()
        self._scopes: set[trio.CancelScope] = set()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def cut(self) -> None:
        """Close all connections, and take no new ones."""
        self.refusing = True
        done = threading.Event()
        self._token.run_sync_soon(self._cut, done)
        assert done.wait(10)

    def _cut(self, done: threading.Event) -> None:
        for scope in self._scopes:
            scope.cancel()
        done.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        with trio.CancelScope() as self._scope:
            self._ready.set()
            await trio.serve_listeners(self._handle, listeners)

    async def _handle(self, connection: trio.SocketStream) -> None:
        client: Stream = connection
        if self._tls is not None:
            client = trio.SSLStream(connection, self._tls, server_side=True, https_compatible=True)
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if not self.refusing:
                    await self._converse(client)
            except STREAM_ERRORS:
                pass  # one side has hung up
            finally:
                self._scopes.remove(scope)
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(client)

    async def _converse(self, client: Stream) -> None:
        async with (
            await trio.open_tcp_stream("127.0.0.1", self._server_port) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_pump, client, server, nursery)
            nursery.start_soon(_pump, server, client, nursery)


async def _pump(source: Stream, target: Stream, nursery: trio.Nursery) -> None:
    with suppress(*STREAM_ERRORS):
        while data := await source.receive_some(CHUNK):
            await target.send_all(data)
    nursery.cancel_scope.cancel()


class FaultyProxy(Relay):
    """Passes requests on one by one, and spoils those answers that it was told to.

    Attributes:
        seen: the requests so far.
    """

    def __init__(self, server_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(server_port, tls=tls)
        self.seen: list[Seen] = []
        self._faults: list[tuple[str, str, Fault]] = []

    def spoil(self, method: str, *faults: Fault, target: str = "") -> None:
        """The next answers to requests of a method, whose target holds a text, one fault each."""
        self._faults += [(method, target, fault) for fault in faults]

    def count(self, method: str, target: str = "") -> int:
        return len([seen for seen in self.seen if seen.method == method and target in seen.target])

    async def _converse(self, client: Stream) -> None:
        head, rest = await _read_head(client)
        if not head:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        seen = Seen(method, target, headers)
        self.seen.append(seen)
        fault = self._fault_for(method, target)
        length = int(headers.get("content-length", "0"))
        if fault is not None and fault.end == "answer":
            await _skip(client, length - len(rest))
            await client.send_all(_answer(fault, method))
            return
        # One request per connection: an answer is then all that comes.
        request = "\r\n".join([first, "Connection: close", *lines, "", ""]).encode("latin-1")
        async with await trio.open_tcp_stream("127.0.0.1", self._server_port) as server:
            await server.send_all(request + rest)
            await _copy(client, server, length - len(rest))
            await self._answer(server, client, seen, fault)

    async def _answer(
        self, server: trio.SocketStream, client: Stream, seen: Seen, fault: Fault | None
    ) -> None:
        head, rest = await _read_head(server)
        allowed = fault.after if fault else None
        if allowed != -1:
            await client.send_all(head + b"\r\n\r\n")
        while rest and (allowed is None or seen.answered < allowed):
            data = rest if allowed is None else rest[: allowed - seen.answered]
            await client.send_all(data)
            seen.answered += len(data)
            rest = await server.receive_some(CHUNK)
        if fault is None:
            return
        await trio.to_thread.run_sync(fault.then)
        if fault.end == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault.end == "silence":
            with suppress(*STREAM_ERRORS):
                await client.receive_some(1)
            seen.left.set()

    def _fault_for(self, method: str, target: str) -> Fault | None:
        for index, (wanted, part, fault) in enumerate(self._faults):
            if wanted == method and part in target:
                del self._faults[index]
                return fault
        return None


async def _read_head(stream: Stream) -> tuple[bytes, bytes]:
    """Up to the empty line, and what came with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(CHUNK)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


async def _copy(source: Stream, target: Stream, length: int) -> None:
    while length > 0:
        data = await source.receive_some(min(CHUNK, length))
        if not data:
            return
        await target.send_all(data)
        length -= len(data)


async def _skip(source: Stream, length: int) -> None:
    while length > 0 and (data := await source.receive_some(min(CHUNK, length))):
        length -= len(data)


def _answer(fault: Fault, method: str) -> bytes:
    body = (
        f'<?xml version="1.0"?><Error><Code>{fault.code}</Code>'
        f"<Message>{fault.text}</Message></Error>"
    ).encode()
    head = (
        f"HTTP/1.1 {fault.status} Spoiled\r\nContent-Type: application/xml\r\nServer: {fault.server}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if method == "HEAD" else head + body
