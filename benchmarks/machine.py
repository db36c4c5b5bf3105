"""On what a benchmark ran, for the head of its report."""

from __future__ import annotations

import mmap
import os
import platform
from pathlib import Path


def machine() -> str:
    """Processors, kernel and Python."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    python = platform.python_version()
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {python}"


def load_average() -> float:
    """Processes that ran or wanted to, on average over the last minute."""
    return os.getloadavg()[0]


def touch_memory(size: int) -> None:
    """Touch ``size`` bytes of memory once, and give them back.

    A virtual machine gets its memory from its host when it first touches a page, which can take ten times
    as long as the copy into it.  So whoever writes a file first would pay for all that come after.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    with mmap.mmap(-1, max(min(size, available * 3 // 4), mmap.PAGESIZE)) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1
