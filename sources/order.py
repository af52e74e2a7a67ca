"""
The order in which training sees its pairs: a pure function of (seed, position), so that a run can resume at
any step by knowing its number.
"""

import functools

import numpy as np

from sources.pairs import Pairs

BLOCK = 1024  # neighbouring pairs that stay near each other in the order of a large set


def order(pairs: Pairs, seed: int, position: int) -> int:
    """Which training pair stands at this position, 0 to infinity: position p is number p mod n of epoch
    p div n. A pure function, so that a resumed run needs to know only its position.

    A set within `pairs.window` is shuffled as one. In a larger one blocks of neighbours are, then the pairs
    of as many blocks as fill a window: these are read from all over a few dozen long stretches, which a slow
    disk can do, and no rank ever holds the order of all pairs."""
    count, window = len(pairs), pairs.window
    epoch, offset = divmod(position, count)
    if count <= window:
        return int(permutation(count, seed, epoch)[offset])
    _, starts = block_order(count, seed, epoch)
    number, together = int(np.searchsorted(starts, offset, side="right")) - 1, window // BLOCK
    first = number - number % together
    return int(window_order(pairs, seed, epoch, first, together)[offset - starts[first]])


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def permutation(count: int, *seed: int) -> np.ndarray:
    """The numbers 0 to count - 1 in an order that depends on the seed alone, [count]."""
    return np.random.default_rng(seed).permutation(count)


@functools.lru_cache(maxsize=2)
def block_order(count: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks in the order of an epoch, and the offset at which each begins, [count // BLOCK] both. Block k is
    pairs k * count // blocks to (k + 1) * count // blocks, so that all are of one size but for one pair."""
    blocks = count // BLOCK
    drawn = np.random.default_rng([seed, epoch]).permutation(blocks)
    sizes = (drawn + 1) * count // blocks - drawn * count // blocks
    return drawn, np.cumsum(sizes) - sizes


@functools.lru_cache(maxsize=3)
def window_order(pairs: Pairs, seed: int, epoch: int, first: int, together: int) -> np.ndarray:
    """The pairs of blocks `first` to first + together of an epoch, shuffled; the source hears of them."""
    count, blocks = len(pairs), len(pairs) // BLOCK
    drawn = block_order(count, seed, epoch)[0][first: first + together].tolist()
    stretches = [(k * count // blocks, (k + 1) * count // blocks) for k in drawn]
    for start, stop in stretches:
        pairs.will_need(start, stop)
    numbers = np.concatenate([np.arange(start, stop) for start, stop in stretches])
    return np.random.default_rng([seed, epoch, first]).permutation(numbers)
