"""What a service manager wants to hear: sd_notify(3), as datagrams to ``$NOTIFY_SOCKET``.

Without that variable nothing is sent, so the program behaves the same wherever it runs.  A message that
cannot be sent is logged and otherwise without effect: the manager has its own time limits.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import Final

import attrs
import structlog
import trio

_log = structlog.get_logger(__name__)

# sd_watchdog_enabled(3): half of what the manager waits for.
_WATCHDOG_SHARE: Final = 0.5
_MICROSECONDS: Final = 1_000_000


@attrs.define(eq=False)
class ServiceManager:
    """The manager of this process, if it has one.

    Attributes:
        address: of its socket; empty if it has none.
        watchdog: seconds between two signs of life that it wants, None if it wants none.
    """

    address: str
    watchdog: float | None = None
    _is_silent: bool = attrs.field(default=False, init=False)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> ServiceManager:
        """The manager that the environment names.

        A watchdog is for the process that ``WATCHDOG_PID`` names: not for one that inherited the variable.
        """
        address = environ.get("NOTIFY_SOCKET", "")
        if address and address[0] not in "/@":
            _log.warning("service_manager_unknown", notify_socket=address)
            address = ""
        if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return cls(address)
        wanted = environ.get("WATCHDOG_USEC", "")
        if not address or not wanted.isascii() or not wanted.isdecimal() or not int(wanted):
            return cls(address)
        return cls(address, int(wanted) / _MICROSECONDS * _WATCHDOG_SHARE)

    def ready(self, status: str) -> None:
        """Everything serves."""
        self._send("READY=1", f"STATUS={status}")

    def stopping(self, status: str, seconds: float) -> None:
        """The end has begun, and takes ``seconds`` at most: the manager should wait for so long."""
        microseconds = round(seconds * _MICROSECONDS)
        self._send("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={microseconds}")

    def status(self, status: str) -> None:
        """What the process is doing, in a line for ``systemctl status``."""
        self._send(f"STATUS={status}")

    async def feed_watchdog(self) -> None:
        """Give signs of life until cancelled.

        They come from the event loop, so that one which hangs gives none.
        """
        while self.watchdog is not None:
            self._send("WATCHDOG=1")
            await trio.sleep(self.watchdog)

    def _send(self, *assignments: str) -> None:
        if not self.address:
            return
        # An abstract name begins with a zero byte instead of the "@".
        address = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        try:
            # A socket for each message: the manager may have been restarted since the last one.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # It must not stop the event loop that nobody reads what we say.
                sock.setblocking(False)
                sock.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            if not self._is_silent:
                name = errno.errorcode.get(error.errno or 0, str(error))
                _log.warning("service_manager_not_told", socket=self.address, reason=name)
            self._is_silent = True
        else:
            self._is_silent = False
