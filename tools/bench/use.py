"""The tasks `encode`, `onnx`, `load` and `eval`: how fast a model is in use, and in how much memory."""

import functools
import importlib.util
import os
import tempfile

import torch

import model
from data import tokenize
from eval import encode_texts, recall_at_k
from tools.bench.peers import PEERS, TEXT_TOWERS, beside, measure, peers_of, version
from tools.onnx import OnnxCLIP, towers_in
from tools.weights import save_official, save_onnx

SENTENCE = "清晨的海边有一只红色的小船和两个戴草帽的孩子在捡贝壳"
CAPTIONS = [SENTENCE[start : start + 4 + length] for length in range(16) for start in range(6)] * 4  # 4 to 19
GALLERY = (5000, 30_000)  # texts and pictures
RANKED = 20  # texts that the official algorithm ranks


def bench_encode(args):
    """Pictures (random pixels) and captions (of 4 to 19 characters) per second, with random weights. Our
    captions start as text, those of the official code as ids, padded to 52 as its `tokenize` does. The least
    cosine is that of our features in bfloat16 with those in float32."""
    yield ["model", "what", "weights", "ours, 1/s", "official", "ratio", "open_clip", "ratio", "ours, MB",
           "official / open_clip, MB", "least cosine to float32"]
    ids = tokenize(CAPTIONS).to(args.device)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model.save(model.ChineseCLIP(model.MODELS[name]), f"{folder}/it")
            ours = {dtype: model.load(f"{folder}/it", args.device, dtype=dtype)[0]
                    for dtype in ("float32", "bfloat16")}
        models = ours | peers_of(name, ours["float32"])
        size = model.MODELS[name].visual.resolution
        pixels = torch.randn(args.batch, 3, size, size, device=args.device)

        def encode(who: str, what: str, count: int):
            with model.autocast(models[who]):
                if what == "image":
                    return models[who].encode_image(pixels[:count])
                if who in ours:
                    return encode_texts(models[who], CAPTIONS, batch_size=64)
                return torch.cat([models[who].encode_text(part) for part in ids.split(64)])

        for what in (("image", args.batch), ("image", 1), ("captions", len(CAPTIONS))):
            with torch.inference_mode():
                actions = {who: functools.partial(encode, who, *what) for who in models}
                if what[0] == "captions":
                    actions.pop("open_clip", None)  # its text tower is an English one
                times, memory = measure(actions, args)
                exact, rounded = (model.normalise(actions[dtype]()) for dtype in ours)
            peers = " / ".join(memory.get(peer, "-") for peer in PEERS)
            cosines = {"float32": "-", "bfloat16": f"{(exact * rounded).sum(dim=1).min():.5f}"}
            for dtype in ours:
                rates = beside(what[1], dtype, times)
                yield [name, "%s, %d together" % what, dtype, *rates, memory[dtype], peers, cosines[dtype]]


def bench_onnx(args):
    """The same on the CPU, beside the towers that `tools.weights convert --to onnx` writes, in onnxruntime
    and in OpenVINO. All programs get ids, padded to the longest. The 8 bits are those of `--dtype int8`."""
    peers = ("bfloat16", "onnxruntime", "onnxruntime, 8 bits", "OpenVINO", "OpenVINO, 8 bits")
    yield ["model", "what", "ours, 1/s", *(cell for peer in peers for cell in (peer, "ratio"))]
    ids = tokenize(CAPTIONS, max(map(len, CAPTIONS)) + 2).split(64)
    for name in args.models:
        size = model.MODELS[name].visual.resolution
        pixels = torch.randn(args.batch, 3, size, size)
        with tempfile.TemporaryDirectory() as folder:
            model.save(model.ChineseCLIP(model.MODELS[name]), f"{folder}/it")
            models = {dtype: model.load(f"{folder}/it", dtype=dtype)[0] for dtype in ("float32", "bfloat16")}
            models |= exported(models["float32"], folder)
            for what, count in (("image", args.batch), ("image", 1), ("captions", len(CAPTIONS))):
                actions = {who: functools.partial(clip.encode_image, pixels[:count]) if what == "image"
                           else lambda clip=clip: [clip.encode_text(part) for part in ids]
                           for who, clip in models.items()}
                with torch.inference_mode():
                    times, _ = measure(actions, args)
                yield [name, f"{what} x {count}", *beside(count, "float32", times, peers)]


def exported(clip: model.ChineseCLIP, folder: str) -> dict:
    """Peer -> the towers of `clip` in it, if it and what the export needs are installed."""
    def installed(*packages: str) -> bool:
        return all(map(importlib.util.find_spec, packages))

    found = {}
    if installed("onnx", "onnxscript", "onnxruntime"):
        for dtype, ending in (("float32", ""), ("int8", ", 8 bits")):
            save_onnx(clip, f"{folder}/{dtype}", dtype)
            found[f"onnxruntime{ending}"] = OnnxCLIP(f"{folder}/{dtype}")
            if installed("openvino"):
                found[f"OpenVINO{ending}"] = OpenVINO(f"{folder}/{dtype}")
    return found


class OpenVINO:
    """The towers of an exported folder in OpenVINO, in float32 and in as many threads as torch has."""

    def __init__(self, folder: str):
        import openvino
        how = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        vision, text = (openvino.Core().compile_model(path, "CPU", how) for path in towers_in(folder))
        self.encode_image, self.encode_text = lambda x: vision(x.numpy())[0], lambda ids: text(ids.numpy())[0]


def bench_load(args):
    """From a file, which the system has in memory, to a model. Memory is what is allocated on the way; a file
    that is mapped counts only where it is copied."""
    yield ["model", "file", "MB", "ours, s", "official, s", "ratio", "ours, MB", "official, MB"]
    for name in args.models:
        clip, size = model.ChineseCLIP(model.MODELS[name]), model.MODELS[name].visual.resolution
        for form, save in (("ours", model.save), ("official", save_official)):
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/it"
                save(clip, path)
                megabytes = os.path.getsize(path) / 1e6
                actions = {"ours": lambda: model.load(path, args.device)}
                if form == "official" and version("official") and name in TEXT_TOWERS:
                    from cn_clip.clip import load_from_name
                    towers = name, TEXT_TOWERS[name]
                    actions["official"] = lambda: load_from_name(path, args.device, None, *towers, size)
                times, memory = measure(actions, args)
            seconds = {who: f"{times[who]:.2f}" for who in times}
            yield [name, form, f"{megabytes:,.0f}", seconds["ours"], seconds.get("official", "-"),
                   beside(1, "ours", times)[2], memory["ours"], memory.get("official", "-")]


def bench_eval(args):
    """Recall in both directions, of a gallery and of squares with as many texts as pictures. The official
    algorithm ranks one direction, on a CPU; its time for RANKED texts is scaled to all of them."""
    yield ["what", "ours, s", "ours, MB", "official algorithm, text to image alone, s", "ratio"]
    for queries, gallery in (GALLERY, *((n, n) for n in args.squares)):
        images = model.normalise(torch.randn(gallery, 512))  # [G, E]
        texts = model.normalise(images[:queries] + 0.15 * torch.randn(queries, 512))  # [Q, E], near their own
        pairs = torch.arange(queries)[:, None].expand(-1, 2)
        on_device = [x.to(args.device) for x in (texts, images, pairs)]

        def official() -> list[int]:
            """Like the official make_topk_predictions.py, sort all pictures in Python, for each text."""
            scores = ((images @ text).tolist() for text in texts[:RANKED])
            return [sorted(enumerate(row), key=lambda item: item[1], reverse=True)[0][0] for row in scores]

        right = [found == own for own, found in enumerate(official())]
        recall = recall_at_k(texts[:RANKED], images, pairs[:RANKED])[0]["R@1"]
        assert abs(100 * sum(right) / len(right) - recall) < 1e-3, "the official algorithm has another recall"
        times, memory = measure({"ours": lambda: recall_at_k(*on_device), "official": official}, args)
        theirs = times["official"] * queries / len(right)
        yield [f"{queries:,} x {gallery:,}, both directions", f"{times['ours']:.2f}", memory["ours"],
               f"{theirs:,.1f}", f"{theirs / times['ours']:,.0f}"]
