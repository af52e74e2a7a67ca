"""
A data set before a run trains on it: every fault with its place, and what else is worth knowing.

    python -m tools.curate check path/to/MUGE
    python -m tools.curate check "shards/{00000..00099}.tar" --json report.json

tools/curate/faults.py says what can be wrong with a caption or a picture, tools/curate/pieces.py checks one
piece of a file. This file gives the pieces to processes, finds what only the whole set shows (repeats, leaks,
missing pictures) and writes the report.

A pair takes about 100 bytes of memory, because only 8-byte digests of captions, ids and pictures are kept.
Repeats are found by sorting them. The odds that two of 200 million are equal by chance are 1 in 1,000.
"""

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import tarfile

import numpy as np
from tqdm import tqdm

from common import write_json
from sources.layouts import find, image_ids_of, splits_of
from sources.pairs import DataError, lines_of, parse_json
from tools.curate import faults, pieces
from tools.curate.faults import named

TOKENS = (2, 4, 8, 12, 16, 24, 32, 40, 53, 77, 129, 513)  # lower ends of a histogram's bars
SIDES = (0, 32, 64, 128, 192, 224, 256, 336, 512, 1024, 2048, 4096)  # the same, in pixels

# ------------------------------------------------------------------------------------------------------------
# processes


def in_processes(function, tasks, workers: int):
    """Yields function(task) for each task, in order, computed by `workers` processes (0: by this one). Few
    tasks are under way at a time, so that their number costs no memory."""
    if not workers:
        yield from map(function, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, 61), multiprocessing.get_context("spawn"),  # Windows cannot wait for more than 61
        initializer=leave_ctrl_c_to_the_parent)
    try:
        pending = collections.deque()
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker was killed, for want of memory or by a decoder's fault; "
                        "try --workers 0") from None
    finally:
        pool.shutdown(cancel_futures=True)


def leave_ctrl_c_to_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------------------
# the whole


class Whole:
    """A split, put together from its pieces: faults, rows of digests (see faults.Part), counts of tokens and
    of short sides."""

    def __init__(self, split: pieces.Split):
        self.split, self.faults, self.lines = split, faults.Faults(), collections.Counter()
        self.rows = {name: [np.empty((0, k), dtype=np.uint64)] for name, k in faults.COLUMNS.items()}
        self.tokens, self.sides = collections.Counter(), collections.Counter()

    def add(self, part: faults.Part):
        """Adds the next piece; its lines are numbered on from where the piece before it ended."""
        before = self.lines[part.path]
        for kind, places in part.faults.places.items():
            moved = ((file, at + before if isinstance(at, int) else at, what) for file, at, what in places)
            self.faults.add(kind, moved, part.faults.counts[kind])
        for name, rows in part.rows.items():
            rows[:, -1] += np.uint64(before)
            self.rows[name].append(rows)
        self.lines[part.path] += part.lines
        self.tokens.update(part.tokens)
        self.sides.update(part.sides)

    def close(self):
        """Finds what only all pieces together show."""
        for name, rows in self.rows.items():
            self.rows[name] = np.concatenate(rows)
        official = self.split.layout == "official"
        if official:
            self.repeated("id twice", "pictures", 0)
            self.find_missing_pictures()
        # a picture that several pieces of a list name was read in each
        unique = np.unique(self.rows["pictures"][:, 0], return_index=True)[1]
        self.rows["pictures"] = self.rows["pictures"][np.sort(unique)]
        captions, pictures = self.rows["pairs"][:, 0], self.rows["pairs"][:, 1]
        if official:
            unused = self.rows["pictures"][~np.isin(self.rows["pictures"][:, 0], pictures)]
            self.add_rows("picture unused", "pictures", unused)
        self.pairs = self.rows["pairs"][(captions != 0) & np.isin(pictures, self.rows["pictures"][:, 0])]
        for kind, table, column in (("text_id twice", "text_ids", 0), ("repeated caption", "captions", 0),
                                    ("repeated picture", "pictures", 1)):
            self.repeated(kind, table, column)
        if not len(self.pairs):
            withheld = self.split.name == "test" and self.faults.counts["no image_ids"]
            self.faults.add("no answers" if withheld else "no pairs", [(self.split.files[-1], "", "")], 1)

    def place(self, table: str, at: int) -> tuple[str, int | str]:
        """The place of a row: (file, line number or name of a member)."""
        if self.split.layout == "shards":
            number, block = divmod(int(at), pieces.SHARD)
            with tarfile.open(self.split.files[number], "r:") as tar:
                tar.fileobj.seek(512 * block)
                return self.split.files[number], tarfile.TarInfo.fromtarfile(tar).name
        return self.split.files[0 if table == "pictures" else -1], int(at)

    def add_rows(self, kind: str, table: str, rows: np.ndarray, what=lambda i: ""):
        places = ((*self.place(table, row[-1]), what(i)) for i, row in enumerate(rows))
        self.faults.add(kind, places, len(rows))

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

    def find_missing_pictures(self):
        """Ids of captions that are not in the TSV; these lines are read again to say which."""
        tsv, jsonl = self.split.files
        pairs = self.rows["pairs"][~np.isin(self.rows["pairs"][:, 1], self.rows["pictures"][:, 0])]
        if not len(pairs) or not os.path.isfile(tsv):
            return  # a missing file is one fault
        wanted, places = collections.defaultdict(set), []  # line number -> digests of ids
        for _, image_id, at in pairs[:faults.CAP].tolist():
            wanted[at].add(image_id)
        for at, _, line in itertools.islice(lines_of(jsonl), max(wanted)):
            if at in wanted:
                places += [(jsonl, at, f"image id {one}") for one in image_ids_of(parse_json(line, ""), "")
                           if faults.digest(one) in wanted[at]]
        self.faults.add("id not in the TSV", places, len(pairs))


def loss_floor(pairs: np.ndarray, batch_size: int, batches: int = 8) -> tuple[float, float]:
    """pairs [P, 2] (numbers of caption and picture) -> the mean of `repeats` over random batches."""
    drawn = (np.random.default_rng(seed).choice(len(pairs), min(batch_size, len(pairs)), replace=False)
             for seed in range(batches if len(pairs) else 0))
    found = [repeats(pairs[rows]) for rows in drawn]
    return tuple(np.mean(found or [(0, 0)], axis=0).tolist())


def repeats(numbers: np.ndarray) -> tuple[float, float]:
    """numbers [B, 2] of the captions and pictures of a batch's pairs -> (the share of pairs whose caption or
    picture another pair has too; the loss below which one-hot targets cannot come). n equal captions cannot
    be told apart, so each gets a probability of at most 1/n, which is a loss of ln n."""
    counts = []
    for column in numbers.T:
        _, which, count = np.unique(column, return_inverse=True, return_counts=True)
        counts.append(count[which])  # [B]: how many pairs of the batch have this caption, or this picture
    return (np.max(counts, axis=0) > 1).mean(), np.log(counts).mean(axis=1).max()


# ------------------------------------------------------------------------------------------------------------
# the report


def summary(whole: Whole, batch_size: int) -> dict:
    """All that is known about a split, to print and for --json."""
    captions = whole.rows["captions"][:, 0]
    counts = np.unique(captions, return_counts=True)[1]
    share, floor = loss_floor(whole.pairs[:, :2], batch_size)
    kinds = {}
    for kind in (*faults.ERRORS, *faults.NOTES):
        if count := whole.faults.counts[kind]:
            places = [{"file": file, "line" if isinstance(at, int) else "member": at or None, "what": what}
                      for file, at, what in whole.faults.places[kind]]
            kinds[kind] = {"error": kind in faults.ERRORS, "count": count, "places": places}
    return {
        "layout": {"jsonl": "list", "csv": "list"}.get(whole.split.layout, whole.split.layout),
        "files": [faults.shown(file) for file in whole.split.files],
        "pictures": len(whole.rows["pictures"]), "captions": len(captions), "pairs": len(whole.pairs),
        "repeated_captions": float(counts[counts > 1].sum() / max(1, len(captions))),
        "batch_size": batch_size, "repeated_in_batch": float(share), "loss_floor": float(floor),
        "tokens": dict(sorted(whole.tokens.items())), "short_sides": dict(sorted(whole.sides.items())),
        "kinds": kinds}


def print_report(name: str, found: dict, args: argparse.Namespace):
    print(f"\n{name}: {', '.join(found['files'][:2])}" + ", ..." * (len(found["files"]) > 2))
    print(f"   {found['pictures']:,} pictures, {found['captions']:,} captions, {found['pairs']:,} pairs")
    print(f"   {found['repeated_captions']:.1%} of the captions come more than once; in a batch of "
          f"{args.batch_size:,}, {found['repeated_in_batch']:.1%} of the pairs\n"
          f"   share a caption or a picture; with one-hot targets the loss then stays above "
          f"{found['loss_floor']:.4f}")
    print_histogram(f"tokens of a caption ({args.context_length} are read)", found["tokens"], TOKENS)
    print_histogram("shorter side of a picture, pixels", found["short_sides"], SIDES)
    for kind, row in found["kinds"].items():
        advice = faults.ERRORS.get(kind) or faults.NOTES[kind]
        print(f"   {'ERROR' if row['error'] else 'note '} {row['count']:>9,}  {kind}: {advice}")
        for place in row["places"][:args.show]:
            where = named(place["file"], place.get("line") or place.get("member") or "")
            print(f"   {'':18}{where}" + f": {place['what']}" * bool(place["what"]))
    if not found["kinds"]:
        print("   nothing to complain about")


def print_histogram(title: str, counts: dict[int, int], edges: tuple[int, ...]):
    """A bar for each edge up to the next; the longest is 40 blocks."""
    bars = [sum(count for value, count in counts.items() if low <= value < high)
            for low, high in zip(edges, (*edges[1:], float("inf")))]
    print(f"   {title}" + ": none read" * (not sum(bars)))
    for low, high, count in zip(edges, (*edges[1:], None), bars):
        if count:
            eighths = -(-320 * count // max(bars))
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
            print(f"   {low:>7} {f'to {high - 1}' if high else 'or more':<8}{bar:<42}{count:,}")


# ------------------------------------------------------------------------------------------------------------
# the command


def at_least(low: int):
    """A type for argparse: whole numbers from `low` on."""
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: expected {low} or more")
        return int(text)
    return number


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("path", metavar="PATH", help="folder of a data set or of shards, or shards as "
                        '"name-{00000..00099}.tar" or "name-*.tar"')
    parser.add_argument("--split", default="", help="check this split only, not all that are there")
    parser.add_argument("--no-pictures", action="store_true", help="do not decode pictures: much faster")
    parser.add_argument("--context-length", type=at_least(3), default=52, metavar="T",
                        help="tokens of a caption that training reads")
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="B",
                        help="for the bound that repeats put on the loss")
    parser.add_argument("--show", type=at_least(0), default=5, metavar="N",
                        help="places to print of each kind")
    parser.add_argument("--json", default="", metavar="FILE",
                        help=f"write the report there, with up to {faults.CAP:,} places of each kind")
    parser.add_argument("--workers", type=at_least(0), default=os.cpu_count(), metavar="N",
                        help="processes that read; 0: only this one")


def run(args: argparse.Namespace) -> int:
    """Checks a set and prints the report -> exit code: 1 if there is an error, 0 if there are at most notes.
    DataError if there is nothing to check."""
    names = [args.split] if args.split else splits_of(args.path)
    splits = [split for name in names if (split := pieces.Split(name, *find(args.path, name))).files]
    if not splits:
        raise DataError(f"{args.path}: no split {args.split or 'at all'} in it; expected SPLIT_imgs.tsv with "
                        "SPLIT_texts.jsonl, SPLIT.jsonl, SPLIT.csv, or shards *.tar")
    wholes = {split.name: Whole(split) for split in splits}
    tasks = itertools.chain.from_iterable(pieces.tasks(split, args) for split in splits)
    total = sum(pieces.size_of(file) for split in splits for file in split.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        for part in in_processes(pieces.work, tasks, args.workers):
            wholes[part.split].add(part)
            bar.update(part.size)
    for whole in wholes.values():
        whole.close()
    for name, whole in wholes.items():
        if name != "train" and "train" in wholes:
            whole.repeated("caption in train too", "captions", 0, wholes["train"])
            whole.repeated("picture in train too", "pictures", 1, wholes["train"])
    found = {name: summary(whole, args.batch_size) for name, whole in wholes.items()}
    if args.json:
        write_json(args.json, {"path": args.path, "splits": found})
    for name in found:
        print_report(name, found[name], args)
    return int(any(row["error"] for split in found.values() for row in split["kinds"].values()))
