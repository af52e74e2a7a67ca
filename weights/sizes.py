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

# our name of each number -> (Hugging Face's name, the value it means where config.json leaves it out)
HUGGING_FACE_VISION = {"resolution": ("image_size", 224), "patch_size": ("patch_size", 32),
                       "width": ("hidden_size", 768), "layers": ("num_hidden_layers", 12)}
HUGGING_FACE_TEXT = {"layers": ("num_hidden_layers", 12), "width": ("hidden_size", 768),
                     "heads": ("num_attention_heads", 12), "vocab_size": ("vocab_size", 30522),
                     "max_positions": ("max_position_embeddings", 512), "token_types": ("type_vocab_size", 2),
                     "dropout": ("hidden_dropout_prob", 0.1)}


def read_config(config: str, path: str, any_activation: bool = False) -> Sizes:
    """The sizes in a config of the file at `path`: the JSON that model.save wrote into it, or Hugging Face's
    config.json. WeightsError if no model can be built from it in a reasonable time, or if it names another
    activation than ours."""
    try:
        raw = json.loads(config)
        for tower, ours in () if any_activation else (("vision", "quick_gelu"), ("text", "gelu")):
            found = config_of(raw, tower).get("hidden_act", ours)
            if found != ours:
                raise ValueError(f"hidden_act is {found}, expected {ours}")
        embed_dim, visual, text = sizes_of(raw)
        for name, size in [("embed_dim", embed_dim), *vars(visual).items(), *vars(text).items()]:
            limit = 100 if name in ("layers", "blocks") else 2**20
            for number in size if name == "blocks" else [size]:
                if name != "dropout" and (type(number) is not int or not 0 < number <= limit):
                    raise ValueError(f"{name} is {number!r}, expected 1 to {limit}")
        if isinstance(visual, ResNetConfig):
            possible = len(visual.blocks) == 4 and 32 * visual.width % visual.heads == 0
        else:
            possible = visual.width % visual.head_width == 0
        if not possible or text.width % text.heads or not 0 <= text.dropout < 1:
            raise ValueError("expected heads that divide the width, 4 stages of blocks, dropout below 1")
        return embed_dim, visual, text
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
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
    visual, kind = raw["visual"], ViTConfig
    if "blocks" in visual:
        visual, kind = visual | {"blocks": tuple(visual["blocks"])}, ResNetConfig
    return raw["embed_dim"], kind(**visual), BertConfig(**raw["text"])


def config_of(raw: dict, tower: str) -> dict:
    """One tower's part of config.json. Files of 2022 hold each part twice, and the first of these counts."""
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
    """The name of the model that has most of its landmarks in the state dict, or "" if none has two."""
    def found(name: str) -> int:
        return sum(key in state and tuple(state[key].shape) == shape
                   for key, shape in landmarks(models[name]).items())
    best = max(models, key=lambda name: (found(name), models[name].text.layers))  # 12 layers contain 3, too
    return best if found(best) > 1 else ""


class SkipInit(torch.overrides.TorchFunctionMode):
    """Turns torch.nn.init off while a model is built on the meta device. There is nothing to fill there, but
    the first normal_ needs a second to find that out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def describe(config, models: dict) -> str:
    """The name of the model with this config, or its sizes if it is none of `models`."""
    return next((name for name, row in models.items() if row == config), f"a model of your own ({config})")


def check(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: str, models: dict):
    """WeightsError unless `state` has every tensor of `wanted` and no other, each of the right shape and
    kind, and all values finite."""
    if any(".parametrizations." in key for key in state):
        raise WeightsError(f"{path}: a checkpoint of --lora holds only what trains; best.safetensors beside "
                           "it is the whole model")
    misfits = {
        "missing": [k for k in wanted if k not in state],
        "unknown": [k for k in state if k not in wanted],
        "misshaped": [f"{k} is {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}"
                      for k in wanted if k in state and state[k].shape != wanted[k].shape]}
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''})"
             for what, keys in misfits.items() if keys]
    if found:
        looks, model = guess(state, models), guess(wanted, models) or "this model"
        what = f"is {looks}, not {model} (--model {looks})" if looks not in ("", model) else (
            f"does not fit {model}")
        raise WeightsError(f"{path}: {what}: {'; '.join(found)}")
    for key, value in state.items():
        # One value that is not finite makes the sum so, and a sum is five times as fast as testing each.
        finite = torch.isfinite(value.sum()) or torch.isfinite(value).all()
        if not finite or value.is_floating_point() != wanted[key].is_floating_point():
            raise WeightsError(f"{path}: {key} holds {value.dtype}, expected finite {wanted[key].dtype}. The "
                               "file is damaged or its training diverged; use an earlier one")
