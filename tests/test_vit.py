"""vit.py against the formulas, written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import difference, random_pixels, shake
from torch.utils.flop_counter import FlopCounterMode

from vit import Attention, Block, QuickGELU, ViTConfig, VisionTransformer, drop_patches, resize_positions

TINY = ViTConfig(resolution=24, patch_size=8, width=32, layers=3, head_width=8)  # 9 patches, 4 heads


def tower(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return shake(VisionTransformer(TINY, embed_dim=12), seed).eval()


def naive(vit: VisionTransformer, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """The ViT of Radford et al., every token through every block, attention as three lines of matrix
    products."""
    p = dict(vit.named_parameters())
    width, size = p["conv1.weight"].shape[0], p["conv1.weight"].shape[-1]
    patches = F.unfold(pixels, size, stride=size).transpose(1, 2)  # [B, patches, 3 * size * size]
    x = patches @ p["conv1.weight"].flatten(1).T
    x = torch.cat([p["class_embedding"].expand(len(x), 1, -1), x], dim=1) + p["positional_embedding"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"]
            + p[name + ".bias"]
        )

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    x = norm(x, "ln_pre")
    for i in range(TINY.layers):
        at = f"transformer.resblocks.{i}."
        q, k, v = (
            norm(x, at + "ln_1") @ p[at + "attn.in_proj_weight"].T + p[at + "attn.in_proj_bias"]
        ).chunk(3, dim=-1)
        out = []
        for h in range(heads):
            s = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(width // heads)
            out.append(scores.softmax(-1) @ v[..., s])
        x = x + linear(torch.cat(out, -1), at + "attn.out_proj")
        hidden = linear(norm(x, at + "ln_2"), at + "mlp.c_fc")
        x = x + linear(hidden / (1 + torch.exp(-1.702 * hidden)), at + "mlp.c_proj")
    return norm(x, "ln_post")[:, 0] @ p["proj"]


def test_attention_by_hand():
    """Two tokens of width 1, 0 and 1, which are their own q, k and v. Token 0 scores both with 0 and takes
    their mean, 1/2. Token 1 scores them with 0 and 1 and takes e / (1 + e) = 0.731059."""
    attention = Attention(width=1, heads=1)
    for weight in (attention.in_proj_weight, attention.out_proj.weight):
        torch.nn.init.ones_(weight)
    torch.nn.init.zeros_(attention.out_proj.bias)
    x = torch.tensor([[[0.0], [1.0]]])  # [1, 2, 1]
    torch.testing.assert_close(attention(x), torch.tensor([[[0.5], [0.731059]]]), rtol=0, atol=2e-6)
    assert torch.equal(attention(x, n=1), attention(x)[:, :1])  # the first token alone


def test_quick_gelu_by_hand():
    """1 / (1 + e^-1.702) = 0.845796, so f(1) = 0.845796, f(-1) = -(1 - 0.845796), and
    f(2) = 2 / (1 + e^-3.404) = 1.935659."""
    x = QuickGELU()(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    torch.testing.assert_close(x, torch.tensor([0.0, 0.845796, -0.154204, 1.935659]), rtol=0, atol=2e-6)


def test_output_is_one_feature_per_image():
    assert tower()(random_pixels(5, 24)).shape == (5, 12)


def test_class_token_alone_in_the_last_block_equals_computing_every_token():
    vit, pixels = tower().double(), random_pixels(3, 24).double()
    assert difference(vit(pixels), naive(vit, pixels, heads=4)) < 1e-12


def test_a_block_for_one_token_does_a_sixth_of_the_work():
    """A block has 12 D^2 weights for each token. Keys and values, 2 D^2 of them, are needed of all tokens."""
    block, x, work = Block(64, heads=4), torch.zeros(1, 200, 64), []
    for n in (None, 1):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(x, n)
        flops = counter.get_flop_counts()["Global"]
        work.append(sum(count for op, count in flops.items() if "mm" in str(op)))
    assert work[1] * 12 * 200 == work[0] * (2 * 200 + 10)


def test_float32_agrees_with_the_formulas_too():
    vit, pixels = tower(), random_pixels(3, 24)
    assert difference(vit(pixels), naive(vit, pixels, heads=4)) < 1e-5


def test_features_of_an_image_do_not_depend_on_the_rest_of_the_batch():
    vit, pixels = tower().double(), random_pixels(3, 24).double()
    assert difference(vit(pixels)[1:2], vit(pixels[1:2])) < 1e-12


def test_grad_checkpointing_gives_the_same_features_and_gradients():
    vit, pixels = tower().train(), random_pixels(3, 24)
    results = []
    for enable in (False, True):
        vit.transformer.grad_checkpointing = enable
        vit.zero_grad()
        features = vit(pixels)
        features.pow(2).sum().backward()
        results.append([features.detach()] + [p.grad.clone() for p in vit.parameters()])
    assert all(difference(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_dropped_patches_are_counted_and_the_class_token_stays_first():
    x = torch.arange(2 * 10 * 1.0).reshape(2, 10, 1)  # token t of image b carries the number 10 b + t
    for share, kept in ((0.5, 4), (0.25, 6), (0.9, 0)):  # of 9 patches, rounded down
        torch.manual_seed(0)
        rows = drop_patches(x, share)[:, :, 0].tolist()
        for b, row in enumerate(rows):
            assert len(row) == 1 + kept and row[0] == 10 * b
            assert len(set(row)) == len(row) and all(10 * b < t < 10 * b + 10 for t in row[1:])


def test_each_image_drops_its_own_patches():
    torch.manual_seed(0)
    x = torch.arange(10.0)[None, :, None].expand(8, -1, -1)
    assert len({tuple(sorted(row)) for row in drop_patches(x, 0.5)[:, :, 0].tolist()}) > 1


def test_patches_are_dropped_in_training_only():
    vit, pixels = tower(), random_pixels(2, 24)
    lengths = []
    vit.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    whole = vit(pixels)
    vit.patch_drop = 0.5
    assert torch.equal(vit(pixels), whole)
    vit.train()(pixels)
    vit.patch_drop = 0.0
    assert torch.equal(vit(pixels), whole)
    assert lengths == [10, 10, 5, 10]


def test_positions_of_the_same_size_come_back_as_they_are():
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_positions(table, 10), table)


def test_positions_are_interpolated_bicubically_with_aligned_corners():
    # row r, column c of the 3 x 3 grid holds 10 r + c in channel 0 and its square in channel 1
    grid = torch.tensor([[10.0 * r + c for c in range(3)] for r in range(3)])
    table = torch.cat([torch.tensor([[-7.0, -8.0]]), torch.stack([grid, grid**2], -1).reshape(9, 2)])
    out = resize_positions(table, 26)
    assert out.shape == (26, 2) and torch.equal(out[0], table[0])  # the class row is kept
    expected = F.interpolate(
        torch.stack([grid, grid**2])[None], size=(5, 5), mode="bicubic", align_corners=True
    )[0]
    assert difference(out[1:].T.reshape(2, 5, 5), expected) < 1e-6
    assert difference(out[[1, 5, 21, 25]], table[[1, 3, 7, 9]]) < 1e-6  # corner on corner


def test_half_precision_positions_keep_their_type():
    out = resize_positions(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).half(), 17)
    assert out.dtype == torch.float16 and out.shape == (17, 4)


@pytest.mark.parametrize("rows, tokens", [(11, 17), (10, 16), (9, 10)])
def test_tables_that_are_no_square_are_refused(rows, tokens):
    with pytest.raises(ValueError, match=f"{rows} rows for {tokens} tokens"):
        resize_positions(torch.zeros(rows, 4), tokens)


def test_position_table_of_resnets_smallest_grid(
    tmp_path,
):  # one position at 32 pixels: corner to corner is all it can be
    table = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    out = resize_positions(table, 5)
    assert torch.equal(out, torch.cat([table, table[1:].expand(3, -1)]))
