"""
The tensor names of other programs, and the functions that turn them into ours. Ours are the official ones:
`visual.*`, `bert.*`, `text_projection` and `logit_scale`.

Every function here takes a state dict and returns another. A new format is one more such function, which
weights/read.py calls when it recognises a name.
"""

import torch

from common import UserError


class WeightsError(UserError):
    """The file is not what it should be. The message is one line: the file, the key, what was expected, and
    what to do."""


ONE_TOWER = ("this is no whole model but a tower to start training from; use it with "
             "`train.py --image-init` (OpenAI's or LAION's CLIP) or `--text-init` (a BERT)")

# ------------------------------------------------------------------------------------------------------------
# the names of Hugging Face and of FlashAttention


# (ours, Hugging Face's), replaced wherever they occur in a name. In addition, Hugging Face keeps q, k and v
# in three tensors and stores the two projections transposed.
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
    """The names of a ChineseCLIPModel -> ours. For a CLIPModel only the names of the image tower come out
    right; its text tower is not a BERT, and nobody uses it here."""
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
    """The inverse of `from_hugging_face`, for ViT models."""
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
    """The names of a checkpoint that the official code trained with --use-flash-attention -> ours."""
    renamed = {}
    for key, value in state.items():
        if ".attention.self.Wqkv." in key and value.ndim and len(value) % 3 == 0:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace("Wqkv", name)] = part
        else:
            key = key.replace(".attention.self.out_proj.", ".attention.output.dense.")
            renamed[key.replace(".attn.Wqkv.", ".attn.in_proj_")] = value
    return renamed


# ------------------------------------------------------------------------------------------------------------
# a whole model, or one of its towers


def whole_model(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Any Chinese CLIP -> the tensors that this model has. WeightsError if one of its towers is not there."""
    kept = without_pooler(state)
    if any(k.startswith("visual.") for k in kept) != any(k.startswith("bert.") for k in kept):
        raise WeightsError(f"{path}: {ONE_TOWER}")
    return kept


def one_tower(state: dict[str, torch.Tensor], prefix: str, path: str) -> dict[str, torch.Tensor]:
    """Any CLIP -> `visual.*` and `logit_scale`, or any BERT -> `bert.*`, as the prefix says. WeightsError if
    the tower is not there. Old BERTs have TensorFlow's names, gamma and beta for weight and bias."""
    kept = without_pooler(state)
    if prefix == "bert." and not any(key.startswith(prefix) for key in kept):
        kept = {prefix + k: v for k, v in kept.items() if k.startswith(("embeddings.", "encoder."))}
    if not any(key.startswith(prefix) for key in kept):
        what = "image tower" if prefix == "visual." else "BERT"
        raise WeightsError(f"{path}: there is no {what} in it (no key starts with {prefix}); its first keys "
                           f"are {list(state)[:3]}")
    return {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
            for k, v in kept.items() if k.startswith(prefix) or prefix == "visual." and k == "logit_scale"}


def without_pooler(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Chinese CLIP has no pooler (paper, app. A.2), and position numbers are no weights."""
    return {k: v for k, v in state.items() if ".pooler." not in k and not k.endswith(".position_ids")}


def left_out(state: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> str:
    """The end of a message, if anything was left out."""
    count = len(state) - len(kept)
    return f"; {count} others in that file are not needed" if count else ""
