"""
How fast training is: whole steps of both stages and the loss alone. The tasks `train` and `loss` of bench.py.

TFLOP/s count 2 per multiply-add and three forward passes a trained tower (the recomputation of chunks is not
work that counts).
"""

import gc
import json
import os

import torch
import torch.nn.functional as F

import model
import train
from bench_peers import CAPTION, gflop, median_time, memory_now, peak_memory, peers_of, python, say
from data import tokenize
from loss import backward_in_chunks, contrastive_loss

PEAK = 790  # bf16 TFLOP/s of an H200, measured there with an 8192-cube matrix product


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


def official_step(theirs, batch, device: str, frozen: bool):
    """The official model, with its loss (training/train.py) and its optimizer."""
    pictures, ids = batch[0], batch[1].to(device)
    theirs.visual.requires_grad_(not frozen)
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


def open_clip_step(theirs, batch, device: str, frozen: bool):
    """open_clip's model of the same image tower, with its English text tower of 77 tokens."""
    import open_clip
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


STEPS = {"official": official_step, "open_clip": open_clip_step}


def bench_train(
    names: list[str], stages: list[str], device: str, batch: int, runs: int, chunk: int
) -> list[list[str]]:
    """A row each model and stage: ours plain, in chunks, with cached features; a peer's one way beside
    each."""
    rows = [["model", "stage", "pairs/s of 12 tokens", "TFLOP/s", f"share of {PEAK}", "GB a pair",
             "official, of 52", "ratio", "open_clip, of 77", "ratio"]]
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
                share = f"{teraflops / PEAK:.1%}" if device == "cuda" else "-"
                row[2:] = [f"{ours:,.2f}", f"{teraflops:.3f}", share, memory]
            size = config.visual.resolution
            pictures = torch.randn(batch, 3, size, size, device=device)
            for peer, make_step in STEPS.items():
                if (peer, frozen) not in rates:  # a peer has one way to make a stage's step
                    theirs = peers_of(clip, (peer,))[peer]
                    if isinstance(theirs, str):  # why there is none
                        row += [theirs, "-"]
                        continue
                    its_step = make_step(theirs, (pictures, batch_of[1]), device, frozen)
                    rates[peer, frozen], _ = rate(its_step, batch, device, runs)
                    del theirs, its_step
                its = rates[peer, frozen]
                row.append(f"{its:,.2f}" if its else "out of memory")
                row.append(f"{ours / its:.2f}" if ours and its else "-")
            rows.append(row)
            say(row)
            del step, clip, batch_of, pictures
            gc.collect()
    return rows


def rate(step, batch: int, device: str, runs: int) -> tuple[float, str]:
    """-> (pairs a second, or 0 where a GPU's memory does not suffice; GB a pair at the peak beyond weights,
    gradients and moments, which on a CPU is not measured)."""
    try:
        step()  # makes gradients and moments
        before = memory_now(device)
        pairs = batch / median_time(step, runs)
    except torch.OutOfMemoryError:
        return 0.0, "-"
    return pairs, f"{(peak_memory(device) - before) / batch / 1e3:.4f}" if device == "cuda" else "-"


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

    before = memory_now(device)
    seconds = median_time(step, runs)
    return seconds, peak_memory(device) - before


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
                python("bench.py", "once", "loss", str(batch), str(width), way, device, str(runs)))
            row += [f"{seconds:.3f}", f"{megabytes:,.0f}"]
        rows.append([*row, f"{16 * batch * width / 1e6:,.0f}"])
        say(rows[-1])
    return rows


def memory_limit(device: str) -> float:
    """Bytes that a measurement may take: most of a GPU, half of this machine's memory."""
    if device == "cuda":
        return 0.9 * torch.cuda.get_device_properties(0).total_memory
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
