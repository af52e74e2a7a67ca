"""
The image tower of the ViT models: the Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et
al., 2021) as CLIP changed it (Radford et al., 2021, sec. 2.4). Patches of the image become tokens, a
transformer mixes them, and one extra token, the class token, ends as the feature of the whole image.

CLIP differs from the ViT paper in three places: a LayerNorm before the first block (`ln_pre`), QuickGELU
instead of GELU, and no bias in the patch convolution. Parameter names are the official ones, so an official
file needs no renaming.

Shapes: B batch, S image side, P patch side, T tokens (patches + 1), D width, H heads, E joint width.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ViTConfig:
    resolution: int  # S, in pixels
    patch_size: int  # P, in pixels
    width: int  # D
    layers: int
    head_width: int = 64  # H = width / head_width; 80 in ViT-H-14, less in our small models


# ------------------------------------------------------------------------------------------------------------
# parts


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI trained with. It differs from the exact
    GELU by up to 0.02: with `nn.GELU` in its place nothing fails, but every feature is wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The plain formula, x * torch.sigmoid(1.702 * x), makes three tensors [B, T, 4D], the widest of a
        # block, and autograd keeps two. silu(y) / 1.702 with y = 1.702 x is equal, and autograd keeps only
        # y. Without autograd y is overwritten, which takes half the time on a CPU (docs/benchmarks.md).
        return F.silu(1.702 * x, inplace=not x.requires_grad).div_(1.702)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(D/H)) v per head, then a linear layer. q, k and v share
    one [3D, D] matrix, as in `nn.MultiheadAttention` and so in every CLIP file."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, n: int | None = None) -> torch.Tensor:
        """x [B, T, D] -> [B, n, D]: the first n tokens (all if None, see Transformer) attend to all T."""
        B, T, D = x.shape
        w_q, w_kv = self.in_proj_weight.split([D, 2 * D])
        b_q, b_kv = self.in_proj_bias.split([D, 2 * D])
        # q [B, H, n, D/H]; k and v [B, H, T, D/H], from [B, T, 2, H, D/H] by way of [2, B, H, T, D/H]
        q = F.linear(x[:, :n], w_q, b_q).view(B, -1, self.heads, D // self.heads).transpose(1, 2)
        k, v = F.linear(x, w_kv, b_kv).view(B, T, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        # (q @ k.transpose(-2, -1) / math.sqrt(D // H)).softmax(-1) @ v, without storing the [n, T] matrices
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, n, D/H]
        return self.out_proj(out.transpose(1, 2).flatten(2))  # heads side by side again: [B, n, D]


class Block(nn.Module):
    """Pre-norm: it normalises the input of each branch, never the sum (bert.py does the opposite)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict([
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, n: int | None = None) -> torch.Tensor:
        """x [B, T, D] -> [B, n, D]: the first n tokens (all if None) after this block."""
        x = x[:, :n] + self.attn(self.ln_1(x), n)
        return x + self.mlp(self.ln_2(x))


# ------------------------------------------------------------------------------------------------------------
# the tower


class Transformer(nn.Module):
    """A stack of blocks. Only the class token leaves the tower, so the last block computes only this one
    (n = 1). The plain loop, `for block in self.resblocks: x = block(x)`, gives the same class token and then
    drops T - 1 others. Keys and values of all tokens are still needed, a sixth of a block's work: the trick
    saves five sixths of one block, 7% of a tower with 12 blocks and 3.5% with 24."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> the class token [B, D]."""
        for i, block in enumerate(self.resblocks):
            n = 1 if i == len(self.resblocks) - 1 else None
            if self.grad_checkpointing and self.training:  # keep the block's input, recompute the rest
                x = checkpoint(block, x, n, use_reentrant=False)
            else:
                x = block(x, n)
        return x[:, 0]


class VisionTransformer(nn.Module):
    """pixels [B, 3, S, S] -> features [B, E], not normalised."""

    def __init__(self, config: ViTConfig, embed_dim: int):
        super().__init__()
        D, grid = config.width, config.resolution // config.patch_size
        self.conv1 = nn.Conv2d(3, D, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, D))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = Transformer(D, config.layers, D // config.head_width)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(torch.empty(D, embed_dim))
        self.patch_drop = 0.0  # the share of patches that each training image loses (FLIP, Li et al., 2023)
        self.init_weights()

    def init_weights(self):
        """Random weights; the blocks are drawn as in the text tower of OpenAI's CLIP. Each block adds the
        outputs of two branches to x. The last weights of each branch are smaller in deeper towers, which
        keeps the sum at the same size."""
        D, layers = self.class_embedding.numel(), len(self.transformer.resblocks)
        for p in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(p, std=D**-0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=D**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=D**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=D**-0.5 * (2 * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, D, S/P, S/P] -> [B, T-1, D]
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # [B, 1, D]
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)  # [B, T, D]
        if self.training and self.patch_drop > 0:
            x = drop_patches(x, self.patch_drop)  # [B, fewer, D]
        x = self.transformer(self.ln_pre(x))  # [B, D]
        return self.ln_post(x) @ self.proj  # [B, E]


def drop_patches(x: torch.Tensor, share: float) -> torch.Tensor:
    """x [B, T, D] -> [B, 1 + kept, D]: the class token and a random (1 - share) of each image's patches.
    Their order is random too, which is harmless because positions are added before."""
    B, T, D = x.shape
    kept = int((T - 1) * (1 - share))
    order = torch.rand(B, T - 1, device=x.device).argsort(dim=1)[:, :kept] + 1  # [B, kept], from 1 to T - 1
    order = torch.cat([order.new_zeros(B, 1), order], dim=1)  # [B, 1 + kept]
    return x.gather(1, order[:, :, None].expand(-1, -1, D))


def resize_positions(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Position table [1 + g*g, D] -> [tokens, D] for another resolution; the class token's row stays as it
    is. ValueError if a table is not a square grid plus one. With align_corners=True the corners of both grids
    coincide, as in the official code from 224 to 336 pixels (paper, sec. 2.4). open_clip and Hugging Face use
    False, which shifts every position by a fraction of a patch."""
    old, new = round((len(table) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if old**2 + 1 != len(table) or new**2 + 1 != tokens:
        raise ValueError(f"expected a square grid plus one; got {len(table)} rows for {tokens} tokens")
    if old == new:
        return table
    grid = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)  # [1, D, new, new]
    return torch.cat([table[:1], grid.flatten(2)[0].T.to(table.dtype)])  # [1 + new*new, D]
