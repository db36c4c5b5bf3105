"""Blob backends: where content lives when every disk of the cluster is lost."""

from __future__ import annotations

from typing import cast
from urllib.parse import urlsplit

from swarmpull.store.backend_urls import (
    ENTRY_POINT_GROUP,
    directory_of,
    entry_point_of,
    may_create,
)
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


async def open_backend(url: str) -> Backend:
    """Open the backend of a URL.

    That is ``file:///absolute/directory``, with ``?create=false`` when it must be there,
    ``s3://bucket/prefix?endpoint=host:port``, or a scheme of an installed package.

    Raises:
        StartupError: no such scheme, or the backend cannot be used; says what is allowed.
    """
    scheme = urlsplit(url).scheme
    if scheme == "file":
        return await open_directory(directory_of(url), create=may_create(url))
    if scheme == "s3":
        return await open_s3(url)
    return cast("Backend", await entry_point_of(scheme).load()(url))
