"""The commands as a user types them: a released name from a local server, data in the official layout, the
paper's figures beside the measured ones, and the files that are written."""

import base64
import io
import json
import os

import pytest
import torch
from PIL import Image
from test_classes import write_folders
from test_download import FILE, NAME
from test_eval import TEXTS, picture
from test_weights import VIT, built, official

import download
import eval as measure  # `eval` alone would hide Python's own
import metrics
import sources
from pairs import DataError


@pytest.fixture(scope="module")
def clip():
    return built(VIT).eval()


@pytest.fixture
def weights(clip, tmp_path) -> str:
    torch.save(official(clip.state_dict()), tmp_path / "clip.pt")
    return str(tmp_path / "clip.pt")


def write_official(folder, split: str, count: int = 12, answers: bool = True) -> str:
    """`count` pictures and as many captions, in MUGE's layout; picture n has the id 100 + n."""
    os.makedirs(folder, exist_ok=True)
    with open(folder / f"{split}_imgs.tsv", "w", encoding="utf-8") as file:
        for n in range(count):
            png = io.BytesIO()
            picture(n).save(png, "PNG")
            file.write(f"{100 + n}\t{base64.b64encode(png.getvalue()).decode()}\n")
    with open(folder / f"{split}_texts.jsonl", "w", encoding="utf-8") as file:
        for n in range(count):
            line = {"text_id": 7 * n, "text": TEXTS[n % len(TEXTS)] * (1 + n // len(TEXTS)),
                    "image_ids": [100 + n] if answers else []}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return str(folder)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------
# the paper's tables


def test_table_2_by_name_from_a_server(hub, clip, tmp_path, monkeypatch, capsys):
    """Download by name, data in the official layout, the table beside the paper's, and JSON."""
    torch.save(official(clip.state_dict()), tmp_path / FILE)
    monkeypatch.setattr("test_download.CONTENT", (tmp_path / FILE).read_bytes())
    hub.etag = ""
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "cache"))
    data, out = write_official(tmp_path / "MUGE", "valid"), tmp_path / "table2.json"
    measure.main(["reproduce", "table2", "--model", NAME, "--data", f"muge={data}", "--out", str(out),
                  "--device", "cpu"])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    expected = measure.retrieval(clip, sources.open_pairs(data, "valid"))["text_to_image"]
    rows = {row["column"]: row for row in result["rows"]}
    published = {"RN50": 42.6, "ViT-B-16": 52.1}[NAME]
    assert rows["t2i_R@1"]["published"] == published and result["row"] == NAME
    assert rows["t2i_R@1"]["measured"] == pytest.approx(expected["R@1"])
    assert rows["t2i_R@1"]["gap"] == pytest.approx(expected["R@1"] - published)
    assert rows["MR"]["measured"] == pytest.approx(expected["mean"])
    assert f"{published:.1f}" in printed and "49.5 R2D2 ViT-L-14" in printed


@pytest.mark.parametrize("table, data, columns, published", [
    ("table3", "Flickr30K-CN", 6, 62.7), ("table4", "coco-cn", 6, 62.2), ("table10", "icr", 7, 55.4)])
def test_the_other_retrieval_tables(weights, tmp_path, table, data, columns, published):
    folder, out = write_official(tmp_path / "set", "test"), tmp_path / "out.json"
    measure.main(["reproduce", table, "--model", weights, "--row", "ViT-B-16", "--data", f"{data}={folder}",
                  "--out", str(out), "--device", "cpu"])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["rows"]) == columns and result["rows"][0]["published"] == published
    assert result["setup"] == ("finetune" if table == "table10" else "zero-shot")


def test_tables_of_classification(weights, tmp_path, capsys):
    eurosat = write_folders(tmp_path / "a", *(f"test/{c:03d}" for c in range(10)))
    sst = write_folders(tmp_path / "b", "negative", "positive")
    out = tmp_path / "out.json"
    measure.main(["reproduce", "table12", "--model", weights, "--row", "ViT-B-16", "--out", str(out),
                  "--device", "cpu", "--data", f"eurosat={eurosat}", f"Rendered_SST2={sst}"])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["data"] for row in rows] == ["eurosat", "rendered-sst2"]
    assert [row["published"] is None for row in rows] == [False, False]
    assert [row["best_baseline_model"] for row in rows] == ["CLIP", ""]
    measure.main(["reproduce", "table5", "--model", weights, "--data", f"eurosat={eurosat}",
                  "--device", "cpu"])
    assert "52.0" in capsys.readouterr().out  # CN-CLIP in Table 5


@pytest.mark.parametrize("data, part", [
    ([], "--data MUGE=PATH"), (["flickr=x"], "flickr=x"), (["muge"], "NAME=PATH"), (["muge="], "NAME=PATH")])
def test_data_that_are_not_named_are_asked_for_before_anything_is_loaded(data, part):
    with pytest.raises(DataError, match=part):
        measure.main(["reproduce", "table2", "--model", "ViT-B-16", "--device", "cpu", "--data", *data])


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


def test_predictions_are_the_ten_nearest_in_muges_format(clip, weights, tmp_path):
    data = write_official(tmp_path / "MUGE", "valid")
    command = ["retrieval", "--model", weights, "--data", data, "--device", "cpu", "--features",
               str(tmp_path / "kept"), "--predictions"]
    measure.main([*command, str(tmp_path / "t2i.jsonl")])
    measure.main([*command, str(tmp_path / "i2t.jsonl"), "--direction", "image-to-text"])
    images, texts = measure.pair_features(clip, sources.open_pairs(data, "valid"))
    scores = texts @ images.T
    for row, line in enumerate(lines_of(tmp_path / "t2i.jsonl")):
        assert list(line) == ["query_id", "query_text", "item_ids"] and line["query_id"] == 7 * row
        assert line["query_text"] == TEXTS[row % len(TEXTS)] * (1 + row // len(TEXTS))
        ids = [i - 100 for i in line["item_ids"]]
        nearest = sorted(scores[row].tolist())[:-11:-1]
        assert len(set(ids)) == 10 and scores[row, ids].tolist() == pytest.approx(nearest, abs=1e-5)
    for row, line in enumerate(lines_of(tmp_path / "i2t.jsonl")):
        assert list(line) == ["query_id", "item_ids"] and line["query_id"] == 100 + row
        assert all(i % 7 == 0 for i in line["item_ids"])


def test_predictions_score_with_the_official_script_what_we_measure(clip, weights, tmp_path):
    official_script = pytest.importorskip(
        "cn_clip.eval.evaluation", reason="the official code, cn_clip, is not installed")
    data = write_official(tmp_path / "MUGE", "valid", 20)
    measure.main(["retrieval", "--model", weights, "--data", data, "--device", "cpu",
                  "--predictions", str(tmp_path / "ours.jsonl"), "--out", str(tmp_path / "out.json")])
    theirs = [{"text_id": line["query_id"], "image_ids": line["item_ids"]}
              for line in lines_of(tmp_path / "ours.jsonl")]
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, theirs)) + "\n", encoding="utf-8")
    mean, *recalls = official_script.compute_score(
        os.path.join(data, "valid_texts.jsonl"), str(tmp_path / "theirs.jsonl"))
    ours = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["text_to_image"]
    assert list(ours.values()) == pytest.approx([*recalls, mean])


def test_predictions_of_a_split_without_answers(weights, tmp_path, capsys):
    data, out = write_official(tmp_path / "MUGE", "test", answers=False), tmp_path / "test.jsonl"
    command = ["retrieval", "--model", weights, "--data", data, "--split", "test", "--device", "cpu"]
    measure.main([*command, "--predictions", str(out)])
    assert len(lines_of(out)) == 12 and "nothing to measure" in capsys.readouterr().out
    with pytest.raises(DataError, match="image_ids"):
        measure.main(command)


def test_a_gallery_with_fewer_than_ten_items_is_refused(weights, tmp_path):
    data, out = write_official(tmp_path / "MUGE", "valid", 9), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="only 9 to choose from"):
        measure.main(["retrieval", "--model", weights, "--data", data, "--device", "cpu",
                      "--predictions", str(out)])
    assert not out.exists()


def test_elevaters_file_and_the_measure_of_the_labels(weights, tmp_path, capsys):
    data = write_folders(tmp_path / "memes", "test/000", "test/001", count=3)
    for n in range(3):
        Image.new("RGB", (8, 8), (0, 40 * n, 200)).save(tmp_path / "memes" / "test" / "001" / f"{n}.png")
    command = ["zeroshot", "--model", weights, "--data", data, "--device", "cpu", "--labels", "hateful-memes"]
    measure.main([*command, "--submission", str(tmp_path / "s.json"), "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert result["metric"] == "roc-auc" and "area under the ROC curve" in capsys.readouterr().out
    shares = torch.tensor(written["predictions"][0])
    assert written["dataset_name"] == "hateful-memes" and shares.shape == (6, 2)
    assert result["roc-auc"] == pytest.approx(metrics.roc_auc(shares[:, 1], torch.tensor([0, 0, 0, 1, 1, 1])))


# ------------------------------------------------------------------------------------------------------------
# prompts and calibrate


def test_prompts_command(weights, tmp_path, capsys):
    data = write_folders(tmp_path / "set", "negative", "positive")
    out = tmp_path / "out.json"
    measure.main(["prompts", "--model", weights, "--data", data, "--labels", "rendered-sst2",
                  "--device", "cpu", "--out", str(out)])
    found, printed = json.loads(out.read_text(encoding="utf-8"))["prompts"], capsys.readouterr().out
    assert "ensemble" in found and "一条{}" in found and "一张{}的图片" in found
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
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert "0.3 to 0.6" in printed and "how often right" in printed
    assert result["right_pairs"] == 12 and result["wrong_pairs"] == 132
    assert (result["threshold"] is None) == ("test" not in result or result["test"] == "test")


@pytest.mark.parametrize("arguments", (
    ("reproduce", "table9"), ("calibrate", "--data", "x", "--precision", "90"), ("retrieval", "--data"),
    ("zeroshot",), ("calibrate", "--data", "x", "--prior", "1")))
def test_wrong_command_lines_end_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        measure.main([*arguments, "--model", "x", "--device", "cpu"])
    assert caught.value.code == 2


@pytest.mark.parametrize("task", measure.TASKS)
def test_every_command_has_help(task, capsys):
    with pytest.raises(SystemExit) as caught:
        measure.main([task, "--help"])
    assert caught.value.code == 0 and "--model" in capsys.readouterr().out
