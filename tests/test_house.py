"""The rules of the house that a machine can check."""

import ast
import functools
import re
import subprocess

import pytest

from conftest import ROOT

# the nine files of the tutorial, in reading order, and how long each may be
CORE = {"loss": 130, "model": 200, "vit": 180, "bert": 165, "resnet": 130, "data": 240, "train": 260,
        "eval": 270, "common": 175}
FOLDERS = [".ci", "assets", "docs", "labels", "sources", "tests", "tools", "training", "weights"]
# room -> rooms that it may import: the arrows of the house, which run downward. tools may import anything.
ARROWS = {
    "common": set(), "vit": {"common"}, "bert": {"common"}, "resnet": {"common"}, "loss": {"common"},
    "sources": {"weights", "common"},  # data sets are downloaded as weights are
    "data": {"sources", "common"},
    "weights": {"vit", "bert", "resnet", "common"},
    "model": {"vit", "bert", "resnet", "data", "weights", "sources", "common"},
    "eval": {"model", "data", "sources", "common"},
    "training": {"eval", "model", "data", "loss", "sources", "weights", "common"},
    "train": {"training", "eval", "model", "data", "loss", "sources", "weights", "common"},
}
FILES = sorted([f"{name}.py" for name in CORE] + [  # whatever else a user keeps at the top is their own
    path.relative_to(ROOT).as_posix() for folder in FOLDERS if folder != "tests"
    for path in (ROOT / folder).rglob("*.py")])


def lines(file: str) -> list[str]:
    return (ROOT / file).read_text(encoding="utf-8").splitlines()


@functools.cache
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
    assert not re.search(r"\b(runpy|import_module|__import__)\b", source)
    for function in ast.walk(tree(file)):
        if isinstance(function, ast.FunctionDef):
            assert not {room(module) for module in imports(function)} & {*ARROWS, "tools"}, function.name


# ------------------------------------------------------------------------------------------------------------
# what stands where, and how long it is


def test_the_top_holds_the_nine_files_and_the_folders():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout, so there may be files of other kinds here")
    top = {path.split("/")[0] for path in tracked.stdout.splitlines()}
    assert {name for name in top if name.endswith(".py")} == {f"{name}.py" for name in CORE}
    assert {name for name in top if (ROOT / name).is_dir()} == set(FOLDERS)


def test_the_tutorial_is_read_in_an_evening():
    lengths = {name: len(lines(f"{name}.py")) for name in CORE}
    assert all(lengths[name] <= most for name, most in CORE.items()), lengths
    assert sum(lengths.values()) <= 1680


def test_all_of_it_is_small():
    assert sum(len(lines(file)) for file in FILES) <= 10610


@pytest.mark.parametrize("file", FILES)
def test_lines_and_functions_are_short(file):
    assert max(map(len, lines(file))) <= 110
    for function in ast.walk(tree(file)):
        if isinstance(function, ast.FunctionDef):
            assert function.end_lineno - function.lineno < 90, function.name


def test_the_first_files_need_no_other():
    for name in ("vit", "bert", "resnet", "loss"):
        assert reached(name) <= {name, "common"}
    allowed = {"model", "vit", "bert", "resnet", "data", "common", "sources.pairs", "sources.augment", "sources.order"}
    assert {file for file in reached("model") if room(file) != "weights"} <= allowed


@pytest.mark.parametrize("language", ["README.md", "README_zh.md"])
def test_readme_is_short_and_its_tree_is_right(language):
    """The tree names every file and folder at the top, with the lines of the nine files rounded to tens."""
    text = (ROOT / language).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for name in CORE:
        (said,) = re.findall(rf"^{name}\.py +(\d+) ", text, re.MULTILINE)
        assert int(said) == round(len(lines(f"{name}.py")), -1), name
    for folder in FOLDERS:
        assert re.search(rf"(^| ){re.escape(folder)}/", text, re.MULTILINE), folder
    assert sum(path.stat().st_size for path in (ROOT / "docs").glob("*.png")) <= 200_000


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
