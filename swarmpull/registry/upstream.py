"""Another registry, as a place that content comes from: blobs as a `Backend`, and manifests.

Every request is retried while that may help: lost connections and 5xx with growing pauses, 429 and 503 as
long as the upstream asks for, within `RETRY_AFTER_MAX`.  A body that breaks off is continued where it did.
Redirects are followed without our credentials when they lead to another host.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import urlsplit

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    InvalidDigest,
    InvalidRange,
    ManifestInvalid,
    ManifestNotFound,
    ObjectNotFound,
    UpstreamBusy,
    UpstreamRefused,
)
from swarmpull.registry.errors import shorten
from swarmpull.registry.http import (
    Answer,
    AnswerTooLong,
    ClientLimits,
    HttpClient,
    HttpFailure,
    error_message,
    open_http,
)
from swarmpull.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_BYTES_MAX,
    OCI_INDEX,
    OCI_MANIFEST,
    parse_manifest,
    under_digest,
)
from swarmpull.registry.upstream_auth import Authorizer
from swarmpull.registry.upstream_credentials import Credentials, LoginFailed
from swarmpull.store.backends.base import (
    SMALL_OBJECT_BYTES,
    ObjectPage,
    ObjectStat,
    check_key,
    check_range,
)
from swarmpull.wire.api import Descriptor

log = structlog.get_logger()

ATTEMPTS: Final = 5
BACKOFF_MIN: Final = 0.2
BACKOFF_MAX: Final = 5.0
# Longer than that nobody waits for an upstream that asks for patience: the client hears of it instead, and
# container runtimes try again themselves.
RETRY_AFTER_MAX: Final = 10.0
# What a 429 without Retry-After is taken to mean.
RETRY_AFTER_DEFAULT: Final = 5.0
RETRY_AFTER_LONGEST: Final = 86400.0
# Browsers follow twenty; from registry to bucket it is one.
REDIRECTS_MAX: Final = 5
# Several times what an origin fetches at once, so that manifests and tokens do not wait for layers.
LIMITS: Final = ClientLimits(connect=5.0, silence=30.0, connections=64)

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_TRANSIENT: Final = (408, 500, 502, 503, 504)
_MEANT: Final = (200, 206, 304, 404, 416)
_ERROR_BYTES_MAX: Final = 64 << 10
_ACCEPT: Final = f"{OCI_INDEX}, {OCI_MANIFEST}, {DOCKER_LIST}, {DOCKER_MANIFEST}"
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", re.ASCII)
# As in `swarmpull.registry.manifests`: it becomes a header of our answer.
_MEDIA_TYPE: Final = re.compile(r"[!-~]{1,255}", re.ASCII)
_KEY: Final = re.compile(r"blobs/(sha256|sha512)/[0-9a-f]{2}/([0-9a-f]+)", re.ASCII)


@attrs.frozen(kw_only=True)
class Patience:
    """How often and how long an upstream is waited for; times in seconds.

    Attributes:
        attempts: in a row that bring nothing.
        backoff_min: before the second attempt; it doubles for each further one.
        backoff_max: at most before any.
        retry_after_max: longest wait that the upstream may ask for.
    """

    attempts: int = ATTEMPTS
    backoff_min: float = BACKOFF_MIN
    backoff_max: float = BACKOFF_MAX
    retry_after_max: float = RETRY_AFTER_MAX


@attrs.frozen
class UpstreamManifest:
    """A manifest as the upstream has it, checked against its digest."""

    descriptor: Descriptor
    content: bytes = attrs.field(repr=False)


class Upstream:
    """One upstream registry.  Make one with `open_upstream`.

    Attributes:
        name: its URL, for messages.
    """

    def __init__(
        self, name: str, http: HttpClient, authorizer: Authorizer, patience: Patience
    ) -> None:
        self.name = name
        self._http = http
        self._authorizer = authorizer
        self._patience = patience
        self._random = random.Random()
        self._busy_until = -math.inf

    def backend(self, repository: str) -> UpstreamBackend:
        """The blobs of one repository."""
        return UpstreamBackend(self, repository)

    async def head_manifest(
        self, repository: str, reference: str, *, known: Descriptor | None = None
    ) -> Descriptor:
        """Look up a tag or digest without its content; ``known`` is what it was the last time.

        Raises:
            ManifestNotFound: the upstream has no such manifest.
            BackendUnavailable, UpstreamBusy, UpstreamRefused: it cannot be asked.
        """
        headers = {"Accept": _ACCEPT}
        if known is not None:
            headers["If-None-Match"] = f'"{known.digest}"'
        path = f"{repository}/manifests/{reference}"
        async with self.request("HEAD", path, repository, headers) as answer:
            if answer.status == 304 and known is not None:
                return known
            self._check_manifest(answer, repository, reference)
            descriptor = _described(answer)
        if descriptor is not None:
            return descriptor
        # Not every registry says all of it in a HEAD.
        return (await self.get_manifest(repository, reference)).descriptor

    async def get_manifest(self, repository: str, reference: str) -> UpstreamManifest:
        """Fetch a manifest by tag or digest.

        Raises:
            ManifestNotFound: the upstream has no such manifest.
            BackendUnavailable, UpstreamBusy, UpstreamRefused: it cannot be fetched, or is not what its
                digest says.
        """
        path = f"{repository}/manifests/{reference}"
        failed = 0
        while True:
            try:
                async with self.request("GET", path, repository, {"Accept": _ACCEPT}) as answer:
                    self._check_manifest(answer, repository, reference)
                    content = await answer.read(MANIFEST_BYTES_MAX)
            except HttpFailure as failure:
                failed += 1
                await self.pause(path, failure.reason, failed)
            except AnswerTooLong as error:
                raise BackendUnavailable(self.name, path, str(error)) from error
            else:
                declared = answer.headers.get("Docker-Content-Digest", "")
                return await self._checked(path, reference, declared, content)

    def _check_manifest(self, answer: Answer, repository: str, reference: str) -> None:
        if answer.status == 404:
            raise ManifestNotFound(f"{repository} of upstream {self.name}", reference)
        if answer.status != 200:
            self.fail(f"{repository}/manifests/{reference}", f"it answers {answer.status}")

    async def _checked(
        self, path: str, reference: str, declared: str, content: bytes
    ) -> UpstreamManifest:
        try:
            manifest = await trio.to_thread.run_sync(parse_manifest, content, "")
            named = reference if ":" in reference else declared
            if named:
                digest = Digest.parse(named)
                actual = Digest.of(content, digest.algorithm)
                if actual != digest:
                    log.error(
                        "upstream_manifest_corrupt",
                        upstream=self.name,
                        path=path,
                        actual=str(actual),
                    )
                    self.fail(path, f"the manifest hashes to {actual}, not to {digest}")
                manifest = under_digest(manifest, digest)
        except (ManifestInvalid, InvalidDigest) as error:
            raise BackendUnavailable(
                self.name, path, f"the manifest is of no use: {error}"
            ) from error
        descriptor = Descriptor(manifest.digest, manifest.media_type, len(content))
        return UpstreamManifest(descriptor, content)

    # --- requests -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def request(
        self, method: str, path: str, repository: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Answer]:
        """The answer of `send`, open within the block."""
        answer = await self.send(method, path, repository, headers)
        try:
            yield answer
        finally:
            await answer.close()

    async def send(
        self, method: str, path: str, repository: str, headers: Mapping[str, str]
    ) -> Answer:
        """An answer of the registry that means something: 200, 206, 304, 404 or 416; to be closed.

        Raises:
            BackendUnavailable: after `Patience.attempts` there is none.
            UpstreamBusy: it asks for more patience than we have.
            UpstreamRefused: it does not let us.
        """
        failed = 0
        while True:
            await self._leave_alone(path)
            wait = None
            try:
                answer = await self._authorized(method, path, repository, headers)
                if answer.status in _MEANT:
                    return answer
                reason = await self._reason(path, answer)
                wait = self._asked_patience(answer)
            except HttpFailure as failure:
                reason = failure.reason
            except LoginFailed as failure:
                if not failure.transient:
                    raise UpstreamRefused(self.name, path, failure.reason) from failure
                reason = failure.reason
            failed += 1
            await self.pause(path, reason, failed, wait)

    async def _reason(self, path: str, answer: Answer) -> str:
        """What went wrong, when trying again may help; raises when it will not."""
        try:
            text = error_message(await answer.read(_ERROR_BYTES_MAX))
        except AnswerTooLong:
            text = ""
        finally:
            await answer.close()
        reason = f"HTTP {answer.status} {shorten(text or answer.phrase)}".rstrip()
        if answer.status == 401:
            reason += ": it does not take what we log in with, or lets nobody have this"
        if answer.status in (401, 403):
            raise UpstreamRefused(self.name, path, reason)
        if answer.status not in (*_TRANSIENT, 429):
            self.fail(path, reason)
        return reason

    def _asked_patience(self, answer: Answer) -> float | None:
        """Seconds that the upstream wants to be left alone for; None when it does not say."""
        asked = _retry_after(answer.headers.get("Retry-After", ""))
        if asked is None and answer.status == 429:
            asked = RETRY_AFTER_DEFAULT
        if asked is not None:
            self._busy_until = max(self._busy_until, trio.current_time() + asked)
        return asked

    async def _leave_alone(self, path: str) -> None:
        """Return when the upstream may be asked again.  Raises UpstreamBusy when that is too far off."""
        while (left := self._busy_until - trio.current_time()) > 0:
            if left > self._patience.retry_after_max:
                raise UpstreamBusy(self.name, path, "it has asked for patience", left)
            await trio.sleep(left)

    async def pause(self, path: str, reason: str, failed: int, wait: float | None = None) -> None:
        """Wait before the next attempt.

        Args:
            path: that was asked for.
            reason: why the last attempt failed.
            failed: how many have failed in a row.
            wait: seconds that the upstream has asked for, if it has.

        Raises:
            UpstreamBusy: it asks for too much, or too often.
            BackendUnavailable: there is no next attempt.
        """
        patience = self._patience
        if wait is not None and (failed >= patience.attempts or wait > patience.retry_after_max):
            raise UpstreamBusy(self.name, path, reason, wait)
        if failed >= patience.attempts:
            self.fail(path, reason)
        longest = min(patience.backoff_max, patience.backoff_min * 2 ** (failed - 1))
        # Those who failed together must not come back together.
        jitter = longest * self._random.uniform(0.5, 1.0)
        log.info("upstream_retry", upstream=self.name, path=path, reason=reason, failed=failed)
        await trio.sleep(jitter if wait is None else wait + jitter)

    async def _authorized(
        self, method: str, path: str, repository: str, headers: Mapping[str, str]
    ) -> Answer:
        """The answer to a request, made once more when the registry wants to know who asks."""
        url = f"{self._http.base}/v2/{path}"
        sent = self._authorizer.header(repository)
        answer = await self._follow(method, url, _with(headers, sent))
        # A bucket behind a redirect says 401 too, and does not mean our login.
        if answer.status != 401 or not _same_server(answer.url, url):
            return answer
        challenge = answer.headers.get("WWW-Authenticate", "")
        await answer.close()
        await self._authorizer.learn(challenge, repository, sent=sent)
        return await self._follow(method, url, _with(headers, self._authorizer.header(repository)))

    async def _follow(self, method: str, url: str, headers: Mapping[str, str]) -> Answer:
        redirects = 0
        while True:
            answer = await self._http.send(method, url, headers=headers)
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or not location:
                return answer
            target = answer.resolve(location)
            await answer.close()
            redirects += 1
            self._check_target(url, target, redirects)
            if not _same_server(url, target):
                headers = {name: text for name, text in headers.items() if name != "Authorization"}
            url = target

    def _check_target(self, url: str, target: str, redirects: int) -> None:
        # The target itself may be signed, which makes it a secret.
        path, wanted = urlsplit(url).path, urlsplit(target)
        allowed = ("https",) if url.startswith("https:") else ("http", "https")
        if wanted.scheme not in allowed or not wanted.hostname:
            self.fail(path, f"it redirects to what is no {' or '.join(allowed)} URL")
        if redirects > REDIRECTS_MAX:
            self.fail(path, f"it redirects more than {REDIRECTS_MAX} times")

    def fail(self, key: str, reason: str) -> NoReturn:
        """Raise BackendUnavailable."""
        raise BackendUnavailable(self.name, key, reason)


class UpstreamBackend:
    """The blobs of one repository of an upstream; a `Backend` that is only read.

    Attributes:
        name: the URL of the upstream with the repository.
    """

    def __init__(self, upstream: Upstream, repository: str) -> None:
        self.name = f"{upstream.name}/{repository}"
        self._upstream = upstream
        self._repository = repository

    async def stat(self, key: str) -> ObjectStat:
        """Look up a blob.  Raises ObjectNotFound."""
        async with self._upstream.request("HEAD", self._path(key), self._repository, {}) as answer:
            length, _ = self.extent(key, answer, 0)
            return ObjectStat(key, length)

    def open(
        self,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        version: str = "",  # noqa: ARG002 - a digest names one content
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read a range of a blob, as `Backend.open` says."""
        check_key(key)
        return self._open(key, start, stop)

    @asynccontextmanager
    async def _open(
        self, key: str, start: int, stop: int | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        reading = await self._begin(key, start, stop)
        if reading is None:
            # Nothing can be read; the length tells whether nothing was asked for.
            offsets = check_range(key, (await self.stat(key)).length, start, stop)
            if offsets:
                self.fail(key, "it refuses a range that lies within the blob")
            yield _nothing()
            return
        try:
            async with aclosing(reading.chunks()) as chunks:
                yield chunks
        finally:
            await reading.close()

    async def _begin(self, key: str, start: int, stop: int | None) -> _Reading | None:
        if start < 0 or (stop is not None and stop <= start):
            return None
        answer = await self.get(key, start, stop)
        try:
            if answer.status == 416:
                await answer.close()
                return None
            length, skip = self.extent(key, answer, start)
            return _Reading(self, key, answer, skip, check_range(key, length, start, stop), length)
        except (BackendUnavailable, ObjectNotFound, InvalidRange):
            await answer.close()
            raise

    async def get(self, key: str, start: int, stop: int | None) -> Answer:
        """The answer to a request for a range; to be closed."""
        headers = {}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        return await self._upstream.send("GET", self._path(key), self._repository, headers)

    def _path(self, key: str) -> str:
        match = _KEY.fullmatch(check_key(key))
        if match is None:
            raise ObjectNotFound(self.name, key)
        return f"{self._repository}/blobs/{match[1]}:{match[2]}"

    def extent(self, key: str, answer: Answer, start: int) -> tuple[int, int]:
        """(length of the whole blob, bytes of this body that come before ``start``).

        Raises:
            ObjectNotFound: there is no such blob.
            BackendUnavailable: the answer is not what was asked for.
        """
        if answer.status in (304, 404):
            raise ObjectNotFound(self.name, key)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            self.fail(key, "it compresses what must come as it is")
        if answer.status == 200:
            if answer.length is None:
                self.fail(key, "it does not say how long the blob is")
            return answer.length, start
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            self.fail(key, "it answers with another range than it was asked for")
        return int(match[2]), 0

    async def pause(self, key: str, reason: str, failed: int) -> None:
        """Wait before a body that broke off is asked for again, as `Upstream.pause`."""
        await self._upstream.pause(self._path(key), reason, failed)

    def fail(self, key: str, reason: str) -> NoReturn:
        """Raise BackendUnavailable."""
        raise BackendUnavailable(self.name, key, reason)

    async def put_file(self, key: str, path: Path) -> None:  # noqa: ARG002
        """Refuse: nothing is pushed upstream.  Raises BackendUnavailable."""
        self._refuse(key)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:  # noqa: ARG002
        """Refuse: nothing is pushed upstream.  Raises BackendUnavailable."""
        self._refuse(key)

    async def get_versioned(
        self, key: str, *, limit: int = SMALL_OBJECT_BYTES
    ) -> tuple[bytes, str]:
        """Read a small blob whole; its digest names it already."""
        return await self.get_bytes(key, limit=limit), key

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        """Read a small blob whole, as `Backend.get_bytes` says."""
        length = (await self.stat(key)).length
        if length > limit:
            self.fail(key, f"it has {length} bytes, {limit} are allowed")
        content = bytearray()
        async with self.open(key) as chunks:
            async for chunk in chunks:
                content += chunk
        return bytes(content)

    async def delete(self, key: str) -> None:
        """Refuse: nothing is deleted upstream.  Raises BackendUnavailable."""
        self._refuse(key)

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:  # noqa: ARG002
        """Refuse: registries do not list blobs.  Raises BackendUnavailable."""
        self.fail(prefix, "a registry does not list its blobs")

    def _refuse(self, key: str) -> NoReturn:
        self.fail(check_key(key), "an upstream is only pulled from")


class _Reading:
    """One range of a blob on its way; a body that breaks off is asked for again from there."""

    def __init__(
        self,
        backend: UpstreamBackend,
        key: str,
        answer: Answer,
        skip: int,
        offsets: range,
        length: int,
    ) -> None:
        self._backend = backend
        self._key = key
        self._answer: Answer | None = answer
        self._skip = skip
        self._offsets = offsets
        self._length = length

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the range, all of them.  Raises BackendUnavailable, UpstreamBusy, UpstreamRefused."""
        failed = 0
        while self._offsets:
            try:
                answer = self._answer or await self._continue()
                async with aclosing(answer.chunks()) as body:
                    async for received in body:
                        chunk = self._wanted(received)
                        if chunk:
                            failed = 0
                            yield chunk
                if self._offsets:
                    raise HttpFailure(f"the body ends {len(self._offsets)} bytes too soon")
            except HttpFailure as failure:
                await self.close()
                failed += 1
                await self._backend.pause(self._key, failure.reason, failed)

    def _wanted(self, received: bytes) -> bytes:
        dropped = min(self._skip, len(received))
        self._skip -= dropped
        chunk = received[dropped : dropped + len(self._offsets)]
        self._offsets = self._offsets[len(chunk) :]
        return chunk

    async def _continue(self) -> Answer:
        start, stop = self._offsets.start, self._offsets.stop
        self._answer = answer = await self._backend.get(self._key, start, stop)
        length, self._skip = self._backend.extent(self._key, answer, start)
        if length != self._length:
            self._backend.fail(self._key, f"it has {length} bytes now, and had {self._length}")
        return answer

    async def close(self) -> None:
        """Let go of the connection."""
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.close()


async def _nothing() -> AsyncIterator[bytes]:
    for _ in range(0):
        yield b""


def _same_server(one: str, other: str) -> bool:
    first, second = urlsplit(one), urlsplit(other)
    ports = {"http": 80, "https": 443}
    return (first.scheme, first.hostname, first.port or ports.get(first.scheme)) == (
        second.scheme,
        second.hostname,
        second.port or ports.get(second.scheme),
    )


def _with(headers: Mapping[str, str], authorization: str | None) -> Mapping[str, str]:
    return headers if authorization is None else {**headers, "Authorization": authorization}


def _described(answer: Answer) -> Descriptor | None:
    """What a HEAD of a manifest says; None when it leaves something out."""
    digest = answer.headers.get("Docker-Content-Digest", "")
    if answer.length is None or _MEDIA_TYPE.fullmatch(answer.media_type) is None:
        return None
    try:
        return Descriptor(Digest.parse(digest), answer.media_type, answer.length)
    except InvalidDigest:
        return None


def _retry_after(text: str) -> float | None:
    """Seconds that a ``Retry-After`` means, in either of its forms (RFC 9110, section 10.2.3)."""
    if text.isascii() and text.isdecimal():
        return min(float(text), RETRY_AFTER_LONGEST)
    try:
        seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_LONGEST)


@asynccontextmanager
async def open_upstream(
    url: str,
    credentials: Credentials,
    *,
    limits: ClientLimits = LIMITS,
    patience: Patience | None = None,
    proxy: str = "",
) -> AsyncIterator[Upstream]:
    """The registry at ``registry+https://host`` or ``registry+http://host``, for the length of the block.

    Nothing is asked of it yet: an upstream that is down keeps no role from starting.  ``proxy`` is as for
    `open_http`, which may raise StartupError.
    """
    base = url.removeprefix("registry+").rstrip("/")
    async with open_http(base, limits, proxy=proxy) as http:
        authorizer = Authorizer(http, credentials)
        yield Upstream(url.rstrip("/"), http, authorizer, patience or Patience())
