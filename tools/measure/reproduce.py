"""
A table of the paper, from names to figures: `python -m tools.measure reproduce table2 --models ViT-B-16`.

Before anything else it says what it will fetch, how large that is, and how long each model will take here.
Every model then meets every data set of the table. TABLE.md and TABLE.json are written after each of them,
features of pictures are kept, and the same command goes on where it was stopped. Pictures are read as by the
official code, which shrinks before it converts: transparency is black, and a palette loses its smooth edges.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time

import torch
from PIL import Image

import model
from common import UserError, join_processes, rank, replace_text, world_size, write_json
from eval import encode_images, encode_texts, ensemble, retrieval, sentence_features
from sources import named
from sources.classes import open_classes, read_classes, read_templates, templates_for
from sources.layouts import open_pairs
from sources.pairs import DataError, Pairs, open_image, stamp
from tools.measure import published
from tools.measure.kept import kept_features
from tools.measure.zeroshot import own_measure
from weights import download
from weights.names import WeightsError

TRAIN = os.path.join(os.path.dirname(os.path.abspath(model.__file__)), "train.py")
# pictures and captions of the splits that the paper measures on, where they are public
RETRIEVAL_SIZES = {"MUGE": (29_806, 5_008), "Flickr30K-CN": (1_000, 5_000), "COCO-CN": (1_000, 1_053)}
BEST = "the best of them"  # Table 5 has one row for the five models


def run_reproduce(args, load) -> tuple[dict, str]:
    """Measure every model on every data set, and write the report after each."""
    table, sets = args.table, published.data_sets(args.table, args.data)
    setup = "finetune" if table == "table10" else args.setup
    if setup == "finetune" and table in published.CLASSIFICATION or args.train and setup != "finetune":
        raise DataError("--setup finetune: of tables 2, 3, 4 and 10 alone; --train: of that setup alone")
    if args.templates:
        read_templates(args.templates)
    for name in args.models:  # before anything is fetched
        if not os.path.exists(name) and name not in download.COMPLETE:
            raise WeightsError(f"{name}: no such file, and none of {', '.join(download.COMPLETE)}")
    by_name = [data for data, source in sets.items() if named.is_published(source)]
    opened = {data: open_set(args, data, sets[data]) for data in sets if data not in by_name}
    announce(args, sets)
    failed, lost, loaded, clip = [], set(), "", None
    for data in by_name:  # before any model is fetched
        with noted(failed, data):
            opened[data] = open_set(args, data, sets[data])
    for data, (pairs, *_) in opened.items():
        if (said := size_of(data)[0]) not in (0, pairs.image_count):
            print(f"{data}: {pairs.image_count:,} pictures are here, the paper's split has {said:,}")
    rows = measured_before(args, setup)
    for name, data in [(name, data) for name in args.models for data in opened]:
        with noted(failed, f"{name} on {data}"):
            args.model = finetuned(args, name, data, sets[data]) if setup == "finetune" else name
            if args.model in lost:
                continue
            if loaded != args.model:
                clip, loaded = None, ""  # makes room for the next
                lost.add(args.model)
                clip, loaded = load(), args.model
                lost.remove(args.model)
            ours = "" if name.startswith("qa-") else row_of(clip)
            figures = measured(args, clip, data, *opened[data])
            found = published.compare(figures, table, data, setup, ours)
            print(f"{name}, {setup}\n{published.comparison_table(found)}", flush=True)
            rows = [row for row in rows if (row["model"], row["data"]) != (name, data)]
            # the row of Table 5 is of the best of five
            unknown = {} if ours and table != "table5" else {"published": None, "gap": None}
            rows += [{"model": name, "row": ours} | row | unknown for row in found]
            report(args, setup, rows)
    if failed:
        raise DataError(f"{table}: {len(failed)} failed, as said above; others: {path_of(args, setup)}")
    return report(args, setup, rows), f"next: see {path_of(args, setup)}"


def measured_before(args, setup: str) -> list[dict]:
    """The rows that earlier runs have left in this report, without their summaries."""
    path = path_of(args, setup).removesuffix("md") + "json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(path, encoding="utf-8") as file:
        return [row for row in json.load(file)["rows"] if row["model"] != BEST and row["data"] != "average"]
    return []


@contextlib.contextmanager
def noted(failed: list[str], what: str):
    """A user's error inside becomes a line of `failed`; the others go on."""
    try:
        yield
    except UserError as error:
        failed.append(f"{what}: {error}" if what not in str(error) else str(error))
        print(failed[-1], file=sys.stderr, flush=True)


def row_of(clip) -> str:
    """The paper's name of this model, which its shape tells; "" if it is none of the five."""
    return next((name for name in download.RELEASED if model.MODELS[name] == clip.config), "")


# ------------------------------------------------------------------------------------------------------------
# what it will take


def announce(args, sets: dict[str, str]):
    """Print what will be fetched, and how long the pictures and captions of each data set will take here."""
    sizes = {name: download.to_fetch(name) for name in args.models if not os.path.exists(name)}
    sizes |= named.to_fetch([source for source in sets.values() if named.is_published(source)])
    for name, size in sizes.items():
        print(f"{name}: " + ("is there" if size == 0 else
                             f"{size / 1e6:,.1f} MB to fetch" if size else "to fetch, of unknown size"))
    device = join_processes(args.device)
    for name in args.models:
        config = model.MODELS.get(name.removeprefix("qa-"))
        if not config:
            continue
        pictures_s, texts_s = rates(model.ChineseCLIP(config).to(device).eval())
        print(f"{name}: {pictures_s:.3g} pictures and {texts_s:.3g} captions a second here")
        for data in sets:
            pictures, texts = size_of(data)
            kept = not args.train and os.path.isfile(os.path.join(kept_in(args, name, data), "features.json"))
            minutes = ((0 if kept else pictures / pictures_s) + texts / texts_s) / 60 / world_size()
            if pictures:
                print(f"   {data}: {pictures:,} pictures, {texts:,} sentences, about {minutes:,.1f} minutes"
                      + ", as the features of its pictures are kept" * kept)


def size_of(data: str) -> tuple[int, int]:
    """Pictures and captions, or sentences, of a split that the paper measures on; 0 if it is not public."""
    if data in RETRIEVAL_SIZES:
        return RETRIEVAL_SIZES[data]
    for row in published.read_paper()["table11"]["rows"]:
        if row["data"] == data:
            return row["test_size"], row["labels"] * len(templates_for(read_classes(data)))
    return 0, 0


def rates(clip) -> tuple[float, float]:
    """Pictures and captions that this model encodes in a second, by a quick try."""
    found = []
    for encode, count in ((lambda n: encode_images(clip, lambda row: Image.new("RGB", (500, 375)), n), 8),
                          (lambda n: encode_texts(clip, ["海边有一只红色的小船"] * n), 32)):
        encode(1)
        start = time.perf_counter()
        encode(count * world_size())
        found.append(count / (time.perf_counter() - start))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------
# one model on one data set


class Pictures(Pairs):
    """The pictures of a set of classes as pairs without captions, whose features can be kept."""

    texts, positives = (), torch.zeros(0, 2, dtype=torch.long)

    def __init__(self, paths: list[str]):
        self.paths, self.image_count = paths, len(paths)

    def image(self, row: int, size: int = 0) -> Image.Image:
        return open_image(self.paths[row])

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([[path, stamp(path)] for path in self.paths]).encode()).hexdigest()


def kept_in(args, name: str, data: str) -> str:
    return os.path.join(args.into, "features", re.sub(r"\W+", "-", name), data)


def open_set(args, data: str, source: str) -> tuple:
    """A data set, fetched if need be: its pairs alone, or its pictures, classes and labels."""
    if args.table in published.RETRIEVAL:
        return (open_pairs(source, published.read_paper()[args.table].get("split", "test")),)
    classes, paths, labels = open_classes(source, data, args.names)
    return Pictures(paths), classes, labels


def measured(args, clip, data: str, pairs: Pairs, classes=None, labels=None) -> dict[str, float]:
    """Figures in percent by column of the table; in classification the column is the data set."""
    size = (clip.config.visual.resolution,) * 2
    official = copy.copy(pairs)
    official.image = lambda row: pairs.image(row).resize(size).convert("RGB")  # Pillow's default is bicubic
    context_length = 128 if args.table == "table10" else 52  # app. A.4
    features = kept_features(clip, official, context_length, kept_in(args, args.model, data), True)
    if not classes:
        return published.retrieval_columns(retrieval(clip, pairs, features=features), args.table)
    sentences = sentence_features(clip, classes.chinese, templates_for(classes, args.templates))
    scores = features[0] @ ensemble(sentences).T  # [N, C]
    return {data: own_measure(classes.metric, scores, labels, clip.logit_scale.exp().item())}


def finetuned(args, name: str, data: str, source: str) -> str:
    """The file of a published model after the recipe of Table 9 for this data set, which is run if --train
    says so. Another file is taken to be finetuned already."""
    if os.path.exists(name):
        return name
    recipe = data.lower()
    folder = os.path.join(args.into, "finetuned", name, recipe)
    path, end = os.path.join(folder, recipe, "best.safetensors"), os.path.join(folder, "results.json")
    flags = ["--recipe", recipe, "--model", name.removeprefix("qa-"), "--init", name, "--data", source,
             "--out", folder]
    command = shlex.join(["train.py", *flags])
    print(f"{name} on {data}: python {command}", flush=True)
    if args.train and world_size() > 1:
        raise DataError("--train: expected one process; run the recipe by torchrun, then this without it")
    if args.train and (status := subprocess.run([sys.executable, TRAIN, *flags]).returncode):
        raise DataError(f"{command} ended with {status}; the same command continues")
    if not os.path.isfile(path) or not os.path.isfile(end):  # which train.py writes last
        raise DataError(f"{path}: not there, or not trained to its end; add --train, or first run this "
                        "command (by torchrun, on GPUs)")
    return path


# ------------------------------------------------------------------------------------------------------------
# all of it


def summaries(table: str, setup: str, rows: list[dict]) -> list[dict]:
    """More rows: Table 12's average for each model that has met all 20 sets, and the best of all models for
    Table 5, which has only one row for them."""
    more = []
    for name, ours in dict.fromkeys((row["model"], row["row"]) for row in rows):
        values = [row["measured"] for row in rows if row["model"] == name]
        if table == "table12" and len(values) == len(published.places_of(table)):
            found = published.compare({"average": sum(values) / len(values)}, table, "average", setup, ours)
            more += [{"model": name, "row": ours} | row for row in found]
    if table == "table5" and {row["row"] for row in rows} >= set(download.RELEASED):
        for data in dict.fromkeys(row["data"] for row in rows):
            best = max(row["measured"] for row in rows if row["data"] == data and row["row"])
            found = published.compare({data: best}, table, data, setup, "")
            more += [{"model": BEST, "row": ""} | row for row in found]
    return more


def path_of(args, setup: str) -> str:
    """Of the table in Markdown. Other names or templates are another table."""
    other = f"-{args.names}" * (args.names != "theirs") + "-templates" * bool(args.templates)
    return os.path.join(args.into, f"{args.table}-{setup}{other}.md")


def report(args, setup: str, rows: list[dict]) -> dict:
    """Write the rows and their summaries as JSON, which is returned, and as a table in Markdown."""
    rows, path = rows + summaries(args.table, setup, rows), path_of(args, setup)
    result = {"title": published.read_paper()[args.table]["title"], "setup": setup, "names": args.names,
              "templates": args.templates, "dtype": args.dtype, "rows": rows}
    if rank() == 0:
        write_json(path.removesuffix("md") + "json", result)
        replace_text(path, f"# {result['title']}: {setup}\n\n" + markdown(args.table, setup, rows))
    return result


def markdown(table: str, setup: str, rows: list[dict]) -> str:
    """For each model what was measured, what is published, the gap and the verdict of published.verdict; then
    the table's baselines. In classification, lines and columns change places."""
    paper = published.read_paper()[table]
    columns = [column for column in paper["columns"] if any(row["column"] == column for row in rows)]
    grid = [["", "", *columns, "verdict"]]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = {row["column"]: row for row in rows if row["model"] == name}
        for key, form in (("measured", ".1f"), ("published", ".1f"), ("gap", "+.1f")):
            values = [mine.get(column, {}).get(key) for column in columns]
            verdict = published.verdict(mine.values()) if table != "table5" or name == BEST else ""
            grid.append([name, key, *("-" if x is None else format(x, form) for x in values),
                         verdict if key == "measured" else ""])
    grid += [[row["printed"], "published", *("-" if row.get(column) is None else f"{row[column]:.1f}"
                                             for column in columns), ""]
             for row in paper["rows"] if row["setup"] == setup and not row["printed"].startswith("CN-CLIP")]
    grid = list(zip(*grid)) if table in published.CLASSIFICATION else grid
    lines = ["| " + " | ".join(line) + " |" for line in grid]
    return "\n".join([lines[0], "|---" * len(grid[0]) + "|", *lines[1:]]) + "\n"
