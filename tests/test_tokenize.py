"""Token ids: examples, and the rules of Google's BERT tokenizer restated independently."""

import functools
import hashlib
import random
import unicodedata

import pytest
import torch
from conftest import ROOT

from data import CLEAN, SEPARATE, clean, separate, tokenize, word_ids, words


def test_worked_example():
    """The three steps, as data.py shows them."""
    cleaned = "Hello, 世界".lower().translate(CLEAN)
    assert cleaned == "hello,  世  界 "  # each Chinese character between spaces
    separated = cleaned.translate(SEPARATE)
    assert separated == "hello ,   世  界 "  # and each punctuation mark
    assert separated.split() == words("Hello, 世界") == ["hello", ",", "世", "界"]
    assert [word_ids(word) for word in ("hello", ",", "世", "界")] == [[8701], [117], [686], [4518]]
    # [CLS], the four words, [SEP] and two zeros
    assert tokenize("Hello, 世界", 8).tolist() == [[101, 8701, 117, 686, 4518, 102, 0, 0]]


def test_a_table_is_the_function_of_each_character():
    text = "Hello, “世界”\t☃ cafe\u0301 \ud83d\x00"
    for _ in range(2):  # filled, then read
        assert text.translate(CLEAN) == "".join(map(clean, text))
        assert text.translate(SEPARATE) == "".join(map(separate, text))


EXAMPLES = {
    "": [101, 102],
    " \n\t ": [101, 102],
    "一只猫": [101, 671, 1372, 4344, 102],
    "两只 cats 在跑": [101, 697, 1372, 10165, 8118, 1762, 6651, 102],  # cat ##s
    "iPhone 15 Pro": [101, 8210, 8115, 8376, 102],
    "2019年12月31日": [101, 9160, 2399, 8110, 3299, 8176, 3189, 102],
    "1,234.5%": [101, 122, 117, 10129, 119, 126, 110, 102],  # every punctuation mark stands alone
    "他说，你好。": [101, 800, 6432, 8024, 872, 1962, 511, 102],
    "unaffable": [101, 163, 8374, 9049, 9609, 102],  # u ##na ##ff ##able, longest match first
    "café naïve": [101, 8377, 11469, 8857, 102],  # cafe na ##ive: accents are stripped
    "İ": [101, 151, 102],  # lower case is i and a combining dot, and the dot goes
    "ΟΔΟΣ": [101, 222, 13383, 13392, 13395, 102],  # a final sigma is ς
    "３个ＡＢＣ": [101, 8031, 702, 8051, 12641, 10675, 102],  # full-width forms stay what they are
    "がぎ": [101, 541, 8816, 102],  # か ##き: voicing marks count as accents
    "“引号”": [101, 107, 2471, 1384, 107, 102],  # as with straight quotes
    '"引号"': [101, 107, 2471, 1384, 107, 102],
    "好👍！": [101, 1962, 8102, 8013, 102],  # this emoji is in the vocabulary
    "☃": [101, 100, 102],  # this one is not: [UNK]
    "好" + "a" * 300 + "坏": [101, 1962, 100, 1776, 102],  # a word over 200 characters is one [UNK]
    "a" * 201: [101, 100, 102],
    "a\x00b\u200bc\ufffdd\x07": [101, 8425, 8168, 102],  # abc ##d: control and format characters vanish
    "红\u00a0苹果": [101, 5273, 5741, 3362, 102],  # a no-break space is a space
    "red\u00a0apple": [101, 9276, 8350, 102],
    "red\u3000apple": [101, 9276, 8350, 102],
    "好\ud83d坏": [101, 1962, 100, 1776, 102],  # half a surrogate pair, from broken JSON
    "[MASK]": [101, 138, 9622, 8998, 140, 102],  # [ ma ##sk ]: a caption cannot write special tokens
}


@pytest.mark.parametrize("text, ids", EXAMPLES.items(), ids=[ascii(text[:12]) for text in EXAMPLES])
def test_example(text, ids):
    assert tokenize(text).tolist() == [ids + [0] * (52 - len(ids))]


def test_two_hundred_letters_are_still_a_word():
    ids = tokenize("a" * 200, 250)[0]
    assert 100 not in ids and (ids != 0).sum() > 50


def test_a_long_caption_is_cut_before_sep():
    ids = tokenize("猫" * 80)
    assert ids.shape == (1, 52) and ids[0].tolist() == [101] + [4344] * 50 + [102]
    assert tokenize("猫" * 80, 8).tolist() == [[101] + [4344] * 6 + [102]]
    assert tokenize("猫" * 6, 8).tolist() == tokenize("猫" * 80, 8).tolist()  # exactly full


def test_a_list_gives_a_row_each_and_a_string_one():
    ids = tokenize(["一只猫", "", "两只 cats 在跑"], 10)
    assert ids.dtype == torch.long and ids.shape == (3, 10)
    assert torch.equal(ids[0:1], tokenize("一只猫", 10)) and torch.equal(ids[1:2], tokenize([""], 10))
    assert tokenize([]).shape == (0, 52)


def test_vocabulary_is_the_official_one():
    content = (ROOT / "assets" / "vocab.txt").read_bytes()
    assert content.count(b"\n") == 21128
    digest = hashlib.sha256(content).hexdigest()
    assert digest == "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c"


# ------------------------------------------------------------------------------------------------------------
# Google's rules, restated


@functools.cache
def vocabulary() -> dict[str, int]:
    return {
        token: i
        for i, token in enumerate((ROOT / "assets" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:21128])
    }


ASCII_SYMBOLS = "$+<=>^`|~"  # Unicode does not call them punctuation, Google does
# Ideographs, extensions A to E, compatibility: whole blocks, unassigned codes included
BLOCKS = "4E00-9FFF 3400-4DBF 20000-2A6DF 2A700-2B73F 2B740-2B81F 2B820-2CEAF F900-FAFF 2F800-2FA1F"


@functools.cache
def ideographs() -> set[int]:
    ends = [[int(end, 16) for end in block.split("-")] for block in BLOCKS.split()]
    return {code for low, high in ends for code in range(low, high + 1)}


def google_words(text: str) -> list[str]:
    """Clean, space out ideographs, split, lower, strip accents, split at punctuation."""
    text = text.lower().replace("“", '"').replace("”", '"')  # the official data preparation
    cleaned = ""
    for char in text:
        kind = unicodedata.category(char)
        if char in " \t\n\r" or kind == "Zs":
            cleaned += " "
        elif char not in "\x00\ufffd" and kind not in ("Cc", "Cf"):
            cleaned += f" {char} " if ord(char) in ideographs() else char
    words = []
    for word in cleaned.split():
        current = ""
        for char in unicodedata.normalize("NFD", word.lower()):
            if unicodedata.category(char) == "Mn":
                continue
            if unicodedata.category(char)[0] == "P" or char in ASCII_SYMBOLS:
                words += [current, char]
                current = ""
            else:
                current += char
        words.append(current)
    return " ".join(words).split()


def google_pieces(word: str) -> list[int]:
    """The longest piece that fits, again and again; [UNK] for the whole word if none does."""
    if len(word) > 200:
        return [100]
    ids, start = [], 0
    while start < len(word):
        pieces = [("##" if start else "") + word[start:end] for end in range(len(word), start, -1)]
        piece = next((piece for piece in pieces if piece in vocabulary()), None)
        if piece is None:
            return [100]
        ids.append(vocabulary()[piece])
        start += len(piece) - 2 * bool(start)
    return ids


def random_texts(count: int) -> list[str]:
    """Runs over mixed alphabets and pieces of the vocabulary, so that words are found and not found."""
    rng = random.Random(0)
    pieces = [token.removeprefix("##") for token in vocabulary()]
    blocks = "20-7E 4E00-9FFF 0-24F 300-3FF 400-6FF 900-EFF 1100-11FF 1E00-206F 20A0-27BF 2E80-33FF 3400-4DBF"
    blocks += " AC00-D7A3 D800-DFFF E000-FFFF 1F300-1FAFF 20000-2FA1F 0-10FFFF"
    stretches = [[int(end, 16) for end in block.split("-")] for block in blocks.split()]

    def run() -> str:
        if rng.random() < 0.5:
            return "".join(
                rng.choice(pieces).upper() if rng.random() < 0.2 else rng.choice(pieces) for _ in range(4)
            )
        low, high = rng.choice(stretches)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 6)))

    return [rng.choice(("", " ")).join(run() for _ in range(rng.randrange(1, 8))) for _ in range(count)]


def test_two_thousand_random_strings_follow_googles_rules():
    texts = random_texts(2000) + [text for text in EXAMPLES if text]
    for text, row in zip(texts, tokenize(texts, 128).tolist(), strict=True):
        ids = [i for word in google_words(text) for i in google_pieces(word)][:126]
        assert row == [101, *ids, 102] + [0] * (126 - len(ids)), ascii(text)
