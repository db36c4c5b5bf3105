"""Content digests in the OCI form ``algorithm:hex``."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import TYPE_CHECKING, Final

import attrs

from swarmpull.errors import InvalidDigest

if TYPE_CHECKING:
    from hashlib import _Hash

# The two algorithms that the OCI image specification registers, with the length of their hex form.
_HEX_LENGTHS: Final = {"sha256": 64, "sha512": 128}
# Digests that were parsed last, some 400 bytes each.  A process speaks of the same few again and again, and
# the same object is found in a dictionary without comparing fields: an announce does so six times.
_PARSED_MAX: Final = 4096
_GRAMMAR: Final = re.compile(r"(sha256|sha512):([0-9a-f]+)", re.ASCII)


@attrs.frozen(order=True, cache_hash=True)
class Digest:
    """The name of a blob: a hash algorithm and the lower-case hex of the hash of its content.

    Build one with :meth:`parse` or :meth:`of`; both only make digests that are well formed, so a
    ``Digest`` in hand is always safe to use in a path or a key.
    """

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Parse ``sha256:<64 hex digits>`` or ``sha512:<128 hex digits>``.

        Raises:
            InvalidDigest: when the text is anything else.
        """
        return _parse(text)

    @classmethod
    def of(cls, content: bytes | bytearray | memoryview, algorithm: str = "sha256") -> Digest:
        """The digest of bytes that are already in memory."""
        return cls(algorithm, hashlib.new(algorithm, content).hexdigest())

    def hasher(self) -> _Hash:
        """A fresh hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@functools.lru_cache(_PARSED_MAX)
def _parse(text: str) -> Digest:
    match = _GRAMMAR.fullmatch(text)
    if match is None or len(match[2]) != _HEX_LENGTHS[match[1]]:
        raise InvalidDigest(text)
    return Digest(match[1], match[2])
