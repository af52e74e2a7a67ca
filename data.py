"""
Captions to token ids, pictures to pixels, and the order in which pairs are seen.

    tokenize(["一只猫"])                  LongTensor [1, 52]: [CLS] 一 只 猫 [SEP] 0 0 ...
    preprocess(image)                     FloatTensor [3, S, S]
    sample_order(len, seed, epoch)        the order of an epoch, a pure function
    batches(Stream(pairs, ...), ...)      the batches of a run, from any step on

Where pairs come from: sources.py.
"""

import functools
import hashlib
import os
import random
import unicodedata
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from augment import augment
from sources import DataError, Pairs

PIXEL_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)  # CLIP's, for RGB in 0..1
PIXEL_STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
VOCAB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vocab.txt")  # of Chinese BERT

# ------------------------------------------------------------------------------------------------------------
# text


class CharacterTable(dict):
    """For str.translate, filled as characters turn up: what BERT's basic tokenizer does with each. `after`
    False: before lower-casing (controls vanish, white space becomes a space, a Chinese character stands
    alone); True: after it (accents vanish, a punctuation mark stands alone). Rules of Google's BERT
    tokenizer, as the official code uses it."""

    CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))

    def __init__(self, after: bool):
        super().__init__()
        self.after = after

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]

    def rule(self, char: str) -> str:
        category = unicodedata.category(char)
        if self.after:
            if category == "Mn":
                return ""
            ascii_symbol = char.isascii() and not char.isalnum() and not char.isspace() and char.isprintable()
            return f" {char} " if ascii_symbol or category.startswith("P") else char
        if char in "“”":
            # the vocabulary has no curly quotes; the official data sets fold them, its tokenize() forgets to
            return '"'
        if char in "\t\n\r" or category == "Zs":
            return " "
        if char in "\0\ufffd" or category in ("Cc", "Cf"):
            return ""
        if category == "Cs":
            # half a surrogate pair, from broken JSON: no such text, so the word becomes [UNK]
            return "\ue000"
        return f" {char} " if any(low <= ord(char) <= high for low, high in self.CJK) else char


BEFORE, AFTER = CharacterTable(after=False), CharacterTable(after=True)


def words(text: str) -> list[str]:
    """"Hello, 世界" -> ["hello", ",", "世", "界"]: what WordPiece then cuts up."""
    text = text.lower().translate(BEFORE)
    return unicodedata.normalize("NFD", text).translate(AFTER).split()


@functools.cache
def wordpiece() -> Tokenizer:
    """Longest-match-first WordPiece over the 21,128 tokens of Chinese BERT; a word of over 200 characters is
    [UNK]."""
    with open(VOCAB, encoding="utf-8", newline="\n") as file:
        vocab = {line.strip(): i for i, line in enumerate(file)}
    return Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))


def tokenize(texts: str | list[str], context_length: int = 52) -> torch.LongTensor:
    """Captions -> ids [N, context_length]: [CLS] tokens [SEP] and zeros. 52 is the paper's 50 plus the two; a
    longer caption is cut before [SEP]. One Chinese character is one token.

    >>> tokenize("一只猫", 8).tolist()
    [[101, 671, 1372, 4344, 102, 0, 0, 0]]"""
    texts = [texts] if isinstance(texts, str) else texts
    cls, sep = (wordpiece().token_to_id(token) for token in ("[CLS]", "[SEP]"))
    encoded = wordpiece().encode_batch(
        [words(text) for text in texts], is_pretokenized=True, add_special_tokens=False)
    ids = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, caption in zip(ids, encoded):
        tokens = [cls, *caption.ids[: context_length - 2], sep]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


# ------------------------------------------------------------------------------------------------------------
# pictures


def preprocess(image: Image.Image, resolution: int = 224) -> torch.FloatTensor:
    """PIL image of any mode and size -> [3, S, S], CLIP's mean and std taken out. The picture is squashed to
    a square, not cropped: that is how every Chinese CLIP was trained and measured (OpenAI's crops)."""
    image = image.convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, dtype=np.float32) / np.float32(255) - PIXEL_MEAN) / PIXEL_STD  # [h, w, 3]
    return torch.from_numpy(pixels.transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------------------------
# the order of training


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def sample_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` pairs, [count]: a pure function, so that a resumed run needs to know only its
    position."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class Sample(NamedTuple):
    picture: torch.FloatTensor  # pixels [3, S, S], or features [E] that a frozen tower gave before
    caption: str
    keys: tuple[int, int]  # numbers of the picture and of the caption: equal where these are
    problems: list[str]  # what was wrong with pairs skipped on the way


class Batch(NamedTuple):
    pictures: torch.FloatTensor  # [b, 3, S, S] or [b, E]
    ids: torch.LongTensor  # [b, T]
    keys: torch.LongTensor  # [b, 2]
    problems: list[str]


class Stream(torch.utils.data.Dataset):
    """Training samples by position, 0 to infinity: position p is number p mod n of epoch p div n. Order,
    augmentation and the replacement of broken samples are functions of (seed, position) alone, whatever the
    workers, ranks and restarts. With `features` (cache.py), a picture is one of its cached views."""

    def __init__(self, pairs: Pairs, seed: int, resolution: int, augment: str, features=None):
        self.pairs, self.seed, self.resolution, self.augment = pairs, seed, resolution, augment
        self.features = features

    def index(self, position: int) -> int:
        """Which training pair stands at this position."""
        epoch, offset = divmod(position, len(self.pairs))
        return int(sample_order(len(self.pairs), self.seed, epoch)[offset])

    def readable(self, index: int) -> str:
        """The caption of a training pair, "" if it is broken."""
        try:
            return self.pairs.caption(index)
        except DataError:
            return ""

    def keys(self, index: int, caption: str) -> tuple[int, int]:
        """Numbers of the picture and the caption of a training pair."""
        digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return self.pairs.image_number(index), int.from_bytes(digest, "little", signed=True)

    def pair(self, index: int, position: int) -> tuple[torch.FloatTensor, str]:
        """Picture and caption of a training pair, as seen at this position."""
        if self.features is not None:
            row = self.features.view(position // len(self.pairs), self.pairs.image_number(index))
            if row.isfinite().all():
                return row, self.pairs.caption(index)
            number = self.pairs.image_number(index)
            self.pairs.image(number)  # says what is wrong with it
            raise DataError(f"picture {number} can be read now, but could not when its features were cached; "
                            "delete features.* in --out to encode it")
        image, caption = self.pairs.pair(index)
        image = augment(image, self.resolution, self.augment, random.Random(f"{self.seed} {position}"))
        return preprocess(image, self.resolution), caption

    def __getitem__(self, position: int) -> Sample:
        """A broken pair is replaced by the next one of its epoch; a hundred in a row mean that the data set
        is broken, not a pair."""
        count, problems = len(self.pairs), []
        epoch, offset = divmod(position, count)
        while len(problems) < 100:
            index = self.index(epoch * count + (offset + len(problems)) % count)
            try:
                picture, caption = self.pair(index, position)
                return Sample(picture, caption, self.keys(index, caption), problems)
            except DataError as error:
                problems.append(str(error))
        raise DataError(f"100 broken pairs in a row, the last: {problems[-1]}")


def collate(samples: list[Sample], context_length: int) -> Batch:
    pictures, captions, keys, problems = zip(*samples)
    ids = tokenize(list(captions), context_length)
    return Batch(torch.stack(pictures), ids, torch.tensor(keys), sum(problems, []))


def batches(
    stream: Stream, batch_size: int, steps: range, context_length: int, workers: int,
    rank: int = 0, world_size: int = 1, chunk: int = 0,
):
    """A loader of this rank's share of the global batches of `steps`, in chunks (0: in one): rank r gets rows
    r*b to (r+1)*b, b = B / world_size, so that gathered features stand in the same order for any number of
    ranks."""
    share = batch_size // world_size
    chunk = chunk or share
    first = (step * batch_size + rank * share for step in steps)
    return torch.utils.data.DataLoader(
        stream, num_workers=workers,
        batch_sampler=[range(start + i, start + min(i + chunk, share))
                       for start in first for i in range(0, share, chunk)],
        collate_fn=functools.partial(collate, context_length=context_length),
        pin_memory=torch.cuda.is_available())


def repeats(stream: Stream, batch_size: int, batches: int = 8) -> tuple[float, float]:
    """-> (share of the pairs of a batch whose picture or caption another pair of it has, the loss below which
    one-hot targets then cannot come), over the first batches. n equal captions cannot be told apart, so each
    gets at most 1/n: ln n."""
    shared, floors = [], []
    for step in range(batches):
        indices = [stream.index(step * batch_size + i) for i in range(batch_size)]
        keys = [stream.keys(i, caption) for i in indices if (caption := stream.readable(i))]
        keys = torch.tensor(keys, dtype=torch.long).view(-1, 2)
        if not len(keys):
            continue
        counts = [column.unique(return_inverse=True, return_counts=True)[1:] for column in keys.T]
        counts = torch.stack([count[inverse] for inverse, count in counts], dim=1)  # [B, 2]
        shared.append((counts > 1).any(dim=1).float().mean().item())
        floors.append(counts.float().log().mean(dim=0).max().item())
    return sum(shared) / batches, sum(floors) / batches
