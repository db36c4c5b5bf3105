"""What registries send about pushes: the notifications of a Docker registry, and those of Harbor.  Pure.

Both have the same shape; Harbor's driver for Kraken writes the names of fields as Go does, ``Target`` for
``target``, so their case does not matter here.
"""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest
from swarmpull.registry.names import is_repository, is_tag

EVENTS_MAX: Final = 1000
_MANIFEST_MARKS: Final = (".manifest.", ".index.")


@attrs.frozen
class PushedManifest:
    """A manifest that was pushed somewhere.

    Attributes:
        host: of the registry, as the event has it; empty when it has none.
        repository: there.
        digest: of the manifest.
        tag: with which it was pushed; empty if with none.
    """

    host: str
    repository: str
    digest: Digest
    tag: str


@attrs.frozen
class Notifications:
    """What a body says.

    Attributes:
        pushed: the manifests.
        ignored: how many events were about something else.
    """

    pushed: tuple[PushedManifest, ...]
    ignored: int


def parse_notifications(body: bytes) -> Notifications:
    """Read a body.

    Raises:
        ValueError: it is none; says what is wrong.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    events = _field(document, "events")
    if not isinstance(events, list):
        raise ValueError("it has no list of events")
    if len(events) > EVENTS_MAX:
        raise ValueError(f"it has {len(events)} events, {EVENTS_MAX} are allowed")
    found = [_pushed(event, number) for number, event in enumerate(events)]
    pushed = tuple(each for each in found if each is not None)
    return Notifications(pushed, len(found) - len(pushed))


def _pushed(event: object, number: int) -> PushedManifest | None:
    if not isinstance(event, dict):
        raise ValueError(f"events[{number}] is not an object")
    target = _field(event, "target")
    if _field(event, "action") != "push" or not isinstance(target, dict):
        return None
    media_type = _text(target, "mediaType")
    if not any(mark in media_type for mark in _MANIFEST_MARKS):
        return None
    repository, digest = _text(target, "repository"), _text(target, "digest")
    if not is_repository(repository):
        raise ValueError(
            f"events[{number}].target.repository is no repository: {repository[:80]!r}"
        )
    try:
        parsed = Digest.parse(digest)
    except InvalidDigest as error:
        raise ValueError(f"events[{number}].target.digest: {error}") from error
    tag = _text(target, "tag")
    return PushedManifest(_host(event, target), repository, parsed, tag if is_tag(tag) else "")


def _host(event: dict[str, Any], target: dict[str, Any]) -> str:
    """The registry: from the URL of the manifest, else what the client asked for."""
    try:
        host = urlsplit(_text(target, "url")).netloc.rpartition("@")[2]
    except ValueError:
        host = ""
    request = _field(event, "request")
    return (host or (_text(request, "host") if isinstance(request, dict) else "")).lower()


def _field(document: object, name: str) -> Any:  # noqa: ANN401 - of JSON
    if not isinstance(document, dict):
        return None
    if name in document:
        return document[name]
    found = [value for key, value in document.items() if key.lower() == name.lower()]
    return found[0] if found else None


def _text(document: dict[str, Any], name: str) -> str:
    value = _field(document, name)
    return value if isinstance(value, str) else ""
