"""How long anything may take, all of it from one constant, so that a slow machine is one edit away."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Final

import trio

# Seconds in which a process that has the processor starts, or a request that can be answered gets its next
# byte.  Fourteen processes that start on two cores take 15 s of it.
PATIENCE: Final = float(os.environ.get("SWARMPULL_CHAOS_PATIENCE", "30"))

# A request that gets no byte for this long has stalled.
STALLED: Final = PATIENCE
# A failed request that took longer without a byte did not fail fast.
FAIL_FAST: Final = PATIENCE * 2 / 3
# For a connection to be there.
CONNECT: Final = PATIENCE / 3
# From a start until all roles are ready, the queues are empty, and nothing is left over.
READY: Final = PATIENCE * 3
QUIET: Final = PATIENCE * 4
# Until hosts that were given up for dead are asked again.
SETTLING: Final = PATIENCE / 6
# A pull or push is repeated for this long after the last fault is over, each time after a pause.
RETRIED: Final = PATIENCE * 3
RETRY_PAUSE: Final = PATIENCE / 60
# From SIGTERM until the process has ended: drain_timeout, and what the interpreter takes to end.
ENDED: Final = PATIENCE
# How often something is looked at that can only be polled, and all admin listeners, each of which costs
# a process a millisecond or two.
POLL: Final = 0.1
POLL_ALL: Final = 0.5
# For one scenario beyond its own seconds, whatever happens.
OVERTIME: Final = PATIENCE * 16


async def poll(
    condition: Callable[[], Awaitable[bool]], *, within: float, every: float = POLL
) -> bool:
    """Look until ``condition`` holds; False when it does not within so many seconds."""
    with trio.move_on_after(within):
        while True:
            if await condition():
                return True
            await trio.sleep(every)
    return False
