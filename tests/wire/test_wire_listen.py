import errno
import socket

import pytest
import trio

from swarmpull.errors import StartupError
from swarmpull.wire.listen import (
    format_address,
    open_listeners,
    parse_address,
    remote_host,
    serve_connections,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:5000", ("127.0.0.1", 5000)),
        ("tracker-1.example:7300", ("tracker-1.example", 7300)),
        ("[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_addresses_are_read_and_written(text, address):
    assert parse_address(text) == address
    assert format_address(*address) == text


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":80", "host:http", "host:-1", "host:65536", "::1:80", "[]:80", "[host]:80",
     "host:٣", "host: 80", "[::1]", "host:000080"],
)  # fmt: skip
def test_other_texts_are_refused_with_what_is_expected(text):
    with pytest.raises(ValueError, match="expected host:port"):
        parse_address(text)


async def test_port_0_takes_a_free_port():
    (listener,) = await open_listeners("127.0.0.1", 0)
    async with listener:
        host, port = listener.socket.getsockname()
        assert host == "127.0.0.1"
        assert port > 0
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


async def test_all_addresses_of_a_name_get_the_same_free_port(monkeypatch):
    async def both(host, port, **options):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in ("127.0.0.1", "127.0.0.2", "127.0.0.1")
        ]

    monkeypatch.setattr(trio.socket, "getaddrinfo", both)
    listeners = await open_listeners("name", 0)
    try:
        names = [listener.socket.getsockname() for listener in listeners]
        assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
        assert names[0][1] == names[1][1] != 0
    finally:
        for listener in listeners:
            await listener.aclose()


async def test_a_port_in_use_is_named_with_what_to_do():
    (listener,) = await open_listeners("127.0.0.1", 0)
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            await open_listeners("127.0.0.1", port)
    assert f"127.0.0.1:{port}" in caught.value.reason
    assert "another port" in caught.value.remedy


async def test_an_address_of_another_machine_is_named():
    with pytest.raises(StartupError, match=r"192\.0\.2\.1:0 .*no interface"):
        await open_listeners("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "below 1024"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "name of this machine"),
        (OSError(errno.ENOBUFS, "No buffer space"), "another address"),
    ],
)
async def test_each_failure_says_what_to_do(monkeypatch, error, remedy):
    async def fail(*args, **options):
        raise error

    monkeypatch.setattr(trio.socket, "getaddrinfo", fail)
    with pytest.raises(StartupError) as caught:
        await open_listeners("host", 80)
    assert remedy in caught.value.remedy
    assert "host:80" in caught.value.reason


async def test_connections_beyond_the_cap_are_refused_and_later_ones_served_again(nursery):
    listeners = await open_listeners("127.0.0.1", 0)
    address = listeners[0].socket.getsockname()
    served = []

    async def handler(stream):
        served.append(remote_host(stream))
        await stream.send_all(b"served")
        await stream.receive_some()

    async def refuse(stream):
        await stream.send_all(b"busy")

    async def serve(task_status):
        await serve_connections(
            listeners, handler, connections_max=1, refuse=refuse, task_status=task_status
        )

    async def first_words():
        stream = await trio.open_tcp_stream(*address)
        return stream, await stream.receive_some()

    await nursery.start(serve)
    first, words = await first_words()
    assert words == b"served"
    second, words = await first_words()
    assert words == b"busy"
    assert await second.receive_some() == b""
    await first.send_all(b"bye")
    assert await first.receive_some() == b""
    await first.aclose()
    await second.aclose()
    third, words = await first_words()
    assert words == b"served"
    await third.aclose()
    assert served == ["127.0.0.1", "127.0.0.1"]
    nursery.cancel_scope.cancel()
