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

For batches as large as the paper's 32,768 there are also `positives`, for pairs that repeat, `TiledLoss`, by
which the matrix is never held, and `backward_in_chunks`, by which the activations are never held.

Shapes: B global batch, b = B / world_size local batch, E joint width.
"""

import contextlib
import datetime
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
    if kind == "cpu":
        return torch.device("cpu")
    own, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= count:
        raise SystemExit(f"error: more processes than the {count} GPUs here; --nproc-per-node {count}")
    torch.cuda.set_device(own)
    return torch.device(kind, own)


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


def distillation_loss(image_features, text_features, logit_scale, teacher_features) -> torch.Tensor:
    """How far the in-batch similarities are from a teacher's, this rank's share: for each image, the
    cross-entropy of its distribution over the captions of the global batch under the teacher's, and for each
    caption likewise. The widths of teacher and student need not agree. teacher_features: its (image_features
    [b, E'], text_features [b, E'], logit_scale), of unit norm; they get no gradient."""
    teacher_images, teacher_texts, teacher_scale = (x.detach() for x in teacher_features)
    losses = []
    for rows, columns, teacher_rows, teacher_columns in (
            (image_features, text_features, teacher_images, teacher_texts),
            (text_features, image_features, teacher_texts, teacher_images)):
        targets = (teacher_scale * teacher_rows @ gather(teacher_columns).T).softmax(dim=1)  # [b, B]
        losses.append(F.cross_entropy(logit_scale * rows @ gather(columns).T, targets.to(rows.dtype)))
    return sum(losses) / 2


# ------------------------------------------------------------------------------------------------------------
# a batch larger than memory


def backward_in_chunks(forward, towers, parts, seed_chunk, loss_of, scale_loss=lambda loss: loss):
    """One step's gradients, holding the activations of one part of the batch at a time -> (loss,
    image_features [b, E], text_features [b, E]).

    forward: (pixels, ids) -> (image_features, text_features, logit_scale) of `towers`, the module, perhaps in
    DistributedDataParallel; in the place of pixels it takes features of a frozen tower. parts: the chunks of
    the batch, (pixels, ids) each. seed_chunk(k): set the random numbers of chunk k. loss_of: what forward
    returns, for all b -> a scalar.

    Adding up the losses of small batches (gradient accumulation) is another loss: each pair would compete
    with its chunk only. Instead, as in GradCache (Gao et al., 2021): all features first, without activations;
    one loss over all of them, which gives each feature its gradient; then chunk by chunk again, with
    activations, under the same random numbers, and each chunk's features pass their gradients on into the
    towers. Exact, at the price of a second forward pass (not of a frozen image tower, whose features are
    there). logit_scale is one more feature, counted once. BatchNorm in training sees its own chunk, and its
    running statistics move in the second pass only."""
    if len(parts) == 1:
        seed_chunk(0)
        image_features, text_features, logit_scale = forward(*parts[0])
        loss = loss_of(image_features, text_features, logit_scale)
        scale_loss(loss).backward()
        return loss.detach(), image_features.detach(), text_features.detach()

    with torch.no_grad(), same_buffers(towers):
        features = []
        for k, part in enumerate(parts):
            seed_chunk(k)
            features.append(forward(*part))

    frozen = not any(p.requires_grad for name, p in towers.named_parameters() if "visual." in name)
    trained = slice(1 if frozen else 0, None)  # in stage 1 image features need no gradient
    leaves = [torch.cat([f[0] for f in features]), torch.cat([f[1] for f in features]), features[0][2]]
    for leaf in leaves[trained]:
        leaf.requires_grad_(True)
    loss = loss_of(*leaves)
    scale_loss(loss).backward()

    sizes = [len(f[0]) for f in features]
    gradients = [leaf.grad.split(sizes) for leaf in leaves[:2][trained]]
    for k, (pixels, ids) in enumerate(parts):
        last = k == len(parts) - 1
        # DistributedDataParallel averages over ranks once, in the last backward pass
        with contextlib.nullcontext() if last or world_size() == 1 else towers.no_sync():
            seed_chunk(k)
            outputs = forward(features[k][0] if frozen else pixels, ids)[trained]
            of_scale = leaves[2].grad if last else torch.zeros_like(leaves[2].grad)
            torch.autograd.backward(outputs, [g[k] for g in gradients] + [of_scale])
    return loss.detach(), leaves[0].detach(), leaves[1].detach()


def fitting_chunk(forward, towers, pictures: torch.Tensor, ids: torch.Tensor, most: int) -> int:
    """How many pairs, at most `most`, fit into seven tenths of the memory that is free now -> a number that
    is the same on every rank. forward, towers: as above. pictures, ids: of four pairs, any, of full size.

    Asked of autograd, not of a device, so that it holds for any: twice as many pairs keep how many bytes
    more? Modules work in memory that nobody keeps, too, so the largest output is counted three times
    again."""
    with same_buffers(towers):
        kept = [activation_bytes(forward, pictures[:n], ids[:n]) for n in (2, 4)]
    trained = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    free = free_memory(pictures.device) - 12 * trained  # a gradient and two moments of AdamW
    chunk = max(1, min(most, int(0.7 * free / ((kept[1] - kept[0]) / 2))))
    if world_size() > 1:
        smallest = torch.tensor([chunk], device=pictures.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        chunk = int(smallest)
    return chunk


@contextlib.contextmanager
def same_buffers(module: torch.nn.Module):
    """BatchNorm's running statistics are afterwards what they were before."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    for buffer, value in zip(module.buffers(), before):
        buffer.copy_(value)


def activation_bytes(forward, pictures: torch.Tensor, ids: torch.Tensor) -> int:
    """Bytes that a forward pass leaves for the backward pass (parameters among them, which need no copy), and
    three times those of its largest output."""
    saved, largest = {}, 0

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def look(module, args, output):
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.nbytes)

    watch = torch.nn.modules.module.register_module_forward_hook(look)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = forward(pictures, ids)  # held until all is counted: an address that is freed is used again
    watch.remove()
    del outputs
    return sum(saved.values()) + 3 * largest


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take. On a CPU: Linux's own estimate, its share where torchrun
    started several; without one (macOS, Windows) as much as you like."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.isfile("/proc/meminfo"):
        return 2**62
    with open("/proc/meminfo", encoding="ascii") as file:
        free = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    limits = [f"/sys/fs/cgroup/memory.{name}" for name in ("max", "current")]  # of a container
    if all(map(os.path.isfile, limits)):
        allowed, used = (open(path, encoding="ascii").read().strip() for path in limits)
        free = min(free, int(allowed) - int(used)) if allowed != "max" else free
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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
