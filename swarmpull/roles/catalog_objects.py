"""The keys of the objects in which the catalog keeps repositories, and what is in them.

    catalog/<name, with .~/ for />                   the repository exists
    unsettled/<name, likewise>/<tag>/<any>           the listing of the tag may disagree with what it is
    repositories/<name>/_tags/<tag>                  the tag is there, for listings
    repositories/<name>/_changes/<tag>               the last changes of the tag, and so what it is
    repositories/<name>/_manifests/<alg>/<hex>       what is known of a manifest
    repositories/<name>/_referrers/<alg>/<hex>/<alg>/<hex>
                                                     a subject, then a manifest that refers to it: when it
                                                     was put last
    repositories/<name>/_blobs/<alg>/<hex>           the blob is part of the repository
    repositories/<name>/_deleted/<manifests or blobs>/<alg>/<hex>
                                                     when it was deleted, for journals and other clusters
                                                     that know what is older

What a journal brought of manifests and blobs says when it was acknowledged, and does not count if it was
deleted since (`catalog_parts`).

No component of a repository name begins with ``_``, so a repository may be called ``a`` and another
``a/b``, and neither has a key that is the other's.  No key is another one with a ``/`` and more behind it:
MinIO would not list that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    InvalidDigest,
    ManifestInvalid,
    PushRefused,
    RepositoryNotFound,
)
from swarmpull.registry.errors import shorten
from swarmpull.registry.names import is_repository, is_tag
from swarmpull.store.backends.base import SEGMENT_BYTES_MAX, Backend, check_key
from swarmpull.wire.api import Descriptor, RecordManifestRequest, Stamp

T = TypeVar("T")

# A manifest has 4 MiB at most, and its annotations are part of it.
ENTRY_BYTES_MAX: Final = 5 << 20
MARKERS: Final = "catalog/"
# A blob that is part of a repository, unless a journal has brought it.
PART: Final = b"{}"
UNSETTLED: Final = "unsettled/"
# Kinds of what is deleted.
MANIFESTS: Final = "manifests"
BLOBS: Final = "blobs"
# What is below the repository ``a`` is not below its marker.  In names ``.`` comes right before ``/``, and no
# character after ``~``, so these sort as ``/`` does.
BELOW: Final = ".~/"
# Lists of lists of lists: nobody makes more than three, and who walks through a tree must come to its end.
LEVELS_MAX: Final = 8
# So far a stamp from elsewhere may be ahead of the clock here, in ns: a clock that is wrong by more than a
# day would win over every other cluster for good.
AHEAD_MAX: Final = 86_400 * 10**9


@attrs.frozen
class ManifestEntry:
    """What the catalog keeps of one manifest.

    Attributes:
        descriptor: what it is.
        subject: what it refers to as its subject.
        levels: how deep the tree below it is: 1 for an image, 2 for a list of images.
        at: when it was acknowledged, in ns, if a journal has brought it.
    """

    descriptor: Descriptor
    subject: Digest | None
    levels: int = 1
    at: int | None = None


@attrs.frozen
class ReferrerTimes:
    """When a manifest that refers to another one was last put and last deleted, in ns.

    Attributes:
        put_at: None if its name is not there; 0 when a former version put it.
        deleted_at: 0 if it never was.
    """

    put_at: int | None
    deleted_at: int

    def next_time(self, now: int) -> int:
        """Of a change that is made here: as `TagLog.next_stamp`."""
        return max(now, (self.put_at or 0) + 1, self.deleted_at + 1)


# --- keys -------------------------------------------------------------------------------------


def marker_key(repository: str) -> str:
    return MARKERS + marker_name(repository)


def marker_name(text: str) -> str:
    """The name of a marker below `MARKERS`; in the order of what they are names for."""
    return text.replace("/", BELOW)


def marked(name: str) -> str:
    """What `marker_name` was made of."""
    return name.replace(BELOW, "/")


def tags_prefix(repository: str) -> str:
    return f"repositories/{repository}/_tags/"


def tag_key(repository: str, tag: str) -> str:
    return tags_prefix(repository) + tag


def unsettled_key(repository: str, tag: str, name: str) -> str:
    return f"{UNSETTLED}{marker_name(repository)}/{tag}/{name}"


def unsettled_tag(key: str) -> tuple[str, str] | None:
    """The repository and the tag that `unsettled_key` was made of; None for a key that it did not make."""
    parts = key.removeprefix(UNSETTLED).rsplit("/", 2)
    if len(parts) != 3 or not is_tag(parts[1]) or not can_be_kept(marked(parts[0])):
        return None
    return marked(parts[0]), parts[1]


def changes_key(repository: str, tag: str) -> str:
    return f"repositories/{repository}/_changes/{tag}"


def manifest_key(repository: str, digest: Digest) -> str:
    return f"repositories/{repository}/_manifests/{digest.algorithm}/{digest.hex}"


def blob_key(repository: str, digest: Digest) -> str:
    return f"repositories/{repository}/_blobs/{digest.algorithm}/{digest.hex}"


def deletion_key(repository: str, kind: str, digest: Digest) -> str:
    return f"repositories/{repository}/_deleted/{kind}/{digest.algorithm}/{digest.hex}"


def all_referrers_prefix(repository: str) -> str:
    return f"repositories/{repository}/_referrers/"


def referrers_prefix(repository: str, subject: Digest) -> str:
    return f"{all_referrers_prefix(repository)}{subject.algorithm}/{subject.hex}/"


def referrer_key(repository: str, subject: Digest, referrer: Digest) -> str:
    return f"{referrers_prefix(repository, subject)}{referrer.algorithm}/{referrer.hex}"


def digest_at_end(key: str) -> Digest:
    algorithm, encoded = key.split("/")[-2:]
    return Digest.parse(f"{algorithm}:{encoded}")


def can_be_kept(repository: str) -> bool:
    """Whether the text is a repository name, and none that is too long for the keys of a backend."""
    if not is_repository(repository):
        return False
    try:
        check_key(marker_key(repository))
    except ValueError:
        return False
    return True


def check_known(repository: str) -> None:
    """What is no name of a repository must not become part of a key."""
    if not can_be_kept(repository):
        raise RepositoryNotFound(shorten(repository))


def check_writable(repository: str) -> None:
    if not can_be_kept(repository):
        raise PushRefused(
            f"{shorten(repository)!r} cannot be the name of a repository: outside the grammar, or with "
            f"a component of more than {SEGMENT_BYTES_MAX - len(BELOW) + 1} characters"
        )


def check_stamp(reference: str, stamp: Stamp | None) -> None:
    """Raises PushRefused for one that is too far in the future."""
    if stamp is not None and stamp.time > time.time_ns() + AHEAD_MAX:
        raise PushRefused(
            f"the change of {shorten(reference)} has a stamp more than a day ahead of the clock here: set "
            f"the clock of {shorten(stamp.source)}, or of this index, and change it again"
        )


# --- values -----------------------------------------------------------------------------------


def unpacked(backend: Backend, key: str, data: bytes, unpack: Callable[[bytes], T]) -> T:
    """What is in an object of ours.  One that cannot be read is a fault of the backend."""
    try:
        return unpack(data)
    except (ValueError, KeyError, TypeError, AttributeError, InvalidDigest) as exc:
        reason = f"the object is damaged: {exc!r}"
        raise BackendUnavailable(backend.name, key, reason) from exc


def pack_entry(entry: ManifestEntry) -> bytes:
    """Raises ManifestInvalid for an entry that cannot be kept."""
    descriptor = entry.descriptor
    fields: dict[str, object] = {
        "media_type": descriptor.media_type,
        "length": descriptor.length,
        "artifact_type": descriptor.artifact_type,
        "annotations": descriptor.annotations,
        "subject": None if entry.subject is None else str(entry.subject),
        "levels": entry.levels,
    }
    if entry.at is not None:
        fields["at"] = entry.at
    try:
        data = json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise ManifestInvalid("its annotations are not Unicode text") from exc
    if len(data) > ENTRY_BYTES_MAX:
        raise ManifestInvalid(f"its annotations have {len(data)} bytes, too many to keep")
    return data


def unpack_entry(digest: Digest, data: bytes) -> ManifestEntry:
    """Raises ValueError, KeyError, TypeError or InvalidDigest for what `pack_entry` did not make."""
    fields = json.loads(data)
    subject = fields["subject"]
    descriptor = Descriptor(
        digest,
        fields["media_type"],
        fields["length"],
        fields["artifact_type"],
        fields["annotations"],
    )
    parsed = None if subject is None else Digest.parse(subject)
    # Former versions did not count.
    return ManifestEntry(descriptor, parsed, int(fields.get("levels", 1)), fields.get("at"))


def pack_part(at: int | None) -> bytes:
    """That a blob is part of a repository; ``at`` as in `ManifestEntry`."""
    return PART if at is None else json.dumps({"at": at}).encode()


def unpack_part(data: bytes) -> int | None:
    """Raises ValueError, TypeError or AttributeError for what `pack_part` did not make."""
    at = json.loads(data).get("at")
    return None if at is None else int(at)


def pack_deletion(at: int) -> bytes:
    return json.dumps({"at": at}).encode()


def unpack_deletion(data: bytes) -> int:
    """Raises ValueError, KeyError or TypeError for what `pack_deletion` did not make."""
    return int(json.loads(data)["at"])


def pack_put(at: int) -> bytes:
    return json.dumps({"at": at}).encode()


def unpack_put(data: bytes) -> int:
    """Raises ValueError, TypeError or AttributeError for what `pack_put` did not make."""
    # Former versions did not say.
    return int(json.loads(data).get("at", 0))


def check_levels(request: RecordManifestRequest, levels: Mapping[Digest, int]) -> int:
    """How deep the tree below a manifest is, from that of each manifest that it refers to.

    Raises:
        ManifestInvalid: deeper than LEVELS_MAX, or it refers to itself.
    """
    digest = request.manifest.digest
    if digest in (*request.manifests, request.subject):
        raise ManifestInvalid(f"{digest} refers to itself")
    deepest = max(levels, key=lambda child: levels[child], default=None)
    if deepest is None:
        return 1
    if levels[deepest] >= LEVELS_MAX:
        raise ManifestInvalid(
            f"{digest} refers to {deepest}, which has {levels[deepest]} levels of manifests already: "
            f"{LEVELS_MAX} are allowed"
        )
    return levels[deepest] + 1


def annotation_bytes(descriptor: Descriptor) -> int:
    pairs = (descriptor.annotations or {}).items()
    return sum(len(key.encode()) + len(value.encode()) for key, value in pairs)


def without_annotations(descriptor: Descriptor) -> Descriptor:
    return attrs.evolve(descriptor, annotations=None)
