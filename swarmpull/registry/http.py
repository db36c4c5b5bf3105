"""HTTP requests: the only module that knows httpx.

Nothing is tried again, no redirect is followed, nothing is decoded: who asks decides what an answer means.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Final, cast
from urllib.parse import urljoin, urlsplit

import attrs
import httpx

from swarmpull import __version__
from swarmpull.errors import StartupError, SwarmpullError

# What listeners for HTTPS answer to plain HTTP.
HTTPS_ONLY: Final = "this port takes HTTPS only"
CHUNK_BYTES: Final = 1 << 20
# In place of a proxy's URL.
FROM_ENVIRONMENT: Final = "environment"

# At their lower levels they write down URLs and headers, which may be signed or hold a token.
for _library in ("httpx", "httpcore"):
    logging.getLogger(_library).setLevel(logging.WARNING)


@attrs.define(slots=False)
class HttpFailure(SwarmpullError):
    """A request got no answer, or its answer broke off.

    Attributes:
        reason: what the operating system or the other side said; without the URL, which may be signed.
        unreachable: no connection could be made.
        invalid: it could not be sent as it is, so trying again is of no use.
    """

    reason: str
    unreachable: bool = False
    invalid: bool = False

    def __str__(self) -> str:
        return self.reason


@attrs.define(slots=False)
class AnswerTooLong(SwarmpullError):
    """A body is longer than whoever asked takes."""

    limit: int

    def __str__(self) -> str:
        return f"answers with more than {self.limit} bytes"


class Answer:
    """The head of an answer, and its body as it arrives.

    Attributes:
        method: of the request.
        url: of the request.
        status: of HTTP.
        phrase: beside the status; may be empty.
        headers: names in any case.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.method = response.request.method
        self.url = str(response.url)
        self.status = response.status_code
        self.phrase = response.reason_phrase
        self.headers: Mapping[str, str] = response.headers
        self._response = response

    @property
    def is_success(self) -> bool:
        return self._response.is_success

    @property
    def is_redirect(self) -> bool:
        """Whether it says to look elsewhere, and where."""
        return self._response.has_redirect_location

    @property
    def length(self) -> int | None:
        """``Content-Length``, if there is one."""
        text = self.headers.get("Content-Length", "")
        return int(text) if re.fullmatch("[0-9]{1,18}", text, re.ASCII) else None

    @property
    def media_type(self) -> str:
        """``Content-Type`` without its parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip()

    def resolve(self, location: str) -> str:
        """The URL that a ``Location`` of this answer means; empty when it is none."""
        try:
            target = urljoin(self.url, location)
            urlsplit(target).port  # noqa: B018 - the property raises ValueError
        except ValueError:
            return ""
        return target

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it was sent, in chunks of at most `CHUNK_BYTES`.

        Raises:
            HttpFailure: it broke off, after everything that had come.
        """
        waiting = bytearray()
        parts = cast("AsyncGenerator[bytes, None]", self._response.aiter_raw())
        async with aclosing(parts):
            while True:
                try:
                    with _translating():
                        part = await anext(parts, None)
                except HttpFailure:
                    if waiting:
                        yield bytes(waiting)
                    raise
                # What one read of the socket gives is far less than a chunk.
                if waiting and (part is None or len(waiting) + len(part) > CHUNK_BYTES):
                    yield bytes(waiting)
                    waiting.clear()
                if part is None:
                    return
                waiting += part

    async def close(self) -> None:
        """Give the connection back when the body was read to its end, else close it."""
        await self._response.aclose()

    async def read(self, limit: int) -> bytes:
        """The whole body.  Raises HttpFailure, AnswerTooLong."""
        content = bytearray()
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > limit:
                    raise AnswerTooLong(limit)
        return bytes(content)


@attrs.frozen(kw_only=True)
class ClientLimits:
    """Bounds of one client, in seconds.

    Attributes:
        connect: for one connection, TLS included.
        silence: without a byte in either direction.
        connections: at the same time; further requests wait.
    """

    connect: float = 5.0
    silence: float = 60.0
    connections: int = 100


@attrs.frozen
class Login:
    """A name and a password, for the server of a client alone and not for where it sends us."""

    name: str
    password: str = attrs.field(repr=False)

    def header(self) -> str:
        """As ``Authorization`` has it."""
        return f"Basic {base64.b64encode(f'{self.name}:{self.password}'.encode()).decode()}"


class HttpClient:
    """Requests to one server, and wherever else an absolute URL leads.  Make one with `open_http`."""

    def __init__(self, http: httpx.AsyncClient, base: str, login: Login | None = None) -> None:
        self.base = base
        self._http = http
        self._login = login

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
    ) -> Answer:
        """Make a request; the answer is the caller's to close.

        Args:
            method: of HTTP.
            url: absolute, or a path on the server.
            headers: besides those that all requests have.
            content: the body.

        Raises:
            HttpFailure: there is no answer.
        """
        with _translating():
            request = self._http.build_request(method, url, headers=headers, content=content)
            if self._login is not None and _origin(request.url) == _origin(httpx.URL(self.base)):
                request.headers["Authorization"] = self._login.header()
            return Answer(await self._http.send(request, stream=True))

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Answer]:
        """The same as `send`, with the answer open within the block."""
        answer = await self.send(method, url, headers=headers, content=content)
        try:
            yield answer
        finally:
            await answer.close()


def _system_certificates() -> ssl.SSLContext:
    return _certificates_at(ssl.get_default_verify_paths())


@functools.lru_cache(maxsize=4)
def _certificates_at(_paths: ssl.DefaultVerifyPaths) -> ssl.SSLContext:
    # Reading them takes a tenth of a second: not for each of the hundred clients of `swarmpull status`.
    # The paths follow SSL_CERT_FILE and SSL_CERT_DIR, which may change while this process lives.
    return ssl.create_default_context()


@asynccontextmanager
async def open_http(
    base: str,
    limits: ClientLimits | None = None,
    login: Login | None = None,
    *,
    socket: str | None = None,
    proxy: str = "",
) -> AsyncIterator[HttpClient]:
    """A client of the server at ``base``, for the length of the block.

    ``socket`` is the path of a Unix socket where that server listens.  ``proxy`` is the URL of one that is
    asked for everything, or `FROM_ENVIRONMENT` for what HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say.

    Raises:
        StartupError: what they say is no proxy that can be used.
    """
    async with _http_client(base, limits or ClientLimits(), socket, proxy) as http:
        yield HttpClient(http, base, login)


def _http_client(
    base: str, limits: ClientLimits, socket: str | None, proxy: str
) -> httpx.AsyncClient:
    by_environment = proxy == FROM_ENVIRONMENT
    # The system's certificates rather than a bundle of our own.  No proxy from the environment unasked: it
    # would be asked for registries on loopback.
    make = functools.partial(
        httpx.AsyncClient,
        base_url=base,
        timeout=httpx.Timeout(limits.silence, connect=limits.connect, pool=None),
        limits=httpx.Limits(max_connections=limits.connections),
        transport=None if socket is None else httpx.AsyncHTTPTransport(uds=socket),
        verify=_system_certificates(),
        proxy=None if by_environment else proxy or None,
        trust_env=by_environment,
        headers={"Accept-Encoding": "identity", "User-Agent": f"swarmpull/{__version__}"},
    )
    if not by_environment:
        return make()
    try:
        return make()
    except (ImportError, ValueError, httpx.InvalidURL):
        # Without their words, in which there may be a password.
        raise StartupError(
            f"{base} cannot be reached through the proxies of the environment",
            "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY must be http://host:port, and SOCKS is not spoken",
        ) from None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def error_message(body: bytes) -> str:
    """The messages of an OCI error body, or the first line of plain text."""
    text = body[:4096].decode("utf-8", "replace").strip()
    try:
        errors = json.loads(body)["errors"]
        messages = [_one_error(error) for error in errors]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text.splitlines()[0][:200] if text and not text.startswith("<") else ""
    return "; ".join(messages)


def _one_error(error: dict[str, Any]) -> str:
    code, message = error.get("code") or "", error.get("message") or ""
    return f"{code}: {message}" if code and message else str(code or message)


def check_server_url(text: str) -> str:
    """The URL of a server, without a path.

    Raises:
        ValueError: it is no such URL; says why.
    """
    try:
        parsed = httpx.URL(text)
        urlsplit(text).port  # noqa: B018 - raises ValueError, which httpx does only when it connects
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.path not in ("", "/"):
        raise ValueError("it needs http or https, a host, and nothing behind it")
    return text.rstrip("/")


@contextmanager
def _translating() -> Iterator[None]:
    """Turn what httpx raises into `HttpFailure`."""
    try:
        yield
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise HttpFailure(str(error), invalid=True) from error
    except httpx.LocalProtocolError as error:
        raise HttpFailure(f"the content changed meanwhile: {error}", invalid=True) from error
    except httpx.TransportError as error:
        unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        raise HttpFailure(_reason(error), unreachable=unreachable) from error


def _reason(failure: BaseException) -> str:
    """What the operating system said, if it is among the causes, else the failure itself."""
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            message = seen.verify_message.rstrip(".")
            # A wrong name is not mended by another authority.
            hint = "" if "mismatch" in message else " (SSL_CERT_FILE names other authorities)"
            return f"its certificate is not trusted: {message}{hint}"
        if isinstance(seen, ssl.SSLError):
            return f"TLS failed: {seen.reason or seen}"
        if isinstance(seen, OSError) and seen.errno:
            # name look-ups have negative numbers and texts of their own
            return os.strerror(seen.errno) if seen.errno > 0 else str(seen.strerror)
        if isinstance(seen, BaseExceptionGroup):
            return _reason(seen.exceptions[0])
        seen = seen.__cause__ or seen.__context__
    return str(failure) or type(failure).__name__
