"""A data directory belongs to one process: it holds a lock on the file ``lock`` in it; blocking."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from swarmpull.errors import StartupError
from swarmpull.store.durable import make_directory


def lock_directory(root: Path) -> int:
    """Make a directory if it is missing, and take its lock, which is held until the descriptor is closed.

    Raises:
        StartupError: another process has it, or it cannot be used.
    """
    try:
        make_directory(root)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unusable(root, error) from error
    try:
        _take(lock, root)
    except OSError as error:
        os.close(lock)
        raise unusable(root, error) from error
    except StartupError:
        os.close(lock)
        raise
    return lock


def _take(lock: int, root: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise StartupError(
            f"data directory {root} is in use by another process (pid {owner})",
            "stop that process, or give this one a data directory of its own",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)


def unusable(root: Path, error: OSError) -> StartupError:
    """The error for whoever named the directory."""
    return StartupError(
        f"data directory {root} cannot be used ({error.strerror or error})",
        "make it a directory that this user can write to, or configure another",
    )
