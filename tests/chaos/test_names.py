"""The name server of the suite, asked as a resolver asks."""

from __future__ import annotations

import socket
import struct

import pytest

from .names import answer

ADDRESSES = ["10.77.0.3", "10.77.0.4"]


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return (
        struct.pack("!HHHHHH", 4711, 0x0100, 1, 0, 0, 0)
        + labels
        + b"\0"
        + struct.pack("!HH", kind, 1)
    )


def test_the_addresses_of_a_name() -> None:
    asked = query("origins.chaos.test")
    reply = answer(asked, {"origins": ADDRESSES})

    assert reply is not None
    number, flags, questions, answers, *_ = struct.unpack_from("!HHHHHH", reply)
    assert (number, flags & 0x800F, questions, answers) == (4711, 0x8000, 1, 2)
    records = reply[len(asked) :]
    assert [socket.inet_ntoa(records[at + 12 : at + 16]) for at in (0, 16)] == ADDRESSES


def test_a_name_has_no_address_of_another_family() -> None:
    reply = answer(query("origins.chaos.test", kind=28), {"origins": ADDRESSES})
    assert reply is not None
    assert struct.unpack_from("!HHHHHH", reply)[3] == 0
    assert reply[3] & 0x0F == 0


@pytest.mark.parametrize(
    ("known", "code"), [({"origins": "nothing"}, 3), ({"origins": "failure"}, 2), ({}, 3)]
)
def test_a_name_that_does_not_resolve(known, code) -> None:
    reply = answer(query("origins.chaos.test"), known)
    assert reply is not None
    assert reply[3] & 0x0F == code


def test_silence() -> None:
    assert answer(query("origins.chaos.test"), {"origins": "silence"}) is None
    assert answer(query("origins.example.org"), {"origins": ADDRESSES}) is not None
