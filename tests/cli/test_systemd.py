"""What a service manager hears, on a socket as systemd makes one."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import structlog
import trio

from swarmpull.systemd import ServiceManager

SECONDS_MAX: Final = 60.0


class Listener:
    """The manager's end: datagrams, each a list of assignments."""

    def __init__(self, address: str | bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)

    def close(self) -> None:
        self._socket.close()

    def waiting(self) -> list[str]:
        """What has been said so far."""
        said = []
        while select.select([self._socket], [], [], 0)[0]:
            said += self._socket.recv(4096).decode().split("\n")
        return said

    def hear(self, wanted: str) -> list[str]:
        """Wait for a message that has this assignment; returns all of that message."""
        end = time.monotonic() + SECONDS_MAX
        while (left := end - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left)[0]:
                message = self._socket.recv(4096).decode().split("\n")
                if wanted in message:
                    return message
        raise AssertionError(f"waited in vain for {wanted}")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    opened = Listener(str(tmp_path / "notify"))
    yield opened
    opened.close()


def manager(tmp_path: Path, **variables: str) -> ServiceManager:
    return ServiceManager.of({"NOTIFY_SOCKET": str(tmp_path / "notify"), **variables})


def test_ready_and_stopping_are_said_with_what_is_done(tmp_path: Path, listener: Listener) -> None:
    told = manager(tmp_path)
    told.ready("serving: agent")
    assert listener.waiting() == ["READY=1", "STATUS=serving: agent"]
    told.status("draining: agent")
    assert listener.waiting() == ["STATUS=draining: agent"]
    told.stopping("draining: agent", 12.5)
    assert listener.waiting() == [
        "STOPPING=1",
        "STATUS=draining: agent",
        "EXTEND_TIMEOUT_USEC=12500000",
    ]


def test_an_abstract_socket_will_do() -> None:
    name = f"swarmpull-test-{os.getpid()}"
    opened = Listener(f"\0{name}")
    try:
        ServiceManager.of({"NOTIFY_SOCKET": f"@{name}"}).ready("serving")
        assert opened.waiting() == ["READY=1", "STATUS=serving"]
    finally:
        opened.close()


def test_without_a_manager_nothing_is_said() -> None:
    with structlog.testing.capture_logs() as logs:
        ServiceManager.of({}).ready("serving")
        ServiceManager.of({"WATCHDOG_USEC": "1000000"}).ready("serving")
    assert logs == []
    assert ServiceManager.of({"WATCHDOG_USEC": "1000000"}).watchdog is None


def test_a_socket_of_a_kind_that_is_unknown_is_left_alone() -> None:
    with structlog.testing.capture_logs() as logs:
        assert ServiceManager.of({"NOTIFY_SOCKET": "vsock:2:1234"}).address == ""
    assert [entry["event"] for entry in logs] == ["service_manager_unknown"]


def test_a_manager_that_is_gone_is_missed_once(tmp_path: Path) -> None:
    told = manager(tmp_path)
    with structlog.testing.capture_logs() as logs:
        told.ready("serving")
        told.status("still serving")
    assert [(entry["event"], entry["reason"]) for entry in logs] == [
        ("service_manager_not_told", "ENOENT")
    ]
    back = Listener(str(tmp_path / "notify"))
    try:
        told.status("serving on")
        assert back.waiting() == ["STATUS=serving on"]
    finally:
        back.close()


def test_a_manager_that_does_not_read_stops_nobody(tmp_path: Path, listener: Listener) -> None:
    told = manager(tmp_path)
    with structlog.testing.capture_logs() as logs:
        for _ in range(100_000):
            told.status("x" * 1000)
            if logs:
                break
    assert [entry["reason"] for entry in logs] == ["EAGAIN"]


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_signs_of_life_are_wanted_by(tmp_path: Path, variables, interval: float | None) -> None:
    assert manager(tmp_path, **variables).watchdog == interval


async def test_signs_of_life_come_from_the_event_loop(
    tmp_path: Path, listener: Listener, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(10):
        await manager(tmp_path, WATCHDOG_USEC="4000000").feed_watchdog()
    # At 0, 2, 4, 6 and 8 s, and perhaps at 10.
    assert 5 <= listener.waiting().count("WATCHDOG=1") <= 6


async def test_without_a_watchdog_there_is_nothing_to_feed(
    tmp_path: Path, listener: Listener
) -> None:
    await manager(tmp_path).feed_watchdog()
    assert listener.waiting() == []


def test_a_role_tells_its_manager_how_it_is(tmp_path: Path, listener: Listener) -> None:
    command = [sys.executable, "-m", "swarmpull", "run", "--role", "tracker"]
    for setting in (
        "cluster.origins=127.0.0.1:1",
        "tracker.rpc.listen=127.0.0.1:0",
        "tracker.admin.listen=127.0.0.1:0",
        "drain_timeout=7s",
    ):
        command += ["-o", setting]
    process = subprocess.Popen(
        command,
        env={
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "200000",
        },
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "STATUS=serving: tracker" in listener.hear("READY=1")
        listener.hear("WATCHDOG=1")
        # An event loop that stands still is one that gives no sign.
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        listener.waiting()
        assert not select.select([listener._socket], [], [], 1.0)[0]
        process.send_signal(signal.SIGCONT)
        listener.hear("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        message = listener.hear("STOPPING=1")
        assert "STATUS=draining: tracker" in message
        # The drain, and what cannot be cancelled.
        assert "EXTEND_TIMEOUT_USEC=12000000" in message
        _, said = process.communicate(timeout=SECONDS_MAX)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
