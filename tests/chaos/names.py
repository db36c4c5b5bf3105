"""A name server whose answers a scenario changes, and hosts that ask it."""

from __future__ import annotations

import shutil
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import trio

from .network import Host
from .sockets import inside

DOMAIN: Final = "chaos.test"
PORT: Final = 53
# Where ip-netns(8) looks for files that take the place of those in /etc.
ETC: Final = Path("/etc/netns")
# RFC 1035
_HEADER: Final = struct.Struct("!HHHHHH")
_TYPE_A: Final = 1
_ANSWERED: Final = 0x8580
_SERVER_FAILURE: Final = 2
_NO_SUCH_NAME: Final = 3
_QUERY_BYTES_MAX: Final = 512


class NameServer:
    """Answers for ``origins.chaos.test`` and the like over UDP.

    Attributes:
        answers: addresses by the first label; a text instead is how it fails: nothing, failure or silence.
    """

    def __init__(self, host: Host) -> None:
        self.answers: dict[str, list[str] | str] = {}
        self._host = host
        self._written: list[Path] = []

    def serve_hosts(self, hosts: Iterable[Host]) -> None:
        """Have processes that are started on these hosts ask this server."""
        for host in hosts:
            assert host.namespace is not None, "names need namespaces"
            directory = ETC / host.namespace
            self._written.append(directory)
            directory.mkdir(parents=True)
            text = f"nameserver {self._host.address}\noptions timeout:1 attempts:2\n"
            (directory / "resolv.conf").write_text(text)

    def close(self) -> None:
        """Remove what was written."""
        while self._written:
            shutil.rmtree(self._written.pop(), ignore_errors=True)

    async def run(self) -> None:
        with inside(self._host.namespace):
            opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with trio.socket.from_stdlib_socket(opened) as sock:
            await sock.bind((self._host.address, PORT))
            while True:
                query, sender = await sock.recvfrom(_QUERY_BYTES_MAX)
                reply = answer(query, self.answers)
                if reply is not None:
                    await sock.sendto(reply, sender)


def answer(query: bytes, answers: dict[str, list[str] | str]) -> bytes | None:
    """The reply to a query of one question; None when none is to be sent.

    Raises ValueError for what is not a query; only our own processes ask.
    """
    number, _, questions, *_ = _HEADER.unpack_from(query)
    if questions != 1:
        raise ValueError(f"a query with {questions} questions")
    labels, at = [], _HEADER.size
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode().lower())
        at += 1 + length
    (kind,) = struct.unpack_from("!H", query, at + 1)
    question = query[_HEADER.size : at + 5]
    known = answers.get(labels[0]) if ".".join(labels[1:]) == DOMAIN else "nothing"
    if known == "silence":
        return None
    if known == "failure":
        return _HEADER.pack(number, _ANSWERED | _SERVER_FAILURE, 1, 0, 0, 0) + question
    if known is None or isinstance(known, str):
        return _HEADER.pack(number, _ANSWERED | _NO_SUCH_NAME, 1, 0, 0, 0) + question
    found = known if kind == _TYPE_A else []
    # Each answer points back to the name in the question, and may be kept for no time.
    records = b"".join(
        struct.pack("!HHHLH", 0xC000 | _HEADER.size, _TYPE_A, 1, 0, 4) + socket.inet_aton(address)
        for address in found
    )
    return _HEADER.pack(number, _ANSWERED, 1, len(found), 0, 0) + question + records
