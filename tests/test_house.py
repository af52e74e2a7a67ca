"""The rules of the house that a machine can check."""

import ast
import re

import pytest

from conftest import ROOT

CORE = ["loss", "model", "vit", "bert", "resnet", "data", "train", "eval", "common"]
FOLDERS = [".ci", "assets", "docs", "labels", "sources", "tests", "tools", "training", "weights"]
# room -> rooms that it may import: the arrows of the house, which run downward. tools may import anything.
ARROWS = {
    "common": set(), "vit": {"common"}, "bert": {"common"}, "resnet": {"common"}, "loss": {"common"},
    "sources": {"common"},
    "data": {"sources", "common"},
    "weights": {"vit", "bert", "resnet", "common"},
    "model": {"vit", "bert", "resnet", "data", "weights", "sources", "common"},
    "eval": {"model", "data", "sources", "weights", "common"},
    "training": {"eval", "model", "data", "loss", "sources", "weights", "common"},
    "train": {"training", "eval", "model", "data", "loss", "sources", "weights", "common"},
}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")
               if path.relative_to(ROOT).parts[0] not in ("tests", "out") and path.parts[-2][0] != ".")


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports(node: ast.AST) -> set[str]:
    """Dotted names of the modules that are imported anywhere below this node."""
    found = set()
    for below in ast.walk(node):
        if isinstance(below, ast.Import):
            found |= {alias.name for alias in below.names}
        if isinstance(below, ast.ImportFrom):
            folder = ROOT / below.module.replace(".", "/")
            found |= {f"{below.module}.{alias.name}" if (folder / f"{alias.name}.py").is_file()
                      else below.module for alias in below.names}
    return found


def room(module: str) -> str:
    return module.split(".")[0].removesuffix(".py")


def reached(module: str) -> set[str]:
    """All files of this project that are loaded with this one, by their dotted names."""
    found, todo = set(), [module]
    while todo:
        module = todo.pop()
        file = module.replace(".", "/") + ".py"
        if file in FILES and module not in found:
            found.add(module)
            todo += imports(tree(file))
    return found


@pytest.mark.parametrize("file", FILES)
def test_arrows_run_downward(file):
    mine = {room(module) for module in imports(tree(file))} & {*ARROWS, "tools"}
    here = room(file.replace("/", "."))
    assert here == "tools" or mine <= ARROWS[here] | {here}


def test_no_circle_among_the_files_of_a_folder():
    for file in FILES:
        module = file.removesuffix(".py").replace("/", ".")
        assert all(module not in reached(other) for other in imports(tree(file))), file


@pytest.mark.parametrize("file", FILES)
def test_no_arrow_is_hidden(file):
    """Nothing is imported by a name in a string, and inside a function only a package that is optional."""
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not re.search(r"\b(runpy|import_module|__import__)\b", source.replace("import runpy, torch; torch", "")
                         .replace("runpy.run_module('cn_clip", ""))
    for function in ast.walk(tree(file)):
        if isinstance(function, ast.FunctionDef):
            assert not {room(module) for module in imports(function)} & {*ARROWS, "tools"}, function.name


@pytest.mark.parametrize("file", FILES)
def test_files_open_with_a_docstring_and_do_nothing_unsafe(file):
    source = (ROOT / file).read_text(encoding="utf-8")
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
