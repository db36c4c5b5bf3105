"""Upload sessions: content on its way in, over several requests and over restarts.

A session is two files, ``uploads/<id>.data`` and ``uploads/<id>.session`` (JSON: the repository).  Its
offset after a restart is the size of the data; the prefix is hashed again when the session goes on.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    DigestMismatch,
    PushRefused,
    StoreFull,
    StoreUnavailable,
    UploadBusy,
    UploadNotFound,
)
from swarmpull.store.content import BlobStat, ContentTree
from swarmpull.store.disk import Disk
from swarmpull.store.durable import Data, remove
from swarmpull.store.holds import Hold, Holds, Pin
from swarmpull.store.ledger import UPLOADS
from swarmpull.store.room import Admit, Room
from swarmpull.store.spool import Spool
from swarmpull.swarm.metainfo import Metainfo

DATA_SUFFIX: Final = ".data"
SESSION_SUFFIX: Final = ".session"
_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


@attrs.frozen(kw_only=True)
class UploadLimits:
    """Bounds of the upload sessions of one store.

    Attributes:
        sessions: open at once; at the limit `UploadStore.create` raises PushRefused.
        idle_timeout: seconds without a byte after which a session is removed when another is created.
            A day lets a client that lost its network overnight go on.
        crowded_timeout: the same at the limit, so that pushes that were given up cannot keep out all
            others for a day.
    """

    sessions: int = 1024
    idle_timeout: float = 24 * 3600.0
    crowded_timeout: float = 15 * 60.0


@attrs.frozen
class _Files:
    """The two files of one session."""

    directory: Path
    upload_id: str

    @property
    def data(self) -> Path:
        return self.directory / (self.upload_id + DATA_SUFFIX)

    @property
    def session(self) -> Path:
        return self.directory / (self.upload_id + SESSION_SUFFIX)

    def create(self, tree: ContentTree, repository: str) -> None:
        self.data.touch(exist_ok=False)
        try:
            tree.replace_small_file(
                self.session, json.dumps({"repository": repository}).encode("utf-8")
            )
        except OSError:
            remove(self.data)
            raise

    def remove(self) -> None:
        remove(self.session)
        remove(self.data)


class Upload:
    """One upload session.

    Attributes:
        id: 32 hex digits.
        repository: the repository that it is pushed to.
        used_at: when the last bytes came, in seconds since the epoch, because it outlives the process.
    """

    def __init__(
        self,
        repository: str,
        spool: Spool,
        files: _Files,
        tree: ContentTree,
        disk: Disk,
        holds: Holds,
        *,
        used_at: float,
        on_close: Callable[[str], object],
    ) -> None:
        self.id = files.upload_id
        self.repository = repository
        self._spool = spool
        self._files = files
        self._tree = tree
        self._disk = disk
        self._holds = holds
        self._hold: Hold | None = None
        self._lock = trio.Lock()
        self._busy = False
        self._open = True
        self._on_close = on_close
        self.used_at = used_at

    @property
    def offset(self) -> int:
        """Bytes received; all of them are in the file once `writing` has been left."""
        return self._spool.offset

    @property
    def busy(self) -> bool:
        """Whether a request is inside `writing`."""
        return self._busy

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Keep other requests out; leaving writes what is still in memory, so that it can be resumed.

        Raises:
            UploadBusy: another request is inside.
            StoreFull: on leaving; `offset` says how much was kept.
            StoreUnavailable: likewise.
        """
        if self._busy:
            raise UploadBusy(self.id)
        self._busy = True
        try:
            try:
                yield
            except BaseException:
                # The client went away, or the request failed for a reason of its own, which must not be
                # hidden by a full disk: what could not be written is not in `offset`.
                with trio.CancelScope(shield=True), suppress(StoreFull, StoreUnavailable):
                    await self.flush()
                raise
            await self.flush()
        finally:
            self._busy = False
            if self._hold is not None:
                self._hold.release()

    async def append(self, data: Data) -> None:
        """Take the next bytes of the content.

        Raises:
            UploadNotFound: the session was finished or cancelled meanwhile.
            StoreFull: no room; `offset` says how much was kept, and the session may go on later.
            StoreUnavailable: likewise.
        """
        async with self._lock:
            self._check_open()
            self.used_at = time.time()
            await self._spool.write(data)

    async def flush(self) -> None:
        """Write what is still in memory.  Raises StoreFull, StoreUnavailable."""
        async with self._lock:
            if self._open:
                await self._spool.flush()

    async def finish(self, digest: Digest) -> BlobStat:
        """Verify the content and make it a blob of the store; the session ends.

        The blob is held until `writing` is left, so that the caller can go on to hold it before it could
        be evicted.

        Raises:
            UploadNotFound: the session was finished or cancelled meanwhile.
            DigestMismatch: the content is another; the session and its content are removed.
            StoreFull: no room for the last bytes; the session stays.
            StoreUnavailable: likewise.
        """
        async with self._lock:
            self._check_open()
            try:
                metainfo = await self._spool.verify(digest)
            except DigestMismatch:
                with trio.CancelScope(shield=True):
                    await self._remove()
                raise
            if self._busy:
                self._hold = self._holds.take(digest, Pin.NOT_WRITTEN_BACK)
            stat = await self._disk.run(self._install, metainfo)
            self._close()
            return stat

    async def cancel(self) -> None:
        """Remove the session and its content.  Raises UploadNotFound, StoreUnavailable."""
        async with self._lock:
            self._check_open()
            await self._remove()

    async def _remove(self) -> None:
        await self._disk.run(self._files.remove)
        self._close()

    def _install(self, metainfo: Metainfo) -> BlobStat:
        stat = self._tree.install(self._files.data, metainfo, self._spool.room.leave)
        self._files.remove()
        return stat

    def _close(self) -> None:
        self._open = False
        self._spool.room.leave()
        self._on_close(self.id)

    def _check_open(self) -> None:
        if not self._open:
            raise UploadNotFound(self.id)


class UploadStore:
    """The upload sessions of one store, by id."""

    def __init__(
        self,
        directory: Path,
        tree: ContentTree,
        disk: Disk,
        limits: UploadLimits,
        admit: Admit,
        holds: Holds,
    ) -> None:
        self._directory = directory
        self._tree = tree
        self._disk = disk
        self._limits = limits
        self._admit = admit
        self._holds = holds
        self._sessions: dict[str, Upload] = {}
        self._creating = 0

    async def create(self, repository: str) -> Upload:
        """Open a session.

        Raises:
            PushRefused: too many are open.
            StoreFull, StoreUnavailable: it cannot be kept.
        """
        await self.remove_idle()
        if self._is_full():
            await self._remove_idle(self._limits.crowded_timeout)
        if self._is_full():
            raise PushRefused(
                f"{self._limits.sessions} uploads are open in store {self._disk.name}: "
                "retry when some are finished"
            )
        files = _Files(self._directory, uuid.uuid4().hex)
        self._creating += 1
        try:
            await self._disk.run(files.create, self._tree, repository)
        finally:
            self._creating -= 1
        return self._add(files, repository, 0, time.time())

    def get(self, repository: str, upload_id: str) -> Upload:
        """Look up a session of this repository.

        Raises:
            UploadNotFound: there is none, or the id is malformed.
        """
        upload = self._sessions.get(upload_id)
        if upload is None or upload.repository != repository:
            raise UploadNotFound(upload_id)
        return upload

    async def remove_idle(self) -> None:
        """Remove the sessions that have been given up.  Raises StoreUnavailable."""
        await self._remove_idle(self._limits.idle_timeout)

    async def load(self) -> None:
        """Take up the sessions that an earlier process has left; once, by `open_store`."""
        for upload_id, repository, length, used_at in await self._disk.run(self._scan):
            self._add(_Files(self._directory, upload_id), repository, length, used_at)

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    def _add(self, files: _Files, repository: str, length: int, used_at: float) -> Upload:
        room = Room(self._admit, self._tree.ledger, UPLOADS, length)
        spool = Spool(self._disk, files.data, room, written=length)
        upload = Upload(
            repository,
            spool,
            files,
            self._tree,
            self._disk,
            self._holds,
            used_at=used_at,
            on_close=self._sessions.pop,
        )
        self._sessions[upload.id] = upload
        return upload

    def _is_full(self) -> bool:
        return len(self._sessions) + self._creating >= self._limits.sessions

    async def _remove_idle(self, timeout: float) -> None:
        oldest = time.time() - timeout
        idle = [
            upload
            for upload in self._sessions.values()
            if upload.used_at < oldest and not upload.busy
        ]
        for upload in idle:
            # Another request may have ended it while this one waited.
            with suppress(UploadNotFound):
                await upload.cancel()

    def _scan(self) -> list[tuple[str, str, int, float]]:
        """The sessions on disk; files without their counterpart are what a crash has left."""
        found = []
        for path in sorted(self._directory.iterdir()):
            if path.suffix not in {DATA_SUFFIX, SESSION_SUFFIX} or not _ID.fullmatch(path.stem):
                continue
            files = _Files(self._directory, path.stem)
            repository = _read_repository(files.session)
            if repository is None or not files.data.exists():
                files.remove()
            elif path.suffix == DATA_SUFFIX:
                status = path.stat()
                found.append((path.stem, repository, status.st_size, status.st_mtime))
        return found


def _read_repository(path: Path) -> str | None:
    try:
        repository = json.loads(path.read_bytes())["repository"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return repository if isinstance(repository, str) else None
