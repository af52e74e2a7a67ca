"""
The frozen image tower's features, computed once. In stage 1, encoding the same pictures at every epoch would
be nearly all of the work: ViT-B/16 costs 35 GFLOP for a picture, its text tower in training 6 for a caption.

--cache-features K encodes K views (K random crops) of every picture before the first step and keeps them as
float16 in out/ACT/features.f16, [K, pictures, E]. Epoch e reads view e % K. features.json beside it says what
the features belong to, and features.done has a byte for every block that is encoded, so that an interrupted
run goes on there.
"""

import dataclasses
import hashlib
import json
import math
import os
import random

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import model
from common import rank, wait_for_all, world_size, write_json
from data import DRAFT, Stream, preprocess
from sources.augment import augment
from sources.pairs import DataError, Pairs
from training.processes import start_workers
from training.recipes import Config, loader_processes
from weights.read import digest

BLOCK = 256  # pictures encoded, written and ticked off at a time


class CachedStream(Stream):
    """A Stream whose pictures are unit features, in every epoch another view. They are mapped from a file
    [K, pictures, E], so that a worker holds only what it reads."""

    def __init__(self, pairs: Pairs, seed: int, path: str, shape: tuple[int, int, int]):
        super().__init__(pairs, seed, 0, "none")
        self.path, self.shape, self.rows = path, shape, None

    def view(self, epoch: int, image: int) -> torch.FloatTensor:
        """The view of a picture that an epoch sees, [E]; not finite if the picture is broken."""
        if self.rows is None:  # opened by each worker for itself
            self.rows = np.memmap(self.path, np.float16, "r", shape=self.shape)
        return torch.from_numpy(self.rows[epoch % self.shape[0], image].astype(np.float32))

    def pair(self, index: int, position: int) -> tuple[torch.FloatTensor, str]:
        """Features [E] and caption of a training pair as seen at this position; DataError if it is broken."""
        number = self.pairs.image_number(index)
        row = self.view(position // len(self.pairs), number)
        if not row.isfinite().all():
            self.pairs.image(number)  # raises a DataError if the picture is still broken
            raise DataError(f"picture {number} can be read now, but could not when its features were cached; "
                            "delete features.* in --out to encode it")
        return row, self.pairs.caption(index)


class Views(torch.utils.data.Dataset):
    """Item n is the pixels of view n // pictures of picture n % pictures; nan if the picture is broken."""

    def __init__(self, cfg: Config, pairs: Pairs, size: int):
        self.cfg, self.pairs, self.size = cfg, pairs, size

    def __getitem__(self, n: int) -> torch.FloatTensor:
        view, row = divmod(n, self.pairs.image_count)
        try:
            image = self.pairs.image(row, math.ceil(DRAFT * self.size))
        except DataError:
            return torch.full((3, self.size, self.size), torch.nan)
        rng = random.Random(f"{self.cfg.seed} view {view} of {row}")
        return preprocess(augment(image, self.size, self.cfg.augment, rng), self.size)


def origin(cfg: Config, clip: model.ChineseCLIP, pairs: Pairs) -> dict:
    """Everything that the features depend on, as it reads after JSON."""
    # what `augment` and `preprocess` make of one picture with transparency: changes when their code does
    rng = random.Random(0)
    picture = Image.frombytes("RGBA", (60, 50), rng.randbytes(12000))
    views = [preprocess(augment(picture, 32, cfg.augment, rng), 32).numpy().tobytes() for _ in range(20)]
    return json.loads(json.dumps({
        "image_tower": digest(clip.visual.state_dict()),
        "pictures": pairs.fingerprint(), "count": pairs.image_count,
        "views": cfg.cache_features, "augment": cfg.augment, "seed": cfg.seed,
        "visual": dataclasses.asdict(clip.config.visual), "embed_dim": clip.config.embed_dim, "block": BLOCK,
        "transform": hashlib.sha256(b"".join(views) + f"decoded at {DRAFT}".encode()).hexdigest(),
        "precision": str(clip.precision),
    }))


def cached_stream(cfg: Config, clip: model.ChineseCLIP, pairs: Pairs) -> CachedStream:
    """The pairs of an act with cached features, in its folder; all ranks together encode what is missing
    there, with the model in eval mode. DataError if the features that are there belong to something else."""
    path, done_path = (os.path.join(cfg.out, name) for name in ("features.f16", "features.done"))
    shape = (cfg.cache_features, pairs.image_count, clip.config.embed_dim)
    count, row_bytes = cfg.cache_features * pairs.image_count, 2 * clip.config.embed_dim
    blocks = range(0, count, BLOCK)
    if rank() == 0:
        prepare(cfg.out, origin(cfg, clip, pairs), {path: count * row_bytes, done_path: len(blocks)})
    wait_for_all()
    with open(done_path, "rb") as file:
        done = file.read()
    print(f"   {path}: {cfg.cache_features} views of {pairs.image_count:,} pictures, "
          f"{count * row_bytes / 1e6:,.1f} MB; {sum(done)} of {len(blocks)} blocks are there", flush=True)
    mine = [start for i, start in enumerate(blocks) if not done[i] and i % world_size() == rank()]
    device = clip.eval().logit_scale.device
    loader = torch.utils.data.DataLoader(
        Views(cfg, pairs, clip.config.visual.resolution), num_workers=loader_processes(cfg, device),
        batch_sampler=[range(start, min(start + BLOCK, count)) for start in mine])
    with open(path, "r+b") as file, open(done_path, "r+b") as ticks, torch.inference_mode():
        bar = tqdm(start_workers(loader), "caching features", disable=None if rank() == 0 else True)
        for pixels, start in zip(bar, mine):
            with model.autocast(clip):
                features = model.normalise(clip.encode_image(pixels.to(device)))
            file.seek(start * row_bytes)
            file.write(features.half().cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())  # the block before its tick, or a power cut could leave the tick alone
            ticks.seek(start // BLOCK)
            ticks.write(b"\1")
            ticks.flush()
    wait_for_all()
    return CachedStream(pairs, cfg.seed, path, shape)


def prepare(folder: str, wanted: dict, lengths: dict[str, int]):
    """Make files of these lengths for features of this origin, or leave those that are there. DataError if
    they belong to something else."""
    header = os.path.join(folder, "features.json")
    if os.path.isfile(header):
        with open(header, encoding="utf-8") as file:
            found = json.load(file)
        faults = [f"{header}: features of another {key} ({found.get(key)}, now {value})"
                  for key, value in wanted.items() if found.get(key) != value]
        faults += [f"{path}: missing or cut short, expected {length:,} bytes"
                   for path, length in lengths.items()
                   if not os.path.isfile(path) or os.path.getsize(path) != length]
        if faults:
            raise DataError(f"{faults[0]}; delete features.* there, or name another --out")
        return
    for path, length in lengths.items():
        with open(path, "wb") as file:
            file.truncate(length)
            os.fsync(file.fileno())  # there before the header says so
    write_json(header, wanted)
