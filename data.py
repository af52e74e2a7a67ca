"""
Captions to token ids, pictures to pixels, and the order in which pairs are seen.

    tokenize(["一只猫"])                  LongTensor [1, 52]: [CLS] 一 只 猫 [SEP] 0 0 ...
    preprocess(image)                     FloatTensor [3, S, S]
    order(pairs, seed, position)          the order of training, a pure function
    batches(Stream(pairs, ...), ...)      the batches of a run, from any step on

Where pairs come from: sources/layouts.py.
"""

import atexit
import functools
import hashlib
import math
import multiprocessing
import os
import random
import signal
import unicodedata
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from sources.augment import as_rgb, augment
from sources.order import order
from sources.pairs import DataError, Pairs, SourceChanged

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, for RGB in 0..1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
DRAFT = 1.12  # pixels a side to decode, in resolutions: crops keep at least 0.9 of a side, and 1 / 0.9 = 1.11
VOCAB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "vocab.txt")  # of Chinese BERT

# ------------------------------------------------------------------------------------------------------------
# text


class CharacterTable(dict):
    """For str.translate, filled as characters turn up: what BERT's basic tokenizer does with each character
    of a text in lower case. `after` False: before accents are split off (controls vanish, white space becomes
    a space, a Chinese character stands alone); True: after it (accents vanish, a punctuation mark stands
    alone). Rules of Google's BERT tokenizer, as the official code uses it."""

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


@functools.lru_cache(maxsize=2**16)  # most words of a Chinese caption are one character, so they come again
def word_ids(word: str) -> list[int]:
    """The tokens of a word."""
    return wordpiece().encode([word], is_pretokenized=True, add_special_tokens=False).ids


def tokenize(texts: str | list[str], context_length: int = 52) -> torch.LongTensor:
    """Captions -> ids [N, context_length]: [CLS] tokens [SEP] and zeros. 52 is the paper's 50 plus the two; a
    longer caption is cut before [SEP]. One Chinese character is one token.

    >>> tokenize("一只猫", 8).tolist()
    [[101, 671, 1372, 4344, 102, 0, 0, 0]]"""
    texts = [texts] if isinstance(texts, str) else texts
    cls, sep = word_ids("[CLS]"), word_ids("[SEP]")
    ids = np.zeros((len(texts), context_length), dtype=np.int64)
    for row, text in zip(ids, texts):
        tokens = [token for word in words(text) for token in word_ids(word)]
        tokens = [*cls, *tokens[: context_length - 2], *sep]
        row[: len(tokens)] = tokens
    return torch.from_numpy(ids)


# ------------------------------------------------------------------------------------------------------------
# pictures


def preprocess(image: Image.Image, resolution: int = 224) -> torch.FloatTensor:
    """PIL image of any mode and size -> [3, S, S], CLIP's mean and std taken out. The picture is squashed to
    a square, not cropped: that is how every Chinese CLIP was trained and measured (OpenAI's crops)."""
    return to_pixels(squash(image, resolution))


def squash(image: Image.Image, resolution: int) -> torch.Tensor:
    """PIL image -> its bytes [3, S, S], 0 to 255: what a loader sends to a device, a quarter of the size."""
    image = as_rgb(image)
    if image.size != (resolution, resolution):
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(picture: torch.Tensor) -> torch.FloatTensor:
    """Bytes [..., 3, S, S] -> pixels with CLIP's mean and std taken out, on the device where they are."""
    mean, std = pixel_statistics(picture.device)
    # (x / 255 - mean) / std, in one piece of memory
    return picture.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def on_device(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a loader gives -> pixels, or features of a frozen tower, on the device."""
    pictures = pictures.to(device, non_blocking=True)
    return to_pixels(pictures) if pictures.dtype == torch.uint8 else pictures


@functools.cache  # made once: a copy to a GPU at every step would make the CPU wait for it
def pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-> mean and standard deviation of the channels, [3, 1, 1] both."""
    return tuple(torch.tensor(x, device=device)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))


# ------------------------------------------------------------------------------------------------------------
# the order of training


class Sample(NamedTuple):
    picture: torch.Tensor  # bytes [3, S, S], or features [E] that a frozen tower gave before
    caption: str
    keys: tuple[int, int]  # numbers of the picture and of the caption: equal where these are
    problems: list[str]  # what was wrong with pairs skipped on the way


class Batch(NamedTuple):
    pictures: torch.Tensor  # bytes [b, 3, S, S] or features [b, E]
    ids: torch.LongTensor  # [b, T]
    keys: torch.LongTensor  # [b, 2]
    problems: list[str]


class Stream(torch.utils.data.Dataset):
    """Training samples by position. Order, augmentation and the replacement of broken samples are functions
    of (seed, position) alone, whatever the workers, ranks and restarts. With `features` (training/cache.py), a picture
    is one of its cached views."""

    def __init__(self, pairs: Pairs, seed: int, resolution: int, augment: str, features=None):
        self.pairs, self.seed, self.resolution, self.augment = pairs, seed, resolution, augment
        self.features = features

    def index(self, position: int) -> int:
        """Which training pair stands at this position."""
        return order(self.pairs, self.seed, position)

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

    def pair(self, index: int, position: int) -> tuple[torch.Tensor, str]:
        """Picture and caption of a training pair, as seen at this position."""
        if self.features is not None:
            row = self.features.view(position // len(self.pairs), self.pairs.image_number(index))
            if row.isfinite().all():
                return row, self.pairs.caption(index)
            number = self.pairs.image_number(index)
            self.pairs.image(number)  # says what is wrong with it
            raise DataError(f"picture {number} can be read now, but could not when its features were cached; "
                            "delete features.* in --out to encode it")
        image, caption = self.pairs.pair(index, math.ceil(DRAFT * self.resolution))
        image = augment(image, self.resolution, self.augment, random.Random(f"{self.seed} {position}"))
        return squash(image, self.resolution), caption

    def __getitem__(self, position: int) -> Sample:
        """A broken pair is replaced by one from anywhere in the set, by a hash of seed and position. Its
        neighbour in the order would be the same batch's next pair: a twin there is a false negative. A
        hundred broken ones mean that the data set is broken, not a pair."""
        index, problems = self.index(position), []
        others = random.Random(f"{self.seed} instead of {position}")
        while len(problems) < 100:
            try:
                picture, caption = self.pair(index, position)
                return Sample(picture, caption, self.keys(index, caption), problems)
            except SourceChanged:
                raise
            except DataError as error:
                problems.append(str(error))
                index = others.randrange(len(self.pairs))
        raise DataError(f"100 broken pairs for one position, the last: {problems[-1]}")


def collate(samples: list[Sample], context_length: int) -> Batch:
    pictures, captions, keys, problems = zip(*samples)
    ids = tokenize(list(captions), context_length)
    return Batch(torch.stack(pictures), ids, torch.tensor(keys), sum(problems, []))


def first_position(step: int, batch_size: int, count: int) -> int:
    """Where the positions of a step begin. Batches follow one another; one that is larger than the set of
    `count` pairs begins with an epoch, and so holds each pair as often as any other, or once more."""
    epochs = math.ceil(batch_size / count)
    return step * (batch_size if epochs == 1 else epochs * count)


class Chunks(torch.utils.data.Sampler):
    """The positions of each chunk of a run, one after the other: a run of weeks has millions of them."""

    def __init__(self, batch_size: int, steps: range, rank: int, share: int, chunk: int, count: int):
        self.batch_size, self.steps, self.rank, self.share, self.chunk = batch_size, steps, rank, share, chunk
        self.count = count

    def __len__(self) -> int:
        return len(self.steps) * math.ceil(self.share / self.chunk)

    def __iter__(self):
        for step in self.steps:
            start = first_position(step, self.batch_size, self.count) + self.rank * self.share
            for i in range(0, self.share, self.chunk):
                yield range(start + i, start + min(i + self.chunk, self.share))


def batches(
    stream: Stream, batch_size: int, steps: range, context_length: int, workers: int,
    rank: int = 0, world_size: int = 1, chunk: int = 0,
):
    """A loader of this rank's share of the global batches of `steps`, in chunks (0: in one): rank r gets rows
    r*b to (r+1)*b, b = B / world_size, so that gathered features stand in the same order for any number of
    ranks."""
    share = batch_size // world_size
    chunk = chunk or share
    sampler = Chunks(batch_size, steps, rank, share, chunk, len(stream.pairs))
    return Loader(
        stream, num_workers=workers, batch_sampler=sampler,
        collate_fn=functools.partial(collate, context_length=context_length),
        pin_memory=torch.cuda.is_available())


class Loader(torch.utils.data.DataLoader):
    """One whose workers do not answer Ctrl-C and SIGTERM, which reach every process of a run: the training
    process answers them alone. It needs its workers until the step is done, and ends them itself."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, worker_init_fn=ignore_signals, **named)

    def __iter__(self):
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):  # Windows has no such mask
            return super().__iter__()
        atexit.unregister(end_workers)  # so that it is there once, and called before multiprocessing's own
        atexit.register(end_workers)
        # until a forked worker ignores signals, it is deaf to them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # inherited
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At the end of a process, for workers whose loader an error left open: multiprocessing would end them by
    a SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch calls their end an error
    for child in multiprocessing.active_children():
        if child.daemon:  # as a loader's workers are
            child.kill()


def repeats(stream: Stream, batch_size: int, batches: int = 8) -> tuple[float, float]:
    """-> (share of the pairs of a batch whose picture or caption another pair of it has, the loss below which
    one-hot targets then cannot come), over the first batches. n equal captions cannot be told apart, so each
    gets at most 1/n: ln n."""
    shared, floors = [], []
    for step in range(batches):
        first = first_position(step, batch_size, len(stream.pairs))
        indices = [stream.index(first + i) for i in range(batch_size)]
        keys = [stream.keys(i, caption) for i in indices if (caption := stream.readable(i))]
        keys = torch.tensor(keys, dtype=torch.long).view(-1, 2)
        if not len(keys):
            continue
        counts = [column.unique(return_inverse=True, return_counts=True)[1:] for column in keys.T]
        counts = torch.stack([count[inverse] for inverse, count in counts], dim=1)  # [B, 2]
        shared.append((counts > 1).any(dim=1).float().mean().item())
        floors.append(counts.float().log().mean(dim=0).max().item())
    return sum(shared) / batches, sum(floors) / batches
