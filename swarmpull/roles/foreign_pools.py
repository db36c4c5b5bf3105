"""Connections to the roles of other clusters: a pool for each of them, which takes nobody else there."""

from __future__ import annotations

import trio

from swarmpull.wire.rpc import RpcLimits, RpcPool
from swarmpull.wire.tls import Tls


class ForeignPools:
    """Pools by the name of the cluster; they live as long as ``nursery``."""

    def __init__(self, nursery: trio.Nursery, tls: Tls | None) -> None:
        self._nursery = nursery
        self._tls = tls
        self._pools: dict[str, RpcPool] = {}

    def of(self, cluster: str) -> RpcPool:
        """The pool for the roles of a cluster."""
        if cluster not in self._pools:
            tls = None if self._tls is None else self._tls.towards(cluster)
            self._pools[cluster] = RpcPool(self._nursery, RpcLimits(), tls)
        return self._pools[cluster]
