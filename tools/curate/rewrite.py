"""
Writing a data set to a new folder: in another layout (pictures and a list, TSV + JSONL, or tar shards), with
smaller pictures, without the pairs that break a rule of filter (paper, sec. 2.2), or with a part of train as
its split valid. Pictures keep their names where the layout has names.
"""

import argparse
import base64
import collections
import csv
import functools
import io
import itertools
import json
import os
import re
import shutil
import tarfile

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common import write_json
from eval import encode_images, encode_texts
from sources.augment import as_rgb
from sources.layouts import OfficialPairs, find, open_pairs, splits_of
from sources.pairs import DataError, Pairs, SourceChanged, decode, upright
from tools.curate.check import digest, in_processes

CHUNK = 256  # pictures that a process looks at before it reports
SHARD = 10_000  # pairs in a shard, img2dataset's default

# ------------------------------------------------------------------------------------------------------------
# looking at pictures


opened = functools.lru_cache(maxsize=1)(open_pairs)  # each process opens a split once


def look(source: str, split: str, rows: range) -> list[tuple]:
    """-> for each picture its shorter side, digest, difference hash, mean red, green and blue; zeros if it
    is broken. The 64 bits of the hash say, of 9 x 8 cells, which are brighter than their right neighbours.
    Another size, compression or small changes of colour leave nearly all bits as they are."""
    pairs, found = opened(source, split), []
    for row in rows:
        try:
            content = pairs.picture(row)
            image = decode(content, pairs.place(row))
            small = as_rgb(image).resize((9, 8), Image.Resampling.BOX)
            cells = np.asarray(small.convert("L"), dtype=np.int16)
            bits = np.packbits(cells[:, :-1] > cells[:, 1:])
            colour = np.asarray(small).mean(axis=(0, 1)).astype(int).tolist()
            found.append((min(image.size), digest(content), int.from_bytes(bits.tobytes(), "big"), *colour))
        except SourceChanged:
            raise
        except (DataError, OSError, ValueError):  # the last two for modes that have no RGB, such as LAB
            found.append((0, 0, 0, 0, 0, 0))
    return found


def near_duplicates(hashes: np.ndarray, colours: np.ndarray, distance: int = 3) -> np.ndarray:
    """hashes [N], mean colours [N, 3] -> [N]: for each picture the first one that looks like it, itself if
    none before it does. If two hashes differ in at most three bits, one of their four 16-bit words is equal,
    so only those are compared. Flat pictures all have the hash 0, so the colours must be alike too."""
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


def take(source: str, split: str, rules: argparse.Namespace | None, workers: int):
    """-> (numbers of the pairs that stay; digests of all pictures; how many pairs each rule took, and more).
    The rules, the options of `filter`, apply in the order of `broken_rule`; then duplicates go, then low
    scores. Without rules only what is broken goes."""
    pairs, taken, kept = opened(source, split), collections.Counter(), []
    count = pairs.image_count
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    found = in_processes(functools.partial(look, source, split), chunks, workers)
    bar = tqdm(found, "looking at pictures", len(chunks), unit=f" x {CHUNK}", disable=None)
    looked = np.array([row for part in bar for row in part], dtype=np.uint64)  # [pictures, 6]
    for i in tqdm(range(len(pairs)), "reading captions", disable=None):
        if rule := broken_rule(pairs, i, int(looked[pairs.image_number(i), 0]), rules):
            taken[rule] += 1
        else:
            kept.append(i)
    if rules and rules.duplicates != "none" and kept:  # among the pictures that are left
        rows, place = np.unique([pairs.image_number(i) for i in kept], return_inverse=True)
        if rules.duplicates == "exact":
            _, first, same = np.unique(looked[rows, 1], return_index=True, return_inverse=True)
            first = first[same]  # [pictures]: the first picture with the same bytes
        else:
            first = near_duplicates(looked[rows, 2], looked[rows, 3:])
        stays = (first == np.arange(len(rows)))[place]
        if not stays.all():
            taken[f"{rules.duplicates} duplicate of another picture"] = int((~stays).sum())
        kept = [i for i, stay in zip(kept, stays) if stay]
    report = {"pairs": len(pairs)}
    if rules and rules.clip and kept:
        rows, place = np.unique([pairs.image_number(i) for i in kept], return_inverse=True)
        images = encode_images(rules.clip, lambda k: pairs.image(int(rows[k])), len(rows))
        texts = encode_texts(rules.clip, [pairs.caption(i) for i in kept])
        scores = (images[place] * texts).sum(dim=1).cpu().numpy()  # [kept], cosines of picture and caption
        report["scores"] = {f"{q}%": round(float(np.percentile(scores, q)), 4) for q in range(0, 101, 10)}
        taken[f"score under {rules.min_score}"] = int((scores < rules.min_score).sum())
        kept = [i for i, score in zip(kept, scores) if score >= rules.min_score]
    return kept, looked[:, 1], report | {"taken": dict(taken), "kept": len(kept)}


def broken_rule(pairs: Pairs, i: int, side: int, rules: argparse.Namespace | None) -> str:
    """The first rule that training pair number i breaks, "" if it breaks none. `side` is the shorter side of
    its picture, 0 if that is broken."""
    try:
        caption = pairs.caption(i)
        caption.encode()
    except (DataError, UnicodeEncodeError):  # half a surrogate pair, from broken JSON
        return "caption is no text"
    if not side:
        return "picture cannot be decoded"
    for wrong, rule in () if rules is None else (
            (len(caption) < rules.min_chars, f"fewer than {rules.min_chars} characters"),
            (len(caption) > rules.max_chars, f"more than {rules.max_chars} characters"),
            (any(word in caption for word in rules.words), "a word of the list"),
            (side < rules.min_side, f"picture under {rules.min_side} pixels")):
        if wrong:
            return rule
    return ""


def divide(source: str, pairs: Pairs, kept: list[int], digests: np.ndarray, share: float) -> dict[str, list]:
    """-> {"train", "valid": numbers of pairs}. Pairs that share a picture, by its bytes, or a caption are a
    group and stay together. Groups become valid in an order that depends on the pairs alone, until it has
    this share of them; one that would make it twice that is passed over. DataError under half the share."""
    keys, parent = [(digest(pairs.caption(i)), int(digests[pairs.image_number(i)])) for i in kept], {}

    def group(key: int) -> int:
        while parent.get(key, key) != key:  # few steps, for digests are random
            key = parent[key]
        return key

    for pair in keys:
        low, high = sorted(map(group, pair))
        parent[high] = low
    groups = [group(caption) for caption, _ in keys]
    sizes, wanted, size, valid = collections.Counter(groups), share * len(kept), 0, set()
    for one in sorted(sizes, key=lambda key: digest(str(key))):  # large groups have small keys, so hash again
        if size < wanted and size + sizes[one] <= min(max(1, 2 * wanted), len(kept) - 1):
            size += sizes[one]
            valid.add(one)
    if size < wanted / 2:
        key, count = collections.Counter(itertools.chain(*keys)).most_common(1)[0]
        i = next(i for i, pair in zip(kept, keys) if key in pair)
        raise DataError(
            f"{source}: no {share:g} of it can be split off: pairs that share a picture or a caption stay "
            f"together, here {max(sizes.values()):,} of {len(kept):,}, {count:,} by picture or caption of "
            f"{pairs.place(pairs.image_number(i))}, {pairs.caption(i)[:40]!r}; drop some, or change --valid")
    return {name: [i for i, one in zip(kept, groups) if (one in valid) == (name == "valid")]
            for name in ("train", "valid")}


# ------------------------------------------------------------------------------------------------------------
# writing a split


def file_name(pairs: Pairs, row: int, split: str, content: bytes, taken: dict[str, str]) -> str:
    """The path of a picture in the new folder: its path in the old one, with .jpg behind it if the bytes
    `content` are a new JPEG, or SPLIT/ID. `taken` holds the place of the picture for each path, in small
    letters, and gets this one's."""
    place, name = pairs.place(row), os.path.normpath(str(pairs.image_id(row))).replace(os.sep, "/")
    if not os.path.isfile(place) or os.path.isabs(name) or name.startswith("../"):
        end = f".{ending(content)}"
        safe = re.sub(r"[^\w.-]", "_", name.removesuffix(end)[-80:])  # for any system
        name = f"{split}/{safe}{end}"
    elif not name.lower().endswith((".jpg", ".jpeg")) and content != pairs.picture(row):
        name += ".jpg"
    while taken.setdefault(name.casefold(), place) != place:
        stem, end = os.path.splitext(name)
        name = f"{stem}-{row + 1}{end}"
    return name


def write_official(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}_imgs.tsv and {split}_texts.jsonl. A picture is written once, however many captions it has.
    One without an id gets a number, as the official scripts want it. -> as for `write_shards`"""
    relation = pairs.positives[kept].tolist()
    # a whole split keeps the pictures that no caption names, too: queries search among them
    images = range(pairs.image_count) if len(kept) == len(pairs) else sorted({row for _, row in relation})
    name = pairs.image_id if isinstance(pairs, OfficialPairs) else int
    with open(os.path.join(folder, f"{split}_imgs.tsv"), "wb") as file:
        for row in tqdm(images, f"writing {split}", disable=None):
            file.write(f"{name(row)}\t".encode() + base64.b64encode(picture(row)) + b"\n")
    answers = collections.defaultdict(list)
    for text, image in relation:
        answers[text].append(name(image))
    with open(os.path.join(folder, f"{split}_texts.jsonl"), "w", encoding="utf-8") as file:
        for text, image_ids in answers.items():
            line = {"text_id": pairs.text_id(text), "text": pairs.text(text), "image_ids": image_ids}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return ((row, pairs.image_id(row)) for row in images) if name is int else None


def write_folder(folder: str, split: str, pairs: Pairs, kept: list[int], picture, taken: dict[str, str]):
    """Pictures by their names, and {split}.jsonl with a line for each pair; lines with the same text_id have
    the same caption. taken: as for `file_name`, of all splits."""
    names = {}
    with open(os.path.join(folder, f"{split}.jsonl"), "w", encoding="utf-8") as file:
        for i in tqdm(kept, f"writing {split}", disable=None):
            row = pairs.image_number(i)
            if row not in names:
                content = picture(row)
                names[row] = file_name(pairs, row, split, content, taken)
                path = os.path.join(folder, names[row])
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as image:
                    image.write(content)
            line = {"image": names[row], "text": pairs.caption(i), "text_id": int(pairs.positives[i, 0])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_shards(folder: str, split: str, pairs: Pairs, kept: list[int], picture):
    """{split}-000000.tar ..., SHARD pairs each. A picture with several captions is written with each one.
    -> (KEY, what the source calls the picture) of each pair"""
    for start in tqdm(range(0, len(kept), SHARD), f"writing {split}", disable=None):
        with tarfile.open(os.path.join(folder, f"{split}-{start // SHARD:06}.tar"), "w") as shard:
            for number, i in enumerate(kept[start: start + SHARD], start):
                content = picture(pairs.image_number(i))
                for name, part in ((ending(content), content), ("txt", pairs.caption(i).encode())):
                    member = tarfile.TarInfo(f"{number:09}.{name}")
                    member.size = len(part)
                    shard.addfile(member, io.BytesIO(part))
    return ((f"{number:09}", pairs.image_id(pairs.image_number(i))) for number, i in enumerate(kept))


WRITERS = {"shards": write_shards, "folder": write_folder, "official": write_official}


def ending(picture: bytes) -> str:
    """File extension for these image bytes, which have been decoded before."""
    kind = Image.open(io.BytesIO(picture)).format
    return {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())


def resized(pairs: Pairs, side: int, row: int) -> bytes:
    """Picture number `row` as an upright JPEG whose shorter side has `side` pixels; a smaller one stays as it
    is, and so does any if `side` is 0. The aspect ratio stays: training can still crop before it squashes."""
    picture = pairs.picture(row)
    if side < 1 or min(Image.open(io.BytesIO(picture)).size) <= side:
        return picture
    image, file = as_rgb(upright(decode(picture, "", side))), io.BytesIO()
    ImageOps.cover(image, (side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------
# every split


def rewrite(source: str, out: str, layout: str, workers: int, rules: argparse.Namespace | None = None,
            resize: int = 0, valid: float = 0):
    """Writes every split of a source to a new folder: from the split `rules.split` what the rules leave, from
    the others all that is not broken; this share of train becomes the split valid. If the layout is shards,
    splits to measure on become TSV + JSONL, because a caption of a shard has one picture only."""
    out = os.path.normpath(out)
    if os.path.exists(out):
        raise DataError(f"{out}: already there; name a new folder")
    splits = splits_of(source)
    if not splits:
        open_pairs(source, "train")  # raises a DataError that says what is missing
    if find(source, splits[0])[0] == "scenes":
        raise DataError(f"{source}: these scenes are drawn on demand, so there are no files to rewrite")
    if rules and rules.split not in splits:
        raise DataError(f"{source}: no split {rules.split!r} in it; it has {', '.join(splits)}")
    if valid and ("valid" in splits or "train" not in splits):
        raise DataError(f"{source}: has {', '.join(splits)}; expected a split train, and no split valid yet")
    writers = WRITERS | {"folder": functools.partial(write_folder, taken={})}
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

            chosen = rules if rules and split == rules.split else None
            kept, digests, report = take(source, split, chosen, workers)
            print(f"{split}: {report['pairs']:,} pairs")
            for rule, count in [*report["taken"].items(), ("stay", len(kept))]:
                print(f"   {count:>9,}  {rule}")
            if scores := ", ".join(f"{q} {score:.2f}" for q, score in report.get("scores", {}).items()):
                print(f"   scores, percentiles: {scores}")
            if not kept:
                raise DataError(f"{source}: no pair of {split} stays; the rules above took them")
            parts = {split: kept}
            if valid and split == "train":
                parts = divide(source, pairs, kept, digests, valid)
                print(f"   {len(parts['valid']):>9,}  of these become valid, the others train")
            for name, part in parts.items():
                write = writers["official" if name != "train" and layout == "shards" else layout]
                names = write(partial, name, pairs, part, functools.partial(resized, pairs, resize))
                if names:
                    with open(os.path.join(partial, f"names-{name}.csv"), "w", encoding="utf-8-sig",
                              errors="backslashreplace", newline="") as file:
                        csv.writer(file).writerows(itertools.chain([("picture", "source")], names))
                reports[name] = report | {"kept": len(part)}
        write_json(os.path.join(partial, "report.json"), reports)
        os.rename(partial, out)
    finally:  # nothing half-written is left
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {sum(report['kept'] for report in reports.values()):,} pairs")
