"""
What the model sees of its pairs: captions to ids [B, T], pictures to pixels [B, 3, S, S], pairs to batches.

sources/layouts.py opens a set of pairs, sources/order.py shuffles it, sources/augment.py varies its pictures.
"""

import functools
import hashlib
import math
import os
import random
import string
import unicodedata
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from sources.augment import as_rgb, augment
from sources.order import order
from sources.pairs import DataError, Pairs

# ------------------------------------------------------------------------------------------------------------
# captions to ids, in the three steps of BERT's tokenizer (Devlin et al., 2019):
#     1. lower, clean  "Hello, 世界"          ->  "hello,  世  界 "
#     2. separate      "hello,  世  界 "       ->  "hello ,   世  界 ", which has four words
#     3. WordPiece     hello | , | 世 | 界     ->  8701 | 117 | 686 | 4518

VOCAB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "vocab.txt")  # of Chinese BERT
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
       (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))  # code points of Chinese characters


def clean(char: str) -> str:
    """Step 1: white space becomes a space, a control character vanishes, a Chinese character stands alone."""
    category = unicodedata.category(char)
    if char in "“”":
        return '"'  # The vocabulary has no curly quotes, and the official data sets write straight ones.
    if char in "\t\n\r" or category == "Zs":
        return " "
    if char in "\0\ufffd" or category in ("Cc", "Cf"):
        return ""
    if category == "Cs":
        return "\ue000"  # Half a surrogate pair, from broken JSON, is not text; this letter is [UNK].
    return f" {char} " if any(first <= ord(char) <= last for first, last in CJK) else char


def separate(char: str) -> str:
    """Step 2: an accent vanishes, a punctuation mark stands alone."""
    category = unicodedata.category(char)
    if category.startswith("P") or char in string.punctuation:  # Unicode does not count $ and + as P
        return f" {char} "
    return "" if category == "Mn" else char


class CharacterTable(dict):
    """A table for `str.translate` that asks a function about each new character and remembers the answer. The
    plain "".join(map(function, text)) gives the same and takes nearly twice as long."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __missing__(self, code: int) -> str:
        self[code] = self.function(chr(code))
        return self[code]


CLEAN, SEPARATE = CharacterTable(clean), CharacterTable(separate)


def words(text: str) -> list[str]:
    """Steps 1 and 2: "Hello, 世界" -> ["hello", ",", "世", "界"]."""
    text = text.lower().translate(CLEAN)
    text = unicodedata.normalize("NFD", text)  # é becomes two characters: e and an accent
    return text.translate(SEPARATE).split()


@functools.cache
def wordpiece() -> Tokenizer:
    """Step 3: cut a word into tokens, each as long as possible. A word over 200 characters is [UNK]."""
    return Tokenizer(WordPiece.from_file(VOCAB, unk_token="[UNK]", max_input_chars_per_word=200))


@functools.lru_cache(maxsize=2**16)  # Most words are one Chinese character, so few words make up most text.
def word_ids(word: str) -> list[int]:
    """The ids of a word's tokens: "cats" -> [10165, 8118] for cat and ##s."""
    return wordpiece().encode([word], is_pretokenized=True, add_special_tokens=False).ids


def tokenize(texts: str | list[str], context_length: int = 52) -> torch.LongTensor:
    """Captions -> ids [N, context_length]: [CLS], tokens, [SEP] and zeros. A caption that is too long loses
    its end. 52 is the paper's 50 tokens, [CLS] and [SEP]. One Chinese character is one token.

    >>> tokenize("Hello, 世界", 8).tolist()
    [[101, 8701, 117, 686, 4518, 102, 0, 0]]"""
    texts = [texts] if isinstance(texts, str) else texts
    ids = np.zeros((len(texts), context_length), dtype=np.int64)
    for row, text in zip(ids, texts):
        tokens = [token for word in words(text) for token in word_ids(word)][: context_length - 2]
        row[: len(tokens) + 2] = [*word_ids("[CLS]"), *tokens, *word_ids("[SEP]")]
    return torch.from_numpy(ids)


# ------------------------------------------------------------------------------------------------------------
# pictures to pixels

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green and blue in 0..1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image: Image.Image, resolution: int = 224) -> torch.FloatTensor:
    """PIL image of any mode and size -> normalised pixels [3, S, S]. It is squashed, not cropped, as in every
    Chinese CLIP. Transparency becomes white; preprocess(image.convert("RGB")) shows what lies under it."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"a {type(image).__name__}; expected a picture of PIL, as from Image.open(file)")
    return to_pixels(squash(image, resolution))


def squash(image: Image.Image, resolution: int) -> torch.ByteTensor:
    """PIL image -> bytes [3, S, S], 0 to 255: a quarter of the memory of pixels on the way to a device."""
    image = as_rgb(image).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [S, S, 3] -> [3, S, S]


def to_pixels(pictures: torch.ByteTensor) -> torch.FloatTensor:
    """Bytes [..., 3, S, S] -> pixels (bytes / 255 - mean) / std, on the device where the bytes are."""
    mean, std = pixel_statistics(pictures.device)
    return pictures.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)  # in place, to save memory


@functools.cache  # A copy to a GPU at every step would make the CPU wait for the GPU.
def pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the channels, [3, 1, 1] each."""
    return tuple(torch.tensor(x, device=device)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))


# ------------------------------------------------------------------------------------------------------------
# pairs to batches

DRAFT = 1.12  # A picture is decoded at 1.12 S or more, as augment's crops keep at least 0.9 of its area.


class Sample(NamedTuple):
    picture: torch.Tensor  # bytes [3, S, S], or features [E] of a frozen image tower
    caption: str
    keys: tuple[int, int]  # numbers of picture and caption, by which the loss finds pairs that share one
    problems: list[str]  # what is wrong with the broken pairs that this pair replaces


class Batch(NamedTuple):
    pictures: torch.Tensor  # bytes [b, 3, S, S] or features [b, E]
    ids: torch.LongTensor  # [b, T]
    keys: torch.LongTensor  # [b, 2]
    problems: list[str]


class Stream(torch.utils.data.Dataset):
    """The endless row of training samples. A position counts along this row, over all epochs; an index counts
    the pairs of the set. Order, augmentation and replacements of broken pairs depend on the
    seed and the position alone, so they are the same for any number of workers, ranks and restarts."""

    def __init__(self, pairs: Pairs, seed: int, resolution: int, augmentation: str):
        self.pairs, self.seed, self.resolution, self.augmentation = pairs, seed, resolution, augmentation

    def index(self, position: int) -> int:
        """The number of the training pair at this position."""
        return order(self.pairs, self.seed, position)

    def keys(self, index: int, caption: str) -> tuple[int, int]:
        """A pair's picture number and a hash of its caption."""
        digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return self.pairs.image_number(index), int.from_bytes(digest, "little", signed=True)

    def pair(self, index: int, position: int) -> tuple[torch.Tensor, str]:
        """Picture and caption of a training pair as seen at this position; DataError if they are broken."""
        image, caption = self.pairs.pair(index, math.ceil(DRAFT * self.resolution))
        rng = random.Random(f"{self.seed} {position}")
        return squash(augment(image, self.resolution, self.augmentation, rng), self.resolution), caption

    def __getitem__(self, position: int) -> Sample:
        """The sample at this position. A random pair from the whole set replaces a broken one, not the next
        pair, which would then be in the batch twice. A hundred broken pairs mean that the set is broken."""
        index, problems = self.index(position), []
        others = random.Random(f"{self.seed} instead of {position}")
        while len(problems) < 100:
            try:
                picture, caption = self.pair(index, position)
                return Sample(picture, caption, self.keys(index, caption), problems)
            except DataError as error:
                problems.append(str(error))
                index = others.randrange(len(self.pairs))
        raise DataError(f"100 broken pairs in a row; tools.curate check lists them, such as {problems[-1]}")


def collate(samples: list[Sample], context_length: int) -> Batch:
    """Stack the pictures and keys of samples, tokenize their captions, and join their problems."""
    pictures, captions, keys, problems = zip(*samples)
    ids = tokenize(list(captions), context_length)
    return Batch(torch.stack(pictures), ids, torch.tensor(keys), sum(problems, []))


def first_position(step: int, batch_size: int, pairs: int) -> int:
    """The position at which the batch of a step begins: right after the batch before. Only a batch larger
    than the set waits for the start of an epoch: with 10 pairs and batches of 25, step 1 begins at 30. So it
    contains every pair two or three times."""
    epochs = math.ceil(batch_size / pairs)
    return step * (batch_size if epochs == 1 else epochs * pairs)


def batches(stream: Stream, batch_size: int, steps: range, context_length: int, workers: int, rank: int = 0,
            world_size: int = 1, chunk: int = 0) -> torch.utils.data.DataLoader:
    """A loader over the batches of these steps, which worker processes prepare ahead. Rank r gets rows
    r * B / world_size to (r + 1) * B / world_size, the order in which `gather` joins the features of all
    ranks, in chunks of at most `chunk` pairs (0: in one)."""
    share = batch_size // world_size
    size = chunk or share

    def positions():
        for step in steps:
            start = first_position(step, batch_size, len(stream.pairs)) + rank * share
            for first in range(start, start + share, size):
                yield range(first, min(first + size, start + share))

    return torch.utils.data.DataLoader(
        stream, batch_sampler=positions(), num_workers=workers, pin_memory=torch.cuda.is_available(),
        collate_fn=functools.partial(collate, context_length=context_length))


def on_device(pictures: torch.Tensor, device: torch.device) -> torch.FloatTensor:
    """The pictures of a batch -> pixels [b, 3, S, S] on the device. Features [b, E] stay features."""
    pictures = pictures.to(device, non_blocking=True)
    return to_pixels(pictures) if pictures.dtype == torch.uint8 else pictures
