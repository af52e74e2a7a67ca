"""
Files to pairs of picture and caption, by number.

    open_pairs("path/to/MUGE", "train")   the pairs of a split

Sources, told by what is there, read as they are:
    folder with {split}_imgs.tsv + {split}_texts.jsonl   the official layout (MUGE, Flickr30K-CN, COCO-CN)
    folder with {split}.jsonl or {split}.csv             lines with "image" (a path in the folder) and "text"
    scenes-en, scenes-zh                                 drawn in memory (scenes.py)
Not here yet: WebDataset shards.
"""

import base64
import binascii
import csv
import hashlib
import io
import json
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

import scenes

CACHE = os.path.join(  # of the indices of TSV files
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "zhclip", "index")


class DataError(ValueError):
    """Data that is not what it should be: one line with the file, the line or key, what was expected and what
    to do."""


class Pairs:
    """A split of a data set. `texts` and pictures are numbered; `positives` [P, 2] says which belong
    together, a row (text, picture) each: several pictures a text and several texts a picture are both common.
    Training sees one row at a time, evaluation the whole relation."""

    texts: list[str]
    where: list[str]  # of each text: "path line n", for messages
    image_count: int
    positives: torch.LongTensor

    def image(self, row: int) -> Image.Image:
        """Picture number `row`. DataError if it cannot be decoded."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.positives)

    def pair(self, i: int) -> tuple[Image.Image, str]:
        """Training pair number i: (picture, caption)."""
        return self.image(self.image_number(i)), self.caption(i)

    def fingerprint(self) -> str:
        """Of the pictures: changes when one of them, its file's size or its time does."""
        raise NotImplementedError

    def image_number(self, i: int) -> int:
        """Which picture training pair number i has."""
        return int(self.positives[i, 1])

    def caption(self, i: int) -> str:
        """Which caption training pair number i has."""
        return self.text(int(self.positives[i, 0]))

    def text(self, row: int) -> str:
        """Caption number `row`. DataError if it is something else than text."""
        if not isinstance(self.texts[row], str):
            raise DataError(f"{self.where[row]}: the caption is {self.texts[row]!r}, not text")
        return self.texts[row]


def open_pairs(source: str, split: str) -> Pairs:
    """The split of a source, told by what is there (see the top of this file). DataError names what is
    missing."""
    if source in ("scenes-en", "scenes-zh"):
        return ScenePairs(source.removeprefix("scenes-"), split)
    if os.path.isfile(os.path.join(source, f"{split}_imgs.tsv")):
        return OfficialPairs(source, split)
    for kind in ("jsonl", "csv"):
        if os.path.isfile(os.path.join(source, f"{split}.{kind}")):
            return FolderPairs(source, f"{split}.{kind}")
    if not os.path.isdir(source):
        raise DataError(f"{source}: no such folder; expected a folder of pairs, scenes-en or scenes-zh")
    raise DataError(f"{source}: no split {split!r} in it; "
                    f"expected {split}_imgs.tsv with {split}_texts.jsonl, or {split}.jsonl or {split}.csv")


class ScenePairs(Pairs):
    """scenes.py: a million training scenes, drawn when asked for; a thousand for validation, no two the
    same."""

    def __init__(self, world: str, split: str):
        if split not in ("train", "valid"):
            raise DataError(f"scenes-{world}: no split {split!r}; expected train or valid")
        self.world, self.split = world, split
        self.numbers = range(1_000_000)
        self.texts, self.image_count, self.positives = [], 0, torch.empty(0, 2)  # training is not measured
        if split == "valid":
            distinct = {}
            for number in range(2000):
                distinct.setdefault(scenes.scene(world, split, number)[0], number)
            self.numbers = list(distinct.values())[:1000]
            self.pictures, self.texts = zip(*(scenes.pair(world, split, number) for number in self.numbers))
            self.image_count = len(self.numbers)
            self.positives = torch.arange(len(self.numbers))[:, None].expand(-1, 2)

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, row: int) -> Image.Image:
        return self.pictures[row]

    def pair(self, i: int) -> tuple[Image.Image, str]:
        return scenes.pair(self.world, self.split, self.numbers[i])

    def image_number(self, i: int) -> int:
        return i

    def caption(self, i: int) -> str:
        return scenes.captioned(self.world, self.split, self.numbers[i])[0]


class OfficialPairs(Pairs):
    """{split}_imgs.tsv (`id <tab> base64`, standard or URL-safe) and {split}_texts.jsonl (`text_id`, `text`,
    `image_ids`), read as they are. Pictures are reached by byte offset, so a file of any size costs no memory
    but its index."""

    def __init__(self, folder: str, split: str):
        self.path = os.path.join(folder, f"{split}_imgs.tsv")
        self.lines, self.offsets = tsv_index(self.path)
        self.image_ids, self.image_count = list(self.lines), len(self.lines)
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        self.texts, self.where, positives = [], [], []
        path = os.path.join(folder, f"{split}_texts.jsonl")
        for where, line in read_jsonl(path, ("text_id", "text")):
            image_ids = line.get("image_ids", [])
            if not isinstance(image_ids, list):
                raise DataError(f"{where}: image_ids is {image_ids!r}; expected a list of ids")
            for image_id in image_ids:
                if str(image_id) not in row_of:
                    raise DataError(
                        f"{where}: image id {image_id} is not in {self.path}; add the picture or drop the id")
                positives.append((len(self.texts), row_of[str(image_id)]))
            self.texts.append(line["text"])
            self.where.append(where)
        if not positives:
            raise DataError(f"{path}: no caption has any image_ids, "
                            "so there is nothing to learn or to measure recall on")
        self.positives = torch.tensor(positives)

    def image(self, row: int) -> Image.Image:
        image_id = self.image_ids[row]
        where = f"{self.path} line {self.lines[image_id]} (image id {image_id})"
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[row]))
            encoded = file.readline().rstrip(b"\r\n=").split(b"\t")[1]
            encoded = encoded.translate(bytes.maketrans(b"-_", b"+/"))
        try:
            picture = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
        except binascii.Error as error:
            raise DataError(f"{where}: broken base64 ({error}); write the picture again") from None
        return decode(picture, where)

    def fingerprint(self) -> str:
        status = os.stat(self.path)
        ids = "\n".join([*self.image_ids, f"{status.st_size} {status.st_mtime_ns}"])
        return hashlib.sha256(ids.encode() + self.offsets.tobytes()).hexdigest()


class FolderPairs(Pairs):
    """A folder of pictures and one list of captions: JSON lines or CSV with the columns image (a path in the
    folder) and text."""

    def __init__(self, folder: str, list_name: str):
        self.folder = folder
        path = os.path.join(folder, list_name)
        read = read_jsonl if path.endswith(".jsonl") else read_csv
        lines = read(path, ("image", "text"))
        self.names, self.texts, self.where, positives, row_of = [], [], [], [], {}
        for where, line in lines:
            name = line["image"]
            if not isinstance(name, str):
                raise DataError(f"{where}: image is {name!r}; expected the path of a picture in {folder}")
            if name not in row_of:
                row_of[name] = len(self.names)
                self.names.append(name)
                if not os.path.isfile(os.path.join(folder, name)):
                    raise DataError(f"{where}: there is no picture {name} in {folder}")
            positives.append((len(self.texts), row_of[name]))
            self.texts.append(line["text"])
            self.where.append(where)
        if not positives:
            raise DataError(f"{path}: empty; expected a line a pair")
        self.image_count = len(self.names)
        self.positives = torch.tensor(positives)

    def image(self, row: int) -> Image.Image:
        return open_image(os.path.join(self.folder, self.names[row]))

    def fingerprint(self) -> str:
        found = [os.stat(os.path.join(self.folder, name)) for name in self.names]
        stamps = [(status.st_size, status.st_mtime_ns) for status in found]
        return hashlib.sha256(json.dumps([self.names, stamps]).encode()).hexdigest()


def open_image(path: str) -> Image.Image:
    """The picture at `path`. DataError if it is gone or cannot be decoded."""
    try:
        with open(path, "rb") as file:
            return decode(file.read(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it back or drop its line") from None


def decode(picture: bytes, where: str) -> Image.Image:
    """Bytes of a JPEG, PNG, WebP ... -> image, fully decoded. DataError with its place if Pillow cannot."""
    try:
        image = Image.open(io.BytesIO(picture))
        image.load()
        return image
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a picture in any format that Pillow knows") from None
    # what Pillow's decoders raise on damaged files
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a picture that can be decoded ({error})") from None


def tsv_index(path: str) -> tuple[dict[str, int], np.ndarray]:
    """-> ({id: line number}, byte offsets of these lines). Built once, kept in the cache folder, rebuilt when
    the TSV's size or time differ."""
    status = os.stat(path)
    stamp = f"ids, lines, offsets of {os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
    cached = os.path.join(CACHE, f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.npz")
    if os.path.isfile(cached):
        with np.load(cached) as index:  # allow_pickle is off: arrays only
            return dict(zip(index["ids"].tolist(), index["lines"].tolist())), index["offsets"]
    lines, offsets, offset = {}, [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            image_id, tab, _ = line.partition(b"\t")
            image_id = image_id.decode("utf-8", "replace")
            if not tab:
                raise DataError(f"{path} line {number}: one column; "
                                f"expected two, `id <tab> base64`, got {image_id[:40]!r}")
            if image_id in lines:
                raise DataError(
                    f"{path} line {number}: image id {image_id} again, first seen on line {lines[image_id]}")
            lines[image_id] = number
            offsets.append(start)
    index = {"ids": np.array(list(lines), dtype=str), "lines": np.array(list(lines.values()), dtype=np.int64),
             "offsets": np.array(offsets, dtype=np.int64)}
    try:
        os.makedirs(CACHE, exist_ok=True)
        # complete before it gets its name: two runs may start at once
        with open(f"{cached}.{os.getpid()}.tmp", "wb") as file:
            np.savez(file, **index)
        os.replace(file.name, cached)
    except OSError as error:  # a home that cannot be written to: the index is built again next time
        print(f"{path}: its index is not kept ({error.strerror})")
    return lines, index["offsets"]


def read_jsonl(path: str, keys: tuple[str, ...]):
    """Yields ("path line n", object) for each non-empty line; DataError where a line is not a JSON object
    with these keys."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: not there; expected a line a caption, JSON objects with {', '.join(keys)}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                item = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise DataError(
                    f"{where}: not JSON ({error}); expected an object with {', '.join(keys)}") from None
            yield where, require(item, keys, where)


def read_csv(path: str, keys: tuple[str, ...]):
    """Yields ("path line n", row) for each row of a CSV whose first line names the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                where = f"{path} line {rows.line_num}"
                yield where, require(row, keys, where)
        except (UnicodeDecodeError, csv.Error) as error:
            after = f"{path} after line {rows.line_num}"
            raise DataError(f"{after}: not CSV in UTF-8 ({error}); save it as UTF-8") from None


def require(item, keys: tuple[str, ...], where: str) -> dict:
    if not isinstance(item, dict):
        raise DataError(f"{where}: a {type(item).__name__}; expected an object with {', '.join(keys)}")
    for key in keys:
        if key not in item:
            got = ", ".join(map(str, item)) or "nothing"
            raise DataError(f"{where}: no {key!r}; expected {', '.join(keys)}, got {got}")
    return item
