"""tools/bench does what it says on small shapes. No test looks at how fast anything is."""

import sys

import pytest
import torch

from tools.bench import __main__ as bench
from tools.bench import data as bench_data
from tools.bench import peers as bench_peers
from tools.bench import use as bench_use
import model


def test_cells_of_a_row():
    """8 pictures: ours take 2 s, the official code 4 s, and the other peers are not there."""
    times = {"float32": 2.0, "official": 4.0}
    assert bench_peers.beside(8, "float32", times) == ["4.0", "2.0", "2.00", "-", "-", "-", "-"]
    assert bench_peers.beside(8, "bfloat16", times, ["official"]) == ["-", "2.0", "-"]  # ours: out of memory


def test_tables_of_small_shapes(tmp_path, monkeypatch, capsys):
    for room in (bench_peers, bench_use, bench_data):
        monkeypatch.setattr(room, "installed", lambda peer: False)
    monkeypatch.setattr(bench, "HERE", str(tmp_path))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(bench_data, "PHOTOS", [(*size, 2) for *size, _ in bench_data.PHOTOS])
    argv = ["all", "--device", "cpu", "--models", "ViT-tiny", "--batch", "4", "--chunk", "2", "--runs", "1",
            "--batches", "32", "--width", "8", "--lines", "50", "--queries", "20", "--gallery", "40",
            "--squares", "30", "--write"]
    threads = torch.get_num_threads()
    bench.main(argv)
    assert torch.get_num_threads() == threads  # `data` is for one core, and what follows it is not
    text = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert f"`python -m tools.bench {' '.join(argv)}`" in text
    assert all(line in said for line in text.splitlines())  # printed too, task by task
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for first, second in (("ViT-tiny", "image, 4 together"), ("ViT-tiny", "image, 1 together"),
                          ("ViT-tiny", "captions, 384")):
        found = {row[2]: row for row in rows if row[:2] == [first, second]}
        assert set(found) == {"float32", "bfloat16"} and float(found["float32"][3].replace(",", "")) > 0
        assert found["float32"][10:] == [found["float32"][10], "- / - / -", "-"]  # MB
        assert float(found["float32"][10]) >= 0
        assert found["float32"][4:6] == ["-", "-"] and float(found["bfloat16"][-1]) > 0.999
    files = ["ours", "official", "Hugging Face"]
    assert [row[1] for row in rows if row[0] == "ViT-tiny" and row[1] in files] == files
    steps = ["1", "1, chunks of 2", "1, cached features", "2", "2, chunks of 2"]
    trained = [row for row in rows if row[0] == "ViT-tiny" and row[1] in steps]
    assert [row[1] for row in trained] == steps and {len(row) for row in trained} == {11}
    for what in ("JPEG 500 x 375, preprocess", "index of 50 pictures", "20 x 40, both directions",
                 "30 x 30, both directions"):
        assert f"| {what}" in text
    assert "| 32 | 8 |" in text and sys.executable not in text


def test_memory_is_what_is_held_at_once():
    """400 MB and 100 MB one after the other, beside 200 MB that were there before."""
    before = torch.ones(50_000_000)

    def action():
        torch.ones(100_000_000).sum()
        return torch.ones(25_000_000) + before[:25_000_000]

    assert bench_peers.memory_of(action, "cpu") == pytest.approx(400, rel=0.01)


def test_beside_a_peer(capsys):
    """Its features are compared with ours, its steps make gradients."""
    pytest.importorskip("cn_clip", reason="needs the official code")
    small = ["--device", "cpu", "--models", "ViT-tiny", "--runs", "1"]
    bench.main(["encode", "--batch", "2", *small])
    bench.main(["train", "--stages", "2", "--batch", "4", "--chunk", "2", *small])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    row = next(row for row in rows if row[1] == "captions, 384")
    assert float(row[4].replace(",", "")) > 0 and float(row[5]) > 0 and row[11].split(" / ")[0] != "-"
    row = rows[-1]
    assert row[1] == "2, chunks of 2" and float(row[5].replace(",", "")) > 0 and float(row[7]) >= 0
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    theirs = bench_peers.peers_of(clip, (bench_peers.official,))["official"]
    with torch.no_grad():
        theirs.visual.proj.neg_()
        with pytest.raises(AssertionError, match="official computes something else"):
            pixels = torch.randn(1, 3, 32, 32)
            bench_peers.same(theirs.encode_image(pixels), clip.encode_image(pixels), "official")


@pytest.mark.parametrize("peer", bench_peers.PEERS)
def test_peers_compute_what_we_do(peer):
    """Or nothing is timed: a peer with other weights is an error."""
    if not bench_peers.installed(peer):
        pytest.skip(f"{peer} is not installed")
    clip = model.ChineseCLIP(model.MODELS["ViT-B-32" if peer == "open_clip" else "ViT-tiny"])
    assert isinstance(bench_peers.peers_of(clip, (getattr(bench_peers, peer),))[peer], torch.nn.Module)
    with pytest.raises(AssertionError, match=peer):
        bench_peers.same(torch.eye(3), torch.eye(3).flip(0), peer)


@pytest.mark.parametrize("flag", ("runs", "batch", "queries", "lines"))
def test_numbers_below_one(flag, capsys):
    with pytest.raises(SystemExit):
        bench.main(["eval", f"--{flag}", "0"])
    assert f"--{flag}: 0: expected a number of at least 1" in capsys.readouterr().err


def test_models_that_are_none(capsys):
    with pytest.raises(SystemExit):
        bench.main(["train", "--models", "ViT-Z"])
    assert "ViT-Z" in capsys.readouterr().err
