import collections
import contextlib
import gc
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from functools import partial

import attrs
import pytest
import structlog
import trio
import trio.lowlevel
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    ManifestReferencesMissing,
    ProtocolError,
    RpcFailed,
    RpcUnavailable,
    StartupError,
    StoreFull,
    UploadBusy,
)
from swarmpull.wire import api, rpc_connections
from swarmpull.wire.frames import FrameBuffer, pack_header
from swarmpull.wire.rpc import Method, RpcLimits, RpcService, open_rpc_pool, serve_rpc
from swarmpull.wire.rpc_link import FrameWriter, first_error
from swarmpull.wire.rpc_memory import RpcMemory
from swarmpull.wire.rpc_messages import (
    RpcBye,
    RpcByeReason,
    RpcCancel,
    RpcError,
    RpcHello,
    RpcReply,
    RpcRequest,
    pack,
    unpack,
)


@attrs.frozen
class Text:
    text: str


@attrs.frozen
class Data:
    data: bytes


ECHO = Method("test.echo", Text, Text)
WAIT = Method("test.wait", Text, Text)
DATA = Method("test.data", Data, Data)
FAIL = Method("test.fail", Text, Text)
KNOWN = Method("test.known", Data, Data)
DIGEST = str(Digest.of(b"x"))
ERRORS = {
    "not found": BlobNotFound(DIGEST, "the cluster"),
    "missing": ManifestReferencesMissing("team/app", (DIGEST, DIGEST)),
    "full": StoreFull("origin", 5),
    "busy": UploadBusy("17"),
    "protocol": ProtocolError("made by a handler"),
    "bug": ZeroDivisionError("a bug"),
    "network bug": ConnectionResetError("a bug that looks like the network"),
}


class Handlers:
    """The handlers of the test server, and what happened in them."""

    def __init__(self):
        self.hosts = []
        self.waiting = []
        self.cancelled = []
        self.changed = trio.Condition()
        self.release = trio.Event()
        self.peak = 0

    async def echo(self, request, context):
        self.hosts.append(context.remote_host)
        return Text(request.text)

    async def wait(self, request, context):
        self.waiting.append(request.text)
        self.peak = max(self.peak, len(self.waiting))
        await self.notify()
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.cancelled.append(request.text)
            with trio.CancelScope(shield=True):
                await self.notify()
            raise
        finally:
            self.waiting.remove(request.text)
        return Text(request.text)

    async def data(self, request, context):
        return Data(request.data[::-1])

    async def fail(self, request, context):
        raise ERRORS[request.text]

    def known_at_once(self, request, context):
        if request.data == b"full":
            raise ERRORS["full"]
        return None if request.data == b"ask" else Data(request.data * 1000)

    async def known(self, request, context):
        return Data(b"asked")

    async def notify(self):
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition):
        with trio.fail_after(30):
            async with self.changed:
                while not condition():
                    await self.changed.wait()

    def service(self):
        service = RpcService()
        service.register(ECHO, self.echo)
        service.register(WAIT, self.wait)
        service.register(DATA, self.data)
        service.register(FAIL, self.fail)
        service.register(KNOWN, self.known, at_once=self.known_at_once)
        return service


@pytest.fixture
def handlers():
    return Handlers()


@contextlib.asynccontextmanager
async def serving(handlers, *, port=0, **options):
    if "limits" in options:
        options["limits"] = RpcLimits(**options["limits"])
    async with trio.open_nursery() as nursery:
        serve = partial(serve_rpc, handlers.service(), "127.0.0.1", port, **options)
        host, bound = await nursery.start(serve)
        yield f"{host}:{bound}"
        nursery.cancel_scope.cancel()


async def call(pool, address, method=ECHO, text="hello", timeout=5.0):
    return (await pool.call(address, method, Text(text), timeout=timeout)).text


class RawClient:
    """Speaks RPC frame by frame."""

    def __init__(self, stream):
        self.stream = stream
        self.buffer = FrameBuffer(body_bytes_max=1 << 24)

    async def send(self, *messages):
        await self.stream.send_all(b"".join(map(pack, messages)))

    async def receive(self):
        with trio.fail_after(30):
            while (frame := self.buffer.take()) is None:
                data = await self.stream.receive_some()
                if not data:
                    return None
                self.buffer.feed(data)
        return unpack(frame.type, frame.body)


@contextlib.asynccontextmanager
async def raw_client(address, *, hello=True):
    host, port = address.split(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        client = RawClient(stream)
        if hello:
            await client.send(RpcHello(1))
            assert isinstance(await client.receive(), RpcHello)
        yield client


# --- calls ------------------------------------------------------------------------------------


async def test_a_call_returns_the_reply_and_tells_the_handler_who_called(handlers):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        assert await call(pool, address, text="grüße") == "grüße"
    assert handlers.hosts == ["127.0.0.1"]


async def test_megabytes_travel_both_ways(handlers):
    content = os.urandom(4 << 20)
    async with serving(handlers) as address, open_rpc_pool() as pool:
        reply = await pool.call(address, DATA, Data(content), timeout=10)
    assert reply.data == content[::-1]


async def test_concurrent_first_calls_share_one_dial_and_replies_come_out_of_order(
    handlers, monkeypatch
):
    dials = []
    real = trio.open_tcp_stream

    async def open_tcp_stream(*target):
        dials.append(target)
        return await real(*target)

    monkeypatch.setattr(trio, "open_tcp_stream", open_tcp_stream)
    done = []

    async def run(pool, address, method, text):
        done.append(await call(pool, address, method, text))

    async with (
        serving(handlers) as address,
        open_rpc_pool() as pool,
        trio.open_nursery() as nursery,
    ):
        for number in range(20):
            nursery.start_soon(run, pool, address, WAIT, f"slow {number}")
            nursery.start_soon(run, pool, address, ECHO, f"fast {number}")
        await handlers.until(lambda: len(handlers.waiting) == 20)
        while len(done) < 20:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert all(text.startswith("fast") for text in done)
        handlers.release.set()
    assert len(dials) == 1
    assert len(done) == 40


async def test_two_roles_may_call_each_other_at_the_same_time():
    ours, theirs = Handlers(), Handlers()
    ours.release.set()
    theirs.release.set()
    async with (
        serving(ours) as a,
        serving(theirs) as b,
        open_rpc_pool() as pool,
        trio.open_nursery() as nursery,
    ):
        for address in (a, b):
            for number in range(50):
                nursery.start_soon(call, pool, address, WAIT, str(number))
                nursery.start_soon(call, pool, address, ECHO, str(number))
    assert len(ours.hosts) == len(theirs.hosts) == 50


@pytest.mark.parametrize("name", ["not found", "missing", "full"])
async def test_errors_of_remote_types_are_raised_at_the_caller_with_their_attributes(
    handlers, name
):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        with pytest.raises(type(ERRORS[name])) as caught:
            await call(pool, address, FAIL, name)
        assert attrs.asdict(caught.value) == attrs.asdict(ERRORS[name])
        assert await call(pool, address) == "hello"


@pytest.mark.parametrize("name", ["busy", "protocol"])
async def test_other_errors_arrive_as_text(handlers, name):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        with pytest.raises(RpcFailed) as caught:
            await call(pool, address, FAIL, name)
        assert (caught.value.address, caught.value.method) == (address, "test.fail")
        assert caught.value.message == str(ERRORS[name])
        assert await call(pool, address) == "hello"


@pytest.mark.parametrize("name", ["bug", "network bug"])
async def test_a_bug_in_a_handler_ends_the_server_with_that_exception(handlers, name):
    raised = []
    try:
        async with trio.open_nursery() as nursery, open_rpc_pool() as pool:
            serve = partial(serve_rpc, handlers.service(), "127.0.0.1", 0)
            host, port = await nursery.start(serve)
            with pytest.raises(RpcUnavailable, match=r"closed|lost"):
                await call(pool, f"{host}:{port}", FAIL, name)
            await trio.sleep_forever()
    except* type(ERRORS[name]) as group:
        raised.append(first_error(group))
    assert raised == [ERRORS[name]]


@pytest.mark.parametrize("name", ["bug", "network bug"])
async def test_a_bug_in_an_answer_at_once_ends_the_server_with_that_exception(handlers, name):
    def fail(request, context):
        raise ERRORS[name]

    handlers.known_at_once = fail
    raised = []
    try:
        async with trio.open_nursery() as nursery, open_rpc_pool() as pool:
            serve = partial(serve_rpc, handlers.service(), "127.0.0.1", 0)
            host, port = await nursery.start(serve)
            with pytest.raises(RpcUnavailable, match=r"closed|lost"):
                await pool.call(f"{host}:{port}", KNOWN, Data(b"x"), timeout=30.0)
            with trio.fail_after(30):
                await trio.sleep_forever()
    except* type(ERRORS[name]) as group:
        raised.append(first_error(group))
    assert raised == [ERRORS[name]]


async def test_unknown_methods_and_malformed_bodies_fail_the_one_call(handlers):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        with pytest.raises(RpcFailed, match=r"'test\.other' is not a method of this role"):
            await call(pool, address, Method("test.other", Text, Text))
        with pytest.raises(
            RpcFailed, match=r"malformed Data.*expected bytes, got str|required field"
        ):
            await call(pool, address, Method("test.data", Text, Text))
        with pytest.raises(RpcFailed, match="malformed Data"):
            await call(pool, address, Method("test.echo", Text, Data))
        assert await call(pool, address) == "hello"


async def test_bodies_above_the_limit_fail_the_one_call(handlers):
    async def grow(request, context):
        return Data(bytes(3000))

    grown = Method("test.grow", Text, Data)
    service = handlers.service()
    service.register(grown, grow)
    handlers.service = lambda: service
    async with (
        serving(handlers, limits={"body_bytes_max": 2000}) as address,
        open_rpc_pool(RpcLimits(body_bytes_max=2000)) as pool,
    ):
        with pytest.raises(RpcFailed, match=r"the reply has 3\d+ bytes, the limit is 2000"):
            await pool.call(address, grown, Text(""), timeout=5)
        with pytest.raises(RpcFailed, match=r"the request has 4\d+ bytes, the limit is 2000"):
            await pool.call(address, DATA, Data(bytes(4000)), timeout=5)
        reply = await pool.call(address, DATA, Data(bytes(1980)), timeout=5)
        assert len(reply.data) == 1980


async def test_what_can_be_answered_at_once_is_and_the_rest_is_left_to_the_handler(handlers):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        for asked, answered in ((b"x", b"x" * 1000), (b"ask", b"asked"), (b"y", b"y" * 1000)):
            assert (await pool.call(address, KNOWN, Data(asked), timeout=5.0)).data == answered
        with pytest.raises(StoreFull):
            await pool.call(address, KNOWN, Data(b"full"), timeout=5.0)


async def test_answers_at_once_and_replies_of_handlers_never_mix_their_frames(handlers):
    # Megabytes on their way from handlers, while the connection answers others by itself.
    content = os.urandom(1 << 20)
    async with serving(handlers) as address, open_rpc_pool() as pool:

        async def far(number):
            data = content + bytes([number])
            reply = await pool.call(address, DATA, Data(data), timeout=30.0)
            assert reply.data == data[::-1]

        async def near(number):
            data = b"%d." % number
            reply = await pool.call(address, KNOWN, Data(data), timeout=30.0)
            assert reply.data == data * 1000

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(far if number % 6 == 0 else near, number)


async def test_answers_at_once_that_are_not_read_stop_the_reading(handlers):
    answered = []
    handlers.known_at_once = lambda request, _: answered.append(1) or Data(bytes(1 << 20))
    async with serving(handlers) as address, raw_client(address) as client:
        body = b"\x81\xa4data\xc4\x01x"
        for number in range(64):
            await client.send(RpcRequest(number, 60_000, "test.known", body))
        await trio.testing.wait_all_tasks_blocked(0.2)
        # What the sockets' buffers hold, and not all of it.
        assert len(answered) < 40
        for number in range(64):
            assert (await client.receive()).id == number


def test_a_method_has_one_handler(handlers):
    service = handlers.service()
    with pytest.raises(ValueError, match=r"test\.echo has a handler"):
        service.register(ECHO, handlers.echo)


def test_limits_are_positive():
    with pytest.raises(ValueError, match="'requests_max' must be above 0: 0"):
        RpcLimits(requests_max=0)


# --- deadlines and cancellation ---------------------------------------------------------------


async def test_a_call_without_a_reply_in_time_is_unavailable_and_the_handler_is_cancelled(handlers):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        await call(pool, address)
        with pytest.raises(RpcUnavailable, match=r"no reply within 0\.1 s") as caught:
            await call(pool, address, WAIT, "x", timeout=0.1)
        assert caught.value.asked
        await handlers.until(lambda: handlers.cancelled == ["x"])
        assert await call(pool, address) == "hello"


async def test_the_server_ends_a_handler_at_the_deadline_by_itself(handlers):
    async with serving(handlers) as address, raw_client(address) as client:
        await client.send(RpcRequest(1, 50, "test.wait", b"\x81\xa4text\xa1x"))
        await handlers.until(lambda: handlers.cancelled == ["x"])
        # Nothing is sent for it, and the id is free again.
        await client.send(RpcRequest(1, 5000, "test.echo", b"\x81\xa4text\xa1y"))
        assert await client.receive() == RpcReply(1, b"\x81\xa4text\xa1y")


async def test_a_deadline_that_is_put_off_while_the_call_is_under_way_does_not_count(handlers):
    """A member that seems to hang has some seconds left, and more when it answers others after all."""
    left = []

    async def measure(request, context):
        left.append(trio.current_effective_deadline() - trio.current_time())
        scope.deadline = math.inf
        return request

    measured = Method("test.measure", Text, Text)
    service = handlers.service()
    service.register(measured, measure)
    handlers.service = lambda: service
    async with serving(handlers) as address, open_rpc_pool() as pool:
        with trio.move_on_after(20) as scope:
            assert await call(pool, address, measured, timeout=1000) == "hello"
        assert await call(pool, address, measured, timeout=math.inf) == "hello"
    assert 900 < left[0] <= 1000.01
    assert left[1] == math.inf


async def test_a_cancelled_call_cancels_the_handler_and_leaves_the_connection_usable(handlers):
    async with serving(handlers) as address, open_rpc_pool() as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, pool, address, WAIT, "x", math.inf)
            await handlers.until(lambda: handlers.waiting == ["x"])
            nursery.cancel_scope.cancel()
        await handlers.until(lambda: handlers.cancelled == ["x"])
        assert await call(pool, address) == "hello"


async def test_cancelling_the_first_caller_does_not_end_the_dial_for_the_others(handlers):
    async with (
        serving(handlers) as address,
        open_rpc_pool() as pool,
        trio.open_nursery() as nursery,
    ):
        with trio.CancelScope() as scope:
            scope.cancel()
            await call(pool, address)
        nursery.start_soon(call, pool, address)
    assert handlers.hosts == ["127.0.0.1"]


async def test_handlers_are_cancelled_when_their_caller_vanishes(handlers):
    async with serving(handlers) as address:
        async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
            nursery.start_soon(call, pool, address, WAIT, "x")
            await handlers.until(lambda: handlers.waiting == ["x"])
            nursery.cancel_scope.cancel()
        await handlers.until(lambda: handlers.cancelled == ["x"])


async def test_frames_that_do_not_fit_are_written_in_order_and_what_was_withdrawn_is_not():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        writer = FrameWriter(stream, RpcLimits())
        # More than a socket holds: the beginning is sent at once, and the rest waits.
        large = bytes(range(256)) * (16 << 10)
        frames = [b"at once", large, b"taken back", b"behind"]
        for frame in frames:
            writer.put_nowait(frame)

        assert [writer.withdraw(frame) for frame in frames] == [False, False, True, True]
        writer.put_nowait(b"after")

        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            theirs.setblocking(False)
            reading = trio.socket.from_stdlib_socket(theirs)
            while not received.endswith(b"after"):
                received += await reading.recv(1 << 20)
            nursery.cancel_scope.cancel()
    assert received == b"at once" + large + b"after"


# --- connections that end ---------------------------------------------------------------------


async def test_an_unreachable_role_is_unavailable_with_the_reason():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with open_rpc_pool() as pool:
            with pytest.raises(RpcUnavailable, match="refused") as caught:
                await call(pool, address)
    assert (caught.value.address, caught.value.method) == (address, "test.echo")
    assert not caught.value.asked


async def test_a_text_that_is_no_address_is_a_value_error():
    async with open_rpc_pool() as pool:
        with pytest.raises(ValueError, match="expected host:port"):
            await call(pool, "tracker")


async def test_a_lost_connection_fails_its_calls_and_the_next_call_dials_again(handlers):
    async with open_rpc_pool() as pool, serving(handlers) as address:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def waiting():
                with pytest.raises(RpcUnavailable, match=r"closed|lost"):
                    await call(pool, address, WAIT, "x")
                nursery.cancel_scope.cancel()

            await handlers.until(lambda: handlers.waiting == ["x"])
            _server_socket(address).shutdown(socket.SHUT_RDWR)
            await trio.sleep_forever()
        assert await call(pool, address) == "hello"


def _server_socket(address):
    # The server's end of the only connection, found through the sockets of this process.
    port = int(address.split(":")[1])
    (connection,) = (
        c for c in gc.get_objects() if type(c) is rpc_connections._Connection and _port(c) == port
    )
    return connection._end.socket


def _port(connection):
    sock = connection._end.socket
    return sock.getsockname()[1] if sock.fileno() >= 0 else None


SERVER = """
import trio
from swarmpull.wire import api, rpc_connections
from swarmpull.wire.rpc import RpcService, serve_rpc

async def stat(request, context):
    if request.namespace:
        await trio.sleep_forever()
    return api.BlobStatReply(42)

async def main(task_status=trio.TASK_STATUS_IGNORED):
    service = RpcService()
    service.register(api.STAT_BLOB, stat)
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(serve_rpc, service, "127.0.0.1", {port})
        print(port, flush=True)

trio.run(main)
"""


@contextlib.contextmanager
def server_process(port=0):
    command = [sys.executable, "-c", SERVER.format(port=port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


async def test_a_server_that_is_killed_fails_the_calls_and_is_found_again_after_a_restart():
    request = api.BlobRequest(Digest.of(b"x"))
    async with open_rpc_pool() as pool:
        with server_process() as (process, port):
            address = f"127.0.0.1:{port}"
            assert (await pool.call(address, api.STAT_BLOB, request, timeout=5)).length == 42
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def killed():
                    waiting = attrs.evolve(request, namespace="wait")
                    with pytest.raises(RpcUnavailable):
                        await pool.call(address, api.STAT_BLOB, waiting, timeout=30)

                await trio.testing.wait_all_tasks_blocked(0.05)
                process.kill()
        with pytest.raises(RpcUnavailable, match="refused"):
            await pool.call(address, api.STAT_BLOB, request, timeout=5)
        with server_process(port):
            assert (await pool.call(address, api.STAT_BLOB, request, timeout=5)).length == 42


async def test_the_death_of_a_server_is_told_at_once_though_nobody_calls_it():
    request = api.BlobRequest(Digest.of(b"x"))
    async with open_rpc_pool() as pool:
        lost = []
        pool.when_lost(lost.append)
        with server_process() as (process, port):
            address = f"127.0.0.1:{port}"
            await pool.call(address, api.STAT_BLOB, request, timeout=5)
            assert lost == []
            process.kill()
            with trio.fail_after(30):
                while not lost:
                    await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(RpcUnavailable, match="refused"):
            await pool.call(address, api.STAT_BLOB, request, timeout=5)
        assert lost == [address], "that nobody listens is no news"


async def test_a_server_that_drains_is_told_of_once_and_before_it_has_ended(handlers):
    drain = trio.Event()
    lost = []
    async with open_rpc_pool() as pool:
        pool.when_lost(lost.append)
        async with trio.open_nursery() as nursery:
            serve = partial(serve_rpc, handlers.service(), "127.0.0.1", 0, drain=drain, grace=30)
            host, port = await nursery.start(serve)
            nursery.start_soon(call, pool, f"{host}:{port}", WAIT, "slow")
            await handlers.until(lambda: handlers.waiting == ["slow"])
            drain.set()
            with trio.fail_after(30):
                while not lost:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assert handlers.waiting == ["slow"]
            handlers.release.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert lost == [f"{host}:{port}"]


async def test_connections_that_nobody_uses_are_no_loss(handlers):
    lost = []
    async with serving(handlers, limits={"idle_timeout": 0.05}) as address, open_rpc_pool() as pool:
        pool.when_lost(lost.append)
        await call(pool, address)
        with trio.fail_after(30):
            while address in pool._connections:
                await trio.testing.wait_all_tasks_blocked(0.01)
        await call(pool, address)
        pool._connections[address].close()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await call(pool, address)
    assert lost == []


async def test_a_server_that_hangs_costs_a_call_only_its_timeout():
    request = api.BlobRequest(Digest.of(b"x"))
    with server_process() as (process, port):
        async with open_rpc_pool() as pool:
            address = f"127.0.0.1:{port}"
            await pool.call(address, api.STAT_BLOB, request, timeout=5)
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(RpcUnavailable, match="no reply within"):
                await pool.call(address, api.STAT_BLOB, request, timeout=0.1)
            os.kill(process.pid, signal.SIGCONT)
            assert (await pool.call(address, api.STAT_BLOB, request, timeout=5)).length == 42


async def test_a_draining_server_answers_what_is_under_way_and_takes_no_connection(handlers):
    drain = trio.Event()
    done = []
    async with open_rpc_pool() as pool:
        async with trio.open_nursery() as nursery:
            serve = partial(serve_rpc, handlers.service(), "127.0.0.1", 0, drain=drain, grace=30)
            host, port = await nursery.start(serve)
            address = f"{host}:{port}"

            @nursery.start_soon
            async def slow():
                done.append(await call(pool, address, WAIT, "slow"))

            await handlers.until(lambda: handlers.waiting == ["slow"])
            drain.set()
            with trio.fail_after(30):
                while address in pool._connections:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(RpcUnavailable, match="refused"):
                await call(pool, address)
            handlers.release.set()
        # serve_rpc has returned by itself.
        assert done == ["slow"]


async def test_draining_ends_after_its_grace_whatever_is_under_way(handlers):
    drain = trio.Event()
    async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
        serve = partial(serve_rpc, handlers.service(), "127.0.0.1", 0, drain=drain, grace=0.1)
        host, port = await nursery.start(serve)

        @nursery.start_soon
        async def slow():
            with pytest.raises(RpcUnavailable, match=r"draining|closed"):
                await call(pool, f"{host}:{port}", WAIT, "slow")

        await handlers.until(lambda: handlers.waiting == ["slow"])
        drain.set()
    assert handlers.cancelled == ["slow"]


async def test_an_idle_connection_is_ended_and_the_next_call_dials_again(handlers):
    async with serving(handlers, limits={"idle_timeout": 0.05}) as address, open_rpc_pool() as pool:
        await call(pool, address)
        with trio.fail_after(30):
            while address in pool._connections:
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert await call(pool, address) == "hello"


async def test_a_connection_with_a_request_under_way_is_not_idle(handlers):
    async with (
        serving(handlers, limits={"idle_timeout": 0.02}) as address,
        raw_client(address) as client,
    ):
        await client.send(RpcRequest(1, 10_000, "test.wait", b"\x81\xa4text\xa1x"))
        await handlers.until(lambda: handlers.waiting == ["x"])
        with trio.move_on_after(0.1) as scope:
            await client.receive()
        assert scope.cancelled_caught
        handlers.release.set()
        assert isinstance(await client.receive(), RpcReply)
        assert await client.receive() == RpcBye(RpcByeReason.IDLE)


async def test_an_error_in_the_block_of_a_pool_is_not_wrapped_in_a_group():
    with pytest.raises(StoreFull):
        async with open_rpc_pool():
            raise StoreFull("s", 1)


async def test_a_port_in_use_is_a_startup_error(handlers):
    async with serving(handlers) as address:
        with pytest.raises(StartupError, match=address):
            await serve_rpc(RpcService(), "127.0.0.1", int(address.split(":")[1]))


# --- limits -----------------------------------------------------------------------------------


async def test_connections_beyond_the_limit_get_a_bye_busy(handlers):
    async with serving(handlers, limits={"connections_max": 1}) as address, raw_client(address):
        async with raw_client(address, hello=False) as second:
            assert (await second.receive()).reason is RpcByeReason.BUSY
            assert await second.receive() is None
        async with open_rpc_pool() as pool:
            with pytest.raises(RpcUnavailable, match="refused, busy"):
                await call(pool, address)


async def test_a_pool_at_its_limit_closes_an_unused_connection_but_not_one_in_use(handlers):
    other = Handlers()
    async with (
        serving(handlers) as a,
        serving(other) as b,
        open_rpc_pool(RpcLimits(connections_max=1)) as pool,
    ):
        await call(pool, a)
        assert await call(pool, b) == "hello"
        assert list(pool._connections) == [b]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, pool, b, WAIT, "x")
            await other.until(lambda: other.waiting == ["x"])
            with pytest.raises(RpcUnavailable, match="all 1 connections of this process"):
                await call(pool, a)
            other.release.set()


async def test_a_client_keeps_to_the_number_of_requests_that_the_server_takes(handlers):
    async with (
        serving(handlers, limits={"requests_max": 3}) as address,
        open_rpc_pool() as pool,
        trio.open_nursery() as nursery,
    ):
        for number in range(10):
            nursery.start_soon(call, pool, address, WAIT, str(number))
        await handlers.until(lambda: len(handlers.waiting) == 3)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(handlers.waiting) == 3
        handlers.release.set()
    assert handlers.peak == 3


async def test_what_is_answered_at_once_does_not_wait_behind_calls_that_hang(handlers):
    """A probe, say, which is to tell a slow member from a dead one."""
    quick = attrs.evolve(KNOWN, at_once=True)
    async with (
        serving(handlers, limits={"requests_max": 2}) as address,
        open_rpc_pool() as pool,
        trio.open_nursery() as nursery,
    ):
        for number in range(4):
            nursery.start_soon(partial(call, pool, address, WAIT, str(number), timeout=60.0))
        await handlers.until(lambda: len(handlers.waiting) == 2)
        reply = await pool.call(address, quick, Data(b"x"), timeout=30.0)
        assert reply.data == b"x" * 1000
        assert len(handlers.waiting) == 2
        handlers.release.set()
    assert handlers.peak == 2


async def test_a_server_stops_reading_at_its_limit_of_requests(handlers):
    async with (
        serving(handlers, limits={"requests_max": 2}) as address,
        raw_client(address) as client,
    ):
        requests = [RpcRequest(n, 60_000, "test.wait", b"\x81\xa4text\xa1x") for n in range(4)]
        await client.send(*requests)
        await handlers.until(lambda: len(handlers.waiting) == 2)
        with trio.move_on_after(0.2) as scope:
            while True:
                await client.stream.send_all(bytes(1 << 20))
        assert scope.cancelled_caught
        assert len(handlers.waiting) == 2


async def test_a_request_beyond_the_limit_is_answered_when_there_is_a_place(handlers):
    async with (
        serving(handlers, limits={"requests_max": 2}) as address,
        raw_client(address) as client,
    ):
        body = b"\x81\xa4text\xa1x"
        requests = [RpcRequest(n, 60_000, "test.wait", body) for n in range(5)]
        await client.send(*requests, RpcRequest(5, 60_000, "test.echo", body))
        await handlers.until(lambda: len(handlers.waiting) == 2)
        handlers.release.set()
        replies = [await client.receive() for _ in range(6)]
    assert sorted(reply.id for reply in replies) == [0, 1, 2, 3, 4, 5]
    assert handlers.peak == 2


async def test_a_client_that_is_reset_while_it_is_not_read_from_is_noticed(handlers):
    with structlog.testing.capture_logs() as logs:
        async with serving(handlers, limits={"requests_max": 1}) as address:
            async with raw_client(address) as client:
                body = b"\x81\xa4text\xa1x"
                await client.send(*[RpcRequest(n, 60_000, "test.wait", body) for n in range(2)])
                await handlers.until(lambda: handlers.waiting == ["x"])
                # Closing resets the connection.
                linger = struct.pack("ii", 1, 0)
                client.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            await handlers.until(lambda: handlers.cancelled == ["x"])
    assert len([log for log in logs if "connection lost" in log["reason"]]) == 1


async def test_connections_that_say_nothing_have_no_task(handlers):
    async with serving(handlers) as address, contextlib.AsyncExitStack() as clients:
        await clients.enter_async_context(raw_client(address))
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(20):
            await clients.enter_async_context(raw_client(address))
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_many_clients_at_once_are_all_answered(handlers):
    """More than are served in one turn."""

    async def ask(address, number):
        async with raw_client(address) as client:
            for again in range(3):
                body = b"\x81\xa4text\xa3%03d" % number
                await client.send(RpcRequest(again, 60_000, "test.echo", body))
                assert await client.receive() == RpcReply(again, body)

    async with serving(handlers) as address, trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(ask, address, number)
    assert len(handlers.hosts) == 300


ASKED = b"\x81\xa4data\xc4\x01x"


def count_answers_by_turn(handlers, nursery):
    """How many requests are answered in each turn of the event loop."""
    turn, answered = 0, collections.Counter()

    def answer(request, _):
        answered[turn] += 1
        return Data(request.data)

    async def count_turns():
        nonlocal turn
        while True:
            turn += 1
            await trio.lowlevel.checkpoint()

    handlers.known_at_once = answer
    nursery.start_soon(count_turns)
    return answered


async def test_however_many_requests_come_at_once_few_are_answered_before_others_get_their_turn(
    handlers,
):
    async with trio.open_nursery() as nursery:
        answered = count_answers_by_turn(handlers, nursery)
        async with serving(handlers) as address, raw_client(address) as client:
            # The beginning of the first one comes before the rest, and must not open the door for all.
            data = b"".join(pack(RpcRequest(n, 60_000, "test.known", ASKED)) for n in range(2000))
            await client.stream.send_all(data[:6])
            await trio.lowlevel.checkpoint()
            nursery.start_soon(client.stream.send_all, data[6:])
            for number in range(2000):
                assert (await client.receive()).id == number
        nursery.cancel_scope.cancel()
    # What has come anew and what is left of before, each in a task, which may run twice before we count on.
    assert max(answered.values()) <= 4 * rpc_connections.MESSAGES_AT_ONCE


async def test_requests_that_take_all_of_a_turn_are_answered_one_by_one(handlers, monkeypatch):
    monkeypatch.setattr(rpc_connections, "TURN_SECONDS", 0.0)
    async with trio.open_nursery() as nursery:
        answered = count_answers_by_turn(handlers, nursery)
        async with serving(handlers) as address, contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(raw_client(address)) for _ in range(5)]
            for client in clients:
                await client.send(*[RpcRequest(n, 60_000, "test.known", ASKED) for n in range(10)])
            for client in clients:
                assert [(await client.receive()).id for _ in range(10)] == list(range(10))
        nursery.cancel_scope.cancel()
    assert max(answered.values()) <= 4


async def test_a_client_that_goes_while_its_requests_rest_leaves_nothing_behind(handlers):
    memory = RpcMemory(1 << 20)
    async with serving(handlers, memory=memory) as address:
        for _ in range(3):
            async with raw_client(address) as client:
                await client.send(*[RpcRequest(n, 60_000, "test.known", ASKED) for n in range(400)])
                await trio.lowlevel.checkpoint()
        async with raw_client(address) as client:
            await client.send(RpcRequest(1, 60_000, "test.known", ASKED))
            assert (await client.receive()).id == 1
        await trio.testing.wait_all_tasks_blocked()
        assert memory.bytes == 0


async def test_frames_in_part_are_bounded_over_all_connections_and_the_largest_has_to_go(handlers):
    memory = RpcMemory(1 << 20)
    handlers.known_at_once = lambda *_: Data(b"x")
    body = b"\x81\xa4data\xc6" + (700_000).to_bytes(4, "big") + bytes(700_000)
    frame = pack(RpcRequest(1, 60_000, "test.known", body))
    with structlog.testing.capture_logs() as logs:
        async with (
            serving(handlers, memory=memory) as address,
            raw_client(address) as greedy,
            raw_client(address) as modest,
        ):
            await greedy.stream.send_all(frame[:600_000])
            await trio.testing.wait_all_tasks_blocked(0.05)
            await modest.stream.send_all(frame[:500_000])
            bye = await greedy.receive()
            assert bye.reason is RpcByeReason.BUSY
            assert "600000 bytes of requests and unread replies" in bye.text
            assert await greedy.receive() is None
            await modest.stream.send_all(frame[500_000:])
            assert (await modest.receive()).id == 1
            await trio.testing.wait_all_tasks_blocked()
            assert memory.bytes == 0
    assert [(log["event"], log["log_level"]) for log in logs][:2] == [
        ("rpc_memory_full", "warning"),
        ("rpc_connection_closed", "info"),
    ]
    assert (logs[0]["connections_ended"], logs[0]["most"]) == (1, 600_000)
    assert memory.ended == 1


async def test_replies_that_wait_for_one_client_count_though_each_waits_in_its_own_task(handlers):
    memory = RpcMemory(16 << 20)

    async def large(request, context):
        await handlers.wait(Text("large"), context)
        return Data(bytes(1 << 20))

    handlers.known = large
    ask = b"\x81\xa4data\xc4\x03ask"
    async with serving(handlers, memory=memory) as address, raw_client(address) as client:
        await client.send(*[RpcRequest(n, 60_000, "test.known", ask) for n in range(64)])
        await handlers.until(lambda: len(handlers.waiting) == 64)
        handlers.release.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (memory.ended, memory.bytes) == (1, 0)
        async with raw_client(address) as other:
            await other.send(RpcRequest(1, 60_000, "test.known", ask))
            assert (await other.receive()).id == 1
            await trio.testing.wait_all_tasks_blocked()
            assert memory.bytes == 0


async def test_requests_under_way_count_until_they_are_answered(handlers):
    memory = RpcMemory(1 << 20)
    text = b"\x81\xa4text\xdb" + (300_000).to_bytes(4, "big") + b"x" * 300_000
    async with serving(handlers, memory=memory) as address, raw_client(address) as client:
        await client.send(*[RpcRequest(n, 60_000, "test.wait", text) for n in range(3)])
        await handlers.until(lambda: len(handlers.waiting) == 3)
        assert memory.bytes == 3 * len(text)
        await client.send(RpcRequest(3, 60_000, "test.wait", text))
        assert (await client.receive()).reason is RpcByeReason.BUSY
        await handlers.until(lambda: len(handlers.cancelled) == 3)
        assert memory.bytes == 0


async def test_replies_that_are_not_read_end_the_connection(handlers):
    limits = {"write_timeout": 0.1, "write_queue_bytes_max": 1 << 20}
    with structlog.testing.capture_logs() as logs:
        async with serving(handlers, limits=limits) as address, raw_client(address) as client:
            body = b"\x81\xa4data\xc6\x00\x40\x00\x00" + bytes(4 << 20)
            with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(20):
                for number in range(20):
                    await client.send(RpcRequest(number, 60_000, "test.data", body))
                await trio.sleep_forever()
    assert [log["reason"] for log in logs] == ["the other side was too slow"]


GARBAGE = [
    (b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET "),
    (bytes.fromhex("16030102000100"), "only one side speaks TLS: set tls.ca"),
    (bytes(64), "length 0"),
    (b"\xff" * 64, "the limit is 1024"),
    (pack_header(1, 1025), "the limit is 1024"),
    (pack(RpcHello(1, version=2)), "speaks RPC version 2"),
    (pack(RpcCancel(1)), "began with RpcCancel instead of HELLO"),
    (pack(RpcHello(1)) + pack(RpcHello(1)), "a client must not send RpcHello"),
    (pack(RpcHello(1)) + pack_header(2, 1 << 31), "a body of 2147483648 bytes"),
    (pack(RpcHello(1)) + pack_header(2, 1), "ended inside a frame"),
    (pack(RpcHello(1)) + b"\0\0\0\3\2ab", "cut short"),
]


@pytest.mark.parametrize(("data", "reason"), GARBAGE)
async def test_garbage_ends_its_own_connection_with_one_logged_reason(handlers, data, reason):
    with structlog.testing.capture_logs() as logs:
        async with serving(handlers) as address, open_rpc_pool() as pool:
            await call(pool, address)
            async with raw_client(address, hello=False) as client:
                await client.stream.send_all(data)
                await client.stream.send_eof()
                with contextlib.suppress(trio.BrokenResourceError):
                    while await client.receive() is not None:
                        pass
            assert await call(pool, address) == "hello"
            events = ("rpc_connection_closed", "connection_not_trusted")
            ended = [log for log in logs if log["event"] in events]
            assert len(ended) == 1
            assert re.search(reason, ended[0]["reason"])
            assert ended[0]["remote"].startswith("127.0.0.1")


async def test_the_client_that_broke_the_protocol_is_told_how(handlers):
    async with serving(handlers) as address, raw_client(address) as client:
        await client.send(RpcHello(1))
        bye = await client.receive()
        assert bye == RpcBye(RpcByeReason.PROTOCOL_ERROR, "a client must not send RpcHello")


async def test_a_request_id_in_use_breaks_the_protocol(handlers):
    async with serving(handlers) as address, raw_client(address) as client:
        request = RpcRequest(1, 5000, "test.wait", b"\x81\xa4text\xa1x")
        await client.send(request, request)
        assert (await client.receive()).text == "request id 1 is in use"
        assert await client.receive() is None


async def test_a_client_that_says_nothing_is_dropped_after_the_handshake_timeout(handlers):
    with structlog.testing.capture_logs() as logs:
        async with (
            serving(handlers, limits={"handshake_timeout": 0.05}) as address,
            raw_client(address, hello=False) as client,
        ):
            bye = await client.receive()
            assert bye.reason is RpcByeReason.PROTOCOL_ERROR
            assert await client.receive() is None
    assert [log["reason"] for log in logs] == ["protocol error: no HELLO within 0.05 s"]


async def drip(stream, data):
    for i in range(len(data)):
        await stream.send_all(data[i : i + 1])
        await trio.sleep(0.03)


async def test_a_client_that_sends_its_hello_drop_by_drop_is_dropped_too(handlers):
    with structlog.testing.capture_logs() as logs:
        async with (
            serving(handlers, limits={"handshake_timeout": 0.1}) as address,
            raw_client(address, hello=False) as client,
        ):
            with pytest.raises(trio.BrokenResourceError):
                await drip(client.stream, pack(RpcHello(1)))
    assert [log["reason"] for log in logs] == ["protocol error: no HELLO within 0.1 s"]


async def test_a_frame_that_does_not_end_in_time_ends_the_connection(handlers):
    with structlog.testing.capture_logs() as logs:
        async with (
            serving(handlers, limits={"frame_timeout": 0.05}) as address,
            raw_client(address) as client,
        ):
            await client.stream.send_all(pack(RpcRequest(1, 1, "test.echo", bytes(100)))[:50])
            assert await client.receive() is None
    assert [log["reason"] for log in logs] == ["the other side was too slow"]


# --- hostile servers --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def hostile_server(behave):
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, behave, 0, host="127.0.0.1"))
        host, port = listeners[0].socket.getsockname()
        yield f"{host}:{port}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP"),
        (b"", "closed before its HELLO"),
        (pack(RpcHello(1, version=7)), "speaks RPC version 7"),
        (pack(RpcReply(1, b"")), "began with RpcReply"),
        (pack(RpcBye(RpcByeReason.BUSY, "later")), "refused, busy: later"),
        (pack(RpcHello(1)) + pack(RpcCancel(1)), "a server must not send RpcCancel"),
        (pack(RpcHello(1)) + pack_header(3, 1 << 30), "the limit is"),
        (pack(RpcHello(1)), "closed by the other side"),
    ],
)
async def test_a_server_that_talks_nonsense_is_unavailable_with_the_reason(answer, reason):
    async def behave(stream):
        await stream.send_all(answer)
        await stream.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass

    async with hostile_server(behave) as address, open_rpc_pool() as pool:
        with pytest.raises(RpcUnavailable, match=reason):
            await call(pool, address)


async def test_a_server_that_never_says_hello_costs_the_handshake_timeout_or_that_of_the_call():
    async def behave(stream):
        await trio.sleep_forever()

    async with (
        hostile_server(behave) as address,
        open_rpc_pool(RpcLimits(handshake_timeout=0.05)) as pool,
    ):
        with pytest.raises(RpcUnavailable, match=r"no connection within 0\.05 s"):
            await call(pool, address)
        with pytest.raises(RpcUnavailable, match=r"no connection within 0\.01 s"):
            await call(pool, address, timeout=0.01)


async def test_features_and_frames_of_a_newer_server_are_ignored():
    async def behave(stream):
        client = RawClient(stream)
        await client.receive()
        await client.send(RpcHello(5, features=0xFFFF))
        await stream.send_all(pack_header(99, 5) + b"later")
        request = await client.receive()
        await stream.send_all(pack_header(98, 0))
        await client.send(RpcError(request.id, "", "answered"))
        await client.receive()

    async with hostile_server(behave) as address, open_rpc_pool() as pool:
        with pytest.raises(RpcFailed, match="answered"):
            await call(pool, address)


async def test_replies_to_nobody_are_ignored_and_unknown_errors_arrive_as_text():
    async def behave(stream):
        client = RawClient(stream)
        await client.receive()
        await client.send(RpcHello(5), RpcReply(99, b""))
        request = await client.receive()
        await client.send(RpcReply(77, b""), RpcError(request.id, "BlobEaten", "gone", b"\x80"))
        await client.receive()

    async with hostile_server(behave) as address, open_rpc_pool() as pool:
        with pytest.raises(RpcFailed, match="gone"):
            await call(pool, address)
