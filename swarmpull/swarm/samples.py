"""Random samples as `random.Random.sample` draws them: the same seed gives the same, in less time.

A tracker draws fifty peers for every announce of a leecher, without a call for each of them.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def sample(rng: random.Random, population: Sequence[T], count: int) -> list[T]:
    """``count`` different elements, in random order.

    Raises:
        ValueError: there are not so many.
    """
    size = len(population)
    if not 0 <= count <= size:
        raise ValueError(f"{count} of {size} elements cannot be drawn")
    if size <= _pool_max(count):
        return _drawn_from_pool(rng, list(population), count)
    getrandbits, bits = rng.getrandbits, size.bit_length()
    chosen: dict[int, None] = {}
    for _ in range(count):
        index = getrandbits(bits)
        while index >= size or index in chosen:
            index = getrandbits(bits)
        chosen[index] = None
    return [population[index] for index in chosen]


@functools.lru_cache(64)
def _pool_max(count: int) -> int:
    """Up to here a copy of the population costs less than looking up what was drawn already."""
    base = 21
    if count > 5:
        base += 4 ** math.ceil(math.log(count * 3, 4))
    return int(base)


def _drawn_from_pool(rng: random.Random, pool: list[T], count: int) -> list[T]:
    getrandbits, left = rng.getrandbits, len(pool)
    drawn = []
    for _ in range(count):
        bits = left.bit_length()
        index = getrandbits(bits)
        while index >= left:
            index = getrandbits(bits)
        drawn.append(pool[index])
        left -= 1
        pool[index] = pool[left]
    return drawn
