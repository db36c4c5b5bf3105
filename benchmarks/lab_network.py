"""Hosts that are not there: network namespaces on a bridge, with links of a given rate.

The bridge is in a namespace of its own, so nothing changes in the one of the machine.  Each host has one
interface whose two directions are shaped by a token bucket filter (tc-tbf(8)) each: that on the host's
side is its uplink, that on the bridge's side its downlink.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

# Where ip(8) keeps the names of namespaces.
NAMESPACES: Final = Path("/run/netns")
SUBNET: Final = ipaddress.ip_network("10.77.0.0/16")
COMMAND_SECONDS_MAX: Final = 30
# A bucket has to hold what its rate brings between two ticks of the kernel's timer, 10 ms at the worst.
BURST_BYTES_MIN: Final = 256 << 10
TICKS_PER_SECOND: Final = 100
# How long a full queue before the bucket is, in milliseconds.
QUEUE_MILLISECONDS: Final = 50
# Of each Ethernet frame of 1,514 bytes, all of which a bucket counts, TCP with timestamps carries these.
PAYLOAD_SHARE: Final = 1448 / 1514
RATE_UNITS: Final = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


def parse_rate(text: str) -> int:
    """Bits per second in text such as ``200mbit``, as tc(8) writes them.  Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,6})(kbit|mbit|gbit)", text.strip().lower())
    if match is None or not int(match[1]):
        raise ValueError(f"must be a rate such as 200mbit or 1gbit: {text!r}")
    return int(match[1]) * RATE_UNITS[match[2]]


def payload_rate(rate: int) -> float:
    """Bytes per second that TCP carries over a link of ``rate`` bits per second."""
    return rate / 8 * PAYLOAD_SHARE


@attrs.frozen
class Namespace:
    """A host: its name, the namespace it lives in, and its address (loopback if it has no link)."""

    name: str
    namespace: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs ``command`` on this host; the process has the same id as the one that is started."""
        return ["ip", "netns", "exec", self.namespace, *command]


class Network:
    """The namespaces of one run; their names begin with ``swarmpull-`` and the id of this process."""

    def __init__(self) -> None:
        self._prefix = f"swarmpull-{os.getpid()}"
        self._bridge = ""
        self._namespaces: list[str] = []
        self._addresses = SUBNET.hosts()
        self._ports = 0
        # Of each host on the bridge: its namespace, and the name of the bridge's end of its link.
        self._links: dict[str, tuple[str, str]] = {}

    def add_alone(self, name: str) -> Namespace:
        """A host with nothing but its loopback interface."""
        return Namespace(name, self._add_namespace(name), "127.0.0.1")

    def add(self, name: str, rate: int) -> Namespace:
        """A host on the bridge with a link of ``rate`` bits per second in each direction."""
        self._require_bridge()
        namespace, address = self._add_namespace(name), str(next(self._addresses))
        self._ports += 1
        port = f"p{self._ports}"
        ends = ["eth0", "netns", namespace, "type", "veth"]
        run("ip", "link", "add", *ends, "peer", "name", port, "netns", self._bridge)
        run("ip", "-n", self._bridge, "link", "set", port, "master", "br0", "up")
        mask = f"{address}/{SUBNET.prefixlen}"
        run("ip", "-n", namespace, "addr", "add", mask, "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        self._links[name] = (namespace, port)
        self._shape(name, "add", rate)
        return Namespace(name, namespace, address)

    def set_rate(self, name: str, rate: int) -> None:
        """Give the link of a host on the bridge another rate, in both directions."""
        self._shape(name, "change", rate)

    def _shape(self, name: str, verb: str, rate: int) -> None:
        namespace, port = self._links[name]
        for where, device in ((namespace, "eth0"), (self._bridge, port)):
            run("tc", "-n", where, "qdisc", verb, "dev", device, "root", *_bucket(rate))

    def close(self) -> None:
        """Remove all namespaces, and with them all links; end what still runs in them."""
        failed = []
        while self._namespaces:
            namespace = self._namespaces.pop()
            try:
                _remove(namespace)
            except RuntimeError as error:
                failed.append(str(error))
        if failed:
            raise RuntimeError("\n".join(failed))

    def _require_bridge(self) -> None:
        if not self._bridge:
            self._bridge = self._add_namespace("bridge")
            run("ip", "-n", self._bridge, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self._bridge, "link", "set", "br0", "up")

    def _add_namespace(self, name: str) -> str:
        namespace = f"{self._prefix}-{name}"
        # Noted first: an interruption in between must not leave it behind.
        self._namespaces.append(namespace)
        run("ip", "netns", "add", namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        return namespace


@contextmanager
def open_network() -> Iterator[Network]:
    """A network that is gone afterwards."""
    network = Network()
    try:
        yield network
    finally:
        network.close()


def run(*command: str) -> str:
    """Run a command of the system; returns what it prints.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _remove(namespace: str) -> None:
    """Remove a namespace if there is one.

    Processes are left in it only if this one was interrupted between starting them and noting it.
    """
    if not (NAMESPACES / namespace).exists():
        return
    for pid in run("ip", "netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    run("ip", "netns", "del", namespace)


def _bucket(rate: int) -> list[str]:
    burst = max(BURST_BYTES_MIN, rate // 8 // TICKS_PER_SECOND)
    return [
        *("tbf", "rate", f"{rate}bit", "burst", str(burst)),
        *("latency", f"{QUEUE_MILLISECONDS}ms"),
    ]
