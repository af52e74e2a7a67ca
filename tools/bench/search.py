"""The task `search`: how fast pictures are indexed, looked at again, and found."""

import os
import tempfile
import timeit

import numpy as np
import torch
from PIL import Image

import model
from eval import encode_images
from sources.pairs import pictures_below
from tools.bench.peers import measure
from tools.search.index import TOGETHER, Index
from tools.search.query import Search

PHOTO, PHOTOS = (1500, 1000), TOGETHER  # pixels, pictures
SIZES = (10_000, 100_000, 1_000_000)  # synthetic features


def bench_search(args):
    """Photos are smooth noise as JPEGs. For the sizes, pictures are links to small ones and their features
    are random. A search encodes a new text each time, sorts, and gives the first ten hits."""
    yield ["what", "seconds", "1/s", "MB"]
    clip = model.ChineseCLIP(model.MODELS[args.models[0]]).eval()
    all_cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as indexes:
        for n in range(PHOTOS):
            small = Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 60, 3), np.uint8))
            small.resize(PHOTO, Image.Resampling.BICUBIC).save(f"{folder}/{n}.jpg", quality=92)
        small = small.resize([clip.config.visual.resolution] * 2)
        for count in sorted({1, len(all_cores)}):
            os.sched_setaffinity(0, all_cores[:count])
            torch.set_num_threads(count)
            fresh = (Index(tempfile.mkdtemp(dir=indexes), clip, [folder.encode()]) for _ in iter(int, 1))
            encode_images(clip, lambda _: small, 2)  # it warms up; `measure` would call each three times
            for what, action in (("encode", lambda: encode_images(clip, lambda _: small, PHOTOS)),
                                 ("index", lambda: next(fresh).update(clip))):
                seconds = min(timeit.repeat(action, number=1, repeat=args.runs))
                rate = f"{PHOTOS / seconds:.2f}"
                yield [f"{what} {PHOTOS} photos, cores: {count}", f"{seconds:.1f}", rate, ""]
    for count in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            index = synthetic(folder, clip, count)
            search, numbers = Search(clip, index, 0.99, paths=False), iter(range(9999))
            actions = {"look again at": lambda: index.update(clip),
                       "find by a text ten of": lambda: search.ranking(f"第{next(numbers)}张").first(10),
                       "find by a picture ten of": lambda: search.ranking(f"#{next(numbers) + 1}").first(10)}
            times, memory = measure(actions, args)
            for what, seconds in times.items():
                yield [f"{what} {count:,}", f"{seconds:.2f}", "", memory[what]]


def synthetic(folder: str, clip, count: int) -> Index:
    """An index of so many links in folder/photos, with random features."""
    roots = [f"{folder}/photos".encode()]
    index, g = Index(f"{folder}/index", clip, roots), torch.Generator().manual_seed(0)
    for n in range(count):
        if n % 1000 == 0:
            os.makedirs(part := f"{folder}/photos/{n}")
            Image.new("RGB", (40, 30), "red").save(first := f"{part}/{n}.png")
        else:
            os.link(first, f"{part}/{n}.png")
    with open(index.features_path, "ab") as file:
        for start in range(0, count, 10_000):
            rows = model.normalise(torch.randn(min(10_000, count - start), index.width, generator=g))
            file.write(rows.half().numpy().tobytes())
    with index.writer:
        index.writer.execute("BEGIN")
        index.writer.executemany("INSERT INTO contents VALUES (?, ?, NULL)", (
            (n, n.to_bytes(16, "big")) for n in range(count)))
        index.writer.executemany("INSERT INTO files VALUES (NULL, ?, ?, ?, ?, '')", (
            (path, *stamp, n) for n, (path, stamp) in enumerate(pictures_below(roots)[0].items())))
    return index
