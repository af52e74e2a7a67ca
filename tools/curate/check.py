"""
A data set before a run trains on it: every fault with its place, and what else is worth knowing.

tools/curate/pieces.py says what can be wrong and checks one piece of a file. This file gives the pieces to
processes, finds what only the whole set shows (repeats, leaks, missing pictures) and writes the report.

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
import torch
from tqdm import tqdm

from common import write_json
from sources.layouts import find, splits_of
from sources.pairs import DataError
from tools.curate.pieces import (
    CAP, COLUMNS, ERRORS, NOTES, SHARD, Findings, Piece, named, pieces_of, shown, size_of, work)
from training.report import loss_floor

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
        # a picture that several pieces of a list name was read in each
        pictures = pictures[np.sort(np.unique(pictures[:, 0], return_index=True)[1])]
        self.rows["pictures"], self.pairs = pictures, pairs[(pairs[:, 0] != 0) & there]
        if self.layout == "official":
            self.add_rows("picture unused", "pictures", pictures[~np.isin(pictures[:, 0], pairs[:, 1])])
        self.repeated("id twice", "text_ids", 0)
        self.repeated("repeated caption", "captions", 0)
        self.repeated("repeated picture", "pictures", 1)
        if not len(self.pairs):
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


def summary(whole: Whole, batch_size: int) -> dict:
    """All that is known about a split, to print and for --json."""
    captions = whole.rows["captions"][:, 0]
    counts = np.unique(captions, return_counts=True)[1]
    keys = torch.from_numpy(whole.pairs[:, :2].astype(np.int64))  # [P, 2], caption and picture
    drawn = [np.random.default_rng(seed).choice(len(keys), min(batch_size, len(keys)), replace=False)
             for seed in range(8 if len(keys) else 0)]
    share, floor = np.mean([loss_floor(keys[rows]) for rows in drawn] or [(0, 0)], axis=0).tolist()
    kinds = {kind: {
        "error": kind in ERRORS, "count": whole.counts[kind],
        "places": [{"file": file, "line" if isinstance(at, int) else "member": at or None, "what": what}
                   for file, at, what in whole.places[kind]]}
        for kind in (*ERRORS, *NOTES) if whole.counts[kind]}
    return {
        "files": [shown(file) for file in whole.files],
        "pictures": len(whole.rows["pictures"]), "captions": len(captions), "pairs": len(whole.pairs),
        "repeated_captions": counts[counts > 1].sum().item() / max(1, len(captions)),
        "batch_size": batch_size, "repeated_in_batch": share, "loss_floor": floor,
        "tokens": dict(sorted(whole.tokens.items())), "short_sides": dict(sorted(whole.sides.items())),
        "kinds": kinds}


def print_report(name: str, found: dict, show: int):
    print(f"\n{name}: {', '.join(found['files'][:2])}" + ", ..." * (len(found["files"]) > 2))
    print(f"   {found['pictures']:,} pictures, {found['captions']:,} captions, {found['pairs']:,} pairs")
    print(f"   {found['repeated_captions']:.1%} of the captions come more than once; in a batch of "
          f"{found['batch_size']:,}, {found['repeated_in_batch']:.1%} of the pairs\n"
          f"   share a caption or a picture; with one-hot targets the loss then stays above "
          f"{found['loss_floor']:.4f}")
    for title, counts in (("tokens of a caption", found["tokens"]),
                          ("shorter side of a picture, pixels", found["short_sides"])):
        if counts:
            reached = np.cumsum(list(counts.values())) / sum(counts.values())
            at = {q: list(counts)[np.searchsorted(reached, q / 100)] for q in (0, 5, 25, 50, 75, 95, 100)}
            print(f"   {title}: " + ", ".join(f"{q}% {value:,}" for q, value in at.items()))
    for kind, row in found["kinds"].items():
        print(f"   {'ERROR' if row['error'] else 'note '} {row['count']:>9,}  {kind}")
        for place in row["places"][:show]:
            where = named(place["file"], place.get("line") or place.get("member") or "")
            print(f"   {'':18}{where}" + f": {place['what']}" * bool(place["what"]))
    if not found["kinds"]:
        print("   nothing to complain about")


# ------------------------------------------------------------------------------------------------------------
# the command


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("path", metavar="PATH", help="folder of a data set or of shards, or shards as "
                        '"name-{00000..00099}.tar" or "name-*.tar"')
    parser.add_argument("--split", default="", help="check this split only, not all that are there")
    parser.add_argument("--no-pictures", action="store_true", help="do not decode pictures: much faster")
    parser.add_argument("--context-length", type=int, default=52, metavar="T",
                        help="tokens of a caption that training reads")
    parser.add_argument("--batch-size", type=int, default=256, metavar="B",
                        help="for the bound that repeats put on the loss")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="places to print of each kind")
    parser.add_argument("--json", default="", metavar="FILE",
                        help=f"write the report there, with up to {CAP:,} places of each kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                        help="processes that read; 0: only this one")


def run(args: argparse.Namespace) -> int:
    """Checks a set and prints the report -> exit code: 1 if there is an error, 0 if there are at most notes.
    DataError if there is nothing to check."""
    names = [args.split] if args.split else splits_of(args.path)
    wholes = [whole for name in names if (whole := Whole(name, *find(args.path, name))).files]
    if not wholes:
        raise DataError(f"{args.path}: no split {args.split or 'at all'} in it; expected SPLIT_imgs.tsv with "
                        "SPLIT_texts.jsonl, SPLIT.jsonl, SPLIT.csv, or shards *.tar")
    total = sum(size_of(file) for whole in wholes for file in whole.files)
    by_name = {whole.name: whole for whole in wholes}
    todo = (piece for whole in wholes for piece in pieces_of(whole.name, whole.layout, whole.files, args))
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        for piece in in_processes(work, todo, args.workers):
            by_name[piece.split].take(piece)
            bar.update(piece.size)
    for whole in wholes:
        whole.close()
    for whole in wholes:
        if whole.name != "train" and "train" in by_name:
            whole.repeated("caption in train too", "captions", 0, by_name["train"])
            whole.repeated("picture in train too", "pictures", 1, by_name["train"])
    found = {whole.name: summary(whole, args.batch_size) for whole in wholes}
    if args.json:
        write_json(args.json, {"path": args.path, "splits": found})
    for name in found:
        print_report(name, found[name], args.show)
    return int(any(row["error"] for split in found.values() for row in split["kinds"].values()))
