"""The HTTP client behind ``swarmpull push``, ``pull`` and ``status``.

Content is verified against its digest before it is visible under its name.  A connection that is cut
is made again, and a download goes on where it stopped (``Range``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, Final, TypeVar
from urllib.parse import urlencode

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, LengthMismatch, SwarmpullError
from swarmpull.registry.http import (
    CHUNK_BYTES,
    HTTPS_ONLY,
    Answer,
    AnswerTooLong,
    ClientLimits,
    HttpClient,
    HttpFailure,
    Login,
    check_server_url,
    error_message,
    open_http,
)

# Status replies are small; whoever answers with more on that port is not one of ours.
_DOCUMENT_BYTES_MAX: Final = 8 << 20
_BUSY: Final = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_BACKOFF_MAX: Final = 5.0
# A cold blob may keep a reader waiting while the cluster fetches what comes next.
_LIMITS: Final = ClientLimits(connect=5.0, silence=60.0)
_ADMIN_TIMEOUT: Final = 3.0

_T = TypeVar("_T")

# Called with the bytes of the content done so far, and its length if it is known.
Progress = Callable[[int, int | None], None]


def no_progress(_done: int, _total: int | None) -> None:
    """Progress that nobody watches."""


# --- what can go wrong ----------------------------------------------------------------------------


@attrs.define(slots=False)
class ServerUnavailable(SwarmpullError):
    """No server there, or it went away for longer than the retries last.

    Attributes:
        url, reason: which, and why.
        is_there: it answers, and cannot do what it is asked for just now.
    """

    url: str
    reason: str
    is_there: bool = False

    def __str__(self) -> str:
        if self.is_there:
            return (
                f"{self.url} cannot do it just now: {self.reason}. "
                "Try again later, or name another with --registry"
            )
        return (
            f"{self.url} is not available: {self.reason}. "
            "Check that it runs, or name another with --registry"
        )


@attrs.define(slots=False)
class RequestRefused(SwarmpullError):
    """The server answered with an error; ``reason`` is its own."""

    method: str
    url: str
    status: int
    reason: str

    def __str__(self) -> str:
        text = f"{self.method} {self.url}: {self.reason} (HTTP {self.status})"
        if self.status == HTTPStatus.UNAUTHORIZED:
            return f"{text}; here with --user and --password-file"
        return text


@attrs.define(slots=False)
class _NotAdmin(SwarmpullError):
    """Whoever answers is not the admin listener that was looked for."""

    reason: str


@attrs.define(slots=False)
class UnexpectedAnswer(SwarmpullError):
    """What came back does not fit what was asked for: perhaps not a registry."""

    url: str
    reason: str

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}"


@attrs.define(slots=False)
class _Interrupted(SwarmpullError):
    """An attempt failed in a way that the next one may not; ``is_answer`` when the server said so."""

    reason: str
    is_answer: bool = False


# --- sinks ----------------------------------------------------------------------------------------


class Sink:
    """Where a download goes: bytes are written and hashed in order, in a thread."""

    def __init__(self, file: IO[bytes], digest: Digest) -> None:
        self.received = 0
        self._file = file
        self._digest = digest
        self._hash = digest.hasher()

    async def write(self, data: bytes) -> None:
        await trio.to_thread.run_sync(self._write, data)
        self.received += len(data)

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view:
            # a raw standard output may take less than it was given
            view = view[self._file.write(view) :]

    def verify(self, length: int | None) -> None:
        """Raises LengthMismatch, DigestMismatch."""
        if length is not None and self.received != length:
            raise LengthMismatch(str(self._digest), length, self.received)
        actual = f"{self._digest.algorithm}:{self._hash.hexdigest()}"
        if actual != str(self._digest):
            raise DigestMismatch(str(self._digest), actual)


@contextmanager
def standard_output(digest: Digest) -> Iterator[Sink]:
    """Download to standard output, where a wrong digest can only be reported afterwards."""
    yield Sink(sys.stdout.buffer, digest)
    sys.stdout.buffer.flush()


@contextmanager
def file_at(path: Path, digest: Digest) -> Iterator[Sink]:
    """Download to a temporary name beside ``path``, which appears when the block ends well.

    A device or a pipe is written to as it is.
    """
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory, name a file in it", str(path))
    if not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a directory, create it", str(path.parent))
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        with path.open("wb", buffering=0) as file:
            yield Sink(file, digest)
        return
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield Sink(file, digest)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the client -----------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Retries:
    """Limits of trying again: attempts in a row that bring nothing, and seconds before the second."""

    attempts: int = 5
    backoff: float = 0.25


@attrs.frozen
class Document:
    """A small answer held in memory."""

    content: bytes = attrs.field(repr=False)
    content_type: str
    headers: Mapping[str, str]


class RegistryClient:
    """Requests to one registry.  Make one with `open_client`."""

    def __init__(self, http: HttpClient, retries: Retries) -> None:
        self._http = http
        self._retries = retries

    async def get_blob(
        self,
        path: str,
        sink: Sink,
        *,
        length: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Download ``path`` into ``sink`` and verify it; ``length`` if it is known beforehand.

        Raises:
            ServerUnavailable, RequestRefused, UnexpectedAnswer, DigestMismatch, LengthMismatch.
        """
        rest = partial(self._get_rest, path, sink, length, progress)
        await self._retry(path, rest, received=lambda: sink.received)
        sink.verify(length)

    async def _get_rest(
        self, path: str, sink: Sink, length: int | None, progress: Progress
    ) -> None:
        """One request for what is missing; returns when the whole body has come."""
        start = sink.received
        headers = {"Range": f"bytes={start}-"} if start else {}
        async with self._http.request("GET", path, headers=headers) as answer:
            await _check(answer)
            total, skip = _extent(answer, start)
            if length is not None and total not in (None, length):
                raise UnexpectedAnswer(
                    answer.url, f"offers {total} bytes where {length} were declared"
                )
            progress(start, total)
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    dropped = min(skip, len(chunk))
                    skip -= dropped
                    await sink.write(chunk[dropped:])
                    progress(sink.received, total)
                    if length is not None and sink.received > length:
                        return
        if total is not None and sink.received < total:
            raise _Interrupted(f"the body ended after {sink.received} of {total} bytes")

    async def get_document(self, path: str, *, accept: tuple[str, ...], limit: int) -> Document:
        """GET something small, such as a manifest; ``limit`` in bytes."""
        headers = {"Accept": ", ".join(accept)}

        async def attempt() -> Document:
            async with self._http.request("GET", path, headers=headers) as answer:
                return await _document(answer, limit)

        return await self._retry(path, attempt)

    async def put_document(self, path: str, content: bytes, *, limit: int) -> Document:
        """PUT something small, once; returns the answer, of ``limit`` bytes at most."""
        headers = {"Content-Type": "application/json"}

        async def attempt() -> Document:
            async with self._http.request("PUT", path, content=content, headers=headers) as answer:
                return await _document(answer, limit)

        return await self._retry(path, attempt)

    async def exists(self, path: str) -> bool:
        """HEAD, once: is there something at ``path``?

        Raises ServerUnavailable also when the server cannot say.
        """

        async def attempt() -> bool:
            async with self._http.request("HEAD", path) as answer:
                if answer.status == HTTPStatus.NOT_FOUND:
                    return False
                await _check(answer)
                return True

        return await self._retry(path, attempt, attempts=1)

    async def put_blob(self, path: str, file: Path, *, progress: Progress = no_progress) -> None:
        """PUT a whole file to the generic blob API; ``path`` ends in its digest."""
        await self._retry(path, partial(self._send_file, path, file, progress))

    async def upload_blob(
        self, repository: str, digest: Digest, file: Path, *, progress: Progress = no_progress
    ) -> None:
        """Push a whole file into a repository: POST a session, PUT the content."""
        path = f"/v2/{repository}/blobs/uploads/"

        async def attempt() -> None:
            async with self._http.request("POST", path) as answer:
                await _check(answer)
                location = answer.headers.get("Location")
                url = answer.resolve(location or "")
                if answer.status != HTTPStatus.ACCEPTED or not location or not url:
                    raise UnexpectedAnswer(answer.url, "did not open an upload session")
            query = urlencode({"digest": str(digest)})
            await self._send_file(f"{url}{'&' if '?' in url else '?'}{query}", file, progress)

        await self._retry(path, attempt)

    async def put_manifest(self, path: str, content: bytes, media_type: str) -> None:
        """PUT a manifest under a tag or its digest."""

        async def attempt() -> None:
            headers = {"Content-Type": media_type}
            async with self._http.request("PUT", path, content=content, headers=headers) as answer:
                await _check(answer)

        await self._retry(path, attempt)

    async def _send_file(self, url: str, file: Path, progress: Progress) -> None:
        length = (await trio.Path(file).stat()).st_size
        headers = {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        body = _file_chunks(file, length, progress)
        async with self._http.request("PUT", url, content=body, headers=headers) as answer:
            await _check(answer)

    async def _retry(
        self,
        path: str,
        attempt: Callable[[], Awaitable[_T]],
        received: Callable[[], int] = lambda: 0,
        attempts: int | None = None,
    ) -> _T:
        """Try until it succeeds or several attempts in a row have brought nothing."""
        attempts = attempts or self._retries.attempts
        failures = 0
        while True:
            before = received()
            try:
                return await attempt()
            except (_Interrupted, HttpFailure) as exc:
                failure = exc if isinstance(exc, HttpFailure) else HttpFailure(exc.reason)
                if failure.invalid:
                    raise UnexpectedAnswer(path, failure.reason) from exc
                failures = 1 if received() > before else failures + 1
                # Nobody there at the first attempt is an answer; later it may be a restart.
                absent = failure.unreachable and not received()
                if absent or failures >= attempts:
                    is_there = isinstance(exc, _Interrupted) and exc.is_answer
                    raise ServerUnavailable(self._http.base, failure.reason, is_there) from exc
                await trio.sleep(min(self._retries.backoff * 2 ** (failures - 1), _BACKOFF_MAX))


@asynccontextmanager
async def open_client(
    registry: str, *, retries: Retries | None = None, login: Login | None = None
) -> AsyncIterator[RegistryClient]:
    """A client of the registry at a URL; ``host:port`` alone means plain HTTP.

    ``login`` is for a registry that asks for a password.

    Raises:
        UnexpectedAnswer: the text is not the URL of a registry.
    """
    url = registry_url(registry)
    async with open_http(url, _LIMITS, login) as http:
        yield RegistryClient(http, retries or Retries())


def server_url(text: str) -> str:
    """The base URL of a server that is given as URL or as ``host:port``; ValueError for anything else."""
    return check_server_url(text if "://" in text else f"http://{text}")


def registry_url(text: str) -> str:
    """The base URL of a registry that is given as URL or as ``host:port``."""
    try:
        return server_url(text)
    except ValueError as exc:
        reason = f"is not the URL of a registry, such as http://127.0.0.1:5000: {exc}"
        raise UnexpectedAnswer(text, reason) from exc


# --- answers --------------------------------------------------------------------------------------


async def _check(answer: Answer) -> None:
    """Turn an answer that is not a success into an error with the server's own words."""
    if answer.is_success:
        return
    if answer.is_redirect:
        target = answer.headers.get("Location", "elsewhere")
        raise UnexpectedAnswer(answer.url, f"redirects to {target}: name that server instead")
    reason = error_message(await _read_bounded(answer, _DOCUMENT_BYTES_MAX))
    reason = reason or answer.phrase or "no reason given"
    if answer.status in _BUSY:
        raise _Interrupted(f"{reason} (HTTP {answer.status})", is_answer=True)
    raise RequestRefused(answer.method, answer.url, answer.status, reason)


async def _document(answer: Answer, limit: int) -> Document:
    await _check(answer)
    return Document(await _read_bounded(answer, limit), answer.media_type, answer.headers)


async def _read_bounded(answer: Answer, limit: int) -> bytes:
    try:
        return await answer.read(limit)
    except AnswerTooLong as exc:
        raise UnexpectedAnswer(answer.url, str(exc)) from exc


def _extent(answer: Answer, start: int) -> tuple[int | None, int]:
    """(length of the whole content if known, bytes of this body that we have already)."""
    if answer.status == HTTPStatus.OK:
        return answer.length, start
    content_range = answer.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range, re.ASCII)
    if answer.status != HTTPStatus.PARTIAL_CONTENT or not match or int(match[1]) != start:
        raise UnexpectedAnswer(
            answer.url,
            f"answers bytes={start}- with HTTP {answer.status} {content_range}".rstrip(),
        )
    return (None if match[2] == "*" else int(match[2])), 0


# --- files ----------------------------------------------------------------------------------------


async def hash_file(
    file: Path, *, algorithm: str = "sha256", progress: Progress = no_progress
) -> Digest:
    """The digest of a file, computed in a thread."""
    length = (await trio.Path(file).stat()).st_size
    done, hasher = 0, hashlib.new(algorithm)
    with file.open("rb") as stream:
        while chunk := await trio.to_thread.run_sync(stream.read, CHUNK_BYTES):
            await trio.to_thread.run_sync(hasher.update, chunk)
            done += len(chunk)
            progress(done, length)
    return Digest(algorithm, hasher.hexdigest())


async def _file_chunks(file: Path, length: int, progress: Progress) -> AsyncIterator[bytes]:
    sent = 0
    with file.open("rb") as stream:
        while chunk := await trio.to_thread.run_sync(stream.read, CHUNK_BYTES):
            yield chunk
            sent += len(chunk)
            progress(sent, length)


# --- admin listeners ------------------------------------------------------------------------------


@attrs.frozen
class AdminAnswer:
    """What one admin listener said: the document that was asked for, or why there is none.

    Attributes:
        is_unheard: a role may be there, which did not answer in time, or takes HTTPS only.
        is_https: it takes HTTPS only.
    """

    address: str
    document: dict[str, Any] | None = None
    failure: str = ""
    is_unheard: bool = False
    is_https: bool = False


async def get_statuses(addresses: Sequence[str]) -> list[AdminAnswer]:
    """The status of every admin listener, asked all at once; in the order of the addresses."""
    return await _ask_all(addresses, _get_status)


async def get_rates(addresses: Sequence[str]) -> list[AdminAnswer]:
    """The rates of every agent or origin, by its admin listener; in the order of the addresses."""
    return await _ask_all(addresses, _get_rates)


async def put_rates(
    addresses: Sequence[str], change: Mapping[str, float | None]
) -> list[AdminAnswer]:
    """Change rates, as keys of what `get_rates` answers; returns what holds then."""
    return await _ask_all(addresses, partial(_put_rates, json.dumps(change).encode()))


@attrs.frozen
class AdminQueue:
    """What an index has not brought yet to where it belongs, as its admin listener shows it.

    Attributes:
        path: of the page.
        key: what every such page has.
        whose: whose admin listener has it.
        lack: what is wrong with another one.
    """

    path: str
    key: str
    whose: str
    lack: str


REPLICATION: Final = AdminQueue(
    "/replication",
    "remotes",
    "index that replicates",
    "replicates nothing: name the admin listener of an index that has replications",
)
JOURNAL: Final = AdminQueue(
    "/journal", "set_aside", "index", "has no journal: name the admin listener of an index"
)


async def get_queues(queue: AdminQueue, addresses: Sequence[str]) -> list[AdminAnswer]:
    """What is in the queues of indexes, by their admin listeners; in the order of the addresses."""
    return await _ask_all(addresses, partial(_get_queue, queue))


async def change_queues(
    queue: AdminQueue, addresses: Sequence[str], change: Mapping[str, object]
) -> list[AdminAnswer]:
    """Have indexes do something with their queues; returns what each of them did."""
    return await _ask_all(addresses, partial(_change_queue, queue, json.dumps(change).encode()))


async def _ask_all(
    addresses: Sequence[str], ask: Callable[[RegistryClient], Awaitable[dict[str, Any]]]
) -> list[AdminAnswer]:
    answers: dict[str, AdminAnswer] = {}

    async def ask_one(address: str) -> None:
        answers[address] = await _ask(address, ask)

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ask_one, address)
    return [answers[address] for address in addresses]


async def _ask(
    address: str, ask: Callable[[RegistryClient], Awaitable[dict[str, Any]]]
) -> AdminAnswer:
    try:
        with trio.fail_after(_ADMIN_TIMEOUT):
            async with open_client(address, retries=Retries(attempts=1)) as client:
                return AdminAnswer(address, await ask(client))
    except trio.TooSlowError:
        failure = f"no answer within {_ADMIN_TIMEOUT:.0f} seconds"
        return AdminAnswer(address, failure=failure, is_unheard=True)
    except (ServerUnavailable, _NotAdmin) as exc:
        return AdminAnswer(address, failure=exc.reason)
    except RequestRefused as exc:
        if HTTPS_ONLY in exc.reason:
            failure = f"{HTTPS_ONLY}: name it as https://{address.rpartition('/')[2]}"
            return AdminAnswer(address, failure=failure, is_unheard=True, is_https=True)
        return AdminAnswer(address, failure=str(exc))
    except SwarmpullError as exc:
        return AdminAnswer(address, failure=str(exc))


async def _get_status(client: RegistryClient) -> dict[str, Any]:
    return _admin_document(await _get_json(client, "/status"), "role", "names no role")


async def _get_rates(client: RegistryClient) -> dict[str, Any]:
    reason = "has no rates: name the admin listener of an agent or origin"
    answer = await _get_page(client, "/rates", reason)
    return _admin_document(answer, "upload_rate", "has no rates")


async def _put_rates(change: bytes, client: RegistryClient) -> dict[str, Any]:
    answer = await client.put_document("/rates", change, limit=_DOCUMENT_BYTES_MAX)
    return _admin_document(answer, "upload_rate", "has no rates")


async def _get_queue(queue: AdminQueue, client: RegistryClient) -> dict[str, Any]:
    answer = await _get_page(client, queue.path, queue.lack)
    return _admin_document(answer, queue.key, f"has no {queue.key}")


async def _get_page(client: RegistryClient, path: str, lack: str) -> Document:
    """A page that only some roles have."""
    try:
        return await _get_json(client, path)
    except RequestRefused as exc:
        if exc.status != HTTPStatus.NOT_FOUND:
            raise
        raise _NotAdmin(lack) from exc


async def _change_queue(queue: AdminQueue, change: bytes, client: RegistryClient) -> dict[str, Any]:
    answer = await client.put_document(queue.path, change, limit=_DOCUMENT_BYTES_MAX)
    document: dict[str, Any] = json.loads(answer.content)
    return document


async def _get_json(client: RegistryClient, path: str) -> Document:
    return await client.get_document(path, accept=("application/json",), limit=_DOCUMENT_BYTES_MAX)


def _admin_document(answer: Document, key: str, lack: str) -> dict[str, Any]:
    """The answer of an admin listener, which is an object with ``key``."""
    try:
        document = json.loads(answer.content)
    except ValueError as exc:
        raise _NotAdmin("the answer is not JSON: not an admin listener") from exc
    if not isinstance(document, dict) or key not in document:
        raise _NotAdmin(f"the answer {lack}: not an admin listener")
    return document
