"""
What is asked for becomes a unit vector, and the pictures are sorted by their cosine with it.

    雪山下的湖                       a text
    ./cat.jpg                        a picture: more like this; in the page, #7 is the picture of that number
    ./cat.jpg + 雪地 - 2*人          sums, differences and weights; + and - have spaces around them

Shapes: N files, R contents, E joint width, C words.
"""

import os
import re
import threading
from typing import NamedTuple

import numpy as np
import torch

from common import UserError
from eval import encode_images, encode_texts, ensemble, sentence_features
from sources.classes import TEMPLATES, read_templates
from sources.pairs import open_image, upright
from tools.search.index import Index

ROWS = 1 << 16  # features turned into float32 at once
RECENT = 64  # hits to compare the next one with: near-duplicates have nearly the same cosine
KEPT = 32  # queries whose answers are remembered


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
    parts = re.split(r"(?:^|\s+)([+＋\-－])(?=\s|$)", query.strip())
    parts = parts[1:] if not parts[0] and parts[1:] else ["+", *parts]  # "- 人" has nothing before its sign
    result = []
    for sign, words in zip(parts[::2], parts[1::2]):
        weight, word = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*[*×])?\s*(.*?)\s*", words, re.DOTALL).groups()
        if not word:
            raise UserError(f"{query!r}: a term is empty; expected words or pictures, such as 沙滩 - 人")
        result.append((float(weight or 1) * (-1 if sign in "-－" else 1), word))
    return result


def picture_feature(clip, path: str) -> torch.Tensor:
    """The unit feature [E] of the picture at a path. DataError if there is none."""
    return encode_images(clip, lambda _: upright(open_image(os.path.expanduser(path))), 1)[0]


def day(text: str, further: int) -> float:
    """2024, 2024-05 or 2024-05-01 -> the seconds since 1970 at which that begins here, or with further=1 the
    next such year, month or day."""
    try:
        if not re.fullmatch(r"\d{4}(-\d\d){0,2}", text):
            raise ValueError
        return (np.datetime64(text) + further).astype("datetime64[s]").item().timestamp()
    except ValueError:
        raise UserError(f"{text}: expected a date such as 2024, 2024-05 or 2024-05-01") from None


def cosines(features: np.ndarray, vectors: torch.Tensor) -> torch.Tensor:
    """Rows [R, E] in float16 and unit vectors [C, E] -> their cosines [R, C], a stretch of rows at a time."""
    result = torch.empty(len(features), len(vectors))
    for start in range(0, len(features), ROWS):
        rows = torch.from_numpy(features[start : start + ROWS]).float()
        torch.matmul(rows, vectors.T, out=result[start : start + ROWS])
    return result


class Ranking:
    """Pictures, the highest score first. They are looked at when they are asked for: those that are gone are
    passed over, and those whose cosine with an earlier one is at least search.alike are folded into it."""

    def __init__(self, search: "Search", scores: torch.Tensor, by_cosine: bool):
        """scores [N], -inf for what is to be left out; by_cosine: they are cosines, not dates."""
        self.search, self.by_cosine = search, by_cosine
        self.files, self.features = search.files, search.features  # of now; it may grow
        self.scores, self.order = scores.sort(descending=True)
        self.total, self.next = int((scores > -torch.inf).sum()), 0
        self.hits: list[Hit] = []

    def first(self, count: int) -> list[Hit]:
        """The first so many hits, or all."""
        while len(self.hits) < count and self.next < self.total:
            file, score = self.order[self.next].item(), self.scores[self.next].item()
            self.next += 1
            number, row, date = self.files[file].item()
            path, _ = self.search.index.path(number)
            if path is None:
                continue
            recent = self.hits[-RECENT:]
            near = self.features[[hit.row for hit in recent]].astype(np.float32) @ self.features[row]
            if recent and near.max() >= self.search.alike:
                recent[near.argmax()].alike.append(number)
            else:
                self.hits.append(Hit(number, path, row, date, score, file, []))
        return self.hits[:count]


class Search:
    """An index and a model, and what was asked last. One thread at a time may use it."""

    def __init__(self, clip, index: Index, roots: list[bytes], alike: float, paths: bool):
        """roots: only what is below them; alike: for Ranking; paths: may a term be the path of a picture?"""
        self.clip, self.index, self.roots, self.alike, self.paths = clip, index, roots, alike, paths
        self.lock, self.answers, self.dropped = threading.Lock(), {}, {}
        self.refresh()

    def refresh(self):
        """Look at the index as it is now."""
        self.files, self.features = self.index.files(self.roots), self.index.features()
        self.rows = torch.from_numpy(self.files["row"].copy())
        self.answers.clear()

    def feature_of(self, term: str) -> torch.Tensor:
        """The unit feature [E] of a text, of #7, a picture of the index, of one that was dropped on the page,
        or of one whose path the term is."""
        if term in self.dropped:
            return self.dropped[term]
        if self.paths and (os.path.isfile(term) or re.match(r"(\.\.?|~)?[/\\]", term)):
            return picture_feature(self.clip, term)
        if re.fullmatch(r"#\d+", term):
            found = (self.files["number"] == int(term[1:])).nonzero()[0]
            if not len(found):
                raise UserError(f"{term}: the index has no such picture")
            return torch.from_numpy(self.features[self.files["row"][found[0]]]).float()
        return encode_texts(self.clip, [term])[0]

    def best_word(self, words: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """For every file the best of these words, and its cosine [N], by the mean of all prompts."""
        def compute():
            prompts = ensemble(sentence_features(self.clip, list(words), read_templates(TEMPLATES)))  # [C, E]
            values, places = cosines(self.features, prompts).max(dim=1)
            return places[self.rows], values[self.rows]
        return remember(self.answers, words, compute)

    def ranking(self, query: str = "", folder: str = "", since: str = "", until: str = "",
                words: tuple[str, ...] = (), word: int = -1) -> Ranking:
        """The pictures nearest to a query, or without one the newest; only those below a folder, from one
        date to another, or whose best of `words` is number `word`."""
        def compute():
            scores = torch.from_numpy(self.files["date"].copy())  # seconds need the digits of float64
            inside = torch.ones(len(scores), dtype=torch.bool)
            if since:
                inside &= scores >= day(since, 0)
            if until:
                inside &= scores < day(until, 1)
            if folder:
                path = os.path.realpath(os.path.expanduser(os.fsencode(folder)))
                inside &= torch.from_numpy(np.isin(self.files["number"], self.index.files([path])["number"]))
            if word >= 0:
                best, scores = self.best_word(words)
                inside &= best == word
            if query.strip():
                vector = sum(weight * self.feature_of(term) for weight, term in terms(query))
                if vector.norm() < 1e-3:
                    raise UserError(f"{query!r}: the terms cancel each other; nothing is left to look for")
                vector = torch.nn.functional.normalize(vector, dim=0)
                scores = cosines(self.features, vector[None])[self.rows, 0]
            return Ranking(self, scores.where(inside, -torch.inf), bool(query.strip()) or word >= 0)
        return remember(self.answers, (query, folder, since, until, words, word), compute)


def remember(kept: dict, key, compute):
    """kept[key], computed if it is not there; the oldest of more than KEPT is forgotten."""
    if key not in kept:
        kept[key] = compute()
        if len(kept) > KEPT:
            del kept[next(iter(kept))]
    return kept[key]
