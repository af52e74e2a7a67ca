"""
The contrastive loss of a large batch, tile by tile: the same value and gradient as loss.py's, without ever
holding the matrix of logits. At the paper's batch of 32,768 that matrix has 4 GB.

Shapes: B global batch, b = B / world_size local batch, E joint width.
"""

import torch
import torch.distributed as dist

from common import rank, sum_over_ranks, world_size
from loss import gather, positives

DENSE_LIMIT = 2**25  # above so many logits in [b, B] (128 MB in float32) the loss is computed tile by tile
TILE = 2048  # rows and columns of a tile


def tiled_loss(image_features, text_features, logit_scale, keys=None) -> torch.Tensor:
    """The same value and gradient as `loss.contrastive_loss`, from the same arguments."""
    return TiledLoss.apply(image_features, text_features, logit_scale, keys)


class TiledLoss(torch.autograd.Function):
    """Let S = scale * I @ T.T. The loss needs log sum exp over each row and each column of S, which can be
    kept running from tile to tile, and the mean of S over the right pairs of each row and each column. Its
    gradient,

        dS = (softmax over the row + softmax over the column - targets of the row - of the column) / (2 b),

    is computed tile by tile too, from S computed again: four products of [B, E] with [E, B] in all.

    With several ranks the images stay and the captions travel. Each rank in turn sends its block [b, E] to
    all, and the gradients that all find for this block are added up at its owner. A rank holds the block, its
    gradient and the gradients of its own features (16 b E bytes in float32), a few [B] vectors, and a dozen
    arrays of a tile's size; never [B, E]."""

    @staticmethod
    def forward(ctx, images, texts, scale, keys):
        b, B = len(images), len(images) * world_size()
        mine = slice(rank() * b, (rank() + 1) * b)
        lse_row, lse_column = images.new_full((b,), -torch.inf), images.new_full((B,), -torch.inf)
        # sums of S over the right pairs of each row and column, and how many these are
        sum_row, sum_column, count_row, count_column = (images.new_zeros(n) for n in (b, B, b, B))
        all_keys = None if keys is None else gather(keys)
        if keys is None:  # every row and every column has one right pair
            sum_row = sum_column[mine] = scale * (images * texts).sum(1)
            count_row = count_column[mine] = torch.ones_like(sum_row)
        for owner in range(world_size()):
            block = block_of(owner, texts)
            for rows, columns, there in tiles(b, owner):
                S = scale * images[rows] @ block[columns].T
                lse_row[rows] = torch.logaddexp(lse_row[rows], S.logsumexp(1))
                lse_column[there] = torch.logaddexp(lse_column[there], S.logsumexp(0))
                if keys is not None:
                    right = positives(keys[rows], all_keys[there])
                    sum_row[rows] += (S * right).sum(1)
                    sum_column[there] += (S * right).sum(0)
                    count_row[rows] += right.sum(1)
                    count_column[there] += right.sum(0)
        if world_size() > 1:  # a column has rows on every rank
            sum_column, count_column = sum_over_ranks(sum_column), sum_over_ranks(count_column)
            largest = lse_column.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            lse_column = largest + sum_over_ranks((lse_column - largest).exp()).log()
        ctx.save_for_backward(
            images, texts, scale, keys, all_keys, lse_row, lse_column, count_row, count_column)
        of_rows, of_columns = lse_row - sum_row / count_row, lse_column - sum_column / count_column
        return (of_rows.mean() + of_columns[mine].mean()) / 2 - count_row.log().mean()

    @staticmethod
    def backward(ctx, grad):
        images, texts, scale, keys, all_keys, lse_row, lse_column, count_row, count_column = ctx.saved_tensors
        b, d_scale = len(images), torch.zeros_like(scale)
        d_images = torch.zeros_like(images) if ctx.needs_input_grad[0] else None  # not in stage 1
        d_texts, d_block = None, torch.empty_like(texts)
        for owner in range(world_size()):
            block = block_of(owner, texts)
            d_block.zero_()
            for rows, columns, there in tiles(b, owner):
                cosine = images[rows] @ block[columns].T
                dS = (scale * cosine - lse_row[rows, None]).exp_()
                dS += (scale * cosine - lse_column[there]).exp_()
                if keys is not None:
                    right = positives(keys[rows], all_keys[there])
                    dS -= right / count_row[rows, None] + right / count_column[there]
                elif owner == rank() and rows == columns:
                    dS.diagonal().sub_(2)  # the tile that holds pairs with themselves
                dS *= grad / (2 * b)
                d_scale += (dS * cosine).sum()
                dS *= scale
                d_block[columns] += dS.T @ images[rows]
                if d_images is not None:
                    d_images[rows] += dS @ block[columns]
            if world_size() > 1:
                dist.reduce(d_block, owner)
            if owner == rank():
                d_texts = d_block.clone()
        return d_images, d_texts, d_scale, None


def tiles(b: int, owner: int):
    """Yields for every tile (rows of our images, columns of the owner's captions, these among all B)."""
    for i in range(0, b, TILE):
        for j in range(0, b, TILE):
            end = min(j + TILE, b)
            yield slice(i, min(i + TILE, b)), slice(j, end), slice(owner * b + j, owner * b + end)


def block_of(owner: int, x: torch.Tensor) -> torch.Tensor:
    """The owner's x, on every rank."""
    if world_size() == 1:
        return x
    block = x.contiguous() if owner == rank() else torch.empty_like(x)
    dist.broadcast(block, owner)
    return block
