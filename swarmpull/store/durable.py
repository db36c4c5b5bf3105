"""Blocking file operations whose effect survives a crash; call them in a thread.

A file is durable after three steps: its content is flushed, it is renamed into place, and the directory
that holds the new name is flushed.  A rename alone may reach the disk before the content does.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

Data = bytes | bytearray | memoryview


def sync_file(path: Path) -> None:
    """Flush the content and the length of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and the parents that it lacks; each new name is flushed."""
    try:
        path.mkdir()
    except FileExistsError:
        # FileNotFoundError from here: another process has just removed it, being empty.
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise
        return
    except FileNotFoundError:
        if path.parent.is_dir():
            raise  # a file system that makes no directories, such as /proc
        make_directory(path.parent)
        make_directory(path)
        return
    sync_directory(path.parent)


def publish(source: Path, target: Path) -> None:
    """Move a complete file to its name, replacing what is there; on return it survives a crash."""
    sync_file(source)
    make_directory(target.parent)
    source.rename(target)
    sync_directory(target.parent)


def write_all(descriptor: int, data: Data, offset: int) -> None:
    """Write all of ``data`` at ``offset``: one call may take less than it is given."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def write_file(path: Path, content: Data) -> None:
    """Make a file, which must not be there; three system calls less than `Path.write_bytes`.  Not flushed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, content, 0)
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    """Read ``size`` bytes at ``offset``.

    Raises:
        OSError: the file ends before; also when the read fails.
    """
    data = os.pread(descriptor, size, offset)
    if len(data) == size:
        return data
    # Linux reads at most 2 GiB less one page at a time, and a signal may shorten a read.
    parts = [data]
    got = len(data)
    while got < size:
        part = os.pread(descriptor, size - got, offset + got)
        if not part:
            raise end_of_file(offset + got)
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def drop_cached(descriptor: int) -> None:
    """Have the next read of a file come from the disk, as far as it is there."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def end_of_file(offset: int) -> OSError:
    """The error for a file that is shorter than it was when it was stored."""
    return OSError(errno.EIO, f"the file ends at {offset}: it was truncated")


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    path.unlink(missing_ok=True)
