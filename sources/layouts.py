"""
The layouts that a data set may have on disk, and how each becomes pairs of picture and caption.

    open_pairs("path/to/MUGE", "train")   the pairs of a split

A source is one of these; what is there tells which:
    folder with {split}_imgs.tsv + {split}_texts.jsonl   the official layout (MUGE, Flickr30K-CN, COCO-CN)
    folder with {split}.jsonl or {split}.csv             lines that each name a picture in it and its text
    folder with tar shards, or a pattern {000..999}.tar  WebDataset, as img2dataset writes it
    scenes-en, scenes-zh                                 drawn in memory (sources/scenes.py)
    several of these, with commas between                read as one

A line of the official TSV is `id <tab> base64`, a line of its JSONL an object with text_id, text and the
image_ids that belong to the text. A line of a list has the path of a picture and a text, under any of the
column names in sources/pairs.py; lines with the same text_id are one text of several pictures. Shards hold
KEY.jpg with KEY.txt or KEY.json (sources/shards.py). For a layout of your own, write a subclass of Pairs
(sources/pairs.py) and add it to `find` and `open_pairs`.
"""

import base64
import binascii
import bisect
import functools
import hashlib
import itertools
import json
import os
import re

import numpy as np
import torch
from PIL import Image

from sources import scenes
from sources.pairs import (
    LIST_KEYS, DataError, Pairs, as_text, check_length, kept, lines_of, parse_json, read_at, read_csv,
    read_jsonl, read_picture, require, stamp, strict)
from sources.shards import TarPairs, shards_of, split_outside_braces

FILES = {  # layout -> its files, the first of which tells that it is there
    "official": ("{}_imgs.tsv", "{}_texts.jsonl"), "jsonl": ("{}.jsonl",), "csv": ("{}.csv",)}
TEXT_KEYS = (("text_id",), ("text",))  # of a line of the official JSONL, beside image_ids
MAX_ID = 256  # bytes; ids are kept in an array as wide as the longest

# ------------------------------------------------------------------------------------------------------------
# which layout is there


def open_pairs(source: str, split: str, answers: bool = True) -> Pairs:
    """The split of a source, in any layout. DataError names what is missing. With answers=False, the official
    layout may come without image_ids, as MUGE's test split does."""
    layout, files = find(source, split)
    if layout == "joined":
        several = split_outside_braces(source)
        if split != "train":  # all must have pairs to train on; to measure on, those that have them
            several = [one for one in several if layout_of(one, split)] or several
        return JoinedPairs([open_pairs(one, split) for one in several])
    if layout == "scenes":
        return ScenePairs(source.removeprefix("scenes-"), split)
    if layout == "official":
        return OfficialPairs(*files, answers)
    if layout in ("jsonl", "csv"):
        return FolderPairs(*files)
    if layout == "shards":
        return TarPairs(files)
    if not os.path.isdir(source):
        raise DataError(
            f"{source}: no such folder; expected a folder of pairs, tar shards, scenes-en or scenes-zh")
    raise DataError(f"{source}: no split {split!r} in it; expected {split}_imgs.tsv with "
                    f"{split}_texts.jsonl, or {split}.jsonl or {split}.csv, or {split}-*.tar")


def find(source: str, split: str) -> tuple[str, list[str]]:
    """-> (joined, scenes, official, jsonl, csv or shards, or "" if the split is not there; its files). A file
    that the layout needs is among them even if it is missing."""
    if len(split_outside_braces(source)) > 1 and not os.path.exists(source):
        return "joined", []
    if source in ("scenes-en", "scenes-zh"):
        return "scenes", []
    for layout, names in FILES.items():
        files = [os.path.join(source, name.format(split)) for name in names]
        if os.path.isfile(files[0]):
            return layout, files
    if shards := shards_of(source, split):
        return "shards", shards
    files = [os.path.join(source, name.format(split)) for name in FILES["official"]]
    # captions that have lost their pictures: opening them says what is missing
    return ("official", files) if os.path.isfile(files[1]) else ("", [])


def layout_of(source: str, split: str) -> str:
    """The name of the layout that `find` finds."""
    return find(source, split)[0]


def splits_of(source: str) -> list[str]:
    """The splits of a source: train, valid and test, then others of the official layout, as far as they are
    there. A pattern of shards has no splits: all of it is train."""
    if source.endswith(".tar"):
        return ["train"]
    names = sorted(os.listdir(source)) if os.path.isdir(source) else []
    found = (re.fullmatch(r"(.+)_(imgs\.tsv|texts\.jsonl)", name) for name in names)
    splits = dict.fromkeys(("train", "valid", "test", *(match[1] for match in found if match)))
    return [split for split in splits if layout_of(source, split)]


# ------------------------------------------------------------------------------------------------------------
# drawn scenes


class ScenePairs(Pairs):
    """sources/scenes.py: a million training scenes, drawn when asked for, and a thousand for validation, no
    two with the same caption."""

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


@functools.cache  # training opens the set again for each of its stages
def distinct(world: str, split: str) -> list[int]:
    """The numbers of 1,000 scenes, no two with the same caption."""
    found = {}
    for number in range(2000):
        found.setdefault(scenes.scene(world, split, number)[0], number)
    return list(found.values())[:1000]


# ------------------------------------------------------------------------------------------------------------
# the official layout


class OfficialPairs(Pairs):
    """{split}_imgs.tsv and {split}_texts.jsonl, read where they lie. Pictures and captions are reached by
    byte offset, through an index that is kept in the cache folder and mapped from there: a set of any size
    opens at once and costs no memory."""

    def __init__(self, tsv: str, jsonl: str, answers: bool = True):
        self.path, self.list_path, self.answers = tsv, jsonl, answers
        for path in (tsv, jsonl):
            if not os.path.isfile(path):
                raise DataError(f"{path}: not there; expected a TSV of pictures (`id <tab> base64`) and a "
                                "JSONL of captions (objects with text_id, text, image_ids)")
        self.stamp, self.list_stamp = stamp(tsv), stamp(jsonl)
        self.images = kept(
            f"ids, lines, offsets of {os.path.abspath(tsv)} {self.stamp}", lambda: tsv_index(tsv))
        self.lines = kept(
            f"texts of {os.path.abspath(jsonl)} {self.list_stamp} {os.path.abspath(tsv)} {self.stamp}",
            lambda: texts_index(jsonl, tsv, self.images["ids"]))
        self.image_count = len(self.images["offsets"])
        self.positives = torch.from_numpy(self.lines["positives"])
        if answers and not len(self.positives):
            raise DataError(f"{jsonl}: no caption has any image_ids, "
                            "so there is nothing to learn or to measure recall on")

    def __reduce__(self):  # another process maps the index, too; it is not sent
        return OfficialPairs, (self.path, self.list_path, self.answers)

    def image_id(self, row: int) -> str:
        return self.images["ids"][row].decode("utf-8", "replace")

    def text_id(self, row: int):
        return self.line(row)["text_id"]

    @functools.cached_property
    def texts(self) -> list[str]:
        return [line["text"] for _, _, line in strict(read_jsonl(self.list_path))]

    def line(self, row: int) -> dict:
        """What the list says of caption number `row`."""
        line = read_at(self.list_path, self.list_stamp, int(self.lines["offsets"][row]))
        return parse_json(line, self.place_of_text(row))

    def place_of_text(self, row: int) -> str:
        return f"{self.list_path} line {self.lines['lines'][row]}"

    def text(self, row: int) -> str:
        return as_text(self.line(row)["text"], self.place_of_text(row))

    def picture(self, row: int) -> bytes:
        line = read_at(self.path, self.stamp, int(self.images["offsets"][row]))
        return tsv_picture(line, self.place(row))

    def place(self, row: int) -> str:
        return f"{self.path} line {self.images['lines'][row]} (image id {self.image_id(row)})"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.stamp}".encode() + self.images["ids"].tobytes()
                              + self.images["offsets"].tobytes()).hexdigest()


def tsv_index(path: str) -> dict[str, np.ndarray]:
    """The ids [n] (bytes), line numbers [n] and byte offsets [n] of a TSV's pictures."""
    lines, offsets = {}, []
    for number, start, line in lines_of(path):
        if not line.strip():
            continue
        image_id = tsv_id(line, f"{path} line {number}")
        if image_id in lines:
            raise DataError(f"{path} line {number}: image id {image_id.decode('utf-8', 'replace')} again, "
                            f"first seen on line {lines[image_id]}; drop one of them")
        lines[image_id] = number
        offsets.append(start)
    if not lines:
        raise DataError(f"{path}: empty; expected a line `id <tab> base64` for each picture")
    columns = {"ids": list(lines), "lines": list(lines.values()), "offsets": offsets}
    return {name: np.array(column) for name, column in columns.items()}


def tsv_id(line: bytes, where: str) -> bytes:
    """The id of a TSV's picture. DataError if no tab ends it, or if the line is too long."""
    check_length(line, where)
    image_id, tab, _ = line[: MAX_ID + 1].partition(b"\t")
    if not tab:
        raise DataError(f"{where}: one column, or an id of more than {MAX_ID} bytes; expected two, "
                        f"`id <tab> base64`, got {image_id[:40].decode('utf-8', 'replace')!r}", "one column")
    return image_id


def tsv_picture(line: bytes, where: str) -> bytes:
    """The undecoded bytes of a TSV's picture."""
    return from_base64(line.partition(b"\t")[2].partition(b"\t")[0], where)


def from_base64(encoded: bytes, where: str) -> bytes:
    """Standard or URL-safe base64, with or without padding. DataError if it is neither."""
    encoded = encoded.rstrip(b"\r\n=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(
            f"{where}: broken base64 ({error}); write the picture again", "broken base64") from None


def texts_index(path: str, tsv_path: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The line numbers [m] and byte offsets [m] of a list's captions, and positives [P, 2]."""
    row_of = {image_id.decode("utf-8", "replace"): row for row, image_id in enumerate(ids.tolist())}
    numbers, offsets, positives = [], [], []
    for number, start, line in strict(read_jsonl(path)):
        where = f"{path} line {number}"
        require(line, TEXT_KEYS, where)
        for image_id in image_ids_of(line, where):
            if image_id not in row_of:
                raise DataError(
                    f"{where}: image id {image_id} is not in {tsv_path}; add the picture or drop the id")
            positives.append((len(numbers), row_of[image_id]))
        numbers.append(number)
        offsets.append(start)
    positives = np.array(positives, dtype=np.int64).reshape(-1, 2)
    return {"lines": np.array(numbers), "offsets": np.array(offsets), "positives": positives}


def image_ids_of(line: dict, where: str) -> list[str]:
    """The ids of a caption's pictures, as the TSV writes them. DataError if they are no list."""
    image_ids = line.get("image_ids", [])
    if not isinstance(image_ids, list):
        raise DataError(f"{where}: image_ids is a {type(image_ids).__name__}; expected a list of ids",
                        "image_ids not a list")
    return list(map(str, image_ids))


# ------------------------------------------------------------------------------------------------------------
# a list and its pictures


class FolderPairs(Pairs):
    """A folder of pictures and one list of captions, JSONL or CSV, by any of the column names above."""

    def __init__(self, path: str):
        self.folder = os.path.dirname(path)
        self.names, self.texts, self.where, positives, missing = [], [], [], [], []
        row_of, text_of = {}, {}
        for number, _, line in strict(read_list(path)):
            where = f"{path} line {number}"
            name, text = require(line, LIST_KEYS, where)
            if not isinstance(name, str):
                raise DataError(
                    f"{where}: image is {name!r}; expected the path of a picture in {self.folder}")
            if name not in row_of:
                if not os.path.isfile(os.path.join(self.folder, name)):
                    if "dir" in line:  # Wukong lists what could be downloaded once
                        missing.append(where)
                        continue
                    raise DataError(f"{where}: there is no picture {name} in {self.folder}; put it there or "
                                    "drop the line")
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
            print(f"{missing[0]}: its picture is not in {self.folder}, nor are those of {len(missing) - 1:,} "
                  "more lines; these are left out")
        if not positives:
            raise DataError(f"{path}: empty; expected lines that each have a picture and its text")
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


def read_list(path: str):
    """The rows of a JSONL or CSV: `read_jsonl` or `read_csv`."""
    return read_csv(path) if path.endswith(".csv") else read_jsonl(path)


# ------------------------------------------------------------------------------------------------------------
# several sources


class JoinedPairs(Pairs):
    """Several sources as one: the first's pairs, then the second's, and so on. The starts are the numbers at
    which the pairs, pictures and captions of each part begin."""

    def __init__(self, parts: list[Pairs]):
        self.parts, self.window = parts, min(part.window for part in parts)
        self.pair_starts = [0, *itertools.accumulate(map(len, parts))]
        self.image_starts = [0, *itertools.accumulate(part.image_count for part in parts)]
        self.image_count = self.image_starts[-1]

    @functools.cached_property
    def text_starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(part.texts) for part in self.parts)]

    def __len__(self) -> int:
        return self.pair_starts[-1]

    def image_number(self, i: int) -> int:
        part, i = locate(self.pair_starts, i)
        return self.image_starts[part] + self.parts[part].image_number(i)

    def caption(self, i: int) -> str:
        part, i = locate(self.pair_starts, i)
        return self.parts[part].caption(i)

    def pair(self, i: int, size: int = 0) -> tuple[Image.Image, str]:
        part, i = locate(self.pair_starts, i)
        return self.parts[part].pair(i, size)

    def image(self, row: int, size: int = 0) -> Image.Image:
        part, row = locate(self.image_starts, row)
        return self.parts[part].image(row, size)

    def picture(self, row: int) -> bytes:
        part, row = locate(self.image_starts, row)
        return self.parts[part].picture(row)

    def place(self, row: int) -> str:
        part, row = locate(self.image_starts, row)
        return self.parts[part].place(row)

    def text(self, row: int) -> str:
        part, row = locate(self.text_starts, row)
        return self.parts[part].text(row)

    @functools.cached_property
    def texts(self) -> list[str]:
        return [text for part in self.parts for text in part.texts]

    @functools.cached_property
    def positives(self) -> torch.LongTensor:
        return torch.cat([part.positives + torch.tensor([texts, images]) for part, texts, images in
                          zip(self.parts, self.text_starts, self.image_starts)])

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def will_need(self, start: int, stop: int):
        for part, first, end in zip(self.parts, self.pair_starts, self.pair_starts[1:]):
            if start < end and first < stop:
                part.will_need(max(start, first) - first, min(stop, end) - first)


def locate(starts: list[int], number: int) -> tuple[int, int]:
    """-> (the part that holds this number, the number within it)."""
    part = bisect.bisect_right(starts, number) - 1
    return part, number - starts[part]
