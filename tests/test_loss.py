"""The loss against the formula, by hand and in several processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import whole_batch

import loss
from loss import backward_in_chunks, contrastive_loss, distillation_loss, gather, in_batch_accuracy


def features(seed: int, n: int, E: int = 6, dtype=torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(n, E, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def test_two_orthogonal_pairs_by_hand():
    # logits are [[s, 0], [0, s]] in both directions, so the loss is ln(1 + e^-s)
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(3.0))
    assert math.isclose(loss.item(), math.log(1 + math.exp(-3)), rel_tol=1e-6)


def test_collapsed_features_lose_exactly_ln_B():
    same = torch.ones(7, 4) / 2
    assert math.isclose(contrastive_loss(same, same, torch.tensor(50.0)).item(), math.log(7), rel_tol=1e-6)


def test_against_the_papers_pseudocode():
    image, text, scale = features(0, 9), features(1, 9), torch.tensor(14.3, dtype=torch.float64)
    logits, labels = scale * image @ text.T, torch.arange(9)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, scale), expected, rtol=1e-13, atol=0)


def test_loss_is_symmetric_in_the_towers():
    image, text, scale = features(2, 5), features(3, 5), torch.tensor(9.0, dtype=torch.float64)
    one, other = contrastive_loss(image, text, scale), contrastive_loss(text, image, scale)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_in_batch_accuracy_by_hand():
    # image 2 prefers text 1; text 2 is nobody's favourite but its own image's rival loses: 2 of 3 and 2 of 3
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]])
    i2t, t2i = in_batch_accuracy(image, text)
    assert math.isclose(i2t, 2 / 3, rel_tol=1e-6) and math.isclose(t2i, 2 / 3, rel_tol=1e-6)


def test_in_batch_accuracy_does_not_depend_on_the_tile(monkeypatch):
    image, text = features(0, 40), features(0, 40) + 0.5 * features(1, 40)
    whole = in_batch_accuracy(image, text)
    monkeypatch.setattr(loss, "TILE", 7)
    assert in_batch_accuracy(image, text) == whole and 0 < whole[0] < 1


def test_gather_is_the_identity_when_alone():
    x = features(4, 3)
    assert gather(x) is x


def worker(rank: int, world_size: int, store: str, out: str):
    """Each rank has its rows; the mean over ranks of losses and of gradients must be those of the whole
    batch."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    b = 8 // world_size
    image, text = (features(seed, 8)[rank * b : (rank + 1) * b].requires_grad_() for seed in (5, 6))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(image, text, scale)
    loss.backward()
    accuracy = in_batch_accuracy(image.detach(), text.detach())
    torch.save((loss.detach(), image.grad, text.grad, scale.grad, accuracy), f"{out}{rank}")
    dist.destroy_process_group()


def test_ranks_together_give_the_loss_and_gradient_of_the_whole_batch(tmp_path):
    image, text = (features(seed, 8).requires_grad_() for seed in (5, 6))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(image, text, scale)
    loss.backward()
    for world_size in (2, 4):
        out = str(tmp_path / f"{world_size}-")
        mp.spawn(worker, (world_size, str(tmp_path / f"store{world_size}"), out), nprocs=world_size)
        parts = [torch.load(f"{out}{rank}", weights_only=True) for rank in range(world_size)]
        losses, image_grads, text_grads, scale_grads, accuracies = zip(*parts)
        torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), rtol=1e-12, atol=0)
        # a rank's feature gradient is of the sum of the ranks' losses, so 1 / world_size of it is the mean's
        torch.testing.assert_close(torch.cat(image_grads) / world_size, image.grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(torch.cat(text_grads) / world_size, text.grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(torch.stack(scale_grads).mean(), scale.grad, rtol=1e-10, atol=1e-14)
        assert set(accuracies) == {in_batch_accuracy(image.detach(), text.detach())}


# ------------------------------------------------------------------------------------------------------------
# repeated pairs, tiles, chunks


def gradients(loss_of, *inputs) -> list:
    """Value and gradients of a loss; None where an input needs none."""
    leaves = [x.clone().requires_grad_(needs) for x, needs in inputs]
    value = loss_of(*leaves)
    (3 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("stage_1", [False, True])
def test_tiles_equal_the_matrix(tile, keys, stage_1, monkeypatch):
    monkeypatch.setattr(loss, "TILE", tile)
    numbers = torch.randint(0, 5, (13, 2), generator=torch.Generator().manual_seed(0)) if keys else None
    inputs = ((features(0, 13), not stage_1), (features(1, 13), True), (torch.tensor(30.0).double(), True))
    dense, tiled = (gradients(lambda *x: contrastive_loss(*x, numbers, dense=how), *inputs)  # noqa: B023
                    for how in (True, False))
    assert (tiled[1] is None) == stage_1
    for one, other in zip(dense, tiled):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_tiles_stand_scores_that_float32_cannot_exponentiate(monkeypatch):
    monkeypatch.setattr(loss, "TILE", 2)
    image, text = features(0, 6).float(), -features(0, 6).float()  # every right pair at cosine -1
    value = contrastive_loss(image, text, torch.tensor(100.0), dense=False)
    torch.testing.assert_close(value, contrastive_loss(image, text, torch.tensor(100.0), dense=True))
    assert value > 100


def test_the_matrix_is_left_for_tiles_by_size(monkeypatch):
    image, text, scale = features(0, 9), features(1, 9), torch.tensor(5.0).double()
    for limit, tiled in ((81, False), (80, True)):
        monkeypatch.setattr(loss, "DENSE_LIMIT", limit)
        value = contrastive_loss(image.requires_grad_(), text, scale)
        assert (type(value.grad_fn).__name__ == "TiledLossBackward") == tiled


def test_repeated_captions_by_hand():
    """Pairs 0 and 1 share their caption, so both texts are right for both images, half each."""
    image, text, scale = features(0, 3), features(1, 3), torch.tensor(4.0).double()
    text = torch.stack([text[0], text[0], text[2]])
    log_p = (scale * image @ text.T).log_softmax(dim=1)
    log_q = (scale * text @ image.T).log_softmax(dim=1)
    expected = sum(-(p[0, :2].mean() + p[1, :2].mean() + p[2, 2]) / 3 for p in (log_p, log_q)) / 2
    expected -= 2 / 3 * math.log(2)  # what two of the three rows cannot come below
    keys = torch.tensor([[0, 7], [1, 7], [2, 8]])
    torch.testing.assert_close(contrastive_loss(image, text, scale, keys), expected, rtol=1e-12, atol=0)


def test_only_multi_targets_reach_0_where_captions_repeat():
    same = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]  # pairs 0 and 1: one caption, two equal images
    keys, scale = torch.tensor([[0, 7], [1, 7], [2, 8], [3, 9]]), torch.tensor(1000.0).double()
    assert contrastive_loss(same, same, scale, keys) < 1e-9
    assert math.isclose(contrastive_loss(same, same, scale), math.log(2) / 2)


def test_multi_targets_without_repeats_are_one_hot():
    image, text, scale = features(0, 5), features(1, 5), torch.tensor(4.0).double()
    keys = torch.arange(10).view(5, 2)
    one_hot = contrastive_loss(image, text, scale)
    torch.testing.assert_close(contrastive_loss(image, text, scale, keys), one_hot)


def test_distillation_by_hand_and_its_gradient():
    image, text, scale = features(0, 4), features(1, 4), torch.tensor(3.0).double()
    teacher = features(2, 4, E=9), features(3, 4, E=9), torch.tensor(8.0).double()
    expected = 0
    for rows, columns, r, c in ((image, text, teacher[0], teacher[1]), (text, image, teacher[1], teacher[0])):
        targets, logits = (8 * r @ c.T).softmax(1), 3 * rows @ columns.T
        expected = expected - (targets * logits.log_softmax(1)).sum(1).mean() / 2
    value, *grads = gradients(
        lambda i, t, s: distillation_loss(i, t, s, teacher), (image, True), (text, True), (scale, True))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert all(grad.abs().max() > 1e-3 for grad in grads)
    # a student that says what the teacher says has the least loss: the teacher's entropy, no gradient
    value, *grads = gradients(lambda *x: distillation_loss(*x, teacher), *((x, True) for x in teacher))
    assert all(grad.abs().max() < 1e-12 for grad in grads)


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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5])
def test_chunks_equal_one_graph(chunk, frozen):
    """With dropout on and BatchNorm training; against the same chunks in one graph that keeps everything."""
    if chunk == 1 and not frozen:
        pytest.skip("BatchNorm has no statistics of one row")
    batch = torch.randn(12, 5).double(), torch.randn(12, 3).double()
    if 12 % chunk == 1:
        batch = tuple(x[:-1] for x in batch)
    seed = torch.manual_seed
    chunked, whole = Towers(frozen), Towers(frozen)
    pieces = list(zip(*(x.split(chunk) for x in batch)))
    value, image, _ = backward_in_chunks(chunked, chunked, pieces, seed, contrastive_loss)
    expected, images, _ = whole_batch(whole, whole, pieces, seed, contrastive_loss)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(image, images, rtol=1e-12, atol=0)
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
    parts = list(zip(*(x.split(4) for x in batch)))
    backward_in_chunks(exact, exact, parts, torch.manual_seed, contrastive_loss)
    for part in parts:
        (contrastive_loss(*added(*part)) / 2).backward()
    assert (exact.text[0].weight.grad - added.text[0].weight.grad).abs().max() > 1e-3


def test_bytes_that_a_forward_pass_keeps():
    """Of gelu(x @ W1) @ W2: x and W1 for the first product, its result for gelu, gelu's and W2 for the
    second."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 32, bias=False), torch.nn.GELU(),
                                 torch.nn.Linear(32, 4, bias=False))

    def forward(x, ids):
        return layers(x)

    kept = [loss.activation_bytes(forward, torch.randn(n, 8, requires_grad=True), None) for n in (2, 4)]
    assert kept[0] == 4 * (2 * 8 + 8 * 32 + 2 * 32 + 2 * 32 + 32 * 4) + 3 * 4 * 2 * 32
    assert (kept[1] - kept[0]) / 2 == 4 * (8 + 32 + 32 + 3 * 32)


def test_what_fits_leaves_batch_norm_as_it_was(monkeypatch):
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    monkeypatch.setattr(loss, "free_memory", lambda device: 12 * (3 * 4 * 9 + 4 + 8) + 100_000)
    most = [loss.fitting_chunk(lambda x, ids: tower(x), tower, torch.randn(4, 3, 9, 9), torch.ones(4, 2), n)
            for n in (5, 1000)]
    assert most[0] == 5 and 5 < most[1] < 100
    assert not tower[1].running_mean.any() and tower[1].num_batches_tracked == 0
    monkeypatch.setattr(loss, "free_memory", lambda device: 0)  # too little for anything: then one by one
    x = torch.randn(4, 3, 9, 9)
    assert loss.fitting_chunk(lambda x, ids: tower(x), tower, x, torch.ones(4, 2), 5) == 1
