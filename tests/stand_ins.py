"""Small sets to measure on, in the layouts that users have, and recall restated in plain Python."""

import base64
import functools
import io
import json
import os
import zipfile

import numpy as np
import torch
from PIL import Image

from conftest import noise
from sources.classes import read_classes
from sources.named import OTHERWISE
from sources.pairs import DataError, Pairs, as_text

TEXTS = ["一只猫", "两只红色的小猫在草地上", "猫", "雪地上有三棵树，左边还有一座房子", "a cat", "船", "两艘帆船", "花"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def write_folders(root, *names: str, count: int = 2, colour: str = "red") -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (8, 8), colour).save(root / name / f"{n}.png")
    return str(root)


def write_classes(folder, names=("猫", "船", "花"), count: int = 2) -> str:
    """The official layout; picture n of class c is picture(10 * c + n)."""
    os.makedirs(folder / "test", exist_ok=True)
    (folder / "label_cn.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for label in range(len(names)):
        os.makedirs(folder / "test" / f"{label:03d}")
        for n in range(count):
            picture(10 * label + n).save(folder / "test" / f"{label:03d}" / f"{n}.png")
    return str(folder)


def write_official(folder, split: str, count: int = 12, answers: bool = True) -> str:
    """`count` pictures and as many captions, in MUGE's layout; picture n has the id 100 + n."""
    os.makedirs(folder, exist_ok=True)
    with open(folder / f"{split}_imgs.tsv", "w", encoding="utf-8") as file:
        for n in range(count):
            png = io.BytesIO()
            picture(n).save(png, "PNG")
            file.write(f"{100 + n}\t{base64.b64encode(png.getvalue()).decode()}\n")
    with open(folder / f"{split}_texts.jsonl", "w", encoding="utf-8") as file:
        for n in range(count):
            line = {"text_id": 7 * n, "text": TEXTS[n % len(TEXTS)] * (1 + n // len(TEXTS)),
                    "image_ids": [100 + n] if answers else []}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return str(folder)


def write_zip(members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@functools.cache
def elevater(names: tuple[str, ...], train: int = 1) -> bytes:
    """ELEVATER_all.zip with a zip for each of these data sets: one picture of every class to test on, and as
    many as `train` says to train on."""
    outer = {}
    for name in names:
        classes = read_classes(name)
        english, chinese = [spellings[0] for spellings in classes.english], classes.chinese
        members = {"label.txt": "\n".join(english).encode(), "label_cn.txt": "\n".join(chinese).encode()}
        for part, count in (("test", 1), ("train", train)):
            for c in range(len(english)):
                for n in range(count):
                    png = io.BytesIO()
                    picture(1000 * n + c).save(png, "PNG")
                    number = f"{c:03d}" if len(english) > 10 else str(c)
                    members[f"{part}/{number}/{n}.png"] = png.getvalue()
        if classes.metric == "map-11":
            members["test.txt"] = "".join(f"test/{c:03d}/0.png\t{c}\n" for c in range(len(english))).encode()
        outer[f"ELEVATER_all/{OTHERWISE.get(name, name)}.zip"] = write_zip(members)
    return write_zip(outer, zipfile.ZIP_STORED)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Six(Pairs):
    """Six captions and five pictures; caption 5 has two pictures, picture 0 two captions."""

    texts, image_count = TEXTS[:6], 5
    positives = torch.tensor([[0, 0], [1, 0], [2, 1], [3, 2], [4, 3], [5, 4], [5, 1]])

    def text(self, row: int) -> str:
        return as_text(self.texts[row], "list line 1")

    def image(self, row: int, size: int = 0) -> Image.Image:
        return picture(row)


class Counted(Pairs):
    """`count` pairs without a file: caption i is the number i, picture i a noise; `broken` ones fail."""

    def __init__(self, count: int, broken=()):
        self.texts, self.image_count, self.broken = [str(i) for i in range(count)], count, set(broken)
        self.positives = torch.arange(count)[:, None].expand(-1, 2)

    def text(self, row: int) -> str:
        return as_text(self.texts[row], f"list line {row + 1}")

    def image(self, row: int, size: int = 0) -> Image.Image:
        if row in self.broken:
            raise DataError(f"picture {row} is broken")
        return noise(9, 8, row)


def restated(scores: list[list[float]], positives: list[list[int]]) -> dict[str, float]:
    """Recall@K in plain Python: sort the gallery, wrong answers before right ones that score the same, and
    look whether the first K hold a right one."""
    right = {}
    for query, item in positives:
        right.setdefault(query, set()).add(item)
    result = {}
    for k in (1, 5, 10):
        found = 0
        for q, mine in right.items():
            order = sorted(range(len(scores[q])), key=lambda i: (-scores[q][i], i in mine))
            found += bool(mine & set(order[:k]))
        result[f"R@{k}"] = 100 * found / len(right)
    return result | {"mean": sum(result.values()) / 3}
