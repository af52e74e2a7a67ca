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
from conftest import ROOT, noise, says
from PIL import Image
from stand_ins import write_official

import data
import model
from eval import retrieval
from sources.layouts import open_pairs
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


def test_a_soup_is_the_mean_of_all(tmp_path, capsys):
    """Of three, each counts a third."""
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        model.save(built(RN, seed), str(tmp_path / name))
    weights.main(["interpolate", *(str(tmp_path / name) for name in "abcd")])
    assert f"the mean of {tmp_path / 'a'}, {tmp_path / 'b'}, {tmp_path / 'c'}" in capsys.readouterr().out
    states = [built(RN, seed).state_dict() for seed in (1, 2, 3)]
    for name, value in model.load(str(tmp_path / "d"))[0].state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(state[name] for state in states) / 3)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A folder to be in, with the models a and b, the second trained a little, and validation pairs."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        model.save(built(VIT, seed), name)
    write_official(tmp_path / "MUGE", "valid", count=12)
    return tmp_path


def test_a_sweep_measures_the_way_between_two(two, capsys):
    """Its ends are the recall of the two files, the best share is written, and the curve is drawn."""
    weights.main(["interpolate", "a", "b", "new/c", "--sweep", "MUGE"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith(" MUGE")]
    assert [line[0] for line in lines] == [str(percent) for percent in range(0, 101, 10)]
    pairs = open_pairs("MUGE", "valid")
    for line, name in (lines[0], "a"), (lines[-1], "b"):
        found = retrieval(model.load(name)[0], pairs)
        expected = found["mean_recall"], found["text_to_image"]["R@1"], found["image_to_text"]["R@1"]
        assert line[2:5] == [f"{value:.1f}" for value in expected]
    best = max(lines, key=lambda line: float(line[2]))
    weights.main(["interpolate", "a", "b", "d", "--share", str(int(best[0]) / 100)])
    assert same(model.load("new/c")[0].state_dict(), model.load("d")[0].state_dict())
    with Image.open("new/c.png") as curve:
        assert curve.format == "PNG"


def test_the_share_of_a_sweep_is_the_best_on_all_its_sets_unless_one_is_given(two, monkeypatch):
    """a is better on one set, b on the other by less, and 30 % of b on both together."""
    def found(clip, pairs):
        percent = round(100 * clip.logit_scale.item())  # which is the share, see below
        mean = {"one": 60 - percent / 2, "other": 50 + percent / 4}[pairs] + 40 * (percent == 30)
        return {"mean_recall": mean, "text_to_image": {"R@1": 0.0}, "image_to_text": {"R@1": 0.0}}

    for name, scale in (("a", 0.0), ("b", 1.0)):
        clip = built(VIT)
        clip.logit_scale.data.fill_(scale)
        model.save(clip, f"{name}1")
    drawn = []
    monkeypatch.setattr(weights, "open_pairs", lambda name, split: name)
    monkeypatch.setattr(weights, "retrieval", found)
    monkeypatch.setattr(weights, "curve", lambda path, series, *words: drawn.append((path, series)))
    for target, flags, share in (("c", [], 0.3), ("d", ["--share", "0.9"], 0.9)):
        weights.main(["interpolate", "a1", "b1", target, "--sweep", "one", "other", *flags])
        assert model.load(target)[0].logit_scale.item() == pytest.approx(share)
    path, series = drawn[0]
    assert path == "c.png"
    assert series["one"] == [[(n, 60 - n / 2 + 40 * (n == 30)) for n in range(0, 101, 10)]]
    assert list(series) == ["one", "other"]


@pytest.mark.parametrize("words, part", [
    (["a", "b", "c", "--share", "50"], "--share 50"), (["a", "c"], "1 models: --share"),
    (["a", "b", "a", "c", "--share", "0.1"], "3 models: --share"),
    (["a", "b", "a", "c", "--sweep", "MUGE"], "3 models: --share")])
def test_a_point_is_between_two(words, part, two):
    assert part in refusal(weights.main, ["interpolate", *words])
    assert not (two / "c").exists()


def test_a_sweep_without_validation_pairs_loads_nothing(two, capsys):
    says(lambda: weights.main(["interpolate", "a", "b", "c", "--sweep", "MUGE", "lost"]), "lost")
    assert "loaded" not in capsys.readouterr().out


def test_interpolation_between_different_models(tmp_path):
    for name, row in (("a", RN), ("b", VIT)):
        model.save(built(row), str(tmp_path / name))
    with pytest.raises(WeightsError, match="RN-tiny.*ViT-tiny.*expected models of the same sizes"):
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
