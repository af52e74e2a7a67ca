"""
Which model is this? The sizes come from the config that a file brings, ours or Hugging Face's config.json. If
a file brings none, they are guessed from the shapes of its tensors.

model.py stands above this file, so nothing here imports it: `models` is always its table MODELS, and a config
is read as the tuple (embed_dim, visual, text), which are the fields of model.ModelConfig.
"""

import json

import torch

from bert import BertConfig
from resnet import ResNetConfig
from vit import ViTConfig
from weights.names import WeightsError

Sizes = tuple[int, ViTConfig | ResNetConfig, BertConfig]

# ------------------------------------------------------------------------------------------------------------
# from a config

# reading a config that describes something else may raise any of these
NOT_A_CONFIG = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)

# our name of each number -> (Hugging Face's name, the value it means where config.json leaves it out)
HUGGING_FACE_VISION = {"resolution": ("image_size", 224), "patch_size": ("patch_size", 32),
                       "width": ("hidden_size", 768), "layers": ("num_hidden_layers", 12)}
HUGGING_FACE_TEXT = {"layers": ("num_hidden_layers", 12), "width": ("hidden_size", 768),
                     "heads": ("num_attention_heads", 12), "vocab_size": ("vocab_size", 30522),
                     "max_positions": ("max_position_embeddings", 512), "token_types": ("type_vocab_size", 2),
                     "dropout": ("hidden_dropout_prob", 0.1)}


def read_config(text: str, path: str) -> Sizes:
    """The config of the file at `path`: `text` is Hugging Face's config.json, or ours, which model.save wrote
    into the file. WeightsError if no model can be built from it."""
    try:
        raw = json.loads(text)
        if "vision_config" in raw:
            return buildable(*from_hugging_face_config(raw))
        visual = raw["visual"]
        if "blocks" in visual:
            visual = ResNetConfig(**visual | {"blocks": tuple(visual["blocks"])})
        else:
            visual = ViTConfig(**visual)
        return buildable(raw["embed_dim"], visual, BertConfig(**raw["text"]))
    except NOT_A_CONFIG as error:
        raise WeightsError(f"{path}: the config in it, or in config.json beside it, describes no model of "
                           f"ours ({error!r:.200})") from None


def buildable(embed_dim: int, visual: ViTConfig | ResNetConfig, text: BertConfig) -> Sizes:
    """The sizes as they are. ValueError if no model can be built from them, or none in a reasonable time."""
    sizes = {f"{tower} {name}": size for tower, config in (("visual", visual), ("text", text))
             for name, size in vars(config).items()}
    dropout = sizes.pop("text dropout")
    for name, size in (sizes | {"embed_dim": embed_dim}).items():
        limit = 100 if name.endswith(("layers", "blocks")) else 2**20
        for number in size if isinstance(size, tuple) else [size]:
            if type(number) is not int or not 0 < number <= limit:
                raise ValueError(f"{name} is {number!r}, expected 1 to {limit}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}, expected 0 to below 1")
    if isinstance(visual, ResNetConfig) and len(visual.blocks) != 4:
        raise ValueError(f"{len(visual.blocks)} stages of blocks, expected 4")
    if isinstance(visual, ResNetConfig):
        divides = 32 * visual.width % visual.heads == 0
    else:
        divides = visual.width % visual.head_width == 0
    if not divides or text.width % text.heads:
        raise ValueError("the heads do not divide the width")
    return embed_dim, visual, text


def from_hugging_face_config(raw: dict) -> Sizes:
    """config.json of a ChineseCLIPModel -> ours. ValueError if it asks for another activation."""
    vision, text = config_of(raw, "vision"), config_of(raw, "text")
    for part, ours in ((vision, "quick_gelu"), (text, "gelu")):
        if part.get("hidden_act", ours) != ours:
            raise ValueError(f"hidden_act is {part['hidden_act']}, expected {ours}")
    visual = {mine: vision.get(*theirs) for mine, theirs in HUGGING_FACE_VISION.items()}
    head_width = visual["width"] // vision.get("num_attention_heads", 12)
    return (raw.get("projection_dim", 512), ViTConfig(**visual, head_width=head_width),
            BertConfig(**{mine: text.get(*theirs) for mine, theirs in HUGGING_FACE_TEXT.items()}))


def config_of(raw: dict, tower: str) -> dict:
    """The "vision" or "text" part of config.json. Files of 2022 hold each twice, and the first of these
    counts."""
    return raw.get(f"{tower}_config_dict") or raw[f"{tower}_config"]


def heads(visual: ViTConfig | ResNetConfig) -> int:
    return visual.heads if isinstance(visual, ResNetConfig) else visual.width // visual.head_width


# ------------------------------------------------------------------------------------------------------------
# from the shapes of tensors


def signature(state: dict[str, torch.Tensor]) -> tuple:
    """The depths and shapes of a (perhaps partial) state dict that tell one model from another. The number of
    heads is not among them: no shape shows it."""
    depths = [len({key.split(part)[1].split(".")[0] for key in state if part in key})
              for part in ("visual.transformer.resblocks.", "visual.layer1.", "visual.layer3.",
                           "bert.encoder.layer.")]
    tables = ("visual.conv1.weight", "visual.positional_embedding", "visual.attnpool.positional_embedding",
              "visual.proj", "visual.attnpool.c_proj.weight", "bert.embeddings.word_embeddings.weight",
              "text_projection")
    return *depths, *(tuple(state[key].shape) if key in state else None for key in tables)


def signature_of(config) -> tuple:
    """The signature of a row of MODELS, computed without building the model."""
    v, t, E = config.visual, config.text, config.embed_dim
    words, projection = (t.vocab_size, t.width), (t.width, E)
    if isinstance(v, ViTConfig):
        positions = ((v.resolution // v.patch_size) ** 2 + 1, v.width)
        patches = (v.width, 3, v.patch_size, v.patch_size)
        return v.layers, 0, 0, t.layers, patches, positions, None, (v.width, E), None, words, projection
    D = 32 * v.width  # of the last feature map
    positions, stem = ((v.resolution // 32) ** 2 + 1, D), (v.width // 2, 3, 3, 3)
    return 0, v.blocks[0], v.blocks[2], t.layers, stem, None, positions, None, (E, D), words, projection


class SkipInit(torch.overrides.TorchFunctionMode):
    """Turns torch.nn.init off while a model is built on the meta device. There is nothing to fill there, but
    the first normal_ needs a second to find that out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def guess(state: dict[str, torch.Tensor], models: dict) -> str:
    """The name of the model that a (perhaps partial) state dict looks most like, or "" if none of them shares
    half of its signature."""
    mine = signature(state)
    known = [i for i, value in enumerate(mine) if value]
    share = {name: sum(mine[i] == signature_of(row)[i] for i in known) / max(1, len(known))
             for name, row in models.items()}
    best = max(share, key=share.get)
    return best if share[best] >= 0.5 else ""


def describe(config, models: dict) -> str:
    """The name of the model with this config, or its sizes if it is none of `models`."""
    names = [name for name, row in models.items() if row == config]
    return names[0] if names else f"a model of your own ({config})"


def check(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: str, models: dict):
    """WeightsError unless `state` has every tensor of `wanted` and no other, each of the right shape and
    kind, and all values finite."""
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    misshaped = [f"{k} is {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}"
                 for k in wanted if k in state and state[k].shape != wanted[k].shape]
    misshaped += [f"{k} holds {state[k].dtype}" for k in wanted
                  if k in state and state[k].is_floating_point() != wanted[k].is_floating_point()]
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''})"
             for what, keys in (("missing", missing), ("unknown", unknown), ("misshaped", misshaped)) if keys]
    if found:
        like = guess(state, models)
        raise WeightsError(f"{path}: does not fit this model: {'; '.join(found)}"
                           + (f"; it looks like {like}" if like else ""))
    for key, value in state.items():
        # One value that is not finite makes the sum so, and a sum is five times as fast as testing each.
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {key} holds values that are not finite. The file is damaged or its "
                               "training diverged; use an earlier one")
