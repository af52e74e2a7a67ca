"""Small models, their files as other programs write them, and the refusals that wrong files must get."""

import os

import pytest
import torch
from conftest import difference, random_pixels, shake
from torch import nn

from data import tokenize
from model import MODELS, ChineseCLIP
from weights.names import WeightsError

VIT, RN = "ViT-tiny", "RN-tiny"
TEXTS = ["一只猫", "“红色”的灯笼，挂在树上！", "iPhone 15 Pro手机壳", "", "Ünïcödé café ﬁ", "长" * 80, "a" * 150,
         "tab\tnew\nline\u3000wide\u00a0hard\u200bnone\x00\x07\ufffd\ue000 private", "🙂旗: 中国",
         "𠀀𪜶 ‘single’…", "[MASK]猫[SEP]"]
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers opens files and asks no server


def built(name: str, seed: int = 0) -> ChineseCLIP:
    torch.manual_seed(seed)
    return shake(ChineseCLIP(MODELS[name]), seed).eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def rounded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What half precision keeps of it, in float32."""
    return {key: value.float() if value.is_floating_point() else value for key, value in half(state).items()}


def official(state: dict[str, torch.Tensor]) -> dict:
    """The layout of clip_cn_vit-b-16.pt: names prefixed by DistributedDataParallel, a few numbers beside."""
    return {
        "epoch": 15,
        "step": 8,
        "name": "tiny",
        "state_dict": {"module." + key: value for key, value in state.items()},
    }


def saved(folder, content, name: str = "clip.pt", **how) -> str:
    torch.save(content, folder / name, **how)
    return str(folder / name)


def refusal(act, *args, **kwargs) -> str:
    """The message of the WeightsError that this must raise: one line."""
    with pytest.raises(WeightsError) as caught:
        act(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def features(clip) -> tuple[torch.Tensor, ...]:
    """What a model says of three pictures and the TEXTS."""
    pixels, ids = random_pixels(3, clip.config.visual.resolution), tokenize(TEXTS)
    with torch.no_grad():
        return clip.encode_image(pixels), clip.encode_text(ids), clip.get_similarity(pixels, ids)[0]


def theirs(hf, resolution: int) -> tuple[torch.Tensor, ...]:
    """The same from transformers, by the hidden states: its get_*_features changed what they return."""
    pixels, ids = random_pixels(3, resolution), tokenize(TEXTS)
    with torch.no_grad():
        image = hf.visual_projection(hf.vision_model(pixels).pooler_output)
        text = hf.text_projection(hf.text_model(ids, attention_mask=ids != 0).last_hidden_state[:, 0])
        return image, text, hf(ids, pixels, attention_mask=ids != 0).logits_per_image


def agree(ours, others, limit: float = 1e-5):
    for mine, other in zip(ours, others):
        assert difference(mine, other) < limit


def hugging_face(path, **how):
    """A folder written by transformers itself: the sizes of ViT-tiny but for the heads, which no shape
    tells."""
    import transformers
    torch.manual_seed(5)
    config = transformers.ChineseCLIPConfig(
        projection_dim=16,
        text_config=dict(vocab_size=21128, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, hidden_dropout_prob=0.2),
        vision_config=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           image_size=32, patch_size=8, projection_dim=16))
    hf = transformers.ChineseCLIPModel(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    hf.save_pretrained(path, **how)
    return hf


def tree(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules in modules, so that each tensor stands under its name."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        if value.is_floating_point() and "running" not in last:
            node.register_parameter(last, nn.Parameter(value.clone()))
        else:
            node.register_buffer(last, value.clone())
    return root


def openai_tensors(name: str) -> dict[str, torch.Tensor]:
    """visual.* in half precision but for norms, as convert_weights leaves it, and a text side unlike ours."""
    state = {
        key: value for key, value in built(name, seed=3).state_dict().items() if key.startswith("visual.")
    }
    state = {
        key: value if ".ln_" in key or "bn" in key else half({key: value})[key]
        for key, value in state.items()
    }
    return state | {
        "logit_scale": torch.tensor(4.6052),
        "text_projection": torch.ones(8, 16).half(),
        "positional_embedding": torch.ones(77, 8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8).half(),
        "token_embedding.weight": torch.ones(10, 8),
        "ln_final.weight": torch.ones(8),
        "input_resolution": torch.tensor(32),
    }


def openai_archive(name: str, path: str) -> dict[str, torch.Tensor]:
    """Write a TorchScript archive -> the tensors in it."""
    tensors = openai_tensors(name)
    torch.jit.script(tree(tensors)).save(path)
    return tensors
