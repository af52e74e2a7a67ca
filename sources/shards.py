"""
WebDataset tar shards (`KEY.jpg` and `KEY.txt` or `KEY.json`), as img2dataset writes them: the way to hundreds
of millions of pairs. A tar file is a list of files one after the other, so with the byte offset of each a
pair can be read from the middle of a shard: every order, every share of a rank and every position to resume
at is the same function of numbers as for any other source. Nothing is ever unpacked: links, devices and
whatever a member's name says stay what they are, bytes in a file.

    find("set/{000000..000999}.tar", "train")     paths of the shards
    TarPairs(paths)                               their pairs
"""

import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import re
import tarfile

import numpy as np
import torch
from tqdm import tqdm

from sources.pairs import DataError, Pairs, as_text, kept, read_at, stamp

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
ROW = np.dtype([  # where the two members of a pair are: 29 bytes
    ("shard", "<u4"), ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"),
    ("is_json", "?")])
AHEAD = 2**26  # bytes read ahead of a stretch: of large pictures not all, or they would push each other out
WINDOW = 2**16  # pairs shuffled at once, 64 blocks that lie together: about 2 GB of the machine's file cache

# ------------------------------------------------------------------------------------------------------------
# names of shards


def split_outside_braces(source: str) -> list[str]:
    """"a,b/{x,y}.tar" -> ["a", "b/{x,y}.tar"]."""
    return [one.strip() for one in re.findall(r"(?:\{[^}]*\}|[^,{])+", source)] or [source]


def expand_braces(pattern: str) -> list[str]:
    """"s/{000..002}.tar" -> "s/000.tar", "s/001.tar", "s/002.tar"; "{a,b}.tar" -> "a.tar", "b.tar"."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if first and int(last) - int(first) > 10**7:
        raise DataError(f"{pattern}: {found[0]} are more than ten million shards; is that what you mean?")
    choices = words.split(",") if words else [
        str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [path for choice in choices
            for path in expand_braces(pattern[: found.start()] + choice + pattern[found.end():])]


def find(source: str, split: str) -> list[str]:
    """The shards of a split: of a pattern that ends in .tar all; in a folder those of `split-*.tar` or
    `split/*.tar`, and for `train` else every *.tar. [] if there are none. DataError for one of a pattern that
    is missing."""
    if source.endswith(".tar"):
        paths = expand_braces(source)
        if "*" in source:
            paths = sorted(path for pattern in paths for path in glob.glob(pattern)
                           if split != "train" or not is_held_out(path))
        for path in paths:
            if not os.path.isfile(path):
                raise DataError(f"{path}: no such shard; {source} asks for {len(paths):,}")
        return paths
    folder = glob.escape(source)
    for pattern in (f"{split}-*.tar", f"{split}/*.tar", *(["*.tar"] if split == "train" else [])):
        if paths := sorted(glob.glob(os.path.join(folder, pattern))):
            return [path for path in paths if pattern != "*.tar" or not is_held_out(path)]
    return []


def is_held_out(path: str) -> bool:
    return os.path.basename(path).startswith(("valid-", "test-"))


# ------------------------------------------------------------------------------------------------------------
# the index


def scan(path: str) -> tuple[np.ndarray, str]:
    """One shard -> (a ROW for each picture that has a caption, in the order of the pictures; what is wrong
    with it, or ""). A key is a member's name up to the first dot after the last slash; of a .txt and a .json
    the .txt is the caption."""
    pictures, texts, wrong, size, end = {}, {}, "", os.path.getsize(path), -1
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.offset <= end or not 0 <= member.size < min(size, 2**32):
                    raise ValueError("sizes that cannot be")
                end = member.offset
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if not member.isreg() or member.issparse():
                    continue
                where = (member.offset_data, member.size)
                if kind.lower() in PICTURES:
                    pictures[folder, key] = where
                elif kind.lower() == "txt" or kind.lower() == "json" and (folder, key) not in texts:
                    texts[folder, key] = (*where, kind.lower() == "json")
        with open(path, "rb") as shard:  # tarfile takes the end of a file for the end of an archive
            shard.seek(-min(size, 512), os.SEEK_END)
            if any(shard.read()):
                raise ValueError("no end mark")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        wrong = f"{path}: cut off or damaged ({error}); what is behind that place is left out, fetch it again"
    rows = [(0, *pictures[key], *texts[key]) for key in pictures if key in texts
            if sum(pictures[key]) <= size and sum(texts[key][:2]) <= size]
    if not wrong and len(rows) < max(len(pictures), len(texts)):
        wrong = (f"{path}: {len(pictures):,} pictures, {len(texts):,} captions, {len(rows):,} pairs; "
                 "what has no partner is left out")
    return np.array(rows, dtype=ROW), wrong


def index(paths: list[str]) -> dict[str, np.ndarray]:
    """-> rows [n] of all shards, scanned by all cores; what is wrong with a shard is said once."""
    parts = []
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        # for a few, starting processes would take longer
        scanned = pool.map(scan, paths, chunksize=4) if len(paths) > 8 else map(scan, paths)
        for number, (rows, wrong) in enumerate(tqdm(scanned, "indexing shards", len(paths), disable=None)):
            rows["shard"] = number
            parts.append(rows)
            if wrong:
                print(wrong, flush=True)
    rows = np.concatenate(parts)
    if not len(rows):
        raise DataError(f"{paths[0]} and {len(paths) - 1} more: no pair in them; expected KEY.jpg (or "
                        f".{', .'.join(PICTURES[1:])}) with KEY.txt or KEY.json")
    return {"rows": rows}


# ------------------------------------------------------------------------------------------------------------
# the pairs


class TarPairs(Pairs):
    """The pairs of tar shards; each has its own picture. The index is mapped from the cache folder, 29 bytes
    a pair, shared by all processes."""

    window = WINDOW

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.stamps = [stamp(path) for path in paths]
        self.key = "\n".join(f"{os.path.abspath(p)} {s}" for p, s in zip(paths, self.stamps))
        self.rows = kept(f"tar shards, {' '.join(PICTURES)}\n" + self.key, lambda: index(paths))["rows"]
        self.image_count = len(self.rows)

    def __reduce__(self):
        return TarPairs, (self.paths,)  # to another process: mapped there, not sent

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def positives(self) -> torch.LongTensor:
        return torch.arange(len(self.rows))[:, None].expand(-1, 2)

    @functools.cached_property
    def texts(self) -> list[str]:
        return [self.text(row) for row in range(len(self.rows))]

    def image_number(self, i: int) -> int:
        return i

    def caption(self, i: int) -> str:
        return self.text(i)

    def member(self, row: int, what: str) -> bytes:
        found = self.rows[row]
        shard = int(found["shard"])
        return read_at(self.paths[shard], self.stamps[shard], int(found[what]), int(found[f"{what}_size"]))

    def picture(self, row: int) -> bytes:
        return self.member(row, "image")

    def text(self, row: int) -> str:
        found, where = self.member(row, "text"), self.place(row, "text")
        try:
            text = found.decode("utf-8")
            if self.rows[row]["is_json"]:
                text = json.loads(text)["caption"]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise DataError(f"{where}: no caption in UTF-8 ({type(error).__name__}); "
                            "expected text, or JSON with \"caption\"") from None
        return as_text(text, where).strip()

    def place(self, row: int, what: str = "image") -> str:
        found = self.rows[row]
        return f"{self.paths[found['shard']]} at byte {found[what]} (pair {row})"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.key.encode("utf-8", "surrogateescape")).hexdigest()

    def will_need(self, start: int, stop: int):
        """Tells Linux to read these pairs in one go."""
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        rows = self.rows[start:stop]
        for shard in np.unique(rows["shard"]):
            here = rows[rows["shard"] == shard]
            first, last = int(here["image"].min()), int((here["image"] + here["image_size"]).max())
            with contextlib.suppress(OSError), open(self.paths[shard], "rb") as file:
                os.posix_fadvise(file.fileno(), first, min(last - first, AHEAD), os.POSIX_FADV_WILLNEED)
