"""
Runs that are killed (kill -9), stopped (SIGTERM) or left without disk at random moments, and then repeated,
must end bit for bit as the run that nobody disturbed. Linux: processes are found in /proc.

    python tests/kills.py            # 100 moments over all kinds of run
    python tests/kills.py 20 cache   # 20 moments, of runs with cached features
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT, write_folder

import model

ALONE = ["train.py"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
CACHED = ["--recipe", "stage1", "--model", "ViT-tiny", "--cache-features", "20"]
# kind: (how it is started, flags); every one with dropout and augmentation
KINDS = {
    "plain": (ALONE, ["--recipe", "scratch", "--model", "ViT-tiny"]),
    "saved by the clock": (ALONE, ["--recipe", "scratch", "--model", "RN-tiny", "--save-minutes", "0.001",
                                   "--workers", "1"]),
    "chunks": (ALONE, ["--recipe", "scratch", "--model", "ViT-tiny", "--chunk-size", "3"]),
    "LoRA": (ALONE, ["--recipe", "scratch", "--model", "RN-tiny", "--lora", "2", "--precision", "float16"]),
    "cache": (ALONE, [*CACHED, "--chunk-size", "3"]),
    "two acts": (ALONE, ["--recipe", "pretrain", "--model", "ViT-tiny"]),
    "two ranks": (TWO, ["--recipe", "pretrain", "--model", "ViT-tiny"]),
    "two ranks, LoRA": (TWO, ["--recipe", "direct", "--model", "ViT-tiny", "--lora", "4", "--chunk-size", "2",
                              "--precision", "bfloat16"]),
    "two ranks, BatchNorm": (TWO, ["--recipe", "scratch", "--model", "RN-tiny", "--save-minutes", "0.001"]),
    "two ranks, cache and chunks": (TWO, [*CACHED, "--chunk-size", "2", "--targets", "multi"]),
}


def hows(kind: str) -> tuple[str, ...]:
    """How a kind of run is disturbed. Loaders' workers are left a disk: the limit that stands for a full one
    would take their shared memory away too, which no full disk does."""
    return ("kill", "stop") if "--workers" in KINDS[kind][1] else ("kill", "stop", "disk")


def prepare(folder: Path):
    """What all runs read: 24 pairs, and weights to start from."""
    write_folder(folder / "pairs", 24)
    for name in ("ViT-tiny", "RN-tiny"):
        model.save(model.ChineseCLIP(model.MODELS[name]), str(folder / f"{name}.safetensors"))


def begin(kind: str, folder: Path, out: str) -> subprocess.Popen:
    start, flags = KINDS[kind]
    start_from = ["--init", str(folder / f"{flags[3]}.safetensors")]
    common = ["--data", str(folder / "pairs"), "--batch-size", "8", "--lr", "1e-3", "--steps", "30",
              "--save-every", "3", "--eval-every", "15", "--log-every", "1", "--augment", "auto",
              "--device", "cpu"]
    workers = [] if "--workers" in flags else ["--workers", "0"]
    return subprocess.Popen(
        [sys.executable, "-u", *start, *flags, *common, *workers, *start_from, "--out", str(folder / out)],
        cwd=ROOT, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def children(pid: int) -> list[int]:
    """Processes that it started, and those that they did: torchrun's outlive it."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:  # it has ended
        return []
    return [process for child in map(int, text.split()) for process in (child, *children(child))]


def disturb(process: subprocess.Popen, how: str, rng: random.Random) -> str:
    """One interruption at a moment within the run -> what it said."""
    said = [process.stdout.readline() for _ in range(rng.randrange(1, 40))]
    time.sleep(rng.uniform(0, 0.03))  # somewhere inside a step
    for pid in (*children(process.pid), process.pid):
        try:
            if how == "disk":  # no file may grow beyond a kilobyte: writers see an error, as of a full disk
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, 1000))
            else:
                os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        except ProcessLookupError:  # has just ended
            pass
    said.append(process.stdout.read())  # until the last of them has let go of it
    process.wait()
    process.stdout.close()
    return "".join(said)


def compare(folder: Path, one: str, other: str):
    """AssertionError unless two runs left the same weights, features, losses and recall."""
    acts = sorted(path.name for path in (folder / one).iterdir() if path.is_dir())
    assert acts == sorted(path.name for path in (folder / other).iterdir() if path.is_dir())
    for act in acts:
        for name in ("last.safetensors", "best.safetensors", "features.f16"):
            files = [folder / out / act / name for out in (one, other)]
            if files[0].exists():
                assert files[0].read_bytes() == files[1].read_bytes(), (act, name)
        logs = [(folder / out / act / "log.jsonl").read_text().splitlines() for out in (one, other)]
        steps = [[(entry["step"], entry.get("loss")) for entry in map(json.loads, log)] for log in logs]
        assert steps[0] == steps[1], act
        saved = [torch.load(folder / out / act / "checkpoint.pt", weights_only=True) for out in (one, other)]
        assert saved[0]["step"] == saved[1]["step"] and saved[0]["history"] == saved[1]["history"], act
    results = [json.loads((folder / out / "results.json").read_text()) for out in (one, other)]
    assert results[0] == results[1]


def undisturbed(kind: str, folder: Path, out: str):
    """A run to its end, from wherever it stands."""
    process = begin(kind, folder, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said


def disturbed(kind: str, folder: Path, out: str, hows: list[str], rng: random.Random) -> int:
    """A run disturbed in these ways, one after the other, then repeated to its end -> how often a signal was
    answered by a checkpoint. AssertionError where one ends in a traceback, or otherwise than the whole run."""
    saved = 0
    for how in hows:
        process = begin(kind, folder, out)
        said = disturb(process, how, rng)
        # torchrun shows a traceback of its own when a process ends otherwise than by 0
        assert how == "kill" or KINDS[kind][0] == TWO or "Traceback" not in said, said
        if how == "stop" and KINDS[kind][0] == ALONE and "\nas numbers: " not in said:  # not at its very end
            assert process.returncode == 0, said
        saved += "stopped at step" in said
    undisturbed(kind, folder, out)
    compare(folder, "whole", out)
    return saved


def main(moments: int = 100, *kinds: str):
    seed = int.from_bytes(os.urandom(4), "big")  # other moments every time
    rng, start = random.Random(seed), time.perf_counter()
    kinds = list(kinds or KINDS)
    for n, kind in enumerate(kinds):
        ways = hows(kind)
        share = [ways[(i + n) % len(ways)] for i in range(len(range(n, moments, len(kinds))))]
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            undisturbed(kind, Path(folder), "whole")
            saved = sum(disturbed(kind, Path(folder), f"out{i}", share[i : i + 3], rng)
                        for i in range(0, len(share), 3))
        print(f"{kind}: {len(share)} moments ({', '.join(f'{share.count(how)} {how}' for how in ways)}), "
              f"{saved} stops with a checkpoint; every end is that of the whole run", flush=True)
    print(f"{moments} moments, seed {seed}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
