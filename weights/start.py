"""
Training starts from published weights (paper, app. A.2): a whole model, or the image tower, its projection
and the temperature from a CLIP file and the text tower from a RoBERTa file.
"""

import json

from torch import nn

from vit import resize_positions
from weights.names import WeightsError, left_out, one_tower, whole_model
from weights.read import find, read
from weights.sizes import check, config_of, heads, read_config


def initialise(clip: nn.Module, models: dict, image_init: str = "", text_init: str = "", init: str = ""):
    """Overwrite the weights of a ChineseCLIP with those of `init`, then its image tower with that of
    `image_init`, then its text tower with that of `text_init`. Each is a file, a folder, a published name, or
    "" for none. `models` is model.MODELS. Prints what was taken over.

    A position table of another resolution is interpolated, as from ViT-L-14 to ViT-L-14-336. WeightsError if
    a file does not fit."""
    for source, part in (init, ""), (image_init, "visual."), (text_init, "bert."):
        if not source:
            continue
        path = find(source)
        everything, config, _ = read(path)
        state = one_tower(everything, part, path) if part else whole_model(everything, path)
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
        if config:  # no shape shows the number of heads, and with another one every feature would be wrong
            _, visual, text = read_config(config, path, any_activation=part == "visual.")
            for tower, theirs, ours in (("visual.", heads(visual), heads(clip.config.visual)),
                                        ("bert.", text.heads, clip.config.text.heads)):
                if tower.startswith(part) and theirs != ours:
                    raise WeightsError(f"{path}: its tower {tower}* has {theirs} heads, but this model's has "
                                       f"{ours}; the features would differ")
        activation = config_of(json.loads(config or "{}"), "vision").get("hidden_act", "quick_gelu")
        if "token_embedding.weight" in everything and len(mine["visual.conv1.weight"]) == 1280:
            activation = "gelu"  # LAION's ViT-H-14, which open_clip saves without a config
        if part == "visual." and activation != "quick_gelu":
            print(f"{path}: this image tower was trained with {activation!r:.99}; here it computes QuickGELU "
                  "as in the official code, and its features differ until training has made up for it")
        clip.load_state_dict(state, strict=False)
        what = {"": "both towers", "visual.": "the image tower", "bert.": "the text tower"}[part]
        print(f"{what}: {len(state)} tensors from {path}{left_out(everything, state)}")
