"""The store of a role as its configuration says."""

from __future__ import annotations

import math
import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from swarmpull.config import StoreConfig
from swarmpull.store.blobs import BlobStore, open_store
from swarmpull.store.eviction import Limits
from swarmpull.telemetry import Metrics


def open_role_store(
    role: str, root: Path, config: StoreConfig, metrics: Metrics
) -> AbstractAsyncContextManager[BlobStore]:
    """Open the store of a role.  Raises what `swarmpull.store.blobs.open_store` does."""
    return open_store(root, name=role, limits=limits_of(role, root, config), metrics=metrics)


def limits_of(role: str, root: Path, config: StoreConfig) -> Limits:
    """The limits of a store under ``root``, which need not exist yet.

    A percentage is of the whole file system and counts the store's own files only: what others write there
    neither costs nor gains the store anything until the disk is full.
    """
    high, low = config.watermarks(_file_system_bytes(root))
    return Limits(
        ttl=config.ttl,
        idle_timeout=config.idle_timeout,
        partial_ttl=config.partial_ttl,
        high=high,
        low=low,
        key=f"{role}.store.max_bytes",
    )


def _file_system_bytes(path: Path) -> float:
    """The size of the file system that a path is, or will be, on; infinite if nobody can say."""
    for existing in (path, *path.absolute().parents):
        try:
            status = os.statvfs(existing)
        except FileNotFoundError:
            continue
        except OSError:
            # Opening the store will say what is wrong.
            break
        return float(status.f_blocks * status.f_frsize) or math.inf
    return math.inf
