"""
A data set before a run trains on it: every fault with its place, and what else is worth knowing.

Lines, pictures and members of shards are read by the functions that a run uses; where a run stops at a fault,
the check notes it and goes on. Files are cut into pieces for many processes, which return only 8-byte digests
of captions, ids and pictures, about 100 bytes for a pair. Repeats, leaks and missing pictures are found by
sorting these. The odds that two of 200 million are equal by chance are 1 in 1,000.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import re
import shlex
import signal
import tarfile
import warnings

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import write_json
from data import Stream, word_ids, words
from sources.layouts import (
    TEXT_KEYS, find, from_base64, image_ids_of, open_pairs, picture_path, splits_of, tsv_id)
from sources.pairs import (
    BROKEN, LIMIT, LIST_KEYS, DataError, as_text, decode, lines_of, parse_json, read_csv, read_picture,
    require)
from sources.shards import caption_in, is_file, members, sample_of
from training.recipes import SMALL_FROM_NOTHING
from training.report import repeats
from weights.transfer import size_of

BATCH = SMALL_FROM_NOTHING["batch_size"]  # of the run that a newcomer starts
CAP = 1000  # places that are kept of each kind; all of them are counted
TSV_PIECE, TEXT_PIECE = 2**22, 2**20  # bytes
LIST_PIECE = 2**14  # bytes, about as many lines as ROWS
ROWS = 128  # of a CSV in a piece; for each of them a picture's file is read
SHARD = 2**40  # the number of a shard's member is SHARD * number of the shard + offset in blocks of 512 bytes
COLUMNS = {"captions": 2, "text_ids": 2, "pictures": 3, "pairs": 3}  # of the tables of digests, see Findings
ERRORS = (  # kinds of fault at which a run stops, or from which it should not learn
    "unreadable file", "not UTF-8", "not JSON", "not CSV", "key missing", "id twice",
    "no id", "image_ids not a list", "id not in the TSV", "broken base64", "damaged picture", "not text",
    "blank caption", "damaged shard", "unsafe member", "half a pair", "no pairs")
NOTES = (  # what is worth knowing; docs/data.md says why
    "no image_ids", "no answers", "picture unused", "large picture", "CMYK", "16 bits", "animated",
    "transparent", "sideways", "tiny picture", "repeated picture", "picture in train too", "long caption",
    "repeated caption", "caption in train too", "odd characters", "tags in the caption")

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
        """Where a run stops at a DataError, the check notes it and goes on behind the `with`."""
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
            if len(tags := re.findall(r"[\u3400-\u9fff][/:_]\w{1,4}(?=\s|$)", text, re.ASCII)) > 1:
                self.fault("tags in the caption", place, f"{tags[0]} in {text}")  # of speech, as 狗/n
            self.rows["captions"].append((digest(text), at))
            return digest(text)
        return 0

    def picture(self, name: str, content: bytes | None, at: int, place: int | str, what: str):
        """Looks at a picture, if it has content: can it be learnt from, and does it look as expected? `name`
        is its id, `what` says which it is."""
        looks = content is not None and not self.args.no_pictures
        self.rows["pictures"].append((digest(name), digest(content) if looks else 0, at))
        if not looks:
            return
        with self.noting(place), warnings.catch_warnings(action="ignore"):
            image = decode(content, what)
            self.sides[min(image.size)] += 1
            kinds = {"tiny picture": min(image.size) < 32, "CMYK": image.mode == "CMYK",
                     "large picture": image.width * image.height > Image.MAX_IMAGE_PIXELS,
                     "16 bits": image.mode[0] in "IF"}
            with contextlib.suppress(*BROKEN):  # damage in what training does not look at: EXIF, later frames
                alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
                kinds["transparent"] = alpha and alpha.getextrema()[0] < 255
                kinds["sideways"] = image.getexif().get(0x0112, 1) in range(2, 9)  # the tag Orientation
                # an MPO is a photo with a preview
                kinds["animated"] = image.format != "MPO" and getattr(image, "is_animated", False)
            for kind in filter(kinds.get, kinds):
                self.fault(kind, place, f"{what}: {image.format} {image.mode} {image.width} x {image.height}")


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


# ------------------------------------------------------------------------------------------------------------
# the whole


def in_processes(function, todo, workers: int):
    """Yields function(task) for each task, in order, computed by `workers` processes (0: by this one). Few
    tasks are under way at a time, so that their number costs no memory."""
    if workers < 1:
        yield from map(function, todo)
        return
    todo = iter(todo)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, 61), multiprocessing.get_context("spawn"),  # Windows cannot wait for more than 61
        signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C ends this process, which ends the others
    try:
        pending = [pool.submit(function, task) for task in itertools.islice(todo, 4 * workers)]
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(function, task) for task in itertools.islice(todo, 1)]
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker was killed, for want of memory or by a decoder's fault; "
                        "try --workers 0") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Whole(Findings):
    """A split, put together from its pieces."""

    def __init__(self, name: str, layout: str, files: list[str]):
        super().__init__()
        self.name, self.layout, self.files = name, layout, files
        self.lines = collections.Counter()  # of each file, as far as it was read

    def take(self, piece: Piece):
        """Adds the next piece; its lines are numbered on from where the piece before it ended."""
        before = self.lines[piece.path]
        for kind, places in piece.places.items():
            moved = ((file, at + before if isinstance(at, int) else at, what) for file, at, what in places)
            self.add(kind, moved, piece.counts[kind])
        for name, rows in piece.rows.items():
            rows[:, -1] += np.uint64(before)
            self.rows[name].append(rows)
        self.lines[piece.path] += piece.count
        self.tokens.update(piece.tokens)
        self.sides.update(piece.sides)

    def close(self):
        """Finds what only all pieces together show."""
        self.rows = {name: np.concatenate([np.empty((0, width), np.uint64), *self.rows[name]])
                     for name, width in COLUMNS.items()}
        pictures, pairs = self.rows["pictures"], self.rows["pairs"]
        there = np.isin(pairs[:, 1], pictures[:, 0])  # [P]: whether the pair's picture is there
        if self.layout == "official":
            self.repeated("id twice", "pictures", 0)
            if os.path.isfile(self.files[0]):  # else that is the only fault
                self.add_rows("id not in the TSV", "pairs", pairs[~there], lambda _: "add it or drop its id")
            self.add_rows("picture unused", "pictures", pictures[~np.isin(pictures[:, 0], pairs[:, 1])])
        # a picture that several pieces of a list name was read in each
        pictures = pictures[np.sort(np.unique(pictures[:, 0], return_index=True)[1])]
        self.rows["pictures"], self.pairs = pictures, int(((pairs[:, 0] != 0) & there).sum())
        self.repeated("id twice", "text_ids", 0)
        self.repeated("repeated caption", "captions", 0)
        self.repeated("repeated picture", "pictures", 1)
        if not self.pairs:
            withheld = self.name == "test" and self.counts["no image_ids"]
            self.add("no answers" if withheld else "no pairs", [(self.files[-1], "", "")], 1)

    def place(self, table: str, at: int) -> tuple[str, int | str]:
        """The place of a row: (file, line number or name of a member)."""
        if self.layout != "shards":
            return self.files[0 if table == "pictures" else -1], int(at)
        number, block = divmod(int(at), SHARD)
        with tarfile.open(self.files[number], "r:") as tar:
            tar.fileobj.seek(512 * block)
            return self.files[number], tarfile.TarInfo.fromtarfile(tar).name

    def add_rows(self, kind: str, table: str, rows: np.ndarray, what=lambda i: ""):
        places = ((*self.place(table, row[-1]), what(i)) for i, row in enumerate(rows))
        self.add(kind, places, len(rows))

    def repeated(self, kind: str, table: str, column: int, of: "Whole | None" = None):
        """Adds the rows whose digest an earlier row has, or any row of another split."""
        rows = self.rows[table]
        before = of.rows[table] if of else rows[:0]
        digests = np.concatenate([before[:, column], rows[:, column]])
        _, first, which = np.unique(digests, return_index=True, return_inverse=True)
        first = first[which][len(before):]  # [rows], where its digest comes first
        earlier = first < (len(before) if of else np.arange(len(rows)))
        again = np.flatnonzero(earlier & (rows[:, column] != 0))
        there, owner = (before, of) if of else (rows, self)

        def original(i: int) -> str:
            file, at = owner.place(table, there[first[again[i]], -1])
            return "as " + named(os.path.basename(file), at)
        self.add_rows(kind, table, rows[again], original)


# ------------------------------------------------------------------------------------------------------------
# the report


def summary(whole: Whole) -> dict:
    """All that is known about a split, to print and for --json."""
    kinds = {kind: {
        "error": kind in ERRORS, "count": whole.counts[kind],
        "places": [{"file": file, "line" if isinstance(at, int) else "member": at or None, "what": what}
                   for file, at, what in whole.places[kind]]}
        for kind in (*ERRORS, *NOTES) if whole.counts[kind]}
    return {
        "files": [shown(file) for file in whole.files],
        **{name: len(whole.rows[name]) for name in ("pictures", "captions")}, "pairs": whole.pairs,
        "tokens": dict(sorted(whole.tokens.items())), "short_sides": dict(sorted(whole.sides.items())),
        "kinds": kinds}


def print_report(name: str, found: dict, show: int):
    print(f"\n{name}: {', '.join(found['files'][:2])}" + ", ..." * (len(found["files"]) > 2))
    print("   {pictures:,} pictures, {captions:,} captions, {pairs:,} pairs".format(**found))
    for title, counts in (("tokens of a caption", found["tokens"]),
                          ("pixels of a picture's shorter side", found["short_sides"])):
        if counts:
            reached = np.cumsum(list(counts.values())) / sum(counts.values())
            at = {q: list(counts)[np.searchsorted(reached, q / 100)] for q in (0, 5, 25, 50, 75, 95, 100)}
            print(f"   {title}, percentiles: " + ", ".join(f"{q}% {value:,}" for q, value in at.items()))
    for kind, row in found["kinds"].items():
        print(f"   {'ERROR' if row['error'] else 'note '} {row['count']:>9,}  {kind}")
        for place in row["places"][:show]:
            where = named(place["file"], place.get("line") or place.get("member") or "")
            print(f"   {'':18}{where}" + f": {place['what']}" * bool(place["what"]))
    if not found["kinds"]:
        print("   nothing to complain about")


def verdict(args: argparse.Namespace, found: dict) -> bool:
    """Prints what a batch repeats, whether train.py would take the set, and what to type next -> False if it
    would not. The splits are opened as a run opens them: most errors stop it in one layout only."""
    pairs, flags = {}, "" if args.batch_size == BATCH else f" --batch-size {args.batch_size}"
    fatal = {"train": {"no pairs"}, "valid": {"damaged picture", "broken base64", "not text"}}
    print()
    try:  # training skips a broken pair, but recall is measured on all of them
        for split in [split for split in fatal if split in found]:
            pairs[split] = open_pairs(args.path, split)
            if split == "valid":
                list(pairs[split].texts)  # of shards, a blank one stops a run
            if kinds := fatal[split] & found[split]["kinds"].keys():
                raise DataError(f"{min(kinds)} in {split}")
    except (DataError, OSError) as error:
        print(f"train.py would stop at the errors above: {error}\nnext: mend them, and check again")
        return False
    if "train" in pairs:
        shared, floor = repeats(Stream(pairs["train"], 0, 0, "none"), args.batch_size)
        advice = " --targets multi" * (floor > 0.01)  # as print_settings advises in a run
        flags += advice
        print(f"{shared:.1%} of a batch of {args.batch_size:,} share picture or caption with another"
              + f":{advice}" * bool(advice))
        if {*ERRORS} & found["train"]["kinds"].keys():
            print("train.py would skip the broken pairs of train")
    if not args.split:
        print(next_step(args.path, flags))
    return bool(args.split) or "train" not in found or "valid" in found or args.path.endswith(".tar")


def next_step(path: str, flags: str = "") -> str:
    """Whether train.py takes a set without errors, and what to type next, with these flags of train.py."""
    splits, name = splits_of(path), shlex.quote(path)
    train = f"python train.py --recipe scratch --model RN-mini{flags} --data {name} --out out/"
    if "train" not in splits:
        return ("no split train in it: this set is there to measure on\n"
                f"next: python eval.py retrieval --model ViT-B-16 --data {name} --split {splits[0]}")
    if "valid" in splits:
        own = shlex.quote(os.path.basename(os.path.abspath(path)))
        return f"train.py would take this set\nnext: {train}{own}"
    other = shlex.quote(f"{os.path.normpath(path)}-split")
    following = (f"{train}shards --valid-data SET" if path.endswith(".tar") else
                 f"python -m tools.curate split {name} {other} --valid 0.1")
    return ("train.py would refuse this set without --valid-data: it has no split valid to measure on\n"
            f"next: {following}")


# ------------------------------------------------------------------------------------------------------------
# the command


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("path", metavar="PATH", help='folder of a set or of shards, or shards as "name-{00000..00099}.tar"')
    add("--split", default="", help="check this split only, not all that are there")
    add("--no-pictures", action="store_true", help="do not decode pictures: much faster")
    add("--context-length", type=int, default=52, metavar="T", help="tokens of a caption that training reads")
    add("--batch-size", type=int, default=BATCH, metavar="N", help="pairs of a step, to count repeats")
    add("--show", type=int, default=5, metavar="N", help="places to print of each kind")
    add("--json", default="", metavar="FILE", help=f"write a report there, with {CAP:,} places of each kind")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that read; 0: this one")


def run(args: argparse.Namespace) -> int:
    """Checks a set and prints the report -> exit code: 1 if there is an error, 0 if there are at most notes.
    DataError if there is nothing to check."""
    names = [args.split] if args.split else splits_of(args.path)
    wholes = {name: whole for name in names if (whole := Whole(name, *find(args.path, name))).files}
    if not wholes:
        open_pairs(args.path, args.split or "train")  # raises a DataError that says what is missing
        raise DataError(f"{args.path}: no files to check; drawn scenes have none, and of several sets each "
                        "is checked by itself")
    if args.batch_size < 2:
        raise DataError(f"--batch-size {args.batch_size}: expected 2 or more")
    total = sum(size_of(file) for whole in wholes.values() for file in whole.files)
    todo = (piece for name, whole in wholes.items()
            for piece in pieces_of(name, whole.layout, whole.files, args))
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        for piece in in_processes(work, todo, args.workers):
            wholes[piece.split].take(piece)
            bar.update(piece.size)
    for whole in wholes.values():
        whole.close()
    for name, whole in wholes.items():
        if name != "train" and "train" in wholes:
            whole.repeated("caption in train too", "captions", 0, wholes["train"])
            whole.repeated("picture in train too", "pictures", 1, wholes["train"])
    found = {name: summary(whole) for name, whole in wholes.items()}
    if args.json:
        write_json(args.json, {"path": args.path, "splits": found})
    for name in found:
        print_report(name, found[name], args.show)
    errors = any(row["error"] for split in found.values() for row in split["kinds"].values())
    return int(not verdict(args, found) or errors)
