"""
Files in and out. `read` recognises a file by its content, not by its extension, and gives its tensors our
names (weights/names.py). A checkpoint is data: nothing in it is executed, and no name is silently skipped.

    ours                 .safetensors with the model's config inside, and train.py's checkpoint.pt
    official             {"state_dict": {"module.visual...", "module.bert...", ...}}, in fp16 or fp32
    Hugging Face         ChineseCLIPModel: config.json beside model.safetensors, shards or pytorch_model.bin
    OpenAI, LAION CLIP   a TorchScript archive, a plain state dict or Hugging Face's CLIPModel
    RoBERTa-wwm, RBT3    pytorch_model.bin or model.safetensors
"""

import hashlib
import json
import os

import safetensors
import safetensors.torch
import torch

from common import replace
from weights import torchfile
from weights.download import SOURCES, fetch
from weights.names import WeightsError, from_flash_attention, from_hugging_face

# A folder stands for the first of these files that is in it.
IN_A_FOLDER = ("best.safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# ------------------------------------------------------------------------------------------------------------
# from a name to tensors


def find(name_or_path: str, root: str = "") -> str:
    """A path stays as it is, a folder becomes the weight file in it, and a published name becomes its file in
    `root`, where it is downloaded if it is not there. WeightsError if there is none of these."""
    if os.path.isfile(name_or_path):
        return name_or_path
    if os.path.isdir(name_or_path):
        inside = os.listdir(name_or_path)
        official = [name for name in inside if name.endswith(".pt")]
        for name in (*IN_A_FOLDER, *(official if len(official) == 1 else ())):
            if name in inside:
                return os.path.join(name_or_path, name)
    name = name_or_path.replace("/", "-").replace("@336px", "-336")  # OpenAI writes ViT-B/16, ViT-L/14@336px
    if name in SOURCES:
        return fetch(name, root)
    if os.path.isdir(name_or_path):
        runs = [name for name in inside if os.path.isfile(os.path.join(name_or_path, name, IN_A_FOLDER[0]))]
        raise WeightsError(f"{name_or_path}: no weights in this folder; expected " + (
            f"one of those below it, such as {runs[0]}" if runs else
            f"exactly one .pt in it, or one of {', '.join(IN_A_FOLDER)}"))
    raise WeightsError(f"{name_or_path}: no such file or folder, and none of the published names "
                       f"{', '.join(SOURCES)}")


def read(path: str) -> tuple[dict[str, torch.Tensor], str, str]:
    """A file of any layout above -> (its tensors in float32 under the official names, the JSON of the config
    that came with them or "", what the file is for people). Tensors that need no conversion are mapped from
    the file, not copied. WeightsError for anything else."""
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
    for key, value in state.items():  # one by one, so that each half-precision tensor is freed at once
        if value.is_floating_point():
            state[key] = value.float()
    return state, config, layout


def read_file(path: str, is_shard: bool = False) -> tuple[dict[str, torch.Tensor], str, str]:
    """The tensors as they are in the file, or in the shards that an index names. No shard is an index."""
    try:
        with open(path, "rb") as file:
            head = file.read(99)
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            if int.from_bytes(head[:8], "little") > torchfile.LONGEST:
                raise torchfile.Refused(f"has a header of more than {torchfile.LONGEST:,} bytes")
            with safetensors.safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                config = (file.metadata() or {}).get("config", "")
                return plain(state, path), config, "safetensors"
        if head.lstrip().startswith(b"{") and not is_shard:
            return read_shards(path)
        content, places, layout = torchfile.describe(path)
        windows, config = unwrap(content, path)
        return plain(torchfile.read(path, windows, places), path), config, layout
    except WeightsError:
        raise
    except Exception as error:  # a damaged or hostile file makes the readers raise nearly anything
        kind = "it" if isinstance(error, torchfile.Refused) else f"{type(error).__name__}:"
        reason = str(error).split("\n")[0][:200]
        raise WeightsError(f"{path}: not a readable checkpoint ({kind} {reason}); is it complete, and a "
                           "PyTorch or safetensors file, not a Git LFS pointer to one?") from None


def read_shards(path: str) -> tuple[dict[str, torch.Tensor], str, str]:
    """model.safetensors.index.json: {"weight_map": {key: the file beside it that holds it}}."""
    weight_map = json.loads(read_description(path))["weight_map"]
    state, layout = {}, "nothing"
    for name in sorted(set(weight_map.values())):
        shard = os.path.join(os.path.dirname(path), name)
        if os.path.basename(name) != name or not os.path.isfile(shard):
            raise WeightsError(f"{path}: names the shard {name!r:.99}, which is not beside it")
        tensors, _, layout = read_file(shard, is_shard=True)
        state |= tensors
    return state, "", f"{layout} in shards"


def read_description(path: str) -> str:
    """The text of a JSON file about tensors, which is never long."""
    if os.path.getsize(path) > torchfile.LONGEST:
        raise WeightsError(f"{path}: has {os.path.getsize(path):,} bytes; "
                           f"expected at most {torchfile.LONGEST:,} in such a file")
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


# ------------------------------------------------------------------------------------------------------------
# what a file may hold


def unwrap(saved, path: str) -> tuple[dict[str, torchfile.Window], str]:
    """The content of a PyTorch file -> (state dict, config). The state dict is the content itself or stands
    under a key of it."""
    holder = saved if isinstance(saved, dict) else {}
    config = holder.get("config", "") if "model" in holder else ""  # only our own checkpoint carries both
    state = holder.get("state_dict", holder.get("model", holder))
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds a {type(saved).__name__}, expected a state dict; its first keys "
                           f"are {str(list(holder)[:5]):.200}")
    for key, value in state.items():
        if not isinstance(value, torchfile.Window):
            raise WeightsError(f"{path}: {key!r:.99} is a {type(value).__name__}, expected a tensor")
    return state, config if isinstance(config, str) else ""


def plain(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """The state as it is. WeightsError if it holds anything but ordinary tensors under names, or if these
    would need more memory in float32 than their file explains: twice its size, as it may be in half
    precision, and one table of words, as BERT files may name it twice."""
    total = 0
    for key, value in state.items():
        named = isinstance(key, str) and key.isprintable() and len(key) < 1000
        if not named or value.dtype not in torchfile.DTYPES.values() or value.ndim > 8:
            raise WeightsError(f"{path}: {key!r:.99} is no ordinary tensor; expected a name and real numbers")
        total += value.numel() * (4 if value.is_floating_point() else value.element_size())
    if total > 2 * os.path.getsize(path) + 4 * 21128 * 1024:
        raise WeightsError(f"{path}: its tensors claim {total:,} bytes, more than the file holds; refused")
    return state


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    sha = hashlib.sha256()
    for name, tensor in state.items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def write(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str]):
    """One .safetensors with the metadata in its header. It gets its final name only when it is complete."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    replace(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))
