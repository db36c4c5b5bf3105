"""Blob backends: where content lives when every disk of the cluster is lost."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final, cast
from urllib.parse import unquote, urlsplit

from swarmpull.errors import StartupError
from swarmpull.store.backends.base import (
    Backend,
    ObjectPage,
    ObjectStat,
    blob_key,
    check_key,
)
from swarmpull.store.backends.directory import DirectoryBackend, open_directory
from swarmpull.store.backends.s3 import S3Backend, open_s3

__all__ = [
    "ENTRY_POINT_GROUP",
    "Backend",
    "DirectoryBackend",
    "ObjectPage",
    "ObjectStat",
    "S3Backend",
    "blob_key",
    "check_key",
    "open_backend",
]

# The name of an entry point is a URL scheme; it loads ``async def open(url: str) -> Backend``.
ENTRY_POINT_GROUP: Final = "swarmpull.backends"
# The options of a directory's URL: whether a backend is begun where there is none.
CREATING: Final = {"": True, "create=true": True, "create=false": False}


async def open_backend(url: str) -> Backend:
    """Open the backend of a URL.

    That is ``file:///absolute/directory``, with ``?create=false`` when it must be there,
    ``s3://bucket/prefix?endpoint=host:port``, or a scheme of an installed package.

    Raises:
        StartupError: no such scheme, or the backend cannot be used; says what is allowed.
    """
    scheme = urlsplit(url).scheme
    if scheme == "file":
        return await open_directory(_directory_of(url), create=_may_create(url))
    if scheme == "s3":
        return await open_s3(url)
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if scheme not in installed:
        # Not the URL itself: it may hold a secret.
        allowed = ", ".join(sorted({"file", "s3", *installed}))
        raise StartupError(f"no backend for URLs of scheme {scheme!r}", f"installed are: {allowed}")
    return await _open_installed(installed[scheme], url)


async def _open_installed(point: EntryPoint, url: str) -> Backend:
    return cast("Backend", await point.load()(url))


def _directory_of(url: str) -> Path:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc or parts.fragment or not path.is_absolute():
        raise StartupError(f"backend url {url} is not a directory", "write file:///absolute/path")
    return path


def _may_create(url: str) -> bool:
    query = urlsplit(url).query
    if query not in CREATING:
        remedy = "write file:///absolute/path, with ?create=false or without"
        raise StartupError(f"backend url {url} has an unknown option: {query}", remedy)
    return CREATING[query]
