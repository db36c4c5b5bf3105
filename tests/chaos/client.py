"""An HTTP client on a host, which measures how long it waits for the next byte."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Final, Self

import attrs
import httpcore
import trio

from tests.answers import Answer

from .limits import CONNECT, STALLED
from .sockets import Backend

TIMEOUTS: Final = {"connect": CONNECT, "read": STALLED, "write": STALLED, "pool": STALLED}
# What an answer that is no blob may have.
BODY_BYTES_MAX: Final = 4 << 20


@attrs.define(slots=False)
class RequestFailed(Exception):
    """A request that brought nothing, or not all of it.

    Attributes:
        how: refused (no connection), cut (it broke), stalled (no byte in time), answered (with an error), or
            wrong (other bytes than asked for).
        detail: what the client saw.
    """

    how: str
    detail: str

    def __str__(self) -> str:
        return f"{self.how}: {self.detail}"


@attrs.define
class Waits:
    """The longest time without a byte, in seconds, of requests that belong together.

    Attributes:
        longest: so far; ``request``: the one that it was of.
    """

    longest: float = 0.0
    request: str = ""
    _since: float = attrs.field(factory=trio.current_time)
    _current: str = ""

    def begin(self, request: str) -> None:
        self._since, self._current = trio.current_time(), request

    def end(self) -> None:
        """A byte has come, or none will."""
        now = trio.current_time()
        if now - self._since > self.longest:
            self.longest, self.request = now - self._since, self._current
        self._since = now


class Http:
    """A client on the host of a namespace, to be used as a context manager; one connection for each use."""

    def __init__(self, namespace: str | None, *, tls: ssl.SSLContext | None = None) -> None:
        self.waits = Waits()
        self._scheme = "http" if tls is None else "https"
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls, network_backend=Backend(namespace), max_connections=4
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CONNECT):
            await self._pool.aclose()

    async def request(
        self,
        method: str,
        address: str,
        target: str,
        *,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Raises RequestFailed when no whole answer comes; an error is an answer."""
        async with self._stream(method, address, target, headers, body) as response:
            content = bytearray()
            async for chunk in response.aiter_stream():
                self.waits.end()
                content += chunk
                if len(content) > BODY_BYTES_MAX:
                    raise RequestFailed("wrong", f"{method} {target}: a body without an end")
        return Answer(response.status, _lower_case(response), bytes(content))

    async def verified(
        self, address: str, target: str, digest: str, length: int | None = None
    ) -> None:
        """Get a blob and compare it with its digest, and its length if known.  Raises RequestFailed."""
        hasher, received = hashlib.sha256(), 0
        async with self._stream("GET", address, target, {}, None) as response:
            if response.status != 200:
                text = (await response.aread())[:300].decode(errors="replace")
                raise RequestFailed("answered", f"GET {target}: {response.status} {text}")
            async for chunk in response.aiter_stream():
                self.waits.end()
                hasher.update(chunk)
                received += len(chunk)
        if length not in (None, received) or f"sha256:{hasher.hexdigest()}" != digest:
            raise RequestFailed(
                "wrong", f"GET {target}: {received} bytes of sha256:{hasher.hexdigest()}"
            )

    @contextlib.asynccontextmanager
    async def _stream(
        self,
        method: str,
        address: str,
        target: str,
        headers: dict[str, str] | None,
        body: bytes | None,
    ) -> AsyncIterator[httpcore.Response]:
        send = partial(
            self._pool.stream,
            method,
            f"{self._scheme}://{address}{target}",
            headers=list((headers or {}).items()),
            content=body,
            extensions={"timeout": TIMEOUTS},
        )
        self.waits.begin(f"{method} {target}")
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await self._begin(stack, send, repeat=method in ("GET", "HEAD"))
                self.waits.end()
                yield response
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise RequestFailed(_how(error), f"{method} {target}: {error}") from error
        finally:
            self.waits.end()

    async def _begin(
        self,
        stack: contextlib.AsyncExitStack,
        send: Callable[[], AbstractAsyncContextManager[httpcore.Response]],
        *,
        repeat: bool,
    ) -> httpcore.Response:
        """Send a request, and return the head of its answer.

        A server may close a kept connection in the moment in which it is used again.  What changes nothing is
        then sent once more, as Go's net/http does, and so every container runtime.
        """
        is_kept = any(connection.is_idle() for connection in self._pool.connections)
        try:
            return await stack.enter_async_context(send())
        except (httpcore.RemoteProtocolError, httpcore.ReadError):
            if not (is_kept and repeat):
                raise
        return await stack.enter_async_context(send())


def _how(error: Exception) -> str:
    if isinstance(error, httpcore.ConnectError | httpcore.ConnectTimeout):
        return "refused"
    return "stalled" if isinstance(error, httpcore.TimeoutException) else "cut"


def _lower_case(response: httpcore.Response) -> dict[str, str]:
    return {name.decode().lower(): value.decode() for name, value in response.headers}
