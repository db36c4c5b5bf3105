"""A peer whose host is gone without a word, in a network namespace of this process alone.

``python -m tests.roles.vanishing CASE DIRECTORY`` prints as JSON what came of it.  The peer has an address
of its own, and it vanishes when that leads nowhere any more: nothing arrives there, no acknowledgement
comes back, and no FIN.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import structlog
import trio

from swarmpull.roles import peer_connections
from swarmpull.swarm import events as ev
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream

from .peers import Finder, ScriptedPeer, honestly, make_content, reasons, running_node, until

ADDRESS = "127.0.0.2"
DEAD_AFTER = 2.0
CONTENT = make_content(2 * PIECE_LENGTH_MIN + 12345)


async def vanish() -> None:
    command = ["ip", "route", "add", "unreachable", f"{ADDRESS}/32", "table", "local"]
    await trio.run_process(command)
    await trio.sleep_forever()


async def inside_a_piece(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    await peer.send_bytes(stream, index, CONTENT.piece(index)[:CHUNK_BYTES_MAX])
    await vanish()


async def before_it_offers(peer: ScriptedPeer, stream: PeerStream) -> None:
    await vanish()


async def while_it_receives(peer: ScriptedPeer, stream: PeerStream) -> None:
    await peer.claim(stream, 0)
    await stream.receive()
    await vanish()


async def download(directory: Path, script) -> dict[str, object]:
    """The peer that vanishes is the only one at first; then an honest one is found."""
    gone, honest = ScriptedPeer(CONTENT, script), ScriptedPeer(CONTENT, honestly, number=2)
    async with trio.open_nursery() as nursery, running_node(directory / "leecher") as node:
        contact = await nursery.start(partial(gone.serve, ADDRESS))
        find = Finder(CONTENT.metainfo, (contact,)).find
        pull = await node.host.download(CONTENT.digest, "", find)
        await until(lambda: node.connections == 1)
        node.host.dispatch(ev.PeersFound(CONTENT.digest, (await nursery.start(honest.serve),)))
        await pull.wait()
        await until(lambda: node.connections == 0)
        stored = await node.stored(CONTENT)
        buffered = node.buffered
        nursery.cancel_scope.cancel()
    return {"stored": stored, "buffered": buffered}


async def upload(directory: Path, script) -> dict[str, object]:
    """The peer that vanishes is the one that wants something."""
    gone = ScriptedPeer(CONTENT, script, have=0)
    async with trio.open_nursery() as nursery, running_node(directory / "seeder") as node:
        await node.seed(CONTENT)
        sock = trio.socket.socket()
        await sock.bind((ADDRESS, 0))
        await sock.connect(("127.0.0.1", node.contact.port))
        stream = PeerStream(trio.SocketStream(sock))
        await stream.send(gone.hello)
        await stream.receive_hello()
        nursery.start_soon(script, gone, stream)
        await until(lambda: node.connections == 1)
        await until(lambda: node.connections == 0)
        nursery.cancel_scope.cancel()
    return {}


async def main(case: str, directory: Path) -> None:
    await trio.run_process(["ip", "link", "set", "lo", "up"])
    peer_connections.DEAD_AFTER = DEAD_AFTER  # type: ignore[misc]
    cases = {
        "inside a piece that it sends": partial(download, directory, inside_a_piece),
        "before it offers anything": partial(download, directory, before_it_offers),
        "inside a piece that it receives": partial(upload, directory, while_it_receives),
        "while nothing goes on": partial(upload, directory, before_it_offers),
    }
    with structlog.testing.capture_logs() as logs:
        outcome = await cases[case]()
    sys.stdout.write(json.dumps(outcome | {"reasons": reasons(logs)}))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], Path(sys.argv[2]))
