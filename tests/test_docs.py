"""What README and docs/ tell a reader to type: each command parses, those of the code blocks run, each Python
snippet runs, and each link leads somewhere.

Commands run in this process and in a folder of stand-ins: sets of two dozen pictures, models of a hundred
thousand parameters under the names of the released ones, and two steps of training.
"""

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoints import RN, VIT, built, official
from conftest import ROOT, write_tar
from stand_ins import picture, write_folders, write_official

import model
from sources import pairs
from sources.classes import read_classes
from training import recipes
from weights import download

PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.md"))]
ONCE = [page for page in PAGES if page.name != "README_zh.md"]  # whose code is README.md's, as a test says
PROGRAMS = ("train.py", "eval.py", "tools.curate", "tools.measure", "tools.weights", "tools.bench", "tools.search")
ids = dict(ids=lambda page: page.name)
pytestmark = pytest.mark.filterwarnings("ignore:'tools.*found in sys.modules")  # other tests import it

# ------------------------------------------------------------------------------------------------------------
# what stands on a page


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block_commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, as words: continued lines joined, comments left out."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    commands = [command for line in lines for command in line.split("&&")]
    return [words for words in (shlex.split(command, comments=True) for command in commands) if words]


def inline_commands(page: Path) -> list[list[str]]:
    """The commands in `single backticks`, in a sentence or in a table."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text))
    return [shlex.split(span) for span in spans if re.match(r"(\w+=\S* )*(python|torchrun) ", span)]


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """["torchrun", "--nproc-per-node", "8", "train.py", "--recipe", "muge"] -> ("train.py", ["--recipe",
    "muge"]); ("", []) if the command is none of ours. An ellipsis stands for more flags."""
    for place, word in enumerate(words):
        if word in PROGRAMS:
            return word, [argument for argument in words[place + 1:] if argument != "..."]
    return "", []


def test_a_worked_example(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Type `python eval.py retrieval ...` or `ls`:\n```bash\n"
                    "A=1 python -m tools.weights \\\n    info x  # what is it?\n"
                    "pip list && python train.py\n```\n")
    assert [program_of(words) for words in inline_commands(page)] == [("eval.py", ["retrieval"])]
    assert [program_of(words) for words in block_commands(page)] == [
        ("tools.weights", ["info", "x"]), ("", []), ("train.py", [])]


# ------------------------------------------------------------------------------------------------------------
# every command parses


class Parsed(Exception):
    """Ends a command that has understood its arguments, before it does anything."""


def run(program: str, arguments: list[str]):
    """Run a command in this process, for a new one takes seconds to import torch. Fails if it ends with
    another exit code than 0."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (mock.patch.object(sys, "argv", [program, *arguments]),
              contextlib.redirect_stderr(said), contextlib.redirect_stdout(said)):
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            last = said.buffer.getvalue().decode()[-2000:]
            pytest.fail(f"{program} {shlex.join(arguments)}\n{last}\n{end.code}")
    finally:
        for number, handler in handlers.items():  # train.py has its own
            signal.signal(number, handler)


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_command_parses(page, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, *arguments):
        parse_args(parser, *arguments)
        raise Parsed

    for words in block_commands(page) + inline_commands(page):
        program, arguments = program_of(words)
        arguments = ["cpu" if argument == "cuda" else argument for argument in arguments]  # there may be no GPU
        if program == "train.py" and "--help" not in arguments:
            recipes.parse(arguments)  # which also looks for flags that do not go together
        if program:
            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
                patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_and_end)
                with contextlib.suppress(Parsed):
                    run(program, arguments)
        elif words[0] in ("python", "bash") and words[1:2] != ["-m"]:
            assert (ROOT / words[1]).is_file(), words


# ------------------------------------------------------------------------------------------------------------
# every command of a block runs

SMALL = {  # argument -> what stands in for it
    "RN-mini": RN, "RN-small": RN,  # another size would do the same, more slowly
    "scenes-zh": "photos",
    "~/Pictures": "photos", "2024": ".", "cat.jpg": "photo.jpg", "./cat.jpg + 雪地 - 2*人": "./photo.jpg + 雪地",
    "cifar-100": "mnist",  # 10 classes for 100
    "web/train-{000000..000099}.tar": "web/train-000000.tar",
    "0.26": "-1", "0.86": "-1",  # random models give low cosines
}
LEFT_OUT = (["python", "train.py"], "compare", "--nnodes", "pip", "--serve",  # the demo and its like; a server;
            "onnx")  # half a minute, and needs packages: tests/tools/test_onnx.py


def small(program: str, arguments: list[str]) -> list[str]:
    """The same command on stand-ins."""
    arguments = [SMALL.get(argument, argument) for argument in arguments]
    if program == "train.py":
        arguments = [VIT if word == "ViT-B-16" and before == "--model" else word
                     for before, word in zip(["", *arguments], arguments)]
        arguments += ["--steps", "2", "--batch-size", "8", "--chunk-size", "4", "--workers", "0"]
        if "--epochs" in arguments:
            arguments += ["--epochs", "0.1"]
    if program == "tools.curate":
        arguments += ["--workers", "0"]
    return arguments


def write_stand_ins(folder: Path):
    """The sets and weights that README and docs/ speak of, small."""
    for name, splits in ("photos", ("train", "valid")), ("my-pairs", ("train", "valid")), ("album", ("train",)):
        (folder / name).mkdir(parents=True)
        for split in splits:
            lines = []
            for n in range(24):
                picture(n).resize((90, 70)).save(folder / name / f"{split}{n}.png")
                lines.append({"image": f"{split}{n}.png", "text": f"第{n}张图片，各种颜色"})
            text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    write_folders(folder / "goods", "水果", "蔬菜")
    write_folders(folder / "some-goods", "水果", "蔬菜", count=4, colour="blue")
    picture(0).save(folder / "photo.jpg")
    for name in ("MUGE", "emoji-cn"):
        for split in ("train", "valid", "test"):
            write_official(folder / name, split)
    png = (folder / "photos" / "train0.png").read_bytes()
    write_tar(folder / "web" / "train-000000.tar", [("0.png", png), ("0.txt", "各种颜色的图片".encode())])
    (folder / "ads.txt").write_text("包邮\n", encoding="utf-8")
    for data in ("mnist", "elevater/cifar-10", "elevater/dtd", "emoji-cn/zeroshot-groups"):
        labels = read_classes("mnist" if "groups" in data else Path(data).name)
        numbers = [f"{number:03}" for number in range(len(labels.english))]
        write_folders(folder / data / "test", *numbers, count=1)
        names = {"label_cn.txt": labels.chinese, "label.txt": [spellings[0] for spellings in labels.english]}
        for file, lines in names.items():
            (folder / data / file).write_text("\n".join(lines), encoding="utf-8")
    for data, name in (("MUGE", "muge"), ("elevater/cifar-10", "cifar-10"), ("elevater/dtd", "dtd")):
        shutil.copytree(folder / data, folder / "cache" / name)
    vit, rn = built(VIT), built(RN)
    for act, clip in (("photos/scratch", rn), ("muge/muge", vit), ("stage2", rn)):
        (folder / "out" / act).mkdir(parents=True)
        model.save(clip, str(folder / "out" / act / "best.safetensors"))
    shutil.copy(ROOT / "docs" / "retrieval.png", folder / "out")
    torch.save(official(vit.state_dict()), folder / "clip_cn_vit-b-16.pt")
    for cache, name in (("cache", "ViT-B-16"), ("carry", "ViT-B-16"), ("cache", "ViT-L-14"),
                        ("cache", "openai-ViT-B-16"), ("cache", "chinese-roberta-wwm-ext"),
                        ("cache", "qa-ViT-B-16")):
        file = folder / cache / name / download.SOURCES[name].rsplit("/", 1)[-1]
        file.parent.mkdir(parents=True)
        shutil.copy(folder / "clip_cn_vit-b-16.pt", file)  # has both towers


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    write_stand_ins(folder)
    return folder


@pytest.fixture
def room(stand_ins, tmp_path, monkeypatch):
    """A folder of stand-ins of its own, to be in."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pairs, "CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_pages_in_two_languages_have_the_same_code():
    english, chinese = (ROOT / "README.md", ROOT / "README_zh.md")
    assert block_commands(english) == block_commands(chinese)
    plain = [[re.sub(r"\s*#.*", "", code) for code in blocks(page, "python")] for page in (english, chinese)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("page", ONCE, **ids)
def test_every_command_of_a_block_runs(page, room):
    """In the order of the page, for later ones use what earlier ones wrote."""
    for words in block_commands(page):
        program, arguments = program_of(words)
        if program in ("", "tools.bench") or any(left == words or left in words for left in LEFT_OUT):
            continue
        run(program, small(program, arguments))


@pytest.mark.parametrize("page", ONCE, **ids)
def test_every_snippet_runs(page, room):
    for code in blocks(page, "python"):
        if "import onnxruntime" in code:  # tests/tools/test_onnx.py runs it
            continue
        exec(compile(code, str(page), "exec"), {})


# ------------------------------------------------------------------------------------------------------------
# links


def anchors(page: Path) -> list[str]:
    """Names of the sections of a page, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.is_file(), link
            assert not anchor or anchor in anchors(path), link
