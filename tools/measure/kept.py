"""
Features that are kept on disk, because encoding takes long and comparing does not.

DIR/image_features.npy [N_image, E] and DIR/text_features.npy [N_text, E] are float32, for other programs too.
DIR/features.json records what they were computed from. It is written last, so that nothing is reused after a
run that was killed, and features of another model, other data or another preprocessing are refused.
"""

import hashlib
import json
import os

import numpy as np
import torch
from PIL import Image

from common import rank, replace, write_json
from data import preprocess, tokenize
from eval import pair_features
from sources.pairs import DataError, Pairs
from weights.read import digest

FILES = ("image_features.npy", "text_features.npy")


def kept_features(clip, pairs: Pairs, context_length: int, folder: str, replace_others: bool = False):
    """`eval.pair_features` [N_image, E] and [N_text, E], read from `folder`, or computed and kept there; only
    computed if `folder` is "". Features of something else are refused, or replaced."""
    if not folder:
        return pair_features(clip, pairs, context_length)
    origin = origin_of(clip, pairs, context_length)
    if os.path.isfile(os.path.join(folder, "features.json")):
        try:
            return read_features(folder, origin)
        except DataError:
            if not replace_others:
                raise
    features = pair_features(clip, pairs, context_length)
    if rank() == 0:
        for name, array in zip(FILES, features):
            def write_to(temporary: str, array=array):
                with open(temporary, "wb") as file:  # given a name, np.save would add .npy
                    np.save(file, array.numpy())
            replace(os.path.join(folder, name), write_to)
        write_json(os.path.join(folder, "features.json"), origin)
        print(f"{folder}: kept the features of {pairs.image_count:,} images and {len(pairs.texts):,} texts")
    return features


def origin_of(clip, pairs: Pairs, context_length: int) -> dict:
    """Everything that the features depend on: weights, pictures, captions, and what the code makes of them,
    which a digest of one preprocessed picture and one caption stands for."""
    picture = Image.frombytes("RGBA", (60, 50), np.random.default_rng(0).bytes(12000))  # with transparency
    transformed = preprocess(picture, 32).numpy().tobytes() + tokenize(["一只“Cat”"]).numpy().tobytes()
    return {"model": digest(clip.state_dict()), "pictures": pairs.fingerprint(),
            "captions": hashlib.sha256(json.dumps(list(pairs.texts)).encode()).hexdigest(),
            "context_length": context_length, "preprocessing": hashlib.sha256(transformed).hexdigest(),
            "precision": str(clip.precision), "dtype": str(clip.dtype),
            "shapes": [[count, clip.config.embed_dim] for count in (pairs.image_count, len(pairs.texts))]}


def read_features(folder: str, origin: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The features kept in `folder`. DataError if they are damaged or have another origin."""
    header = os.path.join(folder, "features.json")
    remedy = f"name another folder, or delete {header} to encode again"
    try:
        with open(header, encoding="utf-8") as file:
            found = json.load(file)
        arrays = [np.load(os.path.join(folder, name)) for name in FILES]  # which executes no pickled code
        found |= {"shapes": [list(array.shape) for array in arrays if array.dtype == np.float32]}
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: its features cannot be read ({error}); {remedy}") from None
    other = [key for key, value in origin.items() if found.get(key) != value]
    if other:
        raise DataError(f"{folder}: features of something else (not the same: {', '.join(other)}); {remedy}")
    if rank() == 0:
        print(f"{folder}: features of this model and data are there; nothing is encoded")
    return tuple(map(torch.from_numpy, arrays))
