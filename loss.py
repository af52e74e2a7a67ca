"""
The contrastive loss of CLIP (Radford et al., 2021, fig. 3). The whole idea in pseudocode, for a batch of B
pairs of an image and its caption, and features of E numbers:

    I = normalise(image_tower(images))        # [B, E], every row of length 1
    T = normalise(text_tower(captions))       # [B, E]
    logits = exp(t) * I @ T.T                 # [B, B], cosines times a learned factor; row i is image i
    loss = (cross_entropy(logits, arange(B)) + cross_entropy(logits.T, arange(B))) / 2

Image i belongs to caption i. The other B - 1 captions of the batch are its negatives, and the other images
are the negatives of caption i. So the batch size is part of the task: guessing costs ln B, and the gradients
of two batches of B/2, added up, are not the gradient of one batch of B.

With N processes ("ranks"), each holds a copy of the model and encodes its own b = B/N pairs; only features
are exchanged. A rank computes b rows of the matrix and b columns, against all B features of the other side,
and the mean of the ranks' losses is the loss of the whole batch. PyTorch's DistributedDataParallel replaces
each copy's gradient by the mean over the ranks. For that mean to be the gradient of the whole batch, a
feature must collect its gradient from the losses of all ranks that used it, which is what `gather` does in
its backward pass. The official code does not, by default. There each rank computes the loss of the whole
batch, but only its own features pass gradients on, so that after the mean the towers have 1/N of the gradient
and the factor exp(t) has all of it. (BatchNorm is not the same on N processes as on one: see resnet.py.)

Shapes: B global batch, b = B / world_size this rank's share, E joint width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import mean_over_ranks, rank


class Gather(torch.autograd.Function):
    """x [b, E] of every rank -> [B, E] on every rank, in the order of ranks. Backward adds up the [B, E]
    gradients of all ranks, and each rank keeps the b rows of its own features."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still need the original
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: torch.Tensor) -> torch.Tensor:
    """x [b, E] -> [B, E], and back for gradients; x itself if this process is alone. b is equal on all
    ranks."""
    return Gather.apply(x) if dist.is_initialized() else x


def own_rows(x: torch.Tensor) -> torch.Tensor:
    """x [b, E] -> [b], the places of its rows in gather(x): row i of rank r is row r * b + i there."""
    return torch.arange(len(x), device=x.device) + rank() * len(x)


def contrastive_loss(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor,
                     keys: torch.Tensor | None = None) -> torch.Tensor:
    """Symmetric cross-entropy over the global batch. Returns this rank's share, a scalar; the mean over ranks
    is the loss.

    image_features, text_features: [b, E], unit norm, row i of one belongs to row i of the other. logit_scale:
    scalar, the factor exp(t), at most 100 (Chinese CLIP, table 8). keys: None, or [b, 2], a number for the
    image and one for the caption of each pair. Pairs that share a number are then not negatives, see
    `positives`."""
    logits_per_image = logit_scale * image_features @ gather(text_features).T  # [b, B]
    logits_per_text = logit_scale * text_features @ gather(image_features).T  # [b, B]
    labels, floor = own_rows(image_features), 0.0  # [b], for each row the number of its right column
    if keys is not None:
        right = positives(keys, gather(keys)).to(logits_per_image.dtype)
        labels = right / right.sum(dim=1, keepdim=True)  # [b, B], for each row the probabilities of all
        floor = right.sum(dim=1).log().mean()  # the labels' entropy: no prediction costs less
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2 - floor


def positives(keys: torch.Tensor, all_keys: torch.Tensor) -> torch.Tensor:
    """keys [b, K], all_keys [B, K] -> [b, B], True where two pairs have a key in common.

    If two pairs have the same caption, it is right for both images, but the paper's labels call one of the
    two captions wrong. Without dropout both have the same feature, so each of these rows costs at least ln 2.
    With keys, all right answers of a row have the same probability (SupCon, Khosla et al., 2020, eq. 2)."""
    return (keys[:, None] == all_keys[None]).any(dim=2)


@torch.no_grad()
def in_batch_accuracy(image_features: torch.Tensor, text_features: torch.Tensor) -> tuple[float, float]:
    """[b, E] each, unit norm -> the share of images whose nearest caption of the global batch is their own,
    and of captions whose nearest image is: (i2t, t2i), 0 to 1. It is cheap to watch during training. It gets
    harder as the batch grows, so it cannot be compared between runs of different batch size."""
    labels = own_rows(image_features)

    def share(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
        nearest = [(some @ gallery.T).argmax(dim=1) for some in queries.split(2048)]  # never all of [b, B]
        return (torch.cat(nearest) == labels).float().mean()

    shares = torch.stack([share(image_features, gather(text_features)),
                          share(text_features, gather(image_features))])
    return tuple(mean_over_ranks(shares).tolist())
