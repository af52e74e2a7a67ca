"""tools/bench does what it says on small shapes. No test looks at how fast anything is."""

import argparse
import os
import sys
import types

import pytest
import torch

from tools.bench import __main__ as bench
from tools.bench import peers as bench_peers
from tools.bench import search as bench_search
from tools.bench import training as bench_training
from tools.bench import use as bench_use
import model

SMALL = ["--device", "cpu", "--runs", "1", "--batch", "4", "--chunk", "2", "--batches", "32", "--squares", "30"]


def test_cells_of_a_row():
    """8 pictures: ours take 2 s, the official code 4 s, and the other peer is not there."""
    times = {"float32": 2.0, "official": 4.0}
    assert bench_peers.beside(8, "float32", times) == ["4.0", "2.0", "2.00", "-", "-"]
    assert bench_peers.beside(8, "bfloat16", times, ["official"]) == ["-", "2.0", "-"]  # ours: out of memory


def test_a_call_that_does_not_fit_is_left_out():
    """`small` runs once to warm up, once for its memory and three times for its time."""
    calls = []

    def large():
        raise torch.OutOfMemoryError

    actions = {"small": lambda: calls.append(1), "large": large}
    times, memory = bench_peers.measure(actions, argparse.Namespace(runs=3, device="cpu"))
    assert times.keys() == {"small"} and memory == {"small": "0"} and len(calls) == 5


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.fixture
def small(monkeypatch):
    """Fewer and smaller things to measure."""
    monkeypatch.setattr(bench_training, "PHOTOS", [(*size, 2) for *size, _ in bench_training.PHOTOS])
    monkeypatch.setattr(bench_search, "PHOTO", (60, 40))
    monkeypatch.setattr(bench_search, "PHOTOS", 2)
    monkeypatch.setattr(bench_search, "SIZES", (20, 30))
    monkeypatch.setattr(bench_use, "GALLERY", (20, 40))
    monkeypatch.setattr(bench_use, "CAPTIONS", bench_use.CAPTIONS[:4])
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)  # `data` is for one core
    os.sched_setaffinity(0, cores)  # and `search` first


def test_tables_of_small_shapes(small, tmp_path, monkeypatch, capsys):
    for room in (bench_peers, bench_use, bench_training):
        monkeypatch.setattr(room, "version", lambda peer: "")
    monkeypatch.setattr(bench_use, "exported", lambda clip, folder: {})  # an export takes ten seconds
    monkeypatch.setattr(bench, "PAGE", str(tmp_path / "benchmarks.md"))
    argv = ["all", "--models", "ViT-tiny", "--write", *SMALL]
    bench.main(argv)
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text and f"`python -m tools.bench {' '.join(argv)}`" in text
    rows = rows_of(text)
    for what in ("image, 4 together", "image, 1 together", "captions, 4 together"):
        exact, rounded = (row for row in rows if row[:2] == ["ViT-tiny", what])
        assert (exact[2], rounded[2]) == ("float32", "bfloat16") and float(exact[3].replace(",", "")) > 0
        assert exact[4:8] == ["-"] * 4 and float(exact[8]) >= 0 and exact[9:] == ["- / -", "-"]
        assert float(rounded[10]) > 0.999
    for what in ("image x 4", "image x 1", "captions x 4"):
        (row,) = (row for row in rows if row[:2] == ["ViT-tiny", what])
        assert float(row[2].replace(",", "")) > 0 and float(row[4]) > 0 and row[5:] == ["-"] * 8
    assert [row[1] for row in rows if row[:2] in (["ViT-tiny", "ours"], ["ViT-tiny", "official"])] == ["ours", "official"]  # files
    steps = ["1", "1, chunks of 2", "1, cached features", "2", "2, chunks of 2"]
    trained = [row for row in rows if row[2:3] == ["4 pairs"]]
    assert [row[1] for row in trained] == steps and {len(row) for row in trained} == {11}
    for what in ("JPEG 500 x 375, for training", "20 x 40, both directions", "30 x 30, both directions", "32 |",
                 "index 2 photos, cores: 1", "find by a picture ten of 30"):
        assert f"\n| {what}" in text


def test_memory_is_what_is_held_at_once():
    """400 MB and 100 MB one after the other, beside 200 MB that were there before."""
    before = torch.ones(50_000_000)

    def action():
        torch.ones(100_000_000).sum()
        return torch.ones(25_000_000) + before[:25_000_000]

    assert bench_peers.memory_of(action, "cpu") == pytest.approx(400, rel=0.01)


def test_a_peer_that_computes_something_else(monkeypatch):
    """It keeps weights of its own, so nothing is timed."""
    class Stubborn(model.ChineseCLIP):
        def load_state_dict(self, state):
            pass

    config = model.MODELS["ViT-tiny"]
    stand_in = types.SimpleNamespace(create_model=lambda name: Stubborn(config))
    monkeypatch.setitem(sys.modules, "cn_clip", types.ModuleType("cn_clip"))
    monkeypatch.setitem(sys.modules, "cn_clip.clip", types.ModuleType("cn_clip.clip"))
    monkeypatch.setitem(sys.modules, "cn_clip.clip.utils", stand_in)
    monkeypatch.setattr(bench_peers, "version", lambda peer: "1" if peer == "official" else "")
    with pytest.raises(AssertionError, match="official computes something else"):
        bench_peers.peers_of("RN50", model.ChineseCLIP(config))


@pytest.mark.parametrize("task", ("encode", "load", "train", "data"))
def test_beside_the_peers(task, small, capsys):
    """Their features and pixels are those of our code, or this would raise, and their steps make gradients."""
    pytest.importorskip("cn_clip", reason="needs the official code")
    bench.main([task, "--models", "RN50", "--stages", "2", *SMALL])
    head, *rows = rows_of(capsys.readouterr().out)
    column = next(k for k, name in enumerate(head) if name.startswith("official"))
    assert float(rows[-1][column].replace(",", "")) > 0


def test_numbers_below_one(capsys):
    with pytest.raises(SystemExit):
        bench.main(["eval", "--runs", "0"])
    assert "every number must be at least 1" in capsys.readouterr().err


def test_models_that_are_none(capsys):
    with pytest.raises(SystemExit):
        bench.main(["train", "--models", "ViT-Z"])
    assert "ViT-Z" in capsys.readouterr().err
