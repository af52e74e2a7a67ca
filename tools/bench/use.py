"""
How fast a model is in use: loading, encoding, retrieval, start-up, and how each grows. The tasks `load`,
`encode`, `eval`, `start` and `grow` of bench.py.

What is measured by memory, or after a fresh start, runs in a process of its own: `python -m tools.bench once ...`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from tools import weights
import model
from tools.bench.peers import (
    HERE, PAPER_SIZES, gflop, image_features, in_turn, installed, median_time, memory_now, memory_of,
    peak_memory, peers_of, python, say, seconds_of, text_features)
from tools.bench.training import our_model, our_step, random_pictures
from data import tokenize
from eval import encode_images, encode_texts, recall_at_k
from sources.scenes import class_example

SENTENCE = "清晨的海边有一只红色的小船和两个戴草帽的孩子在捡贝壳"
CAPTIONS = [SENTENCE[start : start + 4 + length] for length in range(16) for start in range(6)] * 4  # 4 to 19


def beside(count: float, times: dict[str, float], ours: str, peers: dict) -> list[str]:
    """Cells of a row: our rate, then each peer's and ours as a multiple of it; or why there is none."""
    cells = [f"{count / times[ours]:,.1f}"]
    for peer, theirs in peers.items():
        if isinstance(theirs, str):
            cells += [theirs, "-"]
        else:
            cells += [f"{count / times[peer]:,.1f}", f"{times[peer] / times[ours]:.2f}"]
    return cells


# ------------------------------------------------------------------------------------------------------------
# encoding


def bench_encode(names: list[str], device: str, batch: int, runs: int) -> list[list[str]]:
    """Pictures and captions a second. Pictures are pixels already. Captions are 4 to 19 characters; ours
    start as text, peers' as ids, padded to 52 for the official code as its `tokenize` does, to the longest of
    a batch for transformers. Weights in float32 and, of ours, also in bfloat16; on a GPU all under
    autocast. Weights and pixels are random. Memory is what a call takes at its peak, beyond the weights."""
    rows = [["model", "what", "weights", "ours, 1/s", "TFLOP/s", "official", "ratio", "transformers",
             "ratio", "open_clip", "ratio", "ours, MB", "peers in this order, MB",
             "least cosine to float32"]]
    for name in names:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "it")
            model.save(model.ChineseCLIP(model.MODELS[name]), path)
            ours = {dtype: model.load(path, device, dtype=dtype)[0]
                    for dtype in ("float32", "bfloat16")}
        clip = ours["float32"]
        peers = peers_of(clip)
        size, tokens = clip.config.visual.resolution, [len(text) + 2 for text in CAPTIONS]
        ids = tokenize(CAPTIONS)

        def by_batches(theirs, cut: bool):
            for part in ids.split(64):
                text_features(theirs, (part[:, : int((part > 0).sum(1).max())] if cut else part).to(device))

        for count in (batch, 1):
            pixels = torch.randn(count, 3, size, size, device=device)
            actions = {key: lambda clip=clip: clip.encode_image(pixels) for key, clip in ours.items()}
            actions |= {peer: lambda theirs=theirs: image_features(theirs, pixels)
                        for peer, theirs in peers.items() if not isinstance(theirs, str)}
            work = count * gflop(clip.config, 1)[0]
            rows += rows_of(
                name, f"image, {count} together", count, work, actions, ours, peers, device, runs)
        actions = {key: lambda clip=clip: encode_texts(clip, CAPTIONS, batch_size=64)
                   for key, clip in ours.items()}
        actions |= {peer: lambda theirs=theirs, peer=peer: by_batches(theirs, peer == "transformers")
                    for peer, theirs in peers.items() if not isinstance(theirs, str) and peer != "open_clip"}
        work = sum(gflop(clip.config, length)[1] for length in tokens)
        if not isinstance(peers["open_clip"], str):
            peers["open_clip"] = "English"
        count = len(CAPTIONS)
        rows += rows_of(name, f"captions, {count:,}", count, work, actions, ours, peers, device, runs)
    return rows


def rows_of(name, what, count, work, actions, ours, peers, device, runs) -> list[list[str]]:
    """A row for each of our precisions, all timed in turn with the peers."""
    def under(action):
        def run():
            with torch.inference_mode(), model.autocast(torch.device(device)):
                return action()
        return run
    actions = {key: under(action) for key, action in actions.items()}
    times, rows = in_turn(actions, runs), []
    memory = {key: f"{memory_of(action, device):,.0f}" for key, action in actions.items()}
    theirs = " / ".join(memory.get(peer, "-") for peer in peers)
    exact = model.normalise(actions["float32"]())
    for precision in ours:
        cosine = (exact * model.normalise(actions[precision]())).sum(dim=1).min().item()
        cells = beside(count, times, precision, peers)
        rows.append([name, what, precision, cells[0], f"{work / times[precision] / 1e3:.3f}", *cells[1:],
                     memory[precision], theirs, "-" if precision != "bfloat16" else f"{cosine:.5f}"])
        say(rows[-1])
    return rows


# ------------------------------------------------------------------------------------------------------------
# loading


def bench_load(names: list[str], device: str, runs: int) -> list[list[str]]:
    """A file that the system has in memory, after imports, each time in a process of its own."""
    rows = [["model", "file", "MB", "ours, s", "peak, host MB", "peer", "its s", "its peak", "ratio"]]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            clip = model.ChineseCLIP(model.MODELS[name])
            files = {"ours": (model.save, "it.safetensors", "")}
            files["official"] = (weights.save_official, "it.pt", "official")
            if isinstance(clip.config.visual, model.ViTConfig):
                files["Hugging Face"] = (weights.save_hugging_face, "hf", "transformers")
            for form, (save, file, peer) in files.items():
                path = os.path.join(folder, file)
                save(clip, path)
                size = os.path.getsize(os.path.join(path, "model.safetensors") if form[0] == "H" else path)
                there = peer and installed(peer) and name in PAPER_SIZES
                ours, theirs = loaded(["ours", peer] if there else ["ours"], name, path, device, runs)
                row = [name, form, f"{size / 1e6:,.0f}", f"{ours[0]:.2f}", f"{ours[1]:,.0f}"]
                if there:
                    row += [peer, f"{theirs[0]:.2f}", f"{theirs[1]:,.0f}", f"{theirs[0] / ours[0]:.1f}"]
                elif peer:
                    row += [peer, "no such model" if installed(peer) else "absent", "-", "-"]
                else:
                    row += ["-"] * 4
                rows.append(row)
                say(row)
    return rows


def loaded(who: list[str], name: str, path: str, device: str, runs: int) -> list[tuple[float, float]]:
    """-> (seconds, MB) of ours and of a peer, or None: each in turn, of each the run of the median time."""
    said = [[json.loads(python("-m", "tools.bench", "once", "load", one, name, path, device).splitlines()[-1])
             for one in who] for _ in range(runs)]
    return [*(sorted(of_one)[runs // 2] for of_one in zip(*said)), None][:2]


def load_once(who: str, name: str, path: str, device: str) -> tuple[float, float]:
    """-> (seconds, MB that the process grew by at its peak)."""
    if who == "official":
        from cn_clip.clip import load_from_name
        tower, text = name, {"RN50": "RBT3-chinese", "ViT-H-14": "RoBERTa-wwm-ext-large-chinese"}
        size = model.MODELS[name].visual.resolution

        def load():
            load_from_name(path, device, vision_model_name=tower, input_resolution=size,
                           text_model_name=text.get(name, "RoBERTa-wwm-ext-base-chinese"))
    elif who == "transformers":
        from transformers import ChineseCLIPModel

        def load():
            ChineseCLIPModel.from_pretrained(path).to(device)
    else:
        def load():
            model.load(path, device)
    torch.zeros(1, device=device)  # what a GPU needs once is not the model's
    before = memory_now("cpu")
    return seconds_of(load), peak_memory("cpu") - before


# ------------------------------------------------------------------------------------------------------------
# retrieval


def pairs_of(queries: int, gallery: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features of texts and pictures, of which text i belongs to picture i and is often near it."""
    random = torch.Generator().manual_seed(0)
    images = model.normalise(torch.randn(gallery, width, generator=random))
    texts = model.normalise(images[:queries] + 0.15 * torch.randn(queries, width, generator=random))
    return texts, images, torch.arange(queries)[:, None].expand(-1, 2)


def bench_eval(device: str, runs: int, queries: int, gallery: int, squares: list[int], width: int
               ) -> list[list[str]]:
    """Recall of both directions, and the official script's one direction: its time for more queries less its
    time for few of them, which takes reading and start-up out, for all queries. The squares are run once."""
    rows = [["what", "ours, s", "peak, MB over the features", "official, s", "ratio"]]
    texts, images, positives = (x.to(device) for x in pairs_of(queries, gallery, width))
    ours = median_time(lambda: recall_at_k(texts, images, positives), runs)
    row = [f"{queries:,} x {gallery:,}, both directions", f"{ours:.2f}", "-", "absent", "-"]
    if installed("official"):
        some, few = min(250, queries), min(50, queries // 2)
        with tempfile.TemporaryDirectory() as folder:
            official_predictions(folder, texts[:1], images)  # also writes the pictures' features
            more = [-seconds_of(lambda: official_predictions(folder, texts[:few], images))
                    + seconds_of(lambda: official_predictions(folder, texts[:some], images))
                    for _ in range(runs)]
            with open(os.path.join(folder, "out.jsonl"), encoding="utf-8") as file:
                found = [json.loads(line) for line in file]
        for k in (1, 5, 10):
            theirs = 100 * sum(it["text_id"] in it["image_ids"][:k] for it in found) / some
            assert abs(theirs - recall_at_k(texts[:some], images, positives[:some])[0][f"R@{k}"]) < 1e-3
        theirs = statistics.median(more) / (some - few) * queries
        row[3:] = ["too few queries to tell", "-"]
        if theirs > 1:  # below, it is the noise of starting two processes
            row[3:] = [f"{theirs:,.0f} (text to image alone)", f"{theirs / ours:,.0f}"]
    rows.append(row)
    say(row)
    for n in squares:
        seconds, memory = json.loads(python("-m", "tools.bench", "once", "recall", str(n), str(width), device))
        rows.append([f"{n:,} x {n:,}, both directions", f"{seconds:,.1f}", f"{memory:,.0f}", "-", "-"])
        say(rows[-1])
    return rows


def official_predictions(folder: str, texts: torch.Tensor, images: torch.Tensor):
    """The official make_topk_predictions.py, on a CPU, on features in its files."""
    for name, key, features in (("images", "image_id", images), ("texts", "text_id", texts)):
        path = os.path.join(folder, f"{name}.jsonl")
        if name == "texts" or not os.path.exists(path):
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps({key: i, "feature": row}) + "\n"
                                for i, row in enumerate(features.tolist()))
    python("-c", "import runpy, torch; torch.Tensor.cuda = lambda x: x; "
           "runpy.run_module('cn_clip.eval.make_topk_predictions', run_name='__main__', alter_sys=True)",
           *(f"--{flag}={os.path.join(folder, file)}" for flag, file in (
               ("image-feats", "images.jsonl"), ("text-feats", "texts.jsonl"), ("output", "out.jsonl"))))


def recall_once(count: int, width: int, device: str) -> tuple[float, float]:
    texts, images, positives = (x.to(device) for x in pairs_of(count, count, width))
    recall_at_k(texts[:100], images[:100], positives[:100])
    before = memory_now(device)
    return seconds_of(lambda: recall_at_k(texts, images, positives)), peak_memory(device) - before


# ------------------------------------------------------------------------------------------------------------
# start-up


def bench_start(runs: int) -> list[list[str]]:
    """Until a command answers, and, once, until train.py has made its first step."""
    rows = [["what", "seconds"]]
    starts = {"import torch, the floor": ["-c", "import torch"], "import model": ["-c", "import model"],
              "eval.py --help": ["eval.py", "--help"], "train.py --help": ["train.py", "--help"],
              "tools.curate --help": ["-m", "tools.curate", "--help"], "tools.weights --help": ["-m", "tools.weights", "--help"]}
    peers = {"official": "import cn_clip.clip", "transformers": "from transformers import ChineseCLIPModel",
             "open_clip": "import open_clip"}
    starts |= {f"{peer}: {line}": ["-c", line] for peer, line in peers.items() if installed(peer)}
    actions = {what: lambda arguments=arguments: python(*arguments) for what, arguments in starts.items()}
    for what, seconds in (in_turn(actions, runs) | {"train.py to its first step": first_step()}).items():
        rows.append([what, f"{seconds:.2f}"])
        say(rows[-1])
    return rows


def first_step() -> float:
    """Seconds from the command to the line of step 1, validation before it included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-u", "train.py", "--recipe", "scratch", "--model", "RN-mini", "--data",
                   "scenes-zh", "--batch-size", "32", "--steps", "2", "--log-every", "1", "--out", folder]
        with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as run:
            for line in run.stdout:
                if "step      1/" in line:
                    run.terminate()
                    return time.perf_counter() - start
    raise RuntimeError(f"no first step: {' '.join(command)}")


# ------------------------------------------------------------------------------------------------------------
# growth


def bench_grow(name: str, device: str, runs: int, batch: int, queries: int, width: int) -> list[list[str]]:
    """Sizes doubled three times: seconds at each, and what one more costs at the largest against the
    smallest."""
    rows = [["what", "from", "seconds at 1x", "2x", "4x", "8x", "8x / 1x, 8 is linear"]]
    clip = model.ChineseCLIP(model.MODELS[name]).to(device).eval()
    picture = class_example("zh", 0)[0]
    texts, images, positives = (x.to(device) for x in pairs_of(queries, 8 * 5 * queries, width))
    grows = {
        f"{name}: pictures, encode_images": (
            batch, lambda n: lambda: encode_images(clip, lambda row: picture, n)),
        f"{name}: captions, encode_texts": (
            len(CAPTIONS) // 4, lambda n: lambda: encode_texts(clip, CAPTIONS[: len(CAPTIONS) // 4] * (
                4 * n // len(CAPTIONS)), batch_size=48)),
        f"{name}: batch of a step of stage 2": (
            max(1, batch // 4), lambda n: our_step(
                *our_model(clip.config, device, False), random_pictures(clip.config, n, device), False)),
        f"gallery of {queries:,} queries, both directions": (
            5 * queries, lambda n: lambda: recall_at_k(texts, images[:n], positives))}
    for what, (count, action) in grows.items():
        seconds = list(in_turn({times: action(count * times) for times in (1, 2, 4, 8)}, runs).values())
        rows.append([what, f"{count:,}", *(f"{s:.2f}" for s in seconds), f"{seconds[3] / seconds[0]:.2f}"])
        say(rows[-1])
    return rows
