"""
The contrastive loss of CLIP (Radford et al., 2021, fig. 3), in one process or in many. The whole idea in
pseudocode:

    I = normalise(image_tower(images))        # [B, E]
    T = normalise(text_tower(captions))       # [B, E]
    logits = exp(t) * I @ T.T                 # [B, B], pair i is right at [i, i], all else is a negative
    loss = (cross_entropy(logits, arange(B)) + cross_entropy(logits.T, arange(B))) / 2

Every other pair of the batch is a negative, so the batch size is part of the task: the loss of guessing is ln
B, and two batches of B/2, accumulated, are not one batch of B.

With N ranks of b = B/N pairs each, features are gathered (not images, not weights), and each rank computes
its own b rows of the matrix and its own b columns against all B: the [B, B] matrix exists on no rank. The
mean over ranks of these losses is the loss of the whole batch, and because `gather` carries gradient, the
mean over ranks of the gradients (what DistributedDataParallel computes) is exactly the gradient of one
process that holds the whole batch, `logit_scale` included. The official default gathers without gradient: its
towers get 1/N of the gradient and its temperature all of it.

Shapes: B global batch, b = B / world_size local batch, E joint width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Gather(torch.autograd.Function):
    """x [b, E] of every rank -> [B, E] on every rank, in rank order. A feature is used by the loss of every
    rank, so its gradient is the sum of theirs: backward adds the ranks' [B, E] gradients and each rank keeps
    its own b rows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still need the one it gave us
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: torch.Tensor) -> torch.Tensor:
    """x [b, E] -> [B, E], with gradient; x itself when this process is alone. Every rank must bring the same
    b."""
    return Gather.apply(x) if dist.is_initialized() else x


def own_rows(x: torch.Tensor) -> torch.Tensor:
    """x [b, E] -> the numbers of its rows among the gathered ones [b]: our row i is row rank * b + i."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(x), device=x.device) + rank * len(x)


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy over the global batch, this rank's share of it: a scalar whose mean over ranks
    is the loss.

    image_features, text_features: [b, E], unit norm, row i of one belongs to row i of the other. logit_scale:
    scalar, the factor itself (`exp` of the parameter), at most 100 (paper, table 8). Computed in float32 or
    better."""
    all_images, all_texts = gather(image_features), gather(text_features)  # [B, E]
    logits_per_image = logit_scale * image_features @ all_texts.T  # [b, B]
    logits_per_text = logit_scale * text_features @ all_images.T  # [b, B]
    labels = own_rows(image_features)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


@torch.no_grad()
def in_batch_accuracy(image_features: torch.Tensor, text_features: torch.Tensor) -> tuple[float, float]:
    """Share of images whose best caption of the global batch is their own, and of captions likewise: (i2t,
    t2i). Cheap to watch while training, but it depends on the batch size and is not recall: eval.py measures
    that."""
    labels = own_rows(image_features)
    i2t = (image_features @ gather(text_features).T).argmax(1) == labels  # [b]
    t2i = (text_features @ gather(image_features).T).argmax(1) == labels  # [b]
    shares = torch.stack([i2t.float().mean(), t2i.float().mean()])
    if dist.is_initialized():
        dist.all_reduce(shares)  # a sum: gloo has no mean
        shares /= dist.get_world_size()
    return shares[0].item(), shares[1].item()
