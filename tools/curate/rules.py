"""
Which pairs of a data set to drop: the rules of python -m tools.curate filter (paper, sec. 2.2). Several
processes look at the pictures first; then the rules are applied to what they found and to the captions.
"""

import collections
import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

import model
from eval import encode_images, encode_texts
from sources.augment import as_rgb
from sources.layouts import open_pairs
from sources.pairs import DataError, Pairs, SourceChanged, decode
from tools.curate.check import in_processes
from tools.curate.pieces import digest

CHUNK = 256  # pictures that a process looks at before it reports

# ------------------------------------------------------------------------------------------------------------
# looking at pictures


opened = functools.lru_cache(maxsize=1)(open_pairs)  # each process opens a split once


def look(source: str, split: str, rows: range) -> list[tuple]:
    """-> for each picture its shorter side, digest, difference hash, mean red, green and blue; zeros if it
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
        except (DataError, OSError, ValueError):  # the last two for modes that have no RGB, such as LAB
            found.append((0, 0, 0, 0, 0, 0))
    return found


def difference_hash(small: Image.Image) -> int:
    """A picture of 9 x 8 cells -> 64 bits, which say whether each cell is brighter than its right neighbour.
    Another size, compression or small changes of colour leave nearly all bits as they are."""
    cells = np.asarray(small.convert("L"), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes(), "big")


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


@dataclass(frozen=True)
class Rules:
    """Which pairs to drop. The defaults drop only what is broken."""

    min_chars: int = 0
    max_chars: int = 10**9
    words: tuple[str, ...] = ()
    min_side: int = 0
    duplicates: str = "none"
    clip: model.ChineseCLIP | None = None  # to score pairs by
    min_score: float = 0.0


def take(source: str, split: str, rules: Rules, workers: int) -> tuple[list[int], dict]:
    """-> (numbers of the pairs that stay; a report: how many pairs each rule took, percentiles of scores).
    The rules apply in the order of `broken_rule`, then duplicates go, then low scores."""
    pairs, taken, kept = opened(source, split), collections.Counter(), []
    chunks = [range(start, min(start + CHUNK, pairs.image_count)) for start in range(0, pairs.image_count, CHUNK)]
    found = in_processes(functools.partial(look, source, split), chunks, workers)
    bar = tqdm(found, "looking at pictures", len(chunks), unit=f" x {CHUNK}", disable=None)
    looked = np.array([row for part in bar for row in part], dtype=np.uint64)  # [pictures, 6]
    for i in tqdm(range(len(pairs)), "reading captions", disable=None):
        if rule := broken_rule(pairs, i, int(looked[pairs.image_number(i), 0]), rules):
            taken[rule] += 1
        else:
            kept.append(i)
    if rules.duplicates != "none" and kept:  # among the pictures that are left
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
    if rules.clip is not None and kept:
        rows, place = np.unique([pairs.image_number(i) for i in kept], return_inverse=True)
        images = encode_images(rules.clip, lambda k: pairs.image(int(rows[k])), len(rows))
        texts = encode_texts(rules.clip, [pairs.caption(i) for i in kept])
        scores = (images[place] * texts).sum(dim=1).cpu().numpy()  # [kept], cosines of picture and caption
        report["scores"] = {f"{q}%": round(float(np.percentile(scores, q)), 4) for q in range(0, 101, 10)}
        taken[f"score under {rules.min_score}"] = int((scores < rules.min_score).sum())
        kept = [i for i, score in zip(kept, scores) if score >= rules.min_score]
    return kept, report | {"taken": dict(taken), "kept": len(kept)}


def broken_rule(pairs: Pairs, i: int, side: int, rules: Rules) -> str:
    """The first rule that training pair number i breaks, "" if it breaks none. `side` is the shorter side of
    its picture, 0 if that is broken."""
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


def read_words(path: str) -> tuple[str, ...]:
    """The words of a file, one on each line; empty lines and lines that begin with # are left out."""
    try:
        with open(path, encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip() and not line.startswith("#"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as UTF-8 text ({error}); expected one word on each line") from None
