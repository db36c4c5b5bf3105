"""The admin listener of a role: health, readiness, metrics and status."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quart import Response, jsonify
from quart_trio import QuartTrio

# Reasons why the role cannot do its work just now; empty when it can.
Readiness = Callable[[], Sequence[str]]


def create_admin_app(
    *,
    readiness: Readiness,
    metrics: Callable[[], tuple[bytes, str]],
    status: Callable[[], Mapping[str, object]],
) -> QuartTrio:
    """The admin pages of one role, for `swarmpull.registry.server.serve_http`.

    - ``/health``: 200 as long as the process answers.
    - ``/readiness``: 200, or 503 with the reasons.
    - ``/metrics``: Prometheus text.
    - ``/status``: what ``swarmpull status`` shows.

    Args:
        readiness: the reasons why the role is not ready; must not block.
        metrics: body and content type of the metrics (``Metrics.render``).
        status: a document of plain values; must not block.
    """
    app = QuartTrio(__name__, static_folder=None)

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
