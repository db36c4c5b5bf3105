"""Sockets in the network namespace of a host, without a process there.

A socket stays in the namespace in which it was made, so one process can be a client on every host.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Final, TypeVar

import httpcore
import trio

from benchmarks.lab_network import NAMESPACES

T = TypeVar("T")

# sched.h
CLONE_NEWNET: Final = 0x40000000
READ_BYTES_MAX: Final = 1 << 20

_libc: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def inside(namespace: str | None) -> Iterator[None]:
    """Be in a namespace for a block that has no checkpoint: other tasks must not be in it, too."""
    if namespace is None:
        yield
        return
    with (
        open("/proc/thread-self/ns/net", "rb") as own,
        (NAMESPACES / namespace).open("rb") as other,
    ):
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run_inside(namespace: str | None, function: Callable[[], T]) -> T:
    """Run a blocking function in a thread of that namespace; its processes are born there, too."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            with inside(namespace):
                outcome.append(function())
        except BaseException as error:  # handed to the caller, whatever it is
            outcome.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class Backend(httpcore.AsyncNetworkBackend):
    """Connections of httpcore that begin on a host."""

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace

    async def connect_tcp(
        self, host, port, timeout=None, local_address=None, socket_options=None
    ) -> httpcore.AsyncNetworkStream:
        with inside(self._namespace):
            opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock = trio.socket.from_stdlib_socket(opened)
        try:
            with _mapped(OSError, timeout, httpcore.ConnectError, httpcore.ConnectTimeout):
                await sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return Stream(trio.SocketStream(sock))

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class Stream(httpcore.AsyncNetworkStream):
    """A connection of trio as httpcore wants it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _mapped(trio.BrokenResourceError, timeout, httpcore.ReadError, httpcore.ReadTimeout):
            return bytes(await self._stream.receive_some(max(max_bytes, READ_BYTES_MAX)))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        broken = (trio.BrokenResourceError, trio.ClosedResourceError)
        with _mapped(broken, timeout, httpcore.WriteError, httpcore.WriteTimeout):
            await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        # A peer that is gone need not be waited for.
        await trio.aclose_forcefully(self._stream)

    async def start_tls(self, ssl_context, server_hostname=None, timeout=None) -> Stream:
        stream = trio.SSLStream(
            self._stream, ssl_context, server_hostname=server_hostname, https_compatible=True
        )
        with _mapped(
            trio.BrokenResourceError, timeout, httpcore.ConnectError, httpcore.ConnectTimeout
        ):
            await stream.do_handshake()
        return Stream(stream)

    def get_extra_info(self, info: str) -> object:
        if info == "is_readable" and isinstance(self._stream, trio.SocketStream):
            return trio_is_readable(self._stream.socket)
        return None


def trio_is_readable(sock: trio.socket.SocketType) -> bool:
    """Whether a read would not wait: for an idle connection, that the server has closed it."""
    probe = socket.socket(fileno=os.dup(sock.fileno()))
    with probe:
        try:
            probe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


@contextmanager
def _mapped(broken, timeout: float | None, as_error, as_timeout) -> Iterator[None]:
    """Bound a wait, and turn what trio raises into what httpcore raises."""
    try:
        with trio.fail_after(float("inf") if timeout is None else timeout):
            yield
    except trio.TooSlowError as error:
        raise as_timeout(f"nothing for {timeout:g} s") from error
    except broken as error:
        raise as_error(str(error.__cause__ or error) or type(error).__name__) from error
