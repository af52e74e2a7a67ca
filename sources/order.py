"""
The order in which training sees its pairs. It is a pure function of the seed and the position, so a run can
resume at any step and needs only the number of that step.
"""

import functools

import numpy as np

from sources.pairs import Pairs

BLOCK = 1024  # This many neighbouring pairs stay close to each other in the order of a large set.


def order(pairs: Pairs, seed: int, position: int) -> int:
    """The number of the training pair at a position. Positions count from 0 without end: in a set of n pairs,
    position p is item p % n of epoch p // n.

    A set of at most `pairs.window` pairs is shuffled as a whole. For a larger one, that would mean random
    reads all over a slow disk and a list of all pairs in memory. So its blocks of neighbours are shuffled,
    then the pairs of each window, which is as many blocks as `pairs.window` allows. While training sees a
    window, it reads a few dozen long stretches of the set."""
    count, window = len(pairs), pairs.window
    epoch, offset = divmod(position, count)
    if count <= window:
        return int(permutation(count, seed, epoch)[offset])
    _, starts = block_order(count, seed, epoch)
    place = int(np.searchsorted(starts, offset, side="right")) - 1  # of the block that contains the offset
    blocks_in_window = window // BLOCK
    first = place - place % blocks_in_window  # the window's first block
    return int(window_order(pairs, seed, epoch, first, blocks_in_window)[offset - starts[first]])


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def permutation(count: int, *seed: int) -> np.ndarray:
    """The numbers 0 to count - 1, shuffled by these seeds, [count]."""
    return np.random.default_rng(seed).permutation(count)


@functools.lru_cache(maxsize=2)
def block_order(count: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks in the order of an epoch, and the offset at which each begins, [count // BLOCK] both. Block
    k of K has pairs k * count // K to (k + 1) * count // K, so block sizes differ by one pair at most."""
    blocks = count // BLOCK
    shuffled = np.random.default_rng([seed, epoch]).permutation(blocks)
    sizes = (shuffled + 1) * count // blocks - shuffled * count // blocks
    return shuffled, np.cumsum(sizes) - sizes


@functools.lru_cache(maxsize=3)
def window_order(pairs: Pairs, seed: int, epoch: int, first: int, length: int) -> np.ndarray:
    """The shuffled pairs of a window, which consists of `length` blocks from place `first` on. The source is
    told which stretches of it are needed next."""
    count, blocks = len(pairs), len(pairs) // BLOCK
    shuffled = block_order(count, seed, epoch)[0][first: first + length].tolist()
    stretches = [(k * count // blocks, (k + 1) * count // blocks) for k in shuffled]
    for start, stop in stretches:
        pairs.will_need(start, stop)
    numbers = np.concatenate([np.arange(start, stop) for start, stop in stretches])
    return np.random.default_rng([seed, epoch, first]).permutation(numbers)
