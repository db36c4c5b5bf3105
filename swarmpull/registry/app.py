"""The registry API as an ASGI application: routing, limits and error answers."""

from __future__ import annotations

from typing import Final

import attrs
import structlog

from swarmpull.errors import PushRefused, SwarmpullError
from swarmpull.registry import downloads, images, uploads
from swarmpull.registry.asgi import (
    AsgiApp,
    ClientGone,
    Headers,
    Message,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    answer_lifespan,
    send_response,
)
from swarmpull.registry.body_memory import BodyMemory
from swarmpull.registry.calls import Call, Handler
from swarmpull.registry.errors import Code, RegistryError, translate
from swarmpull.registry.names import check_upstream
from swarmpull.registry.routes import Endpoint, find_route
from swarmpull.registry.service import RegistryService

_API_VERSION: Final = (b"docker-distribution-api-version", b"registry/2.0")

_UPLOADS: Final = (Endpoint.UPLOADS, Endpoint.UPLOAD)
_READING: Final = ("GET", "HEAD")
_WRITING: Final = ("PUT", "DELETE")

log = structlog.get_logger()


@attrs.frozen(kw_only=True)
class RegistryLimits:
    """Bounds of one registry listener.

    Attributes:
        requests: under way at once; further ones get 429 and are to be repeated.
        bodies_bytes: of response bodies in memory; see `swarmpull.registry.body_memory`.
    """

    requests: int = 1024
    bodies_bytes: int = 32 << 20


# HEAD stands beside GET wherever the answer has a body that the server leaves out.
_HANDLERS: Final[dict[tuple[Endpoint, str], Handler]] = {
    (Endpoint.BASE, "GET"): images.answer_base,
    (Endpoint.BASE, "HEAD"): images.answer_base,
    (Endpoint.CATALOG, "GET"): images.list_repositories,
    (Endpoint.CATALOG, "HEAD"): images.list_repositories,
    (Endpoint.TAGS, "GET"): images.list_tags,
    (Endpoint.TAGS, "HEAD"): images.list_tags,
    (Endpoint.TAG_LOG, "GET"): images.tag_log,
    (Endpoint.TAG_LOG, "HEAD"): images.tag_log,
    (Endpoint.REFERRERS, "GET"): images.list_referrers,
    (Endpoint.REFERRERS, "HEAD"): images.list_referrers,
    (Endpoint.MANIFEST, "GET"): images.get_manifest,
    (Endpoint.MANIFEST, "HEAD"): images.head_manifest,
    (Endpoint.MANIFEST, "PUT"): images.put_manifest,
    (Endpoint.MANIFEST, "DELETE"): images.delete_manifest,
    (Endpoint.BLOB, "GET"): downloads.get_blob,
    (Endpoint.BLOB, "HEAD"): downloads.head_blob,
    (Endpoint.BLOB, "DELETE"): downloads.delete_blob,
    (Endpoint.GENERIC_BLOB, "GET"): downloads.get_blob,
    (Endpoint.GENERIC_BLOB, "HEAD"): downloads.head_blob,
    (Endpoint.GENERIC_BLOB, "PUT"): uploads.put_generic_blob,
    (Endpoint.UPLOADS, "POST"): uploads.start_upload,
    (Endpoint.UPLOAD, "GET"): uploads.upload_status,
    (Endpoint.UPLOAD, "PATCH"): uploads.append_chunk,
    (Endpoint.UPLOAD, "PUT"): uploads.finish_upload,
    (Endpoint.UPLOAD, "DELETE"): uploads.cancel_upload,
}


def create_registry_app(
    service: RegistryService,
    *,
    limits: RegistryLimits | None = None,
    stands_for: str | None = None,
) -> AsgiApp:
    """The OCI distribution API (v1.1) and generic blobs over a role.

    Args:
        service: the role behind.
        limits: bounds of this listener.
        stands_for: the registry that clients mean who name none; nothing can be pushed there.
    """
    return _RegistryApp(service, limits or RegistryLimits(), stands_for)


class _RegistryApp:
    def __init__(
        self, service: RegistryService, limits: RegistryLimits, stands_for: str | None
    ) -> None:
        self._service = service
        self._limits = limits
        self._stands_for = stands_for
        self._memory = BodyMemory(limits.bodies_bytes)
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
        elif scope["type"] == "http":
            await self._answer(Request(scope, receive), scope, _Reply(send))
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, request: Request, scope: Scope, reply: _Reply) -> None:
        self._active += 1
        try:
            response = await self._dispatch(request, scope, reply)
        except ClientGone:
            return
        except SwarmpullError as error:
            response = _error_response(scope, translate(error))
        except Exception:
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            fault = RegistryError(
                Code.UNKNOWN, 500, "internal error: the log of this role says more"
            )
            response = _error_response(scope, fault)
        finally:
            self._active -= 1
        # With its head out, a response that failed can only be cut short.
        if response is not None and not reply.started:
            await send_response(request, reply, response)

    async def _dispatch(self, request: Request, scope: Scope, reply: _Reply) -> Response | None:
        if self._active > self._limits.requests:
            raise RegistryError(
                Code.TOOMANYREQUESTS,
                429,
                f"{self._limits.requests} requests are under way: retry in a moment",
                headers=(("Retry-After", "1"),),
            )
        route = find_route(request.method, scope["raw_path"])
        upstream = check_upstream(request.query("ns"))
        if upstream is not None:
            reply.add_header(b"oci-namespace", upstream.encode())
        named = route.upstream or upstream or self._stands_for
        call = Call(self._service, request, reply, route, named, self._memory)
        if self._stands_for and request.method not in _READING:
            raise PushRefused(
                f"this listener stands for {self._stands_for}: nothing is pushed here"
            )
        if route.endpoint in _UPLOADS or request.method in _WRITING:
            call.check_takes_pushes()
        return await _HANDLERS[route.endpoint, request.method](call)


class _Reply:
    """Sends a response, with the headers that all responses have; knows whether its head is out."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._headers = [_API_VERSION]

    def add_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message["headers"] = [*message["headers"], *self._headers]
        await self._send(message)


def _error_response(scope: Scope, error: RegistryError) -> Response:
    if error.status >= 500:
        log.warning(
            "request_refused", method=scope["method"], path=scope["path"], reason=str(error)
        )
    headers: Headers = (("Content-Type", "application/json"), *error.headers)
    return Response(error.status, headers, error.body())
