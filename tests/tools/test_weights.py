"""tools/weights.py: files as other programs read them, and the command."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import RN, TEXTS, VIT, agree, built, features, refusal, same, saved, theirs
from conftest import ROOT, noise
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
        wrote, then = capsys.readouterr().out.splitlines()[-2:]
        assert wrote == f"wrote {tmp_path / target}"
        assert then == f"next: python -m tools.weights info {tmp_path / target}"
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


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "tRNS"])
def test_their_processor_gives_our_pixels_of_every_kind_of_picture(mode, tmp_path):
    """Of transparent ones too. transformers 5.0 and before dropped transparency as the official code does."""
    weights.save_hugging_face(built(VIT), str(tmp_path))
    processor = transformers.ChineseCLIPProcessor.from_pretrained(tmp_path, backend="pil")
    image = noise(70, 50).convert("P" if mode == "tRNS" else mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode == "tRNS":
        image.save(tmp_path / "picture.png", transparency=bytes(range(256)))
        image = Image.open(tmp_path / "picture.png")
    given = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(given, data.preprocess(image, 32))
    transparent = mode in ("RGBA", "LA", "tRNS")
    assert torch.equal(given, data.preprocess(image.convert("RGB"), 32)) != transparent


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
    then = f"next: python -m tools.weights info {path}"
    assert capsys.readouterr().out.splitlines() == [str(path), then] and path.is_file()
    hub.statuses = [404]
    assert "404" in refusal(weights.main, ["download", "rbt3", "--to", str(tmp_path)])


def test_what_is_said_to_be_next_works_with_any_path(tmp_path, capsys, monkeypatch):
    """The folder's name has a space and a quotation mark."""
    folder = tmp_path / "it's here"
    bert = {"encoder.layer.0.output.dense.bias": torch.ones(3)}
    monkeypatch.setattr(weights, "fetch", lambda name, to: saved(folder, bert))
    folder.mkdir()
    weights.main(["download", "rbt3", "--to", str(folder)])
    path, then = capsys.readouterr().out.splitlines()
    assert then.startswith("next: python -m tools.weights info ")
    weights.main(shlex.split(then)[4:])
    assert path in capsys.readouterr().out


@pytest.mark.parametrize("words, part", [
    (["convert", "lost.pt", "out.pt", "--to", "ours"], "lost.pt: no such file or folder"),
    (["convert", "folder", "out.pt", "--to", "ours"], "folder: no weights in this folder"),
    (["convert", "text.txt", "out.pt", "--to", "ours"], "text.txt"),
    (["convert", "a", "folder", "--to", "ours"], "folder: is there already"),
    (["convert", "a", "folder", "--to", "official"], "folder: is there already"),
    (["convert", "a", "text.txt/out.pt", "--to", "ours"], "text.txt is a file"),
    (["convert", "a", "text.txt/out", "--to", "huggingface"], "text.txt is a file"),
    (["interpolate", "a", "lost", "out.pt"], "lost: no such file or folder"),
    (["interpolate", "a", "a", "folder"], "folder: is there already"),
    (["interpolate", "a", "a", "text.txt/out"], "text.txt is a file"),
    (["info", "lost"], "lost: no such file or folder"),
    (["download", "RN50", "--to", "text.txt"], "text.txt/RN50")])
def test_a_wrong_path_is_one_line(words, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save(built(VIT), "a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("一只猫", encoding="utf-8")
    assert part in refusal(weights.main, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder", "text.txt"]


@pytest.mark.parametrize("to", ["ours", "official", "huggingface"])
def test_a_folder_that_is_not_there_is_made(to, tmp_path):
    model.save(built(VIT), str(tmp_path / "a"))
    weights.main(["convert", str(tmp_path / "a"), str(tmp_path / "new" / "er" / "b"), "--to", to])
    assert same(model.load(str(tmp_path / "new" / "er" / "b"))[0].state_dict(), built(VIT).state_dict())


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_interpolation(share, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        model.save(built(RN, seed), str(tmp_path / name))
    weights.main(["interpolate", *(str(tmp_path / name) for name in "abc"), "--share", str(share)])
    then = f"next: python -m tools.weights info {tmp_path / 'c'}"
    assert capsys.readouterr().out.splitlines()[-1] == then
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
