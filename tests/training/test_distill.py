"""The distillation loss by hand, in tiles of rows, and in several processes."""

import pytest
import torch
from conftest import features, gradients

import model
from training import distill
from training.distill import distillation_loss, load_teacher


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


def test_the_teacher_computes_as_the_student_does(tmp_path):
    student = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    student.precision = torch.bfloat16
    model.save(student, str(tmp_path / "it"))
    teacher = load_teacher(str(tmp_path / "it"), student)
    with model.autocast(teacher):
        assert teacher.encode_text(torch.tensor([[101, 102]])).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("limit", [1, 12, 30, 10**6])
def test_a_few_rows_at_a_time_are_the_same_loss_and_gradient(limit, monkeypatch):
    """13 rows of 13 numbers: one by one, and all together."""
    inputs = (features(0, 13), True), (features(1, 13), True), (torch.tensor(30.0).double(), True)
    teacher = features(2, 13, E=9), features(3, 13, E=9), torch.tensor(20.0).double()
    monkeypatch.setattr(distill, "DENSE_LIMIT", 13 * 13)
    whole = gradients(lambda *x: distillation_loss(*x, teacher), *inputs)
    monkeypatch.setattr(distill, "DENSE_LIMIT", limit)
    for one, other in zip(whole, gradients(lambda *x: distillation_loss(*x, teacher), *inputs)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_no_more_of_the_matrix_is_kept_than_the_limit(monkeypatch):
    """What autograd keeps for the backward pass: features, but no similarities."""
    monkeypatch.setattr(distill, "DENSE_LIMIT", 300)
    kept = []
    teacher = features(2, 100), features(3, 100), torch.tensor(20.0).double()
    image, text = features(0, 100).requires_grad_(), features(1, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        distillation_loss(image, text, torch.tensor(9.0).double(), teacher)
    assert kept and max(kept) <= 100 * 6  # [B, E]
