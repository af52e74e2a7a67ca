"""The order of training: every pair once an epoch, the same in every process."""

from stand_ins import Counted

from sources.order import order, permutation


def test_worked_example():
    """Of ten pairs, position 13 is item 3 of epoch 1."""
    pairs, epoch_0, epoch_1 = Counted(10), permutation(10, 0, 0), permutation(10, 0, 1)
    assert order(pairs, seed=0, position=3) == epoch_0[3]
    assert order(pairs, seed=0, position=13) == epoch_1[3]


def test_every_epoch_and_every_seed_has_a_permutation_of_its_own():
    rows = [permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(row) == list(range(50)) for row in rows)
    assert len({tuple(row) for row in rows}) == 4
    permutation.cache_clear()
    assert permutation(50, 0, 0).tolist() == rows[0]
