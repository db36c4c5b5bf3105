"""How connections by TLS end: nothing stays open, and nobody holds up the others by it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from swarmpull.wire.ends import SecuredEnd
from swarmpull.wire.tls import Entrance, Tls, TlsStream

from .hosts import Authority, tls_of

DEADLINE = 60.0


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("prod"), "prod")


@pytest.fixture(scope="module")
def tls(prod: Authority) -> Tls:
    return tls_of(prod.issue("host", "agent", "tracker"))


@asynccontextmanager
async def plain_pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Who dialled, and who was dialled."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(DEADLINE):
        async with (
            listener,
            await trio.open_tcp_stream(*listener.socket.getsockname()) as dialled,
            await listener.accept() as accepted,
        ):
            yield dialled, accepted


@asynccontextmanager
async def pair(tls: Tls) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    ends: dict[str, TlsStream] = {}

    async def greet(name: str, make: Callable[..., Awaitable[tuple]], plain: object) -> None:
        ends[name] = (await make(plain))[0]

    async with plain_pair() as (dialled, accepted):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet, "here", tls.connect, dialled)
            nursery.start_soon(greet, "there", tls.accept, accepted)
        async with ends["here"], ends["there"]:
            yield ends["here"], ends["there"]


async def test_who_floods_a_connection_that_ends_leaves_turns_to_others(
    tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the kernel takes at once is some 100 KiB.
    monkeypatch.setattr("swarmpull.wire.tls._RECEIVE_BYTES", 1024)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with pair(tls) as (here, there), trio.open_nursery() as nursery:
        with suppress(BlockingIOError):
            while True:
                socket.socket.send(here.socket, bytes(1 << 20))
        socket.socket.shutdown(here.socket, socket.SHUT_WR)
        nursery.start_soon(count_turns)
        await there.linger()
        nursery.cancel_scope.cancel()

    assert turns > 30


async def test_who_never_pauses_is_read_to_the_end_of_a_record_and_no_further(tls: Tls) -> None:
    async with pair(tls) as (here, there):
        for _ in range(10):
            await here.send_all(bytes(10_000))
        end, size, total = SecuredEnd(there), 8192, 0
        await trio.lowlevel.wait_readable(there.socket)
        while size:
            total += len(end.receive(size) or b"")
            size = end.held

    assert total == 10_000


async def test_a_connection_whose_last_words_are_cut_short_is_closed(tls: Tls) -> None:
    async with pair(tls) as (_, there):
        await cut_short(there.linger)
        assert there.socket.fileno() == -1


async def cut_short(end: Callable[[], Awaitable[object]]) -> None:
    """Cancel ``end`` when it waits for the other side."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()


async def visit(tls: Tls, stream: trio.SocketStream) -> None:
    secured, _ = await tls.connect(stream)
    async with secured:
        await trio.sleep_forever()


@pytest.mark.parametrize("why", ["no room", "refused", "no certificate"])
async def test_who_is_turned_away_while_the_role_ends_leaves_nothing_open(
    tls: Tls, prod: Authority, why: str
) -> None:
    async def tell(stream: trio.abc.SendStream, reason: str) -> None:
        await stream.send_all(reason.encode())

    entrance = Entrance(tls, tell, lambda _: "refused" if why == "refused" else "")
    context = ssl.create_default_context(cafile=str(prod.directory / "ca.crt"))
    context.check_hostname = False
    async with plain_pair() as (dialled, accepted), trio.open_nursery() as nursery:
        if why == "no certificate":
            nursery.start_soon(trio.SSLStream(dialled, context).do_handshake)
        else:
            nursery.start_soon(visit, tls, dialled)
        # Sockets that nobody closes are a warning, and that an error of the test.
        if why == "no room":
            await cut_short(lambda: entrance.dismiss(accepted, b"busy"))
        else:
            await cut_short(lambda: entrance.admit(accepted))
        nursery.cancel_scope.cancel()
