"""
How fast, how much memory, and beside whom: every figure is a median after a warm-up, next to each peer that
is installed, in the same run.

    python bench.py train                          # steps of stage 1 and 2, with cached features, in chunks
    python bench.py loss                           # the loss alone, as a matrix and in tiles: time and memory
    python bench.py data                           # pictures, captions, indices, order of 200 million pairs
    python bench.py all --device cuda --write      # on a GPU, with tables into BENCHMARKS.md
    python bench.py train --device cuda --models ViT-B-16 --stages 2 --batch 32768 --chunk 2048

Peers: the official code (cn_clip) and open_clip, float32 on a CPU, under the same autocast on a GPU. What the
official code computes is compared before it is timed. TFLOP/s count 2 per multiply-add and three forward
passes a trained tower (the recomputation of chunks is not work that counts).
"""

import argparse
import datetime
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F

import model
import train
from bench_data import CAPTION, bench_data, seconds_of
from data import tokenize
from loss import backward_in_chunks, contrastive_loss

PEAK = 790  # bf16 TFLOP/s of an H200, measured there with an 8192-cube matrix product
RN50_GFLOP = 12.22  # of an image, open_clip's docs/model_profile.csv; the others by formula
PEERS = {"official": "cn_clip", "open_clip": "open_clip"}


# ------------------------------------------------------------------------------------------------------------
# work


def transformer_gflop(tokens: int, width: int, layers: int) -> float:
    """Forward, one sample: q, k, v, out and the MLP are 12 D^2 multiply-adds a token, attention 2 T D."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width) / 1e9


def gflop(config: model.ModelConfig, tokens: int) -> tuple[float, float]:
    """-> GFLOP of one image and of one caption of `tokens` tokens, forward."""
    v, t = config.visual, config.text
    image = RN50_GFLOP
    if isinstance(v, model.ViTConfig):
        patches = (v.resolution // v.patch_size) ** 2
        image = transformer_gflop(patches + 1, v.width, v.layers)
        image += 2 * patches * 3 * v.patch_size**2 * v.width / 1e9
    return image, transformer_gflop(tokens, t.width, t.layers)


# ------------------------------------------------------------------------------------------------------------
# the clock


def median_time(step, device: str, runs: int) -> float:
    """Seconds of one call: the median of `runs` after one that warms up."""
    def once():
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return statistics.median([seconds_of(once) for _ in range(runs + 1)][1:])


def optimizer_of(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-6, fused=True)


# ------------------------------------------------------------------------------------------------------------
# one step of training, ours and theirs


def our_step(config: model.ModelConfig, batch: int, device: str, frozen: bool, cached: bool, chunk: int):
    """-> (a function that makes one step, the model, its batch)."""
    torch.manual_seed(0)
    clip = model.ChineseCLIP(config).to(device)
    clip.visual.requires_grad_(not frozen)
    if device == "cuda" and isinstance(clip.visual, model.ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)
    optimizer, ids = optimizer_of(clip.parameters()), tokenize([CAPTION] * batch)  # ids wait on the CPU
    pictures = torch.randn(batch, 3, config.visual.resolution, config.visual.resolution, device=device)
    if cached:
        pictures = torch.randn(batch, config.embed_dim, device=device)

    def forward(*part):
        with model.autocast(torch.device(device)):
            return clip(*part)

    def step():
        train.set_train_mode(clip, frozen)
        optimizer.zero_grad(set_to_none=True)
        parts = list(zip(pictures.split(chunk or batch), ids.split(chunk or batch)))
        backward_in_chunks(forward, clip, parts, torch.manual_seed, contrastive_loss)
        optimizer.step()

    return step, clip, (pictures, ids)


def official_step(clip: model.ChineseCLIP, batch, device: str, frozen: bool):
    """The official model with our weights, its loss (training/train.py) and its optimizer."""
    from cn_clip.clip.model import CLIP
    v, t = clip.config.visual, clip.config.text
    is_vit = isinstance(v, model.ViTConfig)
    image = (v.layers, v.width, v.patch_size) if is_vit else (v.blocks, v.width, None)
    theirs = CLIP(
        clip.config.embed_dim, v.resolution, *image, t.vocab_size, t.dropout, "gelu", t.dropout, t.width,
        0.02, 4 * t.width, t.max_positions, t.heads, t.layers, t.token_types,
        vision_head_width=v.head_width if is_vit else 64)
    theirs.float().load_state_dict(clip.state_dict())
    theirs.to(device).visual.requires_grad_(not frozen)
    pictures, ids = batch[0], batch[1].to(device)
    with torch.no_grad():
        ours = clip.eval().get_similarity(pictures[:2], ids[:2])[0]
        image, text, scale = theirs.eval()(pictures[:2], ids[:2])
        assert (ours - scale * image @ text.T).norm() / ours.norm() < 1e-3, "ours and theirs differ"
    optimizer, labels = optimizer_of(theirs.parameters()), torch.arange(len(ids), device=device)

    def step():
        theirs.train()
        if frozen:
            theirs.visual.eval()
        optimizer.zero_grad(set_to_none=True)
        with model.autocast(torch.device(device)):
            image, text, scale = theirs(pictures, ids)
            logits = scale * image @ text.T
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        optimizer.step()

    return step


def open_clip_step(name: str, batch, device: str, frozen: bool):
    """open_clip's model of the same image tower, with its English text tower of 77 tokens."""
    import open_clip
    theirs = open_clip.create_model({"RN50": "RN50-quickgelu"}.get(name, name)).to(device)
    theirs.visual.requires_grad_(not frozen)
    pictures, ids = batch[0], torch.randint(1, 40_000, (len(batch[1]), 77), device=device)
    optimizer, loss_of = optimizer_of(theirs.parameters()), open_clip.ClipLoss()

    def step():
        theirs.train()
        optimizer.zero_grad(set_to_none=True)
        with model.autocast(torch.device(device)):
            loss_of(*theirs(pictures, ids)).backward()
        optimizer.step()

    return step


def bench_train(
    names: list[str], stages: list[str], device: str, batch: int, runs: int, chunk: int
) -> list[list[str]]:
    """A row each model and stage: ours plain, in chunks, with cached features; a peer's one way beside
    each."""
    rows = [["model", "stage", "pairs/s", "TFLOP/s", f"share of {PEAK}", "GB a pair", "official, pairs/s",
             "ratio", "open_clip, pairs/s", "ratio"]]
    for name in names:
        config, rates = model.MODELS[name], {}
        image, text = gflop(config, len(CAPTION) + 2)
        for stage, frozen, cached, pieces, work in (
                ("1", True, False, 0, image + 3 * text),
                (f"1, chunks of {chunk}", True, False, chunk, image + 3 * text),
                ("1, cached features", True, True, 0, 3 * text),
                ("2", False, False, 0, 3 * (image + text)),
                (f"2, chunks of {chunk}", False, False, chunk, 3 * (image + text))):
            if stage[0] not in stages:
                continue
            step, clip, batch_of = our_step(config, batch, device, frozen, cached, pieces)
            ours, memory = rate(step, batch, device, runs)
            row = [name, stage, "out of memory", "-", "-", "-"]
            if ours:
                teraflops = ours * work / 1e3
                row[2:] = [f"{ours:,.2f}", f"{teraflops:.3f}", f"{teraflops / PEAK:.1%}", memory]
            size = config.visual.resolution
            pictures = torch.randn(batch, 3, size, size, device=device)
            for peer, package in PEERS.items():
                if importlib.util.find_spec(package) is None:
                    row += ["absent", "-"]
                    continue
                if name not in list(model.MODELS)[:6]:
                    row += ["no such model", "-"]
                    continue
                if (peer, frozen) not in rates:  # a peer has one way to make a stage's step
                    theirs = (official_step(clip, (pictures, batch_of[1]), device, frozen)
                              if peer == "official"
                              else open_clip_step(name, (pictures, batch_of[1]), device, frozen))
                    rates[peer, frozen], _ = rate(theirs, batch, device, runs)
                    del theirs
                its = rates[peer, frozen]
                row.append(f"{its:,.2f}" if its else "out of memory")
                row.append(f"{ours / its:.2f}" if ours and its else "-")
            rows.append(row)
            print("   " + " | ".join(row), flush=True)
            del step, clip, batch_of, pictures
            gc.collect()
    return rows


def rate(step, batch: int, device: str, runs: int) -> tuple[float, str]:
    """-> (pairs a second, or 0 where a GPU's memory does not suffice; GB a pair at the peak beyond what was
    there before the first step, which on a CPU is not known)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        pairs = batch / median_time(step, device, runs)
    except torch.OutOfMemoryError:
        return 0.0, "-"
    if device == "cpu":
        return pairs, "-"
    return pairs, f"{(torch.cuda.max_memory_allocated() - before) / batch / 1e9:.4f}"


# ------------------------------------------------------------------------------------------------------------
# the loss alone


def loss_once(batch: int, width: int, dense: bool, device: str, runs: int) -> tuple[float, float]:
    """-> (seconds forward and backward, MB at the peak beyond the features themselves)."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, width, device=device), dim=1).requires_grad_()
                   for _ in range(2))
    scale = torch.tensor(50.0, device=device, requires_grad=True)

    def step():
        image.grad = text.grad = scale.grad = None
        contrastive_loss(image, text, scale, dense=dense).backward()

    before = peak_memory(device)
    seconds = median_time(step, device, runs)
    return seconds, peak_memory(device) - before


def peak_memory(device: str) -> float:
    """MB. On a CPU the most this process ever had: so each measurement has a process of its own."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1e3 if sys.platform != "darwin" else kilobytes / 1e6


def bench_loss(batches: list[int], width: int, device: str, runs: int) -> list[list[str]]:
    rows = [["batch", "width", "matrix, s", "matrix, MB", "tiles, s", "tiles, MB", "16 B D bytes, MB"]]
    for batch in batches:
        row = [f"{batch:,}", f"{width}"]
        for dense in (True, False):
            if dense and 6 * 4 * batch**2 > memory_limit(device):
                row += ["-", "too large"]
                continue
            command = [sys.executable, __file__, "loss-once", "--device", device, "--batch", str(batch),
                       "--width", str(width), "--runs", str(runs), *(["--dense"] if dense else [])]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, megabytes = json.loads(said)
            row += [f"{seconds:.3f}", f"{megabytes:,.0f}"]
        rows.append([*row, f"{16 * batch * width / 1e6:,.0f}"])
        print("   " + " | ".join(rows[-1]), flush=True)
    return rows


def memory_limit(device: str) -> float:
    """Bytes that a measurement may take: most of a GPU, half of this machine's memory."""
    if device == "cuda":
        return 0.9 * torch.cuda.get_device_properties(0).total_memory
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------------------------------------------------
# the command


def table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), name)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}; {datetime.date.today()}"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=("train", "loss", "data", "all", "loss-once"),
                        help="steps of training, the loss alone, reading data, all; loss-once is for `loss`")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", default=["ViT-B-16"], choices=model.MODELS, metavar="NAME")
    parser.add_argument("--stages", nargs="+", default=["1", "2"], choices=("1", "2"), help="of `train`")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--chunk", type=int, default=4, help="pairs a chunk, in the row that is chunked")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="of `loss`")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the set that `data` reads")
    parser.add_argument("--width", type=int, default=512, help="E, of `loss`")
    parser.add_argument("--runs", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="append the tables to BENCHMARKS.md")
    args = parser.parse_args(argv)
    if args.task == "loss-once":
        print(json.dumps(loss_once(args.batch, args.width, args.dense, args.device, args.runs)))
        return
    tables = {}
    if args.task in ("train", "all"):
        tables["train"] = bench_train(
            args.models, args.stages, args.device, args.batch, args.runs, args.chunk)
    if args.task in ("loss", "all"):
        tables["loss"] = bench_loss(args.batches, args.width, args.device, args.runs)
    if args.task in ("data", "all"):
        tables["data"] = bench_data(args.runs, args.lines)
    command = "python bench.py " + " ".join(sys.argv[1:] if argv is None else argv)
    text = "".join(f"\n## {name}\n\n`{command}`  \n{machine(args.device)}\n\n{table(rows)}\n"
                   for name, rows in tables.items())
    print(text)
    if args.write:
        with open("BENCHMARKS.md", "a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
