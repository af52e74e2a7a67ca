"""Data sets of every layout, right ones and ones with every fault."""

import base64
import io
import json
import os

import numpy as np
import pytest
from conftest import array, noise, says
from PIL import Image

from sources import layouts
from sources import pairs as pairs_module
from sources.pairs import decode


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "CACHE", str(tmp_path / "cache"))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------
# data sets that are right


def write_official(folder, pictures: list[tuple], captions: list, split: str = "train"):
    """pictures: (id, base64 as bytes); captions: objects, or lines as they are."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{split}_imgs.tsv"), "wb") as file:
        file.writelines(str(image_id).encode() + b"\t" + text + b"\n" for image_id, text in pictures)
    with open(os.path.join(folder, f"{split}_texts.jsonl"), "w", encoding="utf-8") as file:
        for line in captions:
            file.write((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n")
    return str(folder)


def write_folder(folder, list_name: str, text: str, pictures=("a.png", "b.png")) -> str:
    os.makedirs(folder / "pictures", exist_ok=True)
    for seed, name in enumerate(pictures):
        noise(9, 7, seed).save(folder / "pictures" / name)
    (folder / list_name).write_bytes(text.encode("utf-8"))
    return str(folder)


PICTURES = [noise(12, 10, seed) for seed in range(4)]
BASE64 = [base64.b64encode(encoded(image)) for image in PICTURES]
CAPTIONS = [
    {"text_id": 1, "text": "甲", "image_ids": [7]},
    {"text_id": 2, "text": "乙", "image_ids": ["a-b", 7]},
    {"text_id": "t3", "text": "丙", "image_ids": []},
    {"text_id": 4, "text": "丁，“丁”", "image_ids": ["99", "深"]},
]


def write_good(folder) -> str:
    urlsafe = base64.urlsafe_b64encode(encoded(PICTURES[1]))
    assert b"-" in urlsafe or b"_" in urlsafe
    pictures = [(7, BASE64[0]), ("a-b", urlsafe), ("99", urlsafe.rstrip(b"=")), ("深", BASE64[3])]
    return write_official(folder, pictures, [*CAPTIONS, ""])  # with a blank last line


def same_picture(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(array(a.convert("RGB")), array(b))


def test_the_official_layout(tmp_path):
    pairs = layouts.open_pairs(write_good(tmp_path / "set"), "train")
    assert pairs.texts == ["甲", "乙", "丙", "丁，“丁”"]
    assert pairs.positives.tolist() == [[0, 0], [1, 1], [1, 0], [3, 2], [3, 3]]
    assert pairs.image_count == 4 and len(pairs) == 5
    for row, expected in enumerate((0, 1, 1, 3)):
        assert same_picture(pairs.image(row), PICTURES[expected])
    image, caption = pairs.pair(2)
    assert caption == "乙" and same_picture(image, PICTURES[0])


@pytest.mark.parametrize("ending", (b"", b"\r\n", b"\n\n"))
def test_any_line_ending_will_do(tmp_path, ending):
    folder = write_good(tmp_path / "set")
    path = tmp_path / "set" / "train_imgs.tsv"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"\r\n") if ending == b"\r\n" else whole.rstrip(b"\n") + ending)
    pairs = layouts.open_pairs(folder, "train")
    assert pairs.image_count == 4
    assert all(same_picture(pairs.image(row), PICTURES[i]) for row, i in enumerate((0, 1, 1, 3)))


def test_index_is_built_once_and_again_when_the_file_changes(tmp_path):
    folder, cache = write_good(tmp_path / "set"), tmp_path / "cache"
    layouts.open_pairs(folder, "train")
    built = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len([path for path in built if path.is_dir()]) == 1
    again = layouts.open_pairs(folder, "train")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == built
    assert same_picture(again.image(3), PICTURES[3])
    # the same size, other offsets: only the time tells
    path = tmp_path / "set" / "train_imgs.tsv"
    lines, time = path.read_bytes().splitlines(keepends=True), path.stat().st_mtime_ns
    path.write_bytes(b"".join(lines[::-1]))
    os.utime(path, ns=(time + 1_000_000, time + 1_000_000))
    changed = layouts.open_pairs(folder, "train")
    assert [changed.image_id(n) for n in range(4)] == ["深", 99, "a-b", 7] and same_picture(changed.image(3), PICTURES[0])
    path.write_bytes(path.read_bytes() + b"new\t" + BASE64[2] + b"\n")
    assert same_picture(layouts.open_pairs(folder, "train").image(4), PICTURES[2])


JSONL = """{"image": "pictures/a.png", "text": "甲"}
{"image": "pictures/b.png", "text": "乙, \\"丙\\""}

{"image": "pictures/a.png", "text": "丁"}
"""
CSV = 'text,note,image\r\n甲,,pictures/a.png\r\n"乙, ""丙""",x,pictures/b.png\r\n丁,,pictures/a.png\r\n'


@pytest.mark.parametrize("mark", ("", "\ufeff"))  # a byte order mark, as Excel writes
@pytest.mark.parametrize("name, text", (("train.jsonl", JSONL), ("train.csv", CSV)))
def test_a_folder_with_a_list_of_captions(tmp_path, name, text, mark):
    pairs = layouts.open_pairs(write_folder(tmp_path, name, mark + text), "train")
    assert pairs.texts == ["甲", '乙, "丙"', "丁"]
    assert pairs.positives.tolist() == [[0, 0], [1, 1], [2, 0]] and pairs.image_count == 2
    assert all(same_picture(pairs.image(row), noise(9, 7, row)) for row in range(2))


# ------------------------------------------------------------------------------------------------------------
# data sets that are wrong


def open_official(tmp_path, pictures=None, captions=None):
    folder = write_official(tmp_path / "set", pictures or [(7, BASE64[0])], captions or CAPTIONS[:1])
    return layouts.open_pairs(folder, "train")


def test_tsv_line_with_one_column(tmp_path):
    path = tmp_path / "set" / "train_imgs.tsv"
    open_official(tmp_path)
    path.write_bytes(path.read_bytes() + b"8 no-tab\n")
    says(lambda: layouts.open_pairs(str(tmp_path / "set"), "train"), "train_imgs.tsv line 2", "8 no-tab")


@pytest.mark.parametrize("image_id", ("", "  ", "i" * 257))
def test_image_id_that_is_none(tmp_path, image_id):
    says(lambda: open_official(tmp_path, [(7, BASE64[0]), (image_id, BASE64[1])]), "train_imgs.tsv line 2", "1 to 256")


def test_image_id_twice(tmp_path):
    pictures = [(7, BASE64[0]), (8, BASE64[1]), (7, BASE64[2])]
    says(lambda: open_official(tmp_path, pictures), "train_imgs.tsv line 3", "7", "line 1")


@pytest.mark.parametrize("fault", ("base64", "length", "no picture", "truncated", "empty"))
def test_picture_that_cannot_be_decoded(tmp_path, fault):
    text = {
        "base64": BASE64[1][:30] + b"!?!?" + BASE64[1][34:],
        "length": BASE64[1].rstrip(b"=")[: 4 * 20 + 1],  # no base64 has 4 n + 1 letters
        "no picture": base64.b64encode("没有图".encode() * 20),
        "truncated": base64.b64encode(encoded(noise(80, 80), "JPEG")[:1500]),
        "empty": b"",
    }[fault]
    pairs = open_official(tmp_path, [(7, BASE64[0]), ("bad one", text)])
    kind = "base64" if fault in ("base64", "length") else "picture"
    says(lambda: pairs.image(1), "train_imgs.tsv line 2", "bad one", kind)
    assert same_picture(pairs.image(0), PICTURES[0])


# what Pillow's decoders raise; AVIF's a RuntimeError, DDS's a NotImplementedError
ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, NotImplementedError, Image.DecompressionBombError)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_decoder_raises_is_a_data_error(monkeypatch, error):
    def fail(*_, **__):
        raise error("broken")

    monkeypatch.setattr(Image, "open", fail)
    says(lambda: decode(b"", "here"), "here", "broken")


@pytest.mark.parametrize(
    "line, parts",
    (
        ('{"text_id": 3, "text": ', ("line 3",)),  # JSON that ends too early
        ('["text_id", "text"]', ("line 3", "list")),
        ("3", ("line 3", "int")),
        ('{"text_id": 3, "image_ids": [7]}', ("line 3", "'text'")),
        ('{"text": "丙", "image_ids": [7]}', ("line 3", "'text_id'")),
        ('{"text_id": 3, "text": "丙", "image_ids": [7, 8]}', ("line 3", "8", "train_imgs.tsv")),
    ),
)
def test_texts_line_that_is_wrong(tmp_path, line, parts):
    says(lambda: open_official(tmp_path, captions=[*CAPTIONS[:1], "", line]), "train_texts.jsonl", *parts)


@pytest.mark.parametrize("ids", (None, 7, "7"))
def test_image_ids_that_is_no_list(tmp_path, ids):
    captions = [CAPTIONS[0], {"text_id": 3, "text": "丙", "image_ids": ids}]
    says(lambda: open_official(tmp_path, captions=captions), "train_texts.jsonl line 2", "image_ids")


def test_texts_that_are_not_utf8(tmp_path):
    open_official(tmp_path)
    (tmp_path / "set" / "train_texts.jsonl").write_bytes('{"text_id": 1, "text": "甲"}\n'.encode("gbk"))
    says(lambda: layouts.open_pairs(str(tmp_path / "set"), "train"), "train_texts.jsonl line 1")


def test_no_positives_at_all(tmp_path):
    captions = [{"text_id": 1, "text": "甲"}, CAPTIONS[2]]
    says(lambda: open_official(tmp_path, captions=captions), "train_texts.jsonl", "image_ids")


def test_texts_file_missing(tmp_path):
    open_official(tmp_path)
    os.remove(tmp_path / "set" / "train_texts.jsonl")
    says(lambda: layouts.open_pairs(str(tmp_path / "set"), "train"), "train_texts.jsonl")


@pytest.mark.parametrize(
    "kind, text, parts",
    (
        ("csv", "image,words\npictures/a.png,甲\n", ("line 1", "'text'", "words")),
        ("csv", "image,text\npictures/a.png,甲\npictures/c.png,乙\n", ("line 3", "pictures/c.png")),
        ("csv", "image,text\n", ("empty",)),
        ("csv", "text,image\n甲,pictures/a.png\n乙\n", ("line 3",)),  # a row with a cell too few
        ("jsonl", JSONL + '{"image": "pictures/c.png", "text": "乙"}\n', ("line 5", "pictures/c.png")),
        ("jsonl", '{"image": "pictures/a.png"}\n', ("line 1", "'text'")),
        ("jsonl", '{"image": 7, "text": "甲"}\n', ("line 1",)),
        ("jsonl", '{"image": ["pictures/a.png"], "text": "甲"}\n', ("line 1",)),
    ),
)
def test_list_of_captions_that_is_wrong(tmp_path, kind, text, parts):
    folder = write_folder(tmp_path, f"train.{kind}", text)
    says(lambda: layouts.open_pairs(folder, "train"), f"train.{kind}", *parts)


def test_csv_that_is_not_utf8(tmp_path):
    folder = write_folder(tmp_path, "train.csv", "")
    (tmp_path / "train.csv").write_bytes("image,text\npictures/a.png,甲\n".encode("gbk"))
    says(lambda: layouts.open_pairs(folder, "train"), "train.csv")


def test_picture_of_a_folder_that_cannot_be_decoded(tmp_path):
    pairs = layouts.open_pairs(write_folder(tmp_path, "train.jsonl", JSONL), "train")
    (tmp_path / "pictures" / "b.png").write_bytes(b"no picture")
    says(lambda: pairs.image(1), "b.png")


def test_picture_of_a_folder_that_went_away(tmp_path):
    pairs = layouts.open_pairs(write_folder(tmp_path, "train.jsonl", JSONL), "train")
    os.remove(tmp_path / "pictures" / "b.png")
    says(lambda: pairs.image(1), "b.png")


def test_unknown_source_and_split(tmp_path):
    says(lambda: layouts.open_pairs("no/such/set", "train"), "no/such/set")
    says(lambda: layouts.open_pairs(write_good(tmp_path / "set"), "vaild"), str(tmp_path / "set"), "'vaild'")


def test_scenes_have_no_other_split_than_theirs():
    says(lambda: layouts.open_pairs("scenes-zh", "vaild"), "scenes-zh", "'vaild'")


@pytest.mark.parametrize("text", (5, None, ["甲"]))
def test_caption_that_is_no_text_is_named_with_its_file(tmp_path, text):
    lines = [json.dumps({"image": "pictures/a.png", "text": caption}) for caption in ("甲", text)]
    folder = write_folder(tmp_path, "train.jsonl", "\n".join(lines))
    says(lambda: layouts.open_pairs(folder, "train").pair(1), "train.jsonl", "not text")
    captions = [CAPTIONS[0], {"text_id": 2, "text": text, "image_ids": [7]}]
    says(lambda: open_official(tmp_path, captions=captions).pair(1), "train_texts.jsonl", "not text")
