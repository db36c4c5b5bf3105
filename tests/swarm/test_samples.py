import random

import pytest

from swarmpull.swarm.samples import sample


@pytest.mark.parametrize("size", [0, 1, 2, 5, 21, 22, 37, 52, 85, 86, 277, 278, 500, 5000])
def test_samples_are_those_of_the_standard_library_digit_by_digit(size):
    ours, theirs = random.Random(size), random.Random(size)
    population = [object() for _ in range(size)]
    for count in (0, 1, 5, 6, 21, 50, 52, size):
        if count <= size:
            assert sample(ours, population, count) == theirs.sample(population, count)
    assert ours.getstate() == theirs.getstate()


@pytest.mark.parametrize("count", [-1, 4])
def test_more_than_there_are_cannot_be_drawn(count):
    with pytest.raises(ValueError, match=f"{count} of 3 elements"):
        sample(random.Random(1), "abc", count)
