"""How ``swarmpull status`` and ``swarmpull rates`` show what roles say: tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from swarmpull.registry.client import AdminAnswer
from swarmpull.units import format_rate, format_size


def role_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per role: what it is, whether it is ready, what it moved."""
    table = _table("ADDRESS", "ROLE", "READY", "TORRENTS", "RECEIVED", "SENT", "TO WRITE")
    for answer in answers:
        document = answer.document or {}
        table.add_row(
            answer.address,
            str(document.get("role", "")),
            _ready(document),
            str(len(_torrents(document))) if "torrents" in document else "",
            _received(document),
            _size(document.get("bytes_sent")),
            _to_write(document),
        )
    return table


def torrent_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per torrent of each role."""
    table = _table("ADDRESS", "DIGEST", "LENGTH", "PIECES", "PEERS", "STATE")
    for answer in answers:
        for torrent in _torrents(answer.document or {}):
            table.add_row(
                answer.address,
                str(torrent.get("digest", ""))[:19],
                _size(torrent.get("length")),
                f"{torrent.get('have', '?')}/{torrent.get('pieces', '?')}",
                str(torrent.get("peers", "")),
                str(torrent.get("state", "")),
            )
    return table


def rate_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per role that has rates."""
    table = _table("ADDRESS", "UPLOAD", "DOWNLOAD")
    for answer in answers:
        document = answer.document or {}
        rates = (_rate(document.get(key, "")) for key in ("upload_rate", "download_rate"))
        table.add_row(answer.address, *rates)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # What a terminal is too narrow for goes on in the next line, it is not cut; but nobody could search
        # for an address in two parts.
        table.add_column(column, overflow="fold", no_wrap=column == "ADDRESS")
    return table


def _ready(document: Mapping[str, Any]) -> str:
    if document.get("ready"):
        return "yes"
    reasons = document.get("reasons")
    return f"no: {'; '.join(map(str, reasons))}" if isinstance(reasons, list) and reasons else "no"


def _torrents(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    torrents = document.get("torrents")
    if not isinstance(torrents, list):
        return []
    return [torrent for torrent in torrents if isinstance(torrent, dict)]


def _received(document: Mapping[str, Any]) -> str:
    """Bytes by source, for example ``agent 12.0 MiB, origin 4.00 MiB``."""
    sources = document.get("bytes_received")
    if not isinstance(sources, dict):
        return ""
    return ", ".join(f"{source} {_size(count)}" for source, count in sorted(sources.items()))


def _to_write(document: Mapping[str, Any]) -> str:
    """What the backend does not have yet, and for how long: ``12 (3.10 GiB), 40 s, failing``."""
    queue = document.get("write_back")
    if not isinstance(queue, dict):
        return ""
    parts = [f"{queue.get('queued', '?')} ({_size(queue.get('bytes'))})"]
    oldest = queue.get("oldest_seconds")
    if queue.get("queued") and isinstance(oldest, int | float):
        parts.append(f"{oldest:.0f} s")
    if queue.get("failure"):
        parts.append("failing")
    return ", ".join(parts)


def _rate(value: object) -> str:
    if value is None:
        return format_rate(math.inf)
    return format_rate(value) if isinstance(value, int | float) else ""


def _size(value: object) -> str:
    return format_size(value) if type(value) is int and value >= 0 else ""
