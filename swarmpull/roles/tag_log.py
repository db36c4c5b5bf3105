"""What became of one tag: its last changes, of which the latest says what it is.  Pure.

Changes are sorted by their stamps, so the same changes make the same log in whatever order they arrive: at
every index, and in every cluster that they are replicated to.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Final

import attrs

from swarmpull.digest import Digest
from swarmpull.wire.api import Descriptor, Stamp, TagChange

# Changes that are kept of a tag, with that which makes it what it is.
CHANGES_MAX: Final = 32
# Characters of what names a source, or whoever asked for a change.
NAME_MAX: Final = 160
# Logs that were unpacked are kept, since the same ones are read again each time that a lease is over: the
# last so many that are no longer than that.
SHORT_MAX: Final = 4096
SHORT_BYTES_MAX: Final = 1 << 10
# Of the descriptor of a manifest, most of which are annotations, if it has any.
DESCRIPTOR_BYTES_MAX: Final = 4 << 10
# The longest log: 32 changes of two names, each character of which takes up to 6 bytes of JSON.
LOG_BYTES_MAX: Final = 128 << 10


@attrs.frozen
class TagLog:
    """The changes of a tag that are known, by their stamps; at most CHANGES_MAX."""

    changes: tuple[TagChange, ...] = ()
    # Of the manifest that the tag names, when the log has it.
    descriptor: Descriptor | None = attrs.field(default=None, eq=False)

    @property
    def latest(self) -> TagChange | None:
        """The change that makes the tag what it is; None when it never was anything."""
        return self.changes[-1] if self.changes else None

    @property
    def digest(self) -> Digest | None:
        """The manifest that the tag names; None when it is not there."""
        return self.changes[-1].digest if self.changes else None

    def with_change(self, change: TagChange) -> TagLog:
        """The log with one more change, at its place; the same log when it is too old to be kept."""
        merged = sorted({*self.changes, change}, key=order_of)
        return TagLog(tuple(merged[-CHANGES_MAX:])).described(self.descriptor)

    def described(self, descriptor: Descriptor | None) -> TagLog:
        """The log with what its manifest is, or as it is if that is about another one."""
        if descriptor is None or descriptor.digest != self.digest:
            return self
        return attrs.evolve(self, descriptor=descriptor)

    def next_stamp(self, now: int, source: str) -> Stamp:
        """A stamp for a change that is made here, at ``now`` in ns: later than all that are known.

        So a clock that was ahead, here or in another cluster, does not make later changes get lost.
        """
        latest = self.latest
        time = now if latest is None else max(now, latest.stamp.time + 1)
        return Stamp(time, source[:NAME_MAX])


def order_of(change: TagChange) -> tuple[int, str, str]:
    """Changes of a tag sort by it."""
    # No two changes have the same stamp, unless two sources have the same name.
    return change.stamp.time, change.stamp.source, str(change.digest or "")


def pack_log(log: TagLog) -> bytes:
    """The object of a tag that has changes."""
    changes = [
        {
            "time": change.stamp.time,
            "source": change.stamp.source,
            "digest": None if change.digest is None else str(change.digest),
            "by": change.by,
        }
        for change in log.changes
    ]
    fields: dict[str, Any] = {"changes": changes}
    if log.descriptor is not None and (described := _pack_descriptor(log.descriptor)) is not None:
        fields["manifest"] = described
    return json.dumps(fields).encode()


def _pack_descriptor(descriptor: Descriptor) -> dict[str, Any] | None:
    """None when it is too long to be kept twice."""
    fields = {
        "digest": str(descriptor.digest),
        "media_type": descriptor.media_type,
        "length": descriptor.length,
        "artifact_type": descriptor.artifact_type,
        "annotations": descriptor.annotations,
    }
    return fields if len(json.dumps(fields)) <= DESCRIPTOR_BYTES_MAX else None


def _unpack_descriptor(fields: dict[str, Any]) -> Descriptor:
    return Descriptor(
        Digest.parse(fields["digest"]),
        fields["media_type"],
        fields["length"],
        fields["artifact_type"],
        fields["annotations"],
    )


def unpack_log(data: bytes) -> TagLog:
    """Raises ValueError, KeyError, TypeError or InvalidDigest for what `pack_log` did not make."""
    return _unpack_short(data) if len(data) <= SHORT_BYTES_MAX else _unpack_log(data)


@lru_cache(maxsize=SHORT_MAX)
def _unpack_short(data: bytes) -> TagLog:
    return _unpack_log(data)


def _unpack_log(data: bytes) -> TagLog:
    fields = json.loads(data)
    changes = fields["changes"]
    if type(changes) is not list or not changes:
        raise ValueError("no changes")
    log = TagLog(tuple(_unpack_change(each) for each in changes))
    # Former versions did not write it.
    described = fields.get("manifest")
    return log if described is None else log.described(_unpack_descriptor(described))


def unpack_marker(data: bytes) -> TagLog:
    """What the object that lists a tag says: former versions had no other, and wrote there what the tag is.

    Raises ValueError, KeyError, TypeError or InvalidDigest for what none of them has made.
    """
    fields = json.loads(data)
    if type(fields) is not dict:
        raise TypeError("not a map")
    if not fields:
        return TagLog()
    time = int(float(fields.get("changed_at", 0.0)) * 1e9)
    return TagLog((TagChange(Stamp(time, ""), Digest.parse(fields["digest"])),))


def _unpack_change(fields: dict[str, Any]) -> TagChange:
    time, source, by = fields["time"], fields["source"], fields["by"]
    if type(time) is not int or type(source) is not str or type(by) is not str:
        raise TypeError("a change with a field of the wrong type")
    digest = fields["digest"]
    parsed = None if digest is None else Digest.parse(digest)
    return TagChange(Stamp(time, source), parsed, by)
