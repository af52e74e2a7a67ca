"""
The image tower of RN50: ResNet-50 (He et al., 2016) with three changes by CLIP (Radford et al., 2021, sec.
2.4).

  1. The stem is three 3x3 convolutions and an average pool, not one 7x7 convolution and a max pool.
  2. Downsampling is anti-aliased: in the stages every convolution has stride 1, and an average pool shrinks.
  3. Attention replaces the final average pool: the mean of all positions is the query, which attends to all.

The interface is that of vit.py, and the parameter names are the official ones.

In training mode BatchNorm normalises with the mean and variance of the batch, so that a picture's features
depend on the other pictures, and it moves running statistics, with which eval mode normalises. A frozen tower
must therefore be in eval mode, as train.py puts it (paper, app. A.2, stage 1). Several processes normalise
each with its own pictures.

Shapes: B batch, S image side, C channels, h and w positions, E joint width. Stages 2 to 4 halve h and w.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ResNetConfig:
    resolution: int  # S, a multiple of 32: the stem divides it by 4, and three of the stages by 2 each
    width: int  # channels after the stem; the last stage has 32 times as many
    blocks: tuple[int, int, int, int]  # blocks in each stage
    heads: int  # of the attention pool


class Bottleneck(nn.Module):
    """x [B, C, h, w] -> [B, 4 * channels, h / stride, w / stride]. A 1x1 convolution reduces the channels, a
    3x3 convolution looks around, and a 1x1 convolution expands the channels again."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != 4 * channels:
            self.downsample = nn.Sequential(OrderedDict([
                # In the files the convolution is "0" and the norm "1", so the pool before them is "-1".
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(in_channels, 4 * channels, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * channels)),
            ]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x))


class AttentionPool2d(nn.Module):
    """x [B, C, g, g] -> [B, E]: attention with one query, the mean of all positions. (The official code
    computes g*g + 1 queries and drops all but the first.)"""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)  # [B, g*g, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # the mean as a class token: [B, g*g + 1, C]
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        # heads apart: q [B, H, 1, C/H], k and v [B, H, g*g + 1, C/H]
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # [B, H, 1, C/H]; vit.py has the formula
        return self.c_proj(x.flatten(1))  # one token, heads side by side: [B, C] -> [B, E]


class ModifiedResNet(nn.Module):
    """pixels [B, 3, S, S] -> features [B, E], not normalised."""

    def __init__(self, config: ResNetConfig, embed_dim: int):
        super().__init__()
        w = config.width
        self.conv1 = nn.Conv2d(3, w // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(w // 2)
        self.conv2 = nn.Conv2d(w // 2, w // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(w // 2)
        self.conv3 = nn.Conv2d(w // 2, w, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(w)
        self.layer1 = self._stage(w, w, config.blocks[0], stride=1)
        self.layer2 = self._stage(4 * w, 2 * w, config.blocks[1], stride=2)
        self.layer3 = self._stage(8 * w, 4 * w, config.blocks[2], stride=2)
        self.layer4 = self._stage(16 * w, 8 * w, config.blocks[3], stride=2)
        self.attnpool = AttentionPool2d(config.resolution // 32, 32 * w, config.heads, embed_dim)
        self.init_weights()

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(in_channels, channels, stride)
        return nn.Sequential(first, *(Bottleneck(4 * channels, channels) for _ in range(blocks - 1)))

    def init_weights(self):
        """Random weights as OpenAI's CLIP draws them. The last gain of every residual branch is zero: a block
        starts as its skip connection, so that deep stacks train from the first step."""
        width = self.attnpool.c_proj.in_features
        nn.init.normal_(self.attnpool.positional_embedding, std=width**-0.5)
        for proj in (self.attnpool.q_proj, self.attnpool.k_proj, self.attnpool.v_proj, self.attnpool.c_proj):
            nn.init.normal_(proj.weight, std=width**-0.5)
            nn.init.zeros_(proj.bias)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.contiguous(memory_format=torch.channels_last)  # convolutions are faster with C innermost
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))  # [B, width, S/2, S/2] after the third
        x = F.avg_pool2d(x, 2)  # [B, width, S/4, S/4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 32 * width, S/32, S/32]
        return self.attnpool(x)  # [B, E]
