"""What ``swarmpull store`` shows: tables, and documents for ``--json``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from swarmpull.store.eviction import Removal
from swarmpull.store.offline import Checked, Stored
from swarmpull.units import format_size


def stored_document(stored: Stored) -> dict[str, Any]:
    """One blob or partial."""
    entry = stored.entry
    return {
        "digest": str(entry.digest),
        "state": entry.kind.value,
        "length": stored.length,
        "bytes": entry.size,
        "set_at": _iso(entry.set_at),
        "used_at": _iso(entry.used_at),
        "have": stored.have,
        "pieces": stored.pieces,
    }


def stored_table(found: Sequence[Stored]) -> Table:
    """One row per blob or partial."""
    now = time.time()
    table = _table("DIGEST", "LENGTH", "SET", "USED", "STATE")
    for stored in found:
        entry = stored.entry
        pieces = "" if stored.have is None else f" {stored.have}/{stored.pieces}"
        table.add_row(
            str(entry.digest),
            format_size(stored.length),
            _ago(entry.age(now)),
            _ago(entry.idle(now)),
            entry.kind.value + pieces,
        )
    return table


def removal_document(removal: Removal) -> dict[str, Any]:
    """One that gc removes, or would."""
    entry = removal.entry
    return {
        "digest": str(entry.digest),
        "state": entry.kind.value,
        "bytes": entry.size,
        "reason": removal.reason.value,
        "set_at": _iso(entry.set_at),
        "used_at": _iso(entry.used_at),
    }


def removal_table(removals: Sequence[Removal]) -> Table:
    """One row per removal."""
    now = time.time()
    table = _table("DIGEST", "BYTES", "REASON", "SET", "USED", "STATE")
    for removal in removals:
        entry = removal.entry
        table.add_row(
            str(entry.digest),
            format_size(entry.size),
            removal.reason.value,
            _ago(entry.age(now)),
            _ago(entry.idle(now)),
            entry.kind.value,
        )
    return table


def checked_document(checked: Checked) -> dict[str, Any]:
    """One that was verified."""
    return {
        "digest": str(checked.digest),
        "state": checked.kind.value,
        "bytes": checked.length,
        "problem": checked.problem or None,
        "wrong_pieces": list(checked.pieces),
        "kept": checked.kept or None,
    }


def checked_line(checked: Checked) -> str:
    """One that is not right."""
    kept = f" (kept: {checked.kept})" if checked.kept else ""
    return f"{checked.kind.value} {checked.digest}: {checked.problem}{kept}"


def checked_summary(found: Sequence[Checked], *, removing: bool) -> str:
    """How many were right; ``removing``: what was not is removed, but for what there is a reason to keep."""
    wrong = sum(bool(checked.problem) for checked in found)
    kept = sum(bool(checked.kept) for checked in found)
    text = f"{len(found) - wrong} right, {wrong} wrong"
    if kept:
        return f"{text}: {wrong - kept} removed, {kept} kept."
    return f"{text} and removed." if removing and wrong else f"{text}."


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # A digest is for copying: it goes on in the next line rather than being cut.
        table.add_column(column, overflow="fold")
    return table


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} ago"
    return f"{int(seconds)}s ago"
