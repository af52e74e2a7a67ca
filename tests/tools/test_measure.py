"""The commands as a user types them: a released name from a local server, data in the official layout, the
paper's figures beside the measured ones, and the files that are written."""

import csv
import json
import os
import shlex

import pytest
import torch
from conftest import typed
from PIL import Image
from stand_ins import lines_of, write_folders, write_official
from hub import FILE, NAME, PATH
from stand_ins import TEXTS, picture
from checkpoints import VIT, built, official

import eval as core
import model
from data import squash
from weights import download
from eval import pair_features, retrieval
from sources import layouts
from sources.classes import TEMPLATES, read_templates
from sources.pairs import DataError, open_image
from tools.measure import __main__ as measure
from tools.measure import metrics, zeroshot


@pytest.fixture(scope="module")
def clip():
    return built(VIT).eval()


@pytest.fixture
def small_b16(monkeypatch):
    """The shape of our small weights counts as that of the paper's ViT-B-16."""
    monkeypatch.setitem(model.MODELS, "ViT-B-16", model.MODELS[VIT])


@pytest.fixture
def weights(clip, tmp_path) -> str:
    torch.save(official(clip.state_dict()), tmp_path / "clip.pt")
    return str(tmp_path / "clip.pt")


# ------------------------------------------------------------------------------------------------------------
# the paper's figures


def test_published_figures_beside_a_retrieval_that_asks_for_them(weights, tmp_path, capsys):
    data = write_official(tmp_path / "mine", "valid")
    command = ["retrieval", "--model", weights, "--data", data, "--device", "cpu"]
    measure.main([*command, "--published", "MUGE finetune", "--out", str(tmp_path / "out.json")])
    assert "best baseline" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["published"]
    assert [row["best_baseline"] for row in rows] == [60.1, 82.9, 89.4, 77.5]
    measure.main(command)
    assert "best baseline" not in capsys.readouterr().out
    for wrong in ("MUGE", "cifar-10 zero-shot"):
        with pytest.raises(DataError, match="--published"):
            measure.main([*command, "--published", wrong])


# ------------------------------------------------------------------------------------------------------------
# submissions


@pytest.mark.parametrize("flags, count, shapes", [
    ([], 10, (["text_id", "image_ids"], ["image_id", "text_ids"])),
    (["--top-k", "3"], 3, (["text_id", "image_ids"], ["image_id", "text_ids"])),
    (["--format", "muge"], 10, (["query_id", "query_text", "item_ids"], ["query_id", "item_ids"]))])
def test_predictions_are_the_nearest_in_the_official_format_or_muges(clip, weights, tmp_path, flags, count, shapes):
    """A line a query, in the order of the split; its ids are numbers, the nearest comes first."""
    data = write_official(tmp_path / "MUGE", "valid")
    command = ["retrieval", "--model", weights, "--data", data, "--device", "cpu", *flags, "--predictions"]
    measure.main([*command, str(tmp_path / "t2i.jsonl")])
    measure.main([*command, str(tmp_path / "i2t.jsonl"), "--direction", "image-to-text"])
    images, texts = pair_features(clip, layouts.open_pairs(data, "valid"))
    scores = texts @ images.T
    for name, keys, ids, found, some in (
            ("t2i", shapes[0], [7 * n for n in range(12)], scores, [100 + n for n in range(12)]),
            ("i2t", shapes[1], [100 + n for n in range(12)], scores.T, [7 * n for n in range(12)])):
        lines = lines_of(tmp_path / f"{name}.jsonl")
        assert [line[keys[0]] for line in lines] == ids
        for row, line in enumerate(lines):
            assert list(line) == keys
            items = [some.index(item) for item in line[keys[-1]]]
            best = sorted(found[row].tolist())[: -count - 1 : -1]
            assert len(set(items)) == count
            assert found[row, items].tolist() == pytest.approx(best, abs=1e-5)
            if "query_text" in line:
                assert line["query_text"] == TEXTS[row % len(TEXTS)] * (1 + row // len(TEXTS))


def test_an_id_that_stands_twice_is_refused(weights, tmp_path):
    """The official scripts would read one of the two lines, or refuse an answer that is there twice."""
    data, out = write_official(tmp_path / "MUGE", "valid"), tmp_path / "out.jsonl"
    path = tmp_path / "MUGE" / "valid_texts.jsonl"
    path.write_text(path.read_text("utf-8").replace('"text_id": 14,', '"text_id": 21,'), encoding="utf-8")
    for direction in ("text-to-image", "image-to-text"):
        with pytest.raises(DataError, match="valid: the text id 21 occurs twice") as caught:
            measure.main(["retrieval", "--model", weights, "--data", data, "--device", "cpu",
                          "--predictions", str(out), "--direction", direction])
        assert "\n" not in str(caught.value) and not out.exists()


def test_predictions_of_a_split_without_answers(weights, tmp_path, capsys):
    data, out = write_official(tmp_path / "MUGE", "test", answers=False), tmp_path / "test.jsonl"
    command = ["retrieval", "--model", weights, "--data", data, "--split", "test", "--device", "cpu"]
    measure.main([*command, "--predictions", str(out)])
    assert len(lines_of(out)) == 12 and "nothing to measure" in capsys.readouterr().out
    with pytest.raises(DataError, match="image_ids"):
        measure.main(command)


def test_a_gallery_with_fewer_items_than_are_wanted_is_refused(weights, tmp_path):
    data, out = write_official(tmp_path / "MUGE", "valid", 9), tmp_path / "out.jsonl"
    command = ["retrieval", "--model", weights, "--data", data, "--device", "cpu", "--predictions", str(out)]
    with pytest.raises(DataError, match="--top-k 10: .* only 9 to choose from"):
        measure.main(command)
    assert not out.exists()
    measure.main([*command, "--top-k", "9"])
    assert all(sorted(line["image_ids"]) == list(range(100, 109)) for line in lines_of(out))


def test_elevaters_file_and_the_measure_of_the_labels(weights, tmp_path, capsys):
    data = write_folders(tmp_path / "memes", "test/000", "test/001", count=3)
    for n in range(3):
        Image.new("RGB", (8, 8), (0, 40 * n, 200)).save(tmp_path / "memes" / "test" / "001" / f"{n}.png")
    command = ["zeroshot", "--model", weights, "--data", data, "--device", "cpu", "--labels", "hateful-memes"]
    measure.main([*command, "--submission", str(tmp_path / "s.json"), "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert result["metric"] == "roc-auc" and f"{result['roc-auc']:.1f} % roc-auc" in capsys.readouterr().out
    shares = torch.tensor(written["predictions"][0])
    assert written["dataset_name"] == "hateful-memes" and shares.shape == (6, 2)
    assert result["roc-auc"] == pytest.approx(metrics.roc_auc(shares[:, 1], torch.tensor([0, 0, 0, 1, 1, 1])))
    (tmp_path / "memes" / "index.json").write_text("[5, 4, 3, 2, 1, 0]", encoding="utf-8")
    measure.main([*command, "--submission", str(tmp_path / "s.json")])
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert torch.equal(torch.tensor(written["predictions"][0]), shares.flip(0))


def test_elevaters_order_of_classes_in_table_12_and_in_its_file(small_b16, weights, tmp_path, monkeypatch):
    """The same pictures in folders by name, in our order, and by number, in ELEVATER's: the measure is the
    same, the columns are permuted. Without label.txt neither numbers nor a submission can be right."""
    monkeypatch.chdir(tmp_path)
    names, theirs = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"], [0, 1, 2, 3, 6, 4, 5]
    folders = {"named": names, "numbered": [str(theirs.index(c)) for c in range(7)]}
    for name, places in folders.items():
        for c, place in enumerate(places):
            os.makedirs(tmp_path / name / "test" / place)
            for n in range(3):
                picture(10 * c + n).save(tmp_path / name / "test" / place / f"{n}.png")
    data = {name: str(tmp_path / name) for name in folders}

    def run(*arguments, **options) -> dict:
        flags = [part for key, value in options.items() for part in (f"--{key}", str(tmp_path / value))]
        measure.main([*arguments, *flags, "--model", weights, "--device", "cpu", "--out", str(tmp_path / "out")])
        return json.loads((tmp_path / "out").read_text(encoding="utf-8"))

    table = ("reproduce", "table12", "--data")
    for arguments in (("zeroshot", "--labels", "fer-2013", "--data", data["numbered"]),
                      (*table, f"fer-2013={data['numbered']}"),
                      ("zeroshot", "--labels", "fer-2013", "--data", data["named"], "--submission", "no")):
        with pytest.raises(DataError, match="label.txt"):
            run(*arguments)
    assert not os.path.exists("no")
    expected = run("zeroshot", "--labels", "fer-2013", "--data", data["named"])
    assert expected["templates"] == 6  # its own alone: "a toy angry" says nothing
    for name, order in (("named", range(7)), ("numbered", theirs)):
        label_txt = "".join(names[c] + "\n" for c in order)
        (tmp_path / name / "label.txt").write_text(label_txt, encoding="utf-8")
        found = run("zeroshot", "--labels", "fer-2013", "--data", data[name], submission=f"{name}.json")
        for key in ("accuracy", "templates"):
            assert found[key] == expected[key]
        assert run(*table, f"fer-2013={data[name]}")["rows"][0]["measured"] == expected["accuracy"]
    named, numbered = (torch.tensor(json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["predictions"][0])
                       for name in ("named", "numbered"))
    rows = [3 * c + n for c in sorted(range(7), key=lambda c: names[c]) for n in range(3)]  # as folders are read
    rows = [rows.index(3 * c + n) for c in theirs for n in range(3)]
    torch.testing.assert_close(numbered, named[rows][:, theirs], rtol=0, atol=1e-5)


def test_templates_of_ones_own_are_used_alone(weights, tmp_path):
    data, mine = write_folders(tmp_path / "set", "negative", "positive"), tmp_path / "mine.txt"
    mine.write_text("{}\n关于{}\n", encoding="utf-8")
    measure.main(["prompts", "--model", weights, "--data", data, "--labels", "rendered-sst2", "--device", "cpu",
                  "--templates", str(mine), "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["prompts"]
    assert sorted(found) == sorted(["{}", "关于{}", "ensemble"])


# ------------------------------------------------------------------------------------------------------------
# prompts and calibrate


def test_prompts_command(weights, tmp_path, capsys):
    data = write_folders(tmp_path / "set", "negative", "positive")
    out = tmp_path / "out.json"
    measure.main(["prompts", "--model", weights, "--data", data, "--labels", "rendered-sst2",
                  "--device", "cpu", "--out", str(out)])
    found, printed = json.loads(out.read_text(encoding="utf-8"))["prompts"], capsys.readouterr().out
    assert "ensemble" in found and "一条{}" in found and "一张{}的图片" not in found  # a review is no thing
    assert all(f"{value:6.1f}  {template}" in printed for template, value in found.items())
    with pytest.raises(DataError, match="--negation"):
        measure.main(["prompts", "--model", weights, "--device", "cpu"])


def test_negation_command(weights, tmp_path, capsys):
    measure.main(["prompts", "--negation", "--model", weights, "--device", "cpu",
                  "--out", str(tmp_path / "out.json")])
    assert "一张没有{}的图片" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["negation"]["negation"]) == {
        "there", "absent", "mean", "roc-auc"}


def test_calibrate_command(weights, tmp_path, capsys):
    data = write_official(tmp_path / "set", "valid")
    write_official(tmp_path / "set", "test")
    measure.main(["calibrate", "--model", weights, "--data", data, "--precision", "0.5", "--test", "test",
                  "--device", "cpu", "--out", str(tmp_path / "out.json")])
    result, printed = json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), capsys.readouterr().out
    assert ("no cosine" in printed) == (result["threshold"] is None)
    assert result["right_pairs"] == 12 and result["wrong_pairs"] == 132
    assert (result["threshold"] is None) == ("test" not in result or result["test"] == "test")


@pytest.mark.parametrize("arguments", (
    ("reproduce", "table9"), ("calibrate", "--data", "x", "--precision", "90"), ("retrieval", "--data"),
    ("zeroshot",), ("calibrate", "--data", "x", "--prior", "1"), ("retrieval", "--data", "x", "--top-k", "0")))
def test_wrong_command_lines_end_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        measure.main([*arguments, "--model", "x", "--device", "cpu"])
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments, said", (
    (("zeroshot", "--data", "nowhere"), "nowhere: no such folder"), (("retrieval", "--data", "nowhere"), "nowhere"),
    (("prompts",), "--data: not given")))
def test_wrong_data_end_with_1_and_one_line(weights, arguments, said):
    code, last_words = typed("python -m tools.measure", *arguments, "--model", weights)
    assert code == 1 and last_words.startswith("error: ") and said in last_words
    assert last_words.count("\n") == 1 and "Traceback" not in last_words


@pytest.mark.parametrize("arguments, said", (
    (("zeroshot", "--labels", "cifar-1000"), "cifar-1000: neither a file"), (("prompts", "--labels", "x"), "x: neither a file"),
    (("classify", "--labels", "cifar-1000", "--out", "x.csv"), "cifar-1000: neither a file"),
    (("classify", "--out", "x.csv"), "label_cn.txt: not there; expected --labels"),
    (("classify", "--labels", "mnist", "--out", "x.csv"), "no pictures in it"),
    (("zeroshot", "--templates", "x"), "x: expected a file of lines with {}"),
    (("retrieval",), "no pairs in it"), (("calibrate",), "no pairs in it")))
def test_data_come_before_the_model(tmp_path, arguments, said):
    """A fault in the data is reported although the model is not there either."""
    data = str(tmp_path)
    if "--templates" in arguments:
        write_folders(tmp_path, "水果", "动物", count=1)
    with pytest.raises(DataError) as caught:
        measure.main([*arguments, "--data", data, "--model", "nowhere.pt", "--device", "cpu"])
    assert "\n" not in str(caught.value) and said in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# a folder of one's own


def write_goods(folder) -> str:
    """Six pictures of two classes, in a folder whose path a shell must have quoted."""
    for c, name in enumerate(("水果", "蔬菜")):
        (folder / name).mkdir(parents=True)
        for n in range(3):
            picture(10 * c + n).save(folder / name / f"{n}.png")
    return str(folder)


def test_the_last_line_is_the_next_command_which_runs(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, pairs = write_goods(tmp_path / "my goods"), write_official(tmp_path / "MUGE", "valid")
    for program, data in ((("zeroshot", "--data", data), data), (("retrieval", "--data", pairs), pairs)):
        measure.main([*program, "--model", weights, "--device", "cpu", "--out", "result.json"])
        said, _, then = capsys.readouterr().out.splitlines()[-1].partition(": ")
        assert said == "next, to see the failures" and shlex.split(then)[:3] == ["python", "-m", "tools.measure"]
        measure.main(shlex.split(then)[3:])
        assert capsys.readouterr().out.splitlines()[-1] == "next: open page.html in a browser"
        assert data in (tmp_path / "page.html").read_text(encoding="utf-8")
        os.remove("page.html")


def test_accuracy_class_by_class(weights, tmp_path, capsys):
    data, out = write_goods(tmp_path / "goods"), tmp_path / "out.json"
    measure.main(["zeroshot", "--model", weights, "--data", data, "--device", "cpu", "--out", str(out)])
    result, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    rows = result["by_class"]
    assert {(row["class"], row["images"]) for row in rows} == {("水果", 3), ("蔬菜", 3)}
    assert sum(row["accuracy"] for row in rows) / 2 == pytest.approx(result["accuracy"])
    assert rows[0]["accuracy"] <= rows[1]["accuracy"] and "by class, the worst first (2 of 2):" in printed
    assert all(f"{row['accuracy']:6.1f} % of 3 images of {row['class']}\n" in printed for row in rows)


def test_pictures_without_classes_are_classified_into_a_table(clip, weights, tmp_path, capsys):
    """What zeroshot takes a picture for is in its line; a broken one has none and is named once; what does not
    end as pictures do, and what is hidden, is left alone."""
    data = write_goods(tmp_path / "goods")
    picture(3).convert("RGB").save(tmp_path / "goods" / 'a, "b".JPG', "JPEG")
    (tmp_path / "goods" / "水果" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "goods" / "notes.txt").write_text("?", encoding="utf-8")
    (tmp_path / "goods" / ".hidden.png").write_bytes(b"")
    names = tmp_path / "names.txt"
    names.write_text("水果\n蔬菜\n", encoding="utf-8")
    measure.main(["classify", "--model", weights, "--data", data, "--labels", str(names), "--device", "cpu",
                  "--out", str(tmp_path / "found.csv")])
    said = capsys.readouterr()
    assert (tmp_path / "found.csv").read_bytes().startswith("\ufefffile,class,score\n".encode())
    with open(tmp_path / "found.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == sorted(
        ['a, "b".JPG', os.path.join("水果", "broken.png"),
         *(os.path.join(c, f"{n}.png") for c in ("水果", "蔬菜") for n in range(3))])
    assert said.err.count("broken.png") == 1 and "cannot be decoded" in said.err
    assert f"{tmp_path / 'found.csv'}: 8 pictures, 1 of which cannot be decoded\nnext: open " in said.out
    sentences = core.sentence_features(clip, ["水果", "蔬菜"], read_templates(TEMPLATES))
    for row in rows:
        if row["file"].endswith("broken.png"):
            assert row["class"] == row["score"] == ""
            continue
        feature = core.encode_images(clip, lambda _: open_image(os.path.join(data, row["file"])), 1)
        shares = zeroshot.probabilities(feature @ core.ensemble(sentences).T, clip.logit_scale.exp().item())[0]
        assert row["class"] == ("水果", "蔬菜")[shares.argmax()]
        assert float(row["score"]) == pytest.approx(shares.max().item(), abs=1e-3)


@pytest.mark.parametrize("flags, names", (([], ["漏斗菜", "玫瑰"]), (["--names", "usual"], ["耧斗菜", "玫瑰"])))
def test_usual_names_stand_in_the_sentences(weights, tmp_path, monkeypatch, flags, names):
    """In both programs, whatever the folders are called; shots are matched all the same."""
    (tmp_path / "two.txt").write_text("metric: accuracy\na\t漏斗菜\t耧斗菜\nb\t玫瑰\n", encoding="utf-8")
    data = write_folders(tmp_path / "set", "a", "b")
    shots = write_folders(tmp_path / "more", "a", "b", colour="blue")
    asked, real = [], core.sentence_features
    for module in (core, measure, zeroshot):
        monkeypatch.setattr(module, "sentence_features",
                            lambda clip, names, some: asked.append(names) or real(clip, names, some))
    common = ["--model", weights, "--data", data, "--labels", str(tmp_path / "two.txt"), "--device", "cpu", *flags]
    core.main(["zeroshot", *common])
    measure.main(["zeroshot", *common, "--shots", shots])
    measure.main(["prompts", *common])
    measure.main(["classify", *common, "--out", str(tmp_path / "found.csv")])
    assert asked == [names] * 4
    rows = (tmp_path / "found.csv").read_text("utf-8-sig").splitlines()[1:]
    assert {row.split(",")[1] for row in rows} <= set(names)


@pytest.mark.parametrize("task", measure.RUN)
def test_every_command_has_help(task, capsys):
    with pytest.raises(SystemExit) as caught:
        measure.main([task, "--help"])
    assert caught.value.code == 0 and "--model" in capsys.readouterr().out
