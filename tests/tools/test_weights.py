"""tools/weights.py: files as other programs read them, and the command."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import RN, TEXTS, VIT, agree, built, features, refusal, same, saved, theirs
from conftest import ROOT
from PIL import Image

import data
import model
from tools import weights
from weights.names import WeightsError


def test_convert_around_and_back(tmp_path, capsys):
    model.save(built(VIT), str(tmp_path / "a"))
    for source, target, layout in (
            ("a", "b.pt", "official"), ("b.pt", "hf", "huggingface"), ("hf", "c.safetensors", "ours")):
        weights.main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", layout])
        assert f"wrote {tmp_path / target}" in capsys.readouterr().out
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------
# to transformers and to the official code


@pytest.mark.parametrize("name", [VIT, "ViT-mini"])
def test_transformers_opens_what_we_write(name, tmp_path):
    clip = built(name)
    weights.save_hugging_face(clip, str(tmp_path))
    hf, problems = transformers.ChineseCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    agree(features(clip), theirs(hf.eval(), clip.config.visual.resolution))
    agree(features(model.load(str(tmp_path))[0]), features(clip))


def test_the_written_processor_gives_the_same_ids_and_pixels(tmp_path):
    weights.save_hugging_face(built(VIT), str(tmp_path))
    processor = transformers.ChineseCLIPProcessor.from_pretrained(tmp_path, backend="pil")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
              for shape in ((50, 70, 3), (32, 32, 3), (9, 200, 3), (40, 40))]
    given = processor(text=TEXTS, images=images, return_tensors="pt", padding="max_length", truncation=True)
    assert torch.equal(given["input_ids"], data.tokenize(TEXTS))
    assert torch.equal(given["attention_mask"] == 1, data.tokenize(TEXTS) != 0)
    pixels = torch.stack([data.preprocess(image, 32) for image in images])
    assert torch.equal(given["pixel_values"], pixels)


def test_a_resnet_has_no_place_in_transformers(tmp_path):
    assert "--to official" in refusal(weights.save_hugging_face, built(RN), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", [VIT, RN])
def test_official_files(name, tmp_path):
    clip = built(name)
    weights.save_official(clip, str(tmp_path / "clip.pt"))
    content = torch.load(tmp_path / "clip.pt", weights_only=True)
    assert set(content) == {"epoch", "step", "name", "state_dict"}
    assert all(key.startswith("module.") for key in content["state_dict"])
    assert same({k.removeprefix("module."): v for k, v in content["state_dict"].items()}, clip.state_dict())


# ------------------------------------------------------------------------------------------------------------
# the command


@pytest.mark.parametrize("there", ["file", "folder"])
def test_convert_overwrites_nothing(there, tmp_path):
    model.save(built(VIT), str(tmp_path / "a"))
    target = tmp_path / "b"
    if there == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "config.json").write_text("mine")
    message = refusal(weights.main, ["convert", str(tmp_path / "a"), str(target), "--to", "huggingface"])
    assert "is there already" in message
    assert (target if there == "file" else target / "config.json").read_text() == "mine"


@pytest.mark.parametrize("layout", ["ours", "official"])
def test_info_tells_what_a_file_is(layout, tmp_path, capsys):
    save = {"ours": model.save, "official": weights.save_official}[layout]
    save(built(RN), str(tmp_path / "file"))
    weights.main(["info", str(tmp_path / "file")])
    out = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in built(RN).state_dict().values())
    assert f"{count:,} numbers" in out and "look like RN-tiny" in out
    assert {"ours": "safetensors", "official": "PyTorch file"}[layout] in out
    assert ("its config says RN-tiny" in out) == (layout == "ours")


@pytest.mark.parametrize("layout", ["ours", "official", "huggingface"])
def test_a_full_disk_leaves_nothing(layout, tmp_path, monkeypatch):
    model.save(built(VIT), str(tmp_path / "a"))

    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="could not be written"):
        weights.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", layout])
    assert not (tmp_path / "b").exists()


def test_download_as_a_command(hub, tmp_path, capsys):
    weights.main(["download", "ViT-B-16", "--to", str(tmp_path)])
    path = tmp_path / "ViT-B-16" / "clip_cn_vit-b-16.pt"
    assert capsys.readouterr().out.strip() == str(path) and path.is_file()
    hub.statuses = [404]
    assert "404" in refusal(weights.main, ["download", "rbt3", "--to", str(tmp_path)])


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_interpolation(share, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        model.save(built(RN, seed), str(tmp_path / name))
    weights.main(["interpolate", *(str(tmp_path / name) for name in "abc"), "--share", str(share)])
    mixed = model.load(str(tmp_path / "c"))[0]
    one, other = (built(RN, seed).state_dict() for seed in (1, 2))
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - share) * one[name] + share * other[name])


def test_interpolation_does_not_leave_the_two(tmp_path):
    assert "--share 50" in refusal(weights.interpolate, "a", "b", str(tmp_path / "c"), 50)


def test_interpolation_between_different_models(tmp_path):
    for name, row in (("a", RN), ("b", VIT)):
        model.save(built(row), str(tmp_path / name))
    with pytest.raises(WeightsError, match="RN-tiny.*ViT-tiny.*expected two of the same sizes"):
        weights.main(["interpolate", *(str(tmp_path / name) for name in "abc")])
    assert not (tmp_path / "c").exists()


def test_info_of_a_bert(tmp_path, capsys):
    weights.main(["info", saved(tmp_path, {"encoder.layer.0.output.dense.bias": torch.ones(3)})])
    assert "none of RN50" in capsys.readouterr().out


def test_the_command_as_it_is_typed(tmp_path):
    def typed(*words):
        command = [sys.executable, "-m", "tools.weights", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert {"download", "info", "convert"} <= set(typed("--help").stdout.replace(",", " ").split())
    lost = typed("info", str(tmp_path / "lost"))
    assert lost.returncode == 1 and lost.stderr.startswith("error: ") and "Traceback" not in lost.stderr
    assert typed("download", "ViT-B-99").returncode == 2
