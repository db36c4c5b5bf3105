"""The admin listener of a role: health, readiness, metrics, status, and what there is to be changed."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

from quart import Response, jsonify, request
from quart_trio import QuartTrio

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


class ReplicationControl(Protocol):
    """What an index replicates to other clusters, to be shown and hurried."""

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
    replication: ReplicationControl | None = None,
) -> QuartTrio:
    """The admin pages of one role, for `swarmpull.registry.server.serve_http`.

    - ``/health``: 200 as long as the process answers.
    - ``/readiness``: 200, or 503 with the reasons.
    - ``/metrics``: Prometheus text.
    - ``/status``: what ``swarmpull status`` shows.
    - ``/rates``: what ``swarmpull rates`` shows, and with PUT changes; only if the role has rates.
    - ``/replication``: what ``swarmpull replication status`` shows, and with PUT what ``retry`` and ``sync``
      ask for; only if the role replicates.

    Args:
        readiness: the reasons why the role is not ready; must not block.
        metrics: body and content type of the metrics (``Metrics.render``).
        status: a document of plain values; must not block.
        rates: of a role that has any.
        replication: of an index that replicates.
    """
    app = QuartTrio(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    if rates is not None:
        _add_rates(app, rates)
    if replication is not None:
        _add_replication(app, replication)

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


def _add_replication(app: QuartTrio, replication: ReplicationControl) -> None:
    @app.get("/replication")
    async def show_replication() -> Response:
        return jsonify(replication.document())

    @app.put("/replication")
    async def change_replication() -> tuple[Response, int]:
        body = await request.get_data()
        try:
            done = await replication.change(_decoded(body))
        except ValueError as error:
            return jsonify({"errors": [{"message": str(error)}]}), 400
        return jsonify(done), 200


def _decoded(body: str | bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the body is not JSON") from error
