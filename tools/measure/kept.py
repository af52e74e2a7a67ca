"""
From pictures and captions to unit features, by all processes together, and how they are kept for next time.

    image_features, text_features = pair_features(clip, pairs)              # encoded now
    image_features, text_features = pair_features(clip, pairs, folder=DIR)  # from DIR, or else kept there

DIR/image_features.npy [N_image, E] and DIR/text_features.npy [N_text, E] are float32, for other programs to
read too. DIR/features.json says what they are features of, and is written last: without it nothing is
reused. Features of another model, other data or another preprocessing are refused.
"""

import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import model
from data import preprocess, squash, to_pixels, tokenize
from common import rank, wait_for_all, world_size
from sources.pairs import DataError, Pairs
from common import replace, write_json

FILES = ("image_features.npy", "text_features.npy")


@torch.inference_mode()
def encode(function, items, batch_size: int, what: str, get=None) -> torch.Tensor:
    """Apply `function` (a list of items -> features [b, E]) in batches -> unit features [N, E], float32, on
    the CPU. With `get`, the function is given a list of get(item), which threads prepare a batch ahead. Many
    processes take turns, so that the long captions at the end are not all one's, and all get all features. A
    bar with rate and time left appears on a terminal when it takes longer than two seconds."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    mine = batches[rank() :: world_size()]
    ready, parts = ahead(get, mine) if get else iter(mine), [[]]
    for _ in tqdm(mine, desc=what, delay=2, leave=False, disable=None if rank() == 0 else True):
        parts[0].append(model.normalise(function(next(ready))).cpu())
    if world_size() > 1:
        wait_for_all()
        own, parts = parts[0], [[]] * world_size()
        dist.all_gather_object(parts, own)
    features = torch.cat([parts[i % world_size()][i // world_size()] for i in range(len(batches))])
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise DataError(f"{what}: {bad} of {len(features)} features are not finite numbers")
    return features


def ahead(get, batches: list):
    """Yields [get(item) of a batch] for every batch, while threads are at the next one: Pillow decodes
    outside of Python's lock, so a GPU need not wait for one core."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this process's share
    with ThreadPoolExecutor(max(1, min(8, cores))) as pool:
        coming = []
        for batch in [*batches, []]:
            waiting, coming = coming, [pool.submit(get, item) for item in batch]
            if waiting:
                yield [future.result() for future in waiting]


def encode_images(clip, get_image, count: int, batch_size: int = 0) -> torch.Tensor:
    """get_image(row) -> PIL image, for rows 0 to count - 1, called from several threads -> unit features
    [count, E]. batch_size 0: 64 on a GPU; on a CPU 2^19 pixels together, 10 pictures of 224: with 64 RN50
    was a third slower on two cores, ViT-B-16 in bfloat16 a fifth."""
    device, resolution = clip.logit_scale.device, clip.config.visual.resolution
    batch_size = batch_size or (64 if device.type == "cuda" else max(1, 2**19 // resolution**2))

    def features(pictures):
        with model.autocast(device):
            return clip.encode_image(to_pixels(torch.stack(pictures).to(device)))

    return encode(features, range(count), batch_size, "encoding images",
                  get=lambda row: squash(get_image(row), resolution))


def encode_texts(clip, texts: list[str], context_length: int = 52, batch_size: int = 256) -> torch.Tensor:
    """Captions -> unit features [N, E]. Captions of like length are encoded together, so that little is
    padding."""
    device = clip.logit_scale.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))

    def features(rows):
        ids = tokenize([texts[i] for i in rows], context_length)
        with model.autocast(device):
            return clip.encode_text(ids)

    sorted_features = encode(features, order, batch_size, "encoding texts")
    return sorted_features[torch.tensor(order).argsort()]  # back to the order of `texts`


# ------------------------------------------------------------------------------------------------------------
# kept for the next time


def pair_features(
    clip, pairs: Pairs, context_length: int = 52, folder: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> unit features of all pictures [N_image, E] and all captions [N_text, E] of a split, in float32. With
    `folder` taken from there, or else encoded and kept there; DataError if those there are of something
    else."""
    # what is not text says where it is
    texts = [text if isinstance(text, str) else pairs.text(row) for row, text in enumerate(pairs.texts)]
    of = description(clip, pairs, texts, context_length) if folder else {}
    kept = open_features(folder, of) if folder else None
    if kept:
        return kept
    image_features = encode_images(clip, pairs.image, pairs.image_count)
    text_features = encode_texts(clip, texts, context_length)
    if folder and rank() == 0:
        for name, features in zip(FILES, (image_features, text_features)):
            replace(os.path.join(folder, name), functools.partial(save_array, features.numpy()))
        write_json(os.path.join(folder, "features.json"), of)
        print(f"{folder}: features of {len(image_features):,} images and {len(texts):,} texts are kept there")
    return image_features, text_features


def description(clip, pairs: Pairs, texts: list[str], context_length: int) -> dict:
    """What the features depend on: weights, pictures, captions, and what the code makes of both."""
    weights = hashlib.sha256()
    for name, tensor in clip.state_dict().items():
        weights.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    picture = Image.frombytes("RGB", (60, 50), np.random.default_rng(0).bytes(9000))
    transformed = preprocess(picture, 32).numpy().tobytes() + tokenize(["一只“Cat”"]).numpy().tobytes()
    return {"model": weights.hexdigest(), "pictures": pairs.fingerprint(),
            "captions": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            "context_length": context_length, "preprocessing": hashlib.sha256(transformed).hexdigest(),
            "precision": str(model.precision(clip.logit_scale.device)), "dtype": str(clip.dtype),
            "shapes": [[pairs.image_count, clip.config.embed_dim], [len(texts), clip.config.embed_dim]]}


def open_features(folder: str, of: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The features kept in `folder`, None if there are none. DataError if they are of something else than
    `of`."""
    header = os.path.join(folder, "features.json")
    if not os.path.isfile(header):
        return None
    try:
        with open(header, encoding="utf-8") as file:
            found = json.load(file)
        other = [key for key, value in of.items() if found.get(key) != value]
        other = [key for key in other if key != "model" or "dtype" not in other]  # of which it is a digest
    except (ValueError, AttributeError):
        raise DataError(
            f"{header}: not the header of kept features; delete it, or name another folder") from None
    if other:
        raise DataError(f"{header}: features of something else (not the same: {', '.join(other)}); name "
                        "another folder, or delete this one to encode again")
    arrays = []
    for name, shape in zip(FILES, of["shapes"]):
        path = os.path.join(folder, name)
        try:
            arrays.append(torch.from_numpy(np.load(path)))  # allow_pickle is off: arrays only
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete {header} to encode again") from None
        if list(arrays[-1].shape) != shape or arrays[-1].dtype != torch.float32:
            raise DataError(f"{path}: {list(arrays[-1].shape)}, expected {shape} of float32; delete {header} "
                            "to encode again")
    if rank() == 0:
        print(f"{folder}: features of this model and data are there; nothing is encoded")
    return arrays[0], arrays[1]


def save_array(array: np.ndarray, path: str):
    with open(path, "wb") as file:  # np.save would add .npy to a name
        np.save(file, array)
