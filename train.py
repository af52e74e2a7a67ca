r"""
The two-stage recipe of Chinese CLIP (Yang et al., 2022, sec. 2.3): build a model, then repeat steps. The same
file runs on one CPU, one GPU or many (no GPU has run it yet).

    python train.py                                                    # a laptop: the demo, in minutes
    python train.py --recipe muge --init ViT-B-16 --data path/to/MUGE  # one GPU: fine-tune the released model
    torchrun --nproc-per-node 8 train.py --recipe pretrain --image-init openai-ViT-B-16 \
        --text-init chinese-roberta-wwm-ext --data path/to/pairs       # eight GPUs: both stages

Stage 1 freezes the image tower and teaches the text tower to read it ("locked-image tuning", Zhai et al.,
2022). Stage 2 trains both towers. Each stage is an act: one call of `train`, with its own flags and its own
folder. A recipe (training/recipes.py) is a list of acts with the paper's numbers for their flags.

An act leaves best.safetensors (of the best mean recall), last.safetensors, log.jsonl and checkpoint.pt. After
a crash, a kill or a stop the same command goes on, on a CPU bit for bit (with as many processes).
"""

import contextlib
import gc
import math
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its threads wait without using a core

import torch

import data
import model
from common import join_processes, leave_processes, mean_over_ranks, one_line_errors, rank, world_size
from eval import retrieval
from loss import contrastive_loss
from sources.layouts import open_pairs
from training import checkpoint, report
from training.cache import cached_stream
from training.checkpoint import Checkpoints, Stopped, check_finite
from training.chunks import (
    Chunk, backward_in_chunks, choose_chunks, compile_towers, features_in_chunks, make_chunks)
from training.compare import at_best_rate
from training.distill import distillation_loss, load_teacher, teacher_features
from training.lora import add_lora
from training.processes import average_batchnorm, distribute, start_workers
from training.recipes import (
    Config, choose_precision, loader_processes, parse, resolve_start, schedule, warmup_steps)
from training.tiles import DENSE_LIMIT, tiled_loss
from weights.start import initialise

# ------------------------------------------------------------------------------------------------------------
# parts of the recipe


def get_lr(step: int, cfg: Config, total: int) -> float:
    """Linear warm-up, then a cosine from the peak to 0 (paper, table 8)."""
    warmup = warmup_steps(cfg, total)
    if step < warmup:
        return cfg.peak_lr * (step + 1) / warmup
    return cfg.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def param_groups(clip: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices; none for gains, biases, class embedding and temperature, which have fewer
    than two dimensions. The official code goes by name, misses BERT's LayerNorm, and so decays 25 of the 51
    gains of ViT-B-16."""
    trained = [p for p in clip.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]


def set_train_mode(clip: model.ChineseCLIP):
    """Training mode. What is frozen in the image tower stays in eval mode, or BatchNorm would make features
    depend on the other pictures of the batch and move its statistics (paper, app. A.2)."""
    clip.train()
    for part in clip.visual.modules():
        part.train(any(p.requires_grad for p in part.parameters()))


def build(cfg: Config, device: torch.device) -> model.ChineseCLIP:
    """The model of an act: random weights, or both towers from --init, or one tower from --image-init and the
    other from --text-init. --freeze-image freezes the image tower."""
    torch.manual_seed(cfg.seed)
    clip = model.ChineseCLIP(model.MODELS[cfg.model])
    if cfg.lora or not checkpoint.paths(cfg.out):  # else a checkpoint will replace all weights
        starts = cfg.image_init, cfg.text_init, cfg.init  # files, names, or "@stage1", an earlier act
        initialise(clip, model.MODELS, *(resolve_start(start, cfg.out) for start in starts))
    clip.visual.requires_grad_(not cfg.freeze_image)
    clip.visual.patch_drop = cfg.patch_drop
    clip.set_grad_checkpointing(cfg.grad_checkpointing)
    add_lora(clip, cfg)  # with --lora
    clip.to(device)
    clip.precision = choose_precision(cfg, device)
    if device.type == "cuda":
        if isinstance(clip.visual, model.ModifiedResNet):
            clip.visual.to(memory_format=torch.channels_last)  # the layout in which its convolutions are fast
        # TF32, a faster float32 with fewer digits, is for the loss, which runs outside of autocast. It moves
        # the gradient by 5e-4 (imitated on a CPU, batch 4,096), where bfloat16 features move it by 4e-3.
        torch.set_float32_matmul_precision("high")
    return clip


def build_optimizer(cfg: Config, clip: model.ChineseCLIP) -> torch.optim.Optimizer:
    """AdamW with the numbers of table 8, which differ between ResNet and ViT."""
    beta2, eps = (0.999, 1e-8) if isinstance(clip.visual, model.ModifiedResNet) else (0.98, 1e-6)
    groups = param_groups(clip, cfg.weight_decay)
    return torch.optim.AdamW(groups, betas=(0.9, cfg.beta2 or beta2), eps=cfg.eps or eps, fused=True)


# ------------------------------------------------------------------------------------------------------------
# an act


def train(act: str, cfg: Config) -> list[dict]:
    """Run one act to its end, from the start or from its checkpoint. Returns its history, the same on every
    rank: a list of {"step", "samples", "text_to_image", "image_to_text", "mean_recall"}."""
    # 1. device and data
    gc.collect()  # or the memory of an earlier act's model would seem to be in use
    device = join_processes(cfg.device)
    pairs, valid = open_pairs(cfg.data, "train"), open_pairs(cfg.valid_data or cfg.data, cfg.valid_split)
    total, eval_every, save_every = schedule(cfg, len(pairs))
    print(f"\n== {act}: {cfg.model} on {cfg.data}, {device.type} x {world_size()}", flush=True)

    # 2. model and optimizer
    clip = build(cfg, device)
    optimizer = build_optimizer(cfg, clip)
    # a scaler keeps small gradients from vanishing in float16; in other precisions it does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=clip.precision == torch.float16)
    checkpoints = Checkpoints(cfg, pairs, valid)
    step, history, chunk_size = checkpoints.load(clip, optimizer, scaler)
    teacher = load_teacher(cfg.teacher, clip) if cfg.teacher else None
    stream = (cached_stream(cfg, clip, pairs) if cfg.cache_features else
              data.Stream(pairs, cfg.seed, clip.config.visual.resolution, cfg.augment))

    # 3. every process takes its share of a batch, in chunks if the share does not fit into memory
    set_train_mode(clip)
    chunk_size, chunk_count = choose_chunks(cfg, clip, chunk_size)
    compile_towers(cfg, clip, chunk_size)  # with --compile
    towers = distribute(clip)
    in_tiles = cfg.batch_size**2 / world_size() > DENSE_LIMIT  # are the logits [b, B] too many to hold?
    report.print_settings(cfg, clip, stream, valid, total, step, chunk_size)

    def forward(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(chunk.seed)  # so that a second pass over this chunk draws the same dropout
        with model.autocast(clip):
            return towers(data.on_device(chunk.pictures, device), chunk.ids)

    # 4. the loop
    log = report.Log(cfg, total, step, history)
    save = stop = False  # set after a step or a measurement, acted on before the next step
    with checkpoints:
        loader = start_workers(data.batches(
            stream, cfg.batch_size, range(step, total), cfg.context_length, loader_processes(cfg, device),
            rank(), world_size(), chunk_size))
        while True:
            # now and then: measure recall, save a checkpoint
            measured = bool(history) and history[-1]["step"] == step  # by the run that is continued here
            if (step == total or step % eval_every == 0) and not measured and not stop:
                recall = retrieval(clip.eval(), valid, cfg.context_length)
                history.append({"step": step, "samples": step * cfg.batch_size} | recall)
                log.measurement(history, clip)  # keeps the weights, if they are the best so far
                save, stop = checkpoints.asked(scheduled=True)  # a signal may have come meanwhile
            if save:
                checkpoints.save(clip, optimizer, scaler, step, history, chunk_size)
            if stop:
                raise Stopped(f"stopped at step {step:,} of {total:,}; the same command goes on from there")
            if step == total:
                break

            # one step: learning rate, batch, features, loss, gradients, update
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, cfg, total)
            parts = [next(loader) for _ in range(chunk_count)]
            chunks = make_chunks(parts, cfg.seed, step)
            keys = torch.cat([part.keys for part in parts]).to(device) if cfg.targets == "multi" else None
            set_train_mode(clip)
            optimizer.zero_grad(set_to_none=True)
            # [b, E], [b, E] and exp(logit_scale); of several chunks they are leaves, cut off from the towers
            features = forward(chunks[0]) if chunk_count == 1 else features_in_chunks(forward, towers, chunks)
            loss = tiled_loss(*features, keys) if in_tiles else contrastive_loss(*features, keys)
            if teacher:
                loss = loss + cfg.distill * distillation_loss(*features, teacher_features(teacher, chunks))
            scaler.scale(loss).backward()
            if chunk_count > 1:  # that backward pass ended at the features; this one goes on into the towers
                backward_in_chunks(forward, towers, chunks, features)
            scaler.step(optimizer)
            scaler.update()
            clip.logit_scale.data.clamp_(0, math.log(100))  # exp(logit_scale) is at most 100 (table 8)
            average_batchnorm(clip)
            step += 1

            # log lines, and before anything is saved a check that all is finite
            log.skipped(parts)
            scheduled = step == total or step % save_every == 0 or step % eval_every == 0
            save, stop = checkpoints.asked(scheduled)  # save is True if scheduled is
            if save or step % cfg.log_every == 0:
                mean_loss = mean_over_ranks(loss.detach()).item()
                check_finite(cfg, step, mean_loss, clip, chunks[0])
            if scheduled or step % cfg.log_every == 0:
                log.step(step, mean_loss, features, clip, optimizer)
    log.end(history, clip)
    return history


# ------------------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str] | None = None):
    first = int(os.environ.get("RANK", 0)) == 0
    with contextlib.redirect_stdout(sys.stdout if first else None):  # only rank 0 prints
        acts = parse(argv)
        try:
            histories = {}
            for act, cfg in acts.items():
                histories[act] = train(act, at_best_rate(act, cfg, histories))
        except Stopped as stopped:
            print(stopped)
            return leave_processes()
        leave_processes()  # the rest is rank 0's alone
        if first:
            report.finish(histories, acts)


if __name__ == "__main__":
    checkpoint.leave_on_signals()
    with one_line_errors(then="; the same command goes on from the last checkpoint",
                         out_of_memory="repeat it with a smaller --chunk-size, or with --grad-checkpointing"):
        main()
