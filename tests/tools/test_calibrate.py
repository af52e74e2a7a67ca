"""The threshold holds what it promises, on the pairs that it was chosen on and on others of the same kind."""

import pytest
import torch
import torch.nn.functional as F

from tools.measure.calibrate import at_threshold, calibrate, calibration_table


def noisy_pairs(seed: int, count: int = 300) -> tuple:
    """Texts and pictures that share a direction, with noise on both."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 16, generator=g)
    texts, images = (F.normalize(common + 0.8 * torch.randn(count, 16, generator=g), dim=1) for _ in range(2))
    return texts, images, torch.arange(count)[:, None].expand(-1, 2)


@pytest.mark.parametrize("prior", (0.5, 0.1, 0.0))
def test_precision_above_the_threshold_is_what_was_asked_for(prior):
    texts, images, positives = noisy_pairs(0)
    result = calibrate(texts, images, positives, 0.9, prior)
    scores, right = texts @ images.T, torch.eye(300, dtype=torch.bool)
    kept, others = ((scores[mine] >= result["threshold"]).float().mean().item() for mine in (right, ~right))
    prior = prior or 1 / 300
    assert result["prior"] == pytest.approx(prior) and result["recall"] == pytest.approx(kept, abs=0.01)
    precision = prior * kept / (prior * kept + (1 - prior) * others)
    assert precision == pytest.approx(result["precision"], abs=0.01)
    assert result["precision"] >= 0.9
    other = at_threshold(*noisy_pairs(1), result["threshold"], prior)
    assert other["precision"] == pytest.approx(0.9, abs=0.06)


def test_reliability_counts_every_pair_and_rises():
    result = calibrate(*noisy_pairs(0), 0.9)
    rows = result["reliability"]
    assert sum(row["right"] for row in rows) == 300 and sum(row["wrong"] for row in rows) == 300 * 299
    shares = [row["share_right"] for row in rows if row["right"] >= 10]
    assert shares == sorted(shares)
    text = calibration_table(result)
    assert "300 right pairs" in text and f"from {result['threshold']:.3f} on" in text


def test_where_no_threshold_will_do():
    texts, images, positives = noisy_pairs(0)
    result = calibrate(texts, images.roll(1, 0), positives, 0.99)  # every text with another's picture
    assert result["threshold"] is None and "no cosine" in calibration_table(result)


def test_collapsed_features_promise_nothing():
    same = torch.full((50, 16), 0.25)
    result = calibrate(same, same, torch.arange(50)[:, None].expand(-1, 2), 0.9)
    assert result["threshold"] is None
    assert [row["share_right"] for row in result["reliability"]] == [0.5]
