"""What the README shows: its snippet downloads and runs, its figures are the code's, and it says the same in
both languages."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from hub import FILE, NAME, PATH
from checkpoints import VIT, built, official

from sources import order, shards
from sources.classes import TEMPLATES, read_templates
from weights import download
from model import MODELS, ChineseCLIP

READMES = ("README.md", "README_zh.md")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("language", READMES)
def test_snippet_of_the_released_models(language, hub, tmp_path, monkeypatch, capsys):
    """With a small model in the official layout, from a local server in the place of Hugging Face."""
    torch.save(official(built(VIT).state_dict()), tmp_path / FILE)
    hub.files[PATH] = (tmp_path / FILE).read_bytes()
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


def test_figures_of_the_text_are_those_of_the_code():
    sets = [path for path in (ROOT / "labels").iterdir() if path.name != "templates.txt"]
    assert f"templates of {len(sets)} data sets" in read("README.md")
    general = len(read_templates(TEMPLATES))
    assert f"the {general} general ones" in read("docs/measuring.md").replace("\n", " ")
    stretches = shards.WINDOW // order.BLOCK
    assert (f"{shards.WINDOW:,} pairs at a time, drawn from {stretches} stretches"
            in read("docs/data.md").replace("\n", " "))
    views, width = 4, MODELS["ViT-B-16"].embed_dim  # in float16
    assert f"{views * width * 2 // 1024} KB per picture" in read("docs/scaling.md").replace("\n", " ")


# ------------------------------------------------------------------------------------------------------------
# the form


@pytest.mark.parametrize("language", READMES)
def test_it_begins_with_the_result(language):
    assert read(language).splitlines().index("<!-- command: demo -->") < 25


def test_both_languages_have_the_same_figures():
    def figures(language: str) -> set[str]:
        outside_code = re.sub(r"^```.*?^```", "", read(language), flags=re.DOTALL | re.MULTILINE)
        return set(re.findall(r"\d[\d,./-]*\d|\d", outside_code))

    def tables(language: str) -> list[str]:
        return re.findall(r"^```\n( +mean .*?)^```", read(language), re.DOTALL | re.MULTILINE)

    assert figures("README.md") == figures("README_zh.md")
    assert tables("README.md") == tables("README_zh.md") != []
