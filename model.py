"""
Two towers, one space: the model, the table of its sizes, load and save. The only file that knows both towers.

    pixels [B, 3, S, S] -> vit.py or resnet.py -> image_features [B, E] -.
                                                                         |-> cosine * exp(logit_scale)
    ids    [B, T]       -> bert.py, projection -> text_features  [B, E] -'   = logits [B, B]

A picture and its caption should point the same way in the joint space; everything else follows from that.
Chinese CLIP (Yang et al., 2022) is OpenAI's CLIP with a Chinese BERT as its text tower.

    import model
    clip, preprocess = model.load("clip_cn_vit-b-16.pt")             # any file weights/read.py can read
    image_features = clip.encode_image(preprocess(image)[None])      # [1, E]
    text_features = clip.encode_text(model.tokenize(["一只猫"]))      # [1, E]

`available_models`, `load_from_name` and `tokenize` are called as in `cn_clip.clip`, `load` as in OpenAI's
`clip`.
"""

import dataclasses
import functools
import json
import math
import os
from dataclasses import dataclass

import torch
from torch import nn

from weights import download
from weights import read
from bert import Bert, BertConfig
from data import preprocess, tokenize# noqa: F401  (tokenize is part of this module's interface)
from resnet import ModifiedResNet, ResNetConfig
from vit import VisionTransformer, ViTConfig, resize_positions


@dataclass(frozen=True)
class ModelConfig:
    embed_dim: int  # E, the joint width
    visual: ViTConfig | ResNetConfig
    text: BertConfig


RBT3, BASE, LARGE = BertConfig(layers=3), BertConfig(), BertConfig(layers=24, width=1024, heads=16)
MINI = BertConfig(2, 128, 4, dropout=0.0)

# Paper, tables 1, 6 and 7; tests/test_model.py holds the parameter counts. Table 6 says 24 text heads for
# ViT-H-14, but the released weights use 16 (head width 64). The last rows are for the demo and the tests: no
# released weights.
MODELS: dict[str, ModelConfig] = {
    "RN50": ModelConfig(1024, ResNetConfig(224, width=64, blocks=(3, 4, 6, 3), heads=32), RBT3),
    "ViT-B-32": ModelConfig(512, ViTConfig(224, 32, width=768, layers=12), BASE),
    "ViT-B-16": ModelConfig(512, ViTConfig(224, 16, width=768, layers=12), BASE),
    "ViT-L-14": ModelConfig(768, ViTConfig(224, 14, width=1024, layers=24), BASE),
    "ViT-L-14-336": ModelConfig(768, ViTConfig(336, 14, width=1024, layers=24), BASE),
    "ViT-H-14": ModelConfig(1024, ViTConfig(224, 14, width=1280, layers=32, head_width=80), LARGE),
    "RN-mini": ModelConfig(128, ResNetConfig(64, width=12, blocks=(1, 1, 1, 1), heads=6), MINI),
    "RN-small": ModelConfig(
        256, ResNetConfig(64, width=32, blocks=(1, 1, 1, 1), heads=16), BertConfig(2, 256, 4)),
    "ViT-mini": ModelConfig(128, ViTConfig(48, 8, width=128, layers=4, head_width=32), MINI),
    "RN-tiny": ModelConfig(16, ResNetConfig(32, width=4, blocks=(1, 1, 1, 1), heads=4), BertConfig(2, 32, 2)),
    "ViT-tiny": ModelConfig(16, ViTConfig(32, 8, width=32, layers=2, head_width=16), BertConfig(2, 32, 2)),
}
TEXT_TOWERS = {"RBT3-chinese": RBT3, "RoBERTa-wwm-ext-base-chinese": BASE,
               "RoBERTa-wwm-ext-large-chinese": LARGE}  # as cn_clip calls them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ChineseCLIP(nn.Module):
    """State-dict names are the official ones: visual.*, bert.*, text_projection, logit_scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        tower = VisionTransformer if isinstance(config.visual, ViTConfig) else ModifiedResNet
        self.visual = tower(config.visual, config.embed_dim)
        self.bert = Bert(config.text)
        # paper, app. A.2: the text projection is the one part that no published weights initialise
        self.text_projection = nn.Parameter(torch.empty(config.text.width, config.embed_dim))
        nn.init.normal_(self.text_projection, std=config.text.width**-0.5)
        # a temperature learned as a logarithm, so that a step changes it by a factor; CLIP, sec. 2.4 starts
        # it at 0.07
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))

    @property
    def dtype(self) -> torch.dtype:
        return self.text_projection.dtype

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, 3, S, S] from `preprocess` -> [B, E], not normalised."""
        if pixels.ndim != 4:
            raise ValueError(f"pixels {list(pixels.shape)}: expected [B, 3, S, S]; one picture needs [None]")
        return self.visual(pixels.to(self.dtype))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] from `tokenize`, 0 is padding, T up to 512 -> [B, E], not normalised."""
        return self.bert(ids) @ self.text_projection

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> image_features [B, E] and text_features [B, E] of unit norm, and the factor exp(logit_scale). In
        the place of pixels, features [B, E] that a frozen image tower gave before will do (training/cache.py)."""
        image_features = normalise(self.encode_image(pixels) if pixels.ndim == 4 else pixels)
        text_features = normalise(self.encode_text(ids))
        return image_features, text_features, self.logit_scale.exp()

    def get_similarity(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every picture against every caption -> logits_per_image [B_image, B_text] and its transpose,
        logits_per_text."""
        image_features, text_features, logit_scale = self(pixels, ids)
        logits_per_image = logit_scale * image_features @ text_features.T
        return logits_per_image, logits_per_image.T

    def set_grad_checkpointing(self, enable: bool = True):
        """Trade a second forward pass for the memory of activations, block by block, in the transformers of
        both towers."""
        self.bert.encoder.grad_checkpointing = enable
        if isinstance(self.visual, VisionTransformer):
            self.visual.transformer.grad_checkpointing = enable


def normalise(features: torch.Tensor) -> torch.Tensor:
    """[..., E] -> the same directions with unit length, in float32 or better, so that cosines do not lose
    digits."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def autocast(device: torch.device):
    """A forward pass in the precision of the device. Parameters that train are float32 under it."""
    return torch.autocast(device.type, dtype=precision(device), enabled=device.type == "cuda")


def precision(device: torch.device) -> torch.dtype:
    """What a forward pass computes in: bfloat16 on a GPU that computes in it and does not only emulate it
    (as V100 and T4 do), else float16 (train.py adds a scaler); float32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# ------------------------------------------------------------------------------------------------------------
# load and save


def available_models() -> list[str]:
    """Names that `load` and `load_from_name` understand; `train.py --model` has more, MODELS."""
    return list(download.RELEASED)


def load(name: str, device: str | torch.device = "cpu", jit: bool = False, download_root: str | None = None,
         dtype: str | torch.dtype = torch.float32):
    """-> (model in eval mode, preprocess for its resolution). Prints one line that says what was loaded.

    dtype="bfloat16" halves the memory and, where the CPU computes in it (Intel's AMX, AVX512-BF16), about
    the time of ViT-B-16 and RN50, with features at a cosine above 0.999 to those in float32 (BENCHMARKS.md).

    A path is recognised by its content, whatever weights/read.py can read; of a folder, its weight file. A name of
    `available_models`, such as "ViT-B-16" or, as OpenAI spells it, "ViT-B/16", is fetched once, into
    `download_root` if that is said. Raises read.WeightsError, one line, for anything else, ValueError for
    another dtype and for jit=True, as there is nothing to compile."""
    name, dtype = os.fspath(name), DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}, as a word or torch's own")
    if jit:
        raise ValueError("jit=True: this model is not compiled; leave jit out")
    spelled = name.replace("/", "-").replace("@336px", "-336")
    if spelled in download.RELEASED and not os.path.exists(name):
        name = spelled
    part = ("no whole model, a tower to start training from: "
            "`train.py --image-init` (OpenAI's, LAION's) or `--text-init` (a BERT)")
    if name in download.SOURCES and name not in download.RELEASED:
        raise read.WeightsError(f"{name}: {part}")
    path = read.find(name, download_root or "")
    state, config, layout = read.read(path)
    state, dropped = read.whole_model(state)
    if len({key.split(".")[0] for key in state} & {"visual", "bert"}) == 1:
        raise read.WeightsError(f"{path}: {part}")
    config = config_from_json(config, path) if config else MODELS.get(guess(state))
    if config is None:
        raise read.WeightsError(f"{path}: its tensors look like none of {', '.join(MODELS)}")
    clip = assemble(config, state, path).to(device).eval()
    for module in clip.modules():  # BatchNorm and the temperature stay float32: rounding costs them a percent
        if not isinstance(module, nn.BatchNorm2d):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(torch.float32 if p is clip.logit_scale else dtype)
    if isinstance(clip.visual, ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)  # what its convolutions are fast in
    count = sum(p.numel() for p in clip.parameters())
    print(f"loaded {path} ({layout}): {describe(config)}, {count:,} parameters"
          + (f" in {dtype}".replace("torch.", "") if dtype != torch.float32 else "")
          + (f"; left out {dropped}" if dropped else ""))
    return clip, functools.partial(preprocess, resolution=config.visual.resolution)


def load_from_name(name: str, device: str | torch.device | None = None, download_root: str | None = None,
                   vision_model_name: str | None = None, text_model_name: str | None = None,
                   input_resolution: int | None = None):
    """`load`, called as in cn_clip.clip, onto a GPU if there is one and no other device is said. What a file
    is stands in its tensors: the last three arguments may be left out, and WeightsError is raised if they say
    something else."""
    clip, preprocess = load(name, device or ("cuda" if torch.cuda.is_available() else "cpu"),
                            download_root=download_root)
    v, t = clip.config.visual, clip.config.text
    for argument, said, right in (
            ("vision_model_name", vision_model_name, [n for n, row in MODELS.items() if row.visual == v]),
            ("text_model_name", text_model_name, [n for n, row in TEXT_TOWERS.items() if row == t]),
            ("input_resolution", input_resolution, [v.resolution])):
        if said is not None and said not in right:
            raise read.WeightsError(f"{name}: {argument}={said!r}, but its tensors say "
                                       f"{' or '.join(map(str, right)) or 'none that has a name'}")
    return clip, preprocess


def save(clip: ChineseCLIP, path: str):
    """Write one .safetensors that carries its config: `load(path)` needs nothing else. Atomic."""
    read.write(path, clip.state_dict(), {"config": json.dumps(dataclasses.asdict(clip.config))})


def assemble(config: ModelConfig, state: dict[str, torch.Tensor], path: str) -> ChineseCLIP:
    """A model that takes over the tensors of `state`, which must be complete. Built on the meta device: no
    memory is filled with random numbers only to be overwritten."""
    with SkipInit(), torch.device("meta"):
        clip = ChineseCLIP(config)
    read.check(state, clip.state_dict(), path, functools.partial(guess, state))
    clip.load_state_dict(state, assign=True)
    return clip.requires_grad_(True)


def initialise(clip: ChineseCLIP, image_init: str = "", text_init: str = "", init: str = ""):
    """Start from published weights (paper, app. A.2): the whole model, or the image tower, its projection and
    the temperature from a CLIP file and the text tower from a RoBERTa file. Position tables of another
    resolution are interpolated, as from ViT-L-14 to ViT-L-14-336. Prints what it did."""
    for source, parts in ((init, ""), (image_init, "visual."), (text_init, "bert.")):
        if not source:
            continue
        path = read.find(source)
        state, config, _ = read.read(path)
        check_config(config, clip.config, parts, path)
        if parts:
            state, dropped = (read.image_tower if parts == "visual." else read.text_tower)(state, path)
        else:
            state, dropped = read.whole_model(state)
        mine = clip.state_dict()
        for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
            if name in state and name in mine and len(state[name]) != len(mine[name]):
                try:
                    resized = resize_positions(state[name], len(mine[name]))
                except ValueError as error:
                    raise read.WeightsError(f"{path}: {name}: {error}") from None
                print(f"{path}: {name} interpolated from {len(state[name])} to {len(mine[name])} rows")
                state[name] = resized
        wanted = {k: v for k, v in mine.items() if k.startswith(parts) or k in state}
        read.check(state, wanted, path, functools.partial(guess, state))
        clip.load_state_dict(state, strict=False)
        print(f"{len(state)} tensors from {path}" + (f"; left out {dropped}" if dropped else ""))


def check_config(config: str, mine: ModelConfig, parts: str, path: str):
    """What no shape shows. WeightsError if the file says that its tensors are to be cut into other heads than
    ours, as every feature would be wrong; a line if its image tower was trained with another activation."""
    found: dict[str, int] = {}
    try:
        raw = json.loads(config or "{}")
        if "vision_config" in raw:
            v = raw.get("vision_config_dict") or raw["vision_config"]
            found = {"visual.": v.get("num_attention_heads", 12)}
            if parts != "visual.":  # a CLIPModel's text tower is not a BERT, and stays out
                found["bert."] = config_from_hugging_face(raw).text.heads
        elif raw:
            ours = config_from_json(config, path)
            if type(ours.visual) is not type(mine.visual):
                return  # another model altogether, which `read.check` will say better
            found = {"visual.": heads(ours.visual), "bert.": ours.text.heads}
        theirs = activation(raw, path)
        if parts == "visual." and isinstance(mine.visual, ViTConfig) and theirs != "quick_gelu":
            print(f"{path}: trained with {theirs!r:.99}, and this image tower computes QuickGELU, as the "
                  "official code does: the features differ until training has made up for it")
    except NOT_A_CONFIG as error:
        raise read.WeightsError(f"{path}: its config cannot be read ({error!r:.200})") from None
    for tower, wanted in (("visual.", heads(mine.visual)), ("bert.", mine.text.heads)):
        if tower.startswith(parts) and found.get(tower, wanted) != wanted:
            raise read.WeightsError(
                f"{path}: its {tower.rstrip('.')} tower has {found[tower]!r:.99} heads, "
                f"this model's has {wanted}; the features would differ")


def activation(raw: dict, path: str) -> str:
    """Hugging Face's word for the activation of a CLIP's image tower. It stands in the file's config (`raw`,
    {} if there is none) or in open_clip's beside it, or is known of the name under which it was fetched."""
    if "vision_config" in raw:
        return (raw.get("vision_config_dict") or raw["vision_config"]).get("hidden_act", "quick_gelu")
    folder = os.path.dirname(path)
    beside = os.path.join(folder, "open_clip_config.json")
    if os.path.isfile(beside):
        exact = not json.loads(read.read_description(beside))["model_cfg"].get("quick_gelu", False)
    else:
        exact = os.path.basename(folder) in download.EXACT_GELU
    return "gelu" if exact else "quick_gelu"


def heads(visual: ViTConfig | ResNetConfig) -> int:
    return visual.heads if isinstance(visual, ResNetConfig) else visual.width // visual.head_width


class SkipInit(torch.overrides.TorchFunctionMode):
    """Turns torch.nn.init off: on the meta device there is nothing to fill, and normal_ would take a second
    to find that out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def signature(state: dict[str, torch.Tensor]) -> tuple:
    """What tells one model from another in a (perhaps partial) state dict: depths, and the shapes that show
    widths, patches and grids. Not the number of heads."""
    depths = [len({key.split(part)[1].split(".")[0] for key in state if part in key})
              for part in ("visual.transformer.resblocks.", "visual.layer1.", "visual.layer3.",
                           "bert.encoder.layer.")]
    tables = ("visual.conv1.weight", "visual.positional_embedding", "visual.attnpool.positional_embedding",
              "visual.proj", "visual.attnpool.c_proj.weight", "bert.embeddings.word_embeddings.weight",
              "text_projection")
    return *depths, *(tuple(state[key].shape) if key in state else None for key in tables)


def signature_of(config: ModelConfig) -> tuple:
    """The same from a row of MODELS, without building it."""
    v, t, E = config.visual, config.text, config.embed_dim
    words, projection = (t.vocab_size, t.width), (t.width, E)
    if isinstance(v, ViTConfig):
        positions = ((v.resolution // v.patch_size) ** 2 + 1, v.width)
        patches = (v.width, 3, v.patch_size, v.patch_size)
        return v.layers, 0, 0, t.layers, patches, positions, None, (v.width, E), None, words, projection
    D = 32 * v.width  # of the last feature map
    positions, stem = ((v.resolution // 32) ** 2 + 1, D), (v.width // 2, 3, 3, 3)
    return 0, v.blocks[0], v.blocks[2], t.layers, stem, None, positions, None, (E, D), words, projection


def guess(state: dict[str, torch.Tensor]) -> str:
    """The row of MODELS that a (perhaps partial) state dict looks most like, or "" if none shares half of
    what is known."""
    mine = signature(state)
    known = [i for i, value in enumerate(mine) if value]
    share = {name: sum(mine[i] == signature_of(row)[i] for i in known) / max(1, len(known))
             for name, row in MODELS.items()}
    best = max(share, key=share.get)
    return best if share[best] >= 0.5 else ""


# what reading a config of something else raises
NOT_A_CONFIG = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


def config_from_json(text: str, path: str) -> ModelConfig:
    """Config of the file at `path`: ours, the inverse of `json.dumps(dataclasses.asdict(config))`, or
    Hugging Face's config.json beside it."""
    try:
        raw = json.loads(text)
        if "vision_config" in raw:
            return sensible(config_from_hugging_face(raw))
        visual = raw["visual"]
        if "blocks" in visual:
            visual = ResNetConfig(**visual | {"blocks": tuple(visual["blocks"])})
        else:
            visual = ViTConfig(**visual)
        return sensible(ModelConfig(raw["embed_dim"], visual, BertConfig(**raw["text"])))
    except NOT_A_CONFIG as error:
        raise read.WeightsError(
            f"{path}: the config in it, or in config.json beside it, describes no model of ours "
            f"({error!r:.200})") from None


def sensible(config: ModelConfig) -> ModelConfig:
    """The config as it is; ValueError if no model can be built of it, or none that anyone would wait for."""
    v, t = config.visual, config.text
    sizes = {f"visual {k}": n for k, n in vars(v).items()} | {f"text {k}": n for k, n in vars(t).items()}
    sizes["embed_dim"], dropout = config.embed_dim, sizes.pop("text dropout")
    for name, size in sizes.items():
        limit = 100 if name.endswith(("layers", "blocks")) else 2**20
        for number in size if isinstance(size, tuple) else [size]:
            if type(number) is not int or not 0 < number <= limit:
                raise ValueError(f"{name} is {number!r}, expected 1 to {limit}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}, expected 0 to below 1")
    if isinstance(v, ResNetConfig) and len(v.blocks) != 4:
        raise ValueError(f"{len(v.blocks)} stages of blocks, expected 4")
    cut = v.head_width * heads(v) == v.width if isinstance(v, ViTConfig) else 32 * v.width % v.heads == 0
    if not cut or t.width % t.heads:
        raise ValueError("heads that do not divide the width")
    return config


# Hugging Face's name of each of our numbers, and the value it means where config.json leaves it out
HUGGING_FACE_VISION = {"resolution": ("image_size", 224), "patch_size": ("patch_size", 32),
                       "width": ("hidden_size", 768), "layers": ("num_hidden_layers", 12)}
HUGGING_FACE_TEXT = {"layers": ("num_hidden_layers", 12), "width": ("hidden_size", 768),
                     "heads": ("num_attention_heads", 12), "vocab_size": ("vocab_size", 30522),
                     "max_positions": ("max_position_embeddings", 512), "token_types": ("type_vocab_size", 2),
                     "dropout": ("hidden_dropout_prob", 0.1)}


def config_from_hugging_face(raw: dict) -> ModelConfig:
    """config.json of a ChineseCLIPModel -> ours. ValueError if it asks for something this model does not
    do."""
    # files of 2022 hold the numbers twice, and these are the ones that count
    vision = raw.get("vision_config_dict") or raw["vision_config"]
    text = raw.get("text_config_dict") or raw["text_config"]
    for part, key, ours in ((vision, "hidden_act", "quick_gelu"), (text, "hidden_act", "gelu")):
        if part.get(key, ours) != ours:
            raise ValueError(f"{key} is {part[key]}, expected {ours}")
    visual = {mine: vision.get(*theirs) for mine, theirs in HUGGING_FACE_VISION.items()}
    head_width = visual["width"] // vision.get("num_attention_heads", 12)
    return ModelConfig(
        raw.get("projection_dim", 512), ViTConfig(**visual, head_width=head_width),
        BertConfig(**{mine: text.get(*theirs) for mine, theirs in HUGGING_FACE_TEXT.items()}))


def describe(config: ModelConfig) -> str:
    """The model's name, or its sizes if it is none of MODELS."""
    names = [name for name, row in MODELS.items() if row == config]
    return names[0] if names else f"a model of your own ({config})"
