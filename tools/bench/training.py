"""The tasks `train` and `loss`: how fast whole steps of both stages are, and the loss alone."""

import gc

import torch
import torch.nn.functional as F

import model
import train
from data import tokenize
from loss import contrastive_loss
from tools.bench.peers import CAPTION, beside, in_turn, memory_of, official, open_clip, peers_of, say
from training.chunks import Chunk, backward_in_chunks, features_in_chunks
from training.tiles import tiled_loss

MATRIX = 16_384  # pairs up to which the matrix is measured too: 4.4 GB


# ------------------------------------------------------------------------------------------------------------
# train


def step_of(clip: torch.nn.Module, frozen: bool, backward):
    """-> a function that makes one step of a model, ours or a peer's: `backward()` leaves its gradients."""
    clip.visual.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step():
        train.set_train_mode(clip, frozen)
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(clip: model.ChineseCLIP, pictures: torch.Tensor, frozen: bool, chunk: int):
    """Pictures are [B, 3, S, S], or features [B, E] of the frozen tower."""
    ids = tokenize([CAPTION] * len(pictures))  # they wait on the CPU
    chunks = [Chunk(*part, seed) for seed, part in enumerate(zip(pictures.split(chunk), ids.split(chunk)))]

    def forward(one: Chunk):
        torch.manual_seed(one.seed)
        with model.autocast(pictures.device):
            return clip(one.pictures, one.ids)

    def backward():
        features = forward(chunks[0]) if len(chunks) == 1 else features_in_chunks(forward, clip, chunks)
        contrastive_loss(*features).backward()
        if len(chunks) > 1:
            backward_in_chunks(forward, clip, chunks, features)

    return step_of(clip, frozen, backward)


def peer_step(peer: str, theirs: torch.nn.Module, pictures: torch.Tensor, frozen: bool):
    """A peer encodes 52 tokens (official) or 77 random ones (open_clip) of each caption. The loss is written
    as in the official training/train.py; open_clip's is the same formula."""
    device, count = pictures.device, len(pictures)
    ids = tokenize([CAPTION] * count) if peer == "official" else torch.randint(1, 40_000, (count, 77))
    ids, labels = ids.to(device), torch.arange(count, device=device)

    def backward():
        with model.autocast(device):
            image, text, scale = theirs(pictures, ids)
            logits = scale * image @ text.T  # [B, B]
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()

    return step_of(theirs, frozen, backward)


def bench_train(args) -> list[list[str]]:
    """For each model and stage a plain step of ours, one in chunks and, in stage 1, one with cached features,
    each beside the plain step of each peer. All take turns."""
    rows = [["model", "stage", "a step", "pairs/s of 12 tokens", "GB",
             "official, of 52", "ratio", "its GB", "open_clip, of 77", "ratio", "its GB"]]
    for name, stage in ((name, stage) for name in args.models for stage in args.stages):
        clip, frozen, batch = model.ChineseCLIP(model.MODELS[name]).to(args.device), stage == "1", args.batch
        if args.device == "cuda" and isinstance(clip.visual, model.ModifiedResNet):
            clip.visual.to(memory_format=torch.channels_last)
        peers, size = peers_of(clip, (official, open_clip)), clip.config.visual.resolution
        pictures = torch.randn(batch, 3, size, size, device=args.device)
        ours = {stage: our_step(clip, pictures, frozen, batch),
                f"{stage}, chunks of {args.chunk}": our_step(clip, pictures, frozen, args.chunk)}
        if frozen:
            features = torch.randn(batch, clip.config.embed_dim, device=args.device)
            ours[f"{stage}, cached features"] = our_step(clip, features, frozen, batch)
        steps = ours | {peer: peer_step(peer, it, pictures, frozen) for peer, it in peers.items()}
        memory = {way: gigabytes(step, args.device) for way, step in steps.items()}
        times = in_turn({way: step for way, step in steps.items() if memory[way] != "-"}, args.runs)
        for way in ours:
            rate, *cells = beside(batch, way, times, ("official", "open_clip"), digits=2)
            say(rows, [name, way, f"{batch:,} pairs", rate, memory[way], *cells[:2],
                       memory.get("official", "-"), *cells[2:], memory.get("open_clip", "-")])
        del clip, peers, ours, steps
        gc.collect()
    return rows


def gigabytes(step, device: str) -> str:
    """What a step holds at its peak beyond weights and moments, its gradients included; a dash if the memory
    of a GPU does not suffice."""
    try:
        step()  # the first step makes the moments
        return f"{memory_of(step, device) / 1e3:.2f}"
    except torch.OutOfMemoryError:
        return "-"


# ------------------------------------------------------------------------------------------------------------
# loss


def bench_loss(args) -> list[list[str]]:
    """Forward and backward pass of the loss as one matrix and in tiles, with random features [B, E]. Memory
    is what it holds at its peak beside the features."""
    rows = [["batch", "width", "matrix, s", "matrix, MB", "tiles, s", "tiles, MB", "16 B D bytes, MB"]]
    for batch in args.batches:
        features = F.normalize(torch.randn(2, batch, args.width, device=args.device), dim=2)
        image, text = (x.requires_grad_() for x in features)
        scale = torch.tensor(50.0, device=args.device, requires_grad=True)
        row = [f"{batch:,}", f"{args.width}"]
        for loss_of in (contrastive_loss, tiled_loss):
            if loss_of is contrastive_loss and batch > MATRIX:
                row += ["-", "too large"]
                continue

            def step():
                torch.autograd.grad(loss_of(image, text, scale), (image, text, scale))

            seconds = in_turn({"loss": step}, args.runs)["loss"]
            row += [f"{seconds:.3f}", f"{memory_of(step, args.device):,.0f}"]
        say(rows, [*row, f"{16 * batch * args.width / 1e6:,.0f}"])
    return rows
