"""What the README shows: its snippet runs, its numbers are the models'."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from hub import FILE, NAME
from checkpoints import VIT, built, official

from weights import download
from model import MODELS, ChineseCLIP

READMES = ("README.md", "README_zh.md")


def read(language: str) -> str:
    return (ROOT / language).read_text(encoding="utf-8")


@pytest.mark.parametrize("language", READMES)
def test_snippet_of_the_released_models(language, hub, tmp_path, monkeypatch, capsys):
    """With a small model in the official layout, from a local server in the place of Hugging Face."""
    torch.save(official(built(VIT).state_dict()), tmp_path / FILE)
    monkeypatch.setattr("hub.CONTENT", (tmp_path / FILE).read_bytes())
    hub.etag = ""
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "orange").save("photo.jpg")
    code = re.search(r"<!-- snippet: released -->\n```python\n(.+?)```", read(language), re.DOTALL)[1]
    exec(compile(code, language, "exec"), {})
    assert Path(tmp_path / "cache" / NAME / FILE).is_file()
    shares = re.findall(r"^ *([\d.]+)%  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert [caption for _, caption in shares] == ["一只趴在沙发上的猫", "雪山下的湖", "一盘饺子"]
    assert sum(float(share) for share, _ in shares) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize("language", READMES)
def test_table_of_the_released_models(language):
    rows = re.findall(r"^\| `([\w-]+)` \| .+ \| ([\d,]+) \| ([\d,]+) \|$", read(language), re.MULTILINE)
    assert [name for name, _, _ in rows] == list(download.RELEASED)
    for name, numbers, megabytes in rows:
        with torch.device("meta"):
            count = sum(p.numel() for p in ChineseCLIP(MODELS[name]).parameters())
        assert (numbers, megabytes) == (f"{count:,}", f"{4 * count / 1e6:,.0f}")
    for name in download.SOURCES:
        assert f"`{name}`" in read(language)


@pytest.mark.parametrize("language", READMES)
def test_speed_is_that_of_the_benchmarks(language):
    """Every figure of the table stands in a row of docs/benchmarks.md with the same words."""
    benchmarks = [re.split(r" *\| *", line) for line in read("docs/benchmarks.md").splitlines() if line[:1] == "|"]
    rows = re.findall(r"^\| `(?:encode|load|eval|train|data)` \| (.+?) \| (.+) \|$", read(language), re.M)
    assert len(rows) > 8
    for what, figures in rows:
        words, numbers = what.split("; "), re.findall(r"\d[\d,.]*", figures)
        cells = [row + " ".join(row).split() for row in benchmarks]  # some say more than the number
        assert any(all(part in row for part in words + numbers) for row in cells), what
