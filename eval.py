"""
How good is it? The paper's two measurements, as commands and as functions.

    python eval.py retrieval --model out/stage2/best.safetensors --data path/to/MUGE --split valid
    python eval.py zeroshot  --model out/stage2/best.safetensors --data path/to/cifar-100

Retrieval (paper, sec. 3.1) is one matrix product and a count: how often is a right answer among the K
nearest? Zero-shot classification (sec. 3.2) is retrieval with class names, put into sentences, as the
answers. The measures themselves are in metrics.py. Results are printed and written as JSON with --out.

Shapes: N pictures or captions, C classes, E joint width.
"""

import argparse
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import model
from data import preprocess, tokenize
from download import RELEASED
from loss import rank, world_size
from metrics import KS, accuracy, recall_at_k
from pairs import DataError, Pairs, open_image
from sources import open_pairs
from weights import WeightsError, write_json


# ------------------------------------------------------------------------------------------------------------
# features


@torch.inference_mode()
def encode(function, items, batch_size: int, what: str) -> torch.Tensor:
    """Apply `function` (a list of items -> features [b, E]) in batches -> unit features [N, E], float32, on
    the CPU. Many processes each take a stretch of the items, none twice, and all get all features. A bar with
    rate and time left appears on a terminal when it takes longer than two seconds."""
    share = math.ceil(len(items) / world_size())
    mine = items[rank() * share : (rank() + 1) * share]
    starts = range(0, len(mine), batch_size)
    features = []
    for start in tqdm(starts, desc=what, delay=2, leave=False, disable=None if rank() == 0 else True):
        features.append(model.normalise(function(mine[start : start + batch_size])).cpu())
    if world_size() > 1:
        parts = [[] for _ in range(world_size())]
        dist.all_gather_object(parts, features)
        features = sum(parts, [])
    features = torch.cat(features)
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise DataError(f"{what}: {bad} of {len(features)} features are not finite numbers")
    return features


def encode_images(clip, get_image, count: int, batch_size: int = 64) -> torch.Tensor:
    """get_image(row) -> PIL image, for rows 0 to count - 1 -> unit features [count, E]."""
    device, resolution = clip.logit_scale.device, clip.config.visual.resolution

    def features(rows):
        pixels = torch.stack([preprocess(get_image(row), resolution) for row in rows]).to(device)
        with model.autocast(device):
            return clip.encode_image(pixels)

    return encode(features, range(count), batch_size, "encoding images")


def encode_texts(clip, texts: list[str], context_length: int = 52, batch_size: int = 256) -> torch.Tensor:
    """Captions -> unit features [N, E]. Captions of like length are encoded together, so that little is
    padding."""
    device = clip.logit_scale.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))

    def features(rows):
        ids = tokenize([texts[i] for i in rows], context_length)
        with model.autocast(device):
            return clip.encode_text(ids)

    sorted_features = encode(features, order, batch_size, "encoding texts")
    return sorted_features[torch.tensor(order).argsort()]  # back to the order of `texts`


# ------------------------------------------------------------------------------------------------------------
# retrieval


def retrieval(clip, pairs: Pairs, context_length: int = 52) -> dict[str, dict[str, float]]:
    """Recall in both directions over a whole split, from one relation of positives. `mean_recall` is the mean
    of all six, by which train.py chooses its best checkpoint; the paper's MR is the mean of one direction's
    three."""
    # what is not text says where it is
    texts = [text if isinstance(text, str) else pairs.text(row) for row, text in enumerate(pairs.texts)]
    image_features = encode_images(clip, pairs.image, pairs.image_count)  # [N_image, E]
    text_features = encode_texts(clip, texts, context_length)  # [N_text, E]
    t2i, i2t = recall_at_k(text_features, image_features, pairs.positives)
    return {"text_to_image": t2i, "image_to_text": i2t, "mean_recall": (t2i["mean"] + i2t["mean"]) / 2}


# ------------------------------------------------------------------------------------------------------------
# zero-shot classification


def class_features(clip, names: list[str], templates: list[str]) -> torch.Tensor:
    """Class names [C] and templates with a {} for the name -> unit features [C, E]: every sentence's feature
    is normalised, the sentences of a class averaged, the average normalised again (CLIP, sec. 3.1.4, prompt
    ensembling)."""
    sentences = [template.replace("{}", name) for name in names for template in templates]
    features = encode_texts(clip, sentences).unflatten(0, (len(names), len(templates)))  # [C, templates, E]
    return model.normalise(features.mean(dim=1))


def visible(folder: str) -> list[str]:
    """Sorted names in a folder, without what desktops leave there."""
    leftovers = ("Thumbs.db", "desktop.ini")
    return sorted(name for name in os.listdir(folder) if name[0] != "." and name not in leftovers)


def open_classes(folder: str) -> tuple[list[str], list[str], torch.LongTensor]:
    """The official layout, label_cn.txt (a name a line) and test/000, test/001 ... -> (names [C], picture
    paths [N], labels [N])."""
    path = os.path.join(folder, "label_cn.txt")
    if not os.path.isfile(path):
        raise DataError(
            f"{path}: not there; expected one class name a line, line n for folder test/{{n-1:03d}}")
    with open(path, encoding="utf-8-sig") as file:
        names = [line.strip() for line in file.read().rstrip().split("\n")]
    if "" in names:
        raise DataError(f"{path} line {names.index('') + 1}: empty; expected a class name on every line")
    test = os.path.join(folder, "test")
    folders = visible(test) if os.path.isdir(test) else []
    paths, labels = [], []
    for name in folders:
        is_class = name.isdecimal() and int(name) < len(names) and os.path.isdir(os.path.join(test, name))
        if not is_class:
            raise DataError(f"{os.path.join(test, name)}: expected folders 000 to {len(names) - 1:03d}, "
                            f"one for each line of {path}")
        for picture in visible(os.path.join(test, name)):
            paths.append(os.path.join(test, name, picture))
            labels.append(int(name))
    if not paths:
        raise DataError(
            f"{test}: no pictures; expected folders 000 to {len(names) - 1:03d} with pictures in them")
    return names, paths, torch.tensor(labels)


def read_templates(path: str) -> list[str]:
    """A template a line, each with {} where the class name goes; lines that start with # are notes."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; expected a template a line, with {{}} for the class name")
    with open(path, encoding="utf-8-sig") as file:
        templates = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    for template in templates:
        if "{}" not in template:
            raise DataError(f"{path}: the template {template!r} has no {{}} for the class name")
    if not templates:
        raise DataError(f"{path}: no template in it; expected at least one line with {{}}")
    return templates


TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "labels", "templates.txt")


def zero_shot(clip, names: list[str], get_image, labels: torch.LongTensor, templates: list[str]) -> dict:
    """Accuracy in percent, with all templates and with the first alone, of pictures get_image(0 ... N - 1)
    with their labels [N]; beside it what it was measured on and what guessing gives."""
    image_features = encode_images(clip, get_image, len(labels))
    scores, single = (image_features @ class_features(clip, names, some).T
                      for some in (templates, templates[:1]))
    return {"accuracy": accuracy(scores, labels), "accuracy_single_template": accuracy(single, labels),
            "classes": len(names), "images": len(labels), "templates": len(templates),
            "chance": 100 / len(names)}


# ------------------------------------------------------------------------------------------------------------
# command line


def recall_table(rows: dict[str, dict]) -> str:
    """Name -> result of `retrieval`, as lines of text."""
    width = max(20, *(len(name) for name in rows))
    lines = [f"{'':{width}}  mean | text to image: R@1  R@5 R@10 | image to text: R@1  R@5 R@10"]
    for name, result in rows.items():
        t2i, i2t = ("  ".join(f"{result[way][f'R@{k}']:5.1f}"[:5] for k in KS)
                    for way in ("text_to_image", "image_to_text"))
        lines.append(f"{name:{width}} {result['mean_recall']:5.1f} |          {t2i} |          {i2t}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "task", choices=("retrieval", "zeroshot"),
        help="Recall@K both ways, or classification by class names")
    parser.add_argument(
        "--model", required=True,
        help="a weights file, or a released name: " + ", ".join(RELEASED))
    parser.add_argument(
        "--data", required=True, help="retrieval: a folder of pairs, scenes-zh, scenes-en; "
        "zeroshot: a folder with label_cn.txt and test/000, test/001 ...")
    parser.add_argument("--split", default="valid", help="retrieval: train, valid, test")
    parser.add_argument(
        "--templates", default=TEMPLATES, help="zeroshot: a sentence a line, {} for the class name")
    parser.add_argument("--context-length", type=int, default=52, help="tokens a caption")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="", help="also write the result to this JSON file")
    args = parser.parse_args()
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {args.device}: expected cpu, or cuda on a machine where torch finds a GPU")
    if not 2 <= args.context_length <= 512:
        parser.error(f"--context-length {args.context_length}: expected 2 to 512")
    start = time.time()
    clip, _ = model.load(args.model, args.device)
    if args.task == "retrieval":
        pairs = open_pairs(args.data, args.split)
        print(f"{args.data} {args.split}: {pairs.image_count:,} images, {len(pairs.texts):,} texts, "
              f"{len(pairs.positives):,} pairs")
        result = retrieval(clip, pairs, args.context_length)
        print(recall_table({args.split: result}))
    else:
        names, paths, labels = open_classes(args.data)
        templates = read_templates(args.templates)
        result = zero_shot(clip, names, lambda row: open_image(paths[row]), labels, templates)
        print("{accuracy:.1f} % of {images:,} images in {classes} classes with {templates} templates, "
              "{accuracy_single_template:.1f} % with the first alone, "
              "{chance:.1f} % by chance".format(**result))
    if args.out:
        write_json(args.out, vars(args) | result)
    print(f"{time.time() - start:.0f} s" + (f", written to {args.out}" if args.out else ""))


if __name__ == "__main__":
    try:
        main()
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
