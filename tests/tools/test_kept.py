"""Features that are kept: the same ones come back, and never those of something else."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import shake
from stand_ins import Six

import model
from sources.pairs import DataError
from tools.measure import kept


class Known(Six):
    """Six captions and five pictures with a fingerprint."""

    stamp = "pictures of Monday"

    def fingerprint(self) -> str:
        return self.stamp


@pytest.fixture(scope="module")
def clip():
    return shake(model.ChineseCLIP(model.MODELS["ViT-tiny"])).eval()


@pytest.fixture
def first(clip, tmp_path):
    folder = str(tmp_path / "kept")
    return folder, kept.kept_features(clip, Known(), 52, folder)


def test_kept_features_are_plain_arrays_and_come_back(clip, first, monkeypatch, capsys):
    folder, (images, texts) = first
    assert sorted(os.listdir(folder)) == ["features.json", "image_features.npy", "text_features.npy"]
    assert np.array_equal(np.load(os.path.join(folder, "image_features.npy")), images.numpy())
    assert images.shape == (5, 16) and texts.shape == (6, 16)
    monkeypatch.setattr(kept, "pair_features", None)  # nothing may be encoded again
    again = kept.kept_features(clip, Known(), 52, folder)
    assert torch.equal(again[0], images) and torch.equal(again[1], texts)
    assert "nothing is encoded" in capsys.readouterr().out


def test_features_of_something_else_are_refused(clip, first):
    folder, _ = first

    def refused(part: str, clip=clip, pairs=None, context_length: int = 52):
        with pytest.raises(DataError, match=part) as caught:
            kept.kept_features(clip, pairs or Known(), context_length, folder)
        assert "\n" not in str(caught.value) and folder in str(caught.value)

    refused("same: model", clip=shake(model.ChineseCLIP(model.MODELS["ViT-tiny"]).eval(), seed=1))
    refused("same: context_length", context_length=20)
    other = Known()
    other.stamp = "pictures of Tuesday"
    refused("same: pictures", pairs=other)
    other = Known()
    other.texts = ["一只狗", *Known.texts[1:]]
    refused("same: captions", pairs=other)


def test_features_with_transparency_treated_otherwise_are_refused(clip, first, monkeypatch):
    monkeypatch.setattr("data.as_rgb", lambda image: image.convert("RGB"))
    with pytest.raises(DataError, match="same: preprocessing"):
        kept.kept_features(clip, Known(), 52, first[0])


def test_what_a_killed_run_left_is_encoded_again(clip, first):
    folder, (images, _) = first
    os.remove(os.path.join(folder, "features.json"))  # it is written last
    with open(os.path.join(folder, "image_features.npy"), "wb") as file:
        file.write(b"half")
    assert torch.equal(kept.kept_features(clip, Known(), 52, folder)[0], images)


@pytest.mark.parametrize("damage", ("cut", "shape", "pickle", "header"))
def test_damaged_files_are_one_line(clip, first, damage):
    folder, (images, _) = first
    path = os.path.join(folder, "image_features.npy")
    if damage == "cut":
        os.truncate(path, 150)
    elif damage == "shape":
        np.save(path, images[:3].numpy())
    elif damage == "pickle":
        np.save(path, np.array([{}], dtype=object))
    else:
        with open(os.path.join(folder, "features.json"), "w", encoding="utf-8") as file:
            json.dump([], file)
    with pytest.raises(DataError) as caught:
        kept.kept_features(clip, Known(), 52, folder)
    assert "\n" not in str(caught.value) and folder in str(caught.value)
