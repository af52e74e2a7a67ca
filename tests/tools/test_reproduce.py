"""tools/measure/reproduce.py: from names to the paper's tables, on stand-ins that a local server publishes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import VIT, built, official
from conftest import ROOT
from hub import NAME
from PIL import Image
from stand_ins import elevater, write_folders, write_official, write_zip

import eval as core
import model
from data import squash
from eval import retrieval
from sources import layouts, named
from sources.pairs import DataError
from tools.measure import __main__ as measure
from tools.measure import published as figures
from tools.measure import reproduce
from tools.measure.reproduce import row_of
from weights import download
from weights.names import WeightsError

RELEASE = "datasets/OFA-Sys/chinese-clip-eval"


@pytest.fixture(scope="module")
def clip():
    return built(VIT).eval()


@pytest.fixture
def small(clip, tmp_path, monkeypatch):
    """The released names stand for small weights in the official format -> the file of one."""
    monkeypatch.chdir(tmp_path)
    for name in download.RELEASED:
        monkeypatch.setitem(model.MODELS, name, model.MODELS[VIT])
    monkeypatch.setattr(reproduce, "row_of", lambda clip: NAME)
    torch.save(official(clip.state_dict()), tmp_path / "clip.pt")
    return str(tmp_path / "clip.pt")


@pytest.fixture
def published(hub, small, tmp_path, monkeypatch):
    """A server that has the five models, QA-CLIP's, the three retrieval sets and all of ELEVATER."""
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "cache"))
    content = Path(small).read_bytes()
    for name in (*download.RELEASED, "qa-ViT-B-16"):
        hub.add(download.SOURCES[name], content)
    for split, file in (("valid", "MUGE"), ("test", "Flickr30k-CN"), ("test", "COCO-CN")):
        folder = Path(write_official(tmp_path / "made", split))
        members = {f"{file}/{path.name}": path.read_bytes() for path in folder.iterdir() if path.name.startswith(split)}
        hub.add(f"{RELEASE}/{file}.zip", write_zip(members))
    hub.add(f"{RELEASE}/ELEVATER_all.zip", elevater(named.CLASSES))
    return hub


def run(*arguments) -> dict:
    measure.main(["reproduce", *arguments, "--device", "cpu", "--out", "out.json"])
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------
# from names alone


def test_table_2_from_nothing_but_its_name(published, clip, tmp_path, capsys):
    """Weights and pairs are fetched, and the recall is that of the files that they were made of."""
    rows = {row["column"]: row for row in run("table2", "--model", NAME)["rows"]}
    said = capsys.readouterr().out
    expected = retrieval(clip, layouts.open_pairs(str(tmp_path / "made"), "valid"))["text_to_image"]
    assert rows["t2i_R@1"]["measured"] == pytest.approx(expected["R@1"])
    assert rows["MR"]["measured"] == pytest.approx(expected["mean"])
    assert rows["t2i_R@1"]["published"] == 52.1 and rows["t2i_R@1"]["row"] == NAME
    assert rows["t2i_R@1"]["gap"] == pytest.approx(expected["R@1"] - 52.1)
    assert re.search(rf"{NAME}: 3\.\d MB to fetch\nmuge: 0\.\d MB to fetch\n", said)  # before anything else
    assert re.search(rf"{NAME}: .+ pictures and .+ captions a second here\n   MUGE: 29,806 pictures, 5,008 sentences, "
                     "about .+ minutes", said)
    assert "MUGE: 12 pictures are here, the paper's split has 29,806" in said
    assert "49.5 R2D2 ViT-L-14" in said and said.endswith(os.path.join("reproduced", "table2-zero-shot.md") + "\n")
    lines = Path("reproduced/table2-zero-shot.md").read_text(encoding="utf-8").splitlines()
    assert lines[2:6] == ["|  |  | t2i_R@1 | t2i_R@5 | t2i_R@10 | MR | verdict |", "|---|---|---|---|---|---|---|",
                          lines[4], f"| {NAME} | published | 52.1 | 76.7 | 84.4 | 71.1 |  |"]
    assert lines[4].startswith(f"| {NAME} | measured | {expected['R@1']:.1f} | ") and "| off by " in lines[4]
    assert [line for line in lines if line.startswith("| R2D2_{ViT-L/14} | published | 49.5 | ")]


@pytest.mark.parametrize("table, sets, figures", [("table3", 1, 6), ("table4", 1, 6), ("table5", 10, 1), ("table12", 20, 1)])
def test_every_table_from_its_name(table, sets, figures, published):
    Path("short.txt").write_text("{}\n", encoding="utf-8")  # 1,200 classes with 90 templates would take long
    rows = run(table, "--models", NAME, *(["--templates", "short.txt"] if sets > 1 else []))["rows"]
    assert len([row for row in rows if row["model"] == NAME]) == sets * figures + (table == "table12")
    assert all((row["published"] is None) == (table == "table5") for row in rows)
    text = Path(f"reproduced/{table}-zero-shot{'-templates' * (sets > 1)}.md").read_text(encoding="utf-8")
    assert text.count("off by") == (table != "table5")  # whose row is the best of five
    assert not [path for path in Path(download.CACHE).rglob("*") if "train" in path.parts or path.suffix in (".zip", ".part")]


def test_the_average_and_the_best_of_several(published, monkeypatch):
    Path("short.txt").write_text("{}\n", encoding="utf-8")
    rows = run("table12", "--models", NAME, "RN50", "--templates", "short.txt")["rows"]
    for name in (NAME, "RN50"):
        mine = {row["column"]: row["measured"] for row in rows if row["model"] == name}
        assert mine.pop("average") == pytest.approx(sum(mine.values()) / 20)
    rows = run("table5", "--models", NAME, "RN50", "--data", "mnist")["rows"]
    assert {row["model"] for row in rows} == {NAME, "RN50"} and not rows[0]["published"]  # it is the best of five
    names = iter([name for name in download.RELEASED for _ in range(2)])
    monkeypatch.setattr(reproduce, "row_of", lambda clip: next(names))
    rows = run("table5", "--data", "mnist", "dtd", "--templates", "short.txt")["rows"]
    best = [row for row in rows if row["model"] == reproduce.BEST]
    assert len(rows) == 12 and [row["data"] for row in best] == ["mnist", "dtd"]
    assert best[0]["measured"] == max(row["measured"] for row in rows[:10] if row["data"] == "mnist")
    assert best[0]["published"] == 74.0 or best[0]["gap"] == pytest.approx(best[0]["measured"] - best[0]["published"])


def test_a_report_that_another_run_has_begun_is_completed(published):
    run("table12", "--models", NAME, "--data", "mnist", "eurosat")
    path, seen = Path("reproduced/table12-zero-shot.json"), []
    original = reproduce.measured

    def stopped(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return original(*arguments)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reproduce, "measured", stopped)
        run("table12", "--models", NAME, "--data", "mnist", "eurosat")
    assert {row["data"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]} == {"mnist", "eurosat"}


def test_verdicts_agree_with_what_is_printed():
    for gap, verdict in ((0.0, "reproduced"), (-0.249, "reproduced"), (0.251, "off by 0.3"), (None, "")):
        assert figures.verdict([{"gap": 0.1}, {"gap": gap}] if gap is not None else [{"gap": None}]) == verdict


def test_the_row_of_a_model_is_told_by_its_shape():
    for name in download.RELEASED:
        assert row_of(SimpleNamespace(config=model.MODELS[name])) == name
    assert row_of(SimpleNamespace(config=model.MODELS[VIT])) == ""


def test_a_model_that_nobody_published(published):
    with pytest.raises(WeightsError, match="RN51: no such file, and none of RN50, ViT-B-16, .*qa-RN50"):
        run("table2", "--models", "RN51")
    assert not published.requests


def test_names_are_spelled_freely_and_finetuning_is_for_retrieval(published):
    assert figures.data_sets("table12", ["CIFAR10", "Oxford_Flowers_102"]) == {
        "cifar-10": "cifar-10", "oxford-flowers-102": "oxford-flowers-102"}
    with pytest.raises(DataError, match="--setup finetune: of tables 2, 3, 4 and 10 alone"):
        run("table12", "--setup", "finetune", "--models", NAME)
    published.files.pop("/OFA-Sys/chinese-clip-rn50/resolve/main/clip_cn_rn50.pt")
    with pytest.raises(DataError, match="1 failed"):  # it is asked for once, not for every set
        run("table12", "--models", "RN50", NAME, "--data", "mnist", "dtd")
    rows = json.loads(Path("reproduced/table12-zero-shot.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["data"]) for row in rows] == [(NAME, "mnist"), (NAME, "dtd")]


def test_qa_clip_is_measured_without_the_papers_figures(published):
    rows = run("table2", "--models", "qa-ViT-B-16")["rows"]
    assert len(rows) == 4 and all(row["published"] is None for row in rows)


def test_what_is_measured_is_not_encoded_again(published, monkeypatch, capsys):
    first = run("table12", "--models", NAME, "--data", "mnist", "dtd")
    count = len(published.requests)
    monkeypatch.setattr("tools.measure.kept.pair_features", None)
    capsys.readouterr()
    assert run("table12", "--models", NAME, "--data", "mnist", "dtd")["rows"] == first["rows"]
    assert len(published.requests) == count
    assert "the features of its pictures are kept" in capsys.readouterr().out


def test_a_set_that_fails_does_not_stop_the_others(published, capsys):
    hub = published
    inner = hub.files[f"/{RELEASE}/resolve/main/ELEVATER_all.zip"]
    at = inner.index(b"label_cn.txt", inner.index(b"dtd.zip"))  # within the member, in dtd.zip's own list
    hub.files[f"/{RELEASE}/resolve/main/ELEVATER_all.zip"] = inner[: at + 60] + b"\0\0\0\0" + inner[at + 64 :]
    with pytest.raises(DataError, match="table12: 1 failed, as said above; others: reproduced"):
        run("table12", "--models", NAME, "--data", "dtd", "mnist")
    assert re.search("dtd.zip: '.*' is broken", capsys.readouterr().err)
    assert "mnist" in Path("reproduced/table12-zero-shot.md").read_text(encoding="utf-8")
    assert not (Path(download.CACHE) / "dtd").exists()


def test_names_and_templates_of_the_authors(published, tmp_path):
    """label_cn.txt in the folder is taken first; --names ours takes labels/."""
    found = {}
    for name in ("theirs", "ours"):
        run("table12", "--models", NAME, "--data", "mnist", "--names", name)
        label_cn = Path(download.CACHE) / "mnist" / "label_cn.txt"
        if name == "theirs":
            label_cn.write_text("\n".join("猫狗船花树鱼鸟车山海"), encoding="utf-8")
        seen = []
        original = reproduce.sentence_features
        reproduce.sentence_features = lambda clip, names, templates: seen.append((names, templates)) or original(
            clip, names, templates)
        (tmp_path / "mine.txt").write_text("{}\n", encoding="utf-8")
        run("table12", "--models", NAME, "--data", "mnist", "--names", name, "--templates", "mine.txt")
        reproduce.sentence_features = original
        found[name] = seen[0]
    assert found["theirs"] == (list("猫狗船花树鱼鸟车山海"), ["{}"])
    assert found["ours"][0] == named_by_us("mnist") and found["ours"][1] == ["{}"]


def named_by_us(name: str) -> list[str]:
    from sources.classes import read_classes
    return read_classes(name).chinese


def test_finetuned_rows(published, monkeypatch, capsys):
    """The recipe is printed, and run if --train says so; then its best weights are measured."""
    command = ("table2", "--setup", "finetune", "--models", NAME)
    with pytest.raises(DataError, match="table2: 1 failed, as said above; others: "):
        run(*command)
    said = capsys.readouterr()
    assert f"python train.py --recipe muge --model {NAME} --init {NAME} --data muge" in said.out
    assert "best.safetensors: not there, or not trained to its end; add --train, or first run this " in said.err
    ran = []

    def train(arguments):
        ran.append(arguments[2:])
        folder = Path("reproduced/finetuned") / NAME / "muge" / "muge"
        folder.mkdir(parents=True, exist_ok=True)
        if len(ran) == 2:  # stopped at first
            (folder.parent / "results.json").write_text("{}")
        model.save(built(VIT), str(folder / "best.safetensors"))
        return subprocess.CompletedProcess(arguments, 0)
    monkeypatch.setattr(reproduce.subprocess, "run", train)
    with pytest.raises(DataError, match="1 failed"):
        run(*command, "--train")
    assert "not trained to its end" in capsys.readouterr().err
    rows = run(*command, "--train")["rows"]
    out = os.path.join("reproduced", "finetuned", NAME, "muge")
    assert ran == 2 * [["--recipe", "muge", "--model", NAME, "--init", NAME, "--data", "muge", "--out", out]]
    assert rows[0]["published"] == 58.4
    monkeypatch.setattr(reproduce.subprocess, "run", lambda arguments: subprocess.CompletedProcess(arguments, 3))
    with pytest.raises(DataError, match="1 failed"):
        run(*command, "--train")
    assert "ended with 3; the same command continues" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# data and weights by path


@pytest.mark.parametrize("table, data, columns, published", [
    ("table3", "Flickr30K-CN", 6, 62.7), ("table4", "coco-cn", 6, 62.2), ("table10", "icr", 7, 55.4)])
def test_the_other_retrieval_tables(small, tmp_path, table, data, columns, published):
    folder, out = write_official(tmp_path / "set", "test"), tmp_path / "out.json"
    measure.main(["reproduce", table, "--models", small, "--data", f"{data}={folder}",
                  "--out", str(out), "--device", "cpu"])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["rows"]) == columns and result["rows"][0]["published"] == published
    assert result["setup"] == ("finetune" if table == "table10" else "zero-shot")


def test_tables_of_classification(small, tmp_path, capsys):
    eurosat = write_folders(tmp_path / "a", *(f"test/{c:03d}" for c in range(10)))
    sst = write_folders(tmp_path / "b", "negative", "positive")
    out = tmp_path / "out.json"
    measure.main(["reproduce", "table12", "--models", small, "--out", str(out),
                  "--device", "cpu", "--data", f"eurosat={eurosat}", f"Rendered_SST2={sst}"])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["data"] for row in rows] == ["eurosat", "rendered-sst2"]
    assert [row["published"] is None for row in rows] == [False, False]
    assert [row["best_baseline_model"] for row in rows] == ["CLIP", ""]
    measure.main(["reproduce", "table5", "--models", small, "--data", f"eurosat={eurosat}",
                  "--device", "cpu"])
    assert "52.0" in capsys.readouterr().out  # CN-CLIP in Table 5


@pytest.mark.parametrize("table", ["table2", "table12"])
def test_the_papers_tables_are_measured_on_official_pixels(table, small, tmp_path, monkeypatch):
    """Of a picture that is transparent with red below, the official code sees black."""
    seen, encode_images = [], core.encode_images

    def spy(clip, get_image, count):
        seen.extend(squash(get_image(row), 32).unique().tolist() for row in range(count))
        return encode_images(clip, get_image, count)
    for module in (core,):
        monkeypatch.setattr(module, "encode_images", spy)
    monkeypatch.setattr("sources.pairs.decode", lambda *_: Image.new("RGBA", (40, 30), (255, 0, 0, 0)))
    data = f"muge={write_official(tmp_path / 'MUGE', 'valid')}" if table == "table2" else (
        f"rendered-sst2={write_folders(tmp_path / 'a', 'negative', 'positive')}")
    measure.main(["reproduce", table, "--models", small, "--data", data, "--device", "cpu"])
    assert seen and all(values == [0] for values in seen)


@pytest.mark.parametrize("data, part", [
    (["flickr=x"], "flickr=x"), (["muge="], "MUGE=path"), (["dtd"], "measured on MUGE"), (["muge=nowhere"], "nowhere: no such")])
def test_data_that_are_not_named_are_asked_for_before_anything_is_loaded(data, part):
    with pytest.raises(DataError, match=part):
        measure.main(["reproduce", "table2", "--model", "ViT-B-16", "--device", "cpu", "--data", *data])


def test_icr_is_not_public(small):
    with pytest.raises(DataError, match="ICR is not public; expected --data ICR=path/to/it"):
        measure.main(["reproduce", "table10", "--models", small, "--device", "cpu"])


# ------------------------------------------------------------------------------------------------------------
# killed and started again

CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import model
from checkpoints import VIT
from tools.measure import __main__ as measure, reproduce
from weights import download, transfer
transfer.BLOCK = 20_000
for name in download.RELEASED:
    model.MODELS[name] = model.MODELS[VIT]
reproduce.row_of = lambda clip: "ViT-B-16"
print("begun", flush=True)
measure.main(["reproduce", "table12", "--models", "ViT-B-16", "RN50", "--data", "mnist", "voc-2007",
              "--device", "cpu", "--into", sys.argv[1]])
"""


def test_two_ranks_measure_what_one_does(published, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT), tests=str(ROOT / "tests")), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*start, str(script), "two"], cwd=tmp_path, env=env, timeout=300, capture_output=True,
                           text=True)
    assert ended.returncode == 0, ended.stderr
    asked = [one for path, one in published.requests if path.startswith("/bytes") and "rn50" in path]
    assert 0 < len(asked) == len(set(asked))  # one process fetched it, not each
    path = tmp_path / "two" / "table12-zero-shot.json"
    rows = {"two": json.loads(path.read_text(encoding="utf-8"))["rows"],
            "one": run("table12", "--models", NAME, "RN50", "--data", "mnist", "voc-2007")["rows"]}
    for one, two in zip(rows["one"], rows["two"], strict=True):
        assert one["data"] == two["data"] and one["measured"] == pytest.approx(two["measured"])


def killed_and_started_again(published, tmp_path, kills: int):
    """Every end is that of the run that nobody disturbed, from an empty cache, and nothing unfinished stays."""
    published.delay = 0.01  # of each answer: otherwise nothing would be on its way when the kill comes
    script = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"))
    rng = random.Random(0)

    def begin(name: str) -> subprocess.Popen:
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / f"cache-{name}"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", script, f"into-{name}"], cwd=tmp_path, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def whole(name: str) -> list:
        process = begin(name)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return json.loads((tmp_path / f"into-{name}" / "table12-zero-shot.json").read_text(encoding="utf-8"))["rows"]

    start = time.perf_counter()
    expected = whole("whole")
    seconds = time.perf_counter() - start
    for kill in range(kills):
        name = f"killed-{kill // 4}"  # four times, then to the end
        process = begin(name)
        process.stdout.readline()
        time.sleep(rng.uniform(0, seconds / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if kill % 4 == 3 or kill == kills - 1:
            assert whole(name) == expected
            left = [path.name for path in (tmp_path / f"cache-{name}").rglob("*") if path.suffix in (".part", ".tmp", ".zip")]
            assert left == []


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes nine seconds a kill: KILLS=20 python -m pytest -k killed")
def test_killed_and_started_again(published, tmp_path):
    killed_and_started_again(published, tmp_path, int(os.environ["KILLS"]))
