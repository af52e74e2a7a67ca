"""
A batch larger than memory: `backward_in_chunks` gives the gradient of the whole batch while it holds the
activations of a part of it, and `fitting_chunk` says how large such a part may be.

Shapes: b local batch, E joint width.
"""

import contextlib
import math
import os

import torch
import torch.distributed as dist

from common import world_size

SAME_DROPOUT = 0.05  # rounding to bfloat16 moves a feature by some 0.01, another dropout by 0.3 and more


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


def balanced(chunk: int, share: int) -> int:
    """A chunk of at most `chunk` pairs that cuts `share` pairs into equal parts, the last one a little
    smaller: 4,096 pairs of which 1,749 fit are 1,366 + 1,366 + 1,364, not 1,749 + 1,749 + 598."""
    return math.ceil(share / math.ceil(share / chunk))


def replay_distance(forward, towers, pictures: torch.Tensor, ids: torch.Tensor) -> float:
    """The largest distance between features of unit norm without and with gradient, as the two passes of
    `backward_in_chunks` compute them. Below SAME_DROPOUT it is rounding. Above it the passes drew other
    dropout, as a compiler's might, and no loss would show that."""
    passes = []
    with same_buffers(towers):
        for gradient in (False, True):
            torch.manual_seed(0)
            with torch.set_grad_enabled(gradient):
                passes.append(torch.cat(forward(pictures, ids)[:2]).detach().float())
    return (passes[0] - passes[1]).norm(dim=1).max().item()


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
