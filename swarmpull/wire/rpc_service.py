"""What a server of RPC answers: its methods, who may call them, and requests made into reply frames."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import attrs

from swarmpull.errors import ProtocolError, PushRefused, SwarmpullError
from swarmpull.identity import Identity
from swarmpull.wire.access import ForeignRules, refuse_caller
from swarmpull.wire.codec import decode, encode, encode_error
from swarmpull.wire.rpc_link import CONNECTION_ERRORS
from swarmpull.wire.rpc_messages import Method, Rep, Req, RpcError, RpcRequest, pack, pack_reply


@attrs.frozen
class RpcContext:
    """What a handler may know of its caller; addresses without a port.

    Attributes:
        remote_host: the address that the connection came from.
        local_host: our own address, at which the caller reached us.
        caller: who it is by its certificate; None without TLS.
        is_foreign: it is of another cluster than we are.
    """

    remote_host: str
    local_host: str = ""
    caller: Identity | None = None
    is_foreign: bool = False


Handler = Callable[[Any, RpcContext], Awaitable[object]]
# Whoever will answer a request.
Begun = Callable[[], Awaitable[object]]
# Is told of a caller that may not call what it called.
Complain = Callable[[str, str], None]


@attrs.frozen
class _Served:
    """One method and who answers it."""

    method: Method[Any, Any]
    handler: Handler
    at_once: Callable[[Any, RpcContext], object] | None


class RpcService:
    """The methods that one server offers."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}

    def register(
        self,
        method: Method[Req, Rep],
        handler: Callable[[Req, RpcContext], Awaitable[Rep]],
        *,
        at_once: Callable[[Req, RpcContext], Rep | bytes | None] | None = None,
    ) -> None:
        """Serve ``method`` with ``handler``.

        Calls that need not wait for anything can be answered by ``at_once``, which costs no task: it returns
        None to leave a call to the handler, and may raise what that may.  It may also return the reply as
        `swarmpull.wire.codec.encode` would make it.

        Errors of ``errors.REMOTE_ERRORS`` that the handler raises are raised again at the caller; any
        other SwarmpullError reaches it as RpcFailed with the text.  Every other exception (an exception
        group too: a handler with a nursery must take its errors out of the group) is a bug and ends
        `serve_rpc` with it.  The handler is cancelled when the caller is cancelled, has lost its
        patience or is gone.
        """
        if method.name in self._served:
            raise ValueError(f"{method.name} has a handler already")
        self._served[method.name] = _Served(method, handler, at_once)

    def find(self, name: str) -> _Served | None:
        """The method of that name and its handler."""
        return self._served.get(name)


class Answers:
    """Requests in, reply frames out, for the connections of one server."""

    def __init__(
        self,
        service: RpcService,
        body_bytes_max: int,
        complain: Complain,
        cluster: Callable[[], str] = str,
        foreign: ForeignRules | None = None,
    ) -> None:
        """``cluster`` gives our own, by our certificate; empty without TLS.  ``foreign``: for others."""
        self._cluster = cluster
        self._foreign = foreign or ForeignRules()
        self._service = service
        self._body_bytes_max = body_bytes_max
        self._complain = complain

    def begin(self, request: RpcRequest, context: RpcContext) -> bytes | Begun:
        """The answer to a request that needs no waiting, or who will give it."""
        served = self._service.find(request.method)
        if served is None:
            return _failure(request, f"{request.method!r} is not a method of this role")
        if context.caller is not None and (
            refusal := refuse_caller(context.caller, request.method, self._cluster())
        ):
            self._complain(context.remote_host, refusal)
            return _failure(request, f"refused: {refusal}")
        try:
            body = decode(request.body, served.method.request)
        except ProtocolError as error:
            # The framing is whole, so this one call fails and the connection goes on.
            return _failure(request, error.reason)
        if refusal := self._refuse_foreign(context, body):
            return self._error(request, PushRefused(refusal))
        if served.at_once is not None:
            try:
                reply = served.at_once(body, context)
            except SwarmpullError as error:
                return self._error(request, error)
            except CONNECTION_ERRORS as error:
                # Here it would pass for the end of the connection.
                return partial(_raise, error)
            if reply is not None:
                return self._reply(request, reply)
        return partial(served.handler, body, context)

    def _refuse_foreign(self, context: RpcContext, body: object) -> str:
        if context.caller is None or not context.is_foreign:
            return ""
        refusal = self._foreign.refuse(context.caller, body)
        if refusal:
            self._complain(context.remote_host, f"refused: {refusal}")
        return refusal

    async def finish(self, request: RpcRequest, begun: Begun) -> bytes:
        """The answer to a request that had to wait."""
        try:
            return self._reply(request, await begun())
        except SwarmpullError as error:
            return self._error(request, error)

    def _reply(self, request: RpcRequest, reply: object) -> bytes:
        encoded = reply if isinstance(reply, bytes) else encode(reply)
        if len(encoded) > self._body_bytes_max:
            return _failure(
                request,
                f"the reply has {len(encoded)} bytes, the limit is {self._body_bytes_max}",
            )
        return pack_reply(request.id, encoded)

    def _error(self, request: RpcRequest, error: SwarmpullError) -> bytes:
        name, attributes = encode_error(error)
        if len(attributes) > self._body_bytes_max // 2:
            name, attributes = "", b""
        return pack(RpcError(request.id, name, str(error), attributes))


async def _raise(error: Exception) -> object:
    """The handler of a request that a bug has met already."""
    raise error


def _failure(request: RpcRequest, message: str) -> bytes:
    return pack(RpcError(request.id, "", message))
