"""
Writing a data set to a new folder, in another layout: pictures and a list, TSV + JSONL, or tar shards.
"""

import base64
import collections
import io
import json
import os
import shutil
import tarfile

from PIL import Image, ImageOps
from tqdm import tqdm

from common import write_json
from sources.augment import as_rgb
from sources.layouts import find, open_pairs, splits_of
from sources.pairs import DataError, Pairs, decode
from tools.curate.rules import Rules, opened, take

SHARD = 10_000  # pairs in a shard, img2dataset's default

# ------------------------------------------------------------------------------------------------------------
# writing a split


def write_official(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}_imgs.tsv and {split}_texts.jsonl. A picture is written once, however many captions it has."""
    relation = pairs.positives[kept].tolist()
    # a whole split keeps the pictures that no caption names, too: queries search among them
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
    """{split}/000000000.jpg ... and {split}.jsonl with a line for each pair; lines with the same text_id have
    the same caption."""
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
    """{split}-000000.tar ..., SHARD pairs each. A picture with several captions is written with each one."""
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
    """File extension for these image bytes, which have been decoded before."""
    kind = Image.open(io.BytesIO(picture)).format
    return {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())


def resized(picture: bytes, side: int) -> bytes:
    """The picture as an upright JPEG whose shorter side has `side` pixels; a smaller picture stays as it is.
    The aspect ratio stays, so that training can still crop before it squashes."""
    if min(Image.open(io.BytesIO(picture)).size) <= side:
        return picture
    image = ImageOps.exif_transpose(decode(picture, "", side))
    scale = side / min(image.size)
    size = tuple(max(side, round(length * scale)) for length in image.size)
    file = io.BytesIO()
    as_rgb(image).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------
# every split


def rewrite(source: str, out: str, layout: str, workers: int, chosen: str = "", rules: Rules = Rules(),
            resize: int = 0):
    """Writes every split of a source to a new folder: from the split `chosen` what the rules leave, from the
    others all that is not broken. If the layout is shards, splits to measure on become TSV + JSONL, because a
    caption of a shard has one picture only."""
    out = os.path.normpath(out)
    if os.path.exists(out):
        raise DataError(f"{out}: already there; name a new folder")
    splits = splits_of(source)
    if not splits:
        open_pairs(source, "train")  # raises a DataError that says what is missing
    if find(source, splits[0])[0] == "scenes":
        raise DataError(f"{source}: drawn as they are asked for; there is nothing to write")
    if chosen and chosen not in splits:
        raise DataError(f"{source}: no split {chosen!r} in it; it has {', '.join(splits)}")
    partial, reports = f"{out}.partial", {}
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        for split in splits:
            try:
                pairs = opened(source, split)
            except DataError as error:
                if split == "train":
                    raise
                print(f"{split} is left out: {error}")  # MUGE's test split has no answers
                continue

            def picture(row: int, pairs: Pairs = pairs) -> bytes:
                return resized(pairs.picture(row), resize) if resize else pairs.picture(row)

            kept, reports[split] = take(source, split, rules if split == chosen else Rules(), workers)
            print_report(split, reports[split])
            if not kept:
                raise DataError(f"{source}: no pair of {split} stays; the rules above took them")
            write = WRITERS["official" if split != "train" and layout == "shards" else layout]
            write(partial, split, pairs, kept, picture)
        write_json(os.path.join(partial, "report.json"), reports)
        os.rename(partial, out)
    finally:  # nothing half-written is left
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {sum(report['kept'] for report in reports.values()):,} pairs")


def print_report(split: str, report: dict):
    print(f"{split}: {report['pairs']:,} pairs")
    for rule, count in report["taken"].items():
        print(f"   {count:>9,}  {rule}")
    print(f"   {report['kept']:>9,}  stay")
    if "scores" in report:
        print("   scores, percentiles: " + ", ".join(f"{q} {s:.2f}" for q, s in report["scores"].items()))
