"""The tags of a repository and the history of one, asked for over HTTP: behind ``swarmpull tags``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

import attrs

from swarmpull.registry.client import RegistryClient, UnexpectedAnswer

# A page of the longest tags, and a history of the longest names.
_BYTES_MAX: Final = 4 << 20
_JSON: Final = ("application/json",)
PAGE: Final = 5000


@attrs.frozen
class HistoryEntry:
    """One change of a tag: when in ns since 1970, at which index, what it was then, and who asked.

    ``digest`` is None for a deletion.
    """

    time: int
    source: str
    digest: str | None
    by: str

    @property
    def moment(self) -> str:
        """The time in ISO 8601."""
        return datetime.fromtimestamp(self.time / 1e9, UTC).isoformat(timespec="milliseconds")


async def tag_history(client: RegistryClient, repository: str, tag: str) -> list[HistoryEntry]:
    """The last changes of a tag, the latest first.

    Raises:
        ServerUnavailable, RequestRefused, UnexpectedAnswer.
    """
    path = f"/v2/{repository}/_swarmpull/history/{tag}"
    document = await _get(client, path)
    try:
        return [
            HistoryEntry(int(each["time"]), str(each["source"]), each["digest"], str(each["by"]))
            for each in document["changes"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(path, f"is no history of a tag ({error!r})") from error


async def tag_pages(client: RegistryClient, repository: str) -> AsyncIterator[list[str]]:
    """The tags of a repository in byte order, page by page.  Raises what `tag_history` does."""
    last = ""
    more = True
    while more:
        query = urlencode({"n": PAGE} | ({"last": last} if last else {}))
        path = f"/v2/{repository}/tags/list?{query}"
        content = await client.get_document(path, accept=_JSON, limit=_BYTES_MAX)
        tags = _parsed(path, content.content).get("tags") or []
        if type(tags) is not list or any(type(tag) is not str for tag in tags):
            raise UnexpectedAnswer(path, "is no list of tags")
        # A server that sends a page again would be asked for ever.
        more = "Link" in content.headers and bool(tags) and tags[-1] > last
        last = tags[-1] if tags else last
        yield tags


async def _get(client: RegistryClient, path: str) -> dict[str, Any]:
    document = await client.get_document(path, accept=_JSON, limit=_BYTES_MAX)
    return _parsed(path, document.content)


def _parsed(path: str, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise UnexpectedAnswer(path, f"is not JSON: {error}") from error
    if type(document) is not dict:
        raise UnexpectedAnswer(path, "is not a JSON object")
    return document
