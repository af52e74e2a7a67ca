"""The tasks `encode`, `load` and `eval`: how fast a model is in use, and how much memory that takes."""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch

import model
from data import tokenize
from eval import encode_texts, recall_at_k
from tools import weights
from tools.bench.peers import (
    PAPER_SIZES, PEERS, beside, in_turn, installed, memory_of, peers_of, say, seconds_of)

SENTENCE = "清晨的海边有一只红色的小船和两个戴草帽的孩子在捡贝壳"
CAPTIONS = [SENTENCE[start : start + 4 + length] for length in range(16) for start in range(6)] * 4  # 4 to 19


def bench_encode(args) -> list[list[str]]:
    """Pictures and captions per second, with random weights. Pictures are random pixels. Captions have 4 to
    19 characters; ours start as text, the peers' as ids, which are padded to 52 for the official code (as its
    `tokenize` does) and to the longest of a batch for transformers. Ours run in float32 and in bfloat16."""
    rows = [["model", "what", "weights", "ours, 1/s", "official", "ratio", "transformers", "ratio",
             "open_clip", "ratio", "ours, MB", "peers in this order, MB", "least cosine to float32"]]
    ids = tokenize(CAPTIONS)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model.save(model.ChineseCLIP(model.MODELS[name]), f"{folder}/it")
            ours = {dtype: model.load(f"{folder}/it", args.device, dtype=dtype)[0]
                    for dtype in ("float32", "bfloat16")}
        peers, size = peers_of(ours["float32"]), model.MODELS[name].visual.resolution

        def captions_of(key: str):
            if key in ours:
                return encode_texts(ours[key], CAPTIONS, batch_size=64)
            for part in ids.split(64):
                longest = int((part > 0).sum(dim=1).max()) if key == "transformers" else 52
                peers[key].encode_text(part[:, :longest].to(args.device))

        for count in (args.batch, 1):
            pixels = torch.randn(count, 3, size, size, device=args.device)
            encode_rows(rows, [name, f"image, {count} together"], count, ours, peers, args,
                        lambda key: (ours | peers)[key].encode_image(pixels))
        peers.pop("open_clip", None)  # its text tower is an English one
        encode_rows(rows, [name, f"captions, {len(CAPTIONS)}"], len(CAPTIONS), ours, peers, args, captions_of)
    return rows


def encode_rows(rows, what: list[str], count: int, ours: dict, peers: dict, args, features_of):
    """Add a row for each of our precisions, which take turns with the peers. `features_of(key)` encodes with
    the model of that key. Memory is what a call holds at its peak beside the weights."""
    def action(key: str):
        def run():
            with torch.inference_mode(), model.autocast(torch.device(args.device)):
                return features_of(key)
        return run

    actions = {key: action(key) for key in (*ours, *peers)}
    times = in_turn(actions, args.runs)
    memory = {key: f"{memory_of(run, args.device):,.0f}" for key, run in actions.items()}
    exact, rounded = (model.normalise(actions[key]()) for key in ours)
    for dtype in ours:
        say(rows, [*what, dtype, *beside(count, dtype, times), memory[dtype],
                   " / ".join(memory.get(peer, "-") for peer in PEERS),
                   "-" if dtype == "float32" else f"{(exact * rounded).sum(dim=1).min():.5f}"])


def bench_load(args) -> list[list[str]]:
    """From a file, which the system has in memory, to a model. Memory is what is allocated on the way: of a
    file that is mapped only the copies count."""
    rows = [["model", "file", "MB", "ours, s", "ours, MB", "peer", "its s", "ratio", "its MB"]]
    for name in args.models:
        clip = model.ChineseCLIP(model.MODELS[name])
        files = [("ours", model.save, ""), ("official", weights.save_official, "official")]
        if isinstance(clip.config.visual, model.ViTConfig):
            files.append(("Hugging Face", weights.save_hugging_face, "transformers"))
        for form, save, peer in files:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                path = f"{folder}/it"
                save(clip, path)
                size = os.path.getsize(f"{path}/model.safetensors" if os.path.isdir(path) else path)
                actions = {"ours": lambda: model.load(path, args.device)}
                if peer and installed(peer) and name in PAPER_SIZES:
                    actions[peer] = lambda: load_as_peer(peer, name, path, args.device)
                times = in_turn(actions, args.runs)
                memory = {who: f"{memory_of(action, args.device):,.0f}" for who, action in actions.items()}
            cells = [peer or "-", "-", "-", "-"]
            if peer in times:
                cells[1:] = f"{times[peer]:.2f}", f"{times[peer] / times['ours']:.1f}", memory[peer]
            say(rows, [name, form, f"{size / 1e6:,.0f}", f"{times['ours']:.2f}", memory["ours"], *cells])
    return rows


def load_as_peer(peer: str, name: str, path: str, device: str):
    if peer == "official":
        from cn_clip.clip import load_from_name
        text = {"RN50": "RBT3-chinese", "ViT-H-14": "RoBERTa-wwm-ext-large-chinese"}
        load_from_name(path, device, None, name, text.get(name, "RoBERTa-wwm-ext-base-chinese"),
                       model.MODELS[name].visual.resolution)
    else:
        from transformers import ChineseCLIPModel
        ChineseCLIPModel.from_pretrained(path).to(device)


def bench_eval(args) -> list[list[str]]:
    """Recall in both directions, of a gallery and of squares with as many texts as pictures. The official
    script ranks one direction, on a CPU. Its time for 50 queries is subtracted from its time for 250, which
    removes start-up and reading, and the difference is scaled to all queries (no fewer than 250)."""
    rows = [["what", "ours, s", "peak, MB over the features", "official, s", "ratio"]]
    for queries, gallery in ((args.queries, args.gallery), *((n, n) for n in args.squares)):
        random = torch.Generator().manual_seed(0)
        images = model.normalise(torch.randn(gallery, args.width, generator=random))
        # Each text is often nearest to the picture of its own number.
        texts = model.normalise(images[:queries] + 0.15 * torch.randn(queries, args.width, generator=random))
        pairs = torch.arange(queries)[:, None].expand(-1, 2)
        texts, images, pairs = (x.to(args.device) for x in (texts, images, pairs))

        def ours():
            return recall_at_k(texts, images, pairs)

        # A square may take minutes, so it runs once.
        seconds = seconds_of(ours) if queries == gallery else in_turn({"recall": ours}, args.runs)["recall"]
        cells = ["-", "-"]
        if queries < gallery and queries >= 250 and installed("official"):
            each = [official_seconds(texts, images, pairs) for _ in range(args.runs)]
            theirs = statistics.median(each) * queries
            cells = [f"{theirs:,.0f} (text to image alone)", f"{theirs / seconds:,.0f}"]
        say(rows, [f"{queries:,} x {gallery:,}, both directions", f"{seconds:.2f}",
                   f"{memory_of(ours, args.device):,.0f}", *cells])
    return rows


def official_seconds(texts: torch.Tensor, images: torch.Tensor, pairs: torch.Tensor) -> float:
    """Seconds a query of the official make_topk_predictions.py, whose recall must be ours."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (50, 250):
            for name, key, features in (("images", "image_id", images), ("texts", "text_id", texts[:count])):
                with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps({key: i, "feature": row}) + "\n"
                                    for i, row in enumerate(features.tolist()))
            seconds.append(seconds_of(lambda: subprocess.run([
                sys.executable, "-c", "import runpy, torch; torch.Tensor.cuda = lambda x: x; "
                "runpy.run_module('cn_clip.eval.make_topk_predictions', run_name='__main__', alter_sys=True)",
                f"--image-feats={folder}/images.jsonl", f"--text-feats={folder}/texts.jsonl",
                f"--output={folder}/out.jsonl"], check=True, capture_output=True)))
        with open(f"{folder}/out.jsonl", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
    for k in (1, 5, 10):
        recall = 100 * sum(it["text_id"] in it["image_ids"][:k] for it in found) / 250
        assert abs(recall - recall_at_k(texts[:250], images, pairs[:250])[0][f"R@{k}"]) < 1e-3
    return (seconds[1] - seconds[0]) / 200
