"""
How fast zhclip is, and how much memory it takes, beside the official code (cn_clip) and open_clip where they
are installed. Every time is a median after a warm-up, and all programs take turns.

    python -m tools.bench encode                         # pictures and captions per second
    python -m tools.bench onnx                           # the same, beside onnxruntime and OpenVINO
    python -m tools.bench load                           # from a file to a model
    python -m tools.bench eval                           # recall; --squares 200000 for a large gallery
    python -m tools.bench train                          # steps of both stages, in chunks, from a cache
    python -m tools.bench loss                           # the loss alone, as a matrix and in tiles
    python -m tools.bench data                           # pictures for training, on one core
    python -m tools.bench search                         # an index of photos, and searching in it
    python -m tools.bench all --device cuda --write      # on a GPU; appends its tables to docs/benchmarks.md
    python -m tools.bench train --device cuda --models ViT-B-16 --stages 2 --batch 32768 --chunk 2048
"""

import argparse
import contextlib
import os
import sys

import torch

import model
from common import Flags
from tools.bench.peers import machine
from tools.bench.search import bench_search
from tools.bench.training import bench_data, bench_loss, bench_train
from tools.bench.use import bench_encode, bench_eval, bench_load, bench_onnx

PAGE = os.path.join(os.path.dirname(model.__file__), "docs", "benchmarks.md")
TASKS = {"load": bench_load, "encode": bench_encode, "onnx": bench_onnx, "eval": bench_eval,
         "train": bench_train, "loss": bench_loss, "data": bench_data, "search": bench_search}


def lines_of(task: str, args: argparse.Namespace, command: str):
    """A section of docs/benchmarks.md: the command, the machine, and a table with the rows of the task."""
    yield f"\n## {task}\n\n`{command}`  \n{machine(args.device)}\n"
    for number, row in enumerate(TASKS[task](args)):
        yield f"| {' | '.join(row)} |" + ("\n|" + "---|" * len(row) if number == 0 else "")


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Flags("python -m tools.bench", description=__doc__,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=(*TASKS, "all"), help="see the examples above")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    add("--device", default=devices[0], choices=devices)
    add("--models", nargs="+", default=["ViT-B-16"], choices=model.MODELS, metavar="NAME",
        help=", ".join(model.MODELS))
    add("--stages", nargs="+", default=["1", "2"], choices=("1", "2", "lora"), help="of `train` (1 2)")
    add("--precision", default="", choices=model.DTYPES, help="of `train`, as train.py has it")
    add("--batch", type=int, default=8, help="pairs per step, or pictures encoded together (%(default)s)")
    add("--chunk", type=int, default=4, help="pairs per chunk, in the rows with chunks (%(default)s)")
    add("--batches", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="of `loss` (%(default)s)")
    add("--squares", type=int, nargs="*", default=[20_000], help="further sizes of `eval` (%(default)s)")
    add("--runs", type=int, default=3, help="timed runs, whose median is shown (%(default)s)")
    add("--write", action="store_true", help="append the tables to docs/benchmarks.md")
    args = parser.parse_args(argv)
    if min(args.batch, args.chunk, args.runs, *args.batches, *args.squares) < 1:
        parser.error("every number must be at least 1")
    for task in TASKS if args.task == "all" else [args.task]:
        torch.manual_seed(0)
        lines, out = [], sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # where models and peers report what they load
            for line in lines_of(task, args, f"python -m tools.bench {' '.join(argv)}"):
                print(line, file=out, flush=True)
                lines.append(line + "\n")
        if args.write:  # after each task, because a later one may fail
            with open(PAGE, "a", encoding="utf-8") as file:
                file.writelines(lines)


if __name__ == "__main__":
    main()
