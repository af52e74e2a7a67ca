"""The loss against the formula, by hand and in several processes."""

import datetime
import math
import time
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import features, gradients

import loss
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
# repeated pairs, tiles


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


# ------------------------------------------------------------------------------------------------------------
# which device a process has; no GPU is needed to ask


def gpus(monkeypatch, count: int, local_rank: int) -> torch.device:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=device))
    return loss.join_processes("cuda")


def test_a_process_that_sees_one_gpu_alone_has_it(monkeypatch):
    """SLURM may show each task its own GPU only, which is number 0 there whatever the task's number."""
    assert gpus(monkeypatch, 1, 3) == torch.device("cuda", 0)
    assert gpus(monkeypatch, 8, 3) == torch.device("cuda", 3)
    with pytest.raises(SystemExit, match="more processes than the 2 GPUs here; --nproc-per-node 2"):
        gpus(monkeypatch, 2, 3)


def waiter(rank: int, store: str, out: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loss.patient_group()
    usual, short = datetime.timedelta(minutes=30), datetime.timedelta(seconds=1)
    dist.distributed_c10d._set_pg_timeout(short, dist.group.WORLD)
    if rank == 0:
        time.sleep(3)  # a long phase of one process: other collectives would be given up after a second
    loss.wait_for_all()
    dist.distributed_c10d._set_pg_timeout(usual, dist.group.WORLD)
    said = []
    for name in ("the same", str(rank)):
        try:
            loss.one_process_a_device(name)
        except SystemExit as error:
            said.append(str(error))
    torch.save(said, f"{out}{rank}")
    dist.destroy_process_group()


def test_processes_wait_for_a_long_phase_and_notice_a_shared_gpu(tmp_path):
    mp.spawn(waiter, (str(tmp_path / "store"), str(tmp_path / "said")), nprocs=2)
    for rank in (0, 1):
        (said,) = torch.load(tmp_path / f"said{rank}", weights_only=True)
        assert "2 processes have the GPU the same" in said
