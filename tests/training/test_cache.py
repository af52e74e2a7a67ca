"""training/cache.py: rows are the frozen tower's features of the right view; a cache of something else is refused."""

import json
import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import shake, write_folder
from PIL import Image
from safetensors.torch import load_file

from training import cache
import model
from sources import layouts
import train
from sources.augment import augment
from training.cache import cached_stream
from data import preprocess
from sources.layouts import DataError


@pytest.fixture
def pairs(tmp_path):
    write_folder(tmp_path / "pairs", 10)
    return layouts.open_pairs(str(tmp_path / "pairs"), "train")


def tower(seed: int = 0) -> model.ChineseCLIP:
    torch.manual_seed(seed)
    return shake(model.ChineseCLIP(model.MODELS["RN-tiny"]), seed)


def opened(folder, pairs, clip=None, views=3, seed=0, how="crop"):
    cfg = train.Config(out=str(folder), cache_features=views, seed=seed, augment=how, workers=0)
    return cached_stream(cfg, clip or tower(), pairs)


def test_rows_are_the_features_of_augmented_pictures(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 7)  # 30 rows: blocks that straddle views, and a short last one
    clip = tower()
    stream = opened(tmp_path, pairs, clip, how="auto")
    assert os.path.getsize(tmp_path / "features.f16") == 3 * 10 * 16 * 2
    clip.eval()
    for epoch, image in ((0, 0), (1, 4), (2, 9), (5, 3)):  # epoch 5 sees view 2 again
        rng = random.Random(f"0 view {epoch % 3} of {image}")
        pixels = preprocess(augment(pairs.image(image), 32, "auto", rng), 32)
        with torch.no_grad():
            expected = model.normalise(clip.encode_image(pixels[None]))[0]
        assert (stream.view(epoch, image) - expected).abs().max() < 1e-3  # float16
    assert any(not torch.equal(stream.view(0, image), stream.view(1, image)) for image in range(10))


def test_the_tower_is_measured_in_eval_mode(pairs, tmp_path):
    clip = tower().train()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    opened(tmp_path, pairs, clip)
    assert not clip.training
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())


@pytest.mark.parametrize(
    "name, length", [("features.f16", 100), ("features.done", 0), ("features.f16", None)])
def test_a_damaged_cache_is_named(name, length, pairs, tmp_path):
    opened(tmp_path, pairs)
    os.remove(tmp_path / name) if length is None else os.truncate(tmp_path / name, length)
    with pytest.raises(DataError, match=f"{name}: missing or cut short"):
        opened(tmp_path, pairs)


def test_a_picture_that_was_written_again_is_noticed(pairs, tmp_path):
    opened(tmp_path, pairs)
    path = tmp_path / "pairs" / "train0.png"
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="features of another pictures"):
        opened(tmp_path, pairs)


@pytest.mark.parametrize("change, word", [
    (dict(clip=1), "image_tower"), (dict(views=2), "views"), (dict(seed=1), "seed"),
    (dict(how="auto"), "augment"), (dict(pictures=True), "pictures")])
def test_a_cache_of_something_else_is_refused(change, word, pairs, tmp_path):
    opened(tmp_path, pairs)
    before = (tmp_path / "features.f16").read_bytes()
    if change.pop("pictures", False):
        pairs.names[3] = "train4.png"
    if "clip" in change:
        change["clip"] = tower(1)
    with pytest.raises(DataError, match=f"features of another {word}"):
        opened(tmp_path, pairs, **change)
    assert (tmp_path / "features.f16").read_bytes() == before


def test_a_cache_that_is_there_is_not_built_again(pairs, tmp_path, monkeypatch):
    opened(tmp_path, pairs)
    monkeypatch.setattr(model.ChineseCLIP, "encode_image", lambda *_: 1 / 0)
    assert opened(tmp_path, pairs).view(0, 0).shape == (16,)


def test_an_unfinished_cache_goes_on(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    opened(whole, pairs)
    real, calls = model.ChineseCLIP.encode_image, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(model.ChineseCLIP, "encode_image", dies)
    with pytest.raises(KeyboardInterrupt):
        opened(cut, pairs)
    assert (cut / "features.done").read_bytes() == b"\1\1\1\0\0\0\0\0"
    opened(cut, pairs)
    assert len(calls) == 4 + 5  # the five blocks that were missing, and no other
    assert (cut / "features.f16").read_bytes() == (whole / "features.f16").read_bytes()


def worker(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cache.BLOCK = 4
    opened(folder, layouts.open_pairs(f"{folder}/pairs", "train"))
    dist.destroy_process_group()


def test_two_processes_share_the_work(pairs, tmp_path, monkeypatch):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    monkeypatch.setattr(cache, "BLOCK", 4)
    (tmp_path / "alone").mkdir()
    opened(tmp_path / "alone", pairs)
    assert set((tmp_path / "features.done").read_bytes()) == {1}
    both, alone = (np.fromfile(folder / "features.f16", np.float16).astype(np.float32)
                   for folder in (tmp_path, tmp_path / "alone"))
    np.testing.assert_allclose(both, alone, atol=2e-3)  # sums depend on the number of threads


def test_broken_pictures_are_named_when_their_turn_comes(pairs, tmp_path):
    (tmp_path / "pairs" / "train3.png").write_bytes(b"no picture")
    stream = opened(tmp_path, pairs)
    assert stream.view(0, 3).isnan().all() and stream.view(0, 2).isfinite().all()
    samples = [stream[position] for position in range(10)]
    Image.new("RGB", (32, 32)).save(tmp_path / "pairs" / "train3.png")  # readable again: still not a feature
    later = [stream[position] for position in range(10)]
    assert any("could not when its features were cached" in p for sample in later for p in sample.problems)
    told = {problem for sample in samples for problem in sample.problems}
    assert len(told) == 1 and "train3.png" in told.pop()
    assert all(sample.picture.shape == (16,) and sample.picture.isfinite().all() for sample in samples)


def test_the_header_names_the_precision(pairs, tmp_path, monkeypatch):
    """Of two GPUs one may compute in bfloat16 and the other in float16: their features are not the same."""
    opened(tmp_path, pairs)
    header = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    assert header["precision"] == "torch.float32"
    other = tower()
    other.precision = torch.float16
    with pytest.raises(DataError, match="features of another precision"):
        opened(tmp_path, pairs, other)


@pytest.mark.parametrize("how", ["none", "crop"])
def test_a_cache_with_transparency_treated_otherwise_is_refused(how, pairs, tmp_path, monkeypatch):
    opened(tmp_path, pairs, how=how)
    for module in ("data", "sources.augment"):
        monkeypatch.setattr(f"{module}.as_rgb", lambda image: image.convert("RGB"))
    with pytest.raises(DataError, match="features of another transform"):
        opened(tmp_path, pairs, how=how)


def test_drawn_scenes_have_nothing_to_cache(tmp_path):
    with pytest.raises(DataError, match="no files whose"):
        opened(tmp_path, layouts.open_pairs("scenes-zh", "train"))


def test_training_on_cached_features_is_training(pairs, tmp_path):
    """Without augmentation a cached view is the picture itself, but for float16."""
    states, losses = [], []
    for views in (0, 1):
        out = tmp_path / str(views)
        cfg = train.Config(model="RN-tiny", data=str(tmp_path / "pairs"), freeze_image=True, batch_size=5,
                           steps=6, cache_features=views, lr=1e-2, workers=0, log_every=1, out=str(out),
                           device="cpu")
        train.train("act", cfg)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
        states.append(load_file(out / "last.safetensors"))
    np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0] if k.startswith("visual."))
