"""
The index: a feature for every picture in some folders, each picture encoded once.

    DIR/<model>/pictures.sqlite    which file has which content, and the row of every content's feature
    DIR/<model>/features.f16       unit features [R, E] in float16, in rows that are only appended
    DIR/<model>/thumbs/            small JPEGs, made when the page first shows a picture
    DIR/<model>/problems.txt       what could not be read, and why

<model> is a digest of the weights, so features of two models never mix. A content is known by its hash: a
renamed or copied picture is not encoded again. A batch of pictures is one transaction, and its features are
on the disk before the rows that name them; after a kill in between, the next batch overwrites them. SQLite
lets one process write at a time, and the others wait. N files, R contents, E joint width, S resolution.
"""

import contextlib
import datetime
import hashlib
import os
import sqlite3
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

import model
from common import UserError, replace_text
from eval import encode_images
from sources.augment import as_rgb
from sources.pairs import BROKEN, DataError, ahead, decode, pictures_below, read_picture, upright
from tools.measure.kept import digest

TOGETHER, BATCH, SECONDS = 32, 256, 30  # pictures prepared at once; a transaction is so many, or so long
SMALLEST, LARGEST = 16, 2**28  # pixels of the shorter side, below which it is an icon, and bytes
DATE_TAKEN, DETAILS = 36867, 0x8769  # an EXIF tag, and the block of tags that it is in
THUMB = 320  # pixels of the longer side
TABLES = """
CREATE TABLE IF NOT EXISTS contents (row INTEGER PRIMARY KEY, hash BLOB UNIQUE, taken REAL);
CREATE TABLE IF NOT EXISTS files (number INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, size INTEGER,
                                  mtime INTEGER, row INTEGER, problem TEXT);
"""
NEXT_ROW = "SELECT COALESCE(MAX(row) + 1, 0) FROM contents"
FOUND = np.dtype([("number", "<i8"), ("row", "<i8"), ("date", "<f8")])  # of a file; seconds since 1970


class Looked(NamedTuple):
    """A file that was opened: what it holds, or why it holds no picture."""

    path: bytes
    problem: str = ""
    hash: bytes = b""
    taken: float | None = None  # seconds since 1970, by the camera
    content: object = None  # S x S; then its feature [E] in float16; None if it is in the index already


class Index:
    """The index of one model in a folder, which is made. Paths are bytes, so that any name can be kept."""

    def __init__(self, folder: str, clip: model.ChineseCLIP):
        self.folder = os.path.join(folder, digest(clip)[:16])
        self.width, self.resolution = clip.config.embed_dim, clip.config.visual.resolution
        self.features_path = os.path.join(self.folder, "features.f16")
        with self.errors():
            os.makedirs(os.path.join(self.folder, "thumbs"), exist_ok=True)
            open(self.features_path, "ab").close()
            # all threads share these two; the reader does not see what the writer has not committed
            self.writer, self.reader = (sqlite3.connect(
                os.path.join(self.folder, "pictures.sqlite"), timeout=60, isolation_level=None,
                check_same_thread=False) for _ in range(2))
            self.writer.executescript(TABLES)

    @contextlib.contextmanager
    def errors(self):
        """UserError for what a full, damaged or write-protected folder raises."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"{self.folder}: the index cannot be used ({error}); make room, name another "
                            "by --index, or delete it, and it is built again") from None

    def update(self, clip: model.ChineseCLIP, roots: list[bytes], progress=lambda done, total: None) -> str:
        """Bring the index up to date with these folders (of `os.path.realpath`) -> a line about it. What has
        the size and the time that it had is not opened. `progress` is called as pictures are done."""
        found, unread = pictures_below(roots)
        with self.errors():
            known = {path: stamp for path, *stamp in self.writer.execute(
                f"SELECT path, size, mtime FROM files WHERE {below(roots)}")}
            unseen = tuple(os.path.join(folder, b"") for folder in unread)  # what is there cannot be told
            gone = [path for path in known if path not in found and not path.startswith(unseen)]
            with self.writer:  # commits, or rolls back after an error
                self.writer.execute("BEGIN IMMEDIATE")
                self.writer.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in gone))
        new = [path for path, stamp in found.items() if known.get(path) != stamp]
        waiting, encoded, done, written = [], 0, 0, time.monotonic()
        progress(0, len(new))
        try:
            for looked in ahead(self.look, [new[i : i + TOGETHER] for i in range(0, len(new), TOGETHER)]):
                pictures = [one for one in looked if one and one.content]
                features = encode_images(clip, lambda n: pictures[n].content, len(pictures)).half().numpy()
                waiting += [one for one in looked if one and not one.content]
                waiting += [one._replace(content=feature) for one, feature in zip(pictures, features)]
                if len(waiting) >= BATCH or time.monotonic() - written > SECONDS:
                    encoded += self.write(waiting, found)
                    waiting, written = [], time.monotonic()
                done += len(looked)
                progress(done, len(new))
        finally:  # Ctrl-C, too, keeps what is encoded
            encoded += self.write(waiting, found)
        with self.errors():
            rows = [(shown(path), problem) for path, problem in self.writer.execute(
                f"SELECT path, problem FROM files WHERE {below(roots)} AND problem != '' ORDER BY path")]
            rows += [(shown(folder), "this folder cannot be read") for folder in unread]
            path = os.path.join(self.folder, "problems.txt")
            replace_text(path, "".join(f"{name!r}: {problem}\n" for name, problem in rows))
        first = ", ".join(f"{name!r} ({problem})" for name, problem in rows[:3])
        return (f"{len(found):,} pictures, {len(new):,} new or changed, {encoded:,} encoded, {len(gone):,} "
                "gone" + f"; {len(rows):,} left out: {first}; all are in {path}" * bool(rows))

    def look(self, path: bytes) -> Looked | None:
        """What the file holds; None if it has vanished. Runs in threads."""
        try:
            if os.path.getsize(path) > LARGEST:
                return Looked(path, f"more than {LARGEST >> 20} MB")
            content = read_picture(path)
            key = hashlib.blake2b(content, digest_size=16).digest()
            if self.writer.execute("SELECT 1 FROM contents WHERE hash = ?", (key,)).fetchone():
                return Looked(path, "", key)
            image = decode(content, shown(path))  # in full: a draft would move the feature by 0.003 and more
            if min(image.size) < SMALLEST:
                return Looked(path, f"{image.width} x {image.height} pixels, an icon")
            small = as_rgb(upright(image)).resize([self.resolution] * 2, Image.Resampling.BICUBIC)
            return Looked(path, "", key, date_taken(image), small)
        except (DataError, *BROKEN) as error:
            reason = str(error).removeprefix(f"{shown(path)}: ").split("; ")[0]
            return Looked(path, reason) if os.path.exists(path) else None

    def write(self, looked: list[Looked], found: dict) -> int:
        """Add these files, all or none -> how many contents are new. found: path -> (size, time)."""
        count = 0
        with self.errors(), self.writer, open(self.features_path, "r+b") as out:
            self.writer.execute("BEGIN IMMEDIATE")  # another process may have added some of these contents
            first, = self.writer.execute(NEXT_ROW).fetchone()
            out.seek(first * self.width * 2)
            for one in looked:
                row, = self.writer.execute(
                    "SELECT MIN(row) FROM contents WHERE hash = ?", (one.hash,)).fetchone()
                if row is None and one.content is not None:
                    row, count = first + count, count + 1
                    out.write(one.content.tobytes())
                    self.writer.execute("INSERT INTO contents VALUES (?, ?, ?)", (row, one.hash, one.taken))
                self.writer.execute("REPLACE INTO files VALUES (NULL, ?, ?, ?, ?, ?)",  # with a new number
                                    (one.path, *found[one.path], row, one.problem))
            out.flush()
            os.fsync(out.fileno())
        return count

    def files(self, folders: list[bytes]) -> np.ndarray:
        """FOUND [N] of the pictures below these folders. A picture's date is its camera's, or its file's."""
        with self.errors():
            return np.fromiter(self.reader.execute(
                "SELECT number, row, COALESCE(taken, mtime / 1e9) FROM files JOIN contents USING (row) "
                f"WHERE {below(folders)}"), FOUND)

    def features(self) -> np.ndarray:
        """Features [R, E] in float16, mapped from the disk."""
        with self.errors():
            rows, = self.reader.execute(NEXT_ROW).fetchone()
            if not rows:
                return np.zeros((0, self.width), np.float16)
            # "c": PyTorch wants to be able to write, though nobody does
            return np.memmap(self.features_path, np.float16, "c", shape=(rows, self.width))

    def path(self, number: int) -> tuple[bytes, int] | tuple[None, None]:
        """-> (path, row) of the picture of this number; nothing if there is none, or it is gone by now."""
        found = self.reader.execute(
            "SELECT path, row FROM files WHERE number = ? AND row IS NOT NULL", (number,)).fetchone()
        return found if found and os.path.isfile(found[0]) else (None, None)

    def thumb(self, path: bytes, row: int) -> bytes:
        """A JPEG of at most THUMB pixels, which is made once. DataError if the picture is damaged by now."""
        kept = os.path.join(self.folder, "thumbs", f"{row}.jpg")
        if not os.path.isfile(kept):
            image = as_rgb(upright(decode(read_picture(path), shown(path), THUMB)))
            image.thumbnail((THUMB, THUMB), Image.Resampling.BICUBIC)
            with self.errors():
                image.save(temporary := f"{kept}.{time.monotonic_ns()}", "JPEG", quality=85)
                os.replace(temporary, kept)
        with open(kept, "rb") as file:
            return file.read()


def below(folders: list[bytes]) -> str:
    """The condition, in SQL, that `path` lies below one of these folders."""
    ends = [os.path.join(folder, b"") for folder in folders]  # in ASCII "0" follows "/"
    return "(" + " OR ".join(f"path >= x'{end.hex()}' AND path < x'{end[:-1].hex()}{end[-1] + 1:02x}'"
                             for end in ends) + ")"


def shown(path: bytes) -> str:
    """A path as text, with a mark for what is no UTF-8."""
    return path.decode(errors="replace")


def date_taken(image: Image.Image) -> float | None:
    """Seconds since 1970, or None if the picture does not say."""
    with contextlib.suppress(*BROKEN):
        text = image.getexif().get_ifd(DETAILS)[DATE_TAKEN]
        return datetime.datetime.strptime(text[:19], "%Y:%m:%d %H:%M:%S").timestamp()
