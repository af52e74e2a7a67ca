"""
The frozen image tower's features, computed once. In stage 1 the image tower never changes, and encoding the
same pictures again at every epoch would be nearly all of the work: ViT-B/16 costs 35 GFLOP a picture, its
text tower in training 6 for a caption of ten characters.

--cache-features K encodes K views (K random crops) of every picture before the first step and keeps them as
float16 in out/ACT/features.f16, [K, pictures, E]. Epoch e reads view e % K. features.json beside it says what
the features belong to; features of other weights, pictures or augmentation are refused. features.done has a
byte for every block that is encoded, so that an interrupted run goes on there.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import model
from sources.augment import augment
from data import DRAFT, Stream, preprocess
from common import rank, wait_for_all, world_size
from sources.pairs import DataError, Pairs, SourceChanged
from training.processes import start_workers
from training.recipes import Config, loader_processes
from common import write_json

BLOCK = 256  # pictures encoded, written and ticked off at a time


class Features:
    """Cached unit features, mapped from a file [K, pictures, E]: a reader holds only what it reads."""

    def __init__(self, path: str, shape: tuple[int, int, int]):
        self.path, self.shape, self.rows = path, shape, None

    def view(self, epoch: int, image: int) -> torch.FloatTensor:
        """The view of a picture that an epoch sees, [E]; not finite if the picture is broken."""
        if self.rows is None:  # opened by each worker for itself
            self.rows = np.memmap(self.path, np.float16, "r", shape=self.shape)
        return torch.from_numpy(self.rows[epoch % self.shape[0], image].astype(np.float32))


class CachedStream(Stream):
    """A Stream whose pictures are features, in every epoch another view."""

    def __init__(self, pairs: Pairs, seed: int, features: Features):
        super().__init__(pairs, seed, 0, "none")
        self.features = features

    def pair(self, index: int, position: int) -> tuple[torch.FloatTensor, str]:
        """Features [E] and caption of a training pair as seen at this position; DataError if it is broken."""
        number = self.pairs.image_number(index)
        row = self.features.view(position // len(self.pairs), number)
        if not row.isfinite().all():
            self.pairs.image(number)  # raises a DataError if the picture is still broken
            raise DataError(f"picture {number} can be read now, but could not when its features were cached; "
                            "delete features.* in --out to encode it")
        return row, self.pairs.caption(index)


class Views(torch.utils.data.Dataset):
    """Item n is the pixels of view n // pictures of picture n % pictures; nan if the picture is broken."""

    def __init__(self, pairs: Pairs, seed: int, resolution: int, how: str):
        self.pairs, self.seed, self.resolution, self.how = pairs, seed, resolution, how

    def __getitem__(self, n: int) -> torch.FloatTensor:
        view, row = divmod(n, self.pairs.image_count)
        try:
            image = self.pairs.image(row, math.ceil(DRAFT * self.resolution))
        except SourceChanged:
            raise
        except DataError:
            return torch.full((3, self.resolution, self.resolution), torch.nan)
        rng = random.Random(f"{self.seed} view {view} of {row}")
        return preprocess(augment(image, self.resolution, self.how, rng), self.resolution)


def origin(cfg: Config, clip: model.ChineseCLIP, pairs: Pairs) -> dict:
    """Everything that the features depend on, as it reads after JSON."""
    weights = hashlib.sha256()
    for name, tensor in clip.visual.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    # what `augment` and `preprocess` make of one picture: changes when their code does
    rng = random.Random(0)
    picture = Image.frombytes("RGB", (60, 50), rng.randbytes(9000))
    views = [preprocess(augment(picture, 32, cfg.augment, rng), 32).numpy().tobytes() for _ in range(20)]
    return json.loads(json.dumps({
        "image_tower": weights.hexdigest(), "pictures": pairs.fingerprint(), "count": pairs.image_count,
        "views": cfg.cache_features, "augment": cfg.augment, "seed": cfg.seed,
        "visual": dataclasses.asdict(clip.config.visual), "embed_dim": clip.config.embed_dim, "block": BLOCK,
        "transform": hashlib.sha256(b"".join(views) + f"decoded at {DRAFT}".encode()).hexdigest(),
        "precision": str(model.precision(clip.logit_scale.device)),
    }))


def cached_stream(cfg: Config, clip: model.ChineseCLIP, pairs: Pairs) -> CachedStream:
    """The pairs of an act with cached features, in its folder; all ranks together encode what is missing
    there. DataError if the features that are there belong to something else."""
    path, done_path = (os.path.join(cfg.out, name) for name in ("features.f16", "features.done"))
    shape = (cfg.cache_features, pairs.image_count, clip.config.embed_dim)
    count, row_bytes = cfg.cache_features * pairs.image_count, 2 * clip.config.embed_dim
    blocks = range(0, count, BLOCK)
    if rank() == 0:
        prepare(cfg.out, origin(cfg, clip, pairs), count * row_bytes, len(blocks))
    wait_for_all()
    with open(done_path, "rb") as file:
        done = file.read()
    if rank() == 0:
        print(f"   {path}: {cfg.cache_features} views of {pairs.image_count:,} pictures, "
              f"{count * row_bytes / 1e6:,.1f} MB; {sum(done)} of {len(blocks)} blocks are there", flush=True)
    mine = [start for i, start in enumerate(blocks) if not done[i] and i % world_size() == rank()]
    loader = torch.utils.data.DataLoader(
        Views(pairs, cfg.seed, clip.config.visual.resolution, cfg.augment),
        num_workers=loader_processes(cfg, clip.logit_scale.device),
        batch_sampler=[range(start, min(start + BLOCK, count)) for start in mine])
    device, training = clip.logit_scale.device, clip.training
    clip.eval()
    with open(path, "r+b") as file, open(done_path, "r+b") as ticks, torch.inference_mode():
        bar = tqdm(zip(mine, start_workers(loader)), "caching features", len(mine),
                   disable=None if rank() == 0 else True)
        for start, pixels in bar:
            with model.autocast(device):
                features = model.normalise(clip.encode_image(pixels.to(device)))
            file.seek(start * row_bytes)
            file.write(features.half().cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())  # the block before its tick, or a power cut could leave the tick alone
            ticks.seek(start // BLOCK)
            ticks.write(b"\1")
            ticks.flush()
    clip.train(training)
    wait_for_all()
    return CachedStream(pairs, cfg.seed, Features(path, shape))


def prepare(folder: str, wanted: dict, size: int, blocks: int):
    """Make files of the right size for these features, or leave those that are there. DataError if they
    belong to something else."""
    header = os.path.join(folder, "features.json")
    lengths = {os.path.join(folder, "features.f16"): size, os.path.join(folder, "features.done"): blocks}
    if os.path.isfile(header):
        with open(header, encoding="utf-8") as file:
            found = json.load(file)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise DataError(f"{header}: features of another {key} ({found.get(key)}, now {value}); "
                                "delete features.* there, or name another --out")
        for path, length in lengths.items():
            if not os.path.isfile(path) or os.path.getsize(path) != length:
                raise DataError(f"{path}: missing or cut short, expected {length:,} bytes; "
                                "delete features.* there to encode the pictures again")
        return
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{folder}: the cached features need {size:,} bytes, {free:,} are free; "
                        "fewer --cache-features, or an --out on another disk")
    for path, length in lengths.items():
        with open(path, "wb") as file:
            file.truncate(length)
            os.fsync(file.fileno())  # there before the header says so
    write_json(header, wanted)
