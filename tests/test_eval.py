"""Encoding, retrieval and zero-shot classification against plain restatements; the command."""

import json
import os
import socket
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import data
import eval as measure  # `eval` alone would hide Python's own
from tools.measure import kept
from tools.measure import metrics
import model
from sources import layouts
from tools.measure import zeroshot
from sources.pairs import DataError, open_image
from stand_ins import TEXTS, Six, picture, restated


# ------------------------------------------------------------------------------------------------------------
# features


@pytest.fixture(scope="module")
def clip() -> model.ChineseCLIP:
    """Large random matrices, so that no two pictures or captions look alike to it, as they do when fresh."""
    clip, random = model.ChineseCLIP(model.MODELS["ViT-tiny"]).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return clip


@torch.no_grad()
def encoded(clip, texts: list[str]) -> torch.Tensor:
    """One by one, so without padding."""
    ids = [data.tokenize(text) for text in texts]
    return F.normalize(torch.cat([clip.encode_text(row[:, : int((row > 0).sum())]) for row in ids]), dim=1)


@torch.no_grad()
def seen(clip, pictures) -> torch.Tensor:
    pixels = torch.stack([data.preprocess(it, clip.config.visual.resolution) for it in pictures])
    return F.normalize(clip.encode_image(pixels), dim=1)


@pytest.mark.parametrize("batch_size", (1, 3, 256))
def test_texts_come_back_in_their_order(clip, batch_size):
    found = measure.encode_texts(clip, TEXTS, 52, batch_size)
    assert found.shape == (8, 16) and found.dtype == torch.float32
    torch.testing.assert_close(found, encoded(clip, TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", (1, 3, 64))
def test_images_come_back_in_their_order(clip, batch_size):
    found = measure.encode_images(clip, picture, 7, batch_size)
    torch.testing.assert_close(found, seen(clip, map(picture, range(7))), rtol=0, atol=1e-5)


def test_features_that_are_no_numbers_are_refused():
    def function(rows):
        return torch.tensor([[1.0, float("nan") if row == 3 else 2.0] for row in rows])

    with pytest.raises(DataError, match="1 of 5 features"):
        kept.encode(function, range(5), 2, "encoding")


def test_retrieval_is_recall_of_the_encoders(clip):
    result = measure.retrieval(clip, Six())
    scores = encoded(clip, TEXTS[:6]) @ seen(clip, map(picture, range(5))).T
    t2i = restated(scores.tolist(), Six.positives.tolist())
    i2t = restated(scores.T.tolist(), Six.positives.flip(1).tolist())
    assert result["text_to_image"] == pytest.approx(t2i, rel=1e-6)
    assert result["image_to_text"] == pytest.approx(i2t, rel=1e-6)
    assert result["mean_recall"] == pytest.approx((t2i["mean"] + i2t["mean"]) / 2, rel=1e-6)


def test_a_caption_that_is_no_text_cannot_be_measured(clip):
    pairs = Six()
    pairs.texts = [*TEXTS[:5], None]
    with pytest.raises(DataError, match="not text"):
        measure.retrieval(clip, pairs)


# ------------------------------------------------------------------------------------------------------------
# zero-shot classification


def test_class_features_normalise_average_normalise(clip):
    names, templates = ["猫", "一艘船"], ["{}", "一张{}的照片", "{}和{}"]
    found = zeroshot.class_features(clip, names, templates)
    for row, sentences in zip(found, (["猫", "一张猫的照片", "猫和猫"], ["一艘船", "一张一艘船的照片", "一艘船和一艘船"])):
        mean = encoded(clip, sentences).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-5)


def write_classes(folder, names=("猫", "船", "花"), count: int = 2) -> str:
    """The official layout; picture n of class c is picture(10 * c + n)."""
    os.makedirs(folder / "test", exist_ok=True)
    (folder / "label_cn.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for label in range(len(names)):
        os.makedirs(folder / "test" / f"{label:03d}")
        for n in range(count):
            picture(10 * label + n).save(folder / "test" / f"{label:03d}" / f"{n}.png")
    return str(folder)


def test_classes_of_the_official_layout(tmp_path):
    classes, paths, labels = measure.open_classes(write_classes(tmp_path / "set"))
    assert classes.chinese == ["猫", "船", "花"] and classes.metric == "accuracy"
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for path, label, n in zip(paths, labels.tolist(), (0, 1) * 3):
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(picture(10 * label + n)))


def test_classes_that_are_wrong(tmp_path):
    def says(*parts: str):
        with pytest.raises(DataError) as caught:
            measure.open_classes(folder)
        message = str(caught.value)
        assert "\n" not in message and all(part in message for part in parts), message

    folder = str(tmp_path / "nothing")
    says("label_cn.txt")
    folder = write_classes(tmp_path / "set")
    os.makedirs(tmp_path / "set" / "test" / "003")
    says(os.path.join("test", "003"), "000 to 002")
    os.rename(tmp_path / "set" / "test" / "003", tmp_path / "set" / "test" / "cat")
    says(os.path.join("test", "cat"), "000 to 002")
    folder = write_classes(tmp_path / "empty", count=0)
    says("empty", "no pictures")
    folder = str(tmp_path / "labels only")
    os.makedirs(folder)
    (tmp_path / "labels only" / "label_cn.txt").write_text("猫\n", encoding="utf-8")
    says("labels only", "no pictures")


def test_templates_need_a_place_for_the_name(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("\ufeff# a note\n一张{}的照片\n\n  {}  \n", encoding="utf-8")
    assert measure.read_templates(str(path)) == ["一张{}的照片", "{}"]
    path.write_text("{}\n一张照片\n", encoding="utf-8")
    with pytest.raises(DataError, match="一张照片"):
        measure.read_templates(str(path))


def test_templates_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="nothing.txt"):
        measure.read_templates(str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("# a note\n", encoding="utf-8")
    with pytest.raises(DataError, match="empty.txt"):
        measure.read_templates(str(tmp_path / "empty.txt"))


def test_our_templates_are_valid():
    templates = measure.read_templates(measure.TEMPLATES)
    assert len(templates) >= 2 and len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 for template in templates)


# ------------------------------------------------------------------------------------------------------------
# the command


RETRIEVAL = ("retrieval", "--device", "cpu", "--split", "test", "--model")
ZEROSHOT = ("zeroshot", "--device", "cpu", "--model")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    measure.main()


@pytest.fixture
def weights(clip, tmp_path) -> str:
    model.save(clip, str(tmp_path / "tiny.safetensors"))
    return str(tmp_path / "tiny.safetensors")


def write_pairs(folder) -> str:
    os.makedirs(folder)
    for row in range(5):
        picture(row).save(folder / f"{row}.png")
    lines = [{"image": f"{image}.png", "text": TEXTS[text]} for text, image in Six.positives.tolist()[:6]]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(folder)


def test_retrieval_command_prints_a_table_and_writes_json(clip, weights, tmp_path, monkeypatch, capsys):
    folder, out = write_pairs(tmp_path / "pairs"), tmp_path / "result.json"
    command(monkeypatch, *RETRIEVAL, weights, "--data", folder, "--out", out)
    printed = capsys.readouterr().out
    assert "5 images, 6 texts, 6 pairs" in printed and str(out) in printed
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["model"] == weights and result["data"] == folder and result["split"] == "test"
    expected = measure.retrieval(clip, layouts.open_pairs(folder, "test"))
    for way in ("text_to_image", "image_to_text"):
        assert result[way] == pytest.approx(expected[way])
        assert all(f"{result[way][f'R@{k}']:.1f}" in printed for k in (1, 5, 10))
    assert result["mean_recall"] == pytest.approx(expected["mean_recall"])
    assert f"{result['mean_recall']:.1f}" in printed


def test_zeroshot_command_prints_a_line_and_writes_json(clip, weights, tmp_path, monkeypatch, capsys):
    folder, out = write_classes(tmp_path / "classes"), tmp_path / "result.json"
    command(monkeypatch, *ZEROSHOT, weights, "--data", folder, "--out", out)
    printed = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["classes"], result["images"], result["chance"]) == (3, 6, pytest.approx(100 / 3))
    templates, labels = measure.read_templates(measure.TEMPLATES), torch.tensor([0, 0, 1, 1, 2, 2])
    images = measure.encode_images(clip, lambda row: picture(10 * (row // 2) + row % 2), 6)
    for key, some in (("accuracy", templates), ("accuracy_single_template", templates[:1])):
        classes = zeroshot.class_features(clip, ["猫", "船", "花"], some)
        assert result[key] == pytest.approx(metrics.accuracy(images @ classes.T, labels))
        assert f"{result[key]:.1f} %" in printed
    assert result["templates"] == len(templates)


def test_result_file_in_a_folder_that_is_not_there_yet(weights, tmp_path, monkeypatch):
    out = tmp_path / "new" / "result.json"
    command(monkeypatch, *RETRIEVAL, weights, "--data", write_pairs(tmp_path / "pairs"), "--out", out)
    assert "mean_recall" in json.loads(out.read_text(encoding="utf-8"))


def test_data_that_is_wrong_is_a_data_error(weights, tmp_path, monkeypatch):
    for task in (RETRIEVAL, ZEROSHOT):
        with pytest.raises(DataError, match="nowhere"):
            command(monkeypatch, *task, weights, "--data", tmp_path / "nowhere")


def in_one_of_two(rank: int, port: int, commands: list[list[str]]):
    """A process as torchrun starts it; tiles so small that both have some."""
    torch.set_num_threads(1)
    metrics.TILE = 2
    for number, arguments in enumerate(commands):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + number)}
        measure.main(arguments)


def test_two_processes_measure_what_one_does(weights, tmp_path, monkeypatch):
    """Tables, predictions, a page and thresholds; the features are kept by one and found by both."""
    folder, classes = write_pairs(tmp_path / "pairs"), write_classes(tmp_path / "classes")
    many = str(tmp_path / "many")
    os.makedirs(many)
    lines = [{"image": f"{row}.png", "text": TEXTS[row % 8] * (1 + row // 8)} for row in range(12)]
    for row, line in enumerate(lines):
        picture(row).save(os.path.join(many, line["image"]))
    (tmp_path / "many" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def commands(out) -> list[list[str]]:
        return [[*RETRIEVAL, weights, "--data", folder, "--out", f"{out}/r.json", "--features", f"{out}/f"],
                [*RETRIEVAL, weights, "--data", many, "--predictions", f"{out}/p", "--page", f"{out}/r.html"],
                [*ZEROSHOT, weights, "--data", classes, "--out", f"{out}/z.json", "--page", f"{out}/z.html"],
                ["calibrate", *RETRIEVAL[1:], weights, "--data", folder, "--out", f"{out}/c.json",
                 "--precision", "0.3", "--features", f"{out}/f"]]
    for arguments in commands(tmp_path / "one"):
        measure.main(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_one_of_two, (port, commands(tmp_path / "two")), nprocs=2)
    for name in ("p", "r.html", "z.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in ("r.json", "z.json", "c.json"):
        one, two = (json.loads((tmp_path / out / name).read_text("utf-8")) for out in ("one", "two"))
        for key in ("out", "features", "page"):
            one.pop(key, None), two.pop(key, None)
        assert one == two, name


@pytest.mark.parametrize("flag", ("--out", "--page", "--predictions"))
def test_a_folder_is_no_file_to_write(flag, weights, tmp_path, monkeypatch, capsys):
    """Said before anything is encoded, by exit code 2."""
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *RETRIEVAL, weights, "--data", tmp_path / "nothing", flag, tmp_path)
    assert caught.value.code == 2 and f"{flag} {tmp_path}: a folder" in capsys.readouterr().err


def test_weights_in_half_the_bits(clip, weights, tmp_path, monkeypatch):
    """Nearly the same features, from --dtype as from load; the temperature is not rounded."""
    folder = write_pairs(tmp_path / "pairs")
    command(monkeypatch, *RETRIEVAL, weights, "--data", folder, "--dtype", "bfloat16",
            "--features", tmp_path / "f")
    half, _ = model.load(weights, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.logit_scale.dtype == torch.float32
    for name, exact in (("image", seen(clip, map(picture, range(5)))), ("text", encoded(clip, TEXTS[:6]))):
        found = torch.from_numpy(np.load(tmp_path / "f" / f"{name}_features.npy"))
        cosines = (found * exact).sum(dim=1)
        assert (cosines > 0.999).all() and not torch.equal(found, exact), name
    with pytest.raises(DataError, match=r"not the same: dtype\)"):
        command(monkeypatch, *RETRIEVAL, weights, "--data", folder, "--features", tmp_path / "f")


@pytest.mark.parametrize("dtype", ("int8", torch.int8, "load", None))
def test_a_dtype_that_is_none_is_refused(weights, dtype):
    with pytest.raises(ValueError, match="expected float32, bfloat16, float16"):
        model.load(weights, dtype=dtype)


def test_a_broken_picture_is_named(weights, tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "pairs")
    (tmp_path / "pairs" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="3.png"):
        command(monkeypatch, *RETRIEVAL, weights, "--data", folder)


def test_the_endless_training_split_of_the_scenes_cannot_be_measured(weights, monkeypatch):
    with pytest.raises(DataError, match="scenes-en"):
        command(monkeypatch, "retrieval", "--model", weights, "--data", "scenes-en", "--split", "train")


@pytest.mark.parametrize("arguments", ((), ("sing",), ("retrieval", "--data", "x"), ZEROSHOT))
def test_a_wrong_command_line_ends_with_2(arguments, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *arguments)
    assert caught.value.code == 2
