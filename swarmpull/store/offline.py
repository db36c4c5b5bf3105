"""What can be seen of a store, and done to it, without being the process that has it open; blocking.

Looking takes no lock: files may come and go meanwhile, and what is gone is left out.  Changing takes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, StartupError
from swarmpull.store.blobs import count_files, prepare
from swarmpull.store.content import ContentTree
from swarmpull.store.durable import remove
from swarmpull.store.eviction import Entry, Kind, Limits, Removal, plan
from swarmpull.store.hashing import hash_blob, hash_stored_piece
from swarmpull.store.holds import Pin
from swarmpull.store.ledger import UPLOADS, Ledger
from swarmpull.store.partials import PartialFiles, list_partials
from swarmpull.store.uploads import DATA_SUFFIX
from swarmpull.store.write_back_queue import belongs_to_origin, queued_digests
from swarmpull.swarm import bitfield
from swarmpull.swarm.metainfo import piece_length_for

_MARKS: Final = ("lock", "blobs")


@attrs.frozen
class Stored:
    """One blob or partial on the disk.

    Attributes:
        length: of the blob, in bytes.
        entry: its times, and what it takes up.
        have: how many pieces are stored; None for a blob.
        pieces: how many pieces there are; None for a blob.
    """

    length: int
    entry: Entry
    have: int | None = None
    pieces: int | None = None


@attrs.frozen
class Checked:
    """What `verify` found.

    Attributes:
        length: bytes that were read.
        problem: what is wrong; empty when all is right.
        pieces: of a partial, the stored pieces that are wrong.
        sidecar: only the metainfo beside the blob is wrong.
        readable: False when the disk did not give the bytes, which may be right.
        kept: why `verify_and_repair` has not removed what is wrong; empty when it has, or was not to.
    """

    digest: Digest
    kind: Kind
    length: int
    problem: str = ""
    pieces: tuple[int, ...] = ()
    sidecar: bool = False
    readable: bool = True
    kept: str = ""


def find_store(directory: Path) -> Path:
    """The store in a directory, or the only one right below it.

    Raises:
        StartupError: there is none, or there are several.
    """
    if _is_store(directory):
        return directory
    below = sorted(path for path in directory.iterdir() if _is_store(path))
    if len(below) == 1:
        return below[0]
    if not below:
        raise StartupError(
            f"{directory} is not the data directory of an agent or origin",
            "name one, such as swarmpull-data/agent",
        )
    names = ", ".join(str(path) for path in below)
    raise StartupError(f"{directory} holds several data directories", f"name one of {names}")


def role_of(root: Path) -> str:
    """Whose store it is: ``origin`` or ``agent``."""
    return "origin" if belongs_to_origin(root) else "agent"


def list_store(root: Path) -> list[Stored]:
    """Everything in a store, blobs first, in the order of digests.

    The last use may be older than what a running process knows, by a minute at most.
    """
    return [stored for entry in _count(root).entries({}, ()) if (stored := _stored(root, entry))]


def plan_removals(root: Path, limits: Limits) -> list[Removal]:
    """What the limits say must go, and the write-back queue lets go.

    What else a running process has pinned is not known here.  Raises StartupError for a queue that is missing
    or cannot be read.
    """
    ledger = _count(root)
    others = ledger.bytes(UPLOADS)
    pins = dict.fromkeys(queued_digests(root), Pin.NOT_WRITTEN_BACK)
    return plan(ledger.entries(pins, ()), limits, time.time(), others=others)


def collect(root: Path, limits: Limits) -> list[Removal]:
    """Remove what the limits say must go.  Raises StartupError when a process has the store open."""
    with _locked(root):
        removals = plan_removals(root, limits)
        for removal in removals:
            _delete(root, removal.entry.digest, removal.entry.kind)
    return removals


def delete(root: Path, digest: Digest) -> list[Stored]:
    """Remove a blob and its partial; returns what there was.

    Raises:
        BlobNotFound: there was neither.
        StartupError: a process has the store open, or the backend does not have the blob yet, or nobody knows
            because the queue is missing or cannot be read.
    """
    with _locked(root):
        found = [stored for stored in list_store(root) if stored.entry.digest == digest]
        if not found:
            raise BlobNotFound(str(digest), str(root))
        if digest in queued_digests(root):
            raise StartupError(
                f"{digest} was pushed here and the backend does not have it yet",
                "start the origin, and remove it when `swarmpull status` shows nothing to write",
            )
        for stored in found:
            _delete(root, digest, stored.entry.kind)
    return found


def verify(root: Path) -> Iterator[Checked]:
    """Hash every blob, and every stored piece of every partial, as it goes."""
    tree = _tree(root)
    for stat in tree.list():
        with suppress(FileNotFoundError):
            yield _check_blob(tree, stat.digest)
    for files in list_partials(root / "partials"):
        with suppress(FileNotFoundError):
            yield _check_partial(files)


def verify_and_repair(root: Path) -> Iterator[Checked]:
    """Verify, and remove what is wrong: the blob, the pieces, or the metainfo.

    A blob stays that the disk does not give, for the next time it may, and one that the backend lacks: what
    is left of it may be all there is.

    Raises:
        StartupError: a process has the store open, or the write-back queue is missing or cannot be read.
    """
    with _locked(root):
        queued = queued_digests(root)
        for checked in verify(root):
            kept = _reason_to_keep(checked, queued)
            if checked.problem and not kept:
                _repair(root, checked)
            yield attrs.evolve(checked, kept=kept)


# --- inside ---------------------------------------------------------------------------------------


def _is_store(path: Path) -> bool:
    return all((path / mark).exists() for mark in _MARKS)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        lock = prepare(root)
    except StartupError as error:
        raise StartupError(
            error.reason, "stop it first; as long as it runs it keeps to its limits by itself"
        ) from error
    try:
        yield
    finally:
        os.close(lock)


def _tree(root: Path) -> ContentTree:
    return ContentTree(root / "blobs", root / "temporary", Ledger())


def _count(root: Path) -> Ledger:
    tree = _tree(root)
    count_files(root, tree, False)
    for path in (root / "uploads").glob(f"*{DATA_SUFFIX}"):
        with suppress(FileNotFoundError):
            tree.ledger.add(UPLOADS, path.stat().st_size)
    return tree.ledger


def _stored(root: Path, entry: Entry) -> Stored | None:
    if entry.kind is Kind.BLOB:
        return Stored(entry.size, entry)
    loaded = PartialFiles(root / "partials", entry.digest).load()
    if loaded is None:
        return None
    shape = loaded.shape
    return Stored(shape.length, entry, loaded.have.bit_count(), shape.piece_count)


def _delete(root: Path, digest: Digest, kind: Kind) -> None:
    if kind is Kind.BLOB:
        _tree(root).delete(digest)
    else:
        PartialFiles(root / "partials", digest).remove()


def _check_blob(tree: ContentTree, digest: Digest) -> Checked:
    try:
        descriptor = os.open(tree.blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = os.fstat(descriptor).st_size
            piece_length = piece_length_for(length)
            actual, hashes = hash_blob(descriptor, digest.algorithm, length, piece_length)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        return Checked(digest, Kind.BLOB, 0, problem, readable=False)
    if actual != digest:
        return Checked(digest, Kind.BLOB, length, f"hashes to {actual}")
    metainfo = tree.load_metainfo(digest, length)
    if metainfo and metainfo.piece_length == piece_length and metainfo.piece_hashes != hashes:
        problem = "the metainfo beside it has other piece hashes"
        return Checked(digest, Kind.BLOB, length, problem, sidecar=True)
    return Checked(digest, Kind.BLOB, length)


def _check_partial(files: PartialFiles) -> Checked:
    loaded = files.load()
    if loaded is None:
        return Checked(files.digest, Kind.PARTIAL, 0, "the record of its pieces is damaged")
    shape, have = loaded.shape, loaded.have
    wrong, length = [], 0
    descriptor = os.open(files.data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index in bitfield.indices(have):
            start, size = shape.piece_offset(index), shape.piece_size(index)
            length += size
            try:
                actual = hash_stored_piece(descriptor, start, start + size)
            except OSError:
                actual = b""
            if actual != loaded.piece_hash(index):
                wrong.append(index)
    finally:
        os.close(descriptor)
    problem = f"{len(wrong)} of {have.bit_count()} stored pieces are wrong" if wrong else ""
    return Checked(files.digest, Kind.PARTIAL, length, problem, tuple(wrong))


def _reason_to_keep(checked: Checked, queued: frozenset[Digest]) -> str:
    if not checked.readable:
        return "its bytes may be right"
    is_damaged = checked.kind is Kind.BLOB and checked.problem and not checked.sidecar
    if is_damaged and checked.digest in queued:
        return "it was pushed here and the backend does not have it yet"
    return ""


def _repair(root: Path, checked: Checked) -> None:
    if checked.sidecar:
        remove(_tree(root).sidecar_path(checked.digest))
    elif checked.pieces:
        PartialFiles(root / "partials", checked.digest).unclaim(checked.pieces)
    else:
        _delete(root, checked.digest, checked.kind)
