"""The admin listener of a role: health, readiness, metrics, status, and what there is to be changed."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import structlog
from quart import Response, jsonify, request
from quart_trio import QuartTrio

from swarmpull.registry.browsers import Asked, refuse_page

log = structlog.get_logger()

# Reasons why the role cannot do its work just now; empty when it can.
Readiness = Callable[[], Sequence[str]]
# The largest request names a remote, a repository and a tag.
BODY_BYTES_MAX: Final = 4096


class RateControl(Protocol):
    """The rates of a role, to be shown and changed."""

    def document(self) -> Mapping[str, float | None]:
        """Bytes per second by name, None for no limit."""
        ...

    def change(self, document: object) -> None:
        """Take over a decoded JSON document of the same form.  Raises ValueError; then nothing changed."""
        ...


class QueueControl(Protocol):
    """What an index is yet to bring to other clusters, or to its backend, to be shown and changed."""

    def document(self) -> Mapping[str, object]:
        """Plain values; must not block."""
        ...

    def change(self, document: object) -> Awaitable[Mapping[str, object]]:
        """Do what a decoded JSON document asks for, and say what was done.  Raises ValueError."""
        ...


def create_admin_app(
    *,
    readiness: Readiness,
    metrics: Callable[[], tuple[bytes, str]],
    status: Callable[[], Mapping[str, object]],
    rates: RateControl | None = None,
    queues: Mapping[str, QueueControl] = MappingProxyType({}),
) -> QuartTrio:
    """The admin pages of one role, for `swarmpull.registry.server.serve_http`.

    Pages in browsers are kept out, as `swarmpull.registry.browsers` says.

    - ``/health``: 200 as long as the process answers.
    - ``/readiness``: 200, or 503 with the reasons.
    - ``/metrics``: Prometheus text.
    - ``/status``: what ``swarmpull status`` shows.
    - ``/rates``: what ``swarmpull rates`` shows, and with PUT changes; only if the role has rates.
    - ``/replication``: what ``swarmpull replication status`` shows, and with PUT what ``retry`` and ``sync``
      ask for; only if the role replicates.
    - ``/journal``: what ``swarmpull journal status`` shows, and with PUT what ``retry`` and ``drop`` ask for;
      only of an index.

    Args:
        readiness: the reasons why the role is not ready; must not block.
        metrics: body and content type of the metrics (``Metrics.render``).
        status: a document of plain values; must not block.
        rates: of a role that has any.
        queues: of an index, by the names of their pages.
    """
    app = QuartTrio(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    app.before_request(_refuse_pages)
    if rates is not None:
        _add_rates(app, rates)
    for name, queue in queues.items():
        _add_queue(app, name, queue)

    @app.get("/health")
    async def health() -> Response:
        return jsonify({"status": "ok"})

    @app.get("/readiness")
    async def ready() -> tuple[Response, int]:
        reasons = list(readiness())
        document = {"ready": not reasons, "reasons": reasons}
        return jsonify(document), 503 if reasons else 200

    @app.get("/metrics")
    async def show_metrics() -> Response:
        body, content_type = metrics()
        return Response(body, content_type=content_type)

    @app.get("/status")
    async def show_status() -> Response:
        return jsonify(status())

    return app


async def _refuse_pages() -> tuple[Response, int] | None:
    """Answer requests that a page in a browser sends; None lets others go on."""
    asked = Asked.of(request.method, request.headers.get, request.scope.get("server"))
    # Whether the role is up is no secret, and is asked under any name.
    if request.path == "/health" or not (reason := refuse_page(asked)):
        return None
    log.warning("admin_request_refused", remote=request.remote_addr, reason=reason)
    return jsonify({"errors": [{"message": reason}]}), 403


def _add_rates(app: QuartTrio, rates: RateControl) -> None:
    @app.get("/rates")
    async def show_rates() -> Response:
        return jsonify(rates.document())

    @app.put("/rates")
    async def change_rates() -> tuple[Response, int]:
        body = await request.get_data()
        try:
            rates.change(_decoded(body))
        except ValueError as error:
            return jsonify({"errors": [{"message": str(error)}]}), 400
        return jsonify(rates.document()), 200


def _add_queue(app: QuartTrio, name: str, queue: QueueControl) -> None:
    @app.get(f"/{name}", endpoint=f"show_{name}")
    async def show() -> Response:
        return jsonify(queue.document())

    @app.put(f"/{name}", endpoint=f"change_{name}")
    async def change() -> tuple[Response, int]:
        body = await request.get_data()
        try:
            done = await queue.change(_decoded(body))
        except ValueError as error:
            return jsonify({"errors": [{"message": str(error)}]}), 400
        return jsonify(done), 200


def _decoded(body: str | bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the body is not JSON") from error
