"""
A set fit to train on (paper, sec. 2.2): look at it, filter it, pack it.

    python -m tools.curate check PATH                       what is wrong with a set, and where (tools/curate/check.py)
    python -m tools.curate filter SOURCE OUT [rules]        a new set without the pairs that a rule takes
    python -m tools.curate pack SOURCE OUT [--resize 224]   a set of any layout -> tar shards
    python -m tools.curate unpack SOURCE OUT                a set of any layout -> pictures and a list, or TSV

SOURCE is what train.py --data takes (sources/layouts.py); OUT is a new folder, complete when it is there.
"""

import argparse
import base64
import collections
import concurrent.futures
import functools
import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tools.curate import check
import model
from sources.augment import as_rgb
from eval import encode_images, encode_texts
from tools.curate.faults import digest
from sources.pairs import DataError, Pairs, SourceChanged, decode
from sources.layouts import layout_of, open_pairs
from common import write_json
from weights.read import WeightsError

SPLITS = ("train", "valid", "test")
SHARD = 10_000  # pairs, img2dataset's default
CHUNK = 256  # pictures that a process looks at before it reports

# ------------------------------------------------------------------------------------------------------------
# writing a split


def write_official(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}_imgs.tsv and {split}_texts.jsonl; a picture once, however many captions it has."""
    relation = pairs.positives[kept].tolist()
    # of a whole split those that no caption names, too: others search among them
    images = range(pairs.image_count) if len(kept) == len(pairs) else sorted({row for _, row in relation})
    with open(os.path.join(folder, f"{split}_imgs.tsv"), "wb") as file:
        for row in tqdm(images, f"writing {split}", disable=None):
            file.write(f"{pairs.image_id(row)}\t".encode() + base64.b64encode(picture(row)) + b"\n")
    answers = collections.defaultdict(list)
    for text, image in relation:
        answers[text].append(pairs.image_id(image))
    with open(os.path.join(folder, f"{split}_texts.jsonl"), "w", encoding="utf-8") as file:
        for text, image_ids in answers.items():
            line = {"text_id": pairs.text_id(text), "text": pairs.text(text), "image_ids": image_ids}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_folder(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}/000000000.jpg ... and {split}.jsonl, a line a pair; lines with one text_id are one caption."""
    os.mkdir(os.path.join(folder, split))
    names = {}
    with open(os.path.join(folder, f"{split}.jsonl"), "w", encoding="utf-8") as file:
        for i in tqdm(kept, f"writing {split}", disable=None):
            row = pairs.image_number(i)
            if row not in names:
                content = picture(row)
                names[row] = f"{split}/{row:09}.{ending(content)}"
                with open(os.path.join(folder, names[row]), "wb") as image:
                    image.write(content)
            line = {"image": names[row], "text": pairs.caption(i), "text_id": int(pairs.positives[i, 0])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_shards(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}-000000.tar ..., SHARD pairs each; a picture with several captions comes with each of them."""
    for start in tqdm(range(0, len(kept), SHARD), f"writing {split}", disable=None):
        with tarfile.open(os.path.join(folder, f"{split}-{start // SHARD:06}.tar"), "w") as shard:
            for number, i in enumerate(kept[start: start + SHARD], start):
                content = picture(pairs.image_number(i))
                for name, part in ((ending(content), content), ("txt", pairs.caption(i).encode())):
                    member = tarfile.TarInfo(f"{number:09}.{name}")
                    member.size = len(part)
                    shard.addfile(member, io.BytesIO(part))


WRITERS = {"shards": write_shards, "folder": write_folder, "official": write_official}


def ending(picture: bytes) -> str:
    """Of a file with this picture in it. Decoded before, so it is one."""
    kind = Image.open(io.BytesIO(picture)).format
    return {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())


def resized(picture: bytes, side: int) -> bytes:
    """The picture with its shorter side at most `side` pixels, upright, as a JPEG; a smaller one as it is.
    The shape stays, so that training can still crop before it squashes."""
    if min(Image.open(io.BytesIO(picture)).size) <= side:
        return picture
    image = ImageOps.exif_transpose(decode(picture, "", side))
    scale = side / min(image.size)
    size = tuple(max(side, round(length * scale)) for length in image.size)
    file = io.BytesIO()
    as_rgb(image).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------
# looking at pictures


opened = functools.lru_cache(maxsize=1)(open_pairs)  # once in each process


def look(source: str, split: str, rows: range) -> list[tuple]:
    """-> of each picture its shorter side, its digest, its difference hash and its mean colour; side 0 if it
    is broken."""
    pairs, found = opened(source, split), []
    for row in rows:
        try:
            content = pairs.picture(row)
            image = decode(content, pairs.place(row))
            small = as_rgb(image).resize((9, 8), Image.Resampling.BOX)
            red, green, blue = np.asarray(small).mean(axis=(0, 1)).astype(int).tolist()
            found.append((min(image.size), digest(content), difference_hash(small), red, green, blue))
        except SourceChanged:
            raise
        except (DataError, OSError, ValueError):  # of a mode that is no RGB, as LAB
            found.append((0, 0, 0, 0, 0, 0))
    return found


def difference_hash(small: Image.Image) -> int:
    """A picture of 9 x 8 cells -> 64 bits: is each cell brighter than its right neighbour? Size, compression
    and small changes of colour leave nearly all of them as they are."""
    cells = np.asarray(small.convert("L"), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes(), "big")


def look_at_all(source: str, split: str, workers: int) -> np.ndarray:
    """`look`, by several processes: [N_image, 6]."""
    count = opened(source, split).image_count
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with concurrent.futures.ProcessPoolExecutor(
            min(workers, 61) or 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        mapped = pool.map if workers else map
        found = mapped(functools.partial(look, source, split), chunks)
        bar = tqdm(found, "looking at pictures", len(chunks), unit=f" x {CHUNK}", disable=None)
        return np.array([row for part in bar for row in part], dtype=np.uint64)


def near_duplicates(hashes: np.ndarray, colours: np.ndarray, distance: int = 3) -> np.ndarray:
    """hashes [N], mean colours [N, 3] -> [N]: the first picture that each is like, itself if there is none
    before it. Of two hashes that differ in at most three bits, one of four 16-bit words is equal: only those
    are compared. Flat pictures all have the hash 0, so the colours must be alike too."""
    colours = colours.astype(np.int16)
    first = np.arange(len(hashes))
    for word in range(4):
        key = (hashes >> np.uint64(16 * word)) & np.uint64(0xFFFF)
        order = np.argsort(key, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            while len(group) > 1:
                one, group = group[0], group[1:]
                alike = np.bitwise_count(hashes[group] ^ hashes[one]) <= distance
                alike &= (np.abs(colours[group] - colours[one]) <= 16).all(axis=1)
                first[group[alike]] = np.minimum(first[group[alike]], one)
                group = group[~alike]
    return first


# ------------------------------------------------------------------------------------------------------------
# the rules


@dataclass(frozen=True)
class Rules:
    """What filter takes. The defaults take nothing but what is broken."""

    min_chars: int = 0
    max_chars: int = 10**9
    words: tuple[str, ...] = ()
    min_side: int = 0
    duplicates: str = "none"
    clip: model.ChineseCLIP | None = None  # to score pairs by
    min_score: float = 0.0


def take(source: str, split: str, rules: Rules, workers: int) -> tuple[list[int], dict]:
    """-> (numbers of the pairs that stay, how many each rule took and what the scores were like). A pair is
    taken by the first rule that it breaks, as `broken_rule` has them; then duplicates; then low scores."""
    pairs, taken, kept = opened(source, split), collections.Counter(), []
    looked = look_at_all(source, split, workers)
    for i in tqdm(range(len(pairs)), "reading captions", disable=None):
        if rule := broken_rule(pairs, i, int(looked[pairs.image_number(i), 0]), rules):
            taken[rule] += 1
        else:
            kept.append(i)
    if rules.duplicates != "none" and kept:  # of pictures that are still there
        rows, place = np.unique([pairs.image_number(i) for i in kept], return_inverse=True)
        looked = looked[rows]
        first = (first_of_equal(looked[:, 1]) if rules.duplicates == "exact"
                 else near_duplicates(looked[:, 2], looked[:, 3:]))
        stays = (first == np.arange(len(rows)))[place]
        if not stays.all():
            taken[f"{rules.duplicates} duplicate of another picture"] = int((~stays).sum())
        kept = [i for i, stay in zip(kept, stays) if stay]
    report = {"pairs": len(pairs)}
    if rules.clip is not None and kept:
        scores = clip_scores(rules.clip, pairs, kept)
        report["scores"] = {f"{q}%": round(float(np.percentile(scores, q)), 4) for q in range(0, 101, 10)}
        taken[f"score under {rules.min_score}"] = int((scores < rules.min_score).sum())
        kept = [i for i, score in zip(kept, scores) if score >= rules.min_score]
    return kept, report | {"taken": dict(taken), "kept": len(kept)}


def broken_rule(pairs: Pairs, i: int, side: int, rules: Rules) -> str:
    """The first rule that training pair number i breaks, "" if none. side: its picture's shorter, 0 if it is
    broken."""
    try:
        caption = pairs.caption(i)
        caption.encode()
    except SourceChanged:
        raise
    except (DataError, UnicodeEncodeError):  # half a surrogate pair, from broken JSON
        return "caption is no text"
    for wrong, rule in (
            (not side, "picture cannot be decoded"),
            (len(caption) < rules.min_chars, f"fewer than {rules.min_chars} characters"),
            (len(caption) > rules.max_chars, f"more than {rules.max_chars} characters"),
            (any(word in caption for word in rules.words), "a word of the list"),
            (side < rules.min_side, f"picture under {rules.min_side} pixels")):
        if wrong:
            return rule
    return ""


def first_of_equal(digests: np.ndarray) -> np.ndarray:
    """digests [N] -> [N]: the first picture with the same bytes."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def clip_scores(clip: model.ChineseCLIP, pairs: Pairs, kept: list[int]) -> np.ndarray:
    """Cosine of picture and caption of each pair, [len(kept)]."""
    rows, place = np.unique([pairs.image_number(i) for i in kept], return_inverse=True)
    images = encode_images(clip, lambda k: pairs.image(int(rows[k])), len(rows))
    texts = encode_texts(clip, [pairs.caption(i) for i in kept])
    return (images[place] * texts).sum(dim=1).cpu().numpy()


def read_words(path: str) -> tuple[str, ...]:
    """A word a line; empty lines and lines that begin with # say nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip() and not line.startswith("#"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); expected a word a line") from None


# ------------------------------------------------------------------------------------------------------------
# the commands


def rewrite(args: argparse.Namespace, layout: str, chosen: str = "", rules: Rules = Rules(), resize: int = 0):
    """Every split of a source to a new folder: the split `chosen` by these rules, the others without what is
    broken. Beside shards, splits to measure on are TSV + JSONL: there a caption has all its pictures."""
    out = os.path.normpath(args.out)
    if os.path.exists(out):
        raise DataError(f"{out}: already there; name a new folder")
    splits = [split for split in SPLITS if layout_of(args.source, split) not in ("", "scenes")]
    if args.source.endswith(".tar"):
        splits = ["train"]  # a pattern has no splits
    if not splits:
        open_pairs(args.source, "train")  # says what is missing
        raise DataError(f"{args.source}: drawn as they are asked for; there is nothing to write")
    if chosen and chosen not in splits:
        raise DataError(f"{args.source}: no split {chosen!r} in it; there are {', '.join(splits)}")
    partial, reports = f"{out}.partial", {}
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        for split in splits:
            try:
                pairs = opened(args.source, split)
            except DataError as error:
                if split == "train":
                    raise
                print(f"{split} is left out: {error}")  # MUGE's test split has no answers
                continue

            def picture(row: int, pairs: Pairs = pairs) -> bytes:
                return resized(pairs.picture(row), resize) if resize else pairs.picture(row)

            way = "official" if split != "train" and layout == "shards" else layout  # a key has one caption
            rules_here = rules if split == chosen else Rules()
            kept, reports[split] = take(args.source, split, rules_here, args.workers)
            print_report(split, reports[split])
            if not kept:
                raise DataError(f"{args.source}: no pair of {split} stays; above is which rule took them")
            WRITERS[way](partial, split, pairs, kept, picture)
        write_json(os.path.join(partial, "report.json"), reports)
        os.rename(partial, out)
    finally:  # nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {sum(report['kept'] for report in reports.values()):,} pairs")


def print_report(split: str, report: dict):
    print(f"{split}: {report['pairs']:,} pairs")
    for rule, count in report["taken"].items():
        print(f"   {count:>9,}  {rule}")
    print(f"   {report['kept']:>9,}  stay")
    if "scores" in report:
        print("   scores, percentiles: " + ", ".join(f"{q} {s:.2f}" for q, s in report["scores"].items()))


def add_filter(parser: argparse.ArgumentParser):
    parser.add_argument("--split", default="train", help="which split the rules are for; others stay whole")
    parser.add_argument("--model", default="", help="score pairs by this weights file or released name")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to score on")
    parser.add_argument("--min-score", type=float, default=0.26, help="least cosine of picture and caption; "
                        "0.26 is the paper's for mCLIP, so look at the percentiles of yours")
    parser.add_argument("--min-chars", type=int, default=5, help="least characters of a caption (paper: 5)")
    parser.add_argument("--max-chars", type=int, default=50, help="most characters of a caption (paper: 50)")
    parser.add_argument("--words", default="", metavar="FILE", help="take captions that hold one of these "
                        "words, a line each: advertising, file names (paper, sec. 2.2)")
    parser.add_argument("--min-side", type=int, default=0, help="least pixels of a picture's shorter side")
    parser.add_argument("--duplicates", default="exact", choices=("none", "exact", "near"),
                        help="of pictures with the same bytes, or of those that look alike, keep the first")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m tools.curate", description=__doc__.split("\n\n")[0].strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help_of = {"check": "what is wrong with a set, and where; exit code 1 if a run would stumble over it",
               "filter": "write a new set without the pairs that a rule takes",
               "pack": "write a set as tar shards", "unpack": "write a set as pictures and a list, or as TSV"}
    added = {name: commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, text in help_of.items()}
    check.add_arguments(added["check"])
    for name in ("filter", "pack", "unpack"):
        added[name].add_argument("source", metavar="SOURCE", help="what train.py --data takes")
        added[name].add_argument("out", metavar="OUT", help="a new folder")
        added[name].add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read")
    add_filter(added["filter"])
    for name in ("pack", "unpack"):
        added[name].add_argument("--resize", type=check.at_least(0), default=0, metavar="N",
                                 help="shrink larger pictures, once, to N pixels at the shorter side (224, "
                                 "or 336), upright; 0: byte for byte")
    added["unpack"].add_argument("--to", default="folder", choices=("folder", "official"),
                                 help="pictures and a list, or TSV + JSONL")
    args = parser.parse_args(argv)
    if args.command == "check":
        sys.exit(check.run(args))
    if args.command == "pack":
        rewrite(args, "shards", resize=args.resize)
    elif args.command == "unpack":
        rewrite(args, args.to, resize=args.resize)
    else:
        rules = Rules(
            args.min_chars, args.max_chars, read_words(args.words) if args.words else (), args.min_side,
            args.duplicates, model.load(args.model, args.device)[0] if args.model else None, args.min_score)
        found = layout_of(args.source, args.split)
        rewrite(args, found if found in WRITERS else "folder", args.split, rules)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # Chinese, and a histogram's blocks, on a terminal without them
    try:
        main()
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
    except (OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}; nothing was written under the final name")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written under the final name")
