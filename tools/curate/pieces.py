"""
The files of a data set as tools/curate/check.py reads them: which there are, the pieces they are cut into, and what is in
a piece. sources/layouts.py stops at the first fault, as a run must; this reads the raw lines itself and goes on, and
many processes can read a piece each. Never is anything of a tar written to disk.
"""

import argparse
import base64
import binascii
import csv
import glob
import itertools
import os
import re
import tarfile
from typing import Callable, NamedTuple

import numpy as np

from sources import shards
from tools.curate.faults import BROKEN, COLUMNS, LIMIT, Part, digest, id_text
from sources.pairs import DataError
from sources.layouts import PICTURE_COLUMNS, TEXT_COLUMNS, layout_of

TSV_PIECE, TEXT_PIECE, LIST_PIECE = 2**22, 2**20, 2**14  # bytes; every line of a list is a file to read
SHARD = 2**40  # a member's number is its shard's times this + where it stands, in tar's blocks of 512 bytes
ROLES = dict.fromkeys(shards.PICTURES, "picture") | {"txt": "txt", "json": "json"}

# ------------------------------------------------------------------------------------------------------------
# which files, in which pieces


class Split(NamedTuple):
    name: str
    layout: str  # official, list or shards
    files: tuple[str, ...]  # (TSV, JSONL), (JSONL or CSV,) or the shards


def find(path: str, only: str | None) -> dict[str, Split]:
    """The splits of a folder, or of shards, told as sources/layouts.py tells them; a TSV or a JSONL that has lost its
    other half is a split too. DataError if there is none."""
    if path.endswith(".tar"):  # a pattern has no splits; a shard of it that is missing is a fault
        names = [sorted(glob.glob(pattern)) or [pattern] for pattern in shards.expand_braces(path)]
        return {only or "train": Split(only or "train", "shards", tuple(itertools.chain(*names)))}
    found = [re.fullmatch(r"(.+)_(imgs\.tsv|texts\.jsonl)", name) for name in os.listdir(path)
             ] if os.path.isdir(path) else []
    official = sorted({match[1] for match in found if match})
    splits = {}
    for split in [only] if only else dict.fromkeys(("train", "valid", "test", *official)):
        layout = layout_of(path, split)
        if split in official:
            files = [os.path.join(path, f"{split}_{end}") for end in ("imgs.tsv", "texts.jsonl")]
            splits[split] = Split(split, "official", tuple(files))
        elif layout in ("jsonl", "csv"):
            splits[split] = Split(split, "list", (os.path.join(path, f"{split}.{layout}"),))
        elif layout == "shards":
            splits[split] = Split(split, "shards", tuple(shards.find(path, split)))
    if not splits:
        raise DataError(f"{path}: no split {only or 'at all'} in it; expected SPLIT_imgs.tsv with "
                        "SPLIT_texts.jsonl, SPLIT.jsonl, SPLIT.csv, or shards *.tar")
    return splits


class Task(NamedTuple):
    """A piece of a file, for one process."""
    check: Callable  # check_pictures, check_texts, check_list or check_shard
    split: str
    path: str
    args: argparse.Namespace
    size: int  # bytes
    start: int = 0  # the first byte; of a shard its number
    rows: tuple = ()  # of a CSV, which nobody but its reader can cut


def size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def tasks(split: Split, args: argparse.Namespace):
    """The pieces of a split in order. A file that is missing has one, in which that is found."""
    if split.layout == "shards":
        for number, path in enumerate(split.files):
            yield Task(check_shard, split.name, path, args, size(path), number)
    elif split.files[0].endswith(".csv"):
        yield from csv_tasks(split, args)
    else:
        kinds = [(check_list, LIST_PIECE)]
        if split.layout == "official":
            kinds = [(check_pictures, TSV_PIECE), (check_texts, TEXT_PIECE)]
        for path, (check, piece) in zip(split.files, kinds):
            for start in range(0, max(1, size(path)), piece):
                length = min(piece, size(path) - start)
                yield Task(check, split.name, path, args, length, start)


def csv_tasks(split: Split, args: argparse.Namespace):
    """A quoted field may hold line ends, so that a CSV can be cut only by who reads it from the beginning.
    Bytes that are not UTF-8 become half surrogates."""
    path, done = split.files[0], 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv_rows(file)
        while batch := tuple(itertools.islice(rows, 128)):
            done, before = file.buffer.tell(), done
            yield Task(check_list, split.name, path, args, done - before, rows=batch)


def csv_rows(file):
    """Yields (line number, row), or (line number, (kind, what)) for what is none."""
    rows = csv.DictReader(iter(lambda: file.readline(LIMIT), ""))
    while True:
        try:
            if missing := [names[0] for names in (PICTURE_COLUMNS, TEXT_COLUMNS)
                           if not set(names) & set(rows.fieldnames or [])]:
                yield 1, ("columns missing", f"no {', '.join(missing)} in {rows.fieldnames}")
                return
            row = next(rows)
            if None in row:
                yield rows.line_num, ("too many cells", f"{row[None][0][:40]!r} is beyond the last column")
                continue
            row = plain(row)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.reader.line_num, ("not CSV", str(error))
            continue
        bad = re.search("[\udc80-\udcff]", f"{row['image']}{row['text']}")
        yield rows.line_num, ("not UTF-8", "") if bad else row


# ------------------------------------------------------------------------------------------------------------
# one piece


def outside(path: str) -> bool:
    """Does a path leave its folder?"""
    return os.path.isabs(path) or ".." in re.split(r"[/\\]", path)


def next_line(file) -> bytes:
    """The first LIMIT bytes of the next line, b"" at the end."""
    line = piece = file.readline(LIMIT)
    while len(piece) == LIMIT and not piece.endswith(b"\n"):
        piece = file.readline(LIMIT)
    return line


def lines(part: Part, task: Task):
    """Yields (number in the piece from 1, line) of those that begin in it and are not empty."""
    with open(task.path, "rb") as file:
        if task.start:  # behind the line that began before the piece
            file.seek(task.start - 1)
            next_line(file)
        while file.tell() < task.start + task.size and (line := next_line(file)):
            part.lines += 1
            if len(line) == LIMIT and not line.endswith(b"\n"):
                part.fault("line too long", part.lines)
            elif line.strip():
                yield part.lines, line


def check_pictures(part: Part, task: Task):
    """{split}_imgs.tsv. A line with a fault has its id all the same: its captions are not to blame."""
    for at, line in lines(part, task):
        image_id, *columns = line.rstrip(b"\r\n=").split(b"\t")
        image_id, content = image_id.decode("utf-8", "replace"), None
        what = f"image id {image_id[:40]}"
        if not image_id.strip():
            part.fault("empty id", at)
        if not columns:
            part.fault("one column", at, f"got {image_id[:40]!r}")
        else:
            encoded = columns[0].translate(bytes.maketrans(b"-_", b"+/"))
            try:
                content = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
            except binascii.Error as error:
                part.fault("broken base64", at, f"{what}: {error}")
        part.picture(digest(image_id), content, at, at, what)


def check_texts(part: Part, task: Task):
    """{split}_texts.jsonl"""
    for at, line in lines(part, task):
        item = part.object(line, at, ("text_id", "text"))
        if item is None:
            continue
        if "text_id" in item:
            part.rows["text_ids"].append((digest(id_text(item["text_id"])), at))
        caption = part.caption(item["text"], at, at) if "text" in item else 0
        image_ids = item.get("image_ids", [])
        if not isinstance(image_ids, list):
            part.fault("image_ids not a list", at, f"a {type(image_ids).__name__}")
        elif not image_ids:
            part.fault("no image_ids", at)
        else:
            part.rows["pairs"] += [(caption, digest(id_text(image_id)), at) for image_id in image_ids]


def check_list(part: Part, task: Task):
    """{split}.jsonl or {split}.csv, whose rows come with the task. A picture that comes several times in a
    piece is read once."""
    seen = set()
    for at, item in task.rows or list_lines(part, task):
        if isinstance(item, tuple):
            part.fault(item[0], at, item[1])
        elif item is not None:
            caption = part.caption(item["text"], at, at) if "text" in item else 0
            name = item.get("image")
            if "image" in item and usable(part, name, at):
                part.rows["pairs"].append((caption, digest(name), at))
                if name not in seen:
                    seen.add(name)
                    part.picture(digest(name), read(part, name, at), at, at, name)


def list_lines(part: Part, task: Task):
    """Yields (line number, object) as `csv_rows` does."""
    for at, line in lines(part, task):
        item = part.object(line, at, ())
        if item is not None:
            item = plain(item)
            if missing := [key for key in ("image", "text") if key not in item]:
                part.fault("key missing", at, f"no {', '.join(missing)}; got {', '.join(item) or 'nothing'}")
        yield at, item


def plain(item: dict) -> dict:
    """A line with its picture and its text under these names, whatever their columns are called."""
    for key, names in (("image", PICTURE_COLUMNS), ("text", TEXT_COLUMNS)):
        if found := [name for name in names if name in item]:
            item = item | {key: item[found[0]]}
    return item


def usable(part: Part, name, at: int) -> bool:
    """Does a line of a list name a file of its folder?"""
    if not isinstance(name, str):
        part.fault("path not text", at, f"a {type(name).__name__}")
    elif not os.path.isfile(os.path.join(os.path.dirname(part.path), name)):
        part.fault("picture missing", at, name)
    else:
        if outside(name):
            part.fault("path outside", at, name)
        return True
    return False


def read(part: Part, name: str, at: int) -> bytes | None:
    """A picture's file; None with a fault if it cannot be read."""
    try:
        with open(os.path.join(os.path.dirname(part.path), name), "rb") as file:
            return b"" if part.args.no_pictures else file.read(LIMIT)
    except OSError as error:
        return part.fault("unreadable file", at, f"{name}: {error.strerror}")


def members(part: Part, task: Task):
    """Yields (number, name, content) of a shard's files that are pictures or captions. tarfile takes garbage
    for the end and believes any size, even a negative one: so each member must lie behind the one before and
    inside the file, and after the last stands a block of zeros."""
    end, total, name = 0, os.path.getsize(task.path), ""
    with open(task.path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
            for member in iter(tar.next, None):
                if member.size < 0 or not end <= member.offset < tar.offset <= total:
                    return part.fault("truncated shard", member.name, f"{member.size} bytes announced")
                tar.members, end, name = [], tar.offset, member.name  # it would keep them all
                if outside(name):
                    part.fault("member outside", name)
                elif member.issparse() or not (member.isreg() or member.isdir()):
                    part.fault("member not a file", name)
                elif member.isreg() and role_of(name)[1]:
                    file.seek(member.offset_data)
                    yield task.start * SHARD + member.offset // 512, name, file.read(min(member.size, LIMIT))
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                part.fault("truncated shard", name, f"neither a member nor the end at byte {tar.offset}")
        except BROKEN as error:
            part.fault("truncated shard" if name else "not a tar", name, str(error))


def role_of(name: str) -> tuple[str, str | None]:
    """Name of a member -> (key of its sample, picture, txt, json or None)."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}", ROLES.get(extension.lower())


def check_shard(part: Part, task: Task):
    """A tar of samples KEY.jpg + KEY.txt, or KEY.json with "caption", as img2dataset writes them."""
    samples = {}  # key -> role -> (number, name, content)
    for at, name, content in members(part, task):
        key, role = role_of(name)
        sample = samples.setdefault(key, {})
        if role in sample:
            part.fault("key twice", name)
        elif role == "picture":
            sample[role] = at, name, b""
            part.picture(digest(f"{task.path} {key}"), content, at, name, f"{len(content):,} bytes")
        else:
            sample[role] = at, name, content
    for key, sample in samples.items():
        if "picture" not in sample:
            part.fault("caption without picture", min(name for _, name, _ in sample.values()))
        elif len(sample) == 1:
            part.fault("picture without caption", sample["picture"][1])
        else:
            caption = check_caption(part, *sample.get("txt", sample.get("json")))
            part.rows["pairs"].append((caption, digest(f"{task.path} {key}"), sample["picture"][0]))


def check_caption(part: Part, at: int, name: str, content: bytes) -> int:
    """KEY.txt, or KEY.json -> digest of the caption, 0 if it is none."""
    if name.lower().endswith(".txt"):
        try:
            return part.caption(content.decode("utf-8-sig"), at, name)
        except UnicodeDecodeError as error:
            return part.fault("not UTF-8", name, str(error)) or 0
    item = part.object(content, name, ())
    if item is not None and "caption" not in item:
        part.fault("json without caption", name)
    return part.caption(item["caption"], at, name) if item and "caption" in item else 0


def work(task: Task) -> Part:
    """A piece -> what was found in it."""
    part = Part(task)
    try:
        task.check(part, task)
    except OSError as error:
        part.fault("unreadable file", "", error.strerror or str(error))
    part.rows = {name: np.array(rows, dtype=np.uint64).reshape(-1, COLUMNS[name])
                 for name, rows in part.rows.items()}
    return part
