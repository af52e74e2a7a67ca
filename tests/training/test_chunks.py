"""Batches larger than memory: the same gradient in chunks, and how large a chunk may be."""

import pytest
import torch
import torch.nn.functional as F
from conftest import whole_batch

from training import chunks
import model
from loss import contrastive_loss
from training.chunks import Chunk, backward_in_chunks, features_in_chunks


class Towers(torch.nn.Module):
    """Two small towers with dropout and BatchNorm, and the temperature."""

    def __init__(self, frozen: bool = False):
        super().__init__()
        torch.manual_seed(0)
        linear = torch.nn.Linear
        self.visual = torch.nn.Sequential(linear(5, 8), torch.nn.BatchNorm1d(8), linear(8, 6))
        self.text = torch.nn.Sequential(linear(3, 8), torch.nn.Dropout(0.5), linear(8, 6))
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.double().visual.requires_grad_(not frozen).train(not frozen)

    def forward(self, pixels, ids):
        images = self.visual(pixels) if pixels.shape[1] == 5 else pixels  # or features, of a frozen tower
        return *(F.normalize(x, dim=1) for x in (images, self.text(ids))), self.scale.exp()

    def seeded(self, chunk: Chunk):
        torch.manual_seed(chunk.seed)
        return self(chunk.pictures, chunk.ids)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5])
def test_chunks_equal_one_graph(chunk, frozen):
    """With dropout on and BatchNorm training; against the same chunks in one graph that keeps everything."""
    if chunk == 1 and not frozen:
        pytest.skip("BatchNorm has no statistics of one row")
    batch = torch.randn(12, 5).double(), torch.randn(12, 3).double()
    if 12 % chunk == 1:
        batch = tuple(x[:-1] for x in batch)
    chunked, whole = Towers(frozen), Towers(frozen)
    pieces = [Chunk(*piece, seed=k) for k, piece in enumerate(zip(*(x.split(chunk) for x in batch)))]
    features = features_in_chunks(chunked.seeded, chunked, pieces)
    expected = whole_batch(whole.seeded, whole, pieces)
    for one, other in zip(features, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    contrastive_loss(*features).backward()
    backward_in_chunks(chunked.seeded, chunked, pieces, features)
    contrastive_loss(*expected).backward()
    for (name, p), q in zip(chunked.named_parameters(), whole.parameters()):
        assert (p.grad is None) == (q.grad is None) == (frozen and name.startswith("visual.")), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)
    for (name, one), other in zip(chunked.named_buffers(), whole.buffers()):  # moved once, not twice
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_adding_up_small_batches_is_another_gradient():
    """Why there is `backward_in_chunks`: accumulation never lets pairs of different chunks compete."""
    batch = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    exact, added = Towers(), Towers()
    exact.eval()
    added.eval()
    parts = [Chunk(*part, seed=0) for part in zip(*(x.split(4) for x in batch))]
    features = features_in_chunks(exact.seeded, exact, parts)
    contrastive_loss(*features).backward()
    backward_in_chunks(exact.seeded, exact, parts, features)
    for part in parts:
        (contrastive_loss(*added.seeded(part)) / 2).backward()
    assert (exact.text[0].weight.grad - added.text[0].weight.grad).abs().max() > 1e-3


def test_bytes_that_a_forward_pass_keeps():
    """Of gelu(x @ W1) @ W2: x and W1 for the first product, its result for gelu, gelu's and W2 for the
    second."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 32, bias=False), torch.nn.GELU(),
                                 torch.nn.Linear(32, 4, bias=False))

    def forward(n):
        return layers(torch.randn(n, 8, requires_grad=True))

    kept = [chunks.activation_bytes(forward, n) for n in (2, 4)]
    assert kept[0] == 4 * (2 * 8 + 8 * 32 + 2 * 32 + 2 * 32 + 32 * 4) + 3 * 4 * 2 * 32
    assert (kept[1] - kept[0]) / 2 == 4 * (8 + 32 + 32 + 3 * 32)


def test_what_fits_leaves_batch_norm_as_it_was(monkeypatch):
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    monkeypatch.setattr(chunks, "free_memory", lambda device: 12 * (3 * 4 * 9 + 4 + 8) + 100_000)

    def forward(n):
        return tower(torch.randn(n, 3, 9, 9))

    most = [chunks.fitting_chunk(forward, tower, n) for n in (5, 1000)]
    assert most[0] == 5 and 5 < most[1] < 100
    assert not tower[1].running_mean.any() and tower[1].num_batches_tracked == 0
    monkeypatch.setattr(chunks, "free_memory", lambda device: 0)  # too little for anything: then one by one
    assert chunks.fitting_chunk(forward, tower, 5) == 1


@pytest.mark.parametrize("chunk, share, parts", [
    (1749, 4096, [1366, 1366, 1364]), (3, 8, [3, 3, 2]), (4, 9, [3, 3, 3]), (8, 8, [8]), (1, 3, [1, 1, 1])])
def test_chunks_are_of_one_size(chunk, share, parts):
    size = chunks.balanced(chunk, share)
    assert [len(part) for part in torch.ones(share).split(size)] == parts
    assert chunks.balanced(size, share) == size  # as after a restart


def test_memory_that_the_allocator_holds_is_free(monkeypatch):
    """On a GPU: the driver counts what torch keeps for later as used, until it is given back."""
    held = [600]
    monkeypatch.setattr(torch.cuda, "empty_cache", held.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 - sum(held), 1000))
    assert chunks.free_memory(torch.device("cuda", 0)) == 1000


@pytest.mark.parametrize("gradient_has_its_own", [False, True])
def test_dropout_that_differs_between_the_passes_is_noticed(gradient_has_its_own):
    tower = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.1))

    pictures = torch.randn(5, 6)

    def forward(n):
        if gradient_has_its_own and torch.is_grad_enabled():
            torch.manual_seed(1)  # as a compiler's generator might
        features = F.normalize(tower(pictures[:n]), dim=1)
        return features, features, torch.tensor(1.0)

    distance = chunks.replay_distance(forward, tower, 5)
    assert distance > 2 * chunks.SAME_DROPOUT if gradient_has_its_own else distance == 0
    assert not tower[1].running_mean.any()


def test_another_dropout_moves_features_by_more_than_rounding_does():
    """SAME_DROPOUT lies between: of a real text tower, in float32 and in bfloat16."""
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"]).train()
    pixels, ids = torch.randn(4, 3, 32, 32), torch.randint(1, 99, (4, 12))
    same = {}
    for kind in ("float32", "bfloat16"):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "bfloat16"):
            torch.manual_seed(0)
            same[kind] = torch.cat(clip(pixels, ids)[:2])
    with torch.no_grad():
        torch.manual_seed(1)
        other = torch.cat(clip(pixels, ids)[:2])
    distances = [(x - same["float32"]).norm(dim=1).max() for x in (same["bfloat16"], other)]
    assert distances[0] < chunks.SAME_DROPOUT < distances[1] / 2
