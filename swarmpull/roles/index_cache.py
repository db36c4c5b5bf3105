"""What an index keeps of its backend: answers to lookups, for a lease.

An answer counts from the moment at which it began to be read.  An index that changes something tells the
others before it acknowledges that (`index_peers`), and waits for the lease of one that does not answer; so
nobody gives out what was changed by an acknowledged change.

What is asked for is read again ahead of the end of its lease, in the background: whoever asks does not wait
for that.  Each such read begins a lease of its own, so no answer gets older by it.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

from swarmpull.errors import SwarmpullError
from swarmpull.roles.catalog_objects import annotation_bytes
from swarmpull.wire.api import Descriptor
from swarmpull.wire.codec import encode

# All answers together, as they are counted here; one of a long manifest is not worth keeping.
BYTES_MAX: Final = 32 << 20
ANNOTATION_BYTES_MAX: Final = 4 << 10
# What an answer takes besides its texts.
OVERHEAD: Final = 1000
# The part of its lease after which an answer is read again; by chance, since what came together would be
# read together for ever.
RENEW_MIN: Final = 0.6
RENEW_MAX: Final = 0.85
# Seconds; answers are read again at multiples of it.
RENEW_STEP: Final = 0.01
# Answers that are read again at the same time; further ones wait, and those whose lease is over by then are
# left to whoever asks next.
RENEWALS: Final = 16
# What nobody has asked for while it was read again so often is not read any more.
IDLE_MAX: Final = 3

Key = tuple[str, str]
ReadDescriptor = Callable[[str, str], Awaitable[Descriptor]]


@attrs.define(eq=False)
class _Answer:
    """``idle``: how often it was read again without being asked for."""

    descriptor: Descriptor
    packed: bytes
    expires_at: float
    size: int
    idle: int
    is_used: bool = False


@attrs.define(eq=False)
class _Read:
    """A read of the backend under way; what comes of it is for all who wait."""

    begun_at: float
    is_void: bool = False
    done: trio.Event = attrs.field(factory=trio.Event)
    descriptor: Descriptor | None = None
    error: SwarmpullError | None = None


class ResolveCache:
    """The manifests that tags and digests name, by repository and reference.

    Attributes:
        lease: seconds for which an answer is kept; 0: none is.
        hits, misses: lookups that were answered from here, and that were not.
    """

    def __init__(self, lease: float, *, capacity: int = BYTES_MAX) -> None:
        self.lease = lease
        self.hits = 0
        self.misses = 0
        self._capacity = capacity
        self._bytes = 0
        self._answers: OrderedDict[Key, _Answer] = OrderedDict()
        self._references: dict[str, set[str]] = {}
        self._reads: dict[Key, _Read] = {}
        # When which answer is to be read again; some of them are not there any more.
        self._renewals: list[tuple[float, int, Key, _Answer]] = []
        self._order = itertools.count()
        self._kept = trio.Event()

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def size(self) -> int:
        """What the answers take, as it is counted here."""
        return self._bytes

    def get(self, repository: str, reference: str) -> bytes | None:
        """A packed `Descriptor`, if there is one that counts."""
        key = repository, reference
        found = self._find(key)
        return None if found is None else found.packed

    async def resolve(
        self,
        repository: str,
        reference: str,
        read: ReadDescriptor,
    ) -> Descriptor:
        """What is kept, or what is being read, or else what ``read`` says.  Raises what that raises."""
        key = repository, reference
        while True:
            found = self._find(key)
            if found is not None:
                return found.descriptor
            under_way = self._reads.get(key)
            if under_way is None or not self._counts(under_way.begun_at):
                self.misses += 1
                return await self._read(key, read)
            await under_way.done.wait()
            if under_way.error is not None:
                # An exception collects the traceback of whoever raises it: each caller raises its own.
                raise copy.copy(under_way.error)
            if under_way.descriptor is not None:
                return under_way.descriptor
            # Whoever read has left.

    async def run(self, read: ReadDescriptor) -> None:
        """Read again what is asked for, ahead of the end of its lease, until cancelled."""
        free = trio.Semaphore(RENEWALS)
        async with trio.open_nursery() as nursery:
            while True:
                await free.acquire()
                nursery.start_soon(self._renew, read, *await self._next_renewal(), free)

    async def _next_renewal(self) -> tuple[Key, _Answer]:
        """Wait until an answer has to be read again that is still there."""
        while True:
            if not self._renewals or self._renewals[0][0] > trio.current_time():
                self._kept = trio.Event()
                with trio.move_on_at(self._renewals[0][0] if self._renewals else math.inf):
                    await self._kept.wait()
                continue
            _, _, key, answer = heapq.heappop(self._renewals)
            if self._answers.get(key) is answer and trio.current_time() < answer.expires_at:
                return key, answer

    async def _renew(
        self, read: ReadDescriptor, key: Key, answer: _Answer, free: trio.Semaphore
    ) -> None:
        idle = 0 if answer.is_used else answer.idle + 1
        try:
            # Since this was started, a change may have come, and somebody be reading what it made: that read
            # must stay the one that the next change makes void.
            if idle <= IDLE_MAX and self._answers.get(key) is answer and key not in self._reads:
                await self._read(key, read, idle)
        except SwarmpullError:
            return  # whoever asks when the lease is over is told
        finally:
            free.release()

    async def _read(self, key: Key, read: ReadDescriptor, idle: int = 0) -> Descriptor:
        mine = self._reads[key] = _Read(trio.current_time())
        try:
            mine.descriptor = await read(*key)
        except SwarmpullError as error:
            mine.error = error
            raise
        finally:
            if self._reads.get(key) is mine:
                del self._reads[key]
            mine.done.set()
        if not mine.is_void and self._counts(mine.begun_at):
            self._keep(key, mine.descriptor, mine.begun_at, idle)
        return mine.descriptor

    def forget(self, repository: str, references: tuple[str, ...] = ()) -> None:
        """Something was changed: of these references, or of all of the repository when there are none.

        Nobody joins a read that is under way, and what comes of it is not kept.
        """
        for reference in references or tuple(self._references.get(repository, ())):
            self._drop((repository, reference))
        for key in [(repository, reference) for reference in references] or list(self._reads):
            if key[0] == repository and (under_way := self._reads.pop(key, None)) is not None:
                under_way.is_void = True

    def close(self) -> None:
        """Keep nothing from now on."""
        self.lease = 0.0
        self._answers.clear()
        self._references.clear()
        self._renewals.clear()
        self._bytes = 0

    # --- inside -------------------------------------------------------------------------------

    def _counts(self, begun_at: float) -> bool:
        return trio.current_time() < begun_at + self.lease

    def _find(self, key: Key) -> _Answer | None:
        found = self._answers.get(key)
        if found is None:
            return None
        if trio.current_time() >= found.expires_at:
            self._drop(key)
            return None
        self.hits += 1
        found.is_used = True
        self._answers.move_to_end(key)
        return found

    def _keep(self, key: Key, descriptor: Descriptor, begun_at: float, idle: int) -> None:
        annotations = annotation_bytes(descriptor)
        if annotations > ANNOTATION_BYTES_MAX:
            return
        before = self._answers.get(key)
        if before is not None and before.descriptor == descriptor:
            packed = before.packed
        else:
            packed = encode(descriptor)
        # Packed and unpacked.
        size = OVERHEAD + sum(map(len, key)) + len(packed) + 2 * annotations
        self._drop(key)
        answer = self._answers[key] = _Answer(descriptor, packed, begun_at + self.lease, size, idle)
        self._renew_later(key, answer, begun_at)
        self._references.setdefault(key[0], set()).add(key[1])
        self._bytes += size
        while self._bytes > self._capacity:
            self._drop(next(iter(self._answers)))

    def _renew_later(self, key: Key, answer: _Answer, begun_at: float) -> None:
        at = begun_at + self.lease * random.uniform(RENEW_MIN, RENEW_MAX)
        # Together with those of the same moment: their reads share what a read costs.
        at = math.ceil(at / RENEW_STEP) * RENEW_STEP
        heapq.heappush(self._renewals, (at, next(self._order), key, answer))
        if self._renewals[0][3] is answer:
            self._kept.set()

    def _drop(self, key: Key) -> None:
        found = self._answers.pop(key, None)
        if found is None:
            return
        self._bytes -= found.size
        references = self._references[key[0]]
        references.discard(key[1])
        if not references:
            del self._references[key[0]]
