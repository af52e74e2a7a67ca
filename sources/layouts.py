"""
The layouts that a data set may have on disk, and how each becomes pairs of picture and caption.

    open_pairs("path/to/MUGE", "train")   the pairs of a split

A source is one of these; what is there tells which:
    folder with {split}_imgs.tsv + {split}_texts.jsonl   the official layout (MUGE, Flickr30K-CN, COCO-CN)
    folder with {split}.jsonl or {split}.csv             lines that each name a picture in it and its text
    folder with tar shards, or a pattern {000..999}.tar  WebDataset, as img2dataset writes it
    muge, flickr30k-cn, coco-cn                          downloaded once (sources/named.py)
    scenes-en, scenes-zh, scenes-zh-6000                 drawn in memory, so many (sources/scenes.py)
    several of these, with commas between                read as one

docs/data.md describes their lines. Lines of a list with the same text_id are one text of several pictures.
For a layout of your own, write a subclass of Pairs (sources/pairs.py) and add it to `find` and `open_pairs`.
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
import shlex

import numpy as np
import torch

from sources import scenes
from sources.named import CLASSES, PAIRS, at_hand
from sources.pairs import (
    LIST_KEYS, DataError, Pairs, as_text, check_unchanged, kept, lines_of, parse_json, read_at, read_csv,
    read_jsonl, read_picture, require, stamp)
from sources.shards import TarPairs, shards_of, split_outside_braces

FILES = (("official", "{}_imgs.tsv", "{}_texts.jsonl"), ("folder", "{}.jsonl"), ("folder", "{}.csv"))
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
            several = [one for one in several if find(one, split)[0] or not splits_of(one)] or several
        return JoinedPairs([open_pairs(one, split) for one in several])
    if layout == "scenes":
        _, world, *count = source.split("-")
        return scenes.ScenePairs(world, split, int(count[0]) if count else 1_000_000)
    if layout == "official":
        return OfficialPairs(*files, answers)
    if layout == "folder":
        return FolderPairs(*files)
    if layout == "shards":
        return TarPairs(files)
    if os.path.isfile(source):
        raise DataError(f"{source}: a file; name the folder that it is in, {os.path.dirname(source) or '.'}")
    if source.lower() in CLASSES:
        raise DataError(f"{source}: classes, not pairs; expected `python eval.py zeroshot --data {source}`")
    if there := ", ".join(splits_of(source)):
        cure = (f"; `python -m tools.curate split {shlex.quote(source)} NEW` makes a set that has one, and "
                "train.py takes another set as --valid-data") if split == "valid" else ""
        raise DataError(f"{source}: no split {split!r} in it, only {there}{cure}")
    hint = "no pairs in it" if os.path.isdir(source) else "no such folder"
    hint += "; quoted, ~ is not the home folder" if source.startswith("~") else ""
    hint += "; folders are separated by /" if "\\" in source else ""
    raise DataError(f"{source}: {hint}; expected a folder with {split}_imgs.tsv and {split}_texts.jsonl, "
                    f"{split}.jsonl, {split}.csv or {split}-*.tar, or tar shards, scenes-en or scenes-zh, or "
                    f"one of {', '.join(PAIRS)}")


def find(source: str, split: str) -> tuple[str, list[str]]:
    """-> (joined, scenes, official, folder or shards, or "" if the split is not there; its files). A file
    that the layout needs is among them even if it is missing."""
    if len(split_outside_braces(source)) > 1 and not os.path.exists(source):
        return "joined", []
    if re.fullmatch(r"scenes-(en|zh)(-[1-9]\d*)?", source):
        return "scenes", []
    source = at_hand(source)
    for layout, *names in FILES:
        files = [os.path.join(source, name.format(split)) for name in names]
        if any(map(os.path.isfile, files)):  # captions that have lost their pictures: the reader says so
            return layout, files
    shards = shards_of(source, split)
    return ("shards" if shards else ""), shards


def splits_of(source: str) -> list[str]:
    """The splits of a source: train, valid and test, then others of the official layout, as far as they are
    there, of one source or several. A pattern of shards has no splits: all of it is train."""
    if find(source, "train")[0] == "joined":
        return list(dict.fromkeys(split for one in split_outside_braces(source) for split in splits_of(one)))
    if source.endswith(".tar"):
        return ["train"]
    source = at_hand(source)
    names = sorted(os.listdir(source)) if os.path.isdir(source) else []
    found = (re.fullmatch(r"(.+)_(imgs\.tsv|texts\.jsonl)", name) for name in names)
    splits = dict.fromkeys(("train", "valid", "test", *(match[1] for match in found if match)))
    return [split for split in splits if find(source, split)[0]]


# ------------------------------------------------------------------------------------------------------------
# the official layout


class OfficialPairs(Pairs):
    """{split}_imgs.tsv and {split}_texts.jsonl, read where they lie. Pictures and captions are reached by
    byte offset, through an index that is kept in the cache folder and mapped from there: a set of any size
    opens at once and costs no memory."""

    def __init__(self, tsv: str, jsonl: str, answers: bool = True):
        self.tsv, self.jsonl, self.answers = tsv, jsonl, answers
        for path in (tsv, jsonl):
            if not os.path.isfile(path):
                raise DataError(f"{path}: not there; expected a TSV of pictures (`id <tab> base64`) and a "
                                "JSONL of captions (objects with text_id, text, image_ids)")
        self.stamps = {path: stamp(path) for path in (tsv, jsonl)}
        places = " ".join(f"{os.path.abspath(path)} {self.stamps[path]}" for path in (tsv, jsonl))
        self.index = kept(f"pictures and captions of {places}", lambda: index(tsv, jsonl))
        self.image_count = len(self.index["ids"])
        self.positives = torch.from_numpy(self.index["positives"])
        if answers and not len(self.positives):
            keys = [*next(read_jsonl(jsonl), ("", "", ()))[2]]
            raise DataError(f"{jsonl}: no caption has any image_ids, so there is nothing to learn or to "
                            f"measure recall on" + f"; its first line has {keys}" * ("image_ids" not in keys))

    def __reduce__(self):  # another process maps the index, too; it is not sent
        return OfficialPairs, (self.tsv, self.jsonl, self.answers)

    @functools.cached_property
    def texts(self) -> list[str]:
        return [line["text"] for _, _, line in read_jsonl(self.jsonl)]

    def line(self, row: int) -> tuple[dict, str]:
        """What the list says of caption number `row`, and where."""
        where = f"{self.jsonl} line {self.index['text_lines'][row]}"
        line = read_at(self.jsonl, self.stamps[self.jsonl], int(self.index["text_offsets"][row]))
        return parse_json(line, where), where

    def text(self, row: int) -> str:
        line, where = self.line(row)
        return as_text(line["text"], where)

    def text_id(self, row: int):
        return self.line(row)[0]["text_id"]

    def picture(self, row: int) -> bytes:
        line = read_at(self.tsv, self.stamps[self.tsv], int(self.index["offsets"][row]))
        return from_base64(line.split(b"\t")[1], self.place(row))

    def image_id(self, row: int) -> int | str:
        """As a number if it is one, which is how the official lists and scripts have it."""
        name = self.index["ids"][row].decode("utf-8", "replace")
        return int(name) if name.isdecimal() and str(int(name)) == name else name

    def place(self, row: int) -> str:
        return f"{self.tsv} line {self.index['lines'][row]} (image id {self.image_id(row)})"

    def caption_fingerprint(self) -> str:
        with open(self.jsonl, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.stamps[self.tsv]}".encode() + self.index["ids"].tobytes()
                              + self.index["offsets"].tobytes()).hexdigest()


def index(tsv: str, jsonl: str) -> dict[str, np.ndarray]:
    """Ids [n] (bytes), line numbers [n] and byte offsets [n] of the pictures, line numbers [m] and byte
    offsets [m] of the captions, and positives [P, 2]."""
    lines, offsets = {}, []
    for number, offset, line in lines_of(tsv):
        if not line.strip():
            continue
        image_id = tsv_id(line, f"{tsv} line {number}")
        if image_id in lines:
            raise DataError(f"{tsv} line {number}: image id {image_id.decode('utf-8', 'replace')} again, "
                            f"first seen on line {lines[image_id]}; drop one of them")
        lines[image_id] = number
        offsets.append(offset)
    if not lines:
        raise DataError(f"{tsv}: empty; expected a line `id <tab> base64` for each picture")
    row_of = {image_id.decode("utf-8", "replace"): row for row, image_id in enumerate(lines)}
    text_lines, text_offsets, positives = [], [], []
    for number, offset, line in read_jsonl(jsonl):
        where = f"{jsonl} line {number}"
        require(line, TEXT_KEYS, where)
        for image_id in image_ids_of(line, where):
            if image_id not in row_of:
                raise DataError(
                    f"{where}: image id {image_id} is not in {tsv}; add the picture or drop the id")
            positives.append((len(text_lines), row_of[image_id]))
        text_lines.append(number)
        text_offsets.append(offset)
    columns = {"ids": list(lines), "lines": list(lines.values()), "offsets": offsets,
               "text_lines": text_lines, "text_offsets": text_offsets,
               "positives": np.array(positives, np.int64).reshape(-1, 2)}
    return {name: np.array(column) for name, column in columns.items()}


def tsv_id(line: bytes, where: str) -> bytes:
    """The id of a TSV's picture. DataError if there is none, or no tab ends it."""
    image_id, tab, _ = line[: MAX_ID + 1].partition(b"\t")
    if not tab or not image_id.strip():
        raise DataError(f"{where}: expected two columns, `id <tab> base64`, with an id of 1 to {MAX_ID} "
                        f"bytes; got {image_id[:40].decode('utf-8', 'replace')!r}", "no id")
    return image_id


def from_base64(encoded: bytes, where: str) -> bytes:
    """Standard or URL-safe base64, with or without padding. DataError if it is neither."""
    encoded = encoded.rstrip(b"\r\n=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(
            f"{where}: broken base64 ({error}), which begins with {encoded[:12].decode(errors='replace')!r}; "
            "write the picture again", "broken base64") from None


def image_ids_of(line: dict, where: str) -> list[str]:
    """The ids of a caption's pictures, as the TSV writes them. DataError if they are no list."""
    image_ids = line.get("image_ids", [])
    if not isinstance(image_ids, list):
        raise DataError(f"{where}: image_ids is {image_ids!r:.40}; expected a list of ids, in brackets",
                        "image_ids not a list")
    return list(map(str, image_ids))


# ------------------------------------------------------------------------------------------------------------
# a list and its pictures


class FolderPairs(Pairs):
    """A folder of pictures and one list of captions, JSONL or CSV, by any of the column names above."""

    def __init__(self, path: str):
        self.folder, self.path, self.stamp = os.path.dirname(path), path, stamp(path)
        row_of, captions, positives, missing = {}, {}, [], []
        for number, _, line in (read_csv if path.endswith(".csv") else read_jsonl)(path):
            if isinstance(line, DataError):
                raise line
            where = f"{path} line {number}"
            name, text = require(line, LIST_KEYS, where)
            if "dir" in line and not os.path.isfile(os.path.join(self.folder, str(name))):
                missing.append(where)  # Wukong lists what could be downloaded once
                continue
            if not isinstance(name, str) or name not in row_of:
                picture_path(self.folder, name, where)
            # lines with one text_id are one caption of several pictures
            key = str(line["text_id"]) if "text_id" in line else (where,)
            caption = captions.setdefault(key, (len(captions), text, where))
            positives.append((caption[0], row_of.setdefault(name, len(row_of))))
        if missing:
            print(f"{missing[0]}: its picture is not in {self.folder}, nor are those of {len(missing) - 1:,} "
                  "more lines; these are left out")
        if not positives:
            raise DataError(f"{path}: empty; expected lines that each have a picture and its text")
        self.names, self.image_count = list(row_of), len(row_of)
        _, self.captions, self.where = map(list, zip(*captions.values()))
        self.positives = torch.tensor(positives)

    @property
    def texts(self) -> list[str]:
        check_unchanged(self.path, self.stamp)
        return self.captions

    def text(self, row: int) -> str:
        return as_text(self.texts[row], self.where[row])

    def picture(self, row: int) -> bytes:
        return read_picture(self.place(row))

    def place(self, row: int) -> str:
        return os.path.join(self.folder, self.names[row])

    def image_id(self, row: int) -> str:
        return self.names[row]

    def fingerprint(self) -> str:
        stamps = [stamp(self.place(row)) for row in range(self.image_count)]
        return hashlib.sha256(json.dumps([self.names, stamps]).encode()).hexdigest()


def picture_path(folder: str, name, where: str) -> str:
    """The path of a list's picture. DataError if `name` is not text, or not that of a file in the folder."""
    if not isinstance(name, str):
        raise DataError(f"{where}: the picture is {name!r}, not text; write its path in {folder}", "not text")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        hint = "name it by its path there, with /" if "\\" in name else "put it there or drop the line"
        raise DataError(f"{where}: there is no picture {name} in {folder}; {hint}", "unreadable file")
    return path


# ------------------------------------------------------------------------------------------------------------
# several sources


def locate(starts: list[int], number: int) -> tuple[int, int]:
    """-> (the part that holds this number, the number within it)."""
    part = bisect.bisect_right(starts, number) - 1
    return part, number - starts[part]


def of_part(starts: str, name: str):
    """A method of JoinedPairs that calls the method of this name of the part that holds a number."""
    def method(self, number: int, *more):
        part, number = locate(getattr(self, starts), number)
        return getattr(self.parts[part], name)(number, *more)
    return method


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

    caption, pair = of_part("pair_starts", "caption"), of_part("pair_starts", "pair")
    image, picture = of_part("image_starts", "image"), of_part("image_starts", "picture")
    place, image_id = of_part("image_starts", "place"), of_part("image_starts", "image_id")
    text = of_part("text_starts", "text")

    @functools.cached_property
    def texts(self) -> list[str]:
        return [text for part in self.parts for text in part.texts]

    @functools.cached_property
    def positives(self) -> torch.LongTensor:
        return torch.cat([part.positives + torch.tensor([texts, images]) for part, texts, images in
                          zip(self.parts, self.text_starts, self.image_starts)])

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def caption_fingerprint(self) -> str:
        return " ".join(part.caption_fingerprint() for part in self.parts)

    def will_need(self, start: int, stop: int):
        for part, first, end in zip(self.parts, self.pair_starts, self.pair_starts[1:]):
            if start < end and first < stop:
                part.will_need(max(start, first) - first, min(stop, end) - first)
