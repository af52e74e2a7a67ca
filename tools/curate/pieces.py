"""
The files of a data set, cut into pieces for many processes, and how each kind of piece is checked. Lines and
members of shards are read by the functions that a run uses; a fault is noted, and the check goes on.
"""

import argparse
import itertools
import os
import re
from typing import Callable, NamedTuple

import numpy as np

from sources.layouts import TEXT_KEYS, image_ids_of, read_list, tsv_id, tsv_picture
from sources.pairs import (
    LIMIT, LIST_KEYS, PICTURE_COLUMNS, TEXT_COLUMNS, DataError, column, lines_of, parse_json, read_picture,
    require)
from sources.shards import caption_in, is_file, members, sample_of
from tools.curate.faults import COLUMNS, Part, digest, named

TSV_PIECE, TEXT_PIECE = 2**22, 2**20  # bytes
LIST_PIECE = 128  # rows, for each of which a picture's file is read
SHARD = 2**40  # the number of a shard's member is SHARD * number of the shard + offset in blocks of 512 bytes

# ------------------------------------------------------------------------------------------------------------
# from files to pieces


class Split(NamedTuple):
    name: str
    layout: str  # official, jsonl, csv or shards
    files: list[str]  # [TSV, JSONL], [JSONL or CSV] or the shards


class Task(NamedTuple):
    """A piece of a file, for one process."""
    check: Callable  # check_pictures, check_texts, check_list or check_shard
    split: str
    path: str
    args: argparse.Namespace
    size: int  # bytes
    start: int = 0  # the first byte; for a shard, its number
    rows: tuple = ()  # of a list: (line number, row or DataError)


def size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def tasks(split: Split, args: argparse.Namespace):
    """The pieces of a split in order. A file that is missing has one, in which that is found."""
    if split.layout == "shards":
        for number, path in enumerate(split.files):
            yield Task(check_shard, split.name, path, args, size_of(path), number)
    elif split.layout == "official":
        for path, check, piece in zip(split.files, (check_pictures, check_texts), (TSV_PIECE, TEXT_PIECE)):
            for start in range(0, max(1, size_of(path)), piece):
                yield Task(check, split.name, path, args, min(piece, size_of(path) - start), start)
    else:  # a field of a CSV may hold line ends, so only who reads it from the beginning can cut it
        path, done = split.files[0], 0
        rows = read_list(path)
        while batch := list(itertools.islice(rows, LIST_PIECE)):
            numbered = tuple((number, row) for number, _, row in batch)
            done, before = batch[-1][1], done
            yield Task(check_list, split.name, path, args, done - before, rows=numbered)


def work(task: Task) -> Part:
    """Looks at a piece; runs in a worker."""
    part = Part(task)
    try:
        task.check(part, task)
    except OSError as error:
        part.fault("unreadable file", "", error.strerror or str(error))
    part.rows = {name: np.array(rows, dtype=np.uint64).reshape(-1, COLUMNS[name])
                 for name, rows in part.rows.items()}
    return part


# ------------------------------------------------------------------------------------------------------------
# a piece of the official layout


def lines(part: Part, task: Task):
    """Yields (line number in the piece from 1, line) for each line that begins in it and is not blank."""
    for at, _, line in lines_of(task.path, task.start, task.start + task.size):
        part.lines = at
        if line.strip():
            yield at, line


def check_pictures(part: Part, task: Task):
    """{split}_imgs.tsv. A line with a fault has its id all the same: its captions are not to blame."""
    for at, line in lines(part, task):
        image_id, content = line.rstrip(b"\r\n=").partition(b"\t")[0].decode("utf-8", "replace"), None
        if not image_id.strip():
            part.fault("empty id", at)
        with part.noting(at):
            tsv_id(line, named(task.path, at))
            content = tsv_picture(line, named(task.path, at))
        part.picture(digest(image_id), content, at, at, f"image id {image_id[:40]}")


def check_texts(part: Part, task: Task):
    """{split}_texts.jsonl"""
    for at, line in lines(part, task):
        where, item, image_ids = named(task.path, at), None, None
        with part.noting(at):
            item = parse_json(line, where)
            require(item, TEXT_KEYS, where)
        if item is None:
            continue
        if "text_id" in item:
            part.rows["text_ids"].append((digest(str(item["text_id"])), at))
        caption = part.caption(item["text"], at, at) if "text" in item else 0
        with part.noting(at):
            image_ids = image_ids_of(item, where)
        if image_ids == []:
            part.fault("no image_ids", at)
        part.rows["pairs"] += [(caption, digest(image_id), at) for image_id in image_ids or ()]


# ------------------------------------------------------------------------------------------------------------
# a piece of a list


def check_list(part: Part, task: Task):
    """{split}.jsonl or {split}.csv. A picture that comes several times in a piece is read once."""
    seen = set()
    for at, row in task.rows:
        if isinstance(row, DataError):
            part.note(row, at)
            continue
        with part.noting(at):
            require(row, LIST_KEYS, named(task.path, at))
        text, image = column(row, TEXT_COLUMNS), column(row, PICTURE_COLUMNS)
        caption = part.caption(row[text], at, at) if text else 0
        if image and usable(part, row[image], at):
            name, content = row[image], None
            part.rows["pairs"].append((caption, digest(name), at))
            if name not in seen:
                seen.add(name)
                if not part.args.no_pictures:
                    with part.noting(at):
                        content = read_picture(os.path.join(os.path.dirname(task.path), name))
                part.picture(digest(name), content, at, at, name)


def usable(part: Part, name, at: int) -> bool:
    """True if a row of a list names a file."""
    if not isinstance(name, str):
        part.fault("path not text", at, f"a {type(name).__name__}")
    elif not os.path.isfile(os.path.join(os.path.dirname(part.path), name)):
        part.fault("picture missing", at, name)
    else:
        if outside(name):
            part.fault("path outside", at, name)
        return True
    return False


def outside(path: str) -> bool:
    """True if a path leaves its folder."""
    return os.path.isabs(path) or ".." in re.split(r"[/\\]", path)


# ------------------------------------------------------------------------------------------------------------
# a shard


def check_shard(part: Part, task: Task):
    """A tar of samples KEY.jpg + KEY.txt, or KEY.json with "caption", as img2dataset writes them."""
    samples = {}  # key -> role -> (number, name, content)
    for at, name, content in files(part, task):
        key, role = sample_of(name)
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
            at, name, content = sample.get("txt") or sample["json"]
            caption = 0
            with part.noting(name):
                text = caption_in(content, "txt" not in sample, named(task.path, name))
                caption = part.caption(text, at, name)
            part.rows["pairs"].append((caption, digest(f"{task.path} {key}"), sample["picture"][0]))


def files(part: Part, task: Task):
    """Yields (number, name, content) for each member of a shard that is a picture or a caption."""
    with open(task.path, "rb") as file:
        for name, member in members(task.path):
            if isinstance(member, DataError):
                part.note(member, name)
            elif outside(name):
                part.fault("member outside", name)
            elif not is_file(member) and not member.isdir():
                part.fault("member not a file", name)
            elif is_file(member) and sample_of(name)[1]:
                file.seek(member.offset_data)
                yield task.start * SHARD + member.offset // 512, name, file.read(min(member.size, LIMIT))
