r"""
LoRA: adapt a model by few numbers (Hu et al., 2021). An adapted weight W [out, in] is frozen, and
W + ALPHA / rank * B A takes its place, with B [out, rank] and A [rank, in]. Only A, B and the temperature
train, and the text projection if no file gave it. B starts at zero, so that the model starts as it was.

W is parametrised (torch.nn.utils.parametrize): a module that reads its weight gets the sum, so no forward
pass knows of A and B. state_dict() has the sum too, under the weight's own name, so best.safetensors and
last.safetensors are plain weights. A checkpoint holds only what trains.
"""

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import model
from training.recipes import Config, ConfigError

ALPHA = 16.0  # with one ALPHA, a rate that suits one rank suits others too (section 4.1)
QKV = ("query", "key", "value", "q_proj", "k_proj", "v_proj")  # of bert.py; of RN50's attention pool


class LowRank(nn.Module):
    """W [out, in] -> W + ALPHA / rank * B A. A matrix of several parts, one below the other, as the ViT's
    in_proj_weight of q, k and v, gets a B [parts, out / parts, rank] and an A [parts, rank, in]."""

    def __init__(self, weight: torch.Tensor, rank: int, parts: int):
        super().__init__()
        out, width = weight.shape
        self.A = nn.Parameter(torch.randn(parts, rank, width, dtype=weight.dtype) * width**-0.5)
        self.B = nn.Parameter(torch.zeros(parts, out // parts, rank, dtype=weight.dtype))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # as exact as the merged weight
            return weight + (ALPHA / self.A.shape[1] * self.B @ self.A).view_as(weight)


def add_lora(clip: model.ChineseCLIP, cfg: Config):
    """With --lora, freeze the model and put matrices of that rank beside those weights, in the towers that
    train, which --lora-on names. Prints what they are. ConfigError if the rank is larger than such a weight
    allows."""
    if not cfg.lora:
        return
    towers = {"bert": clip.bert} | ({} if cfg.freeze_image else {"visual": clip.visual})
    clip.requires_grad_(False)
    clip.logit_scale.requires_grad_(True)
    clip.text_projection.requires_grad_(not cfg.init or bool(cfg.text_init))
    for tower, modules in towers.items():
        found = {}
        for path, module in list(modules.named_modules()):
            if hasattr(module, "in_proj_weight"):
                found[path] = module, "in_proj_weight", 3
            elif isinstance(module, nn.Linear) and (cfg.lora_on == "all" or path.endswith(QKV)):
                found[path] = module, "weight", 1
        for path, (module, name, parts) in found.items():
            weight = getattr(module, name)
            if cfg.lora > (most := min(len(weight) // parts, weight.shape[1])):
                raise ConfigError(f"--lora {cfg.lora}: {tower}.{path} has at most rank {most}")
            register_parametrization(module, name, LowRank(weight, cfg.lora, parts))
            module.register_state_dict_post_hook(merge)
        numbers = sum(p.numel() for p in modules.parameters() if p.requires_grad)
        print(f"   --lora {cfg.lora}: {numbers:,} numbers beside {len(found)} weights of {tower}, the first "
              f"{next(iter(found))}")


def merge(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _):
    """A hook of state_dict(): the adapted weight takes the place of W, A and B."""
    for name in module.parametrizations:
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.{name}.")]:
            del state[key]
        state[prefix + name] = getattr(module, name).detach()


def split(clip: model.ChineseCLIP) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """-> what trains, under the names that load_state_dict takes, and what is frozen."""
    trains = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    everything = dict(clip.named_parameters()) | dict(clip.named_buffers())
    return trains, {name: x for name, x in everything.items() if name not in trains}
