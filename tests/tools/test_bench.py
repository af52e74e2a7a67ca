"""bench.py does what it says on small shapes; how fast is no test's business."""

import contextlib
import io
import sys

import pytest
import torch

from tools.bench import __main__ as bench
from tools.bench import data as bench_data
from tools.bench import peers as bench_peers
from tools.bench import training as bench_train
from tools.bench import use as bench_use
import model
from conftest import ROOT


def test_the_arithmetic_is_that_of_open_clips_profile():
    """GFLOP of an image and of captions of 52 and 12 tokens: open_clip's docs/model_profile.csv, and BERT by
    hand."""
    for name, image, long, short in (("RN50", 12.22, 2.23, 0.51), ("ViT-B-16", 35.13, 8.93, 2.04),
                                     ("ViT-L-14", 162.03, 8.93, 2.04), ("ViT-L-14-336", 381.92, 8.93, 2.04),
                                     ("ViT-H-14", 334.59, 31.67, 7.26)):
        config = model.MODELS[name]
        found = bench_peers.gflop(config, 52)
        assert found == (pytest.approx(image, abs=0.01), pytest.approx(long, abs=0.01))
        assert bench_peers.gflop(config, 12)[1] == pytest.approx(short, abs=0.01)


@pytest.fixture
def in_process(monkeypatch):
    """No peers, and what a fresh Python would do is done here: to start one takes seconds."""
    def python(*arguments: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert arguments[:2] == ("-m", "tools.bench")
            bench.main(list(arguments[2:]))
        return said.getvalue()
    for room in (bench_use, bench_train):
        monkeypatch.setattr(room, "python", python)
    for room in (bench_peers, bench_use, bench_data):
        monkeypatch.setattr(room, "installed", lambda peer: False)
    monkeypatch.setattr(bench, "bench_start", lambda runs: [["what"]])


def test_tables_of_small_shapes(in_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "HERE", str(tmp_path))
    monkeypatch.setattr(bench_data, "PHOTOS", [(*size, 2) for *size, _ in bench_data.PHOTOS])
    argv = ["all", "--device", "cpu", "--models", "ViT-tiny", "--batch", "4", "--chunk", "2", "--runs", "1",
            "--batches", "32", "--width", "8", "--lines", "50", "--queries", "20", "--gallery", "40",
            "--squares", "30", "--write"]
    threads = torch.get_num_threads()
    bench.main(argv)
    assert torch.get_num_threads() == threads  # `data` is for one core, and what follows it is not
    text = (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert f"`python -m tools.bench {' '.join(argv)}`" in text
    assert all(line in said for line in text.splitlines())  # printed too, task by task
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for first, second in (("ViT-tiny", "image, 4 together"), ("ViT-tiny", "image, 1 together"),
                          ("ViT-tiny", "captions, 384")):
        found = {row[2]: row for row in rows if row[:2] == [first, second]}
        assert set(found) == {"float32", "bfloat16"} and float(found["float32"][3].replace(",", "")) > 0
        assert found["float32"][11:] == [found["float32"][11], "- / - / -", "-"]  # MB
        assert float(found["float32"][11]) >= 0
        assert found["float32"][5:7] == ["absent", "-"] and float(found["bfloat16"][-1]) > 0.999
    files = ["ours", "official", "Hugging Face"]
    assert [row[1] for row in rows if row[0] == "ViT-tiny" and row[1] in files] == files
    steps = ["1", "1, chunks of 2", "1, cached features", "2", "2, chunks of 2"]
    trained = [row for row in rows if row[0] == "ViT-tiny" and row[1] in steps]
    assert [row[1] for row in trained] == steps and {len(row) for row in trained} == {13}
    for what in ("JPEG 500 x 375, preprocess", "index of 50 pictures", "200 M pairs", "gallery of 20 queries",
                 "20 x 40, both directions", "30 x 30, both directions", "ViT-tiny: captions, encode_texts"):
        assert f"| {what}" in text
    profile = [row for row in rows if row[0] == "ViT-tiny" and len(row) == 5]
    shares = [float(row[2].rstrip("%")) for row in profile]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    assert "| 32 | 8 |" in text and sys.executable not in text


def test_memory_is_what_is_held_at_once():
    """400 MB and 100 MB one after the other, beside 200 MB that were there before."""
    before = torch.ones(50_000_000)

    def action():
        torch.ones(100_000_000).sum()
        return torch.ones(25_000_000) + before[:25_000_000]

    assert bench_peers.memory_of(action, "cpu") == pytest.approx(400, rel=0.01)


def test_beside_a_peer():
    """Its features are compared with ours, its steps make gradients."""
    pytest.importorskip("cn_clip", reason="needs the official code")
    rows = bench_use.bench_encode(["ViT-tiny"], "cpu", 2, 1) + bench_train.bench_train(
        ["ViT-tiny"], ["2"], "cpu", 4, 1, 2)
    row = next(row for row in rows if row[1] == "captions, 384")
    assert float(row[5].replace(",", "")) > 0 and float(row[6]) > 0 and row[12].split(" / ")[0] != "-"
    row = rows[-1]
    assert row[1] == "2, chunks of 2" and float(row[7].replace(",", "")) > 0 and float(row[9]) >= 0
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    theirs = bench_peers.peers_of(clip, ("official",))["official"]
    with torch.no_grad():
        theirs.visual.proj.neg_()
        with pytest.raises(AssertionError, match="official computes something else"):
            pixels = torch.randn(1, 3, 32, 32)
            bench_peers.same(theirs.encode_image(pixels), clip.encode_image(pixels), "official")


def test_time_to_the_first_step_is_taken():
    assert bench_use.first_step() > 0  # or RuntimeError, if train.py no longer prints the line of step 1


def test_commands_of_start_exist(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_use, "python", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(bench_use, "first_step", lambda: 1.0)
    rows = bench_use.bench_start(1)
    assert ["train.py to its first step", "1.00"] in rows and len(rows) == 1 + len(set(asked)) + 1
    assert all(first in ("-c", "-m") or (ROOT / first).is_file() for first, *_ in asked)


@pytest.mark.parametrize("peer", bench_peers.PEERS)
def test_peers_compute_what_we_do(peer):
    """Or nothing is timed: a peer with other weights is an error."""
    if not bench_peers.installed(peer):
        pytest.skip(f"{peer} is not installed")
    clip = model.ChineseCLIP(model.MODELS["ViT-B-32" if peer == "open_clip" else "ViT-tiny"])
    assert isinstance(bench_peers.peers_of(clip, (peer,))[peer], torch.nn.Module)
    with pytest.raises(AssertionError, match=peer):
        bench_peers.same(torch.eye(3), torch.eye(3).flip(0), peer)


@pytest.mark.parametrize("flag", ("runs", "batch", "queries", "lines"))
def test_numbers_below_one(flag, capsys):
    with pytest.raises(SystemExit):
        bench.main(["eval", f"--{flag}", "0"])
    assert f"--{flag} 0: expected at least 1" in capsys.readouterr().err


def test_models_that_are_none(capsys):
    with pytest.raises(SystemExit):
        bench.main(["train", "--models", "ViT-Z"])
    assert "ViT-Z" in capsys.readouterr().err
