"""A registry on a real socket, over a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.registry.app import RegistryLimits, create_registry_app
from swarmpull.registry.manifests import parse_manifest
from swarmpull.registry.server import serve_http
from swarmpull.registry.service import Terms
from swarmpull.store.blobs import BlobStore, open_store

from .images import Image
from .raw import Connection, Headers, Reply, connect
from .service import IndexedService


@attrs.frozen
class Registry:
    """A running registry, and a way to talk to it."""

    service: IndexedService
    host: str
    port: int

    def connect(self) -> AbstractAsyncContextManager[Connection]:
        return connect(self.host, self.port)

    async def request(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | None = None,
        **options: Any,
    ) -> Reply:
        """One request on a connection of its own."""
        async with self.connect() as connection:
            return await connection.request(method, target, headers, body, **options)

    async def add_blob(self, repository: str | None, content: bytes) -> Digest:
        """Put a blob behind the registry without asking it."""
        digest = Digest.of(content)
        async with self.service.store.create() as writer:
            await writer.write(content)
            await writer.commit(digest)
        await self.service.accept_blob(repository, digest)
        self.service.asked.clear()
        return digest

    async def add_image(self, repository: str, image: Image, *references: str) -> None:
        for blob in image.blobs:
            await self.add_blob(repository, blob)
        manifest = parse_manifest(image.manifest, image.media_type)
        for reference in (*references, str(image.digest)):
            await self.service.put_manifest(repository, reference, manifest, Terms())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[BlobStore]:
    async with open_store(tmp_path / "store", name="test") as store:
        yield store


@asynccontextmanager
async def serve_registry(
    service: IndexedService, limits: RegistryLimits | None = None
) -> AsyncIterator[Registry]:
    drain = trio.Event()
    app = create_registry_app(service, limits=limits)
    async with trio.open_nursery() as nursery:
        serve = partial(serve_http, app, "127.0.0.1", 0, drain=drain, grace=1.0)
        host, port = await nursery.start(serve)
        yield Registry(service, host, port)
        drain.set()


@pytest.fixture
async def registry(store: BlobStore) -> AsyncIterator[Registry]:
    async with serve_registry(IndexedService(store)) as registry:
        yield registry


@pytest.fixture
async def read_only(registry: Registry) -> Registry:
    """The same registry, as an agent that takes no pushes."""
    registry.service.takes_pushes = False
    return registry
