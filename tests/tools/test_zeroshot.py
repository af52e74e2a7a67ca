"""Each data set's measure, the submission file, and the analyses, against plain restatements."""

import json

import pytest
import torch
from conftest import shake
from stand_ins import picture

import eval as core
import model
from eval import accuracy, encode_images, ensemble, sentence_features
from sources import scenes
from sources.classes import Classes
from sources.pairs import DataError
from tools.measure import metrics, zeroshot

NAMES, TEMPLATES = ["猫", "船", "花"], ["一张{}的图片", "{}", "画着{}"]


def three(metric: str = "accuracy") -> Classes:
    return Classes([[name] for name in NAMES], NAMES, NAMES, metric)


@pytest.fixture(scope="module")
def clip():
    return shake(model.ChineseCLIP(model.MODELS["ViT-tiny"])).eval()


def test_every_measure_is_the_one_of_its_name():
    cosines = torch.tensor([[0.5, 0.2], [0.1, 0.2], [0.6, 0.1], [0.3, 0.35]])
    labels = torch.tensor([0, 0, 1, 1])
    assert zeroshot.own_measure("accuracy", cosines, labels, 10) == 50
    assert zeroshot.own_measure("mean-per-class", cosines, labels, 10) == 50
    # the lead of class 1: -0.3, 0.1 | -0.5, 0.05: of four pairs one is in order
    assert zeroshot.own_measure("roc-auc", cosines, labels, 10) == 25
    both = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]])
    shares = (10 * cosines).double().softmax(1)
    assert zeroshot.own_measure("map-11", cosines, both, 10) == metrics.map_11(shares, both)


def test_average_precision_ranks_by_the_softmax_as_elevater_does():
    """The picture with the higher cosine has the lower share where another class scores higher still."""
    cosines, labels = torch.tensor([[0.5, 0.9], [0.4, 0.1]]), torch.tensor([[0, 1], [1, 0]])
    assert zeroshot.own_measure("map-11", cosines, labels, 100) == 100
    assert metrics.map_11(cosines, labels) < 100


def test_certain_pictures_do_not_tie():
    cosines = torch.tensor([[0.1, 0.9], [0.1, 0.8]])  # in float32 both shares would be 1
    assert zeroshot.own_measure("roc-auc", cosines, torch.tensor([0, 1]), 100) == 0


@pytest.mark.parametrize("metric", ("accuracy", "mean-per-class", "map-11"))
def test_result_says_what_was_measured(clip, metric):
    labels = torch.tensor([0, 1, 2, 0])
    if metric == "map-11":
        labels = torch.eye(3, dtype=torch.long)[labels]
    result, cosines = zeroshot.own_zero_shot(clip, three(metric), picture, labels, TEMPLATES)
    expected = encode_images(clip, picture, 4) @ ensemble(sentence_features(clip, NAMES, TEMPLATES)).T
    torch.testing.assert_close(cosines, expected)
    rows = result.pop("by_class")
    assert [row["class"] for row in rows].count("猫") == (metric != "map-11")  # has no accuracy
    assert result == {
        metric: zeroshot.own_measure(metric, cosines, labels, clip.logit_scale.exp().item()),
        "metric": metric, "classes": 3, "images": 4, "templates": 3}


def test_submission_has_elevaters_fields(clip):
    cosines = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.2, 0.3]])
    written = json.loads(json.dumps(zeroshot.submission(clip, "eurosat", cosines)))
    assert list(written) == [
        "model_name", "dataset_name", "num_trainable_params", "num_params", "num_visual_params",
        "num_backbone_params", "n_shot", "rnd_seeds", "predictions"]
    assert written["dataset_name"] == "eurosat_clip"
    assert written["num_params"] == sum(p.numel() for p in clip.parameters())
    assert 0 < written["num_visual_params"] < written["num_params"]
    shares = torch.tensor(written["predictions"])
    assert shares.shape == (1, 2, 3)
    torch.testing.assert_close(shares[0], (clip.logit_scale.exp() * cosines).softmax(1), rtol=0, atol=1e-6)


def test_elevaters_order_of_the_pictures(tmp_path):
    assert zeroshot.elevaters_pictures(str(tmp_path), 3) == [0, 1, 2]
    (tmp_path / "index.json").write_text("[2, 0, 1]", encoding="utf-8")
    assert zeroshot.elevaters_pictures(str(tmp_path), 3) == [2, 0, 1]
    with pytest.raises(DataError, match="index.json: .* 0 to 3"):
        zeroshot.elevaters_pictures(str(tmp_path), 4)
    for text in ("[0, 0, 1]", "[0, 1, true]", "{}", "3", "[0, 1"):
        (tmp_path / "index.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="index.json") as caught:
            zeroshot.elevaters_pictures(str(tmp_path), 3)
        assert "\n" not in str(caught.value)


def test_prompts_are_ranked_with_the_ensemble_among_them(clip):
    labels = torch.arange(12) % 3
    found = zeroshot.prompts(clip, three(), picture, labels, TEMPLATES)
    assert sorted(found) == sorted([*TEMPLATES, "ensemble"])
    assert list(found.values()) == sorted(found.values(), reverse=True)
    images = encode_images(clip, picture, 12)
    for template in TEMPLATES:
        cosines = images @ ensemble(sentence_features(clip, NAMES, [template])).T
        assert found[template] == pytest.approx(accuracy(cosines, labels))


def test_negation_by_a_model_that_reads_only_the_noun_and_by_one_that_understands(clip, monkeypatch):
    """Features made by hand: a picture is its kind; a sentence is its noun, and with `understands` a negated
    one points the other way."""
    kinds = scenes.kind_names("zh")
    monkeypatch.setattr(zeroshot, "encode_images", lambda clip, get_image, count: torch.stack(
        [torch.eye(len(kinds))[scenes.class_example("zh", index)[1]] for index in range(count)]))
    for understands in (False, True):
        def sentence(clip, texts):
            rows = [-torch.eye(len(kinds))[kinds.index(kind)] if understands and "没有" in text
                    else torch.eye(len(kinds))[kinds.index(kind)] if kind else torch.zeros(len(kinds)) + 1e-3
                    for text in texts for kind in [max((k for k in kinds if k in text), key=len, default="")]]
            return torch.stack(rows)
        monkeypatch.setattr(core, "encode_texts", sentence)
        found = zeroshot.negation(clip, pictures=3 * len(kinds))
        assert found["negation"]["roc-auc"] == (100 if understands else 50)
        assert found["negation"]["mean"] == (100 if understands else 50)
        assert found["other things"] == {"there": 100, "absent": 100, "mean": 100, "roc-auc": 100}
