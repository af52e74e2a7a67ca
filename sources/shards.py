"""
WebDataset tar shards (`KEY.jpg` and `KEY.txt` or `KEY.json`), as img2dataset writes them: the way to hundreds
of millions of pairs. A tar file is a list of files one after the other, so with the byte offset of each a
pair can be read from the middle of a shard: the order, a rank's share and the position to resume at are the
same functions of numbers as for any other source. Nothing is ever unpacked: links, devices and whatever a
member's name says remain bytes in a file.
"""

import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import io
import multiprocessing
import os
import re
import tarfile

import numpy as np
import torch
from tqdm import tqdm

from sources.pairs import (
    BROKEN, PICTURES, DataError, Pairs, as_text, kept, parse_json, read_at, require, stamp, utf8)

ROLES = dict.fromkeys(PICTURES, "picture") | {"txt": "txt", "json": "json"}
ROW = np.dtype([  # where the two members of a pair are: 29 bytes
    ("shard", "<u4"), ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"),
    ("is_json", "?")])
AHEAD = 2**26  # most bytes to read ahead of a stretch; more would push out what was read ahead before
WINDOW = 2**16  # pairs shuffled at once, 64 blocks of neighbours: about 2 GB of the machine's file cache

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


def shards_of(source: str, split: str) -> list[str]:
    """The shards of a split, [] if there are none. A pattern that ends in .tar stands for all its shards,
    even missing ones; a folder for `split-*.tar` or `split/*.tar`, or else, for train, its `*.tar`."""
    if source.endswith(".tar"):
        tries = [expand_braces(source)]
        if "*" not in source:
            return tries[0]
    else:
        names = (f"{split}-*.tar", f"{split}/*.tar", *(["*.tar"] if split == "train" else []))
        tries = [[os.path.join(glob.escape(source), name)] for name in names]
    for patterns in tries:
        paths = sorted(path for pattern in patterns for path in glob.glob(pattern))
        if split == "train":
            paths = [path for path in paths if not os.path.basename(path).startswith(("valid-", "test-"))]
        if paths:
            return paths
    return []


# ------------------------------------------------------------------------------------------------------------
# the index


def members(path: str):
    """Yields (name, tarfile.TarInfo) for each member of a shard. A DataError takes the place of a member that
    is damaged or not whole, and is the last.

    tarfile takes garbage for the end and believes any size, even a negative one. So each member must lie
    behind the one before it and inside the file, and behind the last one there must be a block of zeros."""
    name, end = "", 0
    try:
        with open(path, "rb") as file:
            total, shard = os.path.getsize(path), tarfile.open(fileobj=file, mode="r:")
            for member in iter(shard.next, None):
                name, last = member.name, member.offset_data + member.size
                if member.offset < end or last > total or not 0 <= member.size < 2**32:
                    raise ValueError(f"{member.size} bytes announced")
                yield name, member
                shard.members, end = [], shard.offset  # tarfile would keep them all
            file.seek(shard.offset)
            if file.read(512) != bytes(512):
                raise ValueError(f"neither a member nor the end at byte {shard.offset}")
    except BROKEN as error:
        kind = "unreadable file" if isinstance(error, OSError) and not name else "damaged shard"
        yield name, DataError(f"{path} {name}".rstrip() + f": {kind} ({error}); fetch or pack it again", kind)


def sample_of(name: str) -> tuple[str, str]:
    """Name of a member -> (key of its sample: the name up to the first dot after the last slash; its role in
    it: picture, txt, json or "")."""
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}/{stem}", ROLES.get(ending.lower(), "")


def is_file(member: tarfile.TarInfo) -> bool:
    """False for folders, links, devices and sparse files, whose bytes do not lie in the shard as they are."""
    return member.isreg() and not member.issparse()


def scan(path: str) -> tuple[np.ndarray, str]:
    """One shard -> (a ROW for each picture that has a caption, in the order of the pictures; what is wrong
    with it, or ""). If there is a .txt and a .json, the .txt is the caption."""
    pictures, texts, wrong = {}, {}, ""
    for name, member in members(path):
        key, role = sample_of(name)
        if isinstance(member, DataError):
            wrong = f"{member}; what is behind that place is left out"
        elif not is_file(member):
            continue
        elif role == "picture":
            pictures[key] = member.offset_data, member.size
        elif role == "txt" or role == "json" and key not in texts:
            texts[key] = member.offset_data, member.size, role == "json"
    rows = [(0, *pictures[key], *texts[key]) for key in pictures if key in texts]
    if not wrong and len(rows) < max(len(pictures), len(texts)):
        wrong = (f"{path}: {len(pictures):,} pictures, {len(texts):,} captions, {len(rows):,} pairs; "
                 "what has no partner is left out")
    return np.array(rows, dtype=ROW), wrong


def index(paths: list[str]) -> dict[str, np.ndarray]:
    """The rows [n] of all shards, scanned by all cores. What is wrong with a shard is printed once."""
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
        for path in paths:
            if not os.path.isfile(path):
                raise DataError(f"{path}: no such shard, of the {len(paths):,} that were asked for")
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
        shard, start, size = (int(self.rows[row][name]) for name in ("shard", what, f"{what}_size"))
        return read_at(self.paths[shard], self.stamps[shard], start, size)

    def picture(self, row: int) -> bytes:
        return self.member(row, "image")

    def text(self, row: int) -> str:
        where = self.place(row, "text")
        return as_text(caption_in(self.member(row, "text"), self.rows[row]["is_json"], where), where).strip()

    def place(self, row: int, what: str = "image") -> str:
        found = self.rows[row]
        return f"{self.paths[found['shard']]} at byte {found[what]} (pair {row})"

    def image_id(self, row: int) -> str:
        """The KEY, from the header before the picture; if it is over 400 bytes long, its beginning."""
        shard, start = int(self.rows[row]["shard"]), int(self.rows[row]["image"])
        before = read_at(self.paths[shard], self.stamps[shard], max(0, start - 1536), min(start, 1536))
        # a long name, or one that is not ASCII, has a header and a block of its own before that
        at = 0 if re.match(rb"(?s).{156}[xL].{100}ustar", before) else -512
        with tarfile.open(fileobj=io.BytesIO(before[at:]), mode="r:") as header:
            return sample_of(header.next().name)[0].removeprefix("/")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.key.encode("utf-8", "surrogateescape")).hexdigest()

    def caption_fingerprint(self) -> str:
        """Of shards' names and of where their members lie, for a million pairs at most, as the captions
        themselves would have to be fetched from all over the disk."""
        names = [os.path.basename(path) for path in self.paths]
        some = self.rows[:: 1 + len(self.rows) // 2**20]
        return hashlib.sha256(f"{names} {len(self.rows)}".encode() + some.tobytes()).hexdigest()

    def will_need(self, start: int, stop: int):
        """Tells Linux to read these pairs in one go."""
        rows = self.rows[start:stop]
        for shard in np.unique(rows["shard"]):
            here = rows[rows["shard"] == shard]
            first, last = int(here["image"].min()), int((here["image"] + here["image_size"]).max())
            # macOS and Windows do not have it
            with contextlib.suppress(OSError, AttributeError), open(self.paths[shard], "rb") as file:
                os.posix_fadvise(file.fileno(), first, min(last - first, AHEAD), os.POSIX_FADV_WILLNEED)


def caption_in(content: bytes, is_json: bool, where: str):
    """The caption in a KEY.txt or KEY.json. DataError if there is none."""
    if is_json:
        return require(parse_json(content, where), (("caption",),), where)[0]
    return utf8(content, where)
