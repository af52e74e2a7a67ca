"""
The task `data`: how fast data comes on one core. The pixels and ids of the official code are compared with
ours before it is timed.
"""

import base64
import io
import json
import math
import random
import tempfile
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
from sources import pairs
from sources.augment import augment
from sources.layouts import from_base64, open_pairs
from tools.bench.peers import CAPTION, beside, in_turn, installed, say, seconds_of

PHOTOS = ((1440, 1080, 32), (500, 375, 200), (224, 224, 400))  # width, height, how many
CAPTIONS = [CAPTION + "%04d款 2024" % n for n in range(2000)]


def photo(width: int, height: int, seed: int) -> bytes:
    """The base64 of a JPEG with edges and noise, about as large as that of a photograph."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue())


def opened(line: bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.urlsafe_b64decode(line)))


def ours() -> dict:
    """What to time -> our function of one picture in base64, or of captions. Training pictures end in bytes,
    as the loader of train.py makes them; those of `preprocess` are decoded in full and end in pixels."""
    def loaded(line: bytes, how: str):
        image = pairs.decode(from_base64(line, ""), "", math.ceil(data.DRAFT * 224))
        data.squash(augment(image, 224, how, random.Random(line)), 224)

    def tokenize(captions: list[str]):
        data.word_ids.cache_clear()  # words of an earlier call are remembered
        data.tokenize(captions)

    return {"for training, augmented": lambda line: loaded(line, "auto"),
            "for training, not augmented": lambda line: loaded(line, "none"),
            "preprocess": lambda line: data.preprocess(opened(line)), "tokenize": tokenize}


def official() -> dict:
    from cn_clip.clip import tokenize
    from cn_clip.training.data import LMDBDataset
    transforms = []
    for augmented in (True, False):
        theirs = LMDBDataset.__new__(LMDBDataset)
        theirs.split, theirs.use_augment = "train", augmented
        transforms.append(theirs._build_transform(224))
    auto, none = transforms
    picture = opened(photo(500, 375, 0))
    assert torch.allclose(data.preprocess(picture), none(picture), atol=1e-6)
    assert torch.equal(data.tokenize(CAPTIONS), tokenize(CAPTIONS))
    return {"for training, augmented": lambda line: auto(opened(line)),
            "for training, not augmented": lambda line: none(opened(line)),
            "preprocess": lambda line: none(opened(line)), "tokenize": tokenize}


def transformers() -> dict:
    """With torchvision it resizes faster than with Pillow, and one grey level of 255 off."""
    from transformers import BertTokenizerFast, ChineseCLIPImageProcessor
    transform = ChineseCLIPImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False)
    tokenize = BertTokenizerFast(data.VOCAB)
    padded = {"padding": "max_length", "max_length": 52, "truncation": True}
    return {"preprocess": lambda line: transform(opened(line), return_tensors="pt"),
            "tokenize": lambda captions: tokenize(captions, **padded)}


def bench_data(args) -> list[list[str]]:
    rows = [["what, on one core", "ours", "official", "ratio", "transformers", "ratio"]]
    ways = {"ours": ours()} | {make.__name__: make() for make in (official, transformers)
                               if installed(make.__name__)}

    def add(what: str, key: str, items: list, count: int):
        actions = {who: lambda way=way: [way[key](item) for item in items]
                   for who, way in ways.items() if key in way}
        times = in_turn(actions, args.runs)
        say(rows, [what, *beside(count, "ours", times, ("official", "transformers"), digits=0)])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for width, height, count in PHOTOS:
        lines = [photo(width, height, seed) for seed in range(count)]
        for key in ("for training, augmented", "for training, not augmented", "preprocess"):
            add(f"JPEG {width} x {height}, {key}, pictures/s", key, lines, count)
    add("tokenize, captions/s", "tokenize", [CAPTIONS], len(CAPTIONS))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(pairs, "CACHE", f"{folder}/cache"):
        line = photo(64, 64, 0).decode()
        with open(f"{folder}/train_imgs.tsv", "w", encoding="utf-8") as file:
            file.writelines(f"{n}\t{line}\n" for n in range(args.lines))
        with open(f"{folder}/train_texts.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text_id": n, "text": f"{CAPTION}{n}", "image_ids": [n]}) + "\n"
                            for n in range(args.lines))
        rate = 2 * args.lines / seconds_of(lambda: open_pairs(folder, "train"))
    say(rows, [f"index of {args.lines:,} pictures and captions, lines/s", f"{rate:,.0f}", *["-"] * 4])
    torch.set_num_threads(threads)
    return rows
