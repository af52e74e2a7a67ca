"""
A set fit to train on (paper, sec. 2.2): look at it, filter it, pack it.

    python curate.py check PATH                       what is wrong with a set, and where (check.py)
    python curate.py filter SOURCE OUT [rules]        a new set without the pairs that a rule takes
    python curate.py pack SOURCE OUT [--resize 224]   a set of any layout -> tar shards
    python curate.py unpack SOURCE OUT                a set of any layout -> pictures and a list, or TSV

SOURCE is what train.py --data takes (sources.py); OUT is a new folder, complete when it is there.
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

import numpy as np
from PIL import Image
from tqdm import tqdm

import check
import model
from eval import encode_images, encode_texts
from pairs import DataError, Pairs, decode
from sources import layout_of, open_pairs
from weights import WeightsError, write_json

SPLITS = ("train", "valid", "test")
SHARD = 10_000  # pairs, img2dataset's default
CHUNK = 256  # pictures that a process looks at before it reports

# ------------------------------------------------------------------------------------------------------------
# writing a split


def write_official(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}_imgs.tsv and {split}_texts.jsonl; a picture once, however many captions it has."""
    relation = pairs.positives[kept].tolist()
    images = sorted({row for _, row in relation})
    with open(os.path.join(folder, f"{split}_imgs.tsv"), "wb") as file:
        for row in tqdm(images, f"writing {split}", disable=None):
            file.write(f"{row}\t".encode() + base64.b64encode(picture(row)) + b"\n")
    answers = collections.defaultdict(list)
    for text, image in relation:
        answers[text].append(image)
    with open(os.path.join(folder, f"{split}_texts.jsonl"), "w", encoding="utf-8") as file:
        for text, image_ids in answers.items():
            line = {"text_id": text, "text": pairs.text(text), "image_ids": image_ids}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_folder(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}/000000000.jpg ... and {split}.jsonl, a line a pair."""
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
            file.write(json.dumps({"image": names[row], "text": pairs.caption(i)}, ensure_ascii=False) + "\n")


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
    return Image.open(io.BytesIO(picture)).format.lower().replace("jpeg", "jpg")


def resized(picture: bytes, side: int) -> bytes:
    """The picture with its shorter side at most `side` pixels, as a JPEG; a smaller one as it is. The shape
    stays, so that training can still crop before it squashes."""
    image = decode(picture, "", side)
    if min(image.size) <= side and min(Image.open(io.BytesIO(picture)).size) <= side:
        return picture
    scale = side / min(image.size)
    size = tuple(max(side, round(length * scale)) for length in image.size)
    file = io.BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------
# looking at pictures


opened = functools.lru_cache(maxsize=1)(open_pairs)  # once in each process


def look(source: str, split: str, rows: range) -> list[tuple]:
    """-> of each picture its shorter side, its digest and its difference hash; side 0 if it is broken."""
    pairs, found = opened(source, split), []
    for row in rows:
        try:
            content = pairs.picture(row)
            image = decode(content, pairs.place(row))
            found.append((min(image.size), check.faults.digest(content), difference_hash(image)))
        except DataError:
            found.append((0, 0, 0))
    return found


def difference_hash(image: Image.Image) -> int:
    """64 bits: is each cell of an 8 x 8 grid brighter than its right neighbour? Size, compression and small
    changes of colour leave nearly all of them as they are."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes(), "big")


def look_at_all(source: str, split: str, workers: int) -> np.ndarray:
    """`look`, by several processes: [N_image, 3]."""
    count = opened(source, split).image_count
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with concurrent.futures.ProcessPoolExecutor(
            workers or 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        mapped = pool.map if workers else map
        found = mapped(functools.partial(look, source, split), chunks)
        bar = tqdm(found, "looking at pictures", len(chunks), unit=f" x {CHUNK}", disable=None)
        return np.array([row for part in bar for row in part], dtype=np.uint64)


def near_duplicates(hashes: np.ndarray, distance: int = 3) -> np.ndarray:
    """hashes [N] -> [N]: the first picture that each is like, itself if there is none before it. Of two
    hashes that differ in at most three bits, one of four 16-bit words is equal: only those are compared."""
    first = np.arange(len(hashes))
    for word in range(4):
        key = (hashes >> np.uint64(16 * word)) & np.uint64(0xFFFF)
        order = np.argsort(key, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            while len(group) > 1:
                one, group = group[0], group[1:]
                alike = np.bitwise_count(hashes[group] ^ hashes[one]) <= distance
                first[group[alike]] = np.minimum(first[group[alike]], one)
                group = group[~alike]
    return first


# ------------------------------------------------------------------------------------------------------------
# the rules


def take(split: str, args: argparse.Namespace) -> tuple[list[int], dict]:
    """-> (numbers of the pairs that stay, how many each rule took and what the scores were like). A pair is
    taken by the first rule that it breaks, in this order."""
    pairs, taken = opened(args.source, split), collections.Counter()
    sides, digests, hashes = look_at_all(args.source, split, args.workers).T
    first_alike = {"none": np.arange(len(digests)), "exact": first_of_equal(digests),
                   "near": near_duplicates(hashes)}[args.duplicates]
    words = read_words(args.words) if args.words else []

    def rule_against(i: int) -> str:
        row = pairs.image_number(i)
        try:
            caption = pairs.caption(i)
        except DataError:
            return "caption is no text"
        if not sides[row]:
            return "picture cannot be decoded"
        if len(caption) < args.min_chars:
            return f"fewer than {args.min_chars} characters"
        if len(caption) > args.max_chars:
            return f"more than {args.max_chars} characters"
        if any(word in caption for word in words):
            return "a word of the list"
        if sides[row] < args.min_side:
            return f"picture under {args.min_side} pixels"
        if first_alike[row] != row:
            return f"{args.duplicates} duplicate of another picture"
        return ""

    kept = []
    for i in tqdm(range(len(pairs)), "reading captions", disable=None):
        if rule := rule_against(i):
            taken[rule] += 1
        else:
            kept.append(i)
    report = {"pairs": len(pairs)}
    if args.model and kept:
        clip, _ = model.load(args.model)
        scores = clip_scores(clip, pairs, kept)
        report["scores"] = {f"{q}%": round(float(np.percentile(scores, q)), 4) for q in range(0, 101, 10)}
        taken[f"score under {args.min_score}"] = int((scores < args.min_score).sum())
        kept = [i for i, score in zip(kept, scores) if score >= args.min_score]
    return kept, report | {"taken": dict(taken), "kept": len(kept)}


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


def read_words(path: str) -> list[str]:
    """A word a line; empty lines and lines that begin with # say nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); expected a word a line") from None


# ------------------------------------------------------------------------------------------------------------
# the commands


NO_RULES = dict(duplicates="none", words="", min_chars=0, max_chars=10**9, min_side=0, model="")


def rewrite(args: argparse.Namespace, layout: str, chosen: str | None, resize: int = 0) -> dict:
    """Every split of a source to a new folder; `take` decides on the split `chosen`, from the others only
    what is broken is left out. -> {split: report}."""
    if os.path.exists(args.out):
        raise DataError(f"{args.out}: already there; name a new folder")
    splits = [split for split in SPLITS if layout_of(args.source, split) not in ("", "scenes")]
    if args.source.endswith(".tar"):
        splits = ["train"]  # a pattern has no splits
    if not splits:
        open_pairs(args.source, "train")  # says what is missing
        raise DataError(f"{args.source}: drawn as they are asked for; there is nothing to write")
    partial, reports = f"{args.out}.partial", {}
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    for split in splits:
        try:
            pairs = opened(args.source, split)
        except DataError as error:
            if split == "train":
                raise
            print(f"{split} is left out: {error}")  # MUGE's test split has no answers
            continue
        rules = args if split == chosen else argparse.Namespace(**vars(args) | NO_RULES)
        kept, reports[split] = take(split, rules)

        def picture(row: int, pairs: Pairs = pairs) -> bytes:
            return resized(pairs.picture(row), resize) if resize else pairs.picture(row)

        if kept:
            WRITERS[layout](partial, split, pairs, kept, picture)
        print_report(split, reports[split])
    write_json(os.path.join(partial, "report.json"), reports)
    os.rename(partial, args.out)
    print(f"{args.out}: {sum(report['kept'] for report in reports.values()):,} pairs, as {layout}")
    return reports


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
    parser = argparse.ArgumentParser("curate.py", description=__doc__.split("\n\n")[0].strip())
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
        added[name].add_argument("--resize", type=int, default=0, metavar="N", help="shrink larger pictures, "
                                 "once, to N pixels at the shorter side (224, or 336); 0: byte for byte")
    added["unpack"].add_argument("--to", default="folder", choices=("folder", "official"),
                                 help="pictures and a list, or TSV + JSONL")
    args = parser.parse_args(argv)
    if args.command == "check":
        sys.exit(check.run(args))
    layout = {"pack": "shards", "unpack": getattr(args, "to", "")}.get(args.command)
    if args.command == "filter":
        found = layout_of(args.source, args.split)
        layout = found if found in WRITERS else "folder"
    rewrite(args, layout, args.split if args.command == "filter" else None, getattr(args, "resize", 0))


if __name__ == "__main__":
    try:
        main()
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; nothing was written under the final name")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written under the final name")
