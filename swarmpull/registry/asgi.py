"""Requests and responses straight over ASGI, with bodies of any length.

Quart reads a request body into memory without back-pressure, 16 MiB at most, cuts responses after a minute,
and costs nearly twice as much per small request: the registry API does without it.  The server behind
(`swarmpull.registry.server`) is hypercorn, two habits of which shape this module:

- Sending to a client that is gone raises nothing, it is only reported as ``http.disconnect``: whoever sends
  for long must watch for it (`until_disconnect`).
- It hands a request body on through a short queue and cannot end a response while that queue is full: whoever
  answers before the body was read must read the rest meanwhile (`send_response`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qs

import attrs
import trio

from swarmpull.errors import SwarmpullError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = tuple[tuple[str, str], ...]

# The key of a scope under which the name is, when there was one with the right password.
USER: Final = "swarmpull.user"
# The key of the state of a scope under which the `Client` is, where the server knows one.
CLIENT: Final = "swarmpull.client"
# Seconds without a byte of a request body after which the client counts as gone: it holds an upload session
# that its own retry needs.
BODY_IDLE_TIMEOUT: Final = 60.0
# What is still read of a body after an early answer: closing on unread bytes makes the kernel send a reset,
# which can reach the client before it has read the answer (RFC 9112, section 9.6).
_LINGER_BYTES: Final = 64 << 20
_LINGER_SECONDS: Final = 10.0


class ClientGone(SwarmpullError):
    """The client hung up, or sent nothing for too long, in the middle of its request body."""


class Client:
    """Whoever is at the other end of a connection: what is done for it ends when it hangs up."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self._has_left = False

    async def run(self, respond: Callable[[], Awaitable[None]]) -> None:
        """Run ``respond``, and cancel it when the client leaves."""
        with trio.CancelScope() as scope:
            if self._has_left:
                scope.cancel()
            self._scopes.add(scope)
            try:
                await respond()
            finally:
                self._scopes.discard(scope)

    def leave(self) -> None:
        """It has hung up."""
        self._has_left = True
        for scope in self._scopes:
            scope.cancel()


@attrs.frozen
class Response:
    """A complete response with a body in memory."""

    status: int
    headers: Headers = ()
    body: bytes = attrs.field(default=b"", repr=False)


class Request:
    """One HTTP request, with its body as a stream.

    Attributes:
        method: in upper case.
        body_idle_timeout: seconds to wait for the next bytes of the body.
        sender: who sent it: the name that a password was asked for, and the address.
        client: who waits for the answer, if the server says so.
    """

    def __init__(
        self, scope: Scope, receive: Receive, *, body_idle_timeout: float = BODY_IDLE_TIMEOUT
    ) -> None:
        self.method: str = scope["method"]
        self.body_idle_timeout = body_idle_timeout
        self.sender = _sender_of(scope)
        self.client: Client | None = scope.get("state", {}).get(CLIENT)
        self._receive = receive
        self._headers = _join_headers(scope["headers"])
        self._query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        self._body_read = not (self.content_length or "transfer-encoding" in self._headers)

    def header(self, name: str) -> str | None:
        """The value of a header by its lower-case name; repeated lines are joined by commas."""
        return self._headers.get(name)

    def query(self, name: str) -> str | None:
        """The first value of a query parameter, decoded; None when it is absent."""
        values = self._query.get(name)
        return values[0] if values else None

    def queries(self, name: str) -> list[str]:
        """All values of a query parameter, decoded."""
        return self._query.get(name, [])

    @property
    def content_length(self) -> int | None:
        """The declared length of the body; None when it comes in chunks or there is none."""
        text = self._headers.get("content-length")
        return None if text is None else int(text)

    @property
    def body_read(self) -> bool:
        """Whether nothing of the body is left to read."""
        return self._body_read

    async def read(self) -> bytes:
        """The next bytes of the body as they arrive; none once it has ended.

        Raises:
            ClientGone: it breaks off.
        """
        chunk = b""
        while not chunk and not self._body_read:
            with trio.move_on_after(self.body_idle_timeout) as scope:
                message = await self._receive()
            if scope.cancelled_caught or message["type"] == "http.disconnect":
                raise ClientGone
            self._body_read = not message.get("more_body", False)
            chunk = message["body"]
        return chunk

    async def discard(self, limit: int) -> None:
        """Read up to ``limit`` further bytes of the body and forget them.  Raises ClientGone."""
        while limit > 0 and (chunk := await self.read()):
            limit -= len(chunk)

    async def wait_disconnect(self) -> None:
        """Return when the client has hung up; what it still sends until then is forgotten."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _sender_of(scope: Scope) -> str:
    address = str((scope.get("client") or ("unknown",))[0])
    user = scope.get(USER)
    return f"{user} at {address}" if user else address


def _join_headers(lines: list[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in lines:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


async def start_response(send: Send, status: int, headers: Headers) -> None:
    """Send the head of a response."""
    encoded = [
        (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers
    ]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def send_chunk(send: Send, chunk: bytes, *, last: bool = False) -> None:
    """Send a part of the body; returns when it is in the hands of the kernel."""
    await send({"type": "http.response.body", "body": chunk, "more_body": not last})


async def send_response(request: Request, send: Send, response: Response) -> None:
    """Send a complete response, whether or not the body of the request was read.

    Bodies that must not be sent (HEAD, 204) are left out by the server; Content-Length stays exact.
    """
    headers = response.headers
    # A 204 has no length; that of a 304 would be read as the length of the content.
    if response.status not in (204, 304) and "Content-Length" not in dict(headers):
        headers = (*headers, ("Content-Length", str(len(response.body))))
    await start_response(send, response.status, headers)
    if request.body_read:
        await send_chunk(send, response.body, last=True)
        return
    await send_chunk(send, response.body)
    with trio.move_on_after(_LINGER_SECONDS):
        try:
            await request.discard(_LINGER_BYTES)
        except ClientGone:
            return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(request.wait_disconnect)
        await send_chunk(send, b"", last=True)
        nursery.cancel_scope.cancel()


async def until_disconnect(request: Request, respond: Callable[[], Awaitable[None]]) -> None:
    """Run ``respond``, and cancel it when the client hangs up.

    For requests whose body is of no interest: it is read and forgotten.
    """
    if request.client is not None and request.body_read:
        # Nothing has to be read: a task for it would be a sixth of the work for a small blob.
        await request.client.run(respond)
        return
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await request.wait_disconnect()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await respond()
        nursery.cancel_scope.cancel()


async def answer_lifespan(receive: Receive, send: Send) -> None:
    """Take part in the start and stop of the server, for an application that needs neither."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
