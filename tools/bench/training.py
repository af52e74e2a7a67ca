"""
How fast training is: whole steps of both stages, where their time goes, and the loss alone. The tasks
`train`, `profile` and `loss` of bench.py.

TFLOP/s count 2 per multiply-add and three forward passes a trained tower (the recomputation of chunks is not
work that counts).
"""

import gc
import json
import math
import os

import torch
import torch.nn.functional as F

import model
import train
from tools.bench.peers import (
    CAPTION, gflop, in_turn, median_time, memory_of, peers_of, python, say)
from training.chunks import backward_in_chunks
from data import tokenize
from loss import contrastive_loss
from training.tiles import tiled_loss

# bf16 TFLOP/s of an 8192-cube matrix product on an H200: a figure from elsewhere, no code of ours ran on one
PEAK = 790


def optimizer_of(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-6, fused=True)


# ------------------------------------------------------------------------------------------------------------
# one step of training, ours and theirs


def our_model(config: model.ModelConfig, device: str, frozen: bool):
    """-> (a new model, its optimizer)."""
    torch.manual_seed(0)
    clip = model.ChineseCLIP(config).to(device)
    clip.visual.requires_grad_(not frozen)
    if device == "cuda" and isinstance(clip.visual, model.ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)
    return clip, optimizer_of(clip.parameters())


def our_step(clip, optimizer, pictures: torch.Tensor, frozen: bool, chunk: int = 0):
    """-> a function that makes one step on pictures [B, 3, S, S], or features [B, E] of the frozen tower."""
    ids = tokenize([CAPTION] * len(pictures))  # they wait on the CPU

    def forward(*part):
        with model.autocast(pictures.device):
            return clip(*part)

    def step():
        train.set_train_mode(clip, frozen)
        parts = list(zip(pictures.split(chunk or len(ids)), ids.split(chunk or len(ids))))
        backward_in_chunks(forward, clip, parts, torch.manual_seed, contrastive_loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_pictures(config: model.ModelConfig, batch: int, device: str) -> torch.Tensor:
    return torch.randn(batch, 3, config.visual.resolution, config.visual.resolution, device=device)


def official_step(theirs, pictures: torch.Tensor, frozen: bool):
    """The official model, with its loss (training/train.py) and its optimizer."""
    device = pictures.device
    ids = tokenize([CAPTION] * len(pictures)).to(device)
    theirs.visual.requires_grad_(not frozen)
    optimizer, labels = optimizer_of(theirs.parameters()), torch.arange(len(ids), device=device)

    def step():
        theirs.train()
        if frozen:
            theirs.visual.eval()
        with model.autocast(device):
            image, text, scale = theirs(pictures, ids)
            logits = scale * image @ text.T
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def open_clip_step(theirs, pictures: torch.Tensor, frozen: bool):
    """open_clip's model of the same image tower, with its English text tower of 77 tokens."""
    import open_clip
    theirs.visual.requires_grad_(not frozen)
    ids = torch.randint(1, 40_000, (len(pictures), 77), device=pictures.device)
    optimizer, loss_of = optimizer_of(theirs.parameters()), open_clip.ClipLoss()

    def step():
        theirs.train()
        with model.autocast(pictures.device):
            loss_of(*theirs(pictures, ids)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


STEPS = {"official": official_step, "open_clip": open_clip_step}


def bench_train(
    names: list[str], stages: list[str], device: str, batch: int, runs: int, chunk: int
) -> list[list[str]]:
    """A row each model and stage: ours plain, in chunks, with cached features; a peer's one way beside each,
    all in turn."""
    rows = [["model", "stage", "a step", "pairs/s of 12 tokens", "TFLOP/s", f"share of {PEAK}", "GB",
             "official, of 52", "ratio", "its GB", "open_clip, of 77", "ratio", "its GB"]]
    for name, stage in ((name, stage) for name in names for stage in stages):
        config, frozen = model.MODELS[name], stage == "1"
        clip, optimizer = our_model(config, device, frozen)
        pictures = random_pictures(config, batch, device)
        image, text = gflop(config, len(CAPTION) + 2)
        work = image + 3 * text if frozen else 3 * (image + text)
        ours = {stage: (pictures, 0, work), f"{stage}, chunks of {chunk}": (pictures, chunk, work)}
        if frozen:
            features = torch.randn(batch, config.embed_dim, device=device)
            ours[f"{stage}, cached features"] = features, 0, 3 * text
        steps = {way: our_step(clip, optimizer, x, frozen, size) for way, (x, size, _) in ours.items()}
        peers = peers_of(clip, tuple(STEPS))
        steps |= {peer: STEPS[peer](theirs, pictures, frozen)
                  for peer, theirs in peers.items() if not isinstance(theirs, str)}
        memory = {way: gigabytes(step, device) for way, step in steps.items()}
        seconds = in_turn({way: step for way, step in steps.items() if memory[way] != math.inf}, runs)
        for way, (_, _, work) in ours.items():
            row = [name, way, f"{batch:,} pairs", "out of memory", "-", "-", "-"]
            if way in seconds:
                teraflops = batch * work / seconds[way] / 1e3
                share = f"{teraflops / PEAK:.1%}" if device == "cuda" else "-"
                row[3:] = [f"{batch / seconds[way]:,.2f}", f"{teraflops:.3f}", share, f"{memory[way]:.2f}"]
            for peer, theirs in peers.items():
                if isinstance(theirs, str):  # why there is none
                    row += [theirs, "-", "-"]
                elif peer not in seconds:
                    row += ["out of memory", "-", "-"]
                else:
                    ratio = f"{seconds[peer] / seconds[way]:.2f}" if way in seconds else "-"
                    row += [f"{batch / seconds[peer]:,.2f}", ratio, f"{memory[peer]:.2f}"]
            rows.append(row)
            say(row)
        del clip, optimizer, steps, peers
        gc.collect()
    return rows


def gigabytes(step, device: str) -> float:
    """What a step takes at its peak beyond weights and moments, gradients among it; inf if a GPU's memory
    does not suffice."""
    try:
        step()  # makes moments
        return memory_of(step, device) / 1e3
    except torch.OutOfMemoryError:
        return math.inf


def bench_profile(names: list[str], device: str, batch: int, runs: int) -> list[list[str]]:
    """Where the time of a step of stage 2 goes: the ten operations that take most of it themselves."""
    rows = [["model", "operation", "share", "ms a step", "calls a step"]]
    for name in names:
        pictures = random_pictures(model.MODELS[name], batch, device)
        step = our_step(*our_model(model.MODELS[name], device, False), pictures, False)
        step()
        with torch.profiler.profile() as profiler:  # whatever devices there are
            for _ in range(runs):
                step()
        times = [(getattr(event, f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"), event)
                 for event in profiler.key_averages()]
        total = sum(time for time, _ in times)
        for time, event in sorted(times, key=lambda pair: -pair[0])[:10]:
            rows.append([name, event.key[:60], f"{time / total:.1%}", f"{time / runs / 1e3:.2f}",
                         f"{event.count / runs:.0f}"])
            say(rows[-1])
    return rows


# ------------------------------------------------------------------------------------------------------------
# the loss alone


def loss_once(batch: int, width: int, dense: bool, device: str, runs: int) -> tuple[float, float]:
    """-> (seconds forward and backward, MB at the peak beyond the features themselves)."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, width, device=device), dim=1).requires_grad_()
                   for _ in range(2))
    scale = torch.tensor(50.0, device=device, requires_grad=True)

    def step():
        (contrastive_loss if dense else tiled_loss)(image, text, scale).backward()
        image.grad = text.grad = scale.grad = None

    return median_time(step, runs), memory_of(step, device)


def bench_loss(batches: list[int], width: int, device: str, runs: int) -> list[list[str]]:
    rows = [["batch", "width", "matrix, s", "matrix, MB", "tiles, s", "tiles, MB", "16 B D bytes, MB"]]
    for batch in batches:
        row = [f"{batch:,}", f"{width}"]
        for dense in (True, False):
            if dense and 6 * 4 * batch**2 > memory_limit(device):
                row += ["-", "too large"]
                continue
            way = "matrix" if dense else "tiles"
            seconds, megabytes = json.loads(
                python("-m", "tools.bench", "once", "loss", str(batch), str(width), way, device, str(runs)))
            row += [f"{seconds:.3f}", f"{megabytes:,.0f}"]
        rows.append([*row, f"{16 * batch * width / 1e6:,.0f}"])
        say(rows[-1])
    return rows


def memory_limit(device: str) -> float:
    """Bytes that a measurement may take: most of a GPU, half of this machine's memory."""
    if device == "cuda":
        return 0.9 * torch.cuda.get_device_properties(0).total_memory
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
