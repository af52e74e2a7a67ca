"""Recall and accuracy by hand; encoding, retrieval and zero-shot classification against plain restatements;
the two commands."""

import json
import os
import socket
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import typed
from stand_ins import TEXTS, Six, picture, restated, write_classes, write_folders

import data
import eval as measure  # `eval` alone would hide Python's own
import model
from sources import layouts
from sources.classes import TEMPLATES, read_templates
from sources.pairs import DataError
from tools.measure import __main__ as rarer


def unit(n: int, E: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, E, generator=torch.Generator().manual_seed(seed)), dim=1)


def t2i(*arguments) -> dict[str, float]:
    return measure.recall_at_k(*arguments)[0]


# ------------------------------------------------------------------------------------------------------------
# recall


def test_recall_by_hand():
    """Three captions, twelve pictures. The pictures' features are the unit vectors, so a caption's features
    are its cosines with them."""
    pictures, captions = torch.eye(12), torch.zeros(3, 12)
    captions[0, 4], captions[0, 7] = 0.9, 0.3  # its picture 4 comes first
    captions[1, :3], captions[1, 5] = 0.8, 0.5  # three wrong pictures come before its picture 5
    captions[2] = 0.2  # all twelve tie, and the eleven wrong ones count as before its picture 9
    positives = torch.tensor([[0, 4], [1, 5], [2, 9]])  # (caption, picture) pairs that belong together
    text_ranks, _ = measure.places(captions, pictures, positives)
    assert text_ranks.tolist() == [0, 3, 11]
    recall = t2i(captions, pictures, positives)  # how many of the three places are below 1, 5 and 10?
    assert recall == pytest.approx({"R@1": 100 / 3, "R@5": 200 / 3, "R@10": 200 / 3, "mean": 500 / 9})


def test_the_best_of_several_right_answers_counts():
    # with the identity as gallery, a query's row is its scores: here with 14 items
    queries = torch.zeros(4, 14)
    queries[0, 2] = 1.0  # its right answer comes first
    queries[1, 3] = 0.9  # one wrong answer before the better of its two
    queries[1, 0], queries[1, 7] = 0.8, 0.1
    queries[2, :6], queries[2, 13] = 0.9, 0.5  # six wrong answers before
    queries[3, 4:], queries[3, :3] = 0.9, torch.tensor([0.1, 0.2, 0.3])  # ten before the best of its three
    positives = torch.tensor([[3, 2], [1, 7], [0, 2], [3, 0], [2, 13], [1, 0], [3, 1]])
    expected = {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "mean": 50.0}
    assert t2i(queries, torch.eye(14), positives) == expected


@pytest.mark.parametrize("tile", (1, 3, 7, 1024))
def test_recall_against_a_restatement_in_both_directions(tile):
    for seed in range(5):
        texts, images = unit(40, 8, seed), unit(30, 8, seed + 100)
        chosen = np.random.default_rng(seed).choice(38 * 30, 90, replace=False)  # 38 and 39 own none
        positives = torch.tensor(np.stack(divmod(chosen, 30), axis=1))
        scores = texts @ images.T
        there, back = measure.recall_at_k(texts, images, positives, tile)
        assert there == pytest.approx(restated(scores.tolist(), positives.tolist()), rel=1e-6)
        assert back == pytest.approx(restated(scores.T.tolist(), positives.flip(1).tolist()), rel=1e-6)


@pytest.mark.parametrize("tile", (1, 4, 64))
def test_recall_with_many_ties_and_duplicates(tile):
    """Features on a grid of few values: nearly every score is shared by several items."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        texts, images = (torch.tensor(rng.integers(0, 3, (25, 2)), dtype=torch.float) for _ in range(2))
        texts, images = texts[rng.integers(0, 25, 25)], images[rng.integers(0, 25, 25)]
        positives = torch.tensor(rng.integers(0, 25, (40, 2)))  # some twice
        scores = texts @ images.T
        there, back = measure.recall_at_k(texts, images, positives, tile)
        assert there == pytest.approx(restated(scores.tolist(), positives.tolist()), rel=1e-6)
        assert back == pytest.approx(restated(scores.T.tolist(), positives.flip(1).tolist()), rel=1e-6)


def test_recall_does_not_change_its_inputs():
    queries, gallery, positives = unit(5, 4, 0), unit(6, 4, 1), torch.tensor([[4, 1], [0, 0], [0, 5]])
    before = [t.clone() for t in (queries, gallery, positives)]
    measure.recall_at_k(queries, gallery, positives)
    assert all(torch.equal(a, b) for a, b in zip(before, (queries, gallery, positives)))


def test_a_positive_named_twice_counts_once():
    queries, gallery, positives = unit(5, 4, 0), unit(20, 4, 1), torch.tensor([[0, 3], [1, 4], [2, 19]])
    twice = torch.cat([positives, positives[:2]])
    assert measure.recall_at_k(queries, gallery, twice) == measure.recall_at_k(queries, gallery, positives)


def test_queries_without_a_right_answer_are_left_out():
    queries, gallery = torch.eye(12)[:3], torch.eye(12)
    assert t2i(queries, gallery, torch.tensor([[1, 1]]))["R@1"] == 100
    assert t2i(queries, gallery, torch.tensor([[1, 1], [2, 0]]))["R@1"] == 50


def test_no_right_answer_at_all_is_an_error():
    with pytest.raises(DataError, match="no query"):
        measure.recall_at_k(torch.eye(3), torch.eye(3), torch.empty(0, 2, dtype=torch.long))


def test_a_duplicate_of_the_right_answer_counts_against_us():
    gallery = torch.eye(12)[[0, 0, 1, 1, 2, 3]]
    recall = t2i(torch.eye(12)[:2], gallery, torch.tensor([[0, 0], [1, 2], [1, 3]]))
    assert recall["R@1"] == 50 and recall["R@5"] == 100  # query 1 owns both copies


@pytest.mark.parametrize("tile", (3, 1024))
def test_equal_features_score_nothing_unless_every_item_is_right(tile):
    same = torch.full((20, 16), 0.25)
    diagonal = torch.arange(20)[:, None].expand(-1, 2)
    nothing = {"R@1": 0, "R@5": 0, "R@10": 0, "mean": 0}
    assert measure.recall_at_k(same, same, diagonal, tile) == (nothing, nothing)
    everything = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    assert t2i(same, same, everything, tile)["mean"] == 100


def test_collapsed_features_score_nothing_to_the_last_digit():
    # a matrix product with one row may round its last column differently: that must not break a tie
    for seed in range(20):
        same = unit(1, 64, seed).expand(33, -1).contiguous()
        for item in (0, 16, 32):
            assert t2i(same[:1], same, torch.tensor([[0, item]]))["mean"] == 0, (seed, item)


@pytest.mark.parametrize("allowed", ("high", "medium"))
def test_collapsed_features_score_nothing_where_products_may_be_rounded(allowed):
    # train.py allows it to a GPU; a CPU with bfloat16 does it at "medium"
    same = unit(1, 512, 0).expand(200, -1).contiguous()
    torch.set_float32_matmul_precision(allowed)
    try:
        assert t2i(same, same, torch.arange(200)[:, None].expand(-1, 2))["mean"] == 0
        assert torch.get_float32_matmul_precision() == allowed  # as it was
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_gallery_smaller_than_K_always_hits():
    queries, gallery = -torch.eye(4), torch.eye(4)  # the right answer is the last of four
    recall = t2i(queries, gallery, torch.arange(4)[:, None].expand(-1, 2))
    assert recall["R@1"] == 0 and recall["R@5"] == recall["R@10"] == 100


def test_one_query_and_one_item():
    recall = measure.recall_at_k(torch.ones(1, 1), -torch.ones(1, 1), torch.tensor([[0, 0]]))
    assert recall[0]["mean"] == recall[1]["mean"] == 100  # there is no wrong answer


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


def test_features_that_are_no_numbers_are_refused(clip):
    def function(rows):
        return torch.tensor([15 * [1.0] + [float("nan") if row == 3 else 2.0] for row in rows])

    with pytest.raises(DataError, match="1 of 5 features"):
        measure.encode(clip, function, range(5), 2, "encoding")


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


def test_accuracy_by_hand_with_ties_wrong():
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # classes 1 and 2 cannot be told apart
    scores = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]]) @ classes.T
    assert measure.accuracy(scores, torch.tensor([0, 1, 2, 0])) == 50
    assert measure.accuracy(scores, torch.tensor([1, 0, 0, 1])) == 0
    assert measure.accuracy(torch.ones(3, 2), torch.tensor([0, 1, 0])) == 0


def test_class_features_normalise_average_normalise(clip):
    names, templates = ["猫", "一艘船"], ["{}", "一张{}的照片", "{}和{}"]
    found = measure.ensemble(measure.sentence_features(clip, names, templates))
    for row, sentences in zip(found, (["猫", "一张猫的照片", "猫和猫"], ["一艘船", "一张一艘船的照片", "一艘船和一艘船"])):
        mean = encoded(clip, sentences).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# the two commands


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


def test_retrieval_command_prints_both_directions_and_writes_json(clip, weights, tmp_path, monkeypatch, capsys):
    folder, out = write_pairs(tmp_path / "pairs"), tmp_path / "result.json"
    command(monkeypatch, *RETRIEVAL, weights, "--data", folder, "--out", out)
    printed = capsys.readouterr().out
    assert "5 images, 6 texts" in printed and str(out) in printed
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["model"] == weights and result["data"] == folder and result["split"] == "test"
    expected = measure.retrieval(clip, layouts.open_pairs(folder, "test"))
    for way in ("text_to_image", "image_to_text"):
        assert result[way] == pytest.approx(expected[way])
        figures = ", ".join(f"{key} {value:.1f}" for key, value in result[way].items())
        assert f"{way.replace('_', ' ')}: {figures}\n" in printed
    assert result["mean_recall"] == pytest.approx(expected["mean_recall"])


def test_zeroshot_command_prints_a_line_and_writes_json(clip, weights, tmp_path, monkeypatch, capsys):
    folder, out = write_classes(tmp_path / "classes"), tmp_path / "result.json"
    command(monkeypatch, *ZEROSHOT, weights, "--data", folder, "--out", out)
    printed = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["classes"], result["images"], result["chance"]) == (3, 6, pytest.approx(100 / 3))
    templates, labels = read_templates(TEMPLATES), torch.tensor([0, 0, 1, 1, 2, 2])
    images = measure.encode_images(clip, lambda row: picture(10 * (row // 2) + row % 2), 6)
    for key, some in (("accuracy", templates), ("accuracy_single_template", templates[:1])):
        classes = measure.ensemble(measure.sentence_features(clip, ["猫", "船", "花"], some))
        assert result[key] == pytest.approx(measure.accuracy(images @ classes.T, labels))
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


@pytest.mark.parametrize("name, metric, count", (
    ("hateful-memes", "roc-auc", 2), ("oxford-flowers-102", "mean-per-class", 102)))
def test_zeroshot_says_which_command_has_the_measure_of_the_data_set(
    weights, tmp_path, monkeypatch, capsys, name, metric, count
):
    data = write_folders(tmp_path / "set", *(f"test/{c:03d}" for c in range(count)), count=1)
    out = tmp_path / "out"
    command(monkeypatch, *ZEROSHOT, weights, "--data", data, "--labels", name, "--out", out)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == (
        f"this set's own measure is {metric}; next, to see the failures: python -m tools.measure zeroshot --device "
        f"cpu --model {weights} --data {data} --labels {name} --out {out} --page page.html")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["metric"] == "accuracy" and metric not in result
    rarer.main([*ZEROSHOT, weights, "--data", data, "--labels", name, "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8"))["metric"] == metric


def test_pictures_of_several_classes_have_no_accuracy(weights, tmp_path, monkeypatch):
    data = write_folders(tmp_path / "set", "JPEGImages", count=20)
    lines = [f"JPEGImages/{c}.png\t{c} {(c + 1) % 20}" for c in range(20)]
    (tmp_path / "set" / "test.txt").write_text("\n".join(lines), encoding="utf-8")
    arguments = (*ZEROSHOT, weights, "--data", data, "--labels", "voc-2007")
    with pytest.raises(DataError, match="`python -m tools.measure zeroshot .*--labels voc-2007` .* map-11") as caught:
        command(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)
    code, said = typed("eval.py", *arguments)
    assert code == 1 and f"error: {caught.value}" in said and "Traceback" not in said
    rarer.main([*arguments])  # which measures them


def in_one_of_two(rank: int, port: int, commands: list[tuple]):
    """A process as torchrun starts it; tiles so small that both have some."""
    torch.set_num_threads(1)
    measure.TILE = 2
    for number, (main, arguments) in enumerate(commands):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + number)}
        main(arguments)


def test_two_processes_measure_what_one_does(weights, tmp_path, monkeypatch):
    """Tables, predictions, a page and thresholds; the features are kept by one and found by both."""
    folder, classes = write_pairs(tmp_path / "pairs"), write_classes(tmp_path / "classes")
    many = str(tmp_path / "many")
    os.makedirs(many)
    lines = [{"image": f"{row}.png", "text": TEXTS[row % 8] * (1 + row // 8)} for row in range(12)]
    for row, line in enumerate(lines):
        picture(row).save(os.path.join(many, line["image"]))
    (tmp_path / "many" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def commands(out) -> list[tuple]:
        mine, theirs = measure.main, rarer.main
        return [(theirs, ["classify", *ZEROSHOT[1:], weights, "--data", f"{classes}/test", "--labels",
                          f"{classes}/label_cn.txt", "--out", f"{out}/c.csv"]),
                (mine, [*RETRIEVAL, weights, "--data", many, "--out", f"{out}/er.json"]),
                (mine, [*ZEROSHOT, weights, "--data", classes, "--out", f"{out}/ez.json"]),
                (theirs, [*RETRIEVAL, weights, "--data", folder, "--out", f"{out}/r.json", "--features",
                          f"{out}/f"]),
                (theirs, [*RETRIEVAL, weights, "--data", many, "--predictions", f"{out}/p", "--page",
                          f"{out}/r.html"]),
                (theirs, [*ZEROSHOT, weights, "--data", classes, "--out", f"{out}/z.json", "--page",
                          f"{out}/z.html"]),
                (theirs, ["calibrate", *RETRIEVAL[1:], weights, "--data", folder, "--out", f"{out}/c.json",
                          "--precision", "0.3", "--features", f"{out}/f"])]
    for main, arguments in commands(tmp_path / "one"):
        main(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_one_of_two, (port, commands(tmp_path / "two")), nprocs=2)
    for name in ("p", "r.html", "z.html", "c.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in ("er.json", "ez.json", "r.json", "z.json", "c.json"):
        one, two = (json.loads((tmp_path / out / name).read_text("utf-8")) for out in ("one", "two"))
        for key in ("out", "features", "page", "typed"):
            one.pop(key, None), two.pop(key, None)
        assert one == two, name


@pytest.mark.parametrize("flag", ("--out", "--page", "--predictions"))
def test_a_folder_is_no_file_to_write(flag, weights, tmp_path, capsys):
    """Said before anything is encoded, by exit code 2."""
    main = measure.main if flag == "--out" else rarer.main
    with pytest.raises(SystemExit) as caught:
        main([*RETRIEVAL, weights, "--data", str(tmp_path / "nothing"), flag, str(tmp_path)])
    assert caught.value.code == 2 and f"{flag}: {tmp_path} is a folder" in capsys.readouterr().err


def test_weights_in_half_the_bits(clip, weights, tmp_path):
    """Nearly the same features, from --dtype as from load; the temperature is not rounded."""
    folder = write_pairs(tmp_path / "pairs")
    rarer.main([*RETRIEVAL, weights, "--data", folder, "--dtype", "bfloat16",
                "--features", str(tmp_path / "f")])
    half, _ = model.load(weights, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.logit_scale.dtype == torch.float32
    for name, exact in (("image", seen(clip, map(picture, range(5)))), ("text", encoded(clip, TEXTS[:6]))):
        found = torch.from_numpy(np.load(tmp_path / "f" / f"{name}_features.npy"))
        cosines = (found * exact).sum(dim=1)
        assert (cosines > 0.999).all() and not torch.equal(found, exact), name
    with pytest.raises(DataError, match=r"not the same: model, dtype\)"):
        rarer.main([*RETRIEVAL, weights, "--data", folder, "--features", str(tmp_path / "f")])


@pytest.mark.parametrize("dtype", ("int8", torch.int8, "load", None))
def test_a_dtype_that_is_none_is_refused(weights, dtype):
    with pytest.raises(ValueError, match="expected float32, bfloat16, float16"):
        model.load(weights, dtype=dtype)


def test_the_last_line_of_retrieval_is_the_next_command(weights, tmp_path, monkeypatch, capsys):
    folder = write_pairs(tmp_path / "my pairs")
    command(monkeypatch, *RETRIEVAL, weights, "--data", folder, "--context-length", 20)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "next, to see the failures: python -m tools.measure retrieval --device cpu --split test --model "
        f"{weights} --data '{folder}' --context-length 20 --page page.html")


def test_accuracy_of_each_class_the_worst_first(clip, weights, tmp_path, monkeypatch, capsys):
    """All of them up to 20, or else the 10 worst; both commands print and write the same."""
    for count in (20, 21):
        names = [f"第{c}种" for c in range(count)]
        data, out = write_classes(tmp_path / str(count), names), tmp_path / "out.json"
        command(monkeypatch, *ZEROSHOT, weights, "--data", data, "--out", out)
        rows, printed = json.loads(out.read_text(encoding="utf-8"))["by_class"], capsys.readouterr().out
        images = measure.encode_images(clip, lambda row: picture(10 * (row // 2) + row % 2), 2 * count)
        sentences = measure.sentence_features(clip, names, read_templates(TEMPLATES))
        scores = images @ measure.ensemble(sentences).T
        for row in rows:
            c = names.index(row["class"])
            expected = measure.accuracy(scores[2 * c : 2 * c + 2], torch.tensor([c, c]))
            assert row == {"class": names[c], "images": 2, "accuracy": expected}
        assert [row["accuracy"] for row in rows] == sorted(row["accuracy"] for row in rows) and len(rows) == count
        shown = rows if count == 20 else rows[:10]
        lines = [f"{row['accuracy']:6.1f} % of 2 images of {row['class']}" for row in shown]
        text = "\n".join([f"by class, the worst first ({len(shown)} of {count}):", *lines, ""])
        assert text in printed and printed.count("images of") == len(shown)
        rarer.main([*ZEROSHOT, weights, "--data", data])
        assert text in capsys.readouterr().out


def test_data_are_opened_before_the_model_is_loaded(tmp_path, monkeypatch):
    """Neither is there, and the data are what is missing: nobody should wait for a download to hear of it."""
    for task in (RETRIEVAL, ZEROSHOT):
        with pytest.raises(DataError, match="no pictures|nowhere"):
            command(monkeypatch, *task, "ViT-B-16.pt", "--data", tmp_path / "nowhere")
    data = write_classes(tmp_path / "set")
    with pytest.raises(DataError, match="cifar-11: neither a file"):
        command(monkeypatch, *ZEROSHOT, "ViT-B-16.pt", "--data", data, "--labels", "cifar-11")


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
