"""
The contrastive loss of CLIP (Radford et al., 2021, fig. 3). The whole idea in pseudocode, for a batch of B
pairs of an image and its caption, and features of E numbers:

    I = normalise(image_tower(images))        # [B, E], every row of length 1
    T = normalise(text_tower(captions))       # [B, E]
    logits = exp(t) * I @ T.T                 # [B, B], cosines times a learned factor; row i is image i
    loss = (cross_entropy(logits, arange(B)) + cross_entropy(logits.T, arange(B))) / 2

Image i belongs to caption i, and the other B - 1 captions of the batch are its negatives; for a caption, so
are the other images. The batch size is therefore part of the task: guessing costs ln B, and gradients of two
batches of B/2, added up, are not the gradient of one batch of B.

On N processes ("ranks"), each encodes its own b = B/N pairs, and only features are exchanged. A rank then
computes b rows of the matrix and b columns, against all B features of the other side. The mean of the ranks'
losses is the loss of the whole batch. Because `gather` carries gradient, the mean of the ranks' gradients,
which DistributedDataParallel takes, is exactly the gradient of one process with the whole batch, the factor's
gradient included. The official code gathers without gradient by default: its towers then get 1/N of the
gradient, and its factor gets all of it.

Shapes: B global batch, b = B / world_size this rank's share, E joint width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import mean_over_ranks, rank


class Gather(torch.autograd.Function):
    """x [b, E] of every rank -> [B, E] on every rank, in the order of ranks. Every rank's loss uses my
    features, so their gradient is the sum over ranks: backward adds the ranks' [B, E] gradients, and each
    rank keeps its own b rows."""

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
    """x [b, E] -> [B, E], with gradient; x itself if this process is alone. All ranks must have the same
    b."""
    return Gather.apply(x) if dist.is_initialized() else x


def own_rows(x: torch.Tensor) -> torch.Tensor:
    """x [b, E] -> the places of its rows among the gathered ones [b]: row i of rank r is row r*b + i."""
    return torch.arange(len(x), device=x.device) + rank() * len(x)


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor,
    keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric cross-entropy over the global batch. Returns this rank's share, a scalar; the mean over ranks
    is the loss.

    image_features, text_features: [b, E], unit norm, row i of one belongs to row i of the other. logit_scale:
    scalar, the factor exp(t), at most 100 (paper, table 8). keys: None, or [b, 2], numbers that stand for the
    image and the caption of each pair; pairs that share one are then no negatives, see `positives`."""
    logits_per_image = logit_scale * image_features @ gather(text_features).T  # [b, B]
    logits_per_text = logit_scale * text_features @ gather(image_features).T  # [b, B]
    labels, floor = own_rows(image_features), 0.0
    if keys is not None:
        right = positives(keys, gather(keys)).to(logits_per_image.dtype)
        labels = right / right.sum(dim=1, keepdim=True)  # [b, B], every row sums to 1
        floor = right.sum(dim=1).log().mean()  # the labels' own entropy: subtracted, the loss can reach 0
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2 - floor


def positives(keys: torch.Tensor, all_keys: torch.Tensor) -> torch.Tensor:
    """keys [b, K], all_keys [B, K] -> [b, B], True where two pairs have a key in common.

    A caption that occurs twice in a batch is right for both of its images. The paper's labels call one of the
    two wrong. Identical captions have identical features, so the loss then cannot fall below ln 2 for this
    pair. With keys, all right answers of a row share its label equally (SupCon, Khosla et al., 2020, eq.
    2)."""
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
