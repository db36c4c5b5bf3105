"""Remote calls between roles: one multiplexed TCP connection for each pair of processes.

This module is what callers use; the parts are ``rpc_messages`` (the frames, pure), ``rpc_link`` (reading and
writing them), ``rpc_server`` and ``rpc_client``.  ``docs/protocol.md`` describes the protocol.

    service = RpcService()
    service.register(api.RESOLVE, resolve)              # async def resolve(request, context) -> Descriptor
    host, port = await nursery.start(serve_rpc, service, "0.0.0.0", 7400)

    async with open_rpc_pool() as pool:
        found = await pool.call("index1:7400", api.RESOLVE, api.ReferenceRequest(...), timeout=5.0)
"""

from __future__ import annotations

from swarmpull.wire.rpc_client import RpcPool, open_rpc_pool
from swarmpull.wire.rpc_link import RpcLimits
from swarmpull.wire.rpc_messages import Method
from swarmpull.wire.rpc_server import serve_rpc
from swarmpull.wire.rpc_service import RpcContext, RpcService

__all__ = [
    "Method",
    "RpcContext",
    "RpcLimits",
    "RpcPool",
    "RpcService",
    "open_rpc_pool",
    "serve_rpc",
]
