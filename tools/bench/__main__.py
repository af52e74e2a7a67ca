"""
How fast we are, how much memory that takes, and how the peers do: medians after a warm-up, taken in turn with
every peer that is installed.

    python -m tools.bench encode                         # pictures and captions per second
    python -m tools.bench load                           # from a file to a model
    python -m tools.bench eval                           # recall; --squares 200000 for a large gallery
    python -m tools.bench train                          # steps of both stages, in chunks, from a cache
    python -m tools.bench loss                           # the loss alone, as a matrix and in tiles
    python -m tools.bench data                           # pictures, captions, an index
    python -m tools.bench all --device cuda --write      # on a GPU, adds tables to docs/benchmarks.md
    python -m tools.bench train --device cuda --models ViT-B-16 --stages 2 --batch 32768 --chunk 2048

The peers are the official code (cn_clip), transformers and open_clip.
"""

import argparse
import os
import sys

import torch

import model
from tools.bench.data import bench_data
from tools.bench.peers import machine, table
from tools.bench.training import bench_loss, bench_train
from tools.bench.use import bench_encode, bench_eval, bench_load

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TASKS = {"load": bench_load, "encode": bench_encode, "eval": bench_eval, "train": bench_train,
         "loss": bench_loss, "data": bench_data}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults and leaves the lines of the examples as they are."""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 1")
    return int(text)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    what, examples, _ = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser("python -m tools.bench", description=what, epilog=examples,
                                     formatter_class=Help)
    add = parser.add_argument
    add("task", choices=(*TASKS, "all"), help="see the examples below")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"),
        help="where models run")
    add("--models", nargs="+", default=["ViT-B-16"], choices=model.MODELS, metavar="NAME",
        help="any of " + ", ".join(model.MODELS))
    add("--stages", nargs="+", default=["1", "2"], choices=("1", "2"), help="stages of `train`")
    add("--batch", type=positive, default=8, help="pairs per step, or pictures encoded together")
    add("--chunk", type=positive, default=4, help="pairs per chunk, in the rows with chunks")
    add("--batches", type=positive, nargs="+", default=[2048, 4096, 8192, 16384], help="of `loss`")
    add("--lines", type=positive, default=1_000_000, help="pairs that `data` indexes")
    add("--queries", type=positive, default=5000, help="texts of `eval`")
    add("--gallery", type=positive, default=30_000, help="pictures of `eval`, at least as many as --queries")
    add("--squares", type=positive, nargs="*", default=[20_000],
        help="further sizes of `eval`, each with as many texts as pictures")
    add("--width", type=positive, default=512, help="numbers of a feature in `loss` and `eval`")
    add("--runs", type=positive, default=3, help="timed runs, of which the median counts")
    add("--write", action="store_true", help="append the tables to docs/benchmarks.md")
    args = parser.parse_args(argv)
    if args.gallery < args.queries:
        parser.error(f"--gallery {args.gallery}: expected at least as many as --queries {args.queries}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    for task in TASKS if args.task == "all" else [args.task]:
        print(task)
        torch.manual_seed(0)
        text = (f"\n## {task}\n\n`python -m tools.bench {' '.join(argv)}`  \n{machine(args.device)}\n\n"
                f"{table(TASKS[task](args))}\n")
        print(text)
        if args.write:  # after each task, because a later one may fail
            with open(f"{HERE}/docs/benchmarks.md", "a", encoding="utf-8") as file:
                file.write(text)


if __name__ == "__main__":
    main()
