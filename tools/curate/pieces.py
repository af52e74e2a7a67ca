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

import numpy as np
from PIL import Image

from data import word_ids, words
from sources.layouts import TEXT_KEYS, from_base64, image_ids_of, picture_path, tsv_id
from sources.pairs import (
    BROKEN, LIMIT, LIST_KEYS, DataError, as_text, decode, lines_of, parse_json, read_csv, read_picture,
    require)
from sources.shards import caption_in, is_file, members, sample_of

CAP = 1000  # places that are kept of each kind; all of them are counted
TSV_PIECE, TEXT_PIECE = 2**22, 2**20  # bytes
LIST_PIECE = 2**14  # bytes, about as many lines as ROWS
ROWS = 128  # of a CSV in a piece; for each of them a picture's file is read
SHARD = 2**40  # the number of a shard's member is SHARD * number of the shard + offset in blocks of 512 bytes
COLUMNS = {"captions": 2, "text_ids": 2, "pictures": 3, "pairs": 3}  # of the tables of digests, see Findings
ERRORS = (  # kinds of fault at which a run stops, or from which it should not learn
    "unreadable file", "line too long", "not UTF-8", "not JSON", "not CSV", "key missing", "id twice",
    "no id", "image_ids not a list", "id not in the TSV", "broken base64", "damaged picture", "not text",
    "blank caption", "damaged shard", "unsafe member", "half a pair", "no pairs")
NOTES = (  # what is worth knowing; docs/data.md says why
    "no image_ids", "no answers", "picture unused", "large picture", "CMYK", "16 bits", "animated",
    "transparent", "sideways", "tiny picture", "repeated picture", "picture in train too", "long caption",
    "repeated caption", "caption in train too", "odd characters")

# ------------------------------------------------------------------------------------------------------------
# what is found


class Findings:
    """What is found in a piece of a file, or in a whole split. Rows hold digests, and last their place `at`,
    a line number or the number of a shard's member: captions (caption, at), text_ids (id, at), pictures (id,
    content or 0, at), pairs (caption or 0, id of the picture, at)."""

    def __init__(self):
        self.counts = collections.Counter()  # by kind
        self.places = collections.defaultdict(list)  # of each kind the first: (file, line or member, what)
        self.rows = {name: [] for name in COLUMNS}
        self.tokens, self.sides = collections.Counter(), collections.Counter()  # of captions, of pictures

    def add(self, kind: str, places, count: int):
        self.counts[kind] += count
        for file, at, what in itertools.islice(places, CAP - len(self.places[kind])):
            self.places[kind].append((shown(file), at if isinstance(at, int) else shown(at), shown(what)))


class Piece(Findings):
    """A piece of a file, for one process, and what it finds there."""

    def __init__(self, check, split: str, path: str, args: argparse.Namespace, size: int, start=0, todo=()):
        super().__init__()
        self.check = check  # check_pictures, check_texts, check_list or check_shard
        self.split, self.path, self.args, self.size = split, path, args, size  # size in bytes
        self.start = start  # the first byte; for a shard, its number
        self.todo = todo  # of a CSV: (line number, row or DataError)
        self.count = 0  # lines that begin in it

    def fault(self, kind: str, at: int | str, what: str = ""):
        self.add(kind, [(self.path, at, what)], 1)

    @contextlib.contextmanager
    def noting(self, at: int | str):
        """Where a run stops at a DataError, the check takes it down and goes on behind the `with`."""
        try:
            yield
        except DataError as error:
            assert error.kind in ERRORS, error
            self.fault(error.kind, at, str(error).removeprefix(f"{named(self.path, at)}: "))

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


def pieces_of(split: str, layout: str, files: list[str], args: argparse.Namespace):
    """The pieces of a split in order. A file that is missing has one, in which that is found."""
    if layout == "shards":
        for number, path in enumerate(files):
            yield Piece(check_shard, split, path, args, size_of(path), number)
    elif files[0].endswith(".csv"):  # a field may hold line ends, so only its reader can cut it
        rows, done = read_csv(files[0]), 0
        while batch := list(itertools.islice(rows, ROWS)):
            done, before = batch[-1][1], done
            yield Piece(check_list, split, files[0], args, done - before, todo=batch)
    else:
        checks = {"official": ((check_pictures, TSV_PIECE), (check_texts, TEXT_PIECE)),
                  "folder": ((check_list, LIST_PIECE),)}[layout]
        for path, (check, size) in zip(files, checks):
            for start in range(0, max(1, size_of(path)), size):
                yield Piece(check, split, path, args, min(size, size_of(path) - start), start)


def size_of(file: str) -> int:
    return os.path.getsize(file) if os.path.isfile(file) else 0


def work(piece: Piece) -> Piece:
    """Looks at a piece; runs in a worker."""
    try:
        piece.check(piece)
    except OSError as error:
        piece.fault("unreadable file", "", error.strerror or str(error))
    piece.todo = ()
    piece.rows = {name: np.array(rows, dtype=np.uint64).reshape(-1, COLUMNS[name])
                  for name, rows in piece.rows.items()}
    return piece


def lines(piece: Piece):
    """Yields (line number in the piece from 1, line) for each line that begins in it and is not blank."""
    for at, _, line in lines_of(piece.path, piece.start, piece.start + piece.size):
        piece.count = at
        if line.strip():
            yield at, line


def check_pictures(piece: Piece):
    """{split}_imgs.tsv. A line with a fault has its id all the same: its captions are not to blame."""
    for at, line in lines(piece):
        image_id, content = line.rstrip(b"\r\n=").partition(b"\t")[0].decode("utf-8", "replace"), None
        with piece.noting(at):
            tsv_id(line, named(piece.path, at))
            content = from_base64(line.split(b"\t")[1], named(piece.path, at))
        piece.picture(image_id, content, at, at, f"image id {image_id[:40]}")


def check_texts(piece: Piece):
    """{split}_texts.jsonl"""
    for at, line in lines(piece):
        where = named(piece.path, at)
        with piece.noting(at):
            item = parse_json(line, where)
            text_id, text = require(item, TEXT_KEYS, where)
            piece.rows["text_ids"].append((digest(str(text_id)), at))
            caption, image_ids = piece.caption(text, at, at), image_ids_of(item, where)
            if not image_ids:
                piece.fault("no image_ids", at)
            piece.rows["pairs"] += [(caption, digest(image_id), at) for image_id in image_ids]


def check_list(piece: Piece):
    """{split}.jsonl or {split}.csv. A picture that comes several times in a piece is read once."""
    seen = set()
    for at, *_, row in piece.todo or lines(piece):
        where = named(piece.path, at)
        with piece.noting(at):
            if isinstance(row, DataError):
                raise row
            name, text = require(row if piece.todo else parse_json(row, where), LIST_KEYS, where)
            caption = piece.caption(text, at, at)
            path = picture_path(os.path.dirname(piece.path), name, where)
            piece.rows["pairs"].append((caption, digest(name), at))
            if name not in seen:
                seen.add(name)
                piece.picture(name, None if piece.args.no_pictures else read_picture(path), at, at, name)


def check_shard(piece: Piece):
    """A tar of samples KEY.jpg + KEY.txt, or KEY.json with "caption", as img2dataset writes them."""
    samples = {}  # key -> role -> (number, name, content)
    with open(piece.path, "rb") as file:
        for name, member in members(piece.path):
            key, role = sample_of(name)
            if isinstance(member, DataError):
                with piece.noting(name):
                    raise member
            elif os.path.isabs(name) or ".." in re.split(r"[/\\]", name) or not (
                    is_file(member) or member.isdir()):
                piece.fault("unsafe member", name, "pack files, not links, without .. and without / in front")
            elif role in samples.get(key, {}):
                piece.fault("id twice", name, "another member with this KEY; drop one of them")
            elif role and is_file(member):
                file.seek(member.offset_data)
                content, at = file.read(min(member.size, LIMIT)), piece.start * SHARD + member.offset // 512
                samples.setdefault(key, {})[role] = at, name, content if role != "picture" else b""
                if role == "picture":
                    piece.picture(f"{piece.path} {key}", content, at, name, f"{len(content):,} bytes")
    for key, sample in samples.items():
        if "picture" not in sample or len(sample) == 1:
            name = min(name for _, name, _ in sample.values())
            piece.fault("half a pair", name, "add KEY.jpg, or KEY.txt or KEY.json, or drop it")
        else:
            at, name, content = sample.get("txt") or sample["json"]
            caption = 0
            with piece.noting(name):
                text = caption_in(content, "txt" not in sample, named(piece.path, name))
                caption = piece.caption(text, at, name)
            piece.rows["pairs"].append((caption, digest(f"{piece.path} {key}"), sample["picture"][0]))
