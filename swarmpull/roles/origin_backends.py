"""The backends of an origin as its configuration says, open for as long as it serves."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

import attrs

from swarmpull.config import OriginConfig, UpstreamConfig
from swarmpull.registry.names import registry_component
from swarmpull.registry.upstream import Upstream, open_upstream
from swarmpull.registry.upstream_credentials import Credentials
from swarmpull.store.backends import open_backend
from swarmpull.store.backends.base import Backend
from swarmpull.store.backends.namespaces import Namespace, Namespaces
from swarmpull.store.backends.paced import PacedBackend
from swarmpull.store.token_bucket import TokenBucket


@attrs.frozen
class OriginBackends:
    """Where an origin gets blobs from.

    Attributes:
        namespaces: by repository.
        upstreams: the upstream registries, for their manifests, each with its freshness in seconds, by
            the first component of its repositories.
    """

    namespaces: Namespaces
    upstreams: Mapping[str, tuple[Upstream, float]]


@asynccontextmanager
async def open_backends(
    settings: OriginConfig, upstreams: Sequence[UpstreamConfig]
) -> AsyncIterator[OriginBackends]:
    """Open every backend.  Raises StartupError when one of them refuses."""
    async with AsyncExitStack() as stack:
        opened: dict[str, tuple[Upstream, float]] = {}
        readers: dict[str, Callable[[str], Backend]] = {}
        for config in upstreams:
            upstream = await stack.enter_async_context(_open_upstream(config))
            component = registry_component(config.name)
            opened[component] = (upstream, config.freshness)
            readers[component] = partial(_read, upstream, TokenBucket(config.rate))
        default = await _open(settings.backend.url, settings.backend.rate)
        namespaces = [
            Namespace(entry.pattern, await _open(entry.url, entry.rate))
            for entry in settings.namespaces
        ]
        yield OriginBackends(Namespaces(default, namespaces, readers), opened)


async def _open(url: str, rate: float) -> Backend:
    backend = await open_backend(url)
    return backend if rate == math.inf else PacedBackend(backend, TokenBucket(rate))


def _open_upstream(config: UpstreamConfig) -> AbstractAsyncContextManager[Upstream]:
    credentials = Credentials(
        config.name,
        config.username,
        config.password,
        config.password_file,
        config.docker_config,
    )
    return open_upstream(config.url, credentials, proxy=config.proxy)


def _read(upstream: Upstream, bucket: TokenBucket, repository: str) -> Backend:
    backend = upstream.backend(repository)
    return backend if bucket.rate == math.inf else PacedBackend(backend, bucket)
