"""
Files to pairs of picture and caption, by number.

    open_pairs("path/to/MUGE", "train")   the pairs of a split

Sources, told by what is there, read as they are:
    folder with {split}_imgs.tsv + {split}_texts.jsonl   the official layout (MUGE, Flickr30K-CN, COCO-CN)
    folder with {split}.jsonl or {split}.csv             lines with a picture (its path there) and a text
    folder with tar shards, or a pattern {000..999}.tar  WebDataset, as img2dataset writes it (sources/shards.py)
    scenes-en, scenes-zh                                 drawn in memory (sources/scenes.py)
    several of these, with commas between                read as one
"""

import base64
import binascii
import bisect
import functools
import hashlib
import itertools
import json
import os

import numpy as np
import torch
from PIL import Image

from sources import scenes
from sources import shards
from sources.pairs import (
    DataError, Pairs, as_text, kept, lines_of, parse_json, read_at, read_csv, read_jsonl, read_picture, stamp)

# What lists call their columns: ours; Hugging Face's; open_clip's; Wukong's
PICTURE_COLUMNS = ("image", "file_name", "filepath", "dir")
TEXT_COLUMNS = ("text", "caption", "title")
MAX_ID = 256  # bytes; ids are kept in an array as wide as the longest


def open_pairs(source: str, split: str, answers: bool = True) -> Pairs:
    """The split of a source, told by what is there (see the top of this file). DataError names what is
    missing. answers=False: the official layout may come without image_ids, as MUGE's test split does."""
    layout = layout_of(source, split)
    if layout == "joined":
        several = shards.split_outside_braces(source)
        if split != "train":  # all must have pairs to train on; to measure on, those that have them
            several = [one for one in several if layout_of(one, split)] or several
        return JoinedPairs([open_pairs(one, split) for one in several])
    if layout == "scenes":
        return ScenePairs(source.removeprefix("scenes-"), split)
    if layout == "official":
        return OfficialPairs(source, split, answers)
    if layout in ("jsonl", "csv"):
        return FolderPairs(source, f"{split}.{layout}")
    if layout == "shards":
        return shards.TarPairs(shards.find(source, split))
    if not os.path.isdir(source):
        raise DataError(
            f"{source}: no such folder; expected a folder of pairs, tar shards, scenes-en or scenes-zh")
    raise DataError(f"{source}: no split {split!r} in it; expected {split}_imgs.tsv with "
                    f"{split}_texts.jsonl, or {split}.jsonl or {split}.csv, or {split}-*.tar")


def layout_of(source: str, split: str) -> str:
    """How the split of a source is stored: joined, scenes, official, jsonl, csv or shards; "" if it is not
    there."""
    if len(shards.split_outside_braces(source)) > 1 and not os.path.exists(source):
        return "joined"
    if source in ("scenes-en", "scenes-zh"):
        return "scenes"
    names = {"official": f"{split}_imgs.tsv", "jsonl": f"{split}.jsonl", "csv": f"{split}.csv"}
    for layout, name in names.items():
        if os.path.isfile(os.path.join(source, name)):
            return layout
    return "shards" if shards.find(source, split) else ""


class ScenePairs(Pairs):
    """sources/scenes.py: a million training scenes, drawn when asked for; a thousand for validation, no two the
    same."""

    def __init__(self, world: str, split: str):
        if split not in ("train", "valid"):
            raise DataError(f"scenes-{world}: no split {split!r}; expected train or valid")
        self.world, self.split, self.numbers = world, split, range(1_000_000)
        if split == "valid":
            self.numbers = distinct(world, split)
        self.image_count, self.drawn = len(self.numbers), {}
        self.positives = torch.arange(len(self.numbers))[:, None].expand(-1, 2)

    @functools.cached_property
    def texts(self) -> list[str]:
        if self.split == "train":
            raise DataError(f"scenes-{self.world}: its training pairs are endless, to measure take valid")
        return [self.text(row) for row in range(len(self.numbers))]

    def text(self, row: int) -> str:
        return scenes.captioned(self.world, self.split, self.numbers[row])[0]

    def image(self, row: int, size: int = 0) -> Image.Image:
        if self.split != "valid":
            return self.pair(row)[0]
        if row not in self.drawn:  # validation looks at all of them again and again
            self.drawn[row] = self.pair(row)[0]
        return self.drawn[row]

    def pair(self, i: int, size: int = 0) -> tuple[Image.Image, str]:
        return scenes.pair(self.world, self.split, self.numbers[i])

    def fingerprint(self) -> str:
        raise DataError(f"scenes-{self.world}: drawn as they are asked for; there is nothing to cache")


@functools.cache  # every act of a run asks
def distinct(world: str, split: str) -> list[int]:
    """Numbers of 1,000 scenes, no two with the same caption."""
    found = {}
    for number in range(2000):
        found.setdefault(scenes.scene(world, split, number)[0], number)
    return list(found.values())[:1000]


class OfficialPairs(Pairs):
    """{split}_imgs.tsv (`id <tab> base64`, standard or URL-safe) and {split}_texts.jsonl (`text_id`, `text`,
    `image_ids`), read as they are. Pictures and captions are reached by byte offset, through an index that is
    kept in the cache folder and mapped from there: a set of any size opens at once and costs no memory."""

    def __init__(self, folder: str, split: str, answers: bool = True):
        self.opened = folder, split, answers
        self.path = os.path.join(folder, f"{split}_imgs.tsv")
        self.list_path = os.path.join(folder, f"{split}_texts.jsonl")
        if not os.path.isfile(self.list_path):
            raise DataError(f"{self.list_path}: not there; expected a line a caption, "
                            "JSON objects with text_id, text, image_ids")
        self.stamp, self.list_stamp = stamp(self.path), stamp(self.list_path)
        self.images = kept(
            f"ids, lines, offsets of {os.path.abspath(self.path)} {self.stamp}", lambda: tsv_index(self.path))
        self.lines = kept(
            f"texts of {os.path.abspath(self.list_path)} {self.list_stamp} {os.path.abspath(self.path)} "
            f"{self.stamp}", lambda: texts_index(self.list_path, self.path, self.images["ids"]))
        self.image_count = len(self.images["offsets"])
        self.positives = torch.from_numpy(self.lines["positives"])
        if answers and not len(self.positives):
            raise DataError(f"{self.list_path}: no caption has any image_ids, "
                            "so there is nothing to learn or to measure recall on")

    def __reduce__(self):
        return OfficialPairs, self.opened  # to another process: mapped there, not sent

    def image_id(self, row: int) -> str:
        return self.images["ids"][row].decode("utf-8", "replace")

    def text_id(self, row: int):
        return self.line(row)["text_id"]

    @functools.cached_property
    def texts(self) -> list[str]:
        return [line["text"] for _, line in read_jsonl(self.list_path, ("text_id", "text"))]

    def line(self, row: int) -> dict:
        """What the list says of caption number `row`."""
        line = read_at(self.list_path, self.list_stamp, int(self.lines["offsets"][row]))
        return parse_json(line, ("text_id", "text"), self.place_of_text(row))

    def place_of_text(self, row: int) -> str:
        return f"{self.list_path} line {self.lines['lines'][row]}"

    def text(self, row: int) -> str:
        return as_text(self.line(row)["text"], self.place_of_text(row))

    def picture(self, row: int) -> bytes:
        encoded = read_at(self.path, self.stamp, int(self.images["offsets"][row])).partition(b"\t")[2]
        return from_base64(encoded.partition(b"\t")[0], self.place(row))

    def place(self, row: int) -> str:
        return f"{self.path} line {self.images['lines'][row]} (image id {self.image_id(row)})"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.stamp}".encode() + self.images["ids"].tobytes()
                              + self.images["offsets"].tobytes()).hexdigest()


def tsv_index(path: str) -> dict[str, np.ndarray]:
    """-> ids [n] (bytes), line numbers [n] and byte offsets [n] of a TSV's pictures."""
    lines, offsets = {}, []
    for number, start, line in lines_of(path):
        image_id, tab, _ = line[: MAX_ID + 1].partition(b"\t")
        shown = image_id[:40].decode("utf-8", "replace")
        if not tab:
            raise DataError(f"{path} line {number}: one column, or an id of more than {MAX_ID} bytes; "
                            f"expected two, `id <tab> base64`, got {shown!r}")
        if image_id in lines:
            raise DataError(
                f"{path} line {number}: image id {shown} again, first seen on line {lines[image_id]}")
        lines[image_id] = number
        offsets.append(start)
    if not lines:
        raise DataError(f"{path}: empty; expected a line a picture, `id <tab> base64`")
    columns = {"ids": list(lines), "lines": list(lines.values()), "offsets": offsets}
    return {name: np.array(column) for name, column in columns.items()}


def texts_index(path: str, tsv_path: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """-> line numbers [m] and byte offsets [m] of a list's captions, positives [P, 2]."""
    row_of = {image_id.decode("utf-8", "replace"): row for row, image_id in enumerate(ids.tolist())}
    numbers, offsets, positives = [], [], []
    for (number, start, _), (where, line) in zip(lines_of(path), read_jsonl(path, ("text_id", "text"))):
        image_ids = line.get("image_ids", [])
        if not isinstance(image_ids, list):
            raise DataError(f"{where}: image_ids is {image_ids!r}; expected a list of ids")
        for image_id in image_ids:
            if str(image_id) not in row_of:
                raise DataError(
                    f"{where}: image id {image_id} is not in {tsv_path}; add the picture or drop the id")
            positives.append((len(numbers), row_of[str(image_id)]))
        numbers.append(number)
        offsets.append(start)
    positives = np.array(positives, dtype=np.int64).reshape(-1, 2)
    return {"lines": np.array(numbers), "offsets": np.array(offsets), "positives": positives}


class FolderPairs(Pairs):
    """A folder of pictures and one list of captions: JSON lines or CSV with a column for the picture (a path
    in the folder) and one for the text, by any of the names above."""

    def __init__(self, folder: str, list_name: str):
        self.folder, path = folder, os.path.join(folder, list_name)
        lines = (read_jsonl if path.endswith(".jsonl") else read_csv)(path, (PICTURE_COLUMNS, TEXT_COLUMNS))
        self.names, self.texts, self.where, positives, missing = [], [], [], [], []
        row_of, text_of = {}, {}
        for where, line in lines:
            name, text = (next(line[key] for key in keys if key in line)
                          for keys in (PICTURE_COLUMNS, TEXT_COLUMNS))
            if not isinstance(name, str) or not name:
                raise DataError(f"{where}: image is {name!r}; expected the path of a picture in {folder}")
            if name not in row_of:
                if not os.path.isfile(os.path.join(folder, name)):
                    if "dir" in line:  # Wukong lists what could be downloaded once
                        missing.append(where)
                        continue
                    raise DataError(f"{where}: there is no picture {name} in {folder}")
                row_of[name] = len(self.names)
                self.names.append(name)
            # lines with one text_id are one caption of several pictures
            key = str(line["text_id"]) if "text_id" in line else (where,)
            if key not in text_of:
                text_of[key] = len(self.texts)
                self.texts.append(text)
                self.where.append(where)
            positives.append((text_of[key], row_of[name]))
        if missing:
            print(f"{missing[0]}: its picture is not in {folder}, nor are those of {len(missing) - 1:,} more "
                  "lines; these are left out")
        if not positives:
            raise DataError(f"{path}: empty; expected a line with a picture and its text each")
        self.image_count = len(self.names)
        self.positives = torch.tensor(positives)

    def text(self, row: int) -> str:
        return as_text(self.texts[row], self.where[row])

    def picture(self, row: int) -> bytes:
        return read_picture(self.place(row))

    def place(self, row: int) -> str:
        return os.path.join(self.folder, self.names[row])

    def fingerprint(self) -> str:
        stamps = [stamp(self.place(row)) for row in range(self.image_count)]
        return hashlib.sha256(json.dumps([self.names, stamps]).encode()).hexdigest()


class JoinedPairs(Pairs):
    """Several sources as one: the first's pairs, then the second's ..."""

    def __init__(self, parts: list[Pairs]):
        self.parts, self.window = parts, min(part.window for part in parts)
        self.pair_starts = [0, *itertools.accumulate(map(len, parts))]
        self.image_starts = [0, *itertools.accumulate(part.image_count for part in parts)]
        self.image_count = self.image_starts[-1]

    def __len__(self) -> int:
        return self.pair_starts[-1]

    def part_of_pair(self, i: int) -> tuple[int, int]:
        """-> (number of a part, number within it) of a training pair."""
        part = bisect.bisect_right(self.pair_starts, i) - 1
        return part, i - self.pair_starts[part]

    def part_of_image(self, row: int) -> tuple[Pairs, int]:
        part = bisect.bisect_right(self.image_starts, row) - 1
        return self.parts[part], row - self.image_starts[part]

    def pair(self, i: int, size: int = 0) -> tuple[Image.Image, str]:
        part, i = self.part_of_pair(i)
        return self.parts[part].pair(i, size)

    def image_number(self, i: int) -> int:
        part, i = self.part_of_pair(i)
        return self.image_starts[part] + self.parts[part].image_number(i)

    def caption(self, i: int) -> str:
        part, i = self.part_of_pair(i)
        return self.parts[part].caption(i)

    def image(self, row: int, size: int = 0) -> Image.Image:
        part, row = self.part_of_image(row)
        return part.image(row, size)

    def picture(self, row: int) -> bytes:
        part, row = self.part_of_image(row)
        return part.picture(row)

    def place(self, row: int) -> str:
        part, row = self.part_of_image(row)
        return part.place(row)

    @functools.cached_property
    def texts(self) -> list[str]:
        return [text for part in self.parts for text in part.texts]

    def text(self, row: int) -> str:
        for part in self.parts:
            if row < len(part.texts):
                return part.text(row)
            row -= len(part.texts)
        raise IndexError(row)

    @functools.cached_property
    def positives(self) -> torch.LongTensor:
        text_starts = itertools.accumulate((len(part.texts) for part in self.parts), initial=0)
        return torch.cat([part.positives + torch.tensor([texts, images]) for part, texts, images in
                          zip(self.parts, text_starts, self.image_starts)])

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def will_need(self, start: int, stop: int):
        for part, first, end in zip(self.parts, self.pair_starts, self.pair_starts[1:]):
            if start < end and first < stop:
                part.will_need(max(start, first) - first, min(stop, end) - first)


def from_base64(encoded: bytes, where: str) -> bytes:
    """Standard or URL-safe base64, with or without padding. DataError if it is neither."""
    encoded = encoded.rstrip(b"\r\n=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: broken base64 ({error}); write the picture again") from None
