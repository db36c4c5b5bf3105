"""Changes of a journal that can never be written to the backend, as the operator sees them.

What was acknowledged is not dropped by itself: it stays here, and on the disk, until somebody has it tried
again, or dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final

import structlog

from swarmpull.errors import (
    ManifestInvalid,
    ManifestNotFound,
    ManifestReferencesMissing,
    PushRefused,
    RepositoryNotFound,
    SwarmpullError,
    TagChanged,
    TagImmutable,
)
from swarmpull.roles.journal_file import Kept
from swarmpull.wire.api import PendingChange

log = structlog.get_logger()

# What does not change by waiting: it, or what it meets in the backend, has to be another one.
REFUSALS: Final = (
    ManifestInvalid,
    ManifestNotFound,
    ManifestReferencesMissing,
    PushRefused,
    RepositoryNotFound,
    TagChanged,
    TagImmutable,
)
# Characters of a reason that are kept, and entries that are shown.
REASON_MAX: Final = 500
SHOWN_MAX: Final = 1000
# Entries that are named where there is much else.
NAMED_MAX: Final = 20
REMEDY: Final = "swarmpull journal retry, once that is mended; or swarmpull journal drop"
_FIELDS: Final = ("id", "repository", "reference")


class SetAsideChanges:
    """Those of one journal, by id."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, change_id: str) -> bool:
        return change_id in self._kept

    def add(self, kept: Kept) -> None:
        """One that is on the disk as such."""
        self._kept[kept.id] = kept

    def pop(self, change_id: str) -> Kept | None:
        """Take one out."""
        return self._kept.pop(change_id, None)

    def get(self, change_id: str) -> Kept | None:
        return self._kept.get(change_id)

    def entries(self) -> list[Mapping[str, object]]:
        """What ``swarmpull journal status`` shows of them: the first 1000."""
        now = time.time()
        return [_document(kept, now) for kept in islice(self._kept.values(), SHOWN_MAX)]

    def names(self) -> list[str]:
        """The first 20, each with the reason."""
        return list(map(_name, islice(self._kept.values(), NAMED_MAX)))

    def wanted(self, wanted: object) -> list[Kept]:
        """Those with these values of id, repository and reference; of a manifest also by its digest.

        Raises:
            ValueError: it is not a map of some of these to texts.
        """
        if not isinstance(wanted, dict):
            raise ValueError("must be a JSON object with some of id, repository and reference")
        if unknown := sorted(map(str, wanted.keys() - set(_FIELDS))):
            raise ValueError(f"there is no {unknown[0]}: id, repository and reference are known")
        return [kept for kept in self._kept.values() if _fits(kept, wanted)]


def _fits(kept: Kept, wanted: Mapping[str, object]) -> bool:
    repository, references = what_of(kept.change)
    return (
        wanted.get("id", kept.id) == kept.id
        and wanted.get("repository", repository) == repository
        and wanted.get("reference", references[0]) in references
    )


def what_of(change: PendingChange) -> tuple[str, tuple[str, ...]]:
    """The repository, and what a change is of: a tag, and the digest of a manifest or a blob."""
    if change.link is not None:
        return change.link.repository, (str(change.link.digest),)
    if change.manifest is not None:
        return change.manifest.repository, tuple(_names(change))
    assert change.deletion is not None
    return change.deletion.repository, (change.deletion.reference,)


def _names(change: PendingChange) -> Iterator[str]:
    assert change.manifest is not None
    if change.manifest.tag is not None:
        yield change.manifest.tag
    yield str(change.manifest.manifest.digest)


def _name(kept: Kept) -> str:
    repository, references = what_of(kept.change)
    mark = "@" if ":" in references[0] else ":"
    return f"{_kind(kept.change)} of {repository}{mark}{references[0]}: {kept.refusal}"


def _kind(change: PendingChange) -> str:
    if change.link is not None:
        return "blob"
    return "put" if change.manifest is not None else "deletion"


def _document(kept: Kept, now: float) -> Mapping[str, object]:
    repository, references = what_of(kept.change)
    return {
        "id": kept.id,
        "change": _kind(kept.change),
        "repository": repository,
        "reference": references[0],
        "digest": references[-1] if ":" in references[-1] else "",
        "age_seconds": round(max(0.0, now - kept.acknowledged_at / 1e9), 1),
        "set_aside_seconds": round(max(0.0, now - kept.refused_at), 1),
        "reason": kept.refusal,
        "remedy": REMEDY,
    }


def log_set_aside(kept: Kept) -> None:
    """One line that says what, why, since when, and what to do."""
    repository, references = what_of(kept.change)
    log.warning(
        "index_journal_set_aside",
        change=_kind(kept.change),
        repository=repository,
        reference=references[0],
        digest=references[-1] if ":" in references[-1] else "",
        acknowledged_at=kept.acknowledged_at / 1e9,
        reason=kept.refusal,
        remedy=REMEDY,
    )


def refusal_of(error: SwarmpullError) -> str:
    """As it is kept."""
    return str(error)[:REASON_MAX]
