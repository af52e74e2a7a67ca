"""The tasks `train`, `loss` and `data`: steps of both stages, the loss alone, and the pictures."""

import base64
import io
import math
import random

import numpy as np
import torch
from PIL import Image

import data
import model
from loss import contrastive_loss
from sources.augment import augment
from sources.layouts import from_base64
from sources.pairs import decode
from tools.bench.peers import CAPTION, beside, measure, peers_of, version
from train import set_train_mode
from training.chunks import Chunk, backward_in_chunks, features_in_chunks
from training.lora import add_lora
from training.recipes import Config, choose_precision
from training.tiles import DENSE_LIMIT, tiled_loss

RANK = 8  # of LoRA
PHOTOS = ((1440, 1080, 32), (500, 375, 200), (224, 224, 400))  # width, height, how many


def bench_train(args):
    yield ["model", "stage", "a step", "pairs/s of 12 tokens", "official, of 52", "ratio", "open_clip, of 77",
           "ratio", "MB", "official, MB", "open_clip, MB"]
    for name in args.models:
        for stage in args.stages:
            yield from train_rows(name, stage, args)


def train_rows(name: str, stage: str, args):
    """A plain step of ours, one in chunks and, in stage 1, one with cached features, each beside the plain
    step of each peer; "lora" is stage 2 with it. MB are what a step holds at its peak beyond weights and
    moments, gradients included."""
    cfg = Config(model=name, lora=RANK if stage == "lora" else 0, init=name, precision=args.precision)
    clip, frozen, batch = model.ChineseCLIP(model.MODELS[name]).to(args.device), stage == "1", args.batch
    clip.precision = choose_precision(cfg, torch.device(args.device))
    if args.device == "cuda" and isinstance(clip.visual, model.ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)
    peers, size = peers_of(name, clip), clip.config.visual.resolution
    add_lora(clip, cfg)
    pictures = torch.randn(batch, 3, size, size, device=args.device)
    ids = data.tokenize([CAPTION] * batch)  # [B, 52]; our model cuts the padding
    loss_of = tiled_loss if batch**2 > DENSE_LIMIT else contrastive_loss  # as train.py chooses

    steps = {stage: step_of(clip, pictures, ids, frozen, batch, loss_of),
             f"{stage}, chunks of {args.chunk}": step_of(clip, pictures, ids, frozen, args.chunk, loss_of)}
    if frozen:
        features = torch.randn(batch, clip.config.embed_dim, device=args.device)
        steps[f"{stage}, cached features"] = step_of(clip, features, ids, frozen, batch, loss_of)
    ways = list(steps)
    for peer, theirs in peers.items():
        its_ids = ids if peer == "official" else torch.randint(1, 40_000, (batch, 77))
        steps[peer] = step_of(theirs, pictures, its_ids.to(args.device), frozen, batch, contrastive_loss)
    times, memory = measure(steps, args)
    for way in ways:
        yield [name, way, f"{batch:,} pairs", *beside(batch, way, times, digits=2),
               *(memory.get(who, "-") for who in (way, "official", "open_clip"))]


def step_of(clip, pictures: torch.Tensor, ids: torch.Tensor, frozen: bool, chunk: int, loss_of):
    """-> a function that makes one step of a model, ours or a peer's, in chunks of `chunk` pairs. Pictures
    are [B, 3, S, S], or features [B, E] of the frozen tower."""
    if frozen:
        clip.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=1e-6, fused=True)
    chunks = [Chunk(*part, seed) for seed, part in enumerate(zip(pictures.split(chunk), ids.split(chunk)))]

    def forward(one: Chunk):
        torch.manual_seed(one.seed)
        with model.autocast(clip):
            return clip(one.pictures, one.ids)

    def step():
        set_train_mode(clip)
        features = forward(chunks[0]) if len(chunks) == 1 else features_in_chunks(forward, clip, chunks)
        loss_of(*features).backward()
        if len(chunks) > 1:
            backward_in_chunks(forward, clip, chunks, features)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_loss(args):
    """Forward and backward pass of the loss as one matrix and in tiles, with random features [B, E]. Memory
    is what it holds at its peak beside the features; a matrix that a GPU cannot hold is left out."""
    yield ["batch", "matrix, s", "matrix, MB", "tiles, s", "tiles, MB", "16 B D bytes, MB"]
    for batch in args.batches:
        features = model.normalise(torch.randn(2 * batch, 512, device=args.device))
        scale = torch.tensor(50.0, device=args.device)
        inputs = [x.requires_grad_() for x in (*features.split(batch), scale)]
        steps = {"matrix": lambda: torch.autograd.grad(contrastive_loss(*inputs), inputs),
                 "tiles": lambda: torch.autograd.grad(tiled_loss(*inputs), inputs)}
        times, memory = measure(steps, args)
        matrix, tiles = ((f"{times[way]:.3f}", memory[way]) if way in times else ("-", "-") for way in steps)
        yield [f"{batch:,}", *matrix, *tiles, f"{16 * batch * 512 / 1e6:,.0f}"]


def photo(width: int, height: int, seed: int) -> bytes:
    """The base64 of a JPEG with edges and noise, about as large as that of a photograph."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue())


def bench_data(args):
    """Pictures per second. They start as base64, are augmented for training, and end in bytes, as in the
    loader of train.py. AssertionError if the official code makes other pixels, without augmentation."""
    yield ["what, on one core", "ours", "official", "ratio"]

    def opened(line: bytes) -> Image.Image:
        return Image.open(io.BytesIO(base64.urlsafe_b64decode(line)))

    def load(line: bytes):
        image = decode(from_base64(line, ""), "", math.ceil(data.DRAFT * 224))
        data.squash(augment(image, 224, "auto", random.Random(line)), 224)

    ways = {"ours": load}
    if version("official"):
        from cn_clip.clip import image_transform
        from cn_clip.training.data import LMDBDataset
        picture = opened(photo(500, 375, 0))
        assert torch.allclose(data.preprocess(picture), image_transform(224)(picture), atol=1e-6)
        dataset = LMDBDataset.__new__(LMDBDataset)  # without its database
        dataset.split, dataset.use_augment = "train", True
        transform = dataset._build_transform(224)
        ways["official"] = lambda line: transform(opened(line))
    torch.set_num_threads(1)  # `data` is the last task
    for width, height, count in PHOTOS:
        lines = [photo(width, height, seed) for seed in range(count)]
        times, _ = measure({who: lambda way=way: list(map(way, lines)) for who, way in ways.items()}, args)
        yield [f"JPEG {width} x {height}, for training, augmented, pictures/s",
               *beside(count, "ours", times, ["official"], digits=0)]
