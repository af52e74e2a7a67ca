"""
What a set of pairs is: the interface that training and evaluation read, how a picture is decoded and how a
list of captions is read line by line. The layouts that fulfil it: sources/layouts.py, and sources/shards.py for tar files.
"""

import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError

from common import UserError

# What photos come in; Pillow knows more, among them PostScript, which it has another program execute.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
CACHE = os.path.join(  # of indices
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "zhclip", "index")


class DataError(UserError):
    """Data that is not what it should be: one line with the file, the line or key, what was expected and what
    to do."""


class SourceChanged(DataError):
    """A file is not what it was when the run began: nothing that is read from it can be trusted."""


class Pairs:
    """A split of a data set. Captions and pictures are numbered; `positives` [P, 2] says which belong
    together, a row (caption, picture) each: several pictures a caption and several captions a picture are
    both common. Training sees one row at a time, evaluation the whole relation."""

    texts: list[str]  # as they are: for evaluation
    image_count: int
    positives: torch.LongTensor
    # Pairs that training shuffles at once. A source whose neighbours lie together on a disk takes fewer,
    # which then fit into the machine's file cache: data.py, "the order of training".
    window = 2**20

    def text(self, row: int) -> str:
        """Caption number `row`. DataError if it is something else than text."""
        raise NotImplementedError

    def picture(self, row: int) -> bytes:
        """File number `row`, as it is."""
        raise NotImplementedError

    def place(self, row: int) -> str:
        """Where picture number `row` is, for messages."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Of the pictures: changes when one of them, its file's size or its time does."""
        raise NotImplementedError

    def will_need(self, start: int, stop: int):
        """Training pairs start to stop come next: a source on a slow disk reads them in one go."""

    def image_id(self, row: int):
        """What the set itself calls picture number `row`; its number where it has no name for it."""
        return row

    def text_id(self, row: int):
        """What the set itself calls caption number `row`."""
        return row

    def image(self, row: int, size: int = 0) -> Image.Image:
        """Picture number `row`; `size` as in `decode`. DataError if it cannot be decoded."""
        return decode(self.picture(row), self.place(row), size)

    def __len__(self) -> int:
        """Training pairs."""
        return len(self.positives)

    def image_number(self, i: int) -> int:
        """Which picture training pair number i has."""
        return int(self.positives[i, 1])

    def caption(self, i: int) -> str:
        """Which caption training pair number i has."""
        return self.text(int(self.positives[i, 0]))

    def pair(self, i: int, size: int = 0) -> tuple[Image.Image, str]:
        """Training pair number i: (picture, caption)."""
        return self.image(self.image_number(i), size), self.caption(i)


def as_text(caption, where: str) -> str:
    """The caption. DataError if it is something else than text, or says nothing."""
    if not isinstance(caption, str):
        raise DataError(f"{where}: the caption is {caption!r}, not text")
    if not caption.strip():
        raise DataError(f"{where}: the caption is blank; write one or drop the pair")
    return caption


# ------------------------------------------------------------------------------------------------------------
# pictures


def decode(picture: bytes, where: str, size: int = 0) -> Image.Image:
    """Bytes of a JPEG, PNG, WebP ... -> image, fully decoded. DataError with its place if Pillow cannot.

    size: if not 0, a JPEG much larger than that comes out smaller, but no side under `size`: libjpeg leaves
    out frequencies while it decodes, a multiple faster than to decode all and then to shrink."""
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
        if size:
            image.draft(None, (size, size))
        image.load()
        return image
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a picture; expected one of {', '.join(FORMATS)}") from None
    # what Pillow's decoders raise on damaged files
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a picture that can be decoded ({error})") from None


def read_picture(path: str) -> bytes:
    """The file at `path`. DataError if it is gone."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it back or drop its line") from None


def open_image(path: str) -> Image.Image:
    """The picture at `path`. DataError if it is gone or cannot be decoded."""
    return decode(read_picture(path), path)


# ------------------------------------------------------------------------------------------------------------
# files


def stamp(path: str) -> tuple[int, int]:
    """(bytes, time of the last change): tells a file from what it was."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def read_at(path: str, expected: tuple[int, int], offset: int, size: int = -1) -> bytes:
    """`size` bytes of a file, or the line, from `offset` on. SourceChanged if its stamp is another than
    expected: offsets into it mean nothing then."""
    try:
        with open(path, "rb") as file:
            if stamp(path) != expected:
                raise SourceChanged(f"{path}: changed under the run, which read it at other offsets; "
                                    "put it back, or begin anew with another --out")
            file.seek(offset)
            return file.readline() if size < 0 else file.read(size)
    except FileNotFoundError:
        raise SourceChanged(f"{path}: gone; put it back") from None
    except OSError as error:  # a bad sector, a network that stumbles: of this place only
        raise DataError(f"{path} at byte {offset}: cannot be read ({error.strerror})") from None


def lines_of(path: str):
    """Yields (line number from 1, byte offset, line) for each line with something in it."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def read_jsonl(path: str, keys: tuple[str, ...]):
    """Yields ("path line n", object) for each line with something in it; DataError where a line is not a JSON
    object with these keys."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: not there; expected a line a caption, JSON objects with {said(keys)}")
    for number, _, line in lines_of(path):
        where = f"{path} line {number}"
        yield where, require(parse_json(line, keys, where), keys, where)


def parse_json(line: bytes, keys: tuple[str, ...], where: str):
    """DataError where a line is not JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, [[[[...
        raise DataError(f"{where}: not JSON ({error}); expected an object with {said(keys)}") from None


def read_csv(path: str, keys: tuple[str, ...]):
    """Yields ("path line n", row) for each row of a CSV whose first line names the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                where = f"{path} line {rows.line_num}"
                if None in row:  # what is beyond the columns that the first line names
                    raise DataError(f"{where}: more cells than columns, {row[None][0][:40]!r} is one too "
                                    'many; put a text with a comma in it in "quotes"')
                yield where, require(row, keys, where)
        except (UnicodeDecodeError, csv.Error) as error:
            after = f"{path} after line {rows.line_num}"
            raise DataError(f"{after}: not CSV in UTF-8 ({error}); save it as UTF-8") from None


def require(item, keys: tuple, where: str) -> dict:
    """The item, if it is an object with these keys; a tuple among them stands for any one of its names."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: a {type(item).__name__}; expected an object with {said(keys)}")
    for key in keys:
        names = key if isinstance(key, tuple) else (key,)
        if not any(name in item for name in names):
            got = ", ".join(map(str, item)) or "nothing"
            raise DataError(f"{where}: no {names[0]!r}; expected {said(keys)}, got {got}")
    return item


def said(keys: tuple) -> str:
    return ", ".join(" or ".join(key) if isinstance(key, tuple) else key for key in keys)


# ------------------------------------------------------------------------------------------------------------
# indices


def kept(key: str, build) -> dict[str, np.ndarray]:
    """The arrays of `build()`, mapped from the cache folder if they are there under this key, else built and
    put there. The key says what they depend on."""
    folder = os.path.join(CACHE, hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32])
    try:
        os.makedirs(CACHE, exist_ok=True)
        # One of several processes builds, the others wait. Not those that the builder has started: they would
        # wait for ever if a script without `if __name__ == "__main__"` made them open the set again.
        is_child = multiprocessing.parent_process() is not None
        with contextlib.nullcontext() if is_child else FileLock(f"{folder}.lock"):
            if not os.path.isdir(folder):
                arrays = build()
                temporary = f"{folder}.{os.getpid()}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                os.mkdir(temporary)
                for name, array in arrays.items():
                    np.save(os.path.join(temporary, name), array)
                os.rename(temporary, folder)  # complete before it gets its name
    except OSError as error:  # a home that cannot be written to: the index is built again next time
        print(f"{CACHE}: the index is not kept ({error.strerror or error})")
        return build()
    # allow_pickle is off: arrays only. "c": pages are shared and read-only until written to, which nobody
    # does
    return {name.removesuffix(".npy"): np.load(os.path.join(folder, name), mmap_mode="c")
            for name in sorted(os.listdir(folder))}


def ahead(get, batches: list):
    """Yield [get(item) for item in batch] for each batch while threads prepare the next one. Pillow releases
    Python's lock while it decodes, so a GPU does not wait for a single core."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the share of this process
    with ThreadPoolExecutor(max(1, min(8, cores))) as pool:
        coming = []
        for batch in [*batches, []]:
            waiting, coming = coming, pool.map(get, batch)  # starts at once
            if waiting:
                yield list(waiting)
