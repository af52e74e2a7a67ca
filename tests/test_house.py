"""The rules of the house that a machine can check."""

import ast
import re

import pytest

from conftest import ROOT

# file -> files of this project that it may import; arrows run downward only
ARROWS = {
    "vit": set(), "resnet": set(), "bert": set(), "loss": set(), "download": set(), "augment": set(),
    "scenes": set(),
    "pairs": set(),
    "metrics": {"loss", "pairs"},
    "shards": {"pairs"},
    "sources": {"pairs", "scenes", "shards"},
    "torchfile": set(),
    "weights": {"download", "torchfile"},
    "data": {"augment", "pairs"},
    "model": {"vit", "resnet", "bert", "weights", "download", "data"},
    "features": {"model", "data", "pairs", "loss", "weights"},
    "classes": {"pairs"},
    "zeroshot": {"metrics", "model", "scenes", "features"},
    "calibrate": {"metrics"},
    "published": {"pairs"},
    "page": {"metrics", "pairs", "weights"},
    "eval": {"page", "metrics", "features", "classes", "zeroshot", "calibrate", "published", "loss", "model",
             "pairs", "sources", "weights", "download"},
    "faults": {"data", "pairs"},
    "pieces": {"faults", "pairs", "shards", "sources"},
    "check": {"faults", "pieces", "pairs", "weights"},
    "curate": {"check", "faults", "augment", "model", "eval", "pairs", "sources", "weights"},
    "cache": {"model", "data", "pairs", "loss", "augment", "weights"},
    "chunks": {"loss"},
    "distill": {"data", "loss", "model"},
    "checkpoint": {"chunks", "data", "loss", "model", "pairs", "recipes", "weights"},
    "convert": {"model", "data", "weights", "download"},
    "report": {"eval", "model", "recipes", "sources", "weights", "scenes"},
    "recipes": {"model"},
    "bench": {"bench_data", "bench_peers", "bench_train", "bench_use", "model"},
    "bench_peers": {"convert", "data", "model"},
    "bench_data": {"augment", "bench_peers", "data", "pairs", "shards", "sources"},
    "bench_train": {"bench_peers", "chunks", "data", "loss", "model", "train"},
    "bench_use": {"bench_peers", "bench_train", "convert", "data", "features", "metrics", "model", "scenes"},
    "train": {"recipes", "report", "eval", "cache", "checkpoint", "chunks", "distill", "model", "data", "pairs",
              "sources", "loss", "weights"},
}
# file -> packages that it may import beside the standard library 
PACKAGES = {
    "vit": {"torch"}, "resnet": {"torch"}, "bert": {"torch"}, "loss": {"torch"}, "model": {"torch"},
    "metrics": {"torch", "tqdm"}, "classes": {"torch"}, "zeroshot": {"torch"}, "calibrate": {"torch"},
    "page": {"torch", "PIL"},
    "published": set(),
    "features": {"torch", "numpy", "PIL", "tqdm"},
    "torchfile": {"torch"}, "weights": {"torch", "safetensors"}, "download": {"requests", "tqdm", "filelock"},
    "convert": {"torch", "tokenizers"},
    "bench": {"torch"}, "bench_data": {"torch", "numpy", "PIL", "cn_clip"},
    "bench_peers": {"torch", "cn_clip", "open_clip", "transformers"},  # peers only where they are installed
    "bench_train": {"torch", "open_clip"}, "bench_use": {"torch", "cn_clip", "transformers"},
    "augment": {"PIL"}, "scenes": {"numpy", "PIL"},
    "data": {"torch", "numpy", "PIL", "tokenizers"}, "sources": {"torch", "numpy", "PIL"},
    "pairs": {"torch", "numpy", "PIL", "filelock"}, "shards": {"torch", "numpy", "tqdm"},
    "faults": {"PIL"}, "pieces": {"numpy"}, "check": {"numpy", "tqdm"},
    "curate": {"torch", "numpy", "PIL", "tqdm"},
    "cache": {"torch", "numpy", "PIL", "tqdm"}, "eval": {"torch"}, "report": {"torch", "PIL"},
    "chunks": {"torch"}, "distill": {"torch"}, "checkpoint": {"torch"}, "recipes": {"torch"}, "train": {"torch"},
}
FILES = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(name: str) -> set[str]:
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {n.split(".")[0] for n in names}


def test_every_file_is_a_room_of_the_house():
    assert FILES == sorted(ARROWS)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downward(name):
    import sys
    mine = imported(name) & set(ARROWS)
    assert mine <= ARROWS[name]
    assert imported(name) - mine - set(sys.stdlib_module_names) <= PACKAGES[name]


def test_the_one_arrow_that_no_import_shows():
    """README names it: `python weights.py` starts convert.py by name."""
    hidden = set()
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                    "run_module", "run_path", "import_module", "__import__"):
                hidden.add((name, ast.unparse(node.args[0])))
    assert hidden == {("weights", "'convert'")}
    for language, words in (("README.md", "One arrow points upward"), ("README_zh.md", "只有一处朝上")):
        sentence = (ROOT / language).read_text(encoding="utf-8").partition(words)[2][:100]
        assert "`python weights.py`" in sentence and "`convert.py`" in sentence


def test_the_allowed_arrows_have_no_circle():
    def reach(name):
        return ARROWS[name].union(*(reach(other) for other in ARROWS[name]))
    assert all(name not in reach(name) for name in ARROWS)


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name):
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("name", FILES)
def test_files_open_with_a_docstring_and_do_nothing_unsafe(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    for pattern in (r"\.cuda\(", r"(?<![\w.])eval\(", r"(?<![\w.])exec\(",
                    r"except( Exception)?:", r"shell=True", r"pickle\.load\b"):
        assert not re.search(pattern, source), pattern
    for line in source.splitlines():
        assert "torch.load(" not in line or "weights_only=True" in line


def test_readme_has_the_two_commands():
    for language in ("README.md", "README_zh.md"):
        text = (ROOT / language).read_text(encoding="utf-8")
        for tag in ("demo", "test"):
            assert re.search(rf"<!-- command: {tag} -->\n```\w*\n.+?\n```", text, re.DOTALL), (language, tag)


def test_file_table_of_the_readme_is_right():
    """`file.py` | what | lines: counts in prose go stale, so they are checked (rounded to tens)."""
    for language in ("README.md", "README_zh.md"):
        text = (ROOT / language).read_text(encoding="utf-8")
        rows = dict(re.findall(r"^\| `(\w+)\.py` \|.*\| (\d+) \|$", text, re.MULTILINE))
        assert set(rows) == set(FILES)
        for name, lines in rows.items():
            actual = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
            assert int(lines) == round(actual, -1), (language, name, actual)
