"""Announces at one tracker process, by thousands of agents that each have a connection of their own.

    python -m benchmarks.announces [--agents 10000] [--torrents 20] [--blobs 20] [--rates 1000,3000,5000]

The agents are sockets of this process, which sends at fixed times whatever the tracker does, and counts the
time of an answer from when its announce was due: a tracker that stalls is charged for everybody who waits.
What this process takes of the processor itself is shown beside it, and is no part of what the tracker takes.
Three kinds of messages: *seeding*, of hosts that have one blob and hear of nobody; *held*, of hosts that have
many and say so in one message, which is what a cluster at rest sends; and *leeching*, of hosts that are
fetching a blob and hear of 50 peers, which is what a burst sends.
After those rates come as many messages as are answered with so many always under way: what it bears.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import random
import resource
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from benchmarks.machine import load_average, machine
from benchmarks.processes import Server, Usage
from benchmarks.pull import free_ports, get
from benchmarks.rpc_socket import RpcSocket, numbered
from swarmpull.digest import Digest
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.wire import api
from swarmpull.wire.codec import decode, encode
from swarmpull.wire.rpc_messages import (
    RpcRequest,
    pack,
)

MIB: Final = 1 << 20
HELD: Final = "held"
STATES: Final = {
    "seeding": AnnounceState.COMPLETE,
    HELD: AnnounceState.COMPLETE,
    "leeching": AnnounceState.LEECHING,
}
# Messages of many blobs are sent so many times more seldom than others.
HELD_RATE: Final = 10.0
# For as many seconds as the other runs, at most, if the tracker answered so many.
CLOSED_RATE: Final = 5000.0
# Messages under way at a time when it is found out what the tracker bears.
UNDER_WAY: Final = 64
# Connections that wait to be accepted at the same time; the tracker's backlog is longer.
CONNECTING_MAX: Final = 64
ANSWER_SECONDS_MAX: Final = 60.0
# A process needs a few descriptors besides those of its connections.
DESCRIPTORS_SPARE: Final = 200


@attrs.frozen
class Measured:
    """One rate: messages per second wanted and answered, seconds of waiting, what the tracker used.

    ``blobs`` are announced by one message; ``rate`` is infinite when as many were sent as were answered;
    ``load`` are the CPU seconds of the agents.
    """

    kind: str
    blobs: int
    rate: float
    answered: float
    waits: Sequence[float] = attrs.field(repr=False)
    usage: Usage
    load: float

    def quantile(self, share: float) -> float:
        return sorted(self.waits)[min(int(len(self.waits) * share), len(self.waits) - 1)]


class Agent(RpcSocket):
    """One host: a connection to the tracker, and the announce that it repeats."""

    def __init__(
        self, number: int, port: int, digests: Sequence[Digest], rng: random.Random
    ) -> None:
        # An address of its own: a peer replaces the former one at its address.
        host = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        self._peer = PeerContact(rng.randbytes(16).hex(), host, 7100, PeerKind.AGENT)
        self._digests = digests
        self._announce = b""
        super().__init__("tracker", port, ANSWER_SECONDS_MAX)

    def shake_hands(self) -> None:
        super().shake_hands()
        self.socket.setblocking(False)

    def become(self, kind: str) -> None:
        digest, timeout = self._digests[0], int(ANSWER_SECONDS_MAX * 1000)
        name = api.ANNOUNCE.name
        body = encode(api.AnnounceRequest(digest, "library/app", self._peer, STATES[kind]))
        if kind == HELD:
            name = api.ANNOUNCE_HELD.name
            body = encode(api.AnnounceHeldRequest(self._peer, tuple(self._digests)))
        self._announce = pack(RpcRequest(0, timeout, name, body))

    def announce(self, number: int) -> None:
        """Send it as request ``number``; the socket's buffer holds many of them."""
        sent = self.socket.send(numbered(self._announce, number))
        if sent != len(self._announce):
            raise RuntimeError(
                "the tracker reads so slowly that an announce did not fit the socket"
            )


class Bench:
    """A tracker process and the agents that are connected to it."""

    def __init__(self, directory: Path, agents: int, torrents: int, blobs: int) -> None:
        ports = free_ports()
        rpc, self._admin = next(ports), next(ports)
        command = [sys.executable, "-m", "swarmpull", "run", "--role", "tracker"]
        command += ["--data-dir", str(directory), "-o", "cluster.origins=127.0.0.1:1"]
        command += ["-o", f"tracker.rpc.listen=127.0.0.1:{rpc}"]
        command += ["-o", f"tracker.admin.listen=127.0.0.1:{self._admin}"]
        self.tracker = Server("tracker", command, directory)
        self.tracker.wait_until(lambda: get(self._admin, "/health")[0] == 200, "it answers")
        self.tracker.begin()
        self.idle = self.tracker.end()
        rng = random.Random(1)
        digests = [Digest.of(b"blob %d" % number) for number in range(torrents)]
        self._agents: list[Agent] = []
        self._blobs = blobs
        for number in range(agents):
            first = number % torrents
            held = [digests[(first + more) % torrents] for more in range(blobs)]
            self._agents.append(Agent(number, rpc, held, rng))
            if number >= CONNECTING_MAX:
                self._agents[number - CONNECTING_MAX].shake_hands()
        for agent in self._agents[-CONNECTING_MAX:]:
            agent.shake_hands()
        self._poll = select.epoll()
        self._by_descriptor = {agent.socket.fileno(): agent for agent in self._agents}
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, select.EPOLLIN)
        rng.shuffle(self._agents)

    def stop(self) -> None:
        for agent in self._agents:
            agent.socket.close()
        self._poll.close()
        self.tracker.stop()

    def fill(self, kind: str) -> None:
        """Have every agent in the table in that state."""
        for agent in self._agents:
            agent.become(kind)
        self._run_closed(len(self._agents))

    def measure(self, kind: str, rate: float, seconds: float) -> Measured:
        """Announces at that rate for so many seconds, each agent in its turn."""
        self.tracker.begin()
        load = time.process_time()
        count = int(min(rate, CLOSED_RATE) * seconds)
        run = self._run_closed(count) if rate == math.inf else self._run(count, rate=rate)
        waits, took, last = run
        load = time.process_time() - load
        self._check(last, kind)
        blobs = self._blobs if kind == HELD else 1
        return Measured(kind, blobs, rate, len(waits) / took, waits, self.tracker.end(), load)

    def _run_closed(self, count: int) -> tuple[list[float], float, bytes]:
        """The same, with so many under way however long they take."""
        began = time.perf_counter()
        waits: list[float] = []
        sent_at: dict[int, float] = {}
        sent, last = 0, b""
        while len(waits) < count:
            while sent < count and sent - len(waits) < UNDER_WAY:
                sent_at[sent] = time.perf_counter()
                self._agents[sent % len(self._agents)].announce(sent)
                sent += 1
            ready = self._poll.poll(ANSWER_SECONDS_MAX)
            if not ready:
                raise RuntimeError(f"{count - len(waits)} announces were not answered")
            for descriptor, _ in ready:
                for reply in self._by_descriptor[descriptor].answers():
                    waits.append(time.perf_counter() - sent_at.pop(reply.id))
                    last = reply.body
        return waits, time.perf_counter() - began, last

    def _run(self, count: int, *, rate: float) -> tuple[list[float], float, bytes]:
        began = time.perf_counter()
        give_up_at = began + count / rate + ANSWER_SECONDS_MAX
        waits: list[float] = []
        sent, last = 0, b""
        while len(waits) < count:
            now = time.perf_counter()
            if now > give_up_at:
                raise RuntimeError(f"{count - len(waits)} announces were not answered")
            due = min(int((now - began) * rate) + 1, count)
            while sent < due:
                self._agents[sent % len(self._agents)].announce(sent)
                sent += 1
            next_at = began + sent / rate if sent < count else now + 1.0
            for descriptor, _ in self._poll.poll(max(0.0, next_at - time.perf_counter())):
                for reply in self._by_descriptor[descriptor].answers():
                    waits.append(time.perf_counter() - began - reply.id / rate)
                    last = reply.body
        return waits, time.perf_counter() - began, last

    def _check(self, body: bytes, kind: str) -> None:
        """Nobody counts answers that are none."""
        if kind == HELD:
            decode(body, api.AnnounceHeldReply)
            return
        peers = decode(body, api.AnnounceReply).peers
        if kind == "leeching" and not peers:
            raise RuntimeError("a leecher was told of nobody")
        status, metrics = get(self._admin, "/metrics")
        if status != 200 or b"swarmpull_tracker_announces_total" not in metrics:
            raise RuntimeError("the tracker does not count its announces")


@contextlib.contextmanager
def _running(directory: Path, agents: int, torrents: int, blobs: int) -> Iterator[Bench]:
    bench = Bench(directory, agents, torrents, blobs)
    # The agents are no part of what is measured: their process must not pause for its own garbage.
    gc.freeze()
    gc.disable()
    try:
        yield bench
    finally:
        bench.stop()


def report(agents: int, torrents: int, idle: Usage, rows: Sequence[Measured]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"{agents:,} agents in {torrents} torrents; {machine()}"
    yield ""
    heads = (
        "announces",
        "blobs in each",
        "per second",
        "answered per second",
        "p50, ms",
        "p99, ms",
        "CPU, us for each",
        "of the agents, us",
    )
    yield f"| {' | '.join(heads)} | peak RSS, MiB |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        cells = [
            row.kind,
            f"{row.blobs}",
            "all" if row.rate == math.inf else f"{row.rate:,.0f}",
            f"{row.answered:,.0f}",
            f"{statistics.median(row.waits) * 1000:.1f}",
            f"{row.quantile(0.99) * 1000:.1f}",
            f"{row.usage.cpu / len(row.waits) * 1e6:.0f}",
            f"{row.load / len(row.waits) * 1e6:.0f}",
            f"{(row.usage.memory or 0) / MIB:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"
    if idle.memory is not None and rows:
        grown = max(row.usage.memory or 0 for row in rows) - idle.memory
        yield ""
        yield f"{grown / agents / 1024:.1f} KiB for each agent, its connection included"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.announces", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--agents", type=int, default=10_000, metavar="N")
    parser.add_argument("--torrents", type=int, default=20, metavar="N")
    parser.add_argument(
        "--blobs", type=int, default=20, metavar="N", help="that each host has, of those torrents"
    )
    parser.add_argument("--kinds", default=",".join(STATES), metavar="KIND,KIND,...")
    parser.add_argument("--rates", default="1000,3000,5000,10000", metavar="N,N,...")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="SECONDS")
    arguments = parser.parse_args()
    rates = [*map(float, arguments.rates.split(",")), math.inf]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = arguments.agents + DESCRIPTORS_SPARE
    if hard != resource.RLIM_INFINITY and hard < wanted:
        parser.error(f"{wanted} descriptors are needed, this process may have {hard}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    rows: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        _running(Path(name), arguments.agents, arguments.torrents, arguments.blobs) as bench,
    ):
        for kind in arguments.kinds.split(","):
            bench.fill(kind)
            for rate in rates:
                # A message of many blobs takes the place of as many.
                wanted = rate if kind != HELD or rate == math.inf else rate / HELD_RATE
                rows.append(bench.measure(kind, wanted, arguments.seconds))
                print(f"{kind} at {wanted:,.0f}: load {load_average():.1f}", file=sys.stderr)
        idle = bench.idle
    print("\n".join(report(arguments.agents, arguments.torrents, idle, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
