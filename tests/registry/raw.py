"""A client that sends exactly what it is told to, and sees exactly what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h11
import trio

Headers = Iterable[tuple[str, str]]


@attrs.frozen
class Reply:
    """A response.

    Attributes:
        status: of it.
        headers: by lower-case name; repeated ones joined by commas.
        body: as far as it came.
        complete: whether the body came to its end.
    """

    status: int
    headers: dict[str, str]
    body: bytes = attrs.field(repr=False)
    complete: bool

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of the first error of the body."""
        return self.json()["errors"][0]["code"]


class Connection:
    """One connection to a server.

    Attributes:
        stream: for what is no HTTP.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._h11 = h11.Connection(h11.CLIENT)

    async def request(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | None = None,
        *,
        chunked: bool = False,
    ) -> Reply:
        """Send a request and read the response; a body has a Content-Length unless ``chunked``."""
        lines = [("Host", "registry.test"), *headers]
        if chunked:
            lines.append(("Transfer-Encoding", "chunked"))
        elif body is not None:
            lines.append(("Content-Length", str(len(body))))
        await self.begin(method, target, lines)
        if body:
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())
        return await self.reply()

    async def begin(self, method: str, target: str, lines: Headers) -> None:
        if self._h11.our_state is h11.DONE:
            self._h11.start_next_cycle()
        await self.send(h11.Request(method=method, target=target, headers=list(lines)))

    async def send(self, event: Any) -> None:
        data = self._h11.send(event)
        if data:
            await self.stream.send_all(data)

    async def next_event(self) -> Any:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._h11.receive_data(await self.stream.receive_some(1 << 20))

    async def head(self) -> h11.Response:
        """The head of the final response."""
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response):
                return event

    async def reply(self) -> Reply:
        head = await self.head()
        body, complete = bytearray(), False
        try:
            while not complete:
                event = await self.next_event()
                if isinstance(event, h11.Data):
                    body += event.data
                complete = isinstance(event, h11.EndOfMessage)
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            complete = False
        return Reply(head.status_code, join(head.headers), bytes(body), complete)


def join(lines: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in lines:
        key = name.decode().lower()
        headers[key] = f"{headers[key]}, {value.decode()}" if key in headers else value.decode()
    return headers


@asynccontextmanager
async def connect(host: str, port: int) -> AsyncIterator[Connection]:
    stream = await trio.open_tcp_stream(host, port)
    async with stream:
        yield Connection(stream)


def parse_multipart(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """The parts of a multipart/byteranges body as (Content-Range, content)."""
    boundary = content_type.partition("boundary=")[2].encode()
    first, *parts, last = body.split(b"--" + boundary)
    assert first == b""
    assert last == b"--\r\n"
    found = []
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n") if line)
        assert content.endswith(b"\r\n")
        found.append((lines[b"Content-Range"].decode(), content[:-2]))
    return found
