"""The HTTP API of an index: preheating, and the webhooks of registries that cause it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, cast

import attrs
import structlog
from quart import Response, jsonify, request
from quart_trio import QuartTrio

from swarmpull.errors import SwarmpullError
from swarmpull.registry.browsers import Asked, refuse_page, refuse_type
from swarmpull.registry.errors import Code, RegistryError, shorten, translate
from swarmpull.registry.notifications import Notifications, parse_notifications

log = structlog.get_logger()

# A thousand events, of a kilobyte each, or a list of ten thousand agents.
BODY_BYTES_MAX: Final = 2 << 20
NOTIFICATIONS: Final = "/registry/notifications"
BODY_TYPES: Final = frozenset({"application/json"})
# What a Docker registry sends is of the latter; Harbor's driver for Kraken says the former.
NOTIFICATION_TYPES: Final = BODY_TYPES | {"application/vnd.docker.distribution.events.v1+json"}
_PATHS: Final = (
    "there are GET and POST /preheat, GET and DELETE /preheat/ID, "
    f"POST {NOTIFICATIONS} and GET /health"
)


@attrs.frozen
class Wish:
    """What somebody wants to have preheated.

    Attributes:
        image: its name, with a tag or a digest.
        agents: which agents, as `swarmpull.roles.preheat_share` reads it; empty for the origins.
        platform: os/architecture; empty for all of an image that has several.
        seed: of the choice; None for any.
    """

    image: str
    agents: str = ""
    platform: str = ""
    seed: int | None = None


class Preheater(Protocol):
    """What is behind the API."""

    async def start(self, wish: Wish) -> Mapping[str, object]:
        """Begin a job, or find the one under way for the same image and target; returns what it is.

        Raises SwarmpullError.
        """
        ...

    def jobs(self) -> Sequence[Mapping[str, object]]:
        """The jobs that are kept, the newest first."""
        ...

    def job(self, number: str, *, hosts: bool) -> Mapping[str, object] | None:
        """One job, with how far each of its hosts is if ``hosts``; None when it is not known here."""
        ...

    def cancel(self, number: str) -> Mapping[str, object] | None:
        """End a job; None when it is not known here."""
        ...

    def notified(self, notifications: Notifications) -> bool:
        """Take in what was pushed somewhere; False when there is no room for it just now."""
        ...


def create_preheat_app(preheater: Preheater) -> QuartTrio:
    """The API over what preheats."""
    app = QuartTrio(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    app.before_request(_refuse_pages)
    _add_jobs(app, preheater)

    @app.get("/health")
    async def health() -> Response:
        return jsonify({"status": "ok"})

    @app.post(NOTIFICATIONS)
    async def notifications() -> tuple[Response, int]:
        body = cast("bytes", await request.get_data(as_text=False))
        try:
            found = parse_notifications(body)
        except ValueError as error:
            log.warning(
                "notification_refused",
                remote=request.remote_addr,
                reason=str(error),
                body=shorten(body[:200].decode("utf-8", "replace")),
            )
            return _error(RegistryError(Code.UNSUPPORTED, 400, f"this is no notification: {error}"))
        if not preheater.notified(found):
            # Who sends them tries again.
            return _error(
                RegistryError(Code.TOOMANYREQUESTS, 429, "too much waits to be preheated")
            )
        return jsonify({"pushed": len(found.pushed), "ignored": found.ignored}), 200

    @app.errorhandler(413)
    async def too_large(_: Exception) -> tuple[Response, int]:
        return _error(RegistryError(Code.SIZE_INVALID, 413, f"{BODY_BYTES_MAX} bytes are allowed"))

    @app.errorhandler(404)
    async def unknown_path(_: Exception) -> tuple[Response, int]:
        message = f"there is no {shorten(request.path)!r}: {_PATHS}"
        return _error(RegistryError(Code.UNSUPPORTED, 404, message))

    @app.errorhandler(405)
    async def unknown_method(_: Exception) -> tuple[Response, int]:
        message = f"{shorten(request.path)!r} takes no {request.method}: {_PATHS}"
        return _error(RegistryError(Code.UNSUPPORTED, 405, message))

    @app.errorhandler(SwarmpullError)
    async def failed(error: SwarmpullError) -> tuple[Response, int]:
        return _error(translate(error))

    return app


async def _refuse_pages() -> tuple[Response, int] | None:
    """Answer requests that a page in a browser sends; None lets others go on."""
    asked = Asked.of(request.method, request.headers.get, request.scope.get("server"))
    types = NOTIFICATION_TYPES if request.path == NOTIFICATIONS else BODY_TYPES
    refusal = None
    # Whether the role is up is no secret, and is asked under any name.
    if request.path != "/health" and (reason := refuse_page(asked)):
        refusal = RegistryError(Code.DENIED, 403, reason)
    elif request.method == "POST" and (reason := refuse_type(asked, types)):
        refusal = RegistryError(Code.UNSUPPORTED, 415, reason)
    if refusal is None:
        return None
    log.warning("api_request_refused", remote=request.remote_addr, reason=refusal.message)
    return _error(refusal)


def _add_jobs(app: QuartTrio, preheater: Preheater) -> None:
    @app.post("/preheat")
    async def start() -> tuple[Response, int]:
        wish = _wish(cast("bytes", await request.get_data(as_text=False)))
        return jsonify(await preheater.start(wish)), 202

    @app.get("/preheat")
    async def jobs() -> Response:
        return jsonify({"jobs": list(preheater.jobs())})

    @app.get("/preheat/<number>")
    async def job(number: str) -> Response:
        hosts = request.args.get("hosts", "") not in ("", "0", "false")
        return jsonify(_known(preheater.job(number, hosts=hosts), number))

    @app.delete("/preheat/<number>")
    async def cancel(number: str) -> Response:
        return jsonify(_known(preheater.cancel(number), number))


def _known(job: Mapping[str, object] | None, number: str) -> Mapping[str, object]:
    if job is None:
        raise RegistryError(
            Code.UNSUPPORTED,
            404,
            f"this index has no job {shorten(number)!r}: jobs are known to the index that began them, and "
            "not after its restart",
        )
    return job


_FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "image": (str,),
    "agents": (str, int, list),
    "origins": (bool,),
    "platform": (str,),
    "seed": (int,),
}


def _wish(body: bytes) -> Wish:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _invalid("the body is no JSON object")
    for key, value in document.items():
        # A boolean is an int to Python.
        if key not in _FIELDS or type(value) not in _FIELDS[key]:
            raise _invalid(
                f"{shorten(key)} must not be {shorten(json.dumps(value))}: the fields are image, "
                "agents (text, number or list) or origins (true), platform, seed"
            )
    if not document.get("image"):
        raise _invalid("image is needed")
    agents: Any = document.get("agents", "")
    if bool(agents) == bool(document.get("origins")):
        raise _invalid("either agents or origins is needed")
    if isinstance(agents, list):
        if not all(type(name) is str and "," not in name for name in agents):
            raise _invalid("agents has to be a list of names")
        agents = ",".join(agents)
    return Wish(
        document["image"], str(agents or ""), document.get("platform", ""), document.get("seed")
    )


def _invalid(reason: str) -> RegistryError:
    return RegistryError(Code.UNSUPPORTED, 400, reason)


def _error(error: RegistryError) -> tuple[Response, int]:
    return Response(error.body(), content_type="application/json"), error.status
