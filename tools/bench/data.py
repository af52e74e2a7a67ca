"""
How fast data comes, on one core: pictures, captions, indices, the order of 200 million pairs. The task `data`
of bench.py; the official code and transformers, where they are installed, do the same in turn. That pixels
and ids are the official ones is looked at first.
"""

import base64
import functools
import io
import json
import math
import os
import random
import tempfile
import tracemalloc

import numpy as np
import torch
from PIL import Image

import data
from sources import pairs
from sources.augment import augment
from tools.bench.peers import CAPTION, in_turn, installed, say, seconds_of, transformers_processor
from data import tokenize
from sources.order import order
from sources.pairs import decode
from sources.shards import TarPairs
from sources.layouts import from_base64, open_pairs

PHOTOS = ((1440, 1080, 32), (500, 375, 200), (224, 224, 400))  # width, height, how many


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG with edges and noise, about as large as a photograph's."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def bench_data(runs: int, lines: int) -> list[list[str]]:
    """Pictures of 224 pixels from base64: to what train.py's loader hands over, bytes, with augmentation and
    without, and to the pixels of `preprocess`, of the picture in full. Captions that were not seen before.
    The rest as the rows say."""
    rows = [["what, on one core", "ours", "official", "ratio", "transformers", "ratio"]]
    processor = transformers_processor(224) if installed("transformers") else None
    captions = [CAPTION + "%04d款 2024" % n for n in range(2000)]
    if installed("official"):
        picture, official_tokenize = opened(base64.b64encode(photo(500, 375, 0))), official_tokenizer()
        assert torch.allclose(data.preprocess(picture), official_transform("none")(picture), atol=1e-6)
        assert torch.equal(tokenize(captions), official_tokenize(captions))

    def add(what: str, count: int, ours, official, transformers=None):
        actions = {"ours": ours}
        if installed("official"):
            actions["official"] = official
        if processor and transformers:
            actions["transformers"] = transformers
        times = in_turn(actions, runs)
        rows.append([what, f"{count / times['ours']:,.0f}"])
        for peer in ("official", "transformers"):
            if peer in times:
                rows[-1] += [f"{count / times[peer]:,.0f}", f"{times[peer] / times['ours']:.2f}"]
            else:
                rows[-1] += ["-", "-"]
        say(rows[-1])

    threads, kept = torch.get_num_threads(), pairs.CACHE
    torch.set_num_threads(1)
    for width, height, count in PHOTOS:
        encoded = [base64.b64encode(photo(width, height, seed)) for seed in range(count)]

        def loaded(how: str):
            for n, line in enumerate(encoded):
                image = decode(from_base64(line, ""), "", math.ceil(data.DRAFT * 224))
                data.squash(augment(image, 224, how, random.Random(n)), 224)

        def transformed(transform):
            for line in encoded:
                transform(opened(line))

        size = f"JPEG {width} x {height}"
        for what, how in (("augmented", "auto"), ("not augmented", "none")):
            add(f"{size}, for training, {what}, pictures/s", count, lambda: loaded(how),
                lambda: transformed(official_transform(how)))
        add(f"{size}, preprocess, pictures/s", count, lambda: transformed(data.preprocess),
            lambda: transformed(official_transform("none")),
            lambda: transformed(lambda image: processor.image_processor(image, return_tensors="pt")))

    def tokenized():
        data.word_ids.cache_clear()
        tokenize(captions)

    add("tokenize, captions/s", len(captions), tokenized, lambda: official_tokenize(captions),
        lambda: processor.tokenizer(captions, padding="max_length", max_length=52, truncation=True,
                                    return_tensors="pt"))

    with tempfile.TemporaryDirectory() as folder:
        pairs.CACHE = os.path.join(folder, "cache")
        line = base64.b64encode(photo(64, 64, 0)).decode()
        with open(os.path.join(folder, "train_imgs.tsv"), "w", encoding="utf-8") as file:
            file.writelines(f"{n}\t{line}\n" for n in range(lines))
        with open(os.path.join(folder, "train_texts.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text_id": n, "text": f"{CAPTION}{n}", "image_ids": [n]}) + "\n"
                            for n in range(lines))
        seconds = seconds_of(lambda: open_pairs(folder, "train"))
        rows.append([f"index of {lines:,} pictures and captions, lines/s", f"{2 * lines / seconds:,.0f}"])
        for workers in (0, 1):
            def first_batch(workers=workers):
                stream = data.Stream(open_pairs(folder, "train"), 0, 224, "auto")
                next(iter(data.batches(stream, 32, range(9), 52, workers)))
            rows.append([f"first batch of 32, index warm, {workers} workers, s",
                         f"{seconds_of(first_batch):.2f}"])
    numbers = Numbers()
    tracemalloc.start()
    start, batch, rank = 777_000_000, 32_768, slice(5 * 4096, 6 * 4096)  # any step; the sixth rank of eight
    for what, positions in (("first position of an epoch", [0]),
                            ("resume at a random step, one rank's 4,096", range(start, start + batch)[rank])):
        seconds = seconds_of(lambda: [order(numbers, 0, position) for position in positions])
        rows.append([f"200 M pairs in shards: {what}, ms", f"{1e3 * seconds:.0f}"])
    peak = tracemalloc.get_traced_memory()[1]
    rows.append(["200 M pairs in shards: memory for this, MB", f"{peak / 1e6:.1f}"])
    tracemalloc.stop()
    torch.set_num_threads(threads)
    pairs.CACHE = kept
    return [row + ["-"] * (len(rows[0]) - len(row)) for row in rows]


class Numbers(pairs.Pairs):
    """The numbers of 200 million pairs in shards, and nothing else."""

    window = TarPairs.window

    def __len__(self) -> int:
        return 200_000_000


def opened(line: bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.urlsafe_b64decode(line)))


def official_tokenizer():
    from cn_clip.clip import tokenize as theirs
    return theirs


@functools.cache
def official_transform(how: str):
    """The official code's own at 224 pixels: with its augmentation, or without."""
    from cn_clip.training.data import LMDBDataset
    theirs = LMDBDataset.__new__(LMDBDataset)
    theirs.split, theirs.use_augment = "train", how == "auto"
    return theirs._build_transform(224)
