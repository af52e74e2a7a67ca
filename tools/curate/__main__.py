"""
Make a data set fit to train on (paper, sec. 2.2): check it, filter it, split it, pack it.

    python -m tools.curate check PATH                       what is wrong with a set, and where (check.py)
    python -m tools.curate filter SOURCE OUT [rules]        a new set without pairs that break a rule
    python -m tools.curate split SOURCE OUT [--valid 0.1]   a new set with a part of train as its split valid
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
from common import Flags, one_line_errors
from sources.classes import text_lines
from sources.layouts import find
from sources.pairs import DataError
from tools.curate import check
from tools.curate.rewrite import WRITERS, rewrite


def arguments() -> Flags:
    parser = Flags("python -m tools.curate", description=__doc__.split("\n\n")[0].strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
            ("check", "print what is wrong with a set, and where; exit code 1 for errors or a missing valid"),
            ("filter", "write a new set without the pairs that break a rule"),
            ("split", "write a new set with a part of its training pairs as the split valid"),
            ("pack", "write a set as tar shards"),
            ("unpack", "write a set as pictures and a list, or as TSV")):
        command = commands.add_parser(name, help=text, description=text,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name == "check":
            check.add_arguments(command)
            continue
        command.set_defaults(split="train", resize=0, valid=0, to="shards" if name == "pack" else "")
        add = command.add_argument
        add("source", metavar="SOURCE", help="what train.py --data takes")
        add("out", metavar="OUT", help="a new folder")
        add("--workers", type=int, default=os.cpu_count(), help="processes that read; 0: only this one")
        if name == "filter":
            add("--split", default="train", help="the split to filter; others stay whole")
            add("--model", default="", help="score pairs by this weights file or released name")
            devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
            add("--device", default=devices[0], choices=devices, help="to score on")
            add("--min-score", type=float, default=0.26, help="least cosine of picture and caption; 0.26 is "
                "the paper's for mCLIP, so look at the percentiles of your model")
            add("--min-chars", type=int, default=5, help="least characters of a caption (paper: 5)")
            add("--max-chars", type=int, default=50, help="most characters of a caption (paper: 50)")
            add("--words", default="", metavar="FILE", help="drop captions with a word of this file, one on "
                "each line: advertising, file names (paper, sec. 2.2)")
            add("--min-side", type=int, default=0, help="least pixels of a picture's shorter side")
            add("--duplicates", default="exact", choices=("none", "exact", "near"),
                help="keep only the first of the pictures with the same bytes, or that look alike")
        elif name == "split":
            add("--valid", type=float, default=0.1, metavar="SHARE", help="of the training pairs; those that "
                "share a picture or a caption stay together")
        else:
            add("--resize", type=int, default=0, metavar="N", help="shrink larger pictures to N pixels at "
                "the shorter side (224, or 336), upright; 0 keeps every byte")
        if name == "unpack":
            add("--to", default="folder", choices=("folder", "official"),
                help="pictures and a list, or TSV + JSONL")
    return parser


def main(argv: list[str] | None = None):
    args = arguments().parse_args(argv)
    if args.command == "check":
        sys.exit(check.run(args))
    if args.command == "split" and not 0 < args.valid < 1:
        raise DataError(f"--valid {args.valid}: expected a share of the pairs, over 0 and under 1")
    if args.command == "filter":
        if args.words and not os.path.isfile(args.words):
            raise DataError(f"{args.words}: no such file; expected one word on each line")
        args.words = [line for _, line in text_lines(args.words)] if args.words else ()
        args.clip = model.load(args.model, args.device)[0] if args.model else None
    layout = args.to or find(args.source, args.split)[0]
    rewrite(args.source, args.out, layout if layout in WRITERS else "folder", args.workers,
            args if args.command == "filter" else None, args.resize, args.valid)
    print(check.next_step(args.out))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for terminals without Chinese
    with one_line_errors(then="; nothing was written under the final name"):
        main()
