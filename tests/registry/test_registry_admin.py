"""The admin pages of a role."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import attrs
import httpx
import pytest
import trio
from prometheus_client import CollectorRegistry, Counter, generate_latest

from swarmpull.registry.admin import create_admin_app
from swarmpull.registry.server import serve_http


@attrs.define
class FakeRates:
    """Takes any object."""

    values: dict[str, float | None] = attrs.field(factory=lambda: {"upload_rate": None})

    def document(self) -> dict[str, float | None]:
        return self.values

    def change(self, document: object) -> None:
        if not isinstance(document, dict):
            raise ValueError("must be an object")
        self.values.update(document)


@attrs.define
class Admin:
    """A running admin listener, and what its role says."""

    client: httpx.AsyncClient
    reasons: list[str]
    counter: Counter
    rates: FakeRates


@pytest.fixture
async def admin() -> AsyncIterator[Admin]:
    registry = CollectorRegistry()
    counter = Counter("swarmpull_test_total", "A test.", registry=registry)
    reasons: list[str] = []
    rates = FakeRates()
    app = create_admin_app(
        readiness=lambda: reasons,
        metrics=lambda: (generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8"),
        status=lambda: {"role": "agent", "torrents": [{"digest": "sha256:x", "have": 0.5}]},
        rates=rates,
    )
    drain = trio.Event()
    async with trio.open_nursery() as nursery:
        serve = partial(serve_http, app, "127.0.0.1", 0, drain=drain, grace=1.0)
        host, port = await nursery.start(serve)
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            yield Admin(client, reasons, counter, rates)
        drain.set()


async def test_health_is_ok_as_long_as_somebody_answers(admin: Admin) -> None:
    admin.reasons.append("starting")
    reply = await admin.client.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


async def test_readiness_gives_the_reasons_why_not(admin: Admin) -> None:
    reply = await admin.client.get("/readiness")
    assert (reply.status_code, reply.json()) == (200, {"ready": True, "reasons": []})
    admin.reasons.append("no tracker answers")
    reply = await admin.client.get("/readiness")
    assert reply.status_code == 503
    assert reply.json() == {"ready": False, "reasons": ["no tracker answers"]}


async def test_metrics_are_those_of_the_role(admin: Admin) -> None:
    admin.counter.inc(3)
    reply = await admin.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "swarmpull_test_total 3.0" in reply.text


async def test_status_is_the_document_of_the_role(admin: Admin) -> None:
    reply = await admin.client.get("/status")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["torrents"] == [{"digest": "sha256:x", "have": 0.5}]


async def test_other_pages_are_404(admin: Admin) -> None:
    assert (await admin.client.get("/v2/")).status_code == 404
    assert (await admin.client.post("/health")).status_code == 405


async def test_rates_are_shown_and_changed(admin: Admin) -> None:
    reply = await admin.client.get("/rates")
    assert (reply.status_code, reply.json()) == (200, {"upload_rate": None})
    reply = await admin.client.put("/rates", json={"upload_rate": 5})
    assert (reply.status_code, reply.json()) == (200, {"upload_rate": 5})
    assert admin.rates.values == {"upload_rate": 5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1]", "must be an object"),
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe\xfa", "the body is not JSON"),
        (b"[" * 4000, "the body is not JSON"),
    ],
)
async def test_rates_that_are_wrong_are_refused_with_a_reason(
    admin: Admin, body: bytes, message: str
) -> None:
    reply = await admin.client.put("/rates", content=body)
    assert (reply.status_code, reply.json()) == (400, {"errors": [{"message": message}]})
    assert admin.rates.values == {"upload_rate": None}


async def test_a_body_that_is_no_pair_of_rates_by_its_size_is_not_read(admin: Admin) -> None:
    reply = await admin.client.put("/rates", content=b" " * 5000 + b"{}")
    assert reply.status_code == 413


async def test_a_role_without_rates_has_no_such_page() -> None:
    app = create_admin_app(
        readiness=list, metrics=lambda: (b"", "text/plain"), status=lambda: {"role": "tracker"}
    )
    assert (await app.test_client().get("/rates")).status_code == 404


@pytest.mark.parametrize("path", ["/status", "/metrics", "/readiness", "/rates"])
async def test_a_page_whose_name_has_come_to_mean_this_host_reads_nothing(
    admin: Admin, path: str
) -> None:
    reply = await admin.client.get(path, headers={"Host": "evil.example:7500"})
    assert reply.status_code == 403
    assert "no name of an address on loopback" in reply.json()["errors"][0]["message"]
    port = admin.client.base_url.port
    assert (await admin.client.get(path, headers={"Host": f"localhost:{port}"})).status_code == 200


async def test_a_page_changes_no_rates(admin: Admin) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        reply = await admin.client.put("/rates", json={"upload_rate": 1}, headers=headers)
        assert reply.status_code == 403
    assert admin.rates.values == {"upload_rate": None}


async def test_whether_the_role_is_up_is_asked_under_any_name(admin: Admin) -> None:
    assert (await admin.client.get("/health", headers={"Host": "node-7"})).status_code == 200
