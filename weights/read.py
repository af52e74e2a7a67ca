"""
Files in and out. `read` tells by content, not by extension, what a file is, and small pure functions turn its
names into ours, which are the official ones. A checkpoint is data: nothing in it is ever executed, and no
name is silently skipped.

    ours                 .safetensors with the model's config inside, and train.py's checkpoint.pt
    official             {"state_dict": {"module.visual...", "module.bert...", ...}}, fp16 or fp32, with or
                         without a pooler, with or without FlashAttention's Wqkv
    Hugging Face         ChineseCLIPModel: config.json beside model.safetensors, its shards or
                         pytorch_model.bin
    OpenAI, LAION CLIP   TorchScript archive, plain state dict, or Hugging Face's CLIPModel: gives the image
                         tower, its projection and the temperature
    RoBERTa-wwm, RBT3    pytorch_model.bin or model.safetensors, gamma/beta or weight/bias, with or without
                         "bert."

A new format is a function `state dict -> state dict` below. The command (download, info, convert) needs whole
models and so stands above model.py, in tools/weights.py:

    python -m tools.weights download ViT-B-16
    python -m tools.weights info clip_cn_vit-b-16.pt
    python -m tools.weights convert out/photos/scratch/best.safetensors photos-hf --to huggingface
"""

import json
import os
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from weights import download
from common import replace
from weights import torchfile

# In a folder, the first of these that is there is the model
IN_A_FOLDER = ("best.safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class WeightsError(ValueError):
    """A file that is not what it should be: one line with the file, the key, what was expected and what to
    do."""


class Checkpoint(NamedTuple):
    state: dict[str, torch.Tensor]  # float32, the official names
    config: str  # JSON of whoever wrote the file, "" if it brought none
    layout: str  # what the file is, for people


# ------------------------------------------------------------------------------------------------------------
# reading


def find(name_or_path: str, root: str = "") -> str:
    """A path as it is; a folder's weight file; a published name's file, in `root` or fetched to there.
    WeightsError if there is none."""
    if os.path.isfile(name_or_path):
        return name_or_path
    if os.path.isdir(name_or_path):
        inside = os.listdir(name_or_path)
        official = [name for name in inside if name.endswith(".pt")]
        for name in (*IN_A_FOLDER, *(official if len(official) == 1 else ())):
            if name in inside:
                return os.path.join(name_or_path, name)
    if name_or_path in download.SOURCES:
        try:
            return download.fetch(name_or_path, root)
        except download.DownloadError as error:
            raise WeightsError(str(error)) from None
    if os.path.isdir(name_or_path):
        raise WeightsError(f"{name_or_path}: a folder without any of {', '.join(IN_A_FOLDER)} and not with "
                           "exactly one .pt; name the file itself")
    raise WeightsError(
        f"{name_or_path}: neither a file nor a published name; there are {', '.join(download.SOURCES)}")


def read(path: str) -> Checkpoint:
    """A file of any layout above -> its tensors in float32 under the official names. Tensors that need no
    conversion are mapped from the file, not copied. WeightsError for anything else."""
    state, config, layout = read_file(path)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(".Wqkv." in key for key in state):
        state, layout = from_flash_attention(state), layout + ", FlashAttention's names"
    if any(key.startswith("vision_model.") for key in state):
        beside = os.path.join(os.path.dirname(path), "config.json")
        if os.path.isfile(beside):
            config = read_description(beside)
        state, layout = from_hugging_face(state), layout + ", Hugging Face's names"
    for key, value in state.items():  # one by one, so that what was converted can go
        if value.is_floating_point():
            state[key] = value.float()
    return Checkpoint(state, config, layout)


def read_file(path: str) -> Checkpoint:
    """The tensors as they are in the file, or in the shards that an index names."""
    head = first_bytes(path)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a Git LFS pointer, not the file itself; get it with `git lfs pull`, "
                           "or with `python -m tools.weights download NAME`")
    try:
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            if int.from_bytes(head[:8], "little") > torchfile.LONGEST:
                raise torchfile.Refused(f"has a header of more than {torchfile.LONGEST:,} bytes")
            with safetensors.safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                config = (file.metadata() or {}).get("config", "")
                return Checkpoint(plain(state, path), config, "safetensors")
        if is_index(head):
            return read_shards(path)
        content, places, layout = torchfile.describe(path)
        windows, config = unwrap(content, path)
        return Checkpoint(plain(torchfile.read(path, windows, places), path), config, layout)
    except WeightsError:
        raise
    except Exception as error:  # a damaged or hostile file makes the readers raise nearly anything
        kind = "it" if isinstance(error, torchfile.Refused) else f"{type(error).__name__}:"
        reason = str(error).split("\n")[0][:200]
        raise WeightsError(f"{path}: not a readable checkpoint ({kind} {reason}); "
                           "is it complete, and a PyTorch or safetensors file?") from None


def first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(200)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None


def is_index(head: bytes) -> bool:
    return head.lstrip().startswith(b"{") and head[8:9] != b"{"


def read_description(path: str) -> str:
    """The text of a JSON file about tensors, which is never long."""
    if os.path.getsize(path) > torchfile.LONGEST:
        raise WeightsError(f"{path}: {os.path.getsize(path):,} bytes; "
                           f"expected at most {torchfile.LONGEST:,} in such a file")
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def read_shards(path: str) -> Checkpoint:
    """model.safetensors.index.json: {"weight_map": {key: the file beside it that holds it}}."""
    weight_map = json.loads(read_description(path))["weight_map"]
    state, layouts = {}, set()
    for name in sorted(set(weight_map.values())):
        shard = os.path.join(os.path.dirname(path), name)
        if os.path.basename(name) != name or not os.path.isfile(shard):
            raise WeightsError(f"{path}: names the shard {name!r:.99}, which is not beside it; "
                               "get all of them")
        if is_index(first_bytes(shard)):
            raise WeightsError(f"{path}: its shard {name!r:.99} is an index itself; refused")
        tensors, _, layout = read_file(shard)
        state |= {key: tensors[key] for key in tensors if weight_map.get(key) == name}
        layouts.add(layout)
    lost = [key for key in weight_map if key not in state]
    if lost:
        raise WeightsError(f"{path}: {len(lost)} tensors are not in their shards ({lost[0]!r:.99} ...); "
                           "the shards belong to another index")
    return Checkpoint(state, "", " and ".join(sorted(layouts)) + " in shards")


def plain(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """The state as it is, if it is ordinary tensors under names, no larger in float32 than its file can make
    them: twice the file, if that is in half precision, and a table of words, which BERT files name twice."""
    total = 0
    for key, value in state.items():
        named = isinstance(key, str) and key.isprintable() and len(key) < 1000
        if not named or value.dtype not in torchfile.DTYPES.values() or value.ndim > 8:
            raise WeightsError(f"{path}: {key!r:.99} is no ordinary tensor; "
                               "expected real numbers under a name")
        total += value.numel() * (4 if value.is_floating_point() else value.element_size())
    if total > 2 * os.path.getsize(path) + 4 * 21128 * 1024:
        raise WeightsError(f"{path}: its tensors claim {total:,} bytes, more than the file holds; refused")
    return state


def unwrap(saved, path: str) -> tuple[dict[str, torchfile.Window], str]:
    """What a PyTorch file holds -> (state dict, config): the state dict itself, or the wrapper that holds
    it."""
    if not isinstance(saved, dict):
        raise WeightsError(f"{path}: holds a {type(saved).__name__}, expected a dictionary of tensors")
    config = saved.get("config", "") if "model" in saved else ""  # only our own checkpoint carries both
    state = saved.get("state_dict", saved.get("model", saved))
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds no state dict; its keys are {str(list(saved)[:5]):.200}")
    for key, value in state.items():
        if not isinstance(value, torchfile.Window):
            raise WeightsError(f"{path}: {key!r:.99} is a {type(value).__name__}, expected a tensor")
    return state, config if isinstance(config, str) else ""


# ------------------------------------------------------------------------------------------------------------
# from foreign names to ours


# ours <-> Hugging Face's, replaced wherever they occur in a name. Beside these, q, k and v are three tensors
# there, and the projections are transposed.
HUGGING_FACE = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # their spelling
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("bert.", "text_model."),
    ("text_projection", "text_projection.weight"),
)
TRANSPOSED = ("visual.proj", "text_projection")


def from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ChineseCLIPModel's names -> ours; CLIPModel's image tower too, whose text tower nobody asks for."""
    renamed = {}
    for key, value in state.items():
        for ours, theirs in HUGGING_FACE:
            key = key.replace(theirs, ours)
        renamed[key] = value.T.contiguous() if key in TRANSPOSED and value.ndim == 2 else value
    for key in [key for key in renamed if ".self_attn.q_proj." in key]:
        parts = [key.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj")]
        if all(part in renamed and renamed[part].shape == renamed[key].shape for part in parts):
            merged = torch.cat([renamed.pop(part) for part in parts])
            renamed[key.replace("self_attn.q_proj.", "attn.in_proj_")] = merged
    return renamed


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `from_hugging_face`, for ViT models."""
    renamed = {}
    for key, value in state.items():
        value = value.T.contiguous() if key in TRANSPOSED else value
        for ours, theirs in HUGGING_FACE:
            key = key.replace(ours, theirs)
        if ".attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                renamed[key.replace("attn.in_proj_", f"self_attn.{name}_proj.")] = part.contiguous()
        else:
            renamed[key] = value
    return renamed


def from_flash_attention(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of a checkpoint trained by the official code with --use-flash-attention -> the usual ones."""
    renamed = {}
    for key, value in state.items():
        if ".attention.self.Wqkv." in key and value.ndim and len(value) % 3 == 0:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace("Wqkv", name)] = part
        else:
            key = key.replace(".attention.self.out_proj.", ".attention.output.dense.")
            renamed[key.replace(".attn.Wqkv.", ".attn.in_proj_")] = value
    return renamed


def left_out(state: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], what: str) -> str:
    """Says "12 tensors of its text side", or nothing if nothing was left out."""
    return f"{len(state) - len(kept)} tensors of {what}" if len(kept) < len(state) else ""


def whole_model(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """-> (state without what has no place in CLIP, what was left out). The pooler: paper, app. A.2."""
    kept = {k: v for k, v in state.items() if ".pooler." not in k and not k.endswith(".position_ids")}
    return kept, left_out(state, kept, "its pooler and position numbers")


def image_tower(state: dict[str, torch.Tensor], path: str) -> tuple[dict[str, torch.Tensor], str]:
    """Any CLIP's state dict -> (visual.* and logit_scale, what was left out)."""
    kept = {k: v for k, v in state.items() if k.startswith("visual.") or k == "logit_scale"}
    kept, _ = whole_model(kept)
    if len(kept) < 2:
        raise WeightsError(
            f"{path}: no image tower in it (no keys visual.*); it starts with {list(state)[:3]}")
    return kept, left_out(state, kept, "its text side")


def text_tower(state: dict[str, torch.Tensor], path: str) -> tuple[dict[str, torch.Tensor], str]:
    """A published BERT's state dict -> (bert.*, what was left out). TensorFlow's names gamma and beta become
    weight and bias; the pooler, the language-model head and the table of position numbers have no place in
    CLIP."""
    if any(k.startswith("bert.") for k in state):
        kept = {k: v for k, v in state.items() if k.startswith("bert.")}
    else:
        kept = {"bert." + k: v for k, v in state.items() if k.startswith(("embeddings.", "encoder."))}
    kept, _ = whole_model(kept)
    kept = {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
            for k, v in kept.items()}
    if not kept:
        raise WeightsError(
            f"{path}: no BERT in it (no keys bert.*, embeddings.*, encoder.*); "
            f"it starts with {list(state)[:3]}")
    return kept, left_out(state, kept, "heads and pooler")


def check(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: str, guess):
    """Every tensor there, none too many, all in the right shape and finite, or one error that names what is
    wrong. `guess()` names the model that the file looks like, and is asked only then."""
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    misshaped = [f"{k} is {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}"
                 for k in wanted if k in state and state[k].shape != wanted[k].shape]
    misshaped += [f"{k} holds {state[k].dtype}" for k in wanted
                  if k in state and state[k].is_floating_point() != wanted[k].is_floating_point()]
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''})"
             for what, keys in (("missing", missing), ("unknown", unknown), ("misshaped", misshaped)) if keys]
    if found:
        like = guess()
        hint = f"; it looks like {like}" if like else ""
        raise WeightsError(f"{path}: does not fit this model: {'; '.join(found)}{hint}")
    for key, value in state.items():
        # one number that is not finite makes the sum so; a sum is five times as fast as looking at each
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {key} holds values that are not finite; "
                               "the file is damaged or its training diverged; take an earlier one")


# ------------------------------------------------------------------------------------------------------------
# writing


def write(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str]):
    """One .safetensors with the metadata in its header, under its final name only when it is complete."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    replace(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


