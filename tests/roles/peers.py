"""Hosts of a swarm on loopback, and a peer that does what a test tells it to."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from swarmpull.config import Address, PeerListenerConfig, SwarmConfig
from swarmpull.digest import Digest
from swarmpull.errors import ProtocolError
from swarmpull.roles.swarm_host import AnnounceHeld, SwarmHost, open_swarm_host
from swarmpull.store.blobs import BlobStore, open_store
from swarmpull.store.hashing import hash_piece
from swarmpull.swarm import bitfield
from swarmpull.swarm.messages import Bye, Claim, Hello, Message, Offer, PieceChunk, Want
from swarmpull.swarm.metainfo import Metainfo, piece_length_for
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import AnnounceReply, AnnounceRequest, WatchReply, WatchRequest
from swarmpull.wire.peer import pack_chunk_header
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream
from swarmpull.wire.tls import Tls

# Seconds for any test that runs a host.
DEADLINE = 300.0
LOOPBACK = PeerListenerConfig(listen=Address("127.0.0.1", 0), advertise="127.0.0.1")
GONE = (
    OSError,
    trio.EndOfChannel,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    ProtocolError,
)


@attrs.frozen
class Content:
    """A blob in memory, with all that is to know of it."""

    data: bytes = attrs.field(repr=False)
    metainfo: Metainfo

    @property
    def digest(self) -> Digest:
        return self.metainfo.digest

    def piece(self, index: int) -> bytes:
        start = self.metainfo.piece_offset(index)
        return self.data[start : start + self.metainfo.piece_size(index)]


def make_content(length: int, *, seed: int = 0, digest: Digest | None = None) -> Content:
    """``digest``: another than its own, as in metainfo that is wrong."""
    data = random.Random(seed).randbytes(length)
    step = piece_length_for(length)
    hashes = b"".join(hash_piece(data[start : start + step]) for start in range(0, length, step))
    return Content(data, Metainfo(digest or Digest.of(data), length, step, hashes))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def assert_no_descriptor_leaked(before: int) -> None:
    """A worker thread that is still at its last job may close what it has for a moment longer."""
    patience = time.monotonic() + 30
    while open_descriptors() > before and time.monotonic() < patience:
        time.sleep(0.01)
    assert open_descriptors() <= before, "descriptors leaked"


def reasons(logs: list[dict]) -> list[str]:
    """Why peer connections ended, of captured logs."""
    return [entry["reason"] for entry in logs if entry["event"] == "peer_connection_ended"]


@attrs.define
class Node:
    """A host of the swarm, with its store."""

    host: SwarmHost
    store: BlobStore

    @property
    def contact(self) -> PeerContact:
        return self.host.contact

    @property
    def buffered(self) -> int:
        return self.host._buffers.taken

    @property
    def connections(self) -> int:
        return len(self.host._connections)

    def received(self) -> dict[str, int]:
        """Bytes of pieces received and stored, by kind of sender."""
        return self.host.metrics.received_by_source()[1]

    async def add(self, content: Content) -> None:
        async with self.store.create() as writer:
            await writer.write(content.data)
            await writer.commit(content.digest)

    async def seed(self, content: Content) -> None:
        await self.add(content)
        self.host.seed(content.metainfo, "")

    async def stored(self, content: Content) -> bool:
        with self.store.open(content.digest) as handle:
            if not handle.length:
                return content.data == b""
            return await handle.read_at(0, handle.length) == content.data


@asynccontextmanager
async def running_node(
    root: Path,
    *,
    kind: PeerKind = PeerKind.AGENT,
    config: SwarmConfig | None = None,
    announce: Callable[[AnnounceRequest], Awaitable[AnnounceReply]] | None = None,
    announce_held: AnnounceHeld | None = None,
    watch: Callable[[WatchRequest], Awaitable[WatchReply]] | None = None,
    unread_timeout: float = math.inf,
    tls: Tls | None = None,
) -> AsyncIterator[Node]:
    with trio.fail_after(DEADLINE):
        async with (
            open_store(root, name=root.name) as store,
            open_swarm_host(
                store,
                kind,
                LOOPBACK,
                config or SwarmConfig(),
                Metrics(),
                announce=announce,
                announce_held=announce_held,
                watch=watch,
                unread_timeout=unread_timeout,
                tls=tls,
            ) as host,
        ):
            yield Node(host, store)


@asynccontextmanager
async def swarm_host_over(
    root: Path,
) -> AsyncIterator[tuple[BlobStore, Callable[..., AbstractAsyncContextManager[SwarmHost]]]]:
    """A store, and a way to open hosts over it, on a free port or a given one."""

    def open_host(port: int = 0) -> AbstractAsyncContextManager[SwarmHost]:
        listen = attrs.evolve(LOOPBACK, listen=Address("127.0.0.1", port))
        return open_swarm_host(store, PeerKind.AGENT, listen, SwarmConfig(), Metrics())

    with trio.fail_after(DEADLINE):
        async with open_store(root, name="store") as store:
            yield store, open_host


@attrs.define
class Finder:
    """Stands for the tracker: answers with metainfo and peers, or with an error."""

    metainfo: Metainfo
    peers: tuple[PeerContact, ...] = ()
    error: Exception | None = None
    gate: trio.Event | None = None
    calls: int = 0

    async def find(self, request: AnnounceRequest) -> AnnounceReply:
        self.calls += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return AnnounceReply(self.peers, 60.0, self.metainfo)


async def fetch(node: Node, content: Content, *peers: PeerContact) -> None:
    """Download a blob from peers, until it is in the store."""
    finder = Finder(content.metainfo, peers)
    download = await node.host.download(content.digest, "", finder.find)
    await download.wait()


Script = Callable[["ScriptedPeer", PeerStream], Awaitable[None]]


class ScriptedPeer:
    """A peer that says Hello and then follows a script, on each connection.

    Attributes:
        said: what the other side said, in order.
        connections: how many there were.
        goodbyes: why the other side left.
        ended: set when the other side has left.
    """

    def __init__(
        self, content: Content, script: Script, *, number: int = 1, have: int | None = None
    ) -> None:
        self.content = content
        self.script = script
        self.have = bitfield.full(content.metainfo.piece_count) if have is None else have
        self.peer_id = f"{number:032x}"
        self.contact = PeerContact(self.peer_id, "127.0.0.1", 0, PeerKind.AGENT)
        self.hello = self.make_hello()
        self.said: list[Message] = []
        self.connections = 0
        self.goodbyes: list[Bye] = []
        self.ended = trio.Event()

    def make_hello(self, **changes: object) -> Hello:
        metainfo = self.content.metainfo
        hello = Hello(
            digest=metainfo.digest,
            namespace="",
            peer_id=self.peer_id,
            kind=PeerKind.AGENT,
            port=1,
            piece_count=metainfo.piece_count,
            have=bitfield.to_bytes(self.have, metainfo.piece_count),
        )
        return attrs.evolve(hello, **changes)

    async def serve(
        self,
        host: str = "127.0.0.1",
        *,
        task_status: trio.TaskStatus[PeerContact] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self._accept, 0, host=host))
            port = listeners[0].socket.getsockname()[1]
            self.contact = attrs.evolve(self.contact, host=host, port=port)
            task_status.started(self.contact)

    async def _accept(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        peer_stream = PeerStream(stream)
        try:
            self.said.append(await peer_stream.receive_hello())
            await peer_stream.send(self.hello)
            await self.script(self, peer_stream)
        except GONE:
            pass
        finally:
            self.ended.set()
            await peer_stream.aclose()

    async def dial(self, node: Node) -> PeerStream:
        """Connect to a node, say Hello, and get its answer."""
        stream = PeerStream(await trio.open_tcp_stream("127.0.0.1", node.contact.port))
        await stream.send(self.hello)
        self.said.append(await stream.receive_hello())
        return stream

    async def hear(self, stream: PeerStream) -> Message:
        """The next message of the other side."""
        message = await stream.receive()
        assert not isinstance(message, PieceChunk)
        self.said.append(message)
        if isinstance(message, Bye):
            self.goodbyes.append(message)
        return message

    async def hear_claim(self, stream: PeerStream) -> int:
        """Offer a slot whenever the other side wants one, until it claims a piece."""
        while True:
            message = await self.hear(stream)
            if isinstance(message, Want):
                await stream.send(Offer())
            elif isinstance(message, Claim):
                return message.index

    async def claim(self, stream: PeerStream, index: int) -> Offer:
        """Want, wait for the offer, and claim; not while a piece is under way."""
        await stream.send(Want())
        offer = await self.hear_offer(stream)
        await stream.send(Claim(index))
        return offer

    async def hear_offer(self, stream: PeerStream) -> Offer:
        while True:
            message = await self.hear(stream)
            if isinstance(message, Offer):
                return message

    async def listen(self, stream: PeerStream) -> None:
        """Hear everything until the other side leaves."""
        while not isinstance(await self.hear(stream), Bye):
            pass

    async def send_bytes(
        self, stream: PeerStream, index: int, data: bytes, *, offset: int = 0
    ) -> None:
        """Send bytes of a piece in chunks, whatever they are."""
        for start in range(0, len(data), CHUNK_BYTES_MAX):
            part = data[start : start + CHUNK_BYTES_MAX]
            header = pack_chunk_header(PieceChunk(index, offset + start, len(part)))
            await stream._stream.send_all(header + part)

    async def honest(self, stream: PeerStream) -> None:
        """Offer to everybody who wants, and serve every claim."""
        while True:
            index = await self.hear_claim(stream)
            await self.send_bytes(stream, index, self.content.piece(index))


async def honestly(peer: ScriptedPeer, stream: PeerStream) -> None:
    await peer.honest(stream)


Hear = Callable[[Message], Awaitable[None]]


async def receive_piece(
    stream: PeerStream, size: int, index: int = -1, *, hear: Hear | None = None
) -> bytes:
    """Take one whole piece off a connection; ``hear`` gets the messages between its chunks."""
    piece = bytearray()
    while len(piece) < size:
        message = await stream.receive()
        if isinstance(message, PieceChunk):
            assert index in (-1, message.index)
            part = bytearray(message.length)
            await stream.receive_into(memoryview(part))
            piece += part
        elif isinstance(message, Bye):
            raise AssertionError(f"the piece did not come: {message}")
        elif hear is not None:
            await hear(message)
    return bytes(piece)


async def until(condition: Callable[[], bool]) -> None:
    """Return when something is so; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await trio.sleep(0.005)
