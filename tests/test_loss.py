"""The loss against the formula, by hand and in several processes."""

import math

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import features

from loss import contrastive_loss, gather, in_batch_accuracy


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
# repeated pairs


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
