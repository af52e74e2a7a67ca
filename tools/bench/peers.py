"""
The peers that are installed, with our weights in them, and how time and memory are measured.

The peer "official" is cn_clip. "open_clip" has the same image tower beside an English text tower of its own.
Both have float32 weights. On a GPU they run under the same autocast as ours, on a CPU without one.
"""

import datetime
import importlib.metadata
import itertools
import platform
import statistics
import time
from pathlib import Path

import torch

import model
from data import tokenize

PEERS = {"official": "cn_clip", "open_clip": "open_clip_torch"}  # the names of their packages
# The models that both know by name, and what cn_clip calls their text towers.
TEXT_TOWERS = dict.fromkeys(list(model.MODELS)[:6], "RoBERTa-wwm-ext-base-chinese") | {
    "RN50": "RBT3-chinese", "ViT-H-14": "RoBERTa-wwm-ext-large-chinese"}
# Captions in a shop are about as long as this one: 10 characters, 12 tokens with [CLS] and [SEP].
CAPTION = "红色帆布手提包女大号"


def version(peer: str) -> str:
    """The version of the peer's package, or "" if it is not installed."""
    return next((found.version for found in importlib.metadata.distributions(name=PEERS[peer])), "")


def peers_of(name: str, clip: model.ChineseCLIP) -> dict[str, torch.nn.Module]:
    """Peer -> its model of this name with the weights of `clip`, if the peer is installed and has such a
    model. AssertionError if its features of a picture or of a caption are not ours."""
    found = {}
    if version("official") and name in TEXT_TOWERS:
        from cn_clip.clip.utils import create_model
        found["official"] = create_model(f"{name}@{TEXT_TOWERS[name]}").float()
        found["official"].load_state_dict(clip.state_dict())
    if version("open_clip") and name in TEXT_TOWERS:
        import open_clip
        found["open_clip"] = open_clip.create_model(f"{name}-quickgelu")
        found["open_clip"].visual.load_state_dict(clip.visual.state_dict())
    size, device = clip.config.visual.resolution, clip.logit_scale.device
    pixels, ids = torch.randn(1, 3, size, size, device=device), tokenize([CAPTION]).to(device)
    for peer, theirs in found.items():
        theirs.to(device).eval().precision = clip.precision if device.type == "cuda" else torch.float32
        with torch.inference_mode():
            cosine = torch.cosine_similarity(theirs.encode_image(pixels), clip.eval().encode_image(pixels))
            if peer == "official":
                cosine = min(cosine, torch.cosine_similarity(theirs.encode_text(ids), clip.encode_text(ids)))
        assert cosine > 0.9999, f"{peer} computes something else: the cosine with ours is {cosine.item()}"
    return found


def measure(actions: dict, args) -> tuple[dict[str, float], dict[str, str]]:
    """Name -> the median of args.runs calls in seconds, and name -> the MB of `memory_of`. Both leave out an
    action that needs more memory than a GPU has. The actions take turns, so that a machine that is busy for a
    while slows all of them down."""
    memory = {}
    for name, action in actions.items():
        try:
            action()  # it warms up, and AdamW makes its moments
            memory[name] = f"{memory_of(action, args.device):,.0f}"
        except torch.OutOfMemoryError:
            pass
    seconds = {name: [] for name in memory}
    for name in list(memory) * args.runs:
        start = time.perf_counter()
        actions[name]()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(timed) for name, timed in seconds.items()}, memory


def memory_of(action, device: str) -> float:
    """MB that a call holds at its peak beyond what was there before, as torch's allocator counts them. On a
    CPU the profiler reports what is allocated and freed."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        action()
        torch.cuda.synchronize()  # what it left to do would count as another's time
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0) / 1e6


def beside(count: int, ours: str, times: dict[str, float], peers=tuple(PEERS), digits: int = 1) -> list[str]:
    """Cells of a row: our rate, then for each peer its rate and how many times as fast ours is. A dash stands
    for a peer that is not installed, has no such model, or needs more memory than a GPU has."""
    cells = [f"{count / times[ours]:,.{digits}f}" if ours in times else "-"]
    for peer in peers:
        cells.append(f"{count / times[peer]:,.{digits}f}" if peer in times else "-")
        cells.append(f"{times[peer] / times[ours]:.2f}" if peer in times and ours in times else "-")
    return cells


def machine(device: str) -> str:
    """The processor, the versions and the date, which stand above each table."""
    name, linux = platform.processor(), Path("/proc/cpuinfo")
    if linux.is_file() and "model name" in linux.read_text():
        name = linux.read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}", *(f"{peer} {version(peer)}" for peer in PEERS if version(peer))]
    return f"{name}; {', '.join(versions)}, Python {platform.python_version()}; {datetime.date.today()}"
