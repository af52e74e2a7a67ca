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
    """The config of the file at `path`: `text` is the JSON that model.save wrote into it, or Hugging Face's
    config.json. WeightsError if no model can be built from it."""
    try:
        raw = json.loads(text)
        check_activations(raw)
        return buildable(*sizes_of(raw))
    except NOT_A_CONFIG as error:
        raise WeightsError(f"{path}: the config in it, or in config.json beside it, describes no model of "
                           f"ours ({error!r:.200})") from None


def sizes_of(raw: dict) -> Sizes:
    """The sizes in a config, whatever they are."""
    if "vision_config" in raw:
        vision, text = config_of(raw, "vision"), config_of(raw, "text")
        visual = {mine: vision.get(*theirs) for mine, theirs in HUGGING_FACE_VISION.items()}
        head_width = visual["width"] // vision.get("num_attention_heads", 12)
        return (raw.get("projection_dim", 512), ViTConfig(**visual, head_width=head_width),
                BertConfig(**{mine: text.get(*theirs) for mine, theirs in HUGGING_FACE_TEXT.items()}))
    visual = raw["visual"]
    if "blocks" in visual:
        visual = ResNetConfig(**visual | {"blocks": tuple(visual["blocks"])})
    else:
        visual = ViTConfig(**visual)
    return raw["embed_dim"], visual, BertConfig(**raw["text"])


def check_activations(raw: dict):
    """ValueError if a config of Hugging Face's asks for others than ours. Our own config names none."""
    if "vision_config" in raw:
        for tower, ours in (("vision", "quick_gelu"), ("text", "gelu")):
            found = config_of(raw, tower).get("hidden_act", ours)
            if found != ours:
                raise ValueError(f"hidden_act is {found}, expected {ours}")


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
    width = 32 * visual.width if isinstance(visual, ResNetConfig) else visual.width
    divisor = visual.heads if isinstance(visual, ResNetConfig) else visual.head_width
    if width % divisor or text.width % text.heads:
        raise ValueError("the heads do not divide the width")
    return embed_dim, visual, text


def config_of(raw: dict, tower: str) -> dict:
    """The "vision" or "text" part of config.json. Files of 2022 hold each twice, and the first of these
    counts."""
    return raw.get(f"{tower}_config_dict") or raw.get(f"{tower}_config", {})


def heads(visual: ViTConfig | ResNetConfig) -> int:
    return visual.heads if isinstance(visual, ResNetConfig) else visual.width // visual.head_width


# ------------------------------------------------------------------------------------------------------------
# from the shapes of tensors


def landmarks(config) -> dict[str, tuple[int, ...]]:
    """A few tensors that tell a row of MODELS from the others, with their shapes. The last block of a stack
    shows its depth. Nothing shows the number of heads."""
    v, t = config.visual, config.text
    text = {"bert.embeddings.word_embeddings.weight": (t.vocab_size, t.width),
            f"bert.encoder.layer.{t.layers - 1}.output.dense.bias": (t.width,),
            "text_projection": (t.width, config.embed_dim)}
    if isinstance(v, ViTConfig):
        return text | {
            "visual.conv1.weight": (v.width, 3, v.patch_size, v.patch_size),
            "visual.positional_embedding": ((v.resolution // v.patch_size) ** 2 + 1, v.width),
            f"visual.transformer.resblocks.{v.layers - 1}.ln_1.bias": (v.width,)}
    return text | {
        "visual.conv1.weight": (v.width // 2, 3, 3, 3),
        "visual.attnpool.positional_embedding": ((v.resolution // 32) ** 2 + 1, 32 * v.width),
        f"visual.layer3.{v.blocks[2] - 1}.bn3.bias": (16 * v.width,)}


def guess(state: dict[str, torch.Tensor], models: dict) -> str:
    """The name of the model that has most of its landmarks in the state dict, or "" if none has half of them.
    A tower that is missing altogether does not count."""
    parts = {key.split(".")[0] for key in state}

    def share(name: str) -> float:
        expected = [(k, shape) for k, shape in landmarks(models[name]).items() if k.split(".")[0] in parts]
        found = [k for k, shape in expected if k in state and tuple(state[k].shape) == shape]
        return len(found) / max(1, len(expected))
    best = max(models, key=lambda name: (share(name), models[name].text.layers))  # 12 layers contain 3, too
    return best if share(best) >= 0.5 else ""


class SkipInit(torch.overrides.TorchFunctionMode):
    """Turns torch.nn.init off while a model is built on the meta device. There is nothing to fill there, but
    the first normal_ needs a second to find that out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


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
