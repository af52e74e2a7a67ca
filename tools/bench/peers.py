"""
Beside whom, and by which clock: the peers that are installed, with our weights in them, and how bench.py
takes time. A peer's features are compared with ours before it is timed.

official: cn_clip. transformers: ChineseCLIPModel, of a ViT. open_clip: the same image tower, with its own
English text tower. All have float32 weights, on a CPU without autocast, on a GPU under the same one as ours.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import io
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from tools import weights
import model
from data import tokenize

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PEERS = {"official": "cn_clip", "transformers": "transformers", "open_clip": "open_clip"}
DISTRIBUTIONS = {"official": "cn_clip", "transformers": "transformers", "open_clip": "open_clip_torch"}
PAPER_SIZES = list(model.MODELS)[:6]  # which cn_clip and open_clip have by name
RN50_GFLOP = 12.22  # of an image, open_clip's docs/model_profile.csv; the others by formula
# Captions as long as those of a shop: 10 characters, 12 tokens with [CLS] and [SEP]; peers pad to 52
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
    return theirs.to(clip.logit_scale.device).eval()


def transformers(clip: model.ChineseCLIP) -> torch.nn.Module:
    from transformers import ChineseCLIPModel
    with tempfile.TemporaryDirectory() as folder:
        weights.save_hugging_face(clip, folder)
        return ChineseCLIPModel.from_pretrained(folder).to(clip.logit_scale.device).eval()


def transformers_processor(resolution: int):
    """Its tokenizer and its picture transform, of the files that tools/weights.py writes. It resizes by torchvision
    if that is installed: faster than Pillow, and off by one grey level of 255."""
    from transformers import ChineseCLIPProcessor
    small = model.MODELS["ViT-tiny"]
    visual = dataclasses.replace(small.visual, resolution=resolution)
    with tempfile.TemporaryDirectory() as folder:
        weights.save_hugging_face(model.ChineseCLIP(dataclasses.replace(small, visual=visual)), folder)
        return ChineseCLIPProcessor.from_pretrained(folder)


def open_clip(clip: model.ChineseCLIP) -> torch.nn.Module:
    import open_clip
    theirs = open_clip.create_model(f"{name_of(clip)}-quickgelu")
    theirs.visual.load_state_dict(clip.visual.state_dict())
    return theirs.to(clip.logit_scale.device).eval()


def name_of(clip: model.ChineseCLIP) -> str:
    return next((name for name, config in model.MODELS.items() if config == clip.config), "")


def peers_of(clip: model.ChineseCLIP, wanted=tuple(PEERS)) -> dict[str, torch.nn.Module | str]:
    """Peer -> its model with our weights, or why there is none. AssertionError if its features of a picture
    and, where it has them, of a caption are not ours."""
    found, size = {}, clip.config.visual.resolution
    pixels = torch.randn(1, 3, size, size, device=clip.logit_scale.device)
    sized = name_of(clip) in PAPER_SIZES
    is_vit = isinstance(clip.config.visual, model.ViTConfig)
    for peer in wanted:
        if not installed(peer):
            found[peer] = "absent"
        elif not (is_vit if peer == "transformers" else sized or peer == "official"):
            found[peer] = "no such model"
        else:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found[peer] = globals()[peer](clip)
            with torch.inference_mode():
                same(image_features(found[peer], pixels), clip.eval().encode_image(pixels), peer)
                if peer != "open_clip":
                    ids = tokenize([CAPTION]).to(pixels.device)
                    same(text_features(found[peer], ids), clip.encode_text(ids), peer)
    return found


def image_features(theirs: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Of a peer: [B, E], whatever its call is named."""
    if hasattr(theirs, "get_image_features"):  # a tensor or, from transformers 5 on, an output
        found = theirs.get_image_features(pixels)
        return found if torch.is_tensor(found) else found.pooler_output
    return theirs.encode_image(pixels)


def text_features(theirs: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    if hasattr(theirs, "get_text_features"):
        found = theirs.get_text_features(ids, attention_mask=(ids > 0).long())
        return found if torch.is_tensor(found) else found.pooler_output
    return theirs.encode_text(ids)


def same(theirs: torch.Tensor, ours: torch.Tensor, peer: str):
    cosine = (model.normalise(theirs) * model.normalise(ours)).sum(dim=1).min().item()
    assert cosine > 0.9999, f"{peer} computes something else: its features' cosine with ours is {cosine}"


# ------------------------------------------------------------------------------------------------------------
# work


def transformer_gflop(tokens: int, width: int, layers: int) -> float:
    """Forward, one sample: q, k, v, out and the MLP are 12 D^2 multiply-adds a token, attention 2 T D. Of all
    layers in full, though our last one computes only the token that is read: work done, not work spent."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width) / 1e9


def gflop(config: model.ModelConfig, tokens: int) -> tuple[float, float]:
    """-> GFLOP of one image, nan for a ResNet of another size, and of one caption of `tokens` tokens,
    forward."""
    v, t = config.visual, config.text
    image = RN50_GFLOP if v == model.MODELS["RN50"].visual else math.nan
    if isinstance(v, model.ViTConfig):
        patches = (v.resolution // v.patch_size) ** 2
        image = transformer_gflop(patches + 1, v.width, v.layers)
        image += 2 * patches * 3 * v.patch_size**2 * v.width / 1e9
    return image, transformer_gflop(tokens, t.width, t.layers)


# ------------------------------------------------------------------------------------------------------------
# the clock


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(actions: dict, runs: int) -> dict[str, float]:
    """Name -> seconds of one call: the median of `runs` after one that warms up. One after the other in every
    round, so that a machine that is busy for a while is slow for all."""
    rounds = [[seconds_of(action) for action in actions.values()] for _ in range(runs + 1)][1:]
    for name, seconds in zip(actions, zip(*rounds)):
        if max(seconds) > 2 * min(seconds):
            print(f"   {name or 'it'}: {min(seconds):.3f} to {max(seconds):.3f} s, no figure to trust; is "
                  "anything else running? OMP_NUM_THREADS=1 is steadier then")
    return dict(zip(actions, map(statistics.median, zip(*rounds))))


def median_time(step, runs: int) -> float:
    return in_turn({"": step}, runs)[""]


def python(*arguments: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def memory_of(action, device: str) -> float:
    """MB that one call holds at its peak, beyond what was there before it, as torch's allocator counts them
    (not what Python and libraries take beside it). For a CPU it tells a profiler what it gives and takes."""
    if device == "cuda":
        before = memory_now(device)
        action()
        return peak_memory(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0) / 1e6


def memory_now(device: str) -> float:
    """MB that the process has; from here on `peak_memory` begins anew. On a CPU of Linux alone: elsewhere
    nan."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    else:
        return math.nan
    return peak_memory(device)


def peak_memory(device: str) -> float:
    """MB, the most that was in use since `memory_now`; on a CPU files that are mapped count too."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if not os.path.exists("/proc/self/status"):
        return math.nan
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e6


def table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def say(row: list[str]):
    print("   " + " | ".join(row), flush=True)


def machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), name)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}"]
    versions += [f"{peer} {importlib.metadata.version(DISTRIBUTIONS[peer])}"
                 for peer in PEERS if installed(peer)]
    return f"{name}; {', '.join(versions)}, Python {platform.python_version()}; {datetime.date.today()}"
