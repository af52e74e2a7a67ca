"""Small models, their files as others write them, and the refusals that wrong files must get."""

import pytest
import torch
from conftest import shake

from model import MODELS, ChineseCLIP
from weights.read import WeightsError

VIT, RN = "ViT-tiny", "RN-tiny"



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

