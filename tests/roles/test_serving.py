"""How a role begins and how it drains."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import pytest
import structlog
import trio
import trio.testing

from swarmpull.config import Address, ListenerConfig, TrackerConfig
from swarmpull.errors import StartupError
from swarmpull.roles.serving import serve_role
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import ANNOUNCE, AnnounceReply, AnnounceRequest
from swarmpull.wire.rpc import RpcContext, RpcService, open_rpc_pool

from .test_blob_finder import REQUEST

LISTEN = ListenerConfig(listen=Address("127.0.0.1", 0))


def role(
    drain: trio.Event,
    *,
    service: RpcService | None = None,
    grace: float = 2.0,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    settings: TrackerConfig | None = None,
):
    return partial(
        serve_role,
        "tracker",
        settings or TrackerConfig(rpc=LISTEN, admin=LISTEN),
        service or RpcService(),
        metrics=Metrics(),
        readiness=lambda: ["something is missing"],
        status=lambda: {"answer": 42},
        drain=drain,
        grace=grace,
        on_drain=on_drain,
    )


async def test_the_status_has_role_and_readiness_added() -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, httpx.AsyncClient() as client:
            addresses = await nursery.start(role(trio.Event()))
            reply = await client.get(f"http://{addresses.listeners['admin']}/status")

            assert reply.json() == {
                "role": "tracker",
                "ready": False,
                "reasons": ["something is missing"],
                "answer": 42,
            }
            nursery.cancel_scope.cancel()


async def test_requests_under_way_end_before_the_rest_is_drained() -> None:
    order: list[str] = []
    asked, answer = trio.Event(), trio.Event()

    async def announce(request: AnnounceRequest, _: RpcContext) -> AnnounceReply:
        asked.set()
        await answer.wait()
        order.append("request")
        return AnnounceReply((), 1.0)

    async def on_drain() -> None:
        await trio.lowlevel.checkpoint()
        order.append("drained")

    service = RpcService()
    service.register(ANNOUNCE, announce)
    drain = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, open_rpc_pool() as pool:
            addresses = await nursery.start(role(drain, service=service, on_drain=on_drain))

            async def call() -> None:
                await pool.call(addresses.listeners["rpc"], ANNOUNCE, REQUEST, timeout=10.0)

            async with trio.open_nursery() as calling:
                calling.start_soon(call)
                await asked.wait()
                drain.set()
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert order == []
                answer.set()

    assert order == ["request", "drained"]


async def test_the_admin_listener_shows_the_drain_to_its_end() -> None:
    draining, goodbyes = trio.Event(), trio.Event()

    async def say_goodbye() -> None:
        draining.set()
        await goodbyes.wait()

    drain = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, httpx.AsyncClient() as client:
            addresses = await nursery.start(role(drain, grace=15.0, on_drain=say_goodbye))
            drain.set()
            await draining.wait()
            reply = await client.get(f"http://{addresses.listeners['admin']}/readiness")
            assert reply.status_code == 503
            assert "the role is draining" in reply.text
            # What the others call is closed by then.
            host, _, port = addresses.listeners["rpc"].rpartition(":")
            with pytest.raises(OSError, match=r"refused|connect"):
                await trio.open_tcp_stream(host, int(port))
            goodbyes.set()
    # It ended: the nursery did.
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://{addresses.listeners['admin']}/health")


async def test_a_drain_that_hangs_ends_with_the_grace_and_says_so() -> None:
    drain = trio.Event()
    with structlog.testing.capture_logs() as logs, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(role(drain, grace=0.3, on_drain=trio.sleep_forever))
            drain.set()
            started = trio.current_time()

    assert 0.25 < trio.current_time() - started < 5
    assert [entry["event"] for entry in logs] == ["drain_cut_short"]


async def test_a_port_in_use_is_a_startup_error() -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(role(trio.Event()))
            taken = ListenerConfig(listen=Address.parse(addresses.listeners["rpc"]))
            settings = TrackerConfig(rpc=taken, admin=LISTEN)

            with pytest.raises((StartupError, ExceptionGroup)) as caught:
                await nursery.start(role(trio.Event(), settings=settings))

            assert caught.group_contains(StartupError) or caught.type is StartupError
            nursery.cancel_scope.cancel()
