"""The blob that a benchmark moves: random bytes, so that nothing on the way can compress them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

BLOCK_BYTES: Final = 4 << 20


def write_random(file: Path, size: int) -> str:
    """Fill a file with random bytes; returns their digest."""
    hasher, left = hashlib.sha256(), size
    with file.open("wb") as output:
        while left:
            block = os.urandom(min(left, BLOCK_BYTES))
            hasher.update(block)
            output.write(block)
            left -= len(block)
    return f"sha256:{hasher.hexdigest()}"


def file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
