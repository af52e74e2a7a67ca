"""tools/onnx.py: the exported towers compute what ours compute, in other programs too.

To trace a tower takes ten seconds, so each is traced once, and both models have the same text tower."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from checkpoints import RN, VIT, built, refusal
from conftest import ROOT, noise, random_pixels, typed
from PIL import Image
from stand_ins import picture

import data
import model
from tools import onnx, weights
from tools.measure import __main__ as measure
from weights.read import digest
from tools.search import __main__ as search


def clip_named(name: str) -> model.ChineseCLIP:
    clip, donor = built(name), built(VIT)
    clip.bert, clip.text_projection = donor.bert, donor.text_projection
    return clip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, precision) -> its exported folder, written by the command."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    room, traced, graph = tmp_path_factory.mktemp("onnx"), {}, onnx.graph

    def graph_once(tower, example, dims, folder, *names):
        kind = type(tower)
        if kind not in traced:
            traced[kind] = str(tmp_path_factory.mktemp("graph"))
            graph(tower, example, dims, traced[kind], *names)
        shutil.copytree(traced[kind], folder, dirs_exist_ok=True)
        return os.path.join(folder, "plain.onnx")

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "graph", graph_once)
        for name, dtype in ((VIT, "float32"), (VIT, "float16"), (VIT, "int8"), (RN, "float32")):
            model.save(clip_named(name), str(room / name))
            found[name, dtype] = str(room / f"{name}-{dtype}")
            patch.setattr(onnx, "LARGE", 2**31 if name == VIT else 1000)  # RN's numbers lie beside its graphs
            weights.main(["convert", str(room / name), found[name, dtype], "--to", "onnx", "--dtype", dtype])
    return found


def session(folder: str, tower: str):
    import onnxruntime
    return onnxruntime.InferenceSession(os.path.join(folder, "onnx", f"{tower}_model.onnx"))


def farthest(found, expected: torch.Tensor) -> float:
    """max ||found - expected|| / ||expected|| over the rows [B, E]."""
    return ((torch.as_tensor(found) - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def captions(batch: int, length: int) -> torch.Tensor:
    """ids [batch, length] of captions that are ever shorter; the first has no padding."""
    ids = torch.randint(106, 21128, (batch, length), generator=torch.Generator().manual_seed(length))
    ids[:, 0] = 101
    for row, end in enumerate(torch.linspace(length - 1, 2, batch).int().tolist()):
        ids[row, end], ids[row, end + 1 :] = 102, 0
    return ids


@torch.inference_mode()
def test_a_worked_example(folders):
    """一只猫 is [CLS] 671 1372 4344 [SEP]. Nothing but onnxruntime and numpy opens the folder; with as many
    zeros as you like behind it, the caption has the same feature."""
    (feature,) = session(folders[VIT, "float32"], "text").run(None, {
        "input_ids": np.array([[101, 671, 1372, 4344, 102]])})
    (padded,) = session(folders[VIT, "float32"], "text").run(None, {
        "input_ids": np.array([[101, 671, 1372, 4344, 102] + 300 * [0], [101, 102] + 303 * [0]])})
    assert feature.shape == (1, 16) and padded.shape == (2, 16) and feature.dtype == np.float32
    assert farthest(padded[:1], torch.tensor(feature)) < 1e-5
    assert farthest(feature, clip_named(VIT).encode_text(data.tokenize("一只猫"))) < 1e-5
    assert farthest(padded[1:], torch.tensor(feature)) > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", [VIT, RN])
def test_features_are_ours(name, batch, folders):
    clip, (theirs, preprocess) = clip_named(name), onnx.load(folders[name, "float32"])
    pixels = random_pixels(batch, 32)
    assert farthest(theirs.encode_image(pixels), clip.encode_image(pixels)) < 1e-5
    for length in (3, 12, 52, 128):
        ids = captions(batch, length)
        expected = clip.encode_text(ids)
        assert farthest(theirs.encode_text(ids), expected) < 1e-5
        padded = torch.nn.functional.pad(ids, (0, 200 - length)).numpy()
        found = session(folders[name, "float32"], "text").run(None, {"input_ids": padded})[0]
        assert farthest(found, expected) < 1e-5
    beside = os.path.isfile(os.path.join(folders[name, "float32"], "onnx", "text_model.onnx_data"))
    assert beside == (name == RN)
    torch.testing.assert_close(theirs.get_similarity(pixels, ids)[0], clip.get_similarity(pixels, ids)[0])
    assert theirs.config == clip.config and preprocess(noise(40, 30)).shape == (3, 32, 32)


@torch.inference_mode()
@pytest.mark.parametrize("dtype, limit", [("float16", 0.002), ("int8", 0.05)])
def test_smaller_numbers_give_nearly_the_same_features(dtype, limit, folders):
    """Measured: 0.0007 and 0.03; signed 8 bits, which overflow where there is no AVX512-VNNI, give 0.1."""
    clip, (theirs, _) = clip_named(VIT), onnx.load(folders[VIT, dtype])
    pixels, ids = random_pixels(7, 32), captions(7, 52)
    assert 1e-5 < farthest(theirs.encode_image(pixels), clip.encode_image(pixels)) < limit
    assert 1e-5 < farthest(theirs.encode_text(ids), clip.encode_text(ids)) < limit
    whole, smaller = (sum(map(os.path.getsize, onnx.towers_in(folders[VIT, which])))
                      for which in ("float32", dtype))
    assert smaller < 0.51 * whole


@torch.inference_mode()
@pytest.mark.parametrize("name, dtype", [(VIT, "float32"), (VIT, "int8"), (RN, "float32")])
def test_openvino_opens_it(name, dtype, folders):
    core, clip = pytest.importorskip("openvino").Core(), clip_named(name)
    vision, text = (core.compile_model(path, "CPU") for path in onnx.towers_in(folders[name, dtype]))
    pixels, ids = random_pixels(3, 32), captions(3, 20)
    limit = 1e-5 if dtype == "float32" else 0.05
    assert farthest(vision(pixels.numpy())[0], clip.encode_image(pixels)) < limit
    assert farthest(text(ids.numpy())[0], clip.encode_text(ids)) < limit


def test_the_example_of_the_page(folders, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
               if "onnxruntime" in block)
    assert "torch" not in code and len(code.splitlines()) <= 40
    os.symlink(folders[VIT, "float32"], tmp_path / "vit-b-16-onnx")
    noise(70, 50).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "weights.md", "exec"), names)
    pixels = data.preprocess(Image.open("photo.jpg"), 32)[None]
    assert np.abs(names["pixels"]("photo.jpg") - pixels.numpy()).max() < 1e-6
    shares = clip_named(VIT).get_similarity(pixels, data.tokenize(names["captions"]))[0].softmax(dim=-1)[0]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"{x:.1%}" for x in shares]


# ------------------------------------------------------------------------------------------------------------
# the commands that take such a folder


def test_recall_is_the_same(folders, pairs, tmp_path):
    model.save(clip_named(VIT), str(tmp_path / "ours"))
    results = []
    for name in (str(tmp_path / "ours"), folders[VIT, "float32"]):
        measure.main(["retrieval", "--model", name, "--data", pairs, "--device", "cpu",
                      "--features", f"{tmp_path}/{len(results)}", "--out", f"{tmp_path}/out.json"])
        results.append(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")))
    assert results[0]["mean_recall"] == results[1]["mean_recall"] and results[0]["mean_recall"] > 0
    for name in ("image_features.npy", "text_features.npy"):
        ours, theirs = (np.load(tmp_path / str(number) / name) for number in (0, 1))
        assert np.abs(ours - theirs).max() < 1e-5 and ours.any()


def test_kept_features_know_the_folder_again(folders):
    keys = ((VIT, "float32"), (VIT, "float32"), (VIT, "int8"), (RN, "float32"))
    clips = [onnx.load(folders[key])[0] for key in keys]
    assert len({digest(clip.state_dict()) for clip in clips}) == 3
    assert digest(clips[0].state_dict()) == digest(clips[1].state_dict())
    count = sum(p.numel() for p in clip_named(VIT).parameters())
    assert sum(p.numel() for p in clips[0].parameters()) == count  # which ELEVATER asks for


def test_search(folders, tmp_path, capsys):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    search.main([str(tmp_path), "红色", "--model", folders[RN, "float32"], "--index", str(tmp_path / "index"),
                 "--alike", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 3


# ------------------------------------------------------------------------------------------------------------
# mistakes


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda package: None)
    model.save(built(VIT), str(tmp_path / "a"))
    message = refusal(weights.main, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "onnx"])
    assert message.endswith("pip install onnx onnxruntime onnxscript")
    (tmp_path / "b" / "onnx").mkdir(parents=True)
    (tmp_path / "b" / "onnx" / "text_model.onnx").touch()
    assert refusal(onnx.load, str(tmp_path / "b")).endswith("pip install onnxruntime")


def test_an_export_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no space left")
    monkeypatch.setattr(onnx, "expect", lambda *packages: None)
    monkeypatch.setattr(onnx, "export", fails)
    with pytest.raises(OSError):
        weights.save_onnx(built(VIT), str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore:'tools.*found in sys.modules")
def test_a_precision_for_another_layout():
    code, said = typed("python -m tools.weights", "convert", "a", "b", "--to", "ours", "--dtype", "int8")
    assert code == 2 and "only --to onnx" in said


def cut(folder):
    os.truncate(folder / "onnx" / "vision_model.onnx", 1000)


def from_a_resnet(folder):
    config = dataclasses.asdict(model.MODELS["RN-micro"]) | {"logit_scale": 1.0}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage, part", [
    (lambda folder: (folder / "onnx" / "text_model.onnx").unlink(), "one text_model*.onnx"),
    (lambda folder: shutil.copy(folder / "onnx/text_model.onnx", folder / "onnx/text_model_fp16.onnx"),
     "has vision_model.onnx, text_model.onnx, text_model_fp16.onnx in onnx/; expected one"),
    (lambda folder: (folder / "config.json").unlink(), "config.json beside onnx/"),
    (lambda folder: (folder / "config.json").write_text("{}"), "config.json: the config in it"),
    (cut, "cannot be opened"),
    (from_a_resnet, "have the sizes [3, 32, 32, 16, 16], its config.json says [3, 64, 64, 128, 128]")])
def test_a_damaged_folder(damage, part, folders, tmp_path):
    shutil.copytree(folders[VIT, "float32"], tmp_path / "it")
    damage(tmp_path / "it")
    message = refusal(onnx.load, str(tmp_path / "it"))
    assert part in message and str(tmp_path / "it") in message


def test_a_config_without_the_temperature(folders, tmp_path):
    """As beside a model.onnx that another program exported."""
    shutil.copytree(folders[VIT, "float32"], tmp_path / "it")
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    del config["logit_scale"]
    (tmp_path / "it" / "config.json").write_text(json.dumps(config))
    assert "logit_scale" in refusal(onnx.load, str(tmp_path / "it"))
