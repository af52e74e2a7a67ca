"""
Make a data set fit to train on (paper, sec. 2.2): check it, filter it, pack it.

    python -m tools.curate check PATH                       what is wrong with a set, and where (check.py)
    python -m tools.curate filter SOURCE OUT [rules]        a new set without pairs that break a rule (rules.py)
    python -m tools.curate pack SOURCE OUT [--resize 224]   a set of any layout -> tar shards (rewrite.py)
    python -m tools.curate unpack SOURCE OUT                a set of any layout -> pictures and a list, or TSV

SOURCE is what train.py --data takes (sources/layouts.py). OUT is a new folder, which appears when it is
complete. Nothing here may run in a worker: a process started by multiprocessing cannot import a __main__.py.
"""

import argparse
import os
import sys

import torch

import model
from common import one_line_errors
from sources.layouts import find
from tools.curate import check
from tools.curate.rewrite import WRITERS, rewrite
from tools.curate.rules import Rules, read_words



def add_filter(parser: argparse.ArgumentParser):
    parser.add_argument("--split", default="train", help="the split to filter; others stay whole")
    parser.add_argument("--model", default="", help="score pairs by this weights file or released name")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to score on")
    parser.add_argument("--min-score", type=float, default=0.26, help="least cosine of picture and caption; "
                        "0.26 is the paper's for mCLIP, so look at the percentiles of your model")
    parser.add_argument("--min-chars", type=int, default=5, help="least characters of a caption (paper: 5)")
    parser.add_argument("--max-chars", type=int, default=50, help="most characters of a caption (paper: 50)")
    parser.add_argument("--words", default="", metavar="FILE", help="drop captions with a word of this file, "
                        "one on each line: advertising, file names (paper, sec. 2.2)")
    parser.add_argument("--min-side", type=int, default=0, help="least pixels of a picture's shorter side")
    parser.add_argument("--duplicates", default="exact", choices=("none", "exact", "near"),
                        help="keep only the first of the pictures with the same bytes, or that look alike")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m tools.curate", description=__doc__.split("\n\n")[0].strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help_of = {"check": "print what is wrong with a set, and where; exit code 1 if a run would stop at it",
               "filter": "write a new set without the pairs that break a rule",
               "pack": "write a set as tar shards", "unpack": "write a set as pictures and a list, or as TSV"}
    added = {name: commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, text in help_of.items()}
    check.add_arguments(added["check"])
    for name in ("filter", "pack", "unpack"):
        added[name].add_argument("source", metavar="SOURCE", help="what train.py --data takes")
        added[name].add_argument("out", metavar="OUT", help="a new folder")
        added[name].add_argument("--workers", type=check.natural, default=os.cpu_count(), help="processes that read")
    add_filter(added["filter"])
    for name in ("pack", "unpack"):
        added[name].add_argument("--resize", type=check.natural, default=0, metavar="N",
                                 help="shrink larger pictures to N pixels at the shorter side (224, or 336), "
                                 "upright; 0 keeps every byte")
    added["unpack"].add_argument("--to", default="folder", choices=("folder", "official"),
                                 help="pictures and a list, or TSV + JSONL")
    args = parser.parse_args(argv)
    if args.command == "check":
        sys.exit(check.run(args))
    if args.command == "pack":
        rewrite(args.source, args.out, "shards", args.workers, resize=args.resize)
    elif args.command == "unpack":
        rewrite(args.source, args.out, args.to, args.workers, resize=args.resize)
    else:
        rules = Rules(
            args.min_chars, args.max_chars, read_words(args.words) if args.words else (), args.min_side,
            args.duplicates, model.load(args.model, args.device)[0] if args.model else None, args.min_score)
        found, _ = find(args.source, args.split)
        layout = found if found in WRITERS else "folder"
        rewrite(args.source, args.out, layout, args.workers, args.split, rules)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for terminals without Chinese or a histogram's blocks
    with one_line_errors(then="; nothing was written under the final name"):
        main()
