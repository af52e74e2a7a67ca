"""
Training starts from published weights (paper, app. A.2): a whole model, or the image tower, its projection
and the temperature from a CLIP file and the text tower from a RoBERTa file.
"""

import json
import os

from torch import nn

from vit import ViTConfig, resize_positions
from weights import download
from weights.names import WeightsError, image_tower, left_out, text_tower, whole_model
from weights.read import find, read, read_description
from weights.sizes import NOT_A_CONFIG, check, check_activations, config_of, heads, sizes_of


def initialise(clip: nn.Module, models: dict, image_init: str = "", text_init: str = "", init: str = ""):
    """Overwrite the weights of a ChineseCLIP with those of `init`, then its image tower with that of
    `image_init`, then its text tower with that of `text_init`. Each is a file, a folder, a published name, or
    "" for none. `models` is model.MODELS. Prints what was taken over.

    A position table of another resolution is interpolated, as from ViT-L-14 to ViT-L-14-336. WeightsError if
    a file does not fit."""
    for source, part, take in (
            (init, "", whole_model), (image_init, "visual.", image_tower), (text_init, "bert.", text_tower)):
        if not source:
            continue
        path = find(source)
        everything, config, _ = read(path)
        check_config(config, clip.config, part, path)
        state = take(everything, path)
        mine = clip.state_dict()
        for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
            if name in state and name in mine and len(state[name]) != len(mine[name]):
                try:
                    resized = resize_positions(state[name], len(mine[name]))
                except ValueError as error:
                    raise WeightsError(f"{path}: {name}: {error}") from None
                print(f"{path}: {name} interpolated from {len(state[name])} to {len(mine[name])} rows")
                state[name] = resized
        wanted = {k: v for k, v in mine.items() if k.startswith(part) or k in state}
        check(state, wanted, path, models)
        clip.load_state_dict(state, strict=False)
        print(f"{len(state)} tensors from {path}{left_out(everything, state)}")


def check_config(config: str, mine, part: str, path: str):
    """Compare what no shape shows, the heads and the activation. WeightsError if a tower that is taken over
    has another number of heads in the file than in `mine`, because every feature would be wrong. If the
    image tower was trained with another activation, print a line."""
    try:
        raw = json.loads(config or "{}")
        theirs = activation(raw, path)
        if part != "visual.":
            check_activations(raw)
        _, visual, text = sizes_of(raw) if raw else (0, mine.visual, mine.text)
        found = {"visual.": heads(visual), "bert.": text.heads}
    except NOT_A_CONFIG as error:
        raise WeightsError(f"{path}: its config cannot be read ({error!r:.200})") from None
    if part != "bert." and type(visual) is not type(mine.visual):
        return  # an altogether different model, which `check` describes better
    if part == "visual." and isinstance(visual, ViTConfig) and theirs != "quick_gelu":
        print(f"{path}: this image tower was trained with {theirs!r:.99}; here it computes QuickGELU, as in "
              "the official code, and its features differ until training has made up for it")
    for tower, wanted in (("visual.", heads(mine.visual)), ("bert.", mine.text.heads)):
        if tower.startswith(part) and found[tower] != wanted:
            raise WeightsError(f"{path}: its {tower.rstrip('.')} tower has {found[tower]!r:.99} heads, but "
                               f"this model's has {wanted}; the features would differ")


def activation(raw: dict, path: str) -> str:
    """Hugging Face's word for the activation of a CLIP's image tower. It stands in the file's config (`raw`,
    {} if there is none) or in open_clip's config beside it; of a published name it is known."""
    if "vision_config" in raw:
        return config_of(raw, "vision").get("hidden_act", "quick_gelu")
    folder = os.path.dirname(path)
    beside = os.path.join(folder, "open_clip_config.json")
    if os.path.isfile(beside):
        exact = not json.loads(read_description(beside))["model_cfg"].get("quick_gelu", False)
    else:
        exact = os.path.basename(folder) in download.EXACT_GELU
    return "gelu" if exact else "quick_gelu"
