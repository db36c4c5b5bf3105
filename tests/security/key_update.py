"""The first half of a KEY_UPDATE of TLS 1.3, made by hand: no library sends it."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_HANDSHAKE = b"\x16"
# The head of a message of one byte, without that byte (RFC 8446, section 4.6.3).
_HEAD = b"\x18\x00\x00\x01"


def half_key_update(key_log: Path, number: int) -> bytes:
    """A record of the client, the ``number``th since the handshake, from 0 on.

    ``key_log``: what `ssl.SSLContext.keylog_filename` wrote about this connection; of TLS_AES_256_GCM_SHA384.
    """
    lines = [line.split() for line in key_log.read_text().splitlines()]
    [secret] = [bytes.fromhex(words[2]) for words in lines if words[0] == "CLIENT_TRAFFIC_SECRET_0"]
    inner = _HEAD + _HANDSHAKE
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    iv = int.from_bytes(_expand(secret, b"iv", 12), "big") ^ number
    return header + AESGCM(_expand(secret, b"key", 32)).encrypt(
        iv.to_bytes(12, "big"), inner, header
    )


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label (RFC 8446, section 7.1) for no more than one block."""
    label = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
    return hmac.digest(secret, info + b"\x01", hashlib.sha384)[:size]
