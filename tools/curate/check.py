"""
A data set before it is trained on: every fault with its place, and what else is worth knowing.

    python -m tools.curate check path/to/MUGE
    python -m tools.curate check "shards/{00000..00099}.tar" --json report.json

What can be wrong with a caption or a picture: tools/curate/faults.py. Which files there are and what is in a piece of one:
tools/curate/pieces.py. Here: who reads them, what only the whole set shows (repeats, leaks, missing pictures), the report.

Memory: some 100 bytes a pair, as all that stays of captions, ids and pictures are digests of 8 bytes; repeats
are found by sorting them. That two of 200 M are equal by chance has odds of 1 in 1,000.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tarfile

import numpy as np
from tqdm import tqdm

from tools.curate import faults
from tools.curate import pieces
from sources.pairs import DataError
from common import write_json

TOKENS = (2, 4, 8, 12, 16, 24, 32, 40, 53, 77, 129, 513)  # of a caption, lower ends of a histogram's bars
SIDES = (0, 32, 64, 128, 192, 224, 256, 336, 512, 1024, 2048, 4096)  # the shorter of a picture, in pixels

# ------------------------------------------------------------------------------------------------------------
# who reads the pieces


def parts(tasks, workers: int):
    """Yields what was found in each piece, in order, read by `workers` processes (0: by this one). Few are
    under way at a time, so that their number costs no memory."""
    if not workers:
        yield from map(pieces.work, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=leave_ctrl_c_to_the_parent)
    try:
        pending = collections.deque()
        for task in tasks:
            pending.append(pool.submit(pieces.work, task))
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
    """A split, put together: faults, rows of digests (see faults.Part), token counts, short sides."""

    def __init__(self, split: pieces.Split):
        self.split, self.faults, self.lines = split, faults.Faults(), collections.Counter()
        self.rows = {name: [np.empty((0, k), dtype=np.uint64)] for name, k in faults.COLUMNS.items()}
        self.tokens, self.sides = collections.Counter(), collections.Counter()

    def add(self, part: faults.Part):
        """In order: the lines of a piece are numbered from where the one before it ended."""
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
        """What needs all pieces."""
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
        """Of a row: (file, line or name of a member)."""
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
        """Rows whose digest an earlier row has, or any of another split."""
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
        """Ids of captions that the TSV has not; their lines are read again to say which."""
        path, pairs = self.split.files[-1], self.rows["pairs"]
        pairs = pairs[~np.isin(pairs[:, 1], self.rows["pictures"][:, 0])]
        if not len(pairs) or not os.path.isfile(self.split.files[0]):
            return  # a missing file is one fault
        wanted = collections.defaultdict(set)  # line -> digests
        for _, name, at in pairs[:faults.CAP].tolist():
            wanted[at].add(name)
        places = []
        with open(path, "rb") as file:
            for at in range(1, max(wanted, default=0) + 1):
                line = pieces.next_line(file)
                for value in json.loads(line.decode("utf-8-sig"))["image_ids"] if at in wanted else ():
                    if faults.digest(faults.id_text(value)) in wanted[at]:
                        places.append((path, at, f"image id {faults.id_text(value)}"))
        self.faults.add("id not in the TSV", places, len(pairs))


def loss_floor(pairs: np.ndarray, batch_size: int, batches: int = 8) -> tuple[float, float]:
    """pairs [P, 2], digests of caption and picture -> (share of the pairs of a batch whose caption or picture
    another has, the loss below which one-hot targets cannot come): data.repeats, for random batches."""
    shared, floors = [0.0], [0.0]
    for seed in range(batches if len(pairs) else 0):
        rng = np.random.default_rng(seed)
        rows = pairs[rng.choice(len(pairs), min(batch_size, len(pairs)), replace=False)]
        counts = []
        for column in rows.T:
            _, which, count = np.unique(column, return_inverse=True, return_counts=True)
            counts.append(count[which])
        shared.append((np.max(counts, axis=0) > 1).mean())
        floors.append(np.log(counts).mean(axis=1).max())  # one of n alike gets 1/n at most: ln n
    return sum(shared) / batches, sum(floors) / batches


# ------------------------------------------------------------------------------------------------------------
# the report


def named(file: str, at: int | str) -> str:
    return f"{file} line {at}" if isinstance(at, int) else f"{file} {at}".rstrip()


def summary(whole: Whole, batch_size: int) -> dict:
    """All that is known of a split, for --json and to print."""
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
        "layout": whole.split.layout, "files": [faults.shown(file) for file in whole.split.files],
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
    parser.add_argument("--split", help="only this one (default: all that are there)")
    parser.add_argument("--no-pictures", action="store_true", help="do not look into pictures: much faster")
    parser.add_argument("--context-length", type=at_least(3), default=52, metavar="T",
                        help="tokens of a caption that are read (default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="B",
                        help="for the loss that repeats allow (default: %(default)s)")
    parser.add_argument("--show", type=at_least(0), default=5, metavar="N",
                        help="places to print of each kind (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE",
                        help=f"write it all there, with up to {faults.CAP:,} places of each kind")
    parser.add_argument("--workers", type=at_least(0), default=os.cpu_count(), metavar="N",
                        help="processes that read; 0: this one (default: the cores, %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Checks, prints -> exit code: 1 if there is an error; notes do not count. DataError if there is nothing
    to check."""
    splits = pieces.find(args.path, args.split)
    wholes = {name: Whole(split) for name, split in splits.items()}
    tasks = itertools.chain.from_iterable(pieces.tasks(split, args) for split in splits.values())
    total = sum(pieces.size(file) for split in splits.values() for file in split.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        for part in parts(tasks, args.workers):
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


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m tools.curate check", description=(
        "What is wrong with a data set, and where. Exit code 1 if there is an error, 0 if at most notes."))
    add_arguments(parser)
    try:
        sys.exit(run(parser.parse_args(argv)))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
