"""
A query becomes a unit vector, and the pictures are sorted by their cosine with it.

    雪山下的湖                       a text
    ./cat.jpg                        a picture: more like this; in the page, #7 is the picture of that number
    ./cat.jpg + 雪地 - 2*人          sums, differences and weights; + and - have spaces around them

Shapes: N files, R contents, E joint width, C words.
"""

import functools
import os
import re
import secrets
import threading
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common import UserError
from eval import encode_images, encode_texts, ensemble, sentence_features
from sources.classes import TEMPLATES, read_templates
from sources.pairs import PICTURES, open_image, upright
from tools.search.index import Index

ROWS = 1 << 12  # features turned into float32 at once, in a buffer that fits into a core's cache
RECENT = 1000  # a hit is compared with so many before it
KEPT = 8  # queries whose answers are remembered


class Hit(NamedTuple):
    number: int  # of the picture in the index
    path: bytes
    row: int  # of its feature
    date: float  # seconds since 1970
    score: float  # the cosine, or without a query the date
    file: int  # its place in Search.files
    alike: list[int]  # the numbers of the pictures that are folded into it


def terms(query: str) -> list[tuple[float, str]]:
    """"2*猫 - ./dog.jpg" -> [(2.0, "猫"), (-1.0, "./dog.jpg")]. UserError if a term is empty."""
    first, *rest = re.split(r"(?<!\S)([+＋\-－])(?!\S)", query)
    parts = rest if rest and not first.strip() else ["+", first, *rest]  # "- 人" has nothing before its sign
    result = []
    for sign, words in zip(parts[::2], parts[1::2]):
        weight, word = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\s*[*×])?(.*)", words.strip(), re.DOTALL).groups()
        if not word.strip():
            raise UserError(f"{query!r}: a term is empty; expected words or pictures, such as 沙滩 - 人")
        result.append((float(weight or 1) * (-1 if sign in "-－" else 1), word.strip()))
    return result


def day(text: str, further: int) -> float:
    """2024, 2024-05 or 2024-05-01 -> its first second in local time, in seconds since 1970; further=1: that
    of the next year, month or day."""
    try:
        if not re.fullmatch(r"\d{4}(-\d\d){0,2}", text):
            raise ValueError
        return (np.datetime64(text) + further).astype("datetime64[s]").item().timestamp()
    except (ValueError, AttributeError, OverflowError):  # the last two: beyond the year 9999
        raise UserError(f"{text}: expected a date such as 2024, 2024-05 or 2024-05-01") from None


def nearest(features: np.ndarray, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, E] in float16 and unit vectors [C, E] -> each row's highest cosine and that vector's number
    [R]. A stretch of rows at a time, so that the cosines [R, C] never exist at once."""
    buffer, parts = torch.empty(ROWS, vectors.shape[1]), []
    for start in range(0, len(features) or 1, ROWS):
        rows = torch.from_numpy(features[start : start + ROWS])
        parts.append((buffer[:len(rows)].copy_(rows) @ vectors.T).max(dim=1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


class Ranking:
    """Pictures, the highest score first. They are looked at when they are asked for: those that are gone are
    passed over, and those whose cosine with an earlier hit is at least search.alike are folded into it."""

    def __init__(self, search: "Search", scores: torch.Tensor, by_cosine: bool, by_text: bool):
        """scores [N], -inf for what is to be left out; by_cosine: they are cosines, not dates; by_text: with
        a single text, as those that a threshold was measured on."""
        self.search, self.by_cosine, self.by_text = search, by_cosine, by_text
        self.files, self.features = search.files, search.features  # as they are now; search may replace them
        self.scores, self.order = scores.sort(descending=True)
        self.total, self.next = int((scores > -torch.inf).sum()), 0
        self.hits: list[Hit] = []

    def first(self, count: int) -> list[Hit]:
        """The first so many hits, or all."""
        while len(self.hits) < count and self.next < self.total:
            file, score = self.order[self.next].item(), self.scores[self.next].item()
            number, row, date = self.files[file].item()
            self.next += 1
            path = self.search.index.path(number)
            if path and (twin := self.twin_of(row)):
                twin.alike.append(number)
            elif path:
                self.hits.append(Hit(number, path, row, date, score, file, []))
        return self.hits[:count]

    def twin_of(self, row: int) -> Hit | None:
        """The hit that the content of this row belongs to, if there is one."""
        recent = self.hits[-RECENT:]
        near = self.features[[hit.row for hit in recent]].astype(np.float32) @ self.features[row]
        return recent[near.argmax()] if recent and near.max() >= self.search.alike else None


class Search:
    """An index and a model. One thread at a time may use it."""

    def __init__(self, clip, index: Index, alike: float, paths: bool):
        """alike: for Ranking; paths: may a term be the path of a picture?"""
        self.clip, self.index, self.alike, self.paths = clip, index, alike, paths
        self.lock, self.dropped = threading.Lock(), {}
        self.refresh()

    def refresh(self):
        """Look at the index as it is now."""
        self.files, self.features = self.index.files(self.index.roots), self.index.features()
        self.rows = torch.from_numpy(self.files["row"].copy())
        self.best_word.cache_clear(), self.ranking.cache_clear()

    def drop(self, image: Image.Image) -> str:
        """A picture that is not in the index -> the term that stands for it."""
        term = f"#{secrets.token_hex(3)}x"  # which is no number
        self.dropped[term] = encode_images(self.clip, lambda _: upright(image), 1)[0]
        return term

    def feature_of(self, term: str) -> tuple[torch.Tensor, bool]:
        """-> the unit feature [E] of a text, of #7, a picture of the index, of one that was dropped, or of
        one whose path or file name the term is; and whether it is a text."""
        if self.paths and (re.match(r"(\.\.?|~)?[/\\]", term) or term.rpartition(".")[2].lower() in PICTURES):
            term = self.drop(open_image(os.path.expanduser(term)))
        if term in self.dropped:
            return self.dropped[term], False
        if re.fullmatch(r"#(\d+|[0-9a-f]{6}x)", term):
            number = int(term[1:]) if term[1:].isdigit() else -1
            found = self.files["row"][self.files["number"] == number]
            if not len(found):
                raise UserError(f"{term}: there is no such picture any more; look for it, or drop it, again")
            return torch.from_numpy(self.features[found[0]]).float(), False
        return encode_texts(self.clip, [term])[0], True

    @functools.lru_cache(KEPT)
    def best_word(self, words: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """For every file the cosine of the best of these words, and its number [N], by the mean of all
        prompts."""
        prompts = ensemble(sentence_features(self.clip, list(words), read_templates(TEMPLATES)))  # [C, E]
        scores, best = nearest(self.features, prompts)
        return scores[self.rows], best[self.rows]

    @functools.lru_cache(KEPT)
    def ranking(self, query: str = "", folder: str = "", since: str = "", until: str = "",
                words: tuple[str, ...] = (), word: int = -1) -> Ranking:
        """The pictures nearest to a query, or without one the newest; only those below a folder, from one
        date to another, or whose best of `words` is number `word`."""
        scores, by_text = torch.from_numpy(self.files["date"].copy()), False  # float64, for seconds
        inside = torch.ones(len(scores), dtype=torch.bool)
        if since:
            inside &= scores >= day(since, 0)
        if until:
            inside &= scores < day(until, 1)
        if folder:
            folder = os.fsencode(os.path.expanduser(folder))
            places = [os.path.realpath(os.path.join(root, folder)) for root in self.index.roots]
            if not any(map(os.path.isdir, places)):
                raise UserError(f"{os.fsdecode(folder)}: no such folder; expected one below the indexed ones")
            inside &= torch.from_numpy(np.isin(self.files["number"], self.index.files(places)["number"]))
        if words and word >= 0:
            scores, best = self.best_word(words)
            inside &= best == word
        if query.strip():
            weights, parts = zip(*terms(query))
            features, are_texts = zip(*map(self.feature_of, parts))
            vector, by_text = sum(w * f for w, f in zip(weights, features)), are_texts == (True,)
            if vector.norm() < 1e-3:
                raise UserError(f"{query!r}: the terms cancel each other; nothing is left to look for")
            scores = nearest(self.features, torch.nn.functional.normalize(vector, dim=0)[None])[0][self.rows]
        by_cosine = bool(query.strip() or words and word >= 0)
        return Ranking(self, scores.where(inside, -torch.inf), by_cosine, by_text)
