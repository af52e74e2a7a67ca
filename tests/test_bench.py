"""bench.py does what it says on small shapes; how fast is no test's business."""

import sys

import pytest

import bench
import model


def test_the_arithmetic_is_that_of_open_clips_profile():
    """GFLOP of an image and of captions of 52 and 12 tokens: open_clip's docs/model_profile.csv, and BERT by
    hand."""
    for name, image, long, short in (("RN50", 12.22, 2.23, 0.51), ("ViT-B-16", 35.13, 8.93, 2.04),
                                     ("ViT-L-14", 162.03, 8.93, 2.04), ("ViT-L-14-336", 381.92, 8.93, 2.04),
                                     ("ViT-H-14", 334.59, 31.67, 7.26)):
        config = model.MODELS[name]
        assert bench.gflop(config, 52) == (pytest.approx(image, abs=0.01), pytest.approx(long, abs=0.01))
        assert bench.gflop(config, 12)[1] == pytest.approx(short, abs=0.01)


def test_tables_of_small_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["all", "--device", "cpu", "--models", "ViT-tiny", "--batch", "4", "--chunk", "2", "--runs", "1",
            "--batches", "32", "--width", "8", "--lines", "50", "--write"]
    bench.main(argv)
    text = (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and f"`python bench.py {' '.join(argv)}`" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ViT-tiny")]
    assert [row[1] for row in rows] == ["1", "1, chunks of 2", "1, cached features", "2", "2, chunks of 2"]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    for what in ("JPEG 500 x 375, squashed", "index of 50 pictures", "200 M pairs"):
        assert f"| {what}" in text
    assert "| 32 | 8 |" in text and sys.executable not in text


def test_models_that_are_none(capsys):
    with pytest.raises(SystemExit):
        bench.main(["train", "--models", "ViT-Z"])
    assert "ViT-Z" in capsys.readouterr().err
