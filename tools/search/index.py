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
from sources.pairs import BROKEN, DataError, ahead, date_taken, decode, pictures_below, read_picture, upright
from weights.read import digest

TOGETHER = 64  # pictures in a transaction, and prepared while the model computes
SMALLEST, LARGEST = 16, 2**28  # pixels of the shorter side, below which it is an icon, and bytes
THUMB = 320  # pixels of the longer side
TABLES = """
CREATE TABLE IF NOT EXISTS contents (row INTEGER PRIMARY KEY, hash BLOB UNIQUE, taken REAL);
CREATE TABLE IF NOT EXISTS files (number INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, size INTEGER,
                                  mtime INTEGER, row INTEGER, problem TEXT);
"""
NEXT_ROW = "SELECT COALESCE(MAX(row) + 1, 0) FROM contents"
FOUND = np.dtype([("number", "<i8"), ("row", "<i8"), ("date", "<f8")])  # of a file; seconds since 1970


class File(NamedTuple):
    """A file that was opened: what it holds, or why it holds no picture."""

    path: bytes
    size: int
    mtime: int  # in ns; -1: look at it again next time
    problem: str = ""
    hash: bytes = b""
    taken: float | None = None  # seconds since 1970, by the camera
    picture: Image.Image | None = None  # S x S; None if its content is in the index already


class Index:
    """The index of one model in a folder, created if it is not there, and of it the files below `roots`.
    Paths are bytes, so that any name can be kept; roots are those of `os.path.realpath`."""

    def __init__(self, folder: str, clip: model.ChineseCLIP, roots: list[bytes]):
        self.folder, self.roots = os.path.join(folder, digest(clip.state_dict())[:16]), roots
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
        """UserError for what a full, write-protected or damaged folder raises."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise UserError(f"{self.folder}: the index cannot be used ({error}); make room, wait for another "
                            "process, or name another folder by --index") from None
        except (sqlite3.DatabaseError, ValueError) as error:
            raise UserError(f"{self.folder}: the index is damaged ({error}); delete it, and it is built "
                            "again") from None

    def update(self, clip: model.ChineseCLIP, progress=lambda done, total: None) -> str:
        """Bring the index up to date with its folders -> a line about it. Files whose size and time have not
        changed are not opened. `progress` is called when pictures are done."""
        with self.errors():  # before the walk: what another process adds meanwhile is not "gone"
            known = {path: tuple(stamp) for path, *stamp in self.writer.execute(
                f"SELECT path, size, mtime FROM files WHERE {below(self.roots)}")}
        found, unread = pictures_below(self.roots)
        unknown = tuple(os.path.join(folder, b"") for folder in unread)  # nobody knows what is there now
        gone = [path for path in known if path not in found and not path.startswith(unknown)]
        with self.errors(), self.writer:  # commits, or rolls back after an error
            self.writer.execute("BEGIN IMMEDIATE")
            self.writer.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in gone))
        new = [(path, *stamp) for path, stamp in found.items() if known.get(path) != stamp]
        encoded, done = 0, 0
        progress(0, len(new))
        for files in ahead(self.look, [new[i : i + TOGETHER] for i in range(0, len(new), TOGETHER)]):
            pictures = [file for file in files if file and file.picture]
            features = encode_images(clip, lambda n: pictures[n].picture, len(pictures)).half().numpy()
            by_hash = dict(zip((file.hash for file in pictures), features))
            encoded += self.write(filter(None, files), by_hash)
            done += len(files)
            progress(done, len(new))
        with self.errors(), self.writer:
            self.writer.execute("BEGIN IMMEDIATE")  # another process would write problems.txt too
            rows = [(shown(path), problem) for path, problem in self.writer.execute(
                f"SELECT path, problem FROM files WHERE {below(self.roots)} AND problem != '' ORDER BY path")]
            rows += [(shown(folder), "this folder cannot be read") for folder in unread]
            path = os.path.join(self.folder, "problems.txt")
            replace_text(path, "".join(f"{name}: {problem}\n" for name, problem in rows))
        first = "".join(f", {name} ({problem})" for name, problem in rows[:3] if new)
        return (f"{len(found):,} pictures, {len(new):,} new or changed, {encoded:,} encoded, {len(gone):,} "
                "gone" + f"; {len(rows):,} left out{first}; all are named in {path}" * bool(rows))

    def look(self, file: tuple[bytes, int, int]) -> File | None:
        """A path, its size and its time -> what it holds; None if it has vanished. Runs in threads."""
        path, size, _ = file
        if size > LARGEST:
            return File(*file, f"more than {LARGEST >> 20} MB")
        try:
            content = read_picture(os.fsdecode(path))
            key = hash_of(content)
            if self.writer.execute("SELECT 1 FROM contents WHERE hash = ?", (key,)).fetchone():
                return File(*file, "", key)
            image = decode(content, os.fsdecode(path))  # a draft would move the feature by 0.003 and more
            if min(image.size) < SMALLEST:
                return File(*file, f"{image.width} x {image.height} pixels, an icon")
            small = as_rgb(upright(image)).resize([self.resolution] * 2, Image.Resampling.BICUBIC)
            return File(*file, "", key, date_taken(image), small)
        except (DataError, *BROKEN) as error:
            if not os.path.exists(path):
                return None
            reason = shown(os.fsencode(str(error).removeprefix(f"{os.fsdecode(path)}: ").split("; ")[0]))
            is_final = getattr(error, "kind", "") == "damaged picture"  # else it may be read some other day
            return File(*(file if is_final else (path, size, -1)), reason)

    def write(self, files, features: dict[bytes, np.ndarray]) -> int:
        """Add files, all or none -> how many contents are new. features: hash -> unit feature [E]."""
        count = 0
        with self.errors(), self.writer, open(self.features_path, "r+b") as out:
            self.writer.execute("BEGIN IMMEDIATE")  # another process may have added some of these contents
            first, = self.writer.execute(NEXT_ROW).fetchone()
            out.seek(first * self.width * 2)
            for file in files:
                row, = self.writer.execute(
                    "SELECT MIN(row) FROM contents WHERE hash = ?", (file.hash,)).fetchone()
                if row is None and file.hash in features:
                    row, count = first + count, count + 1
                    out.write(features[file.hash].tobytes())
                    self.writer.execute("INSERT INTO contents VALUES (?, ?, ?)", (row, file.hash, file.taken))
                self.writer.execute("REPLACE INTO files VALUES (NULL, ?, ?, ?, ?, ?)",  # with a new number
                                    (file.path, file.size, file.mtime, row, file.problem))
            out.flush()
            os.fsync(out.fileno())
        return count

    def files(self, folders: list[bytes]) -> np.ndarray:
        """FOUND [N] of the pictures below these folders. A picture's date is its camera's, or its file's."""
        with self.errors():
            return np.fromiter(self.reader.execute(
                "SELECT number, row, COALESCE(taken, mtime / 1e9) FROM files JOIN contents USING (row) "
                f"WHERE {below(self.roots)} AND {below(folders)}"), FOUND)

    def features(self) -> np.ndarray:
        """Features [R, E] in float16, mapped from the disk."""
        with self.errors():
            rows, = self.reader.execute(NEXT_ROW).fetchone()
            if not rows:
                return np.zeros((0, self.width), np.float16)
            # "c": PyTorch wants to be able to write, though nobody does
            return np.memmap(self.features_path, np.float16, "c", shape=(rows, self.width))

    def path(self, number: int) -> bytes | None:
        """The path of this picture; None if there is none below the roots, or it is gone by now."""
        found = self.reader.execute("SELECT path FROM files WHERE number = ? AND row IS NOT NULL AND "
                                    + below(self.roots), (number,)).fetchone()
        return found[0] if found and os.path.isfile(found[0]) else None

    def thumb(self, path: bytes) -> bytes:
        """A JPEG of at most THUMB pixels, made once for a content. DataError if the file holds no picture."""
        content = read_picture(os.fsdecode(path))
        kept = os.path.join(self.folder, "thumbs", f"{hash_of(content).hex()}.jpg")
        if not os.path.isfile(kept):
            image = as_rgb(upright(decode(content, shown(path), THUMB)))
            image.thumbnail((THUMB, THUMB), Image.Resampling.BICUBIC)
            with self.errors():
                image.save(temporary := f"{kept}.{time.monotonic_ns()}", "JPEG", quality=85)
                os.replace(temporary, kept)
        with open(kept, "rb") as file:
            return file.read()


def hash_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def below(folders: list[bytes]) -> str:
    """The condition, in SQL, that `path` lies below one of these folders."""
    ends = [os.path.join(folder, b"") for folder in folders]  # in ASCII "0" follows "/"
    return "(" + " OR ".join(f"path >= x'{end.hex()}' AND path < x'{end[:-1].hex()}{end[-1] + 1:02x}'"
                             for end in ends) + ")"


def shown(path: bytes) -> str:
    """A path as text for people, with a mark for what is no UTF-8 or cannot be printed."""
    return "".join(char if char.isprintable() else "\ufffd" for char in path.decode(errors="replace"))
