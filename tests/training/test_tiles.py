"""The loss in tiles against the loss with the matrix."""

import pytest
import torch
from conftest import features, gradients

from loss import contrastive_loss
from training import tiles
from training.tiles import tiled_loss


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("stage_1", [False, True])
def test_tiles_equal_the_matrix(tile, keys, stage_1, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", tile)
    numbers = torch.randint(0, 5, (13, 2), generator=torch.Generator().manual_seed(0)) if keys else None
    inputs = ((features(0, 13), not stage_1), (features(1, 13), True), (torch.tensor(30.0).double(), True))
    dense, tiled = (gradients(lambda *x: how(*x, numbers), *inputs)  # noqa: B023
                    for how in (contrastive_loss, tiled_loss))
    assert (tiled[1] is None) == stage_1
    for one, other in zip(dense, tiled):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_tiles_stand_scores_that_float32_cannot_exponentiate(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 2)
    image, text = features(0, 6).float(), -features(0, 6).float()  # every right pair at cosine -1
    value = tiled_loss(image, text, torch.tensor(100.0))
    torch.testing.assert_close(value, contrastive_loss(image, text, torch.tensor(100.0)))
    assert value > 100
