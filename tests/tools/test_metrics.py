"""The rarer measures against answers by hand, plain restatements, scikit-learn and the official script. The
threshold holds what it promises, on the pairs that it was chosen on and on others of the same kind."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval import accuracy, recall_at_k
from tools.measure import metrics


def unit(n: int, E: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, E, generator=torch.Generator().manual_seed(seed)), dim=1)


# ------------------------------------------------------------------------------------------------------------
# nearest


def test_recall_and_nearest_are_those_of_the_official_script(tmp_path):
    """cn_clip/eval/evaluation.py, on what make_topk_predictions.py would write, where no score is tied."""
    official = pytest.importorskip("cn_clip.eval.evaluation", reason="the official code is not installed")
    rng = np.random.default_rng(0)
    texts, images = unit(60, 8, 1), unit(45, 8, 2)
    positives = torch.tensor(np.stack(divmod(rng.choice(60 * 45, 150, replace=False), 45), axis=1))
    for way, (queries, gallery, relation) in enumerate(((texts, images, positives),
                                                        (images, texts, positives.flip(1)))):
        asked = relation[:, 0].unique().tolist()
        answers = [{"text_id": q, "image_ids": relation[relation[:, 0] == q, 1].tolist()} for q in asked]
        top = metrics.nearest(queries, gallery, 10)
        assert torch.equal(top, (queries @ gallery.T).topk(10).indices)
        found = [{"text_id": q, "image_ids": row} for q, row in enumerate(top.tolist())]
        for name, lines in (("answers", answers), ("found", found)):
            (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        mean, *recalls = official.compute_score(str(tmp_path / "answers"), str(tmp_path / "found"))
        ours = recall_at_k(texts, images, positives)[way]
        assert list(ours.values()) == pytest.approx([*recalls, mean], rel=1e-9)


def test_nearest_of_a_gallery_smaller_than_k():
    assert metrics.nearest(torch.eye(3), torch.eye(3)[[2, 1]], 10)[2].tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------------------
# classification


def test_mean_per_class_by_hand():
    # class 0: 3 of 4 right; class 1: 0 of 1; class 2 has no pictures; class 3: 1 of 1
    scores = torch.eye(4)[[0, 0, 0, 1, 0, 3]]
    labels = torch.tensor([0, 0, 0, 0, 1, 3])
    assert metrics.mean_per_class(scores, labels) == pytest.approx(100 * (3 / 4 + 0 + 1) / 3)
    assert accuracy(scores, labels) == pytest.approx(100 * 4 / 6)


def test_accuracies_against_a_restatement():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores, labels = rng.integers(0, 4, (50, 6)) / 4, rng.integers(0, 5, 50)  # class 5 stays empty
        right = [all(row[label] > other for c, other in enumerate(row) if c != label)
                 for row, label in zip(scores, labels)]
        per_class = [np.mean([r for r, label in zip(right, labels) if label == c]) for c in set(labels)]
        tensors = torch.tensor(scores), torch.tensor(labels)
        assert accuracy(*tensors) == pytest.approx(100 * np.mean(right))
        assert metrics.mean_per_class(*tensors) == pytest.approx(100 * np.mean(per_class))


def test_roc_auc_is_the_share_of_pairs_in_the_right_order():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, rng.choice((2, 5, 1000)), 40) / 7
        labels = rng.integers(0, 2, 40)
        labels[:2] = 0, 1
        wins = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
        found = metrics.roc_auc(torch.tensor(scores), torch.tensor(labels))
        assert found == pytest.approx(100 * np.mean(wins))


def test_roc_auc_at_its_ends():
    labels = torch.tensor([0, 1, 1, 0])
    assert metrics.roc_auc(torch.tensor([0.1, 0.8, 0.9, 0.2]), labels) == 100
    assert metrics.roc_auc(torch.tensor([0.9, 0.2, 0.1, 0.8]), labels) == 0
    assert metrics.roc_auc(torch.ones(4), labels) == 50  # collapsed


def voc_ap(scores: list[float], labels: list[int]) -> float:
    """As the VOC-2007 report says it (sec. 4.2), with every distinct score as a threshold."""
    points = []
    for threshold in set(scores):
        taken = [label for score, label in zip(scores, labels) if score >= threshold]
        points.append((sum(taken) / sum(labels), sum(taken) / len(taken)))  # recall, precision
    return sum(max(p for r, p in points if r >= t / 10 - 1e-12) for t in range(11)) / 11


def test_map_11_by_hand():
    # right, wrong, right: precision 1 up to recall 1/2 (0 ... 0.5: six points), then 2/3 (five points)
    scores, labels = torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[1], [0], [1]])
    assert metrics.map_11(scores, labels) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_map_11_against_a_restatement():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores, labels = rng.integers(0, rng.choice((3, 1000)), (30, 3)) / 9, rng.integers(0, 2, (30, 3))
        expected = [voc_ap(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(3)]
        found = metrics.map_11(torch.tensor(scores), torch.tensor(labels))
        assert found == pytest.approx(100 * np.mean(expected))


def test_map_11_of_equal_scores_is_the_share_of_right_ones():
    assert metrics.map_11(torch.ones(8, 1), torch.tensor([[1], [0]] * 4)) == 50


def test_measures_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 5)), rng.integers(0, 5, 200)
    tensors = torch.tensor(scores), torch.tensor(labels)
    assert accuracy(*tensors) == pytest.approx(
        100 * sklearn.accuracy_score(labels, scores.argmax(1)))
    assert metrics.mean_per_class(*tensors) == pytest.approx(
        100 * sklearn.balanced_accuracy_score(labels, scores.argmax(1)))
    tied = rng.integers(0, 9, 200) / 9
    assert metrics.roc_auc(torch.tensor(tied), torch.tensor(labels > 2)) == pytest.approx(
        100 * sklearn.roc_auc_score(labels > 2, tied))


# ------------------------------------------------------------------------------------------------------------
# the worth of a cosine


def test_right_and_wrong_pairs_are_counted_once_each():
    texts, images = unit(20, 6, 0), unit(15, 6, 1)
    positives = torch.tensor([[row, row % 15] for row in range(20)] + [[0, 0]])  # one of them twice
    scores = texts @ images.T
    mine = torch.zeros(20, 15, dtype=torch.bool)
    mine[positives[:, 0], positives[:, 1]] = True
    for tile in (4, 1024):
        right, wrong = metrics.right_and_wrong(texts, images, positives, tile)
        assert (int(right.sum()), int(wrong.sum())) == (20, 280)
        for counts, some in ((right, scores[mine]), (wrong, scores[~mine])):
            expected = np.histogram(some.numpy(), metrics.BINS, (-1, 1))[0]
            assert np.abs(counts.numpy().cumsum() - expected.cumsum()).max() <= 1  # a cosine on an edge


def test_threshold_by_hand():
    # 100 right pairs at 0.5 and 100 at 0.3; of the wrong ones, 100 at 0.3 and 800 at 0.1
    right, wrong = torch.zeros(metrics.BINS), torch.zeros(metrics.BINS)
    right[1500], right[1300], wrong[1300], wrong[1100] = 100, 100, 100, 800
    prior = 200 / 1100  # as in the sample itself
    cosine, precision, kept = metrics.threshold_for(right, wrong, 0.9, prior).values()
    assert 0.3 < cosine <= 0.5 and (precision, kept) == (1, 0.5)
    cosine, precision, kept = metrics.threshold_for(right, wrong, 0.6, prior).values()
    assert 0.1 < cosine <= 0.3 and precision == pytest.approx(20 / 30) and kept == 1
    # where half of all pairs are right, wrong ones weigh 20 / 90 as much
    cosine, precision, _ = metrics.threshold_for(right, wrong, 0.85, 0.5).values()
    assert cosine <= 0.3 and precision == pytest.approx(20 / (20 + 10 * 20 / 90))
    right[1999] = 29  # too few to rely on
    wrong[1900] = 1000
    assert metrics.threshold_for(right, wrong, 0.9, prior)["threshold"] is None


def noisy_pairs(seed: int, count: int = 300) -> tuple:
    """Texts and pictures that share a direction, with noise on both."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 16, generator=g)
    texts, images = (F.normalize(common + 0.8 * torch.randn(count, 16, generator=g), dim=1) for _ in range(2))
    return texts, images, torch.arange(count)[:, None].expand(-1, 2)


@pytest.mark.parametrize("prior", (0.5, 0.1, 0.0))
def test_precision_above_the_threshold_is_what_was_asked_for(prior):
    texts, images, positives = noisy_pairs(0)
    result = metrics.calibrate(texts, images, positives, 0.9, prior)
    scores, right = texts @ images.T, torch.eye(300, dtype=torch.bool)
    kept, others = ((scores[mine] >= result["threshold"]).float().mean().item() for mine in (right, ~right))
    prior = prior or 1 / 300
    assert result["prior"] == pytest.approx(prior) and result["recall"] == pytest.approx(kept, abs=0.01)
    precision = prior * kept / (prior * kept + (1 - prior) * others)
    assert precision == pytest.approx(result["precision"], abs=0.01)
    assert result["precision"] >= 0.9
    other = metrics.at_threshold(*noisy_pairs(1), result["threshold"], prior)
    assert other["precision"] == pytest.approx(0.9, abs=0.06)


def test_where_no_threshold_will_do():
    texts, images, positives = noisy_pairs(0)
    result = metrics.calibrate(texts, images.roll(1, 0), positives, 0.99)  # every text with another's picture
    assert result["threshold"] is None


def test_collapsed_features_promise_nothing():
    same = torch.full((50, 16), 0.25)
    result = metrics.calibrate(same, same, torch.arange(50)[:, None].expand(-1, 2), 0.9)
    assert result["threshold"] is None
