"""
The two-stage recipe of Chinese CLIP (Yang et al., 2022, sec. 2.3), for one CPU, one GPU or many
(on GPUs it has not been run yet).

    python train.py                                                    # a laptop: the demo, in minutes
    python train.py --recipe muge --init ViT-B-16 --data path/to/MUGE  # one GPU: fine-tune the released model
    torchrun --nproc-per-node 8 train.py --recipe pretrain --image-init openai-ViT-B-16 \\
        --text-init chinese-roberta-wwm-ext --data path/to/pairs       # eight GPUs: both stages

Stage 1 freezes the image tower and teaches the text tower to read it ("locked-image tuning", Zhai et al.,
2022); stage 2 trains everything. training/recipes.py has the flags and the paper's numbers. The same command, repeated
after a crash, a kill or a finished act, goes on where it was, bit for bit (same number of processes, CPU).

Written per act, under final names only when complete: checkpoint.pt and the one before it (to resume,
training/checkpoint.py), best.safetensors (by mean recall on the validation split), last.safetensors, log.jsonl (its
lines of numbers). Batches larger than memory: training/chunks.py; features of the frozen tower, computed once:
training/cache.py.
"""

import contextlib
import functools
import gc
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zlib

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its threads wait without using up a core

import torch

from training import checkpoint
import data
import model
from training import report
from weights import read
from training.cache import open_features
from training.checkpoint import Checkpoints, Requests, Stopped
from training.chunks import SAME_DROPOUT, backward_in_chunks, balanced, fitting_chunk, replay_distance
from data import on_device
from training.distill import distillation_loss, teach
from training.tiles import DENSE_LIMIT, tiled_loss
from eval import retrieval
from common import join_processes, leave_processes, lost_process, mean_over_ranks
from loss import contrastive_loss, in_batch_accuracy
from sources.pairs import DataError
from training.recipes import Config, ConfigError, chained, parse
from sources.layouts import open_pairs

# ------------------------------------------------------------------------------------------------------------
# formulas


def get_lr(step: int, cfg: Config, total: int) -> float:
    """Linear warm-up, then a cosine from the peak to 0 (paper, table 8)."""
    warmup = warmup_steps(cfg, total)
    if step < warmup:
        return cfg.peak_lr * (step + 1) / warmup
    return cfg.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_steps(cfg: Config, total: int) -> int:
    """The warm-up that was asked for; a tenth of a run of which that would be more than half."""
    return cfg.warmup if cfg.warmup <= total / 2 else max(1, total // 10)


def steps_of(cfg: Config, pairs: int) -> int:
    """Steps of a run on so many pairs. An epoch is of whole batches, the last one filled with pairs of the
    next epoch, as the official code counts (and table 9 with it)."""
    return cfg.steps or math.ceil(cfg.epochs * math.ceil(pairs / cfg.batch_size))


def param_groups(clip: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices, not gains, biases, class embedding or temperature: told by the number of dimensions.
    The official code tells by name, misses BERT's LayerNorm, and so decays 25 of the 51 gains of ViT-B-16."""
    trained = [p for p in clip.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def set_train_mode(clip: model.ChineseCLIP, freeze_image: bool):
    """Training mode; a frozen image tower stays in eval mode, or its BatchNorm statistics would move (paper,
    app. A.2)."""
    clip.train()
    clip.visual.train(not freeze_image)


# ------------------------------------------------------------------------------------------------------------
# the loop


def build(cfg: Config, device: torch.device) -> model.ChineseCLIP:
    """The model of a run: fresh or from --init, towers from --image-init and --text-init, frozen as
    --freeze-image says."""
    torch.manual_seed(cfg.seed)
    clip = model.ChineseCLIP(model.MODELS[cfg.model])
    if not checkpoint.paths(cfg.out):  # which would replace it all
        starts = cfg.image_init, cfg.text_init, cfg.init
        model.initialise(clip, *(chained(start, cfg.out) for start in starts))
    clip.visual.requires_grad_(not cfg.freeze_image)
    clip.visual.patch_drop = cfg.patch_drop
    clip.set_grad_checkpointing(cfg.grad_checkpointing)
    clip.to(device)
    if device.type == "cuda" and isinstance(clip.visual, model.ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)  # what its convolutions are fast in
    return clip


def build_optimizer(cfg: Config, clip: model.ChineseCLIP) -> torch.optim.Optimizer:
    """AdamW with the numbers of table 8, which differ between ResNet and ViT."""
    beta2, eps = (0.999, 1e-8) if isinstance(clip.visual, model.ModifiedResNet) else (0.98, 1e-6)
    betas = (0.9, cfg.beta2 or beta2)
    return torch.optim.AdamW(
        param_groups(clip, cfg.weight_decay), betas=betas, eps=cfg.eps or eps, fused=True)


def train(act: str, cfg: Config) -> list[dict]:
    """Run one act to its end, from wherever its checkpoint stands. Returns its history, a list of
    {"step", "samples", "text_to_image", "image_to_text", "mean_recall"}, the same on every rank."""
    # 1. setup: alone, or one of the processes that torchrun started
    gc.collect()  # an earlier act's model and optimizer, or the memory they stand in would count as used
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = join_processes(cfg.device)
    if device.type == "cuda":
        # TF32 for what autocast leaves in float32, the loss: that rounding (imitated on a CPU, batch 4,096)
        # moves its gradient by 5e-4, while the features' own, to bfloat16, moves it by 4e-3
        torch.set_float32_matmul_precision("high")
    say, B = functools.partial(print, flush=True), cfg.batch_size
    if B % world_size:
        raise ConfigError(f"--batch-size {B}: expected a multiple of the {world_size} processes")
    os.makedirs(cfg.out, exist_ok=True)

    # 2. data
    if re.search(r"\.tar\s*(,|$)", cfg.data) and not cfg.valid_data:
        raise ConfigError(f"--data {cfg.data}: a pattern has no validation split; name one by --valid-data")
    pairs, valid = open_pairs(cfg.data, "train"), open_pairs(cfg.valid_data or cfg.data, cfg.valid_split)
    if not len(pairs):
        raise DataError(f"{cfg.data}: no training pairs; `python -m tools.curate check {cfg.data}` says why")
    total = steps_of(cfg, len(pairs))
    eval_every = cfg.eval_every or max(1, min(len(pairs) // B, math.ceil(total / 5)))
    save_every = cfg.save_every or eval_every
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this process's share
    workers = cfg.workers if cfg.workers >= 0 else max(1, min(8, cores)) if device.type == "cuda" else 1

    # 3. model and optimizer; a run that was interrupted goes on
    say(f"\n== {act}: {cfg.model} on {cfg.data}, {device.type} x {world_size}")
    clip = build(cfg, device)
    optimizer = build_optimizer(cfg, clip)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision(device) == torch.float16)
    checkpoints = Checkpoints(cfg, len(pairs))
    step, history, chunk = checkpoints.load(clip, optimizer, scaler)
    checkpoint.check_same_step(step, device)
    teacher = model.load(cfg.teacher, device)[0].requires_grad_(False) if cfg.teacher else None
    features = None
    if cfg.cache_features:
        features = open_features(cfg.out, clip, pairs, cfg.cache_features, cfg.seed, cfg.augment, workers)
    towers = clip

    def forward(pictures, ids):  # a chunk is on the device while it is looked at, the batch never is
        with model.autocast(device):
            return towers(on_device(pictures, device), ids)

    size, share, small = clip.config.visual.resolution, B // world_size, False
    like_pictures = (clip.config.embed_dim,) if features is not None else (3, size, size)
    chunk = cfg.chunk_size or chunk
    if not chunk:
        set_train_mode(clip, cfg.freeze_image)
        ids = torch.ones(4, cfg.context_length, dtype=torch.long)  # the longest captions there are
        chunk = fitting_chunk(forward, clip, torch.zeros(4, *like_pictures, device=device), ids, share)
        small = chunk < min(share, 64)
    chunk = balanced(min(chunk, share), share)
    chunks = math.ceil(share / chunk)
    if cfg.compile:
        clip.visual.compile()
        clip.bert.encoder.compile()
    if cfg.compile and chunks > 1:
        set_train_mode(clip, cfg.freeze_image)
        ids = torch.ones(chunk, cfg.context_length, dtype=torch.long)
        distance = replay_distance(forward, clip, torch.zeros(chunk, *like_pictures), ids)
        if not distance < SAME_DROPOUT:
            raise ConfigError(f"--compile: the two passes of a chunk draw other dropout here (their features "
                              f"are {distance:.2f} apart), so its gradient would be wrong; leave it out")
    if world_size > 1:
        with warnings.catch_warnings():  # torch 2.13 has a new name for this flag, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            # BatchNorm's statistics are averaged below; broadcast, they would be those of rank 0 alone
            towers = torch.nn.parallel.DistributedDataParallel(clip, broadcast_buffers=False)
    stream = data.Stream(pairs, cfg.seed, size, cfg.augment, features)

    # 4. what was derived
    decayed, free = (sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    say(f"   {sum(p.numel() for p in clip.parameters()):,} parameters, "
        f"{decayed + free:,} train, {free:,} without decay")
    say(f"   {len(pairs):,} training pairs; "
        f"validation: {valid.image_count:,} images, {len(valid.texts):,} texts")
    say(f"   batch {B:,} = {world_size} x {share:,}"
        + (f" in {chunks} chunks of {chunk:,}" if chunks > 1 else "")
        + f"; {total:,} steps, {total * B:,} pairs, {total * B / len(pairs):.2f} epochs; from step {step:,}")
    if small:
        say(f"   only {chunk} pairs fit into the memory that is free, and many small chunks are slow: does "
            "another program hold memory? --chunk-size N tries more")
    if B > len(pairs):
        say(f"   a batch is larger than the set: every pair stands in it {B // len(pairs):,} times or once "
            "more; --targets multi tells them from negatives, a smaller --batch-size needs less time")
    if chunks > 1 and not cfg.freeze_image and isinstance(clip.visual, model.ModifiedResNet):
        say("   each chunk is normalised by itself (BatchNorm): another --chunk-size is another result")
    say(f"   peak lr {cfg.peak_lr:.2e}; the recipe's is {cfg.recipe_lr:.2e} from batch {cfg.lr_batch:,} on")
    starts_from = cfg.init or cfg.image_init or cfg.text_init  # something that a rate can destroy
    if starts_from and cfg.peak_lr > 4 * cfg.recipe_lr * min(1, B / cfg.lr_batch):
        say("   that is more than four times the recipe's rate for this batch: watch recall from step 0 on")
    warmup = warmup_steps(cfg, total)
    say(f"   warm-up {warmup:,} steps"
        + (f", a tenth of the run; {cfg.warmup:,} would be over half" if warmup != cfg.warmup else ""))
    shared, floor = data.repeats(stream, B, max(1, min(8, 8192 // B))) if rank == 0 else (0, 0)
    say(f"   loss by chance ln {B:,} = {math.log(B):.2f}; {shared:.1%} of a batch share picture or caption "
        + (f"with another and keep the loss above {floor:.3f}: --targets multi"
           if floor > 0.01 and cfg.targets == "one-hot" else "with another"))

    # 5. the loop
    loss_of_batch = contrastive_loss if share * B <= DENSE_LIMIT else tiled_loss
    log = checkpoint.open_log(cfg, step, history) if rank == 0 else None
    steps = range(step, total)
    skipped, clock, timed = {}, time.perf_counter(), step
    save, stop = not history, False
    with Requests(cfg.save_minutes) as requests:
        loader = iter(data.batches(stream, B, steps, cfg.context_length, workers, rank, world_size, chunk))
        while True:
            # once in a while: measure, keep the best, save
            due = step == total or step % eval_every == 0
            measured = bool(history) and history[-1]["step"] == step  # by the run that was interrupted here
            if due and not measured and not stop:
                result = retrieval(clip.eval(), valid, cfg.context_length)  # each rank a share
                history.append({"step": step, "samples": step * B} | result)
                best = max(history, key=lambda entry: entry["mean_recall"]) is history[-1]
                say(measured_line(history[-1], best))
                if rank == 0:
                    print(json.dumps(history[-1]), file=log, flush=True)
                    if best:
                        model.save(clip, os.path.join(cfg.out, "best.safetensors"))
                clock, timed = time.perf_counter(), step
                save, stop = True, requests.agreed()[1]  # a measurement may have taken minutes
            if save:
                checkpoints.save(clip, optimizer, scaler, step, history, chunk)
                requests.saved = time.monotonic()
            if stop:
                checkpoints.finish()
                raise Stopped(f"stopped at step {step:,} of {total:,}; the same command goes on from there")
            if step == total:
                break

            # the step
            batch = [next(loader) for _ in range(chunks)]
            keys = None
            if cfg.targets == "multi":
                keys = torch.cat([part.keys for part in batch]).to(device, non_blocking=True)
            parts = [(part.pictures, part.ids) for part in batch]
            taught = None if teacher is None else teach(teacher, parts, device)
            set_train_mode(clip, cfg.freeze_image)
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, cfg, total)

            def seed_chunk(k: int):  # dropout depends on these and nothing else
                torch.manual_seed(zlib.crc32(f"{cfg.seed} {step} {rank * chunks + k}".encode()))

            def loss_of(image_features, text_features, logit_scale):
                loss = loss_of_batch(image_features, text_features, logit_scale, keys)
                if taught is None:
                    return loss
                return loss + cfg.distill * distillation_loss(
                    image_features, text_features, logit_scale, taught)

            optimizer.zero_grad(set_to_none=True)
            loss, image_features, text_features = backward_in_chunks(
                forward, towers, parts, seed_chunk, loss_of, scaler.scale)
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))  # paper, table 8: maximum temperature 100
            average_statistics(clip)
            step += 1

            # say how it goes; before anything is saved, so that no checkpoint has weights that are not finite
            for problem in (problem for part in batch for problem in part.problems):
                if problem not in skipped:  # named once, however many epochs meet it
                    print(f"   rank {rank} skips a pair, its number {len(skipped) + 1}: {problem}",
                          file=sys.stderr, flush=True)
                skipped[problem] = skipped.get(problem, 0) + 1
            checkpoints.check_writer()
            save, stop = requests.agreed()
            scheduled = step == total or step % save_every == 0 or step % eval_every == 0
            save = save or scheduled
            if save or step % cfg.log_every == 0:
                loss = mean_over_ranks(loss)
                advice = (f"try a lower --lr than {cfg.peak_lr:.1e} in another --out, perhaps "
                          f"from --init {os.path.join(cfg.out, 'best.safetensors')}")
                if not math.isfinite(loss.item()):
                    raise DataError(f"the loss is {loss.item()} at step {step}; {advice}")
            if save:
                checkpoint.check_weights(clip, *parts[0], advice)
            if scheduled or step % cfg.log_every == 0:
                accuracies = in_batch_accuracy(image_features, text_features)
                rate = (step - timed) * B / max(time.perf_counter() - clock, 1e-9)
                scale, lr = clip.logit_scale.exp().item(), get_lr(step - 1, cfg, total)
                say(step_line(step, total, loss.item(), B, accuracies, scale, lr, rate))
                if rank == 0:
                    i2t, t2i = accuracies
                    entry = {"step": step, "loss": loss.item(), "in_batch_i2t": i2t, "in_batch_t2i": t2i,
                             "logit_scale": scale, "lr": lr, "pairs_per_second": rate}
                    print(json.dumps(entry), file=log, flush=True)
    if skipped:
        print(f"   rank {rank} met {len(skipped)} broken pairs {sum(skipped.values())} times",
              file=sys.stderr, flush=True)
    if history[0]["mean_recall"] == max(entry["mean_recall"] for entry in history) and total:
        say("   never better than at step 0: best.safetensors is the start itself; lower --lr, or more pairs")
    checkpoints.finish()
    if rank == 0:
        log.close()
        model.save(clip, os.path.join(cfg.out, "last.safetensors"))
    return history


def average_statistics(clip: model.ChineseCLIP):
    """BatchNorm's running statistics, where they move, are those of each process's own pairs: after a step
    they become the mean over processes, so that what is measured and saved is the same everywhere."""
    moving = [buffer for buffer in clip.visual.buffers() if buffer.is_floating_point()]
    if moving and clip.visual.training:
        mean = mean_over_ranks(torch.cat([buffer.flatten() for buffer in moving]))  # one message for all
        for buffer, part in zip(moving, mean.split([buffer.numel() for buffer in moving])):
            buffer.copy_(part.view_as(buffer))


def measured_line(entry: dict, best: bool) -> str:
    t2i, i2t = entry["text_to_image"]["R@1"], entry["image_to_text"]["R@1"]
    return (f"   step {entry['step']:>6,}  validation: mean recall {entry['mean_recall']:.1f}, "
            f"R@1 text to image {t2i:.1f}, image to text {i2t:.1f}{', the best so far' if best else ''}")


def step_line(step, total, loss, B, accuracies, scale, lr, rate) -> str:
    """One readable line: the loss beside what guessing gives, in-batch accuracies, temperature, rate, time
    left."""
    i2t, t2i = accuracies
    return (f"   step {step:>6,}/{total:,}  loss {loss:.3f} (chance {math.log(B):.2f})  "
            f"in batch i2t {i2t:.0%} t2i {t2i:.0%}  scale {scale:.1f}  lr {lr:.1e}  "
            f"{rate:,.0f} pairs/s  {(total - step) * B / rate:,.0f} s left")


# ------------------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str] | None = None):
    start = time.perf_counter()
    rank = int(os.environ.get("RANK", 0))
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):  # one voice for all processes
        acts = parse(argv)
        try:
            histories = {act: train(act, cfg) for act, cfg in acts.items()}
        except (Stopped, ConfigError, DataError):
            leave_processes()
            raise
        leave_processes()  # what follows is rank 0's alone
        if rank == 0:
            report.finish(histories, acts)
            print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, or a scheduler; train() has an answer of its own
        signal.signal(number, checkpoint.leave)
    try:
        main()
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(stopped)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (DataError, read.WeightsError) as error:
        # a loader process sends its traceback along; the message proper is its last line
        message = str(error).strip().split("\n")[-1]
        sys.exit("error: " + re.sub(r"^sources\.pairs\.(DataError|SourceChanged): ", "", message))
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory ({str(error).splitlines()[0][:120]}); "
                 "repeat the command with a smaller --chunk-size, or with --grad-checkpointing")
    except RuntimeError as error:
        if not lost_process(error):
            raise
        sys.exit("error: another process is gone, see its message; "
                 "the same command goes on from the last checkpoint")
    except OSError as error:
        sys.exit(f"error: {error}; what was saved before is whole, and the same command goes on from there")
    except KeyboardInterrupt:
        checkpoint.leave()
