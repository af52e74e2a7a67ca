"""python -m tools.curate check: planted faults are found where they are, and nothing else is."""

import argparse
import base64
import io
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, typed, write_tar
from data import Stream, tokenize, word_ids, words
from model import MODELS, ChineseCLIP
from sources import pairs
from sources.layouts import open_pairs, splits_of
from sources.pairs import DataError
from tools.curate import check
from training import report
from training.recipes import Config


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(pairs, "CACHE", str(tmp_path_factory.mktemp("cache")))


def run(path, *options) -> tuple[int, dict]:
    """-> (exit code, what --json writes, by split)."""
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    report = Path(path) / "report.out" if Path(path).is_dir() else Path(path).parent / "report.out"
    code = check.run(parser.parse_args([str(path), "--json", str(report), "--workers", "0", *options]))
    return code, json.loads(report.read_text(encoding="utf-8"))["splits"]


def found(splits: dict, error: bool | None = None) -> set[tuple]:
    """{(kind, file name, line or member)}"""
    return {(kind, Path(place["file"]).name, place.get("line", place.get("member")))
            for split in splits.values() for kind, row in split["kinds"].items()
            if error is None or row["error"] == error for place in row["places"]}


def picture(seed: int, mode: str = "RGB", size=(40, 40), format: str = "PNG", **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise, "RGBA").convert("RGB").convert(mode).save(file, format, **options)
    return file.getvalue()


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(file, "PNG")
    return file.getvalue()


def animated() -> bytes:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def transparent() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (40, 40), (255, 0, 0, 100)).save(file, "PNG")
    return file.getvalue()


def enormous() -> bytes:
    """A small GIF that says it has 60,000 x 60,000 pixels."""
    content = bytearray(picture(0, "P", format="GIF"))
    content[6:10] = (60_000).to_bytes(2, "little") * 2
    return bytes(content)


def sideways(seed: int = 90) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(seed, format="JPEG", exif=exif)


PICTURES = [  # kind of fault or note, a picture that has it
    ("damaged picture", "一只猫".encode()), ("damaged picture", picture(93, format="JPEG")[:-300]),
    ("damaged picture", enormous()), ("CMYK", picture(91, "CMYK", format="JPEG")), ("16 bits", sixteen_bits()),
    ("animated", animated()), ("transparent", transparent()), ("sideways", sideways()),
    ("tiny picture", picture(92, size=(40, 31)))]


def encode(content: bytes) -> bytes:
    return base64.b64encode(content)


def text_line(number: int, **changes) -> dict:
    line = {"text_id": number, "text": f"第{number}句", "image_ids": [number]}
    return {key: value for key, value in (line | changes).items() if value is not None}


def write_lines(path: Path, lines: list[bytes | dict]):
    """Dicts become JSON."""
    dumped = (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
              for line in lines)
    path.write_bytes(b"\n".join(dumped) + b"\n")


def write_clean(folder: Path, split: str = "train", first: int = 0, count: int = 6):
    """The official layout without anything to say."""
    folder.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    write_lines(folder / f"{split}_imgs.tsv", [b"%d\t%s" % (n, encode(picture(n))) for n in numbers])
    write_lines(folder / f"{split}_texts.jsonl", [text_line(n) for n in numbers])


def test_a_wrong_line_is_found_where_it_is(tmp_path, capsys):
    """Six pictures and six captions, then a seventh line that is no JSON."""
    write_clean(tmp_path)
    with open(tmp_path / "train_texts.jsonl", "ab") as file:
        file.write(b'{"text_id": 7, "text": \n')
    code, splits = run(tmp_path)
    assert code == 1 and found(splits) == {("not JSON", "train_texts.jsonl", 7)}
    out = capsys.readouterr().out
    assert "6 pictures, 6 captions, 6 pairs" in out
    assert "ERROR         1  not JSON\n" in out
    assert f"{tmp_path / 'train_texts.jsonl'} line 7: not JSON (Expecting value" in out
    assert "; write one JSON object per line\n" in out


def test_a_clean_set_has_neither_errors_nor_notes(tmp_path, capsys):
    write_clean(tmp_path / "set", "train", 0)
    write_clean(tmp_path / "set", "valid", 100)
    code, splits = run(tmp_path / "set")
    assert code == 0 and found(splits) == set()
    assert (splits["train"]["pictures"], splits["train"]["captions"], splits["train"]["pairs"]) == (6, 6, 6)
    assert splits["train"]["tokens"] == {"5": 6} and splits["train"]["short_sides"] == {"40": 6}
    out = capsys.readouterr().out
    assert "nothing to complain about" in out and "tokens of a caption, percentiles: 0% 5, " in out


# ------------------------------------------------------------------------------------------------------------
# planted faults


def plant_official(folder: Path) -> tuple[set, set]:
    """Writes a set with every fault of this layout -> (errors, notes)."""
    folder.mkdir()
    tsv, jsonl, planted = [], [], {}

    def plant(kind: str, lines: list, line):
        lines.append(line)
        name = "train_imgs.tsv" if lines is tsv else "train_texts.jsonl"
        planted.setdefault(kind, set()).add((kind, name, len(lines)))

    def good(count: int = 1):
        for _ in range(count):
            number = 1000 + len(tsv)
            tsv.append(b"%d\t%s" % (number, encode(picture(number)).translate(bytes.maketrans(b"+/", b"-_"))))
            jsonl.append(text_line(number))

    good(2)
    for number, (kind, content) in enumerate(PICTURES):
        plant(kind, tsv, b"p%d\t%s" % (number, encode(content)))
        jsonl.append(text_line(2000 + number, image_ids=[f"p{number}"]))
        good()
    tsv.append(b"")  # an empty line is no fault, but it is counted
    plant("no id", tsv, b"alone")
    plant("no id", tsv, b"\xff\xfe\x00")
    plant("no id", tsv, b"i" * 257 + b"\t" + encode(picture(3000)))  # one byte too long for a run
    plant("no id", tsv, b"\t" + encode(picture(3001)))
    plant("broken base64", tsv, b"b1\tabc*def")
    plant("broken base64", tsv, b"b2\tabcde")
    plant("id twice", tsv, b"1000\t" + encode(picture(3002)))
    plant("damaged picture", tsv, b"b3\t")
    jsonl.append(text_line(3003, image_ids=["alone", "\ufffd\ufffd\0", "i" * 257, "", "b1", "b2", "b3"]))
    good()
    plant("picture unused", tsv, b"u1\t" + encode(picture(3004)))
    plant("repeated picture", tsv, b"r1\t" + tsv[0].split(b"\t")[1])
    jsonl.append(text_line(3005, image_ids=["r1"]))
    jsonl.append(b"  ")
    for line in (b"{", b"nothing", b'{"text_id": 1, "text": "\x01', b"[" * 100_000, b"\xef\xbb\xbf",
                 b"9" * 5000):
        plant("not JSON", jsonl, line)
    for line in (b'{"text_id": 1, "text": "\xff"}', "长城".encode("gbk"), '{"a": 1}'.encode("utf-16")):
        plant("not UTF-8", jsonl, line)
    for line in (b"[]", b'"text"', b"1", b"null"):
        plant("not JSON", jsonl, line)
    plant("key missing", jsonl, text_line(4001, text_id=None, image_ids=[1000]))
    plant("key missing", jsonl, text_line(4002, text=None, image_ids=[1000]))
    plant("id twice", jsonl, text_line(1000, text="又一句", image_ids=["1000"]))
    plant("image_ids not a list", jsonl, text_line(4003, image_ids="1000"))
    plant("image_ids not a list", jsonl, text_line(4004, image_ids={"a": 1}))
    plant("id not in the TSV", jsonl, text_line(4005, image_ids=[1000, 77777]))
    plant("id not in the TSV", jsonl, text_line(4006, image_ids=[["1000"]]))
    plant("no image_ids", jsonl, text_line(4007, image_ids=[]))
    plant("no image_ids", jsonl, text_line(4008, image_ids=None))
    for number, text in enumerate((5, ["句"], True)):
        plant("not text", jsonl, text_line(5000 + number, text=text, image_ids=[1000]))
    jsonl.append(b'{"text_id": 5100, "text": null, "image_ids": [1000]}')
    planted["not text"].add(("not text", "train_texts.jsonl", len(jsonl)))
    for number, text in enumerate(("", " \t ", "\u200b")):
        plant("blank caption", jsonl, text_line(5200 + number, text=text, image_ids=[1000]))
    plant("long caption", jsonl, text_line(5300, text="长" * 51, image_ids=[1000]))
    jsonl.append(text_line(5301, text="长" * 50, image_ids=[1000]))
    plant("repeated caption", jsonl, text_line(5302, text="第1000句", image_ids=[1000]))
    plant("odd characters", jsonl, text_line(5303, text="猫�", image_ids=[1000]))
    plant("odd characters", jsonl, b'{"text_id": 5304, "text": "\\ud83d!", "image_ids": [1000]}')
    plant("odd characters", jsonl, text_line(5305, text="猫\x07狗", image_ids=[1000]))
    plant("odd characters", jsonl, text_line(5306, text="猫&amp;狗", image_ids=[1000]))
    plant("odd characters", jsonl, text_line(5307, text="猫&#x732B;", image_ids=[1000]))
    plant("tags in the caption", jsonl, text_line(5308, text="小狗/n 在/p 草地/n 上/f", image_ids=[1000]))
    plant("tags in the caption", jsonl, text_line(5309, text="一只:m 狗:n", image_ids=[1000]))
    good(2)
    write_lines(folder / "train_imgs.tsv", tsv)
    write_lines(folder / "train_texts.jsonl", jsonl)
    errors = set().union(*(places for kind, places in planted.items() if kind in check.ERRORS))
    return errors, set().union(*planted.values()) - errors


@pytest.mark.parametrize("piece", (None, 1000))
def test_official_layout(tmp_path, monkeypatch, piece):
    if piece:  # many pieces: lines are numbered across them
        monkeypatch.setattr(check, "TSV_PIECE", piece)
        monkeypatch.setattr(check, "TEXT_PIECE", piece)
    errors, notes = plant_official(tmp_path / "set")
    assert len(errors) >= 30 and len(errors | notes) >= 50
    assert len({kind for kind, *_ in errors | notes}) >= 22
    code, splits = run(tmp_path / "set")
    assert code == 1
    assert found(splits, error=True) == errors
    assert found(splits, error=False) == notes


def list_lines(folder: Path) -> tuple[list, list]:
    """Writes pictures, good and bad -> ([(image, text)] for a JSONL or CSV, [kind of fault or None])."""
    (folder / "sub").mkdir(parents=True)
    lines, kinds = [], []
    for number in range(4):
        (folder / "sub" / f"{number}.png").write_bytes(picture(number))
        lines.append((f"sub/{number}.png", f"第{number}张"))
        kinds.append(None)
    for number, (kind, content) in enumerate(PICTURES):
        (folder / f"p{number}").write_bytes(content)
        lines.append((f"p{number}", f"第{number}类"))
        kinds.append(kind)
    outside, other = folder.parent / "outside.png", folder.parent / "other.png"
    outside.write_bytes(picture(5))
    other.write_bytes(picture(6))
    for name, kind in (("gone.png", "unreadable file"), ("sub", "unreadable file"), ("", "unreadable file"),
                       ("a" * 5000, "unreadable file"), ("\x01", "unreadable file"),
                       ("../outside.png", None), (str(other), None),
                       ("sub\\..\\..\\x", "unreadable file")):
        lines.append((name, f"第{len(lines)}行"))
        kinds.append(kind)
    lines.append(("sub/0.png", "   "))
    kinds.append("blank caption")
    return lines, kinds


def test_folder_with_jsonl(tmp_path):
    lines, kinds = list_lines(tmp_path / "set")
    lines = [{"image": image, "text": text} for image, text in lines]
    for line, kind in (({"image": 7, "text": "数字"}, "not text"),
                       ({"image": "\0", "text": "零"}, "unreadable file"),
                       ({"text": "没有图片"}, "key missing"), ({"image": "sub/1.png"}, "key missing"),
                       (b"{}", "key missing"), (b"\x80", "not UTF-8"), (b"[1]", "not JSON"),
                       (b"x", "not JSON"),
                       (b'{"image": "\\udc80", "text": "a"}', "unreadable file"),
                       ({"image": "sub/1.png", "text": {}}, "not text")):
        lines.append(line)
        kinds.append(kind)
    write_lines(tmp_path / "set" / "valid.jsonl", lines)
    code, splits = run(tmp_path / "set")
    planted = {(kind, "valid.jsonl", at) for at, kind in enumerate(kinds, 1) if kind}
    assert code == 1 and found(splits) == planted


def test_folder_with_csv(tmp_path, monkeypatch):
    lines, kinds = list_lines(tmp_path / "set")
    rows = [b"\xef\xbb\xbftext,image"] + [f'"{text}",{image}'.encode() for image, text in lines]
    kinds = [None, *kinds]
    # line 2 of three lines in one field, which is the last of them to its reader
    for row, kind in ((b'"a\nb\nc",sub/2.png', None), (b"\xc3\xa8\xff,sub/3.png", "not UTF-8"),
                      ("长城".encode("gbk") + b",sub/3.png", "not UTF-8"), (b"alone", "not text"),
                      (b'"' + b"x" * 140_000 + b'",sub/3.png', "not CSV"),
                      (b"last,sub/3.png,too,many", "not CSV")):
        rows.append(row)
        kinds += [None] * row.count(b"\n") + [kind]
    write_lines(tmp_path / "set" / "valid.csv", rows)
    code, splits = run(tmp_path / "set")
    assert code == 1
    assert found(splits) == {(kind, "valid.csv", at) for at, kind in enumerate(kinds, 1) if kind}


@pytest.mark.parametrize("content", (b"", b"picture,caption\na.png,a\n", b"\x00\xff", b"image\na.png\n"))
def test_csv_without_its_columns(tmp_path, content):
    (tmp_path / "train.csv").write_bytes(content)
    kind = "not UTF-8" if b"\xff" in content else "key missing"
    assert found(run(tmp_path)[1]) == {(kind, "train.csv", 1), ("no pairs", "train.csv", None)}


def test_csv_without_rows(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"image,text\n")
    assert found(run(tmp_path)[1]) == {("no pairs", "train.csv", None)}


def plant_shards(folder: Path) -> set:
    folder.mkdir()
    link, device, up = (tarfile.TarInfo(name) for name in ("l.jpg", "d.jpg", "e.jpg"))
    link.type, device.type, up.type = tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE
    link.linkname = "/etc/passwd"
    caption = "一只猫".encode()
    members = [
        ("a/0.png", picture(0)), ("a/0.txt", "猫零".encode()), ("a/1.JPEG", picture(1, format="JPEG")),
        ("a/1.json", json.dumps({"caption": "猫一"}).encode()), ("notes.md", b"x"), ("a/0.cls", b"7"),
        ("t.txt", "先有文字".encode()), ("t.webp", picture(2, format="WEBP")), ("t.json", b"broken, but unused"),
        ("only.png", picture(3)), ("words.txt", caption), ("words2.json", b"{}"),
        ("j.png", picture(4)), ("j.json", b'{"text": "a"}'), ("k.png", picture(5)), ("k.json", b"{"),
        ("m.png", picture(6)), ("m.json", b"[]"), ("n.png", picture(7)), ("n.txt", b"\xff"),
        ("o.png", picture(8)), ("o.txt", b"\n"), ("q.png", picture(9)), ("q.json", b'{"caption": null}'),
        ("a/0.jpg", picture(10, format="JPEG")), ("a/0.txt", "又一个零".encode()),
        ("../up.png", picture(11)), ("/root.txt", caption), ("a/../../b.txt", caption), link, device, up,
        ("长" * 80 + ".png", picture(12)), ("长" * 80 + ".txt", "长名字".encode()),
    ]
    planted = [
        ("half a pair", "only.png"), ("half a pair", "words.txt"),
        ("half a pair", "words2.json"), ("key missing", "j.json"),
        ("not JSON", "k.json"), ("not JSON", "m.json"), ("not UTF-8", "n.txt"),
        ("blank caption", "o.txt"), ("not text", "q.json"),
        ("id twice", "a/0.jpg"), ("id twice", "a/0.txt"), ("unsafe member", "../up.png"),
        ("unsafe member", "/root.txt"), ("unsafe member", "a/../../b.txt"), ("unsafe member", "l.jpg"),
        ("unsafe member", "d.jpg")]
    for number, (kind, content) in enumerate(PICTURES):
        members += [(f"p{number}.jpg", content), (f"p{number}.txt", f"第{number}类".encode())]
        planted.append((kind, f"p{number}.jpg"))
    write_tar(folder / "train-00.tar", members)
    write_tar(folder / "train-01.tar", [("z.png", picture(50)), ("z.txt", "长名字".encode()),
                                        ("y.png", picture(12)), ("y.txt", "另一个".encode())])
    places = {(kind, "train-00.tar", name) for kind, name in planted}
    places |= {("repeated caption", "train-01.tar", "z.txt"), ("repeated picture", "train-01.tar", "y.png")}
    whole = (folder / "train-01.tar").read_bytes()
    (folder / "train-02.tar").write_bytes(b"damaged shard" * 1000)
    (folder / "train-03.tar").write_bytes(b"")
    write_tar(folder / "train-04.tar",
              [("w.png", picture(51)), ("w.txt", "剪断".encode()), ("x.png", picture(52))])
    cut = (folder / "train-04.tar").read_bytes()
    (folder / "train-04.tar").write_bytes(cut[: cut.index(b"x.png") + 1000])
    write_tar(folder / "train-05.tar", [("s.png", picture(53)), ("s.txt", "乱码".encode())])
    cut = (folder / "train-05.tar").read_bytes()
    end = cut.index("乱码".encode()) + 512
    (folder / "train-05.tar").write_bytes(cut[:end] + b"garbage" * 1000)
    (folder / "train-06.tar").write_bytes(whole[:512])
    return places | {
        ("damaged shard", "train-02.tar", ""), ("damaged shard", "train-03.tar", ""),
        ("damaged shard", "train-04.tar", "x.png"), ("damaged shard", "train-05.tar", "s.txt"),
        ("damaged shard", "train-06.tar", "z.png"), ("unreadable file", "train-07.tar", "")}


def test_shards(tmp_path):
    planted = plant_shards(tmp_path / "set")
    code, splits = run(tmp_path / "set" / "train-{00..07}.tar")
    got = {(kind, file, at or "") for kind, file, at in found(splits)}
    assert code == 1 and got == planted
    assert not (tmp_path / "up.png").exists()


def test_a_header_that_goes_back_does_not_hang(tmp_path):
    """A negative size (CVE-2025-8194) has tarfile read the same member for ever."""
    info = tarfile.TarInfo("a.png")
    header = bytearray(info.tobuf())
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    good = tarfile.TarInfo("0.png")
    (tmp_path / "train.tar").write_bytes(good.tobuf() + bytes(header) + bytes(2048))
    assert ("damaged shard", "train.tar", "a.png") in found(run(tmp_path)[1])


# ------------------------------------------------------------------------------------------------------------
# the verdict


def write_photos(folder: Path, split: str, count: int) -> str:
    """Pictures and a list of `count` pairs, none like another."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        (folder / f"{split}{n}.png").write_bytes(picture(n + 1000 * len(split) + 5000 * (split == 'valid')))
    write_lines(folder / f"{split}.jsonl",
                [{"image": f"{split}{n}.png", "text": f"{split}的第{n}张"} for n in range(count)])
    return str(folder)


def test_a_set_that_train_py_takes(tmp_path, capsys):
    folder = write_photos(tmp_path / "my photos", "train", 12)
    write_photos(tmp_path / "my photos", "valid", 3)
    assert run(folder, "--batch-size", "4")[0] == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "0.0% of a batch of 4 share picture or caption with another",
        "train.py would take this set",
        "next: python train.py --recipe scratch --model RN-mini --batch-size 4 "
        f"--data '{folder}' --out out/'my photos'"]


def test_a_set_without_valid_is_refused_as_train_py_refuses_it(tmp_path, capsys):
    folder = write_photos(tmp_path / "my photos", "train", 12)
    with pytest.raises(DataError, match="no split 'valid' in it"):
        open_pairs(folder, "valid")
    code, splits = run(folder)
    assert code == 1 and found(splits) == set()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "train.py would refuse this set without --valid-data: it has no split valid to measure on",
        f"next: python -m tools.curate split '{folder}' '{folder}-split' --valid 0.1"]
    assert run(folder, "--split", "train")[0] == 0  # nothing is said of the others
    assert "train.py" not in capsys.readouterr().out


def test_a_pattern_of_shards_needs_valid_data(tmp_path, capsys):
    for n in range(2):
        write_tar(tmp_path / f"train-{n}.tar", [(f"{n}.png", picture(n)), (f"{n}.txt", f"第{n}张".encode())])
    pattern = str(tmp_path / "train-{0..1}.tar")
    assert run(pattern, "--batch-size", "2")[0] == 0
    said = capsys.readouterr().out.splitlines()
    assert "without --valid-data" in said[-2] and f"--data '{pattern}' --out out/shards --valid-data SET" in said[-1]
    assert run(tmp_path)[0] == 1  # as a folder it could have a split valid


def test_a_set_to_measure_on_is_no_error(tmp_path, capsys):
    folder = write_photos(tmp_path / "set", "test", 3)
    assert run(folder)[0] == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "no split train in it: this set is there to measure on",
        f"next: python eval.py retrieval --model ViT-B-16 --data {folder} --split test"]


@pytest.mark.parametrize("split, fault, stops", (
    ("train", "picture", ""), ("train", "blank", ""), ("train", "list", "train.jsonl line 4: not JSON"),
    ("valid", "picture", "damaged picture in valid"), ("valid", "blank", ""),
    ("valid", "list", "valid.jsonl line 4: not JSON")))
def test_what_stops_a_run_and_what_it_skips(tmp_path, capsys, split, fault, stops):
    """docs/data.md says it: a structural fault stops a run, a broken pair is skipped in training alone."""
    folder = tmp_path / "set"
    for name in ("train", "valid"):
        write_photos(folder, name, 3)
    if fault == "picture":
        (folder / f"{split}1.png").write_bytes(b"no picture")
    else:
        line = b"{" if fault == "list" else json.dumps({"image": f"{split}1.png", "text": " "}).encode()
        with open(folder / f"{split}.jsonl", "ab") as file:
            file.write(line)
    assert run(folder)[0] == 1
    said = capsys.readouterr().out
    verdict, following = said.splitlines()[-2:]
    assert ("train.py would skip the broken pairs of train" in said) == (split == "train" and not stops)
    if stops:
        assert verdict.startswith("train.py would stop at the errors above: ") and stops in verdict
        assert following == "next: mend them, and check again"
    else:
        assert verdict == "train.py would take this set"


def test_blank_captions_of_shards_stop_the_measuring(tmp_path, capsys):
    write_tar(tmp_path / "train-0.tar", [("0.png", picture(0)), ("0.txt", b"cat")])
    write_tar(tmp_path / "valid-0.tar", [("0.png", picture(1)), ("0.txt", b"dog"),
                                         ("1.png", picture(2)), ("1.txt", b" ")])
    assert run(tmp_path)[0] == 1
    assert "would stop at the errors above" in capsys.readouterr().out


@pytest.mark.parametrize("count, batch, share", ((150, 128, "21.7%"), (150, 16, "0.0%"), (20, 32, "75.0%")))
def test_repeats_are_those_that_a_run_says(tmp_path, capsys, count, batch, share):
    """A batch that spans two epochs repeats pairs of a set without repeats."""
    folder = write_photos(tmp_path / "set", "train", count)
    write_photos(tmp_path / "set", "valid", 2)
    train, valid = open_pairs(folder, "train"), open_pairs(folder, "valid")
    cfg, clip = Config(model="ViT-tiny", batch_size=batch), ChineseCLIP(MODELS["ViT-tiny"])
    report.print_settings(cfg, clip, Stream(train, 0, 32, "none"), valid, 10, 0, batch)
    (ran,) = re.findall(r"([\d.]+%) of a batch share picture or caption", capsys.readouterr().out)
    run(folder, "--no-pictures", "--batch-size", str(batch))
    line, _, following = capsys.readouterr().out.splitlines()[-3:]
    advice = "" if share == "0.0%" else " --targets multi"
    assert line == f"{ran} of a batch of {batch} share picture or caption with another" + (
        advice and f":{advice}")
    assert f"--batch-size {batch}{advice} --data" in following and ran == share


def test_a_batch_has_two_pairs(tmp_path):
    with pytest.raises(DataError, match="--batch-size 1: expected 2 or more"):
        run(write_photos(tmp_path / "set", "train", 2), "--batch-size", "1")


# ------------------------------------------------------------------------------------------------------------
# what only the whole shows


def test_leaks_between_splits(tmp_path):
    write_clean(tmp_path, "train", 0)
    write_clean(tmp_path, "valid", 4)  # numbers 4 and 5 are in both
    code, splits = run(tmp_path)
    assert code == 0 and splits["train"]["kinds"] == {}
    assert found(splits) == {(f"{what} in train too", f"valid_{file}", at) for at in (1, 2)
                             for what, file in (("picture", "imgs.tsv"), ("caption", "texts.jsonl"))}
    places = splits["valid"]["kinds"]["caption in train too"]["places"]
    assert [place["what"] for place in places] == [f"as train_texts.jsonl line {at}" for at in (5, 6)]


def test_without_pairs(tmp_path):
    write_clean(tmp_path, "test")
    write_lines(tmp_path / "test_texts.jsonl", [text_line(n, image_ids=[]) for n in range(6)])
    code, splits = run(tmp_path)  # as MUGE publishes its test set
    assert code == 0 and {"no answers", "no image_ids"} <= splits["test"]["kinds"].keys()
    (tmp_path / "test_texts.jsonl").rename(tmp_path / "train_texts.jsonl")
    (tmp_path / "test_imgs.tsv").rename(tmp_path / "train_imgs.tsv")
    code, splits = run(tmp_path)
    assert code == 1 and found(splits, error=True) == {("no pairs", "train_texts.jsonl", None)}


def test_splits_are_those_of_the_files(tmp_path):
    """Also those of other names, and those that have lost their pictures. Scenes are no files to check."""
    for split in ("train", "few"):
        write_clean(tmp_path, split)
    write_lines(tmp_path / "valid_texts.jsonl", [text_line(0)])
    assert splits_of(str(tmp_path)) == ["train", "valid", "few"]
    assert run(tmp_path)[1].keys() == {"train", "valid", "few"}
    with pytest.raises(DataError, match="valid_imgs.tsv: not there"):
        open_pairs(str(tmp_path), "valid")
    with pytest.raises(DataError, match="no files to check; drawn scenes have none"):
        check.run(argparse.Namespace(path="scenes-zh", split=""))


def test_a_missing_file_is_one_error(tmp_path):
    write_clean(tmp_path)
    (tmp_path / "train_imgs.tsv").unlink()
    assert found(run(tmp_path)[1]) == {
        ("unreadable file", "train_imgs.tsv", None), ("no pairs", "train_texts.jsonl", None)}


def test_no_pictures_and_one_split(tmp_path):
    write_clean(tmp_path, "train")
    write_clean(tmp_path, "valid", 0)
    write_lines(tmp_path / "train_imgs.tsv", [b"%d\t%s" % (n, encode(b"no picture")) for n in range(6)])
    code, splits = run(tmp_path, "--no-pictures", "--split", "train")
    assert code == 0 and splits.keys() == {"train"} and found(splits) == set()
    assert splits["train"]["short_sides"] == {} and splits["train"]["pairs"] == 6


def test_nothing_to_check(tmp_path):
    with pytest.raises(DataError, match="no pairs in it; expected a folder with train_imgs.tsv"):
        run(tmp_path)
    write_clean(tmp_path)
    with pytest.raises(DataError, match="no split 'valid' in it, only train"):
        run(tmp_path, "--split", "valid")
    code, said = typed("python -m tools.curate", "check", str(tmp_path / "nowhere"))
    assert code == 1 and "error: " in said and "nowhere: no such folder" in said


def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TEXT_PIECE", 3000)
    monkeypatch.setattr(check, "TSV_PIECE", 20_000)
    plant_official(tmp_path / "set")
    rows = [f'"{text}",{image}'.encode() for image, text in list_lines(tmp_path / "set")[0]]
    write_lines(tmp_path / "set" / "valid.csv", [b"text,image", b"one,too,many", *rows])
    alone, together = run(tmp_path / "set"), run(tmp_path / "set", "--workers", "2")
    assert alone == together and alone[1].keys() == {"train", "valid"}


def test_all_are_counted_and_some_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "CAP", 3)
    monkeypatch.setattr(check, "TEXT_PIECE", 20)
    write_clean(tmp_path)
    write_lines(tmp_path / "train_texts.jsonl", [text_line(n) for n in range(6)] + [b"{"] * 50
                + [text_line(n, text="同一句", image_ids=[n % 6, n]) for n in range(100, 110)])
    code, splits = run(tmp_path, "--show", "2")
    kinds = splits["train"]["kinds"]
    assert {kind: row["count"] for kind, row in kinds.items()} == {
        "not JSON": 50, "id not in the TSV": 10, "repeated caption": 9}
    assert [place["line"] for place in kinds["not JSON"]["places"]] == [7, 8, 9]
    assert [place["line"] for place in kinds["repeated caption"]["places"]] == [58, 59, 60]
    out = capsys.readouterr().out
    assert out.count("train_texts.jsonl line") == 3 * 2 + 1 * 2 + 1  # two places a kind, "as" of repeats, the verdict


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "LIMIT", 10_000)
    write_clean(tmp_path)
    with open(tmp_path / "train_texts.jsonl", "ab") as file:
        file.write(b'{"text": "' + b"x" * 100_000 + b"\n" + json.dumps(text_line(9, image_ids=[1])).encode())
    assert found(run(tmp_path)[1]) == {("not JSON", "train_texts.jsonl", 7)}


def test_every_kind_is_found_somewhere():
    files = [*(ROOT / "tools" / "curate").glob("*.py"), *(ROOT / "sources").glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for kind in (*check.ERRORS, *check.NOTES):
        assert len(re.findall(f'"{kind}"', source)) >= 2, kind
    assert not set(check.ERRORS) & set(check.NOTES)


def test_tokens_are_counted_as_tokenize_does():
    for text in ("一只猫 and 2 Dogs!", "unaffable" * 30, "Ａ１“猫”", "ééé ☃ 👨‍👩‍👧", "[SEP] 𠮷"):
        counted = sum(len(word_ids(word)) for word in words(text)) + 2
        assert counted == (tokenize(text, 512) != 0).sum()


def test_garbage_ends_in_a_report(tmp_path):
    """Files with bytes changed, cut out and doubled: whatever comes of it, no exception."""
    rng = random.Random(0)
    write_clean(tmp_path / "o", count=2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(sideways())
    (tmp_path / "c" / "train.csv").write_text('image,text\n0.png,"猫"\n', encoding="utf-8")
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "train.tar",
              [("0.png", picture(0)), ("长" * 80 + ".txt", b"cat"), ("0.json", b"{}")])
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(12):
            content = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 100))
                twice = bytes(content[at : at + length]) * 2
                content[at : at + length] = rng.choice(
                    (b"", rng.randbytes(length), twice, b'"', b"\n", b"\0", b"\xff"))
            path.write_bytes(content)
            assert run(path.parent)[0] in (0, 1)
        path.write_bytes(whole)
