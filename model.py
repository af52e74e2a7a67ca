"""
Two towers, one space: the model, the table of its sizes, load and save.

    pixels [B, 3, S, S] -> vit.py or resnet.py -> image_features [B, E] -.
                                                                         |-> cosine * exp(logit_scale)
    ids    [B, T]       -> bert.py, projection -> text_features  [B, E] -'   = logits [B, B]

The features of a picture and of its caption should point in the same direction.
Chinese CLIP (Yang et al., 2022) is OpenAI's CLIP with a Chinese BERT as its text tower.

    import model
    clip, preprocess = model.load("clip_cn_vit-b-16.pt")             # any file that weights/read.py can read
    image_features = clip.encode_image(preprocess(image)[None])      # [1, E]
    text_features = clip.encode_text(model.tokenize(["一只猫"]))      # [1, E]

Code written for `cn_clip.clip` or for OpenAI's `clip` runs with this module imported in its place.
"""

import dataclasses
import functools
import json
import math

import torch
from torch import nn

from bert import Bert, BertConfig
from data import preprocess, tokenize  # noqa: F401  (tokenize is part of this module's interface)
from resnet import ModifiedResNet, ResNetConfig
from vit import VisionTransformer, ViTConfig
from weights.download import COMPLETE, SOURCES
from weights.names import ONE_TOWER, WeightsError, left_out, whole_model
from weights.read import find, read, write
from weights.sizes import SkipInit, check, describe, guess, read_config


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    embed_dim: int  # E, the joint width
    visual: ViTConfig | ResNetConfig
    text: BertConfig


RBT3, BASE, LARGE = BertConfig(layers=3), BertConfig(), BertConfig(layers=24, width=1024, heads=16)
MICRO, MINI = BertConfig(1, 128, 4, dropout=0.0), BertConfig(2, 128, 4, dropout=0.0)

# Paper, tables 1, 6 and 7; but ViT-H-14's weights have 16 text heads, not 24. The rows after it are our own.
MODELS: dict[str, ModelConfig] = {
    "RN50": ModelConfig(1024, ResNetConfig(224, width=64, blocks=(3, 4, 6, 3), heads=32), RBT3),
    "ViT-B-32": ModelConfig(512, ViTConfig(224, 32, width=768, layers=12), BASE),
    "ViT-B-16": ModelConfig(512, ViTConfig(224, 16, width=768, layers=12), BASE),
    "ViT-L-14": ModelConfig(768, ViTConfig(224, 14, width=1024, layers=24), BASE),
    "ViT-L-14-336": ModelConfig(768, ViTConfig(336, 14, width=1024, layers=24), BASE),
    "ViT-H-14": ModelConfig(1024, ViTConfig(224, 14, width=1280, layers=32, head_width=80), LARGE),
    "RN-micro": ModelConfig(128, ResNetConfig(64, 8, (1, 1, 1, 1), heads=4), MICRO),
    "RN-mini": ModelConfig(128, ResNetConfig(64, 12, (1, 1, 1, 1), heads=6), MINI),
    "RN-small": ModelConfig(256, ResNetConfig(64, 32, (1, 1, 1, 1), heads=16), BertConfig(2, 256, 4)),
    "ViT-mini": ModelConfig(128, ViTConfig(48, 8, width=128, layers=4, head_width=32), MINI),
    "RN-tiny": ModelConfig(16, ResNetConfig(32, 4, (1, 1, 1, 1), heads=4), BertConfig(2, 32, 2)),
    "ViT-tiny": ModelConfig(16, ViTConfig(32, 8, width=32, layers=2, head_width=16), BertConfig(2, 32, 2)),
}
TEXT_TOWERS = {"RBT3-chinese": RBT3, "RoBERTa-wwm-ext-base-chinese": BASE,
               "RoBERTa-wwm-ext-large-chinese": LARGE}  # cn_clip's names
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ChineseCLIP(nn.Module):
    """Its tensors have the official names: visual.*, bert.*, text_projection and logit_scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        tower = VisionTransformer if isinstance(config.visual, ViTConfig) else ModifiedResNet
        self.visual = tower(config.visual, config.embed_dim)
        self.bert = Bert(config.text)
        # Neither CLIP's nor BERT's published weights initialise the text projection (paper, app. A.2).
        self.text_projection = nn.Parameter(torch.empty(config.text.width, config.embed_dim))
        nn.init.normal_(self.text_projection, std=config.text.width**-0.5)
        # Cosines are divided by a temperature, which starts at 0.07 (CLIP paper, sec. 2.5). We learn t =
        # ln(1 / temperature) and multiply by exp(t), which is always positive.
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))
        self.precision = torch.float32  # of forward passes under `autocast`

    @property
    def dtype(self) -> torch.dtype:
        return self.text_projection.dtype

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, 3, S, S] from `preprocess` -> [B, E], not normalised."""
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
            raise TypeError(f"{getattr(pixels, 'shape', pixels)!s:.50}: expected preprocess(image)[None]")
        return self.visual(pixels.to(self.dtype))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] from `tokenize`, where 0 is padding and T at most 512 -> [B, E], not normalised."""
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"{ids!r:.99}: expected ids [B, T], from model.tokenize(captions)")
        return self.bert(ids) @ self.text_projection

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """-> image_features [B, E] and text_features [B, E] of unit norm, and the factor exp(logit_scale).
        `pixels` may also be image features [B, E] that were computed before (training/cache.py)."""
        image_features = normalise(pixels if pixels.ndim == 2 else self.encode_image(pixels))
        text_features = normalise(self.encode_text(ids))
        return image_features, text_features, self.logit_scale.exp()

    def get_similarity(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare every picture with every caption -> logits [B_image, B_text], and their transpose."""
        image_features, text_features, logit_scale = self(pixels, ids)
        logits_per_image = logit_scale * image_features @ text_features.T
        return logits_per_image, logits_per_image.T

    def set_grad_checkpointing(self, enable: bool = True):
        """Recompute the activations of transformer blocks in the backward pass instead of keeping them."""
        self.bert.encoder.grad_checkpointing = enable
        if isinstance(self.visual, VisionTransformer):
            self.visual.transformer.grad_checkpointing = enable


def normalise(features: torch.Tensor) -> torch.Tensor:
    """[..., E] -> the same directions with unit length, in float32 or better to keep the digits."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def autocast(clip: ChineseCLIP):
    """A context in which forward passes compute in `clip.precision`. Parameters stay float32."""
    return torch.autocast(clip.logit_scale.device.type, clip.precision, enabled=clip.precision.itemsize < 4)


def precision(device: torch.device) -> torch.dtype:
    """float32 on a CPU, bfloat16 on a GPU, or float16 on one that only emulates bfloat16 (V100, T4)."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# ------------------------------------------------------------------------------------------------------------
# load and save


def available_models() -> list[str]:
    """The released models, which `load` and `load_from_name` fetch by name. MODELS has more to train."""
    return list(COMPLETE)


def load(name: str, device: str | torch.device = "cpu", jit: bool = False, download_root: str | None = None,
         dtype: str | torch.dtype = torch.float32):
    """-> (model in eval mode, preprocess for its resolution). WeightsError if the file is not a model.

    `name` is a file, recognised by its content, a folder with such a file, or a name of `available_models`
    ("ViT-B-16", or "ViT-B/16" as OpenAI spells it), which is downloaded once, into `download_root`.
    dtype="bfloat16" halves the memory and, on CPUs that compute in it, about the time; features keep a cosine
    above 0.999 to those in float32 (docs/benchmarks.md)."""
    name, dtype = str(name), DTYPES.get(dtype, dtype)
    if jit or dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}, jit={jit}: expected {', '.join(DTYPES)}, and jit=False")
    if name in SOURCES and name not in COMPLETE:
        raise WeightsError(f"{name}: {ONE_TOWER}")
    path = find(name, download_root or "")
    everything, said, layout = read(path)  # `said`: the config in the file, as text
    state = whole_model(everything, path)
    config = ModelConfig(*read_config(said, path)) if said else MODELS.get(guess(state, MODELS))
    if config is None:
        raise WeightsError(f"{path}: its tensors look like none of {', '.join(MODELS)}")
    with SkipInit(), torch.device("meta"):  # no random numbers, which the file's would overwrite
        clip = ChineseCLIP(config)
    check(state, clip.state_dict(), path, MODELS)
    clip.load_state_dict(state, assign=True)
    for module in clip.modules():  # all to dtype but BatchNorm and t, as rounding t moves exp(t) by 1 %
        if not isinstance(module, nn.BatchNorm2d):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(torch.float32 if p is clip.logit_scale else dtype)
    if isinstance(clip.visual, ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)  # the layout in which its convolutions are fast
    count = sum(p.numel() for p in clip.parameters())
    print(f"loaded {path} ({layout}): {describe(config, MODELS)}, {count:,} parameters in {dtype}"
          f"{left_out(everything, state)}")
    clip.precision = precision(torch.device(device))
    return clip.to(device).eval(), functools.partial(preprocess, resolution=config.visual.resolution)


def load_from_name(name: str, device: str | torch.device | None = None, download_root: str | None = None,
                   vision_model_name: str = "", text_model_name: str = "", input_resolution: int = 0):
    """`load` with the arguments of cn_clip.clip, on a GPU if there is one and `device` names no other. The
    tensors say which model it is: WeightsError if one of the last three arguments contradicts them."""
    clip, preprocess = load(name, device or ("cuda" if torch.cuda.is_available() else "cpu"),
                            download_root=download_root)
    visual, text = clip.config.visual, clip.config.text
    for argument, said, right in (
            ("vision_model_name", vision_model_name, [n for n, m in MODELS.items() if m.visual == visual]),
            ("text_model_name", text_model_name, [n for n, t in TEXT_TOWERS.items() if t == text]),
            ("input_resolution", input_resolution, [visual.resolution])):
        if said and said not in right:
            raise WeightsError(f"{name}: {argument}={said!r}, but its tensors allow only {right}")
    return clip, preprocess


def save(clip: ChineseCLIP, path: str):
    """Write one .safetensors that carries its config: `load(path)` needs nothing else."""
    write(path, clip.state_dict(), {"config": json.dumps(dataclasses.asdict(clip.config))})
