"""
What can be wrong with a data set, and how its files are cut into pieces for many processes and checked.

Lines, pictures and members of shards are read by the functions that a run uses; where a run stops at a fault,
the check notes it and goes on. Workers return only 8-byte digests of captions, ids and pictures, by which
tools/curate/check.py finds repeats.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import os
import re
import warnings
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

from data import word_ids, words
from sources.layouts import TEXT_KEYS, from_base64, image_ids_of, picture_path, tsv_id
from sources.pairs import (
    BROKEN, LIMIT, LIST_KEYS, DataError, as_text, decode, lines_of, parse_json, read_csv, read_picture, require)
from sources.shards import caption_in, is_file, members, sample_of

CAP = 1000  # places that are kept of each kind; all of them are counted
TSV_PIECE, TEXT_PIECE = 2**22, 2**20  # bytes
LIST_PIECE = 2**14  # bytes, or characters of a CSV: about 128 lines, for each of which a picture's file is read
SHARD = 2**40  # the number of a shard's member is SHARD * number of the shard + offset in blocks of 512 bytes
COLUMNS = {"captions": 2, "text_ids": 2, "pictures": 3, "pairs": 3}  # of the tables of digests, see Part
ERRORS = {  # a kind of fault at which a run stops, or from which it should not learn -> what to do
    "unreadable file": "put it there, make it readable, or drop its line",
    "line too long": "no picture or caption has 256 MB; write the line again",
    "not UTF-8": "save the file as UTF-8",
    "not JSON": "write one JSON object per line, or drop the line",
    "not CSV": 'put a text with a comma in it in "quotes", or save the table again',
    "key missing": "add the key or the column, or drop the line",
    "id twice": "give each caption, picture and sample an id of its own, or drop one",
    "no id": "write two columns, `id <tab> base64`, with an id of 1 to 256 bytes",
    "image_ids not a list": "write a list, even of a single id",
    "id not in the TSV": "add the picture or drop the id",
    "broken base64": "write the picture again",
    "damaged picture": "fetch it again, write it in another format, or drop it",
    "not text": "write a string",
    "blank caption": "write one or drop the pair",
    "damaged shard": "fetch or pack the shard again, uncompressed",
    "unsafe member": "pack files, not links or devices, without .. and without / in front",
    "half a pair": "add KEY.jpg, or KEY.txt or KEY.json, or drop what is there",
    "no pairs": "there is nothing to learn or to measure recall on",
}
NOTES = {  # what is worth knowing -> why
    "no image_ids": "this caption is in no pair",
    "no answers": "the answers of this test set are withheld; recall cannot be measured on it",
    "picture unused": "no caption names it",
    "large picture": "it is slow to decode; write it smaller",
    "tiny picture": "a side has under 32 pixels and will be enlarged",
    "CMYK": "it is made for print; its colours may look different in RGB",
    "16 bits": "brightness is cut at 255, so most of it may become white; write it with 8 bits",
    "animated": "only the first frame is seen",
    "transparent": "what lies under transparent pixels is seen; paste it on a background",
    "sideways": "EXIF asks for a turn that training does not do; pack --resize turns it",
    "repeated picture": "another name has the same bytes",
    "repeated caption": "in one batch, equal captions cannot be told apart",
    "picture in train too": "recall would be measured on what was learnt",
    "caption in train too": "recall would be measured on what was learnt",
    "long caption": "its end is cut; see --context-length",
    "odd characters": "HTML, control characters or a wrong encoding; write the text itself",
}

# ------------------------------------------------------------------------------------------------------------
# from files to pieces


class Split(NamedTuple):
    name: str
    layout: str  # official, folder or shards
    files: list[str]  # [TSV, JSONL], [JSONL or CSV] or the shards


class Task(NamedTuple):
    """A piece of a file, for one process."""
    check: Callable  # check_pictures, check_texts, check_list or check_shard
    split: str
    path: str
    args: argparse.Namespace
    size: int  # bytes
    start: int = 0  # the first byte; for a shard, its number
    rows: tuple = ()  # of a CSV: (line number, row or DataError)


def size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def tasks(split: Split, args: argparse.Namespace):
    """The pieces of a split in order. A file that is missing has one, in which that is found."""
    if split.layout == "shards":
        for number, path in enumerate(split.files):
            yield Task(check_shard, split.name, path, args, size_of(path), number)
    elif split.files[0].endswith(".csv"):  # a field may hold line ends, so only its reader can cut it
        rows, done = read_csv(split.files[0]), 0
        while batch := list(itertools.islice(rows, 128)):
            done, before = batch[-1][1], done
            yield Task(check_list, split.name, split.files[0], args, done - before,
                       rows=tuple((number, row) for number, _, row in batch))
    else:
        checks = [(check_pictures, TSV_PIECE), (check_texts, TEXT_PIECE)]
        if split.layout == "folder":
            checks = [(check_list, LIST_PIECE)]
        for path, (check, piece) in zip(split.files, checks):
            for start in range(0, max(1, size_of(path)), piece):
                yield Task(check, split.name, path, args, min(piece, size_of(path) - start), start)


def work(task: Task) -> "Part":
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
# what is found


class Faults:
    """Counts by kind, and the first CAP places of each: (file, line number or name of a member, what)."""

    def __init__(self):
        self.counts, self.places = collections.Counter(), collections.defaultdict(list)

    def add(self, kind: str, places, count: int):
        self.counts[kind] += count
        for file, at, what in itertools.islice(places, CAP - len(self.places[kind])):
            self.places[kind].append((shown(file), at if isinstance(at, int) else shown(at), shown(what)))


class Part:
    """What was found in a piece of a file. Rows hold digests, and last their place `at`, a line number or the
    number of a shard's member: captions (caption, at), text_ids (id, at), pictures (id, content or 0, at),
    pairs (caption or 0, id of the picture, at)."""

    def __init__(self, task: Task):
        self.split, self.path, self.size, self.args = task.split, task.path, task.size, task.args
        self.lines, self.faults = 0, Faults()
        self.rows = {name: [] for name in COLUMNS}
        self.tokens, self.sides = collections.Counter(), collections.Counter()  # of captions, of pictures

    def fault(self, kind: str, at: int | str, what: str = ""):
        self.faults.add(kind, [(self.path, at, what)], 1)

    def note(self, error: DataError, at: int | str):
        """Takes down what a function of sources/ found wrong."""
        assert error.kind in ERRORS, error
        self.fault(error.kind, at, str(error).removeprefix(f"{named(self.path, at)}: "))

    @contextlib.contextmanager
    def noting(self, at: int | str):
        """Where a run stops at a DataError, the check takes it down and goes on behind the `with`."""
        try:
            yield
        except DataError as error:
            self.note(error, at)

    def caption(self, text, at: int, place: int | str) -> int:
        """Looks at a caption -> its digest, 0 if it is none. `place` is the line `at`, or the name of member
        number `at`."""
        with self.noting(place):
            as_text(text, named(self.path, place))
            tokens = sum(len(word_ids(word)) for word in words(text))
            if not tokens:
                raise DataError(repr(text[:40]), "blank caption")
            tokens += 2  # [CLS] and [SEP]
            self.tokens[tokens] += 1
            if tokens > self.args.context_length:
                self.fault("long caption", place, f"{tokens} tokens")
            odd = "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]|&(#\\d+|#x[0-9a-f]+|[a-z]+\\d*);"
            if found := re.search(odd, text, re.IGNORECASE):
                self.fault("odd characters", place, f"{found[0]!a} in {text}")
            self.rows["captions"].append((digest(text), at))
            return digest(text)
        return 0

    def picture(self, name: str, content: bytes | None, at: int, place: int | str, what: str):
        """Looks at a picture, if it has content. `name` is its id, `what` says which it is."""
        looks = content is not None and not self.args.no_pictures
        self.rows["pictures"].append((digest(name), digest(content) if looks else 0, at))
        if looks:
            with self.noting(place), warnings.catch_warnings(action="ignore"):
                image = decode(content, what)
                self.sides[min(image.size)] += 1
                for kind in peculiarities(image):
                    self.fault(
                        kind, place, f"{what}: {image.format} {image.mode} {image.width} x {image.height}")


def peculiarities(image: Image.Image):
    """Yields the kinds of note on a picture that can be learnt from but may not look as expected."""
    if min(image.size) < 32:
        yield "tiny picture"
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        yield "large picture"
    if image.mode == "CMYK":
        yield "CMYK"
    if image.mode[0] in "IF":
        yield "16 bits"
    try:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            yield "transparent"
        if image.getexif().get(0x0112, 1) in range(2, 9):  # the tag Orientation
            yield "sideways"
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a phone's, with a preview
            yield "animated"
    except BROKEN:  # damage in what training does not look at: EXIF, later frames
        return


def digest(content: bytes | str) -> int:
    """A hash of 8 bytes, never 0."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def shown(text: str) -> str:
    """The first 200 characters, in one line that any terminal prints."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])


def named(file: str, at: int | str) -> str:
    """A place: "FILE line 7", "SHARD member", or the file alone if `at` is ""."""
    return f"{file} line {at}" if isinstance(at, int) else f"{file} {at}".rstrip()


# ------------------------------------------------------------------------------------------------------------
# a piece of each kind


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
        with part.noting(at):
            tsv_id(line, named(task.path, at))
            content = from_base64(line.split(b"\t")[1], named(task.path, at))
        part.picture(image_id, content, at, at, f"image id {image_id[:40]}")


def check_texts(part: Part, task: Task):
    """{split}_texts.jsonl"""
    for at, line in lines(part, task):
        where = named(task.path, at)
        with part.noting(at):
            item = parse_json(line, where)
            text_id, text = require(item, TEXT_KEYS, where)
            part.rows["text_ids"].append((digest(str(text_id)), at))
            caption, image_ids = part.caption(text, at, at), image_ids_of(item, where)
            if not image_ids:
                part.fault("no image_ids", at)
            part.rows["pairs"] += [(caption, digest(image_id), at) for image_id in image_ids]


def check_list(part: Part, task: Task):
    """{split}.jsonl or {split}.csv. A picture that comes several times in a piece is read once."""
    seen = set()
    for at, row in task.rows or lines(part, task):
        where = named(task.path, at)
        with part.noting(at):
            if isinstance(row, DataError):
                raise row
            name, text = require(row if task.rows else parse_json(row, where), LIST_KEYS, where)
            caption = part.caption(text, at, at)
            path = picture_path(os.path.dirname(task.path), name, where)
            part.rows["pairs"].append((caption, digest(name), at))
            if name not in seen:
                seen.add(name)
                part.picture(name, None if part.args.no_pictures else read_picture(path), at, at, name)


def check_shard(part: Part, task: Task):
    """A tar of samples KEY.jpg + KEY.txt, or KEY.json with "caption", as img2dataset writes them."""
    samples = {}  # key -> role -> (number, name, content)
    with open(task.path, "rb") as file:
        for name, member in members(task.path):
            key, role = sample_of(name)
            if isinstance(member, DataError):
                part.note(member, name)
            elif os.path.isabs(name) or ".." in re.split(r"[/\\]", name) or not (
                    is_file(member) or member.isdir()):
                part.fault("unsafe member", name)
            elif role in samples.get(key, {}):
                part.fault("id twice", name)
            elif role and is_file(member):
                file.seek(member.offset_data)
                content, at = file.read(min(member.size, LIMIT)), task.start * SHARD + member.offset // 512
                samples.setdefault(key, {})[role] = at, name, content if role != "picture" else b""
                if role == "picture":
                    part.picture(f"{task.path} {key}", content, at, name, f"{len(content):,} bytes")
    for key, sample in samples.items():
        if "picture" not in sample or len(sample) == 1:
            part.fault("half a pair", min(name for _, name, _ in sample.values()))
        else:
            at, name, content = sample.get("txt") or sample["json"]
            caption = 0
            with part.noting(name):
                text = caption_in(content, "txt" not in sample, named(task.path, name))
                caption = part.caption(text, at, name)
            part.rows["pairs"].append((caption, digest(f"{task.path} {key}"), sample["picture"][0]))
