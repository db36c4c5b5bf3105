"""The books of one store: which blobs and partials it has, their sizes and times, and its bytes by kind.

Times survive restarts as modification times, which reading does not change and no mount option touches: a
blob was set at the time of its own file and used at the time of its sidecar; a partial was used when its
files were last written.  A use is noted in memory; `BlobStore` writes it down once a minute and at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.store.eviction import Entry, Kind
from swarmpull.store.holds import Pin

UPLOADS: Final = "upload"
TEMPORARY: Final = "temporary"
KINDS: Final = (Kind.BLOB.value, Kind.PARTIAL.value, UPLOADS, TEMPORARY)


@attrs.define
class Record:
    """One blob or partial.

    Attributes:
        size: bytes; of a partial, what its content takes on the disk.
        set_at: when it got into the store, in seconds since the epoch.
        used_at: when it was last used.
        saved_at: the ``used_at`` that the disk has.
    """

    size: int
    set_at: float
    used_at: float
    saved_at: float = attrs.field(default=attrs.Factory(lambda self: self.used_at, takes_self=True))


class Ledger:
    """See the module; any thread may call it.

    Attributes:
        clock: gives seconds since the epoch.
        lock: held while a file changes its name and the books follow; reentrant.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self._records: dict[Kind, dict[Digest, Record]] = {Kind.BLOB: {}, Kind.PARTIAL: {}}
        self._bytes = dict.fromkeys(KINDS, 0)

    # --- bytes --------------------------------------------------------------------------------

    def total(self) -> int:
        """Bytes of everything."""
        with self.lock:
            return sum(self._bytes.values())

    def bytes(self, kind: str) -> int:
        """Bytes of one of `KINDS`."""
        return self._bytes[kind]

    def add(self, kind: str, size: int) -> None:
        """Enter bytes of uploads or temporary files; negative ones leave."""
        with self.lock:
            self._bytes[kind] += size

    # --- blobs and partials -------------------------------------------------------------------

    def put(self, kind: Kind, digest: Digest, record: Record | None) -> None:
        """Enter, replace or, with None, remove one."""
        with self.lock:
            records = self._records[kind]
            former = records.pop(digest, None)
            self._bytes[kind.value] -= former.size if former else 0
            if record is not None:
                records[digest] = record
                self._bytes[kind.value] += record.size

    def get(self, kind: Kind, digest: Digest) -> Record | None:
        """The record of a blob or partial, if it is here; not to be changed."""
        return self._records[kind].get(digest)

    def touch(self, digest: Digest) -> None:
        """Note that a blob was used just now."""
        record = self._records[Kind.BLOB].get(digest)
        if record is not None:
            record.used_at = self.clock()

    def clamp(self) -> None:
        """Bring times that lie in the future to the present: the clock went back."""
        now = self.clock()
        with self.lock:
            for records in self._records.values():
                for record in records.values():
                    record.set_at = min(record.set_at, now)
                    record.used_at = min(record.used_at, now)

    def unsaved(self) -> list[tuple[Digest, Record]]:
        """Blobs whose last use the disk does not have."""
        with self.lock:
            blobs = self._records[Kind.BLOB].items()
            return [
                (digest, record) for digest, record in blobs if record.used_at != record.saved_at
            ]

    def entries(
        self, blob_pins: Mapping[Digest, Pin], partial_pins: Iterable[Digest]
    ) -> list[Entry]:
        """Everything, as the policy takes it."""
        open_partials = frozenset(partial_pins)
        with self.lock:
            blobs = [
                _entry(digest, Kind.BLOB, record, blob_pins.get(digest))
                for digest, record in self._records[Kind.BLOB].items()
            ]
            partials = [
                _entry(
                    digest,
                    Kind.PARTIAL,
                    record,
                    Pin.DOWNLOADING if digest in open_partials else None,
                )
                for digest, record in self._records[Kind.PARTIAL].items()
            ]
        return blobs + partials


def _entry(digest: Digest, kind: Kind, record: Record, pin: Pin | None) -> Entry:
    pinned = pin.value if pin else ""
    return Entry(digest, kind, record.size, record.set_at, record.used_at, pinned)
