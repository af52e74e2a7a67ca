"""
The peers that are installed, with our weights in them, and how their time and ours is taken.

official is cn_clip; transformers is ChineseCLIPModel, which has ViT models only; open_clip is the same image
tower beside an English text tower of its own. All have float32 weights. On a GPU they run under the same
autocast as ours, on a CPU without one. The features of a peer are compared with ours before it is timed.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import itertools
import os
import platform
import statistics
import tempfile
import time

import torch

import model
from data import tokenize
from tools import weights

PEERS = {"official": "cn_clip", "transformers": "transformers", "open_clip": "open_clip"}  # their packages
DISTRIBUTIONS = {"official": "cn_clip", "transformers": "transformers", "open_clip": "open_clip_torch"}
PAPER_SIZES = list(model.MODELS)[:6]  # the models that cn_clip and open_clip know by name
# Captions in a shop are about as long as this one: 10 characters, 12 tokens with [CLS] and [SEP].
CAPTION = "红色帆布手提包女大号"


def installed(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer]) is not None


def official(clip: model.ChineseCLIP) -> torch.nn.Module:
    from cn_clip.clip.model import CLIP
    v, t = clip.config.visual, clip.config.text
    is_vit = isinstance(v, model.ViTConfig)
    image = (v.layers, v.width, v.patch_size) if is_vit else (v.blocks, v.width, None)
    theirs = CLIP(
        clip.config.embed_dim, v.resolution, *image, t.vocab_size, t.dropout, "gelu", t.dropout, t.width,
        0.02, 4 * t.width, t.max_positions, t.heads, t.layers, t.token_types,
        vision_head_width=v.head_width if is_vit else 64)
    theirs.float().load_state_dict(clip.state_dict())
    return theirs


def transformers(clip: model.ChineseCLIP) -> torch.nn.Module | None:
    from transformers import ChineseCLIPModel
    if not isinstance(clip.config.visual, model.ViTConfig):
        return None
    with tempfile.TemporaryDirectory() as folder:
        weights.save_hugging_face(clip, folder)
        theirs = ChineseCLIPModel.from_pretrained(folder)
    theirs.encode_image = lambda pixels: theirs.get_image_features(pixels).pooler_output
    theirs.encode_text = lambda ids: theirs.get_text_features(ids, (ids > 0).long()).pooler_output
    return theirs


def open_clip(clip: model.ChineseCLIP) -> torch.nn.Module | None:
    import open_clip
    name = next((name for name in PAPER_SIZES if model.MODELS[name] == clip.config), None)
    if name is None:
        return None
    theirs = open_clip.create_model(f"{name}-quickgelu")
    theirs.visual.load_state_dict(clip.visual.state_dict())
    return theirs


def peers_of(clip: model.ChineseCLIP, makers=(official, transformers, open_clip)) -> dict:
    """Peer -> its model with our weights, if it is installed and has such a model. AssertionError if its
    features of a picture or of a caption are not ours (open_clip's text tower is another one)."""
    found = {}
    size, device = clip.config.visual.resolution, clip.logit_scale.device
    pixels, ids = torch.randn(1, 3, size, size, device=device), tokenize([CAPTION]).to(device)
    for make in makers:
        peer = make.__name__
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            theirs = make(clip) if installed(peer) else None
        if theirs is not None:
            found[peer] = theirs.to(device).eval()
            with torch.inference_mode():
                same(theirs.encode_image(pixels), clip.eval().encode_image(pixels), peer)
                if peer != "open_clip":
                    same(theirs.encode_text(ids), clip.encode_text(ids), peer)
    return found


def same(theirs: torch.Tensor, ours: torch.Tensor, peer: str):
    cosine = (model.normalise(theirs) * model.normalise(ours)).sum(dim=1).min().item()
    assert cosine > 0.9999, f"{peer} computes something else: its features' cosine with ours is {cosine}"


# ------------------------------------------------------------------------------------------------------------
# time, memory and tables


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(actions: dict, runs: int) -> dict[str, float]:
    """Name -> the median of `runs` calls in seconds, after one call that warms up. The actions take turns, so
    that a machine that is busy for a while slows all of them down."""
    rounds = [[seconds_of(action) for action in actions.values()] for _ in range(runs + 1)][1:]
    for name, seconds in zip(actions, zip(*rounds)):
        if max(seconds) > 2 * min(seconds):
            print(f"   {name}: the runs took {min(seconds):.3f} to {max(seconds):.3f} s, so do not trust the "
                  "median. Stop other programs, or try OMP_NUM_THREADS=1.")
    return dict(zip(actions, map(statistics.median, zip(*rounds))))


def memory_of(action, device: str) -> float:
    """MB that a call holds at its peak beyond what was there before, as torch's allocator counts them. On a
    CPU the profiler reports what is allocated and freed."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        action()
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


def say(rows: list[list[str]], row: list[str]):
    """Add a row to a table and print it."""
    rows.append(row)
    print("   " + " | ".join(row), flush=True)


def table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def machine(device: str) -> str:
    """The processor, the versions and the date, which stand above each table."""
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), name)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    versions = [f"{peer} {importlib.metadata.version(package)}" for peer, package in DISTRIBUTIONS.items()
                if installed(peer)]
    return (f"{name}; {', '.join([f'torch {torch.__version__}', *versions])}, "
            f"Python {platform.python_version()}; {datetime.date.today()}")
