"""
A batch larger than memory, in chunks: the gradient of the whole batch, while the activations of one chunk are
held, and how large a chunk may be.

    features = features_in_chunks(forward, towers, chunks)   # of all pairs, without activations
    loss_of(*features).backward()                            # each feature, and the scale, has its gradient
    backward_in_chunks(forward, towers, chunks, features)    # chunk by chunk again, on into the towers

Adding up the gradients of small batches (gradient accumulation) is the gradient of another loss, in which a
pair competes with its chunk alone. The three lines above are exact (GradCache, Gao et al., 2021); their price
is a second forward pass. A frozen image tower is spared that: its features are there, and need no gradient.

Shapes: b local batch, E joint width.
"""

import contextlib
import math
import os
import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist

import model
from common import rank, world_size
from training.recipes import Config, ConfigError

SAME_DROPOUT = 0.05  # rounding to bfloat16 moves a feature by some 0.01, other dropout by 0.3 and more
FEW = 64  # pairs a chunk; below that most of a step goes into overhead


class Chunk(NamedTuple):
    pictures: torch.Tensor  # bytes [n, 3, S, S], or features [n, E] of a frozen tower
    ids: torch.LongTensor  # [n, T]
    seed: int  # of this chunk's dropout, so that a second pass draws the same


def make_chunks(parts: list, seed: int, step: int) -> list[Chunk]:
    """The parts of this process's batch, each with a dropout seed of its own (32 bits, as a CPU's generator
    takes no more)."""
    return [Chunk(part.pictures, part.ids, zlib.crc32(f"{seed} {step} {k}".encode()))
            for k, part in enumerate(parts, rank() * len(parts))]


# ------------------------------------------------------------------------------------------------------------
# the gradient


def features_in_chunks(forward, towers: torch.nn.Module, chunks: list[Chunk]) -> list[torch.Tensor]:
    """-> [image_features [b, E], text_features [b, E], logit_scale] of all chunks, as leaves: a loss gives
    gradients to them, not to the towers. Image features of a frozen tower get none.

    forward: Chunk -> these three for its pairs, computed by `towers` (the model, perhaps wrapped in
    DistributedDataParallel) under the chunk's seed."""
    with torch.no_grad(), same_buffers(towers):
        images, texts, scales = zip(*map(forward, chunks))
    features = [torch.cat(images), torch.cat(texts), scales[0]]
    frozen = not any(p.requires_grad for name, p in towers.named_parameters() if "visual." in name)
    for feature in features[1 if frozen else 0:]:
        feature.requires_grad_(True)
    return features


def backward_in_chunks(forward, towers: torch.nn.Module, chunks: list[Chunk], features: list[torch.Tensor]):
    """Pass the gradients of `features` on into the towers: each chunk's features are computed again, now with
    activations. BatchNorm normalises every chunk by itself, and its running statistics move in this pass
    only. logit_scale counts once."""
    image_features, _, logit_scale = features
    frozen = not image_features.requires_grad
    sizes = [len(chunk.ids) for chunk in chunks]
    gradients = zip(*(x.grad.split(sizes) for x in features[1 if frozen else 0:2]))
    for chunk, images, of_chunk in zip(chunks, image_features.detach().split(sizes), gradients):
        last = chunk is chunks[-1]
        # DistributedDataParallel averages over ranks once, in the last backward pass
        with contextlib.nullcontext() if last or world_size() == 1 else towers.no_sync():
            again = forward(chunk._replace(pictures=images) if frozen else chunk)
            of_scale = logit_scale.grad if last else torch.zeros_like(logit_scale.grad)
            torch.autograd.backward(again[1 if frozen else 0:], [*of_chunk, of_scale])


@contextlib.contextmanager
def same_buffers(module: torch.nn.Module):
    """Restores BatchNorm's running statistics on exit."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    for buffer, value in zip(module.buffers(), before):
        buffer.copy_(value)


# ------------------------------------------------------------------------------------------------------------
# how large


def choose_chunks(cfg: Config, clip: model.ChineseCLIP, before: int) -> tuple[int, int]:
    """-> (pairs of a chunk, number of chunks) of this process's share of a batch. A chunk has --chunk-size
    pairs, or as many as in the run that is continued (`before`; 0: none), or as many as fit into memory."""
    share = cfg.batch_size // world_size()
    size = cfg.chunk_size or before
    if not size:
        size = fitting_chunk(trial(cfg, clip, 4), clip, share)
        if size < min(share, FEW):
            print(f"   only {balanced(size, share)} pairs fit into the memory that is free, and many small "
                  "chunks are slow: does another program hold memory? --chunk-size N tries more")
    size = balanced(min(size, share), share)
    return size, math.ceil(share / size)


def compile_towers(cfg: Config, clip: model.ChineseCLIP, chunk_size: int):
    """With --compile, torch.compile both towers. ConfigError if the second pass over a chunk would then draw
    other dropout than the first: its gradient would be wrong, and no loss would show that."""
    if not cfg.compile:
        return
    clip.visual.compile()
    clip.bert.encoder.compile()
    if chunk_size < cfg.batch_size // world_size():
        distance = replay_distance(trial(cfg, clip, chunk_size), clip, chunk_size)
        if not distance < SAME_DROPOUT:
            raise ConfigError("--compile: the two passes over a chunk draw other dropout here (features are "
                              f"{distance:.2f} apart), so its gradient would be wrong; leave it out")


def trial(cfg: Config, clip: model.ChineseCLIP, most: int):
    """-> a function: n -> the features of n pairs, black pictures with the longest captions; n <= most."""
    device, size = clip.logit_scale.device, clip.config.visual.resolution
    shape = (clip.config.embed_dim,) if cfg.cache_features else (3, size, size)
    pictures, ids = torch.zeros(most, *shape, device=device), torch.ones(most, cfg.context_length).long()

    def forward(n: int):
        with model.autocast(clip):
            return clip(pictures[:n], ids[:n])

    return forward


def balanced(chunk: int, share: int) -> int:
    """The size of equal chunks of at most `chunk` pairs, the last one a little smaller: if 1,749 pairs of
    4,096 fit, the chunks are 1,366 + 1,366 + 1,364 and not 1,749 + 1,749 + 598."""
    return math.ceil(share / math.ceil(share / chunk))


def fitting_chunk(forward, towers: torch.nn.Module, most: int) -> int:
    """How many pairs, at most `most`, fit into seven tenths of the memory that is free now, the same on all
    ranks: from the bytes that autograd keeps for the backward pass of 2 and of 4 pairs.

    forward: n -> features of n pairs, computed by `towers`."""
    with same_buffers(towers):
        kept = [activation_bytes(forward, n) for n in (2, 4)]
    trained = [p for p in towers.parameters() if p.requires_grad]
    device = trained[0].device
    free = free_memory(device) - 12 * sum(p.numel() for p in trained)  # a gradient and two moments of AdamW
    chunk = max(1, min(most, int(0.7 * free / ((kept[1] - kept[0]) / 2))))
    smallest = torch.tensor([chunk], device=device)
    if world_size() > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def replay_distance(forward, towers: torch.nn.Module, n: int) -> float:
    """The largest distance between features of unit norm, [n, E], without and with gradient, under one seed.
    Below SAME_DROPOUT it is rounding; above it, the passes drew other dropout."""
    passes = []
    with same_buffers(towers):
        for gradient in (False, True):
            torch.manual_seed(0)
            with torch.set_grad_enabled(gradient):
                passes.append(torch.cat(forward(n)[:2]).detach().float())
    return (passes[0] - passes[1]).norm(dim=1).max().item()


def activation_bytes(forward, n: int) -> int:
    """Bytes that the forward pass of n pairs keeps for the backward pass. Modules also work in memory that
    nobody keeps, which is counted as three times the largest output. (Parameters are counted too, but they
    are the same for any number of pairs.)"""
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
        outputs = forward(n)  # held until all is counted: an address that is freed is used again
    watch.remove()
    del outputs
    return sum(saved.values()) + 3 * largest


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take. On a CPU that is Linux's own estimate, divided among the
    processes that torchrun started here; other systems give none, and nothing limits the chunk there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps for later is free too, and the driver cannot know
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
