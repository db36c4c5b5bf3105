"""How ``swarmpull status``, ``rates``, ``replication`` and ``journal`` show what roles say: tables."""

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


def remote_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per remote cluster of each index."""
    table = _table("INDEX", "REMOTE", "QUEUED", "STANDBY", "OLDEST", "STATE")
    for answer in answers:
        document = answer.document or {}
        oldest = document.get("oldest_seconds", 0.0)
        for remote in document.get("remotes", []):
            table.add_row(
                answer.address,
                str(remote.get("name", "")),
                str(remote.get("queued", "")),
                str(document.get("standby", "")),
                f"{oldest:.0f}s" if remote.get("queued") else "",
                _remote_state(remote),
            )
    return table


def _remote_state(remote: Mapping[str, Any]) -> str:
    """``ok``, or why copies to it fail; and how many are not tried any more."""
    state = str(remote.get("failure") or "ok")
    return f"{state}, {remote['set_aside']} set aside" if remote.get("set_aside") else state


def change_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per tag that a remote was not told of yet."""
    table = _table("REMOTE", "TAG", "STATE", "AGE", "TRIED", "SENT", "WHY")
    for answer in answers:
        for entry in (answer.document or {}).get("entries", []):
            progress = entry.get("progress") or {}
            sent = ""
            if progress:
                sent = f"{_size(progress.get('bytes_sent'))} of {_size(progress.get('bytes'))}"
            table.add_row(
                str(entry.get("remote", "")),
                _reference(str(entry.get("repository", "")), str(entry.get("tag", ""))),
                str(entry.get("state", "")),
                f"{entry.get('age_seconds', 0.0):.0f}s",
                str(entry.get("attempts", "")),
                sent,
                str(progress.get("step") or entry.get("failure", "")),
            )
    return table


def _reference(repository: str, tag: str) -> str:
    """As an image is named: what has no tag stands there by its digest."""
    return f"{repository}{'@' if ':' in tag else ':'}{tag}"


def rule_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per rule of each index."""
    table = _table("INDEX", "PATTERN", "REMOTE", "CHANGES SINCE START")
    for answer in answers:
        for rule in (answer.document or {}).get("rules", []):
            table.add_row(
                answer.address,
                str(rule.get("pattern", "")),
                str(rule.get("remote", "")),
                str(rule.get("matched", "")),
            )
    return table


def journal_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per index: what waits for its backend, and what can never be written there."""
    table = _table("INDEX", "WAITING", "OLDEST", "SET ASIDE", "STATE")
    for answer in answers:
        document = answer.document or {}
        waiting = document.get("changes", 0)
        table.add_row(
            answer.address,
            f"{waiting} ({_size(document.get('bytes'))})" if waiting else "0",
            f"{document.get('age', 0.0):.0f}s" if waiting else "",
            str(document.get("set_aside", "")),
            str(document.get("trouble") or "ok"),
        )
    return table


def set_aside_table(answers: Sequence[AdminAnswer]) -> Table:
    """One row per change that was set aside; one that several indexes have in one row."""
    table = _table("CHANGE", "OF", "ACKNOWLEDGED", "SET ASIDE", "WHY")
    entries = {
        str(entry.get("id")): entry
        for answer in answers
        for entry in (answer.document or {}).get("entries", [])
    }
    for entry in entries.values():
        table.add_row(
            str(entry.get("change", "")),
            _reference(str(entry.get("repository", "")), str(entry.get("reference", ""))),
            f"{entry.get('age_seconds', 0.0):.0f}s ago",
            f"{entry.get('set_aside_seconds', 0.0):.0f}s ago",
            str(entry.get("reason", "")),
        )
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
