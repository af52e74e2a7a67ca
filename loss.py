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

Two things below are for batches as large as the paper's 32,768: repeated pairs (`positives`) and a matrix
that is never held (`TiledLoss`). Activations that are never held: training/chunks.py.

Shapes: B global batch, b = B / world_size local batch, E joint width.
"""

import datetime
import functools
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

DENSE_LIMIT = 2**25  # numbers in [b, B] from which on the matrix is taken in tiles: 128 MB each way
TILE = 2048  # rows and columns of a tile

# ------------------------------------------------------------------------------------------------------------
# many processes


def join_processes(device: str = "") -> torch.device:
    """-> this process's device, of the kind named or the best there is; if torchrun started several processes
    they find each other here. A tensor on the CPU travels by gloo, one on a GPU by nccl."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo"
        store, rank, world_size = next(dist.rendezvous("env://"))
        # after a restart torchrun's store still holds the addresses of the dead
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(minutes=30))
        patient_group()  # made while all are here
    if kind == "cpu":
        return torch.device("cpu")
    own, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= count > 1:
        raise SystemExit(f"error: more processes than the {count} GPUs here; --nproc-per-node {count}")
    own %= count  # SLURM may show each process one GPU alone, which is then its number 0
    torch.cuda.set_device(own)
    one_process_a_device(str(torch.cuda.get_device_properties(own).uuid))
    return torch.device(kind, own)


def one_process_a_device(device: str):
    """SystemExit if two processes have the device of this name: nccl would only say that something is
    invalid."""
    if dist.is_initialized():
        devices = [None] * dist.get_world_size()
        dist.all_gather_object(devices, device)
        if devices.count(device) > 1:
            raise SystemExit(f"error: {devices.count(device)} processes have the GPU {device}; start as many "
                             "as there are GPUs, --nproc-per-node")


@functools.cache
def patient_group():
    """All processes, connected by gloo, which may wait for each other for a week."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def wait_for_all():
    """Returns when every process has called it. For phases that may take longer than the half hour after
    which nccl takes a process for dead, such as encoding a large set."""
    if dist.is_initialized():
        dist.barrier(group=patient_group())


def lost_process(error: RuntimeError) -> bool:
    """Whether it says that another process does not answer any more."""
    reason = str(error).split("\n")[0]
    return dist.is_initialized() and any(word in reason for word in ("gloo", "NCCL", "Connection"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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
    return torch.arange(len(x), device=x.device) + rank() * len(x)


# ------------------------------------------------------------------------------------------------------------
# the loss


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor,
    keys: torch.Tensor | None = None, dense: bool | None = None,
) -> torch.Tensor:
    """Symmetric cross-entropy over the global batch, this rank's share of it: a scalar whose mean over ranks
    is the loss.

    image_features, text_features: [b, E], unit norm, row i of one belongs to row i of the other. logit_scale:
    scalar, the factor itself (`exp` of the parameter), at most 100 (paper, table 8). keys: None, or numbers
    [b, 2] of the image and the caption of each pair, see `positives`. dense: hold the matrix? None decides by
    its size. Computed in float32 or better."""
    b = len(image_features)
    if dense is None:
        dense = b * b * world_size() <= DENSE_LIMIT
    if not dense:
        return TiledLoss.apply(image_features, text_features, logit_scale, keys)
    all_images, all_texts = gather(image_features), gather(text_features)  # [B, E]
    logits_per_image = logit_scale * image_features @ all_texts.T  # [b, B]
    logits_per_text = logit_scale * text_features @ all_images.T  # [b, B]
    labels, floor = own_rows(image_features), 0.0
    if keys is not None:
        right = positives(keys, gather(keys)).to(logits_per_image.dtype)
        labels = right / right.sum(dim=1, keepdim=True)  # [b, B], a row sums to 1
        floor = right.sum(dim=1).log().mean()  # the entropy of the labels, below which no prediction comes
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2 - floor


def positives(keys: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """keys [b, K], others [B, K] -> [b, B], True where two pairs have a number in common. With the numbers of
    image and caption (`--targets multi`) a caption that comes twice in a batch is right for both images, all
    right ones with the same weight (SupCon, Khosla et al., 2020, eq. 2; here less the entropy of these
    weights, so that 0 can be reached). One-hot targets, the paper's, call the second one wrong: as the two
    captions have one feature, what they pull apart is only dropout and augmentation, but no loss below ln 2
    can be reached."""
    return (keys[:, None] == others[None]).any(dim=2)


class TiledLoss(torch.autograd.Function):
    """`contrastive_loss` of a matrix that is never held. Of S = scale * I @ T.T the loss needs four sums: log
    sum exp over each row and each column, kept running from tile to tile, and the mean of S over the right
    pairs of each row and each column. Its gradient,

        dS = (softmax over the row + softmax over the column - targets of the row - of the column) / (2 b),

    is taken tile by tile too, from S computed again: four products of [B, E] with [E, B] in all.

    With many ranks the images stay and the captions travel: each rank in turn sends its block [b, E] to all,
    and what all find as the block's gradient is added up at its owner. A rank holds that block, its gradient
    and the gradients of its own features, 16 b E bytes in float32, and beside them a few [B] vectors and a
    dozen arrays of a tile's size, but never [B, E]."""

    @staticmethod
    def forward(ctx, images, texts, scale, keys):
        b, B = len(images), len(images) * world_size()
        mine = slice(rank() * b, (rank() + 1) * b)
        lse_row, lse_column = images.new_full((b,), -torch.inf), images.new_full((B,), -torch.inf)
        sums = [images.new_zeros(n) for n in (b, B, b, B)]
        sum_row, sum_column, count_row, count_column = sums  # of S over right pairs; of right pairs
        all_keys = None if keys is None else gather(keys)
        if keys is None:  # each pair is right for itself alone: a row and a column have one right pair
            sum_row += scale * (images * texts).sum(1)
            sum_column[mine] = sum_row
            count_row += 1
            count_column[mine] = 1
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
            for x in (sum_column, count_column):
                dist.all_reduce(x)
            largest = lse_column.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            total = (lse_column - largest).exp()
            dist.all_reduce(total)
            lse_column = largest + total.log()
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
    """-> (rows of our images, columns of the owner's captions, the same columns among all B) of each tile."""
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


# ------------------------------------------------------------------------------------------------------------
# to watch


@torch.no_grad()
def in_batch_accuracy(image_features: torch.Tensor, text_features: torch.Tensor) -> tuple[float, float]:
    """Share of images whose best caption of the global batch is their own, and of captions likewise: (i2t,
    t2i). Cheap to watch while training, but it depends on the batch size and is not recall: eval.py measures
    that. Holds TILE rows of scores at a time."""
    labels = own_rows(image_features)

    def share(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        best = torch.cat([(part @ columns.T).argmax(dim=1) for part in rows.split(TILE)])
        return (best == labels).float().mean()

    shares = torch.stack([share(image_features, gather(text_features)),
                          share(text_features, gather(image_features))])
    return tuple(mean_over_ranks(shares).tolist())


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """For numbers to print; without gradient."""
    return sum_over_ranks(x) / world_size()  # gloo has no mean


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """In place; without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x
