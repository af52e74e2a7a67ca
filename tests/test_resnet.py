"""resnet.py against OpenAI's formulation, restated with plain functions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import difference, random_pixels, shake
from torch import nn

from resnet import Bottleneck, ModifiedResNet, ResNetConfig

TINY = ResNetConfig(resolution=64, width=8, blocks=(2, 1, 2, 1), heads=4)


def tower(shaken: bool = True) -> ModifiedResNet:
    torch.manual_seed(0)
    resnet = ModifiedResNet(TINY, embed_dim=12).eval()
    return shake(resnet) if shaken else resnet


def test_shrinking_block_averages_where_resnet_would_skip():
    # all convolutions the identity, statistics 0 and 1: what is left is relu(pool(relu(relu(x))) + pool(x))
    block = Bottleneck(4, 4, stride=2).eval()
    eye = torch.eye(4)[:, :, None, None]
    with torch.no_grad():
        block.conv1.weight.copy_(eye)
        block.conv2.weight.copy_(F.pad(eye, (1, 1, 1, 1)))
        block.conv3.weight.copy_(eye.repeat(4, 1, 1, 1))
        block.get_submodule("downsample.0").weight.copy_(eye.repeat(4, 1, 1, 1))
        x = torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(1, 1, 2, 2).expand(1, 4, 2, 2)
        assert difference(block(x), torch.full((1, 16, 1, 1), 8.0)) < 1e-4  # mean 4, twice


def naive(state: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """clip/model.py of OpenAI, from the state dict alone: tokens before batch, all g * g + 1 queries in the
    pool."""

    def conv_bn(x, conv, bn, **how):
        x = F.conv2d(x, state[conv + ".weight"], **how)
        return F.batch_norm(
            x, *(state[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        )

    x = F.relu(conv_bn(pixels, "conv1", "bn1", stride=2, padding=1))
    x = F.relu(conv_bn(x, "conv2", "bn2", padding=1))
    x = F.avg_pool2d(F.relu(conv_bn(x, "conv3", "bn3", padding=1)), 2)
    for stage, blocks in enumerate(TINY.blocks, 1):
        for i in range(blocks):
            at, stride = f"layer{stage}.{i}.", 2 if stage > 1 and i == 0 else 1
            out = F.relu(conv_bn(x, at + "conv1", at + "bn1"))
            out = F.relu(conv_bn(out, at + "conv2", at + "bn2", padding=1))
            out = conv_bn(F.avg_pool2d(out, stride), at + "conv3", at + "bn3")
            if at + "downsample.0.weight" in state:
                x = conv_bn(F.avg_pool2d(x, stride), at + "downsample.0", at + "downsample.1")
            x = F.relu(out + x)
    pool = {
        key.removeprefix("attnpool."): value for key, value in state.items() if key.startswith("attnpool.")
    }
    x = x.flatten(2).permute(2, 0, 1)  # [g * g, B, C]
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool["positional_embedding"][:, None]
    x, _ = F.multi_head_attention_forward(
        x,
        x,
        x,
        embed_dim_to_check=x.shape[-1],
        num_heads=heads,
        in_proj_weight=None,
        use_separate_proj_weight=True,
        q_proj_weight=pool["q_proj.weight"],
        k_proj_weight=pool["k_proj.weight"],
        v_proj_weight=pool["v_proj.weight"],
        in_proj_bias=torch.cat([pool[f"{part}_proj.bias"] for part in "qkv"]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool["c_proj.weight"],
        out_proj_bias=pool["c_proj.bias"],
        training=False,
        need_weights=False,
    )
    return x[0]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_features_equal_the_plain_restatement(dtype, limit):
    resnet, pixels = tower().to(dtype), random_pixels(3, 64).to(dtype)
    with torch.no_grad():
        assert difference(resnet(pixels), naive(resnet.state_dict(), pixels, heads=4)) < limit


def statistics(resnet: ModifiedResNet) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in resnet.buffers()]


def test_eval_mode_leaves_batch_norm_statistics_untouched():
    resnet = tower()
    before = statistics(resnet)
    resnet(random_pixels(4, 64)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(resnet), strict=True))


def test_train_mode_moves_every_batch_norm_statistic():
    resnet = tower().train()
    before = statistics(resnet)
    resnet(random_pixels(4, 64))
    assert not any(torch.equal(a, b) for a, b in zip(before, statistics(resnet), strict=True))


def test_sides_halve_and_channels_double_from_stage_to_stage():
    resnet, shapes = tower(), []
    for stage in (resnet.conv1, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4, resnet.attnpool):
        stage.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    resnet(random_pixels(2, 64))
    assert shapes == [(2, 4, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2), (2, 12)]


def test_only_the_first_convolution_strides():
    strides = {name: m.stride for name, m in tower().named_modules() if isinstance(m, nn.Conv2d)}
    assert strides.pop("conv1") == (2, 2)
    assert set(strides.values()) == {(1, 1)}


def test_residual_branches_vanish_at_the_start():
    resnet = tower(shaken=False)
    for module in resnet.modules():
        if isinstance(module, Bottleneck):
            assert not module.bn3.weight.any()
    x = torch.rand(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resnet.layer1[1](x), x)  # not negative, so the last relu changes nothing
    x = torch.rand(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resnet.layer1[0](x), F.relu(resnet.layer1[0].downsample(x)))
