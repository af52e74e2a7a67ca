"""
The interface through which training and evaluation read a data set, how a picture is decoded, and how a list
of captions is read line by line. sources/layouts.py and sources/shards.py (for tar files) fulfil it.

A run stops at the first fault of a list; `python -m tools.curate check` lists all of them. Both use the same
functions, which raise a DataError that names the kind of fault.
"""

import contextlib
import csv
import datetime
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common import UserError

# The formats of photos. Pillow knows more, among them PostScript, which it has another program execute.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
if importlib.util.find_spec("pillow_heif"):  # optional: with it, the HEIC files of iPhones too
    import pillow_heif
    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2") + (
    ("heic", "heif") * ("HEIF" in FORMATS))  # how the names of their files end
# What lists of captions call the columns of pictures and texts: ours, Hugging Face's, open_clip's, Wukong's.
LIST_KEYS = (("image", "file_name", "filepath", "dir"), ("text", "caption", "title"))
LIMIT = 2**28  # bytes of a line that are read at once: no picture has 256 MB
CACHE = os.path.join(  # where indices are kept
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "zhclip", "index")
BROKEN = (  # what Pillow and tarfile raise on damaged files, beside the errors that they document
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SyntaxError,
    EOFError, MemoryError, struct.error, tarfile.TarError)


class DataError(UserError):
    """Data that is not what it should be. The message is one line that names the file, the line or key, what
    was expected and what to do. `kind` names the fault, for those who count faults."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


class SourceChanged(UserError):
    """A file is not what it was when the run began: nothing that is read from it can be trusted."""


class Pairs:
    """A split of a data set. Captions and pictures are numbered; each row of `positives` [P, 2] is a caption
    and a picture that belong together. Several pictures per caption and several captions per picture are both
    common. Training sees one row at a time, evaluation the whole relation."""

    texts: list[str]  # unchecked, for evaluation
    image_count: int
    positives: torch.LongTensor
    # How many pairs training shuffles at once. A source whose neighbours lie together on a disk takes fewer,
    # which then fit into the machine's file cache: sources/order.py.
    window = 2**20

    def text(self, row: int) -> str:
        """Caption number `row`. DataError if it is not text."""

    def picture(self, row: int) -> bytes:
        """The undecoded bytes of picture number `row`."""

    def place(self, row: int) -> str:
        """Where picture number `row` is, for messages."""

    def fingerprint(self) -> str:
        """A hash that changes when a picture, its file's size or its file's time changes."""

    def caption_fingerprint(self) -> str:
        """A hash of all captions and of which pictures they belong to. Files' times are not in it, so that a
        copy of the set has the same."""
        ids = [self.image_id(row) for row in range(self.image_count)]
        return hashlib.sha256(json.dumps([self.texts, ids, self.positives.tolist()]).encode()).hexdigest()

    def will_need(self, start: int, stop: int):
        """Announces that training pairs start to stop come next; a source on a slow disk then reads ahead."""

    def image_id(self, row: int):
        """What the set itself calls picture number `row`; the number if it has no name for it."""
        return row

    def text_id(self, row: int):
        """What the set itself calls caption number `row`; the number if it has no name for it."""
        return row

    def image(self, row: int, size: int = 0) -> Image.Image:
        """Picture number `row`; `size` as in `decode`. DataError if it cannot be decoded."""
        return decode(self.picture(row), self.place(row), size)

    def __len__(self) -> int:
        """The number of training pairs."""
        return len(self.positives)

    def image_number(self, i: int) -> int:
        """The number of the picture in training pair number i."""
        return int(self.positives[i, 1])

    def caption(self, i: int) -> str:
        """The caption in training pair number i."""
        return self.text(int(self.positives[i, 0]))

    def pair(self, i: int, size: int = 0) -> tuple[Image.Image, str]:
        """Training pair number i: (picture, caption)."""
        return self.image(self.image_number(i), size), self.caption(i)


def as_text(caption, where: str) -> str:
    """The caption. DataError if it is not text, or blank."""
    if not isinstance(caption, str):
        raise DataError(f"{where}: the caption is {caption!r}, not text; write a string", "not text")
    if not caption.strip():
        raise DataError(f"{where}: the caption is blank; write one or drop the pair", "blank caption")
    return caption


# ------------------------------------------------------------------------------------------------------------
# pictures


def decode(picture: bytes, where: str, size: int = 0) -> Image.Image:
    """The bytes of a JPEG, PNG, WebP ... -> image, fully decoded. DataError with its place if Pillow fails.

    If `size` is not 0, a JPEG much larger than that comes out smaller, but no side under `size`: libjpeg
    leaves out frequencies while it decodes, which is several times faster than to shrink afterwards."""
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
        if size:
            image.draft(None, (size, size))
        image.load()
        return image
    except (*BROKEN, Image.DecompressionBombError) as error:
        # Pillow's own words for an unknown format hold an address, which changes from time to time
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if unknown else f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: the picture cannot be decoded ({reason}); fetch it again or drop it",
                        "damaged picture") from None


def upright(image: Image.Image) -> Image.Image:
    """The same picture, turned as its camera was held; a broken note about that is ignored."""
    with contextlib.suppress(*BROKEN):
        ImageOps.exif_transpose(image, in_place=True)  # a copy would forget the format, which as_rgb needs
    return image


def date_taken(image: Image.Image) -> float | None:
    """Seconds since 1970, by the camera's local time; None if the picture does not say."""
    with contextlib.suppress(*BROKEN):
        text = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
        return datetime.datetime.strptime(text[:19], "%Y:%m:%d %H:%M:%S").timestamp()


def pictures_below(roots: list[bytes]) -> tuple[dict[bytes, tuple[int, int]], list[bytes]]:
    """-> the pictures in these folders and those below, as {path: (bytes, time in ns)}, and the folders that
    cannot be read. Hidden names are skipped. Links are followed, but no folder is read twice."""
    suffixes, seen, found, unread = {suffix.encode() for suffix in PICTURES}, set(), {}, []
    for root in roots:
        for folder, folders, names in os.walk(root, True, lambda error: unread.append(error.filename), True):
            try:
                if not os.access(folder, os.X_OK):  # its names can be listed, but not one of them opened
                    raise PermissionError
                place = os.stat(folder)[1:3]  # inode and device
                folders[:] = [name for name in folders if name[:1] != b"." and place not in seen]
                for name in names if place not in seen else []:
                    if name[:1] != b"." and name.rpartition(b".")[2].lower() in suffixes:
                        with contextlib.suppress(FileNotFoundError):
                            if os.path.isfile(path := os.path.join(folder, name)):  # a pipe would never end
                                found[path] = stamp(path)
                seen.add(place)
            except OSError:
                unread.append(folder)
    return found, [folder for folder in unread if os.path.lexists(folder)]  # else it has vanished just now


def read_picture(path: str) -> bytes:
    """The bytes of the file at `path`. DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it back or drop its line",
                        "unreadable file") from None


def open_image(path: str) -> Image.Image:
    """The picture at `path`. DataError if it cannot be read or decoded."""
    return decode(read_picture(path), path)


# ------------------------------------------------------------------------------------------------------------
# lists of captions


def lines_of(path: str, start: int = 0, stop: int = sys.maxsize):
    """Yields (line number, byte offset, line) for each line that begins at bytes `start` to `stop`; the first
    of them has number 1. A line longer than LIMIT is cut there."""
    number, ends = 0, not start
    with open(path, "rb") as file:
        offset = file.seek(max(0, start - 1))
        while offset < stop and (line := file.readline(LIMIT)):
            begins, ends = ends, line.endswith(b"\n")
            if begins:  # not the rest of a line that began before, or was cut
                number += 1
                yield number, offset, line
            offset += len(line)


def read_jsonl(path: str):
    """Yields (line number, byte offset, object) for each line that is not blank. DataError if one of them is
    not a JSON object."""
    for number, offset, line in lines_of(path):
        if line.strip():
            yield number, offset, parse_json(line, f"{path} line {number}")


def read_csv(path: str):
    """Yields (line number, byte offset, row) for each row of a CSV whose first line names the columns. A row
    is a dictionary; a DataError takes the place of one that cannot be read, so that a check can go on behind
    it. The offset is approximate."""
    # bytes that are not UTF-8 become half surrogates, so that they spoil only their own row
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(iter(lambda: file.readline(LIMIT), ""))
        while True:
            try:
                if re.search("[\udc80-\udcff]", "".join(rows.fieldnames or ())):
                    raise DataError(f"{path} line 1: not UTF-8; save the file as UTF-8", "not UTF-8")
                require(dict.fromkeys(rows.fieldnames or ()), LIST_KEYS, f"{path} line 1")
                row = next(rows)
                where = f"{path} line {rows.line_num}"
                if None in row:  # the cells beyond the columns that the first line names
                    row = DataError(f"{where}: more cells than columns, {row[None][0][:40]!r} is one too "
                                    'many; put a text with a comma in it in "quotes"', "not CSV")
                elif re.search("[\udc80-\udcff]", "".join(filter(None, row.values()))):
                    row = DataError(f"{where}: not UTF-8; save the file as UTF-8", "not UTF-8")
            except StopIteration:
                return
            except DataError as error:  # a column is missing, and with it all rows
                yield 1, 0, error
                return
            except csv.Error as error:
                where = f"{path} line {rows.reader.line_num}"
                row = DataError(f"{where}: not CSV ({error}); save the table again", "not CSV")
            yield rows.reader.line_num, file.buffer.tell(), row


def utf8(content: bytes, where: str) -> str:
    """The text, without the mark that some editors begin a file with. DataError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}); save it as UTF-8, for example by "
                        "`iconv -f GBK -t UTF-8 OLD > NEW`", "not UTF-8") from None


def parse_json(line: bytes, where: str) -> dict:
    """A JSON object in UTF-8. DataError if it is anything else."""
    text = utf8(line, where)
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        array = ", without [ and ] around all and commas between" if line.lstrip().startswith(b"[") else ""
        raise DataError(f"{where}: not JSON ({getattr(error, 'msg', error)}{at}); write one JSON object per "
                        f"line{array}", "not JSON") from None
    if not isinstance(item, dict):
        raise DataError(f"{where}: a {type(item).__name__}; expected a JSON object per line, {{...}}",
                        "not JSON")
    return item


def require(item: dict, keys: tuple[tuple[str, ...], ...], where: str) -> list:
    """The values of these keys, each given by its possible names. DataError if one of them is missing."""
    found = [next((name for name in names if name in item), None) for names in keys]
    if None in found:
        expected = " and ".join(" or ".join(names) for names in keys)
        raise DataError(f"{where}: no {keys[found.index(None)][0]!r}; expected {expected}, got {list(item)}",
                        "key missing")
    return [item[name] for name in found]


# ------------------------------------------------------------------------------------------------------------
# files that stay as they are during a run


def stamp(path: str) -> tuple[int, int]:
    """(size in bytes, time of the last change): a file whose stamp is the same has not changed."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: str, expected: tuple[int, int]):
    """SourceChanged if the file's stamp is not the expected one, or the file is gone."""
    now = stamp(path) if os.path.isfile(path) else None
    if now != expected:
        raise SourceChanged(f"{path}: {'changed' if now else 'gone'} during the run; put it back and repeat "
                            "the command, or begin anew with another --out")


def read_at(path: str, expected: tuple[int, int], offset: int, size: int = -1) -> bytes:
    """`size` bytes of a file from `offset` on, or the line there. SourceChanged if its stamp is not the
    expected one: offsets into it mean nothing then."""
    try:
        check_unchanged(path, expected)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.readline(LIMIT) if size < 0 else file.read(size)
    except OSError as error:  # a bad sector or a network that stumbles: only this place is lost
        raise DataError(f"{path} at byte {offset}: cannot be read ({error.strerror})") from None


def kept(key: str, build) -> dict[str, np.ndarray]:
    """The arrays of `build()`, mapped from the cache folder if they are there under this key, else built and
    put there. The key says what they depend on."""
    folder = os.path.join(CACHE, hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32])
    try:
        os.makedirs(CACHE, exist_ok=True)
        # One of several processes builds and the others wait, except those that the builder has started: they
        # would wait for ever if a script without `if __name__ == "__main__"` made them open the set again.
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
    # "c": processes share the pages until one writes to them, which none does
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
