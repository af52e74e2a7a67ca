"""
Checkpoints: what a run needs to go on bit for bit after a kill, a crash or a stop, and when they are written.

    checkpoint.pt             the newest
    checkpoint.previous.pt    the one before it, for the case that the newest cannot be read

Order, augmentation and dropout are functions of (seed, step, rank), so the step is the position in the data
and the state of all random numbers. Weights that are not finite are never written: they would end every run
after it.
"""

import dataclasses
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

import data
import model
from common import replace, replace_text
from weights.read import WeightsError
from training.chunks import balanced
from common import rank, sum_over_ranks, wait_for_all, world_size
from sources.pairs import DataError
from training.recipes import Config, ConfigError

FREE_FLAGS = ("out", "device", "workers", "log_every", "save_minutes")  # which the result does not depend on


class Stopped(Exception):
    """The run was asked to stop, and has saved where it is."""


def paths(folder: str) -> list[str]:
    """The checkpoints that a run may go on from, newest first."""
    both = (os.path.join(folder, name) for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    return [path for path in both if os.path.isfile(path)]


class Checkpoints:
    """The two newest checkpoints of a run of `pairs` training pairs, in its folder."""

    def __init__(self, cfg: Config, pairs: int):
        self.cfg, self.pairs = cfg, pairs
        self.newest, self.previous = (os.path.join(cfg.out, name)
                                      for name in ("checkpoint.pt", "checkpoint.previous.pt"))
        self.usable = False  # whether the newest is worth keeping when another one comes
        self.writer, self.writing = ThreadPoolExecutor(1), None

    def load(self, clip, optimizer, scaler) -> tuple[int, list[dict], int]:
        """-> (step, history, pairs a chunk) to go on from; (0, [], 0) if this run is new. A newest checkpoint
        that cannot be used is passed over for the previous one. WeightsError if there is none but such;
        ConfigError if it belongs to another command, or to another number of training pairs."""
        unusable = None
        for path in paths(self.cfg.out):
            try:
                saved = read(path)
            except WeightsError as error:
                unusable = unusable or error
                continue
            if unusable:
                print(f"   {unusable}; going on from {path}, step {saved['step']:,}")
            self.check(saved, path)
            self.usable = path == self.newest
            clip.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            own_layout(optimizer)
            if saved["scaler"]:  # empty where no scaler was needed
                scaler.load_state_dict(saved["scaler"])
            return saved["step"], saved["history"], saved["flags"]["chunk_size"]
        if unusable:
            raise WeightsError(f"{unusable}; delete it to start anew")
        return 0, [], 0

    def check(self, saved: dict, path: str):
        """ConfigError if the checkpoint is of another command or of other data. Says what keeps the run from
        going on bit for bit."""
        for f in dataclasses.fields(self.cfg):
            before, now = saved["flags"].get(f.name, f.default), getattr(self.cfg, f.name)
            if f.name in FREE_FLAGS or before == now:
                continue
            share = self.cfg.batch_size // saved["world_size"]
            if f.name == "chunk_size" and (now == 0 or before == balanced(min(now, share), share)):
                continue  # 0 would go by the memory that is free today
            flag = f"--{f.name.replace('_', '-')}"
            if f.name not in ("chunk_size", "grad_checkpointing", "compile"):
                raise ConfigError(
                    f"{path} was made with {flag} {before}, this command says {now}; "
                    "repeat the first command to go on, or name another --out to start anew")
            print(f"   {path} was made with {flag} {before}: goes on, but not bit for bit")
        if saved.get("pairs", self.pairs) != self.pairs:
            raise ConfigError(
                f"{path} was made on {saved['pairs']:,} training pairs, {self.cfg.data} has {self.pairs:,} "
                "now, in another order; put the data back, or name another --out to start anew")
        if saved["world_size"] != world_size():
            print(f"   {path} was made by {saved['world_size']} processes: goes on, but not bit for bit")

    def save(self, clip, optimizer, scaler, step: int, history: list[dict], chunk: int):
        """Everything that the rest of the run depends on, from rank 0. The run goes on as soon as a copy is
        in the host's memory; a thread writes it. OSError if the one before could not be written."""
        if rank() != 0:
            return
        self.finish()
        self.writing = self.writer.submit(self.write, on_host({
            "model": clip.state_dict(),
            "config": json.dumps(dataclasses.asdict(clip.config)),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "step": step,
            "samples_seen": step * self.cfg.batch_size,
            "history": history,
            "flags": dataclasses.asdict(self.cfg) | {"chunk_size": chunk},  # the same after a restart
            "world_size": world_size(),
            "pairs": self.pairs,
        }))

    def write(self, state: dict):
        def write_to(temporary: str):
            torch.save(state, temporary)
            if self.usable:
                os.replace(self.newest, self.previous)
        replace(self.newest, write_to)
        self.usable = True

    def check_writer(self):
        """OSError as soon as it is known that what was saved could not be written."""
        if self.writing and self.writing.done():
            self.finish()

    def finish(self):
        """Wait until what was saved is on the disk. OSError if it could not be written."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()


def read(path: str) -> dict:
    """A checkpoint, its tensors mapped from the file: the processes of a machine share one copy. WeightsError
    if it cannot be used."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found = saved["model"], saved["flags"], saved["world_size"], saved["step"], saved["optimizer"]
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise WeightsError(f"{path}: not a checkpoint of ours ({type(error).__name__})") from None
    moments = {f"the optimizer's {name}": value for state in found[4]["state"].values()
               for name, value in state.items()}
    for name, tensor in (found[0] | moments).items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite")
    return saved


def on_host(value):
    """The same dictionaries and lists, with copies of their tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_host(item) for item in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def own_layout(optimizer: torch.optim.Optimizer):
    """Copies the optimizer's state out of the file that it is mapped from, moments into the memory layout of
    their parameters: the fused AdamW goes by memory, not by strides, and a ResNet's parameters are
    channels_last on a GPU alone."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            state[name] = value.clone() if name == "step" else torch.empty_like(p).copy_(value)


@torch.no_grad()
def check_weights(clip: model.ChineseCLIP, pictures: torch.Tensor, ids: torch.Tensor, advice: str):
    """DataError, on all ranks, if weights are not finite or have grown so large that a feature has no
    direction. Looks at a few of the pairs that were trained on."""
    device = clip.logit_scale.device
    with torch.compiler.set_stance("force_eager"), model.autocast(device):
        features = clip.eval()(data.on_device(pictures[:4], device), ids[:4])[:2]
    fine = all(((x.norm(dim=1) - 1).abs() < 0.1).all() for x in features)
    fine = fine and all(x.isfinite().all() for x in clip.state_dict().values())
    if sum_over_ranks(torch.tensor(0.0 if fine else 1.0, device=device)):
        raise DataError(f"the weights are not finite or too large to give features; {advice}")


def leave(number: int = 0, frame=None):
    """Answer to a signal outside of the loop: the process ends at once, as by a kill, which harms nothing
    that was saved. An exception instead could come up where Python drops it, such as in a fork."""
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(1, b"stopped; the same command goes on from the last checkpoint\n")
    os._exit(0)


class Requests:
    """What asks for a checkpoint between the scheduled ones: the clock, and SIGTERM (from a scheduler) or
    SIGINT (Ctrl-C), after which the run ends. A signal is answered after the step in which it comes; a second
    one, five seconds later or more, interrupts at once."""

    def __init__(self, minutes: float):
        self.seconds, self.saved, self.signalled = 60 * minutes, time.monotonic(), 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signalled and error is None:  # too late for this act: whoever answered before does so again
            signal.raise_signal(self.number)

    def take(self, number: int, frame):
        # torchrun hands on what it was sent itself, so that a process may get the same signal twice
        if self.signalled and time.monotonic() > self.signalled + 5:
            raise KeyboardInterrupt
        self.signalled, self.number = self.signalled or time.monotonic(), number

    def agreed(self) -> tuple[bool, bool]:
        """-> (save now?, stop then?), the same on every rank: what one was asked, all do."""
        asked = torch.tensor([time.monotonic() > self.saved + self.seconds, bool(self.signalled)]).int()
        if world_size() > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        save, stop = map(bool, asked.tolist())
        return save or stop, stop


def open_log(cfg: Config, step: int, history: list[dict]):
    """log.jsonl, a line for each measurement and each logged step, to go on with after `step`."""
    path = os.path.join(cfg.out, "log.jsonl")
    if os.path.isfile(path) and not history:  # killed before anything was saved: all is done again
        os.remove(path)
    if os.path.isfile(path):  # a run that was killed may have written further than it saved
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("}\n") and json.loads(line)["step"] <= step]
        replace_text(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


def check_same_step(step: int, device: torch.device):
    """Every process must have found the same checkpoint, or they would train on different data and hang."""
    wait_for_all()  # one node may have had an index to build, or a model to fetch
    if dist.is_initialized():
        steps = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(steps, torch.tensor([step], device=device))
        if len({int(s) for s in steps}) > 1:
            raise ConfigError("--out: the processes see different checkpoints; all nodes must share it")
