"""
How fast, how much memory, and beside whom: medians after a warm-up, next to each peer that is installed, in
the same run. (Once only: what takes minutes or starts a process of its own.)

    python -m tools.bench encode                         # pictures and captions a second
    python -m tools.bench load                           # a file until it is a model: time and memory
    python -m tools.bench eval                           # recall; --squares 200000 for a large one
    python -m tools.bench start                          # until a command answers, until train.py's first step
    python -m tools.bench grow                           # everything doubled three times: where does it bend?
    python -m tools.bench train                          # steps of stage 1 and 2, with cached features, in chunks
    python -m tools.bench profile                        # the ten operations that take most of a step
    python -m tools.bench loss                           # the loss alone, as a matrix and in tiles: time and memory
    python -m tools.bench data                           # pictures, captions, indices, order of 200 million pairs
    python -m tools.bench all --device cuda --write      # on a GPU, with tables into BENCHMARKS.md
    python -m tools.bench train --device cuda --models ViT-B-16 --stages 2 --batch 32768 --chunk 2048

Peers are the official code (cn_clip), transformers and open_clip (tools/bench/peers.py). What is measured:
tools/bench/use.py, tools/bench/training.py, tools/bench/data.py.
"""

import argparse
import json
import os
import sys

import torch

import model
from tools.bench.data import bench_data
from tools.bench.peers import HERE, machine, table
from tools.bench.training import bench_loss, bench_profile, bench_train, loss_once
from tools.bench.use import bench_encode, bench_eval, bench_grow, bench_load, bench_start, load_once, recall_once

TASKS = {  # task -> its table
    "load": lambda args: bench_load(args.models, args.device, args.runs),
    "encode": lambda args: bench_encode(args.models, args.device, args.batch, args.runs),
    "train": lambda args: bench_train(
        args.models, args.stages, args.device, args.batch, args.runs, args.chunk),
    "profile": lambda args: bench_profile(args.models, args.device, args.batch, args.runs),
    "loss": lambda args: bench_loss(args.batches, args.width, args.device, args.runs),
    "data": lambda args: bench_data(args.runs, args.lines),
    "eval": lambda args: bench_eval(
        args.device, args.runs, args.queries, args.gallery, args.squares, args.width),
    "start": lambda args: bench_start(args.runs),
    "grow": lambda args: bench_grow(
        args.models[0], args.device, args.runs, args.batch, args.queries, args.width),
}
ONCE = {  # what a measurement starts in a process of its own -> its function, of strings
    "load": load_once,
    "recall": lambda count, width, device: recall_once(int(count), int(width), device),
    "loss": lambda batch, width, dense, device, runs: loss_once(
        int(batch), int(width), dense == "matrix", device, int(runs)),
}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Names the defaults and leaves the lines of the examples as they are."""


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["once"]:
        print(json.dumps(ONCE[argv[1]](*argv[2:])))
        return
    what, examples, _ = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser("python -m tools.bench", description=what, epilog=examples, formatter_class=Help)
    parser.add_argument("task", choices=(*TASKS, "all"), help="see the end")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", default=["ViT-B-16"], choices=model.MODELS, metavar="NAME",
                        help="any of " + ", ".join(model.MODELS))
    parser.add_argument("--stages", nargs="+", default=["1", "2"], choices=("1", "2"), help="of `train`")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step, pictures together")
    parser.add_argument("--chunk", type=int, default=4, help="pairs a chunk, in the row that is chunked")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="of `loss`")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the set that `data` reads")
    parser.add_argument("--queries", type=int, default=5000, help="texts of `eval` and `grow`")
    parser.add_argument("--gallery", type=int, default=30_000, help="pictures of `eval`")
    parser.add_argument("--squares", type=int, nargs="*", default=[20_000],
                        help="of `eval`: as many texts as pictures")
    parser.add_argument("--width", type=int, default=512, help="E, of `loss`, `eval` and `grow`")
    parser.add_argument("--runs", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--write", action="store_true", help="append the tables to BENCHMARKS.md")
    args = parser.parse_args(argv)
    for flag in ("runs", "batch", "chunk", "queries", "lines", "width"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: expected at least 1")
    if args.gallery < args.queries or min([*args.squares, *args.batches, 1]) < 1:
        parser.error("--gallery: expected at least as many as --queries; --squares, --batches at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    for task in TASKS if args.task == "all" else [args.task]:
        print(task)
        text = (f"\n## {task}\n\n`python -m tools.bench {' '.join(argv)}`  \n{machine(args.device)}\n\n"
                f"{table(TASKS[task](args))}\n")
        print(text)
        if args.write:  # task by task: a later one may fail
            with open(os.path.join(HERE, "BENCHMARKS.md"), "a", encoding="utf-8") as file:
                file.write(text)


if __name__ == "__main__":
    main()
