"""
Checkpoints: everything that a run needs to continue bit for bit after a kill, a crash or a stop.

    checkpoint.pt             the newest
    checkpoint.previous.pt    the one before it, in case the newest cannot be read

Order, augmentation and dropout are functions of (seed, step, rank), so the number of the step stands for the
place in the data and for the state of all random numbers. A checkpoint is written on schedule, after
--save-minutes, and when SIGTERM (from a scheduler) or Ctrl-C asks the run to stop.
"""

import dataclasses
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

import data
import model
from common import rank, replace, sum_over_ranks, wait_for_all, world_size
from sources.pairs import DataError, Pairs
from training.chunks import Chunk, balanced
from training.lora import split
from training.processes import SIGNALS
from training.recipes import Config, ConfigError, as_flag
from weights.read import WeightsError, digest

NAMES = ("checkpoint.pt", "checkpoint.previous.pt")
FREE = ("out", "device", "workers", "log_every", "save_minutes")  # the result does not depend on these
# It does on these, but the run may go on.
INEXACT = ("chunk_size", "grad_checkpointing", "compile", "precision", "computes", "world_size")


class Stopped(Exception):
    """The run was asked to stop, and has saved where it is."""


def paths(folder: str) -> list[str]:
    """The checkpoints in a run's folder, newest first."""
    return [path for name in NAMES if os.path.isfile(path := os.path.join(folder, name))]


class Checkpoints:
    """The two newest checkpoints of a run on these pairs. Used with `with`, it also takes the signals that
    ask the run to stop. A signal is answered after the step in which it comes; a second one, five seconds
    later or more, interrupts at once."""

    def __init__(self, cfg: Config, pairs: Pairs, valid: Pairs):
        self.cfg = cfg
        self.setting = {"pairs": len(pairs), "world_size": world_size(),
                        "captions": [each.caption_fingerprint() for each in (pairs, valid)]}
        os.makedirs(cfg.out, exist_ok=True)
        self.newest, self.previous = (os.path.join(cfg.out, name) for name in NAMES)
        self.newest_is_good = False  # if so, it becomes the previous one when another is written
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.saved, self.signalled, self.number = time.monotonic(), 0.0, 0

    def load(self, clip, optimizer, scaler) -> tuple[int, list[dict], int]:
        """-> (step, history, chunk size) to continue from; (0, [], 0) for a new run. If the newest checkpoint
        cannot be used, the previous one is; WeightsError if neither can. ConfigError if it belongs to another
        command or to other pairs, or if the ranks see different ones."""
        found, unusable = (0, [], 0), None
        self.setting["computes"] = str(clip.precision)
        if self.cfg.lora:  # the frozen weights come from --init again; they have to be the same
            self.setting["frozen"] = digest(split(clip)[1])
        for path in paths(self.cfg.out):
            try:
                saved = read(path)
            except WeightsError as error:
                unusable = unusable or error
                continue
            if unusable:
                print(f"   {unusable}; going on from {path}, step {saved['step']:,}")
            self.check_command(saved, path)
            self.newest_is_good = path == self.newest
            clip.load_state_dict(saved["model"], strict=not self.cfg.lora)
            optimizer.load_state_dict(saved["optimizer"])
            own_layout(optimizer)
            if saved["scaler"]:  # empty where no scaler was needed
                scaler.load_state_dict(saved["scaler"])
            found = saved["step"], saved["history"], saved["flags"]["chunk_size"]
            break
        else:
            if unusable:
                raise WeightsError(f"{unusable}; delete it to start anew")
        wait_for_all()  # one node may have had an index to build, or a model to fetch
        steps = [found[0]] * world_size()
        if world_size() > 1:
            dist.all_gather_object(steps, found[0])
        if len(set(steps)) > 1:  # they would train on different data, and hang
            raise ConfigError("--out: the processes see different checkpoints; all nodes must share it")
        return found

    def check_command(self, saved: dict, path: str):
        """ConfigError if the checkpoint was made by another command or on other data. Prints what prevents
        the run from continuing bit for bit."""
        defaults = {flag.name: flag.default for flag in dataclasses.fields(Config)}  # for flags that are new
        before, now = defaults | saved | saved["flags"], dataclasses.asdict(self.cfg) | self.setting
        share, size = max(1, self.cfg.batch_size // saved["world_size"]), self.cfg.chunk_size
        if size == 0 or before["chunk_size"] == balanced(min(size, share), share):
            now["chunk_size"] = before["chunk_size"]  # 0 would go by the memory that is free today
        for name, value in now.items():
            if name in FREE or before.get(name, value) == value:  # a captions' fingerprint is new
                continue
            what = {"pairs": "{} training pairs", "world_size": "{} processes", "computes": "towers in {}"}
            said = what.get(name, as_flag(name) + " {!r}").format
            made = f"{path} was made with {said(before[name])}, this command has {said(value)}"
            if other := {"captions": "captions in --data", "frozen": "weights to start from"}.get(name):
                made = f"{path} was made with other {other} than there are now"
            if name not in INEXACT:
                raise ConfigError(f"{made}; to go on, repeat the first command on the same pairs; to start "
                                  "anew, name another --out")
            print(f"   {made}: goes on, but not bit for bit")

    def save(self, clip, optimizer, scaler, step: int, history: list[dict], chunk_size: int):
        """Save everything that the rest of the run depends on. Rank 0 copies it into the host's memory, and a
        thread writes it while the run goes on. OSError if the checkpoint before could not be written."""
        self.saved = time.monotonic()
        if rank() != 0:
            return
        self.finish()
        self.writing = self.writer.submit(self.write, on_host({
            "model": split(clip)[0] if self.cfg.lora else clip.state_dict(),
            "config": json.dumps(dataclasses.asdict(clip.config)),
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "step": step, "samples_seen": step * self.cfg.batch_size, "history": history,
            "flags": dataclasses.asdict(self.cfg) | {"chunk_size": chunk_size},  # the same after a restart
        } | self.setting))

    def write(self, state: dict):
        def write_to(temporary: str):
            torch.save(state, temporary)
            if self.newest_is_good:
                os.replace(self.newest, self.previous)
        replace(self.newest, write_to)
        self.newest_is_good = True

    def finish(self):
        """Wait until what was saved is on the disk. OSError if it could not be written."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.take) for number in SIGNALS}
        return self

    def __exit__(self, error, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error in (None, Stopped):
            self.finish()
        if self.signalled and error is None:  # too late for this run: whoever handled signals before does so
            signal.raise_signal(self.number)

    def take(self, number: int, frame):
        # torchrun passes on what it was sent, so that a process may get the same signal twice
        if self.signalled and time.monotonic() > self.signalled + 5:
            raise KeyboardInterrupt
        if not self.signalled and rank() == 0:
            os.write(1, b"   stopping after this step or measurement\n")  # print may be what was interrupted
        self.signalled, self.number = self.signalled or time.monotonic(), number

    def asked(self, scheduled: bool = False) -> tuple[bool, bool]:
        """-> (save now?, and then stop?), the same on every rank: what one is asked, all do. What is
        scheduled is saved in any case. OSError if the checkpoint before could not be written."""
        if self.writing and self.writing.done():
            self.finish()
        late = time.monotonic() > self.saved + 60 * self.cfg.save_minutes
        asked = torch.tensor([late or scheduled, bool(self.signalled)]).int()
        if world_size() > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        save, stop = map(bool, asked.tolist())
        return save or stop, stop


def read(path: str) -> dict:
    """A checkpoint. Its tensors are mapped from the file, so that the processes of a machine share one copy.
    WeightsError if it cannot be used."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found = {key: saved[key] for key in (
            "model", "optimizer", "scaler", "step", "history", "flags", "world_size", "pairs")}
        newer = "captions", "frozen", "computes"  # those of before have none
        found |= {key: saved[key] for key in newer if key in saved}
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise WeightsError(f"{path}: not a checkpoint of ours ({type(error).__name__})") from None
    for name, tensor in found["model"].items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite")
    return found


def on_host(value):
    """The same dictionaries and lists, with copies of their tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_host(item) for item in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def own_layout(optimizer: torch.optim.Optimizer):
    """Copy the optimizer's state out of the mapped file, and every moment into its parameter's memory layout:
    the fused AdamW goes by memory, not by strides, and a ResNet is channels_last on a GPU alone."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            state[name] = value.clone() if name == "step" else torch.empty_like(p).copy_(value)


@torch.no_grad()
def check_finite(cfg: Config, step: int, loss: float, clip: model.ChineseCLIP, chunk: Chunk):
    """DataError, on all ranks, if the loss is not finite, or if the weights are not, or have grown so large
    that a feature of these pairs has no direction. Such weights would end every run that starts from them."""
    device = clip.logit_scale.device
    with torch.compiler.set_stance("force_eager"), model.autocast(clip):
        features = clip.eval()(data.on_device(chunk.pictures[:4], device), chunk.ids[:4])[:2]
    fine = all(((x.norm(dim=1) - 1).abs() < 0.1).all() for x in features)
    fine = fine and all(x.isfinite().all() for x in clip.state_dict().values())
    broken = sum_over_ranks(torch.tensor(0.0 if fine else 1.0, device=device))
    if broken or not math.isfinite(loss):
        what = ("the weights are not finite or too large to give features" if math.isfinite(loss) else
                f"the loss is {loss} at step {step}")
        raise DataError(f"{what}; try a lower --lr than {cfg.peak_lr:.1e} in another --out, "
                        f"perhaps from --init {os.path.join(cfg.out, 'best.safetensors')}")


def leave_on_signals():
    """Outside of the loop Ctrl-C and SIGTERM end the process at once, as a kill would, which harms nothing
    that was saved. (Python may drop an exception of a handler, for example during a fork.)"""
    def leave(number: int, frame):
        if int(os.environ.get("RANK", 0)) == 0:
            os.write(1, b"stopped; the same command goes on from the last checkpoint\n")
        os._exit(0)

    for number in SIGNALS:
        signal.signal(number, leave)
