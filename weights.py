"""
Files in and out. `read` tells by content, not by extension, what a file is; small pure functions then turn
its names into ours, which are the official ones. A checkpoint is data: nothing in it is ever executed, and no
name is silently skipped.

    ours                 .safetensors with the model's config inside, and train.py's checkpoint.pt
    official             {"state_dict": {"module.visual...", "module.bert...", ...}}, fp16 or fp32, with or
                         without a pooler
    OpenAI CLIP          TorchScript archive or plain state dict: gives the image tower, its projection and
                         the temperature
    RoBERTa-wwm, RBT3    pytorch_model.bin or model.safetensors, gamma/beta or weight/bias, with or without
                         "bert."

Not here yet: Hugging Face and open_clip layouts, downloads. A new format is a function `state dict -> state
dict` below.
"""

import json
import os
import pickle
import zipfile

import safetensors
import safetensors.torch
import torch

CACHE = os.path.join(os.path.expanduser("~"), ".cache", "zhclip")

# The released files, by the names of model.MODELS and of the initialisers (paper, sec. 2.3 and app. A.2)
RELEASED = {
    "RN50": "clip_cn_rn50.pt",
    "ViT-B-16": "clip_cn_vit-b-16.pt",
    "ViT-L-14": "clip_cn_vit-l-14.pt",
    "ViT-L-14-336": "clip_cn_vit-l-14-336.pt",
    "ViT-H-14": "clip_cn_vit-h-14.pt",
}


class WeightsError(ValueError):
    """A file that is not what it should be: one line with the file, the key, what was expected and what to
    do."""


# ------------------------------------------------------------------------------------------------------------
# reading


def find(name_or_path: str) -> str:
    """A path as it is; a folder's weight file; a released name's file in the cache folder. WeightsError if
    there is none."""
    if os.path.isdir(name_or_path):
        for name in ("model.safetensors", "pytorch_model.bin"):
            if os.path.isfile(os.path.join(name_or_path, name)):
                return os.path.join(name_or_path, name)
        raise WeightsError(
            f"{name_or_path}: a folder without model.safetensors or pytorch_model.bin; name the file itself")
    if os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path in RELEASED:
        path = os.path.join(CACHE, RELEASED[name_or_path])
        if os.path.isfile(path):
            return path
        raise WeightsError(
            f"{name_or_path}: its file is not at {path}; put the official {RELEASED[name_or_path]} there")
    raise WeightsError(
        f"{name_or_path}: neither a file nor a released model; released are {', '.join(RELEASED)}")


def read(path: str) -> tuple[dict[str, torch.Tensor], str]:
    """-> (state dict in float32 with prefixes stripped, the model's config as JSON or "" if the file carries
    none)."""
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            with safetensors.safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                config = (file.metadata() or {}).get("config", "")
        elif is_torchscript(path):
            state, config = read_torchscript(path), ""
        else:
            # memory-mapped, except files older than torch 1.6 and names that torch.load would mistake
            mapped = zipfile.is_zipfile(path) and not path.endswith(".safetensors")
            with open(path, "rb") as file:
                source = path if mapped else file
                saved = torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)
            state, config = unwrap(saved, path)
    except WeightsError:
        raise
    except pickle.UnpicklingError:  # torch's message would advise to trust the file
        raise WeightsError(
            f"{path}: not a readable checkpoint: no PyTorch or safetensors file, "
            "or one that holds more than tensors and plain containers; refused") from None
    except Exception as error:  # a damaged or hostile file makes the readers raise nearly anything
        reason = str(error).split("\n")[0][:200]
        raise WeightsError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason}); "
            "is it complete, and a PyTorch or safetensors file?") from None
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # the pooler is dropped: paper, app. A.2
    state = {key: value for key, value in state.items() if not key.startswith("bert.pooler.")}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return state, config


def unwrap(saved, path: str) -> tuple[dict[str, torch.Tensor], str]:
    """What torch.load returned -> (state dict, config): the state dict itself, or the wrapper that holds
    it."""
    if not isinstance(saved, dict):
        raise WeightsError(f"{path}: holds a {type(saved).__name__}, expected a dictionary of tensors")
    config = saved.get("config", "") if "model" in saved else ""  # only our own checkpoint carries both
    state = saved.get("state_dict", saved.get("model", saved))
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds no state dict; its keys are {list(saved)[:5]}")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"{path}: {key} is a {type(value).__name__}, expected a tensor")
    return state, config


def is_torchscript(path: str) -> bool:
    """TorchScript archives hold code/ and constants.pkl beside the tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive (OpenAI's ViT-B-16.pt), without compiling or running its code:
    data.pkl is read by an unpickler that knows tensors, dictionaries and inert nodes in the place of modules,
    and refuses everything else."""
    with zipfile.ZipFile(path) as archive:
        names, files = archive.namelist(), archive.infolist()
        root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if any(file.compress_type != zipfile.ZIP_STORED for file in files if "/data/" in file.filename):
            raise WeightsError(f"{path}: compressed tensors, which PyTorch never writes; refused")
        with archive.open(root + "data.pkl") as file:
            tree = TensorUnpickler(file, lambda key: archive.read(f"{root}data/{key}")).load()
    state: dict[str, torch.Tensor] = {}

    def walk(node: "Node", prefix: str):
        for name, value in node.__dict__.items():
            if isinstance(value, Node):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, torch.Tensor):
                state[prefix + name] = value

    walk(tree, "")
    return state


class Node:
    """Stands for a module of the archive: attributes, no behaviour."""

    def __setstate__(self, state: dict):
        self.__dict__.update(state)


class TensorUnpickler(pickle.Unpickler):
    """Resolves exactly the names a TorchScript data.pkl needs. `read_storage` maps a storage key to its
    bytes."""

    DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "LongStorage": torch.int64,
              "IntStorage": torch.int32, "DoubleStorage": torch.float64, "BFloat16Storage": torch.bfloat16,
              "BoolStorage": torch.bool}

    def __init__(self, file, read_storage):
        super().__init__(file)
        self.read_storage = read_storage

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return Node
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # typed lists
            return lambda data, *_: data
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.read_storage(key)), dtype=dtype, count=numel)


# ------------------------------------------------------------------------------------------------------------
# from foreign names to ours


def image_tower(state: dict[str, torch.Tensor], path: str) -> tuple[dict[str, torch.Tensor], str]:
    """OpenAI CLIP's or any Chinese CLIP's state dict -> (visual.* and logit_scale, what was left out)."""
    kept = {k: v for k, v in state.items() if k.startswith("visual.") or k == "logit_scale"}
    if len(kept) < 2:
        raise WeightsError(
            f"{path}: no image tower in it (no keys visual.*); it starts with {list(state)[:3]}")
    return kept, f"{len(state) - len(kept)} tensors of its text side" if len(kept) < len(state) else ""


def text_tower(state: dict[str, torch.Tensor], path: str) -> tuple[dict[str, torch.Tensor], str]:
    """A published BERT's state dict -> (bert.*, what was left out). TensorFlow's names gamma and beta become
    weight and bias; the pooler, the language-model head and the table of position numbers have no place in
    CLIP."""
    if any(k.startswith("bert.") for k in state):
        kept = {k: v for k, v in state.items() if k.startswith("bert.")}
    else:
        kept = {"bert." + k: v for k, v in state.items() if k.startswith(("embeddings.", "encoder."))}
    kept = {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
            for k, v in kept.items() if not k.startswith("bert.pooler.") and not k.endswith(".position_ids")}
    if not kept:
        raise WeightsError(
            f"{path}: no BERT in it (no keys bert.*, embeddings.*, encoder.*); "
            f"it starts with {list(state)[:3]}")
    return kept, f"{len(state) - len(kept)} tensors of heads and pooler" if len(kept) < len(state) else ""


def check(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: str, guess):
    """Every tensor there, none too many, all in the right shape, or one error that names what is wrong.
    `guess()` names the model that the file looks like, and is asked only then."""
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    misshaped = [f"{k} is {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}"
                 for k in wanted if k in state and state[k].shape != wanted[k].shape]
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''})"
             for what, keys in (("missing", missing), ("unknown", unknown), ("misshaped", misshaped)) if keys]
    if found:
        hint = f"; it looks like {guess()}" if guess() else ""
        raise WeightsError(f"{path}: does not fit this model: {'; '.join(found)}{hint}")


# ------------------------------------------------------------------------------------------------------------
# writing


def write(path: str, state: dict[str, torch.Tensor], config: str):
    """One .safetensors with its config as JSON in the header, under its final name only when it is
    complete."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    replace(path, lambda temporary: safetensors.torch.save_file(state, temporary, {"config": config}))


def write_json(path: str, value):
    """Results as JSON, atomically; Chinese stays readable."""
    def write_to(temporary: str):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
    replace(path, write_to)


def replace(path: str, write_to):
    """Call `write_to(temporary name)` and rename the result to `path`: a reader sees the old file or the new,
    never half of one, and a full disk or a kill leaves the old one as it was."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    # in the same folder, as a rename across disks is not atomic; one name, so that kills leave one at most
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # what files usually get; safetensors would give 0600
        write_to(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            # on disk before it gets its name, or a power cut could name an empty file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
