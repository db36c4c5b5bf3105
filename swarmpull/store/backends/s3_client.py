"""S3 as blocking requests: one each, never tried again, every failure an `S3Failure`.

The only module that knows minio, which signs requests and reads answers, and urllib3, which carries
them.  Requests are made in threads, which nobody can cancel; so each is made within a `Call`, and
`Call.cancel` ends it from another thread by shutting down the socket that it waits for.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import Any, Final, TypeVar
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET

import attrs
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    EnvMinioProvider,
    IamAwsProvider,
    MinioClientConfigProvider,
    Provider,
)
from minio.error import MinioException, S3Error
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.exceptions import SSLError as TLSError
from urllib3.response import BaseHTTPResponse, HTTPResponse
from urllib3.util import Timeout

from swarmpull.store.s3_location import S3Location

T = TypeVar("T")

# Amazon S3 API reference, "Error responses", those that pass; MinIO has codes of its own.
TRANSIENT_CODES: Final = frozenset(
    {
        "BadDigest",  # damaged on the way: the next attempt sends the same bytes again
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
        "XMinioServerNotInitialized",
    }
)
TRANSIENT_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
# One `sendall` has one timeout however much it sends; so much must get through within it.
SEND_BYTES: Final = 256 << 10
# A connection that breaks loses at most so much that had arrived.
RECEIVE_BYTES: Final = 256 << 10
# The instance's metadata service is one hop away or not there.
METADATA_TIMEOUT: Final = 1.0
# SeaweedFS walks its directories: all of "a/..." comes before "a-b", where bytes say the opposite, and
# a listing that starts after "a" leaves out "a/b" when both are objects (4.48).
UNORDERED_SERVERS: Final = ("SeaweedFS",)
# MinIO on one drive now and then says AccessDenied to a put while a neighbour is deleted, and takes the next
# one (2026-02): it removes directories that have become empty.
RACING_SERVERS: Final = ("MinIO",)

# What OpenSSL calls an answer that is no TLS; which of them depends on its version and on the answer.
PLAIN_ANSWERS: Final = frozenset({"WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL"})

# socket(7), struct linger: on, for no second.
NO_LINGER: Final = struct.pack("ii", 1, 0)

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+)")
_thread: Final = threading.local()


class S3Failure(Exception):
    """A request failed.

    Attributes:
        code: S3's own, such as ``SlowDown``; empty when S3 did not answer.
        message: what the server or the network said.
        status: of HTTP; 0 without an answer.
        transient: the same request may succeed in a moment.
    """

    def __init__(
        self, code: str, message: str, *, status: int = 0, transient: bool = False
    ) -> None:
        super().__init__(f"{code}: {message}" if code else message)
        self.code = code
        self.message = message
        self.status = status
        self.transient = transient


@attrs.frozen
class Head:
    """What a server says of an object: its length in bytes, and the ETag, in its quotes."""

    length: int
    etag: str


@attrs.frozen
class Page:
    """One answer to a listing.

    Attributes:
        names: of objects, as the server lists them.
        token: continues the listing; empty at its end.
        ordered: whether this kind of server keeps the order of bytes.
    """

    names: tuple[str, ...]
    token: str
    ordered: bool


# --- calls and their sockets ------------------------------------------------------------------------


class Call:
    """Requests that one thread makes for somebody who may lose interest.

    Attributes:
        patience: seconds that one send may take.
        status: the status of the last answer.
        body: what the call opened or reads; closed at its end when nobody wants it any more.
        ended: runs in the thread when the call has ended.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.status = 0
        self.body: Body | None = None
        self.ended: Callable[[], object] = bool
        self._sent = False
        self._over = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cancelled = False

    @property
    def used(self) -> socket.socket | None:
        """The socket that is used just now."""
        return self._socket

    def run(self, function: Callable[[], T]) -> T:
        """Run in this thread what makes the requests."""
        _thread.call = self
        try:
            return function()
        finally:
            _thread.call = None
            with self._lock:
                self._socket = None
                self._over = True
                unwanted = self.body if self._cancelled else None
            if unwanted is not None:
                unwanted.close()
            self.ended()

    def mark_sent(self) -> None:
        """The last bytes of the request are going out, and the server may carry it out."""
        with self._lock:
            self._sent = True

    def use(self, opened: socket.socket | None) -> None:
        """Name the socket that is used from now on.  Raises ConnectionAbortedError after `cancel`."""
        with self._lock:
            if self._cancelled:
                raise ConnectionAbortedError("the call was cancelled")
            self._socket = opened

    def cancel(self, *, unless_sent: bool = False) -> bool:
        """Let the thread fail at once, or at its next step; called from another one, never waits.

        Args:
            unless_sent: not when the server may carry the request out; False then.
        """
        with self._lock:
            if unless_sent and self._sent:
                return False
            self._cancelled = True
            if self._socket is not None:
                # Not the method of a TLS socket, which pulls its state away from under the reader.
                with suppress(OSError):
                    # What is still in the buffer must not reach a server minutes later, after what was put
                    # since: the thread closes the socket when it fails.
                    socket.socket.setsockopt(
                        self._socket, socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER
                    )
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            unwanted = self.body if self._over else None
        if unwanted is not None:
            unwanted.close()  # the thread had ended, and its result reaches nobody
        return True


def _call() -> Call:
    call: Call | None = getattr(_thread, "call", None)
    assert call is not None, "requests are made within Call.run"
    return call


class _Watched(HTTPConnection):
    """A connection that tells the call of its thread which socket to shut down, and when it is too late."""

    _sends = 0

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"  # urllib3 begins its messages with it

    def _new_conn(self) -> socket.socket:
        call = _call()
        call.use(None)
        opened = super()._new_conn()
        try:
            call.use(opened)
        except ConnectionAbortedError:
            opened.close()
            raise
        return opened

    def putrequest(
        self,
        method: str,
        url: str,
        skip_host: bool = False,
        skip_accept_encoding: bool = False,
    ) -> None:
        if self.sock is not None:
            _call().use(self.sock)  # used before, or wrapped for TLS since it was opened
        super().putrequest(method, url, skip_host, skip_accept_encoding)

    def request(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - those of urllib3
        # The head is one, the body, which urllib3 gives by its name, another.
        self._sends = 2 if options.get("body") else 1
        super().request(*arguments, **options)

    def send(self, data: Any) -> None:  # noqa: ANN401 - http.client has no name for it
        self._sends -= 1
        view = memoryview(data)
        if len(view) > SEND_BYTES and self.sock is not None:
            self.sock.settimeout(_call().patience)
        while len(view) > SEND_BYTES:
            super().send(view[:SEND_BYTES])
            view = view[SEND_BYTES:]
        if self._sends <= 0:
            # Before, not after: the server may have all of it before this thread runs again.
            _call().mark_sent()
        super().send(view)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        response = super().getresponse()
        _call().status = response.status
        return response


class _WatchedTLS(_Watched, HTTPSConnection):
    """The same over TLS.  A handshake cannot be shut down; the time to connect is its bound."""


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


class _Pools(urllib3.PoolManager):
    """Watched connections, and nothing is tried again.

    Neither is a redirect followed, which would be a request that is signed for another host.
    """

    def __init__(self, connections: int, timeout: Timeout) -> None:
        super().__init__(retries=False, maxsize=connections, timeout=timeout)
        self.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def urlopen(  # type: ignore[override]
        self,
        method: str,
        url: str,
        redirect: bool = False,  # noqa: ARG002
        **options: Any,  # noqa: ANN401 - those of urllib3
    ) -> BaseHTTPResponse:
        return super().urlopen(method, url, redirect=False, **options)


class Body:
    """The content of an object as it arrives.

    Attributes:
        head: of the object that it is the content of.
        start: the offset of the next byte.
    """

    def __init__(self, response: BaseHTTPResponse, head: Head, start: int) -> None:
        self.head = head
        self.start = start
        self._response = response
        self._socket = _call().used

    def read(self, size: int) -> bytes:
        """The next bytes, ``size`` unless the connection breaks before.

        Raises:
            S3Failure: nothing arrived; the body is closed.
        """
        call = _call()
        call.body = self
        parts: list[bytes] = []
        got = 0
        try:
            call.use(self._socket)
            while got < size:
                part = self._response.read(min(RECEIVE_BYTES, size - got), decode_content=False)
                if not part:
                    raise ConnectionResetError(f"the body ends {size - got} bytes too soon")
                parts.append(part)
                got += len(part)
        except (HTTPError, HTTPException, OSError) as error:
            self.close()
            # What has arrived is good; the next read finds the body closed.
            if not got:
                raise _network_failure(error) from error
        self.start += got
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give the connection back when all was read, else close it."""
        self._response.close()
        self._response.release_conn()


# --- requests -----------------------------------------------------------------------------------------


class S3Client:
    """The requests to one bucket.  All raise `S3Failure`, and are made within `Call.run`."""

    def __init__(self, location: S3Location) -> None:
        self._location = location
        self._minio = Minio(
            location.endpoint,
            secure=location.secure,
            region=location.region or None,
            credentials=_Credentials(location),
            http_client=_Pools(
                # An open body keeps its connection while its reader is busy.
                connections=2 * location.connections,
                timeout=Timeout(connect=location.connect_timeout, read=location.read_timeout),
            ),
        )

    def call(self) -> Call:
        """For the next requests of a thread."""
        return Call(self._location.read_timeout)

    def head(self, name: str) -> Head:
        """Look up an object."""
        return _head(self._request("HEAD", name))

    def get(self, name: str, start: int, stop: int | None, etag: str = "") -> Body:
        """Begin to read an object from ``start`` to ``stop``.

        Args:
            etag: only the version that has it.
        """
        headers = {"If-Match": etag} if etag else {}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        call = _call()
        response = self._request("GET", name, headers=headers, stream=True)
        body = Body(response, _head(response), start)
        call.body = body
        try:
            body.head = _check_answer(response, body.head, start, etag)
        except S3Failure:
            body.close()
            raise
        return body

    def get_small(self, name: str, limit: int) -> tuple[Head, bytes]:
        """The head of an object, and its content unless it is longer than ``limit``."""
        body = self.get(name, 0, None)
        head, length = body.head, body.head.length
        data = bytearray()
        try:
            while length <= limit and len(data) < length:
                data += body.read(length - len(data))
        finally:
            body.close()
        return head, bytes(data)

    def put(self, name: str, data: bytes, condition: dict[str, str] | None = None) -> None:
        """Store an object whole; ``condition`` is a header, the answer 412 when it does not hold."""
        self._request("PUT", name, body=data, headers=_BINARY | (condition or {}))

    def delete(self, name: str) -> None:
        """Remove an object; S3 does not say whether there was one."""
        self._request("DELETE", name)

    def page(self, *, prefix: str, after: str = "", token: str = "", size: int = 1000) -> Page:
        """List up to ``size`` names."""
        query = {
            "list-type": "2",
            "delimiter": "",
            # XML cannot hold every character that a name can.
            "encoding-type": "url",
            "prefix": prefix,
            "max-keys": str(size),
        }
        if token:
            query["continuation-token"] = token
        elif after:
            query["start-after"] = after
        with _translating():
            response = self._execute("GET", query=query)
            names, next_token = _listed(response.data)
        ordered = not response.headers.get("Server", "").startswith(UNORDERED_SERVERS)
        return Page(names, next_token, ordered)

    # --- uploads in parts -----------------------------------------------------------------------------

    def create_upload(self, name: str) -> str:
        """Begin an upload; its id."""
        with _translating():
            response = self._execute("POST", name, headers=_BINARY, query={"uploads": ""})
            return _texts(response.data, "UploadId")[0]

    def put_part(self, name: str, upload: str, number: int, data: bytes) -> str:
        """Send part ``number``, counted from 1; the ETag of it."""
        query = {"partNumber": str(number), "uploadId": upload}
        response = self._request("PUT", name, body=data, query=query)
        return response.headers.get("etag", "")

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> None:
        """Make the parts the object."""
        root = ET.Element("CompleteMultipartUpload")
        for number, etag in enumerate(etags, start=1):
            part = ET.SubElement(root, "Part")
            ET.SubElement(part, "PartNumber").text = str(number)
            ET.SubElement(part, "ETag").text = etag
        response = self._request(
            "POST",
            name,
            body=ET.tostring(root),
            headers={"Content-Type": "application/xml"},
            query={"uploadId": upload},
        )
        # The status is sent before the work is done, and stays 200 when it fails.
        with _translating():
            code, message = (_texts(response.data, tag) for tag in ("Code", "Message"))
        if code:
            text = message[0] if message else ""
            raise S3Failure(code[0], text, status=200, transient=code[0] in TRANSIENT_CODES)

    def abort_upload(self, name: str, upload: str) -> None:
        """Forget an upload and its parts."""
        self._request("DELETE", name, query={"uploadId": upload})

    def _request(
        self,
        method: str,
        name: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        stream: bool = False,
    ) -> BaseHTTPResponse:
        with _translating(method):
            return self._execute(
                method, name, body=body, headers=headers, query=query, stream=stream
            )

    def _execute(
        self,
        method: str,
        name: str | None = None,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        stream: bool = False,
    ) -> BaseHTTPResponse:
        # The public methods have no If-Match, no parts one by one, no page of a given size, and refuse
        # names of blanks; all of them are this one.
        return self._minio._execute(  # noqa: SLF001
            method,
            self._location.bucket,
            name,
            body=body,
            headers=dict(headers or {}),
            query_params=dict(query or {}),
            preload_content=not stream,
        )


_BINARY: Final = {"Content-Type": "application/octet-stream"}


def multipart_etag(etags: Sequence[str]) -> str:
    """The ETag that S3 gives to an object of these parts; empty when it cannot be told."""
    try:
        joined = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
    except ValueError:
        return ""
    return f'"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"'


def _head(response: BaseHTTPResponse) -> Head:
    length = response.headers.get("content-length", "")
    if not length.isdecimal():
        raise S3Failure(
            "", "the server does not say how long the object is", status=response.status
        )
    return Head(int(length), response.headers.get("etag", ""))


def _check_answer(response: BaseHTTPResponse, head: Head, start: int, etag: str) -> Head:
    """The head of the whole object, when the answer is the part of it that was asked for."""
    if etag and head.etag != etag:
        # A server that does not know If-Match.
        raise S3Failure("PreconditionFailed", "the object has another ETag", status=412)
    if response.status != 206:
        if start:
            raise S3Failure("", "the server does not support ranges", status=response.status)
        return head
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None or int(match[1]) != start:
        text = f"the server answers with another range: {response.headers.get('content-range')}"
        raise S3Failure("", text, status=response.status)
    return Head(int(match[2]), head.etag)


def _texts(document: bytes, tag: str) -> list[str]:
    """The texts of all elements of a name, whatever their namespace."""
    root = ET.fromstring(document)
    return [element.text or "" for element in root.iter() if element.tag.split("}")[-1] == tag]


def _listed(document: bytes) -> tuple[tuple[str, ...], str]:
    """The names in the answer to a listing, and the token for what follows; empty when nothing does.

    minio has a parser, too, which takes eight times as long, since it makes something of every field.
    """
    root = ET.fromstring(document)
    space, _, kind = root.tag.rpartition("}")
    if kind != "ListBucketResult":
        raise ValueError(f"the answer to a listing is a {kind}")
    within = space and space + "}"
    names = [each.findtext(within + "Key", "") for each in root.iter(within + "Contents")]
    if root.findtext(within + "EncodingType") == "url":
        names = [unquote_plus(name) for name in names]
    more = root.findtext(within + "IsTruncated", "").lower() == "true"
    return tuple(names), root.findtext(within + "NextContinuationToken", "") if more else ""


# --- failures -------------------------------------------------------------------------------------------


@contextmanager
def _translating(method: str = "") -> Iterator[None]:
    """Turn what minio and urllib3 raise into `S3Failure`; ``method`` is that of the request."""
    try:
        yield
    except S3Error as error:
        status = error.response.status
        transient = error.code in TRANSIENT_CODES or status in TRANSIENT_STATUSES
        transient |= method == "PUT" and _may_be_a_race(error)
        code, message = error.code or "", error.message or f"status {status}"
        raise S3Failure(code, message, status=status, transient=transient) from error
    except (HTTPError, HTTPException, OSError) as error:
        raise _network_failure(error) from error
    except (MinioException, ET.ParseError, ValueError, LookupError) as error:
        # An answer that is not of S3, or cut short: only its status can be believed.
        status = _call().status
        transient = status in TRANSIENT_STATUSES
        text = f"status {status}, and no answer of an S3 server: {_shorten(str(error))}"
        raise S3Failure("", text, status=status, transient=transient) from error


def _may_be_a_race(error: S3Error) -> bool:
    server = error.response.headers.get("Server", "")
    return error.code == "AccessDenied" and server.startswith(RACING_SERVERS)


def _network_failure(error: Exception) -> S3Failure:
    args = error.args if isinstance(error, TLSError) else ()
    causes = [each for each in args if isinstance(each, ssl.SSLError)]
    if any(each.reason in PLAIN_ANSWERS for each in causes):
        return S3Failure("", "the server speaks no TLS: with secure=false in the url none is used")
    refused = any(isinstance(each, ssl.SSLCertVerificationError) for each in causes)
    return S3Failure("", _shorten(str(error)), transient=not refused)


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "..."


class _Credentials(Provider):
    """Credentials from the first place that has any, asked before each request.

    The environment, MinIO's environment, the AWS credentials file, the configuration of ``mc``, the role
    of the instance; with a place of their own in the URL only that one.
    """

    def __init__(self, location: S3Location) -> None:
        profile, file, env = (
            location.profile,
            location.credentials_file,
            location.credentials_env,
        )
        providers: list[Provider]
        if env:
            self._looked = f"variables {env}_ACCESS_KEY_ID and {env}_SECRET_ACCESS_KEY"
            providers = [_EnvironmentProvider(env)]
        elif profile or file:
            self._looked = f"profile {profile or 'default'}" + (f" in {file}" if file else "")
            providers = [AWSConfigProvider(filename=file or None, profile=profile or None)]
        else:
            self._looked = "environment, files, instance"
            providers = _usual_providers()
        self._chain = ChainedProvider(providers)

    def retrieve(self) -> Credentials:
        try:
            return self._chain.retrieve()
        except (ValueError, OSError, configparser.Error, HTTPError) as error:
            raise S3Failure("NoCredentials", f"none found ({self._looked})") from error


class _EnvironmentProvider(Provider):
    """Credentials from variables of one backend's own: ``<prefix>_ACCESS_KEY_ID`` and so on."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def retrieve(self) -> Credentials:
        # An empty key is refused by the class, with a ValueError.
        return Credentials(
            access_key=os.environ.get(f"{self._prefix}_ACCESS_KEY_ID", ""),
            secret_key=os.environ.get(f"{self._prefix}_SECRET_ACCESS_KEY", ""),
            session_token=os.environ.get(f"{self._prefix}_SESSION_TOKEN") or None,
        )


def _usual_providers() -> list[Provider]:
    providers = [
        EnvAWSProvider(),
        EnvMinioProvider(),
        AWSConfigProvider(),
        MinioClientConfigProvider(),
    ]
    # As Amazon's own programs have it.
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        metadata = urllib3.PoolManager(retries=False, timeout=METADATA_TIMEOUT)
        providers.append(IamAwsProvider(http_client=metadata))
    return providers
