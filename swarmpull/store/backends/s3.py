"""The S3 backend: objects in a bucket of MinIO, Amazon S3, or whatever speaks as they do.

The object of key ``blobs/sha256/ab/abc1`` is ``<prefix>blobs/sha256/ab/abc1``.  Only ``[`` and ``\\``,
which some servers take for ``/``, are written ``[0`` and ``[1``, which keeps their order.  Objects whose
names are not keys are not ours and are left alone.

Requests are blocking (`s3_client`): here are the threads for them, cancellation, retries, and the
meaning of `Backend`.
"""

from __future__ import annotations

import heapq
import math
import os
import random
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import attrs
import structlog
import trio

from swarmpull.errors import BackendUnavailable, ObjectNotFound, ObjectReplaced, StartupError
from swarmpull.store.backends.base import (
    CHUNK_BYTES_MAX,
    SMALL_OBJECT_BYTES,
    ObjectPage,
    ObjectStat,
    check_key,
    check_range,
)
from swarmpull.store.backends.s3_client import Body, Page, S3Client, S3Failure, multipart_etag
from swarmpull.store.durable import read_exactly
from swarmpull.store.s3_location import S3Location, parse_location

T = TypeVar("T")

log = structlog.get_logger()

# Seconds before the second attempt and at most before any: S3 asks for exponential backoff and names
# no numbers; these spread five attempts over about three seconds.
BACKOFF_MIN: Final = 0.2
BACKOFF_MAX: Final = 5.0
# Parts of uploads in memory, over all uploads; each is `S3Location.part_size` long.
PARTS_AT_ONCE: Final = 4
# Amazon S3 user guide, "Amazon S3 multipart upload limits".
PARTS_MAX: Final = 10_000
PAGE_MAX: Final = 1000
# Listings that may be gone on with where their last page ended.
TOKENS_MAX: Final = 100
# For so many seconds: what is put meanwhile need not be in such a listing.
TOKEN_AGE: Final = 10.0
# How long a cancelled upload may take to tidy up; a server that hangs keeps its parts longer.
GRACE: Final = 3.0
# How long opening waits for a server that does not answer.
STARTUP_PATIENCE: Final = 5.0
# A HEAD has no body to tell a missing bucket from a missing object; so long an answer is believed.
BUCKET_BELIEVED: Final = 10.0
# Of two conditional puts at once S3 may answer both this way (Amazon S3 user guide, "How to prevent object
# overwrites with conditional writes").
CONFLICT: Final = "ConditionalRequestConflict"
CHANGED: Final = "the object was changed by another process"

_CREDENTIALS: Final = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws/credentials, and "
    "what it may do (docs/configuration.md)"
)
REMEDIES: Final = {
    "NoSuchBucket": "create the bucket, or correct its name in the url",
    "RequestTimeTooSkewed": "set this host's clock",
    "NoCredentials": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "AccessDenied": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
}
OTHER_REMEDY: Final = "check endpoint, secure and region in the url"


class S3Backend:
    """A `Backend` over a bucket.  Build one with `open_s3`.

    Attributes:
        name: ``s3://bucket/prefix?endpoint=host:port``.
        conditional: whether the server has conditional puts; None until the first one.
    """

    def __init__(self, location: S3Location) -> None:
        self.name = location.name
        self._location = location
        self._client = S3Client(location)
        self._threads = trio.CapacityLimiter(location.connections)
        self._parts = trio.CapacityLimiter(PARTS_AT_ONCE)
        self._random = random.Random()
        self._ordered = location.ordered
        self._tokens: dict[tuple[str, str], tuple[str, float]] = {}
        self._bucket_seen = -math.inf
        self.conditional: bool | None = None
        self._probing = trio.Lock()

    async def check(self) -> None:
        """Ask once whether the bucket can be used.  Raises S3Failure."""
        await self.attempt(partial(self._client.page, prefix=self._location.prefix, size=1))
        self._bucket_seen = trio.current_time()

    async def stat(self, key: str) -> ObjectStat:
        """See `Backend.stat`."""
        name = self._name_of(key)
        try:
            head = await self._persist(partial(self._client.head, name))
        except S3Failure as failure:
            if failure.code == "NoSuchKey":
                await self._check_bucket(key)
            self.fail(key, failure)
        return ObjectStat(key, head.length, head.etag)

    @asynccontextmanager
    async def open(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str = ""
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """See `Backend.open`."""
        name = self._name_of(key)
        body, offsets = await self._begin(key, name, start, stop, version)
        chunks = _Chunks(self, self._client, key, name, body, offsets)
        try:
            yield chunks
        finally:
            chunks.close()

    async def put_file(self, key: str, path: Path) -> None:
        """See `Backend.put_file`."""
        name = self._name_of(key)
        descriptor = await self._read_disk(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            length = os.fstat(descriptor).st_size
            if length > self._location.part_size:
                await self._put_parts(
                    _Upload(key, name, descriptor, length, self._part_size(length))
                )
                return
            async with self._parts:
                data = await self._read_part(key, descriptor, 0, length)
                await self._run(key, partial(self._client.put, name, data))
        finally:
            os.close(descriptor)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        """See `Backend.put_bytes`.

        A server without conditional puts is asked what is there right before: between that and the put
        another process may come.
        """
        if if_version is None:
            await self._run(key, partial(self._client.put, self._name_of(key), data))
        elif await self._knows_conditions(key):
            await self._put_if(key, data, if_version)
        else:
            if await self._version_of(key) != if_version:
                raise ObjectReplaced(self.name, key, CHANGED)
            await self._run(key, partial(self._client.put, self._name_of(key), data))

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        """See `Backend.get_bytes`."""
        data, _ = await self.get_versioned(key, limit=limit)
        return data

    async def get_versioned(
        self, key: str, *, limit: int = SMALL_OBJECT_BYTES
    ) -> tuple[bytes, str]:
        """See `Backend.get_versioned`."""
        name = self._name_of(key)
        head, data = await self._run(key, partial(self._client.get_small, name, limit))
        if head.length > limit:
            reason = f"the object has {head.length} bytes, {limit} were expected at most"
            raise BackendUnavailable(self.name, key, reason)
        return data, head.etag

    async def delete(self, key: str) -> None:
        """See `Backend.delete`."""
        await self.stat(key)
        await self._run(key, partial(self._client.delete, self._name_of(key)))

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:
        """See `Backend.list`.

        A server that lists in another order is asked for all that begins with the prefix.
        """
        if limit < 1:
            raise ValueError(f"a page of {limit} keys")
        page = await self._list_in_order(prefix, after, limit)
        return page or await self._list_all(prefix, after, limit)

    # --- conditional puts -----------------------------------------------------------------------------

    async def _put_if(self, key: str, data: bytes, version: str) -> None:
        """Raises ObjectReplaced when the object is not of this version."""
        name = self._name_of(key)
        failed = 0
        while True:
            try:
                await self.attempt(partial(self._client.put, name, data, _condition(version)))
            except S3Failure as failure:
                if failure.status == 412 or (version and failure.code == "NoSuchKey"):
                    # An attempt whose answer was lost may have been the one that changed it.
                    if failed and await self._is(key, data):
                        return
                    raise ObjectReplaced(self.name, key, CHANGED) from failure
                if failure.code == CONFLICT:
                    raise ObjectReplaced(self.name, key, CHANGED) from failure
                failed += 1
                with self._translating(key):
                    await self.patience(failure, failed)
            else:
                return

    async def _is(self, key: str, data: bytes) -> bool:
        try:
            return await self.get_bytes(key) == data
        except ObjectNotFound:
            return False

    async def _version_of(self, key: str) -> str:
        try:
            return (await self.stat(key)).version
        except ObjectNotFound:
            return ""

    async def _knows_conditions(self, key: str) -> bool:
        """Whether the server has conditional puts: tried once, on an object of its own."""
        async with self._probing:
            if self.conditional is None:
                with self._translating(key):
                    self.conditional = await self._probe_conditions()
                if not self.conditional:
                    log.warning(
                        "the backend has no conditional puts: concurrent changes of one tag at two "
                        "indexes may be lost; use one index, or another server",
                        backend=self.name,
                    )
        return self.conditional

    async def _probe_conditions(self) -> bool:
        name = f"{self._location.prefix}conditional-put-probe/{uuid.uuid4().hex}"
        await self._persist(partial(self._client.put, name, b"1"))
        try:
            for condition in (_condition(""), _condition('"0"')):
                try:
                    await self._persist(partial(self._client.put, name, b"2", condition))
                except S3Failure as failure:
                    if failure.status == 412:
                        continue
                    # 400 or 501: it knows that there are conditions, and has none.
                    if failure.status not in (400, 501):
                        raise
                return False
            return True
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(GRACE), suppress(S3Failure):
                await self._persist(partial(self._client.delete, name))

    # --- listing ------------------------------------------------------------------------------------

    async def _list_in_order(self, prefix: str, after: str, limit: int) -> ObjectPage | None:
        """A page of the server's listing; None when the server has its own order."""
        start = self._location.prefix + _escape(after) if after else ""
        # A server that goes on from a token need not begin its listing again, which MinIO does with each
        # other page: it looks at all objects that follow.
        token = self._token_for(prefix, after)
        found: tuple[str, ...] = ()
        while self._ordered is not False:
            size = min(limit - len(found), PAGE_MAX)
            page = await self._page(prefix, after=start, token=token, size=size)
            if self._ordered is None:
                self._ordered = page.ordered
            if self._ordered:
                found = self._in_order(prefix, (*found, *self._keys(page, prefix, after)))
                token = page.token
                if token and len(found) >= limit:
                    # MinIO gives a token at the very end, too.
                    following = await self._page(prefix, after="", token=token, size=1)
                    token = token if following.names else ""
                    self._keep_token(prefix, found[-1], token)
                if not token or len(found) >= limit:
                    return ObjectPage(found, bool(token))
        return None

    def _token_for(self, prefix: str, after: str) -> str:
        """That of the page which ended there, if it was given lately."""
        token, at = self._tokens.pop((prefix, after), ("", -math.inf))
        return token if trio.current_time() < at + TOKEN_AGE else ""

    def _keep_token(self, prefix: str, last: str, token: str) -> None:
        if token:
            self._tokens[prefix, last] = token, trio.current_time()
        while len(self._tokens) > TOKENS_MAX:
            del self._tokens[next(iter(self._tokens))]

    async def _list_all(self, prefix: str, after: str, limit: int) -> ObjectPage:
        """The smallest of all keys that begin with the prefix; as many are held in memory as are wanted."""
        token = ""
        found: tuple[str, ...] = ()
        more = True
        while more:
            page = await self._page(prefix, token=token, size=PAGE_MAX)
            keys = self._keys(page, prefix, after)
            found = tuple(heapq.nsmallest(limit + 1, (*found, *keys)))
            token, more = page.token, bool(page.token)
        return ObjectPage(found[:limit], len(found) > limit)

    async def _page(self, prefix: str, *, after: str = "", token: str, size: int) -> Page:
        name = self._location.prefix + _escape(prefix)
        listing = partial(self._client.page, prefix=name, after=after, token=token, size=size)
        return await self._run(prefix, listing)

    def _keys(self, page: Page, prefix: str, after: str) -> Iterator[str]:
        for name in page.names:
            key = self._key_of(name)
            if key > after and key.startswith(prefix):
                yield key

    def _in_order(self, prefix: str, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key, following in pairwise(keys):
            if following <= key:
                reason = (
                    f"{following} is listed after {key}: add ordered=false to the backend's url"
                )
                raise BackendUnavailable(self.name, prefix, reason)
        return keys

    def _name_of(self, key: str) -> str:
        return self._location.prefix + _escape(check_key(key))

    def _key_of(self, name: str) -> str:
        """The key of an object; empty when it is not ours."""
        escaped = name.removeprefix(self._location.prefix)
        try:
            key = check_key(_unescape(escaped))
        except ValueError:
            return ""
        return key if _escape(key) == escaped else ""

    # --- reading ------------------------------------------------------------------------------------

    async def _begin(
        self, key: str, name: str, start: int, stop: int | None, version: str
    ) -> tuple[Body | None, range]:
        """The first answer to a read, and the offsets that it is for; none when there are no bytes."""
        if start >= 0 and (stop is None or stop > start):
            try:
                body = await self._persist(partial(self._client.get, name, start, stop, version))
            except S3Failure as failure:
                if failure.status != 416:
                    self.fail(key, failure)
            else:
                return body, check_range(key, body.head.length, start, stop)
        # Nothing can be read; the length tells whether nothing was asked for.
        offsets = check_range(key, (await self.stat(key)).length, start, stop)
        if offsets:
            raise BackendUnavailable(self.name, key, "the object was replaced just now")
        return None, offsets

    # --- uploads in parts -----------------------------------------------------------------------------

    def _part_size(self, length: int) -> int:
        return max(self._location.part_size, -(-length // PARTS_MAX))

    async def _put_parts(self, upload: _Upload) -> None:
        key, name = upload.key, upload.name
        created: list[str] = []

        def create() -> None:
            created.append(self._client.create_upload(name))

        complete = False
        try:
            await self._run(key, create, settle=True)
            etags = await self._send_parts(upload, created[0])
            await self._complete(key, name, created[0], etags)
            complete = True
        finally:
            if not complete and created:
                await self._abort(key, name, created[0])

    async def _send_parts(self, upload: _Upload, upload_id: str) -> Sequence[str]:
        etags = [""] * len(upload.offsets)
        numbers = iter(range(len(etags)))
        failures = []

        async def send(nursery: trio.Nursery) -> None:
            for index in numbers:
                try:
                    etags[index] = await self._send_part(upload, upload_id, index)
                except (BackendUnavailable, ObjectNotFound) as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(min(PARTS_AT_ONCE, len(etags))):
                nursery.start_soon(send, nursery)
        if failures:
            raise failures[0]
        return etags

    async def _send_part(self, upload: _Upload, upload_id: str, index: int) -> str:
        # A function of its own, so that a part's bytes are gone when the next part waits for its turn.
        start = upload.offsets[index]
        size = min(upload.part_size, upload.length - start)
        async with self._parts:
            data = await self._read_part(upload.key, upload.descriptor, start, size)
            put = partial(self._client.put_part, upload.name, upload_id, index + 1, data)
            return await self._run(upload.key, put, settle=True)

    async def _complete(self, key: str, name: str, upload_id: str, etags: Sequence[str]) -> None:
        try:
            await self._persist(partial(self._client.complete_upload, name, upload_id, etags))
        except S3Failure as failure:
            # The upload is gone: perhaps it was completed and the answer was lost.
            if failure.code == "NoSuchUpload":
                head = await self._run(key, partial(self._client.head, name))
                if head.etag == multipart_etag(etags):
                    return
            self.fail(key, failure)

    async def _abort(self, key: str, name: str, upload_id: str) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(GRACE) as patience:
            try:
                await self._persist(partial(self._client.abort_upload, name, upload_id))
            except S3Failure as failure:
                if failure.code != "NoSuchUpload":
                    log.warning(
                        "parts are left behind", backend=self.name, key=key, reason=str(failure)
                    )
        if patience.cancelled_caught:
            log.warning("parts are left behind", backend=self.name, key=key, reason="no answer")

    async def _read_part(self, key: str, descriptor: int, start: int, size: int) -> bytes:
        try:
            return await self._read_disk(partial(read_exactly, descriptor, start, size))
        except OSError as error:
            raise BackendUnavailable(self.name, key, str(error)) from error

    async def _read_disk(self, function: Callable[[], T]) -> T:
        # Never abandoned: the descriptor must outlive its use.
        return await trio.to_thread.run_sync(function, limiter=self._threads)

    # --- requests -------------------------------------------------------------------------------------

    async def attempt(self, request: Callable[[], T], *, settle: bool = False) -> T:
        """Make a request in a thread, once; when cancelled, return at once and let the thread fail.

        Args:
            settle: when cancelled after the whole request was sent, wait up to `GRACE` for the answer:
                what the server does about it must not happen later.

        Raises:
            S3Failure: of the request.
        """
        call = self._client.call()
        ended = trio.Event()
        token = trio.lowlevel.current_trio_token()
        call.ended = partial(_run_soon, token, ended.set)
        try:
            return await trio.to_thread.run_sync(
                call.run, request, limiter=self._threads, abandon_on_cancel=True
            )
        except trio.Cancelled:
            if not call.cancel(unless_sent=settle):
                with trio.move_on_after(GRACE, shield=True):
                    await ended.wait()
                call.cancel()
            raise

    async def patience(self, failure: S3Failure, failed: int) -> None:
        """Wait before the next attempt.

        Args:
            failed: how many attempts have failed in a row.

        Raises:
            S3Failure: there is no next one.
        """
        if not failure.transient or failed >= self._location.attempts:
            raise failure
        longest = min(BACKOFF_MAX, BACKOFF_MIN * 2 ** (failed - 1))
        # Those who failed together must not come back together.
        await trio.sleep(longest * self._random.uniform(0.5, 1.0))

    async def _persist(self, request: Callable[[], T], *, settle: bool = False) -> T:
        """Make a request until it succeeds or fails for good.  Raises S3Failure."""
        failed = 0
        while True:
            try:
                return await self.attempt(request, settle=settle)
            except S3Failure as failure:
                failed += 1
                await self.patience(failure, failed)

    async def _run(self, key: str, request: Callable[[], T], *, settle: bool = False) -> T:
        with self._translating(key):
            return await self._persist(request, settle=settle)

    async def _check_bucket(self, key: str) -> None:
        """Return when the bucket exists: one that is gone must not look like one that lost its objects."""
        if trio.current_time() - self._bucket_seen > BUCKET_BELIEVED:
            with self._translating(key):
                await self.check()

    @contextmanager
    def _translating(self, key: str) -> Iterator[None]:
        try:
            yield
        except S3Failure as failure:
            self.fail(key, failure)

    def fail(self, key: str, failure: S3Failure, *, midway: bool = False) -> NoReturn:
        """Raise the error of the protocol.

        Args:
            midway: the object was there when the read began.
        """
        if failure.code == "NoSuchBucket":
            reason = f"bucket {self._location.bucket} does not exist: {REMEDIES['NoSuchBucket']}"
        elif failure.code == "NoSuchKey" and not midway:
            raise ObjectNotFound(self.name, key) from failure
        elif failure.code == "NoSuchKey":
            reason = "the object was deleted while it was read"
        elif failure.status == 412:
            reason = "the object was replaced while it was read"
            raise ObjectReplaced(self.name, key, reason) from failure
        else:
            reason = str(failure)
        raise BackendUnavailable(self.name, key, reason) from failure


class _Chunks:
    """The content of an open object, chunk by chunk; a body that breaks off is asked for again."""

    def __init__(
        self,
        backend: S3Backend,
        client: S3Client,
        key: str,
        name: str,
        body: Body | None,
        offsets: range,
    ) -> None:
        self._backend = backend
        self._client = client
        self._key = key
        self._name = name
        self._body = body
        self._etag = body.head.etag if body else ""
        self._length = body.head.length if body else 0
        self._offsets = offsets

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._offsets:
            raise StopAsyncIteration
        failed = 0
        while True:
            try:
                data = await self._next()
            except S3Failure as failure:
                failed += 1
                try:
                    await self._backend.patience(failure, failed)
                except S3Failure as final:
                    self._backend.fail(self._key, final, midway=True)
                continue
            self._offsets = self._offsets[len(data) :]
            return data

    async def _next(self) -> bytes:
        size = min(CHUNK_BYTES_MAX, len(self._offsets))
        # A body in a thread is that thread's to close; it is ours again when the thread is done well.
        body, self._body = self._body, None
        if body is None:
            body = await self._backend.attempt(self._reopen)
        data = await self._backend.attempt(partial(body.read, size))
        self._body = body
        return data

    def _reopen(self) -> Body:
        if not self._etag:
            raise S3Failure("", "the body broke off, and without an ETag it cannot be continued")
        return self._client.get(self._name, self._offsets.start, self._offsets.stop, self._etag)

    def close(self) -> None:
        """Give the connection back, or close it."""
        if self._body is not None:
            self._body.close()


@attrs.frozen
class _Upload:
    """A file on its way in parts."""

    key: str
    name: str
    descriptor: int
    length: int
    part_size: int

    @property
    def offsets(self) -> range:
        """Where the parts begin."""
        return range(0, self.length, self.part_size)


def _condition(version: str) -> dict[str, str]:
    return {"If-Match": version} if version else {"If-None-Match": "*"}


def _run_soon(token: trio.lowlevel.TrioToken, function: Callable[[], object]) -> None:
    # The loop may have ended while a thread was left to itself.
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(function)


def _escape(text: str) -> str:
    """Character by character, so that prefixes and the order of bytes stay what they are."""
    return text.replace("[", "[0").replace("\\", "[1")


def _unescape(name: str) -> str:
    return re.sub(r"\[([01])", lambda match: "[\\"[int(match[1])], name)


async def open_s3(url: str) -> S3Backend:
    """Open the backend of an ``s3://`` URL.  A server that does not answer yet is no error.

    Raises:
        StartupError: the URL is wrong, or the server refuses; says what to do.
    """
    backend = S3Backend(parse_location(url))
    silence = "no answer"
    with trio.move_on_after(STARTUP_PATIENCE):
        try:
            await backend.check()
        except S3Failure as failure:
            if not failure.transient:
                remedy = REMEDIES.get(failure.code, OTHER_REMEDY)
                raise StartupError(
                    f"backend {backend.name} refuses: {failure}", remedy
                ) from failure
            silence = str(failure)
        else:
            return backend
    log.warning("the backend cannot be reached yet", backend=backend.name, reason=silence)
    return backend
