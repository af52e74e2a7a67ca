"""Filter, pack and unpack: what is written can be read again, and every rule takes its pairs."""

import base64
import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import model
from conftest import ROOT, says, typed, write_tar
from sources import pairs as pairs_module
from sources.layouts import find, open_pairs
from sources.pairs import DataError
from tools.curate import __main__ as curate
from tools.curate import rewrite


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "CACHE", str(tmp_path / "cache"))
    rewrite.opened.cache_clear()


def photo(seed: int, size=(60, 50), kind: str = "JPEG") -> bytes:
    rng, file = np.random.default_rng(seed), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image.resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


CAPTIONS = ["一张好看的照片", "短", "很长" * 30, "加微信有优惠啊", "第五张照片在这里", "第六张照片在这里",
            "第七张照片在这里", "第八张照片在这里", None]


def write_set(folder) -> str:
    """Nine training pairs: one good, and one for each rule; three validation pairs."""
    folder.mkdir()
    near = Image.open(io.BytesIO(photo(0)))
    file = io.BytesIO()
    near.resize((120, 100)).save(file, "WEBP", quality=90)
    pictures = [photo(0), photo(1), photo(2), photo(3), photo(4, (20, 30)), photo(0), file.getvalue(),
                b"broken", photo(8, kind="PNG")]
    for n, picture in enumerate(pictures):
        (folder / f"{n}.jpg").write_bytes(picture)
    for split, numbers in (("train", range(9)), ("valid", (0, 3, 6))):
        lines = [json.dumps({"image": f"{n}.jpg", "text": CAPTIONS[n]}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def content(source: str, split: str) -> list[tuple[bytes, str]]:
    pairs = open_pairs(source, split)
    return sorted((pairs.picture(pairs.image_number(i)), pairs.caption(i)) for i in range(len(pairs)))


def test_every_rule_takes_its_pairs(tmp_path, capsys):
    source, out, words = write_set(tmp_path / "set"), str(tmp_path / "out"), tmp_path / "words.txt"
    words.write_text("# advertising\n微信\n\n", encoding="utf-8")
    curate.main(["filter", source, out, "--words", str(words), "--min-side", "32", "--duplicates", "near",
                 "--workers", "0"])
    assert content(out, "train") == [(photo(0), CAPTIONS[0])]
    taken = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["train"]["taken"]
    assert taken == {
        "fewer than 5 characters": 1, "more than 50 characters": 1, "a word of the list": 1,
        "picture under 32 pixels": 1, "near duplicate of another picture": 2, "picture cannot be decoded": 1,
        "caption is no text": 1}
    assert "1  a word of the list" in capsys.readouterr().out
    assert content(out, "valid") == content(source, "valid")  # stays whole


def test_exact_duplicates_are_those_with_the_same_bytes(tmp_path):
    source = write_set(tmp_path / "set")
    curate.main(["filter", source, str(tmp_path / "out"), "--workers", "0"])
    kept = [caption for _, caption in content(str(tmp_path / "out"), "train")]
    assert CAPTIONS[5] not in kept and CAPTIONS[6] in kept  # the same picture in another format stays


def test_scores_are_cosines_and_the_lowest_go(tmp_path):
    source = write_set(tmp_path / "set")
    torch.manual_seed(0)
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"]).eval()
    model.save(clip, str(tmp_path / "tiny.safetensors"))
    pairs = open_pairs(source, "train")
    good = [0, 3, 4, 6]
    with torch.no_grad():
        scores = [torch.cosine_similarity(
            clip.encode_image(model.preprocess(pairs.image(i), 32)[None]),
            clip.encode_text(model.tokenize(CAPTIONS[i]))).item() for i in good]
    limit = sum(sorted(scores)[1:3]) / 2
    curate.main(["filter", source, str(tmp_path / "out"), "--model", str(tmp_path / "tiny.safetensors"),
                 "--min-score", str(limit), "--workers", "0"])
    expected = [CAPTIONS[i] for i, score in zip(good, scores) if score >= limit]
    assert sorted(caption for _, caption in content(str(tmp_path / "out"), "train")) == sorted(expected)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["train"]
    assert report["scores"]["0%"] == pytest.approx(min(scores), abs=1e-4)
    assert report["taken"][f"score under {limit}"] == 2 and report["kept"] == 2


def test_workers_find_what_they_are_to_do(tmp_path):
    """As typed, where the program is __main__, which a worker cannot import."""
    argv = ["pack", write_set(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run([sys.executable, "-m", "tools.curate", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "out: 10 pairs" in done.stdout, done.stderr


@pytest.mark.parametrize("way", (["pack"], ["unpack"], ["unpack", "--to", "official"]))
def test_there_and_back_byte_for_byte(tmp_path, way):
    source = write_set(tmp_path / "set")
    curate.main([way[0], source, str(tmp_path / "there"), *way[1:], "--workers", "0"])
    curate.main(["unpack", str(tmp_path / "there"), str(tmp_path / "back"), "--workers", "0"])
    for split, count in (("train", 7), ("valid", 3)):  # of nine one has no picture, one no caption
        there, back = content(str(tmp_path / "there"), split), content(str(tmp_path / "back"), split)
        assert there == back and len(back) == count
        files = {path.read_bytes() for path in (tmp_path / "set").iterdir()}
        assert files >= {picture for picture, _ in back}
    assert find(str(tmp_path / "there"), "train")[0] == {
        ("pack",): "shards", ("unpack",): "folder"}.get(tuple(way), "official")


def test_several_captions_and_several_pictures_survive_the_official_layout(tmp_path):
    folder = tmp_path / "set"
    write_set(folder)
    lines = [{"image": "0.jpg", "text": "猫猫猫猫猫"}, {"image": "0.jpg", "text": "狗狗狗狗狗"},
             {"image": "3.jpg", "text": "鱼"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    curate.main(["unpack", str(folder), str(tmp_path / "tsv"), "--to", "official", "--workers", "0"])
    pairs = open_pairs(str(tmp_path / "tsv"), "train")
    assert pairs.image_count == 2 and pairs.positives.tolist() == [[0, 0], [1, 0], [2, 1]]
    for way in (["pack"], ["unpack"]):  # a split to measure on keeps the whole relation, and its ids
        lines = [{"text_id": "q7", "text": "猫", "image_ids": ["i0", "i3"]},
                 {"text_id": "q9", "text": "狗", "image_ids": ["i3"]}]
        (folder / "valid_texts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        rows = [f"i{n}\t{base64.b64encode(photo(n)).decode()}" for n in (3, 0, 5)]
        (folder / "valid_imgs.tsv").write_text("\n".join(rows), encoding="utf-8")
        curate.main([*way, str(folder), str(tmp_path / way[0]), "--workers", "0"])
        pairs = open_pairs(str(tmp_path / way[0]), "valid")
        assert pairs.texts == ["猫", "狗"] and len(pairs) == 3
        named = {(pairs.text(text), pairs.picture(image)) for text, image in pairs.positives.tolist()}
        assert named == {("猫", photo(0)), ("猫", photo(3)), ("狗", photo(3))}
        if way == ["pack"]:  # its gallery, too
            assert [pairs.image_id(row) for row in range(3)] == ["i3", "i0", "i5"] and pairs.text_id(1) == "q9"
    curate.main(["filter", str(tmp_path / "tsv"), str(tmp_path / "less"), "--workers", "0"])
    pairs = open_pairs(str(tmp_path / "less"), "train")
    assert find(str(tmp_path / "less"), "train")[0] == "official"
    assert pairs.texts == ["猫猫猫猫猫", "狗狗狗狗狗"] and pairs.image_count == 1


def test_shrinking_keeps_shape_and_small_pictures(tmp_path):
    source = write_set(tmp_path / "set")
    (tmp_path / "set" / "0.jpg").write_bytes(photo(0, (300, 200)))
    curate.main(["pack", source, str(tmp_path / "out"), "--resize", "60", "--workers", "0"])
    pairs = open_pairs(str(tmp_path / "out"), "train")
    sizes = {pairs.caption(i): pairs.image(i).size for i in range(len(pairs))}
    assert sizes[CAPTIONS[0]] == (90, 60) and sizes[CAPTIONS[3]] == (60, 50)
    assert (photo(3), CAPTIONS[3]) in content(str(tmp_path / "out"), "train")


def test_shards_are_cut_and_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "SHARD", 3)
    curate.main(["pack", write_set(tmp_path / "set"), str(tmp_path / "out"), "--workers", "0"])
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == ["names-train.csv", "names-valid.csv", "report.json", "train-000000.tar", "train-000001.tar", "train-000002.tar",
                     "valid_imgs.tsv", "valid_texts.jsonl"]


# ------------------------------------------------------------------------------------------------------------
# split


def write_pairs(folder, pairs: list[tuple[str, bytes, str]]) -> str:
    """A folder with train.jsonl of (name, picture, caption)."""
    for name, picture, _ in pairs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)
    lines = [json.dumps({"image": name, "text": text}, ensure_ascii=False) for name, _, text in pairs]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def related() -> list[tuple[str, bytes, str]]:
    """40 pairs; 0 to 3 are a chain: 0 and 1 share a caption, 1 and 2 the bytes of a picture, 2 and 3 a file."""
    pairs = [(f"{n}.jpg", photo(n), f"第{n}张照片") for n in range(40)]
    pairs[1], pairs[2] = ("1.jpg", photo(1), "第0张照片"), ("2.jpg", photo(1), "第2张照片")
    pairs[3] = ("2.jpg", photo(1), "第3张照片")
    return pairs


def sides(out) -> dict[str, list[tuple[bytes, str]]]:
    return {split: content(str(out), split) for split in ("train", "valid")}


def test_split_keeps_together_what_belongs_together(tmp_path):
    source = write_pairs(tmp_path / "set", related())
    seen = set()
    for share in (0.05, 0.1, 0.3, 0.5, 0.9):
        out = tmp_path / str(share)
        curate.main(["split", source, str(out), "--valid", str(share), "--workers", "0"])
        train, valid = sides(out).values()
        assert sorted(train + valid) == content(source, "train")
        assert not {text for _, text in train} & {text for _, text in valid}
        assert not {picture for picture, _ in train} & {picture for picture, _ in valid}
        assert 40 * share <= len(valid) <= 40 * share + 3  # the chain of four may be the last
        seen.add(sum(text in [f"第{n}张照片" for n in (0, 2, 3)] for _, text in valid))
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert [report[split]["kept"] for split in ("train", "valid")] == [len(train), len(valid)]
    assert seen == {0, 4}


def test_the_same_pairs_are_split_in_the_same_way(tmp_path):
    """In any order of the list and in any layout; and these numbers hold on any machine."""
    source, again = write_pairs(tmp_path / "a", related()), write_pairs(tmp_path / "b", related()[::-1])
    curate.main(["unpack", source, str(tmp_path / "tsv"), "--to", "official", "--workers", "0"])
    curate.main(["pack", source, str(tmp_path / "tar"), "--workers", "0"])
    found = []
    for name, path in (("1", source), ("2", again), ("3", str(tmp_path / "tsv")), ("4", str(tmp_path / "tar"))):
        curate.main(["split", path, str(tmp_path / name), "--workers", "0"])
        found.append(sides(tmp_path / name))
        assert find(str(tmp_path / name), "train")[0] == find(path, "train")[0]
    assert all(one == found[0] for one in found) and len(found[0]["valid"]) == 4
    assert find(str(tmp_path / "4"), "valid")[0] == "official"  # as for all shards
    assert not (tmp_path / "1.partial").exists()


def test_split_leaves_out_broken_pairs_and_copies_other_splits(tmp_path, capsys):
    source = write_set(tmp_path / "set")
    (tmp_path / "set" / "valid.jsonl").rename(tmp_path / "set" / "test.jsonl")
    curate.main(["split", source, str(tmp_path / "out"), "--valid", "0.3", "--workers", "0"])
    out = sides(tmp_path / "out")
    assert len(out["train"]) + len(out["valid"]) == 7 and len(out["valid"]) in (3, 4)
    assert content(str(tmp_path / "out"), "test") == content(source, "test")
    said = capsys.readouterr().out
    assert "1  picture cannot be decoded" in said and "of these become valid" in said
    assert said.splitlines()[-1].startswith("next: python train.py --recipe scratch --model RN-mini ")


def test_what_cannot_be_split(tmp_path):
    source, out = write_set(tmp_path / "set"), str(tmp_path / "out")
    same = write_pairs(tmp_path / "same", [(f"{n}.jpg", photo(n), "一样的话" if n else "别的话") for n in range(20)])
    shot = write_pairs(tmp_path / "shot", [(f"{n}.jpg", photo(0), f"第{n}句") for n in range(20)])
    both = write_pairs(tmp_path / "both", [(f"{n}.jpg", photo(n), f"第{n}句") for n in range(20)])
    for path, share, parts in (
            (source, "0.1", (source, "valid", "no split valid yet")), (both, "0", ("--valid 0.0", "over 0")),
            (both, "1", ("--valid 1.0",)), (both, "nan", ("--valid nan",)),
            (same, "0.2", (same, "here 19 of 20, 19 by picture or caption of", "一样的话", "--valid")),
            (shot, "0.2", (shot, "here 20 of 20, 20 by picture", "0.jpg")),
            ("scenes-zh", "0.1", ("scenes-zh", "drawn")), (f"{source},{both}", "0.1", ("no split valid yet",))):
        says(lambda: curate.main(["split", path, out, "--valid", share, "--workers", "0"]), *parts)
        assert not os.path.exists(out) and not os.path.exists(f"{out}.partial")
    curate.main(["split", f"{both},{same}", out, "--workers", "0"])  # two sets, of which none has a split valid
    # the two pairs with the first picture; all others share pictures with those that share a caption
    assert {text for _, text in sides(out)["valid"]} == {"第0句", "别的话"} and find(out, "train")[0] == "folder"


# ------------------------------------------------------------------------------------------------------------
# names


def names_in(folder) -> list[str]:
    """The pictures, by their paths in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file() and path.suffix not in (".jsonl", ".json"))


def test_names_are_kept_in_a_folder(tmp_path):
    names = ["2024/cat.jpg", "2024/Cat.jpg", "狗 1.JPEG", "noend", "v1.2", "wrong.png"]
    pairs = [(name, photo(n), f"这是第{n}张照片") for n, name in enumerate(names)]
    source = write_pairs(tmp_path / "set", pairs)
    (tmp_path / "set" / "valid.jsonl").write_text(
        json.dumps({"image": "2024/cat.jpg", "text": "同一张"}), encoding="utf-8")
    if len(names_in(tmp_path / "set")) < len(names):
        pytest.skip("this disk takes cat.jpg and Cat.jpg for one")
    expected = ["2024/Cat-2.jpg", "2024/cat.jpg", "noend", "v1.2", "wrong.png", "狗 1.JPEG"]
    for command in (["filter"], ["unpack"]):
        out = tmp_path / command[0]
        curate.main([*command, source, str(out), "--workers", "0"])
        assert names_in(out) == sorted(expected)  # valid names a picture of train, which is there once
        assert content(str(out), "train") == content(source, "train")
        assert open_pairs(str(out), "valid").image_id(0) == "2024/cat.jpg"
    curate.main(["unpack", source, str(tmp_path / "small"), "--resize", "30", "--workers", "0"])
    ends = {"noend": "noend.jpg", "v1.2": "v1.2.jpg", "wrong.png": "wrong.png.jpg"}
    assert names_in(tmp_path / "small") == sorted(ends.get(name, name) for name in expected)


@pytest.mark.parametrize("image_id, name", (
    ("7", "train/7.jpg"), ("../../up", "train/.._.._up.jpg"), ("/etc/passwd", "train/_etc_passwd.jpg"),
    ("a\\b", "train/a_b.jpg"), ('a:b*c?"<>|', "train/a_b_c_____.jpg"), ("猫.jpg", "train/猫.jpg"), ("..", "train/...jpg"),
    ("长" * 85, f"train/{'长' * 80}.jpg"), ("\x07", "train/_.jpg")))
def test_an_id_becomes_a_safe_name(tmp_path, image_id, name):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train_imgs.tsv").write_bytes(image_id.encode() + b"\t" + base64.b64encode(photo(0)) + b"\n")
    (folder / "train_texts.jsonl").write_text(
        json.dumps({"text_id": 1, "text": "一张照片", "image_ids": [image_id]}), encoding="utf-8")
    curate.main(["unpack", str(folder), str(tmp_path / "deep" / "out"), "--workers", "0"])
    assert names_in(tmp_path / "deep" / "out") == [name]
    assert content(str(tmp_path / "deep" / "out"), "train") == [(photo(0), "一张照片")]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_numbered_pictures_have_a_map_beside(tmp_path):
    """From a folder to shards and TSV; back from shards by their keys."""
    source = write_pairs(tmp_path / "set", [
        ("2024/猫.jpg", photo(0), "猫"), ("2024/猫.jpg", photo(0), "又是猫"), ('"b", c.jpg', photo(1), "狗")])
    names = [["picture", "source"], ["000000000", "2024/猫.jpg"], ["000000001", "2024/猫.jpg"],
             ["000000002", '"b", c.jpg']]
    curate.main(["pack", source, str(tmp_path / "tar"), "--workers", "0"])
    curate.main(["unpack", source, str(tmp_path / "tsv"), "--to", "official", "--workers", "0"])
    for out, expected in (("tar", names), ("tsv", [names[0], ["0", names[1][1]], ["1", names[3][1]]])):
        with open(tmp_path / out / "names-train.csv", encoding="utf-8-sig", newline="") as file:
            assert list(csv.reader(file)) == expected
    pairs = open_pairs(str(tmp_path / "tsv"), "train")
    assert [pairs.image_id(row) for row in range(2)] == [0, 1]
    assert pairs.positives.tolist() == [[0, 0], [1, 0], [2, 1]]
    curate.main(["unpack", str(tmp_path / "tar"), str(tmp_path / "back"), "--workers", "0"])
    assert names_in(tmp_path / "back") == [f"train/{key}.jpg" for key, _ in names[1:]]
    curate.main(["filter", str(tmp_path / "tsv"), str(tmp_path / "same"), "--min-chars", "1", "--workers", "0"])
    assert open_pairs(str(tmp_path / "same"), "train").image_id(1) == 1
    assert not list((tmp_path / "same").glob("names-*"))  # ids stay


@pytest.mark.parametrize("bits, first", ((3, 0), (4, 1)))
def test_near_duplicates_differ_in_at_most_three_bits(bits, first):
    rng, grey = np.random.default_rng(0), np.full((3, 3), 128)
    one = int(rng.integers(2**63))
    for _ in range(20):
        other = one
        for bit in rng.choice(64, bits, replace=False).tolist():
            other ^= 1 << bit
        far = int(rng.integers(2**63))
        hashes = np.array([one, other, far], dtype=np.uint64)
        assert rewrite.near_duplicates(hashes, grey).tolist() == [0, first, 2]
        assert rewrite.near_duplicates(hashes, grey + [[0], [17], [0]]).tolist() == [0, 1, 2]


def test_a_duplicate_stays_when_the_first_one_goes(tmp_path):
    """The copy with too short a caption goes, so the other is the first; flat pictures are told by colour."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    (folder / "a.jpg").write_bytes(photo(1))
    (folder / "b.jpg").write_bytes(photo(1))
    (folder / "c.jpg").write_bytes(b"broken")
    texts = {"c.jpg": "坏了的图片啊", "a.jpg": "短", "b.jpg": "这一张说得很好", "red.png": "全是红色的图片",
             "blue.png": "全是蓝色的图片"}
    lines = [json.dumps({"image": name, "text": text}) for name, text in texts.items()]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for duplicates in ("exact", "near"):
        out = str(tmp_path / duplicates)
        curate.main(["filter", str(folder), out, "--duplicates", duplicates, "--workers", "0"])
        assert sorted(caption for _, caption in content(out, "train")) == sorted(list(texts.values())[2:])


def test_what_phones_write_is_packed_upright(tmp_path):
    """A multi-picture JPEG that EXIF turns; JPEG 2000; half a surrogate pair in a caption is left out."""
    folder = tmp_path / "set"
    folder.mkdir()
    exif, image = Image.Exif(), Image.open(io.BytesIO(photo(0, (300, 200))))
    exif[0x0112] = 6  # turn by a quarter
    image.save(folder / "0.jpg", "MPO", save_all=True, append_images=[image], exif=exif)
    image.save(folder / "1.jp2")
    lines = [json.dumps({"image": f"{n % 2}.{('jpg', 'jp2')[n % 2]}", "text": text})
             for n, text in enumerate(("手机拍的照片", "另一种格式", "半个\ud83d"))]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    curate.main(["pack", str(folder), str(tmp_path / "whole"), "--workers", "0"])
    assert content(str(tmp_path / "whole"), "train") == sorted(
        [((folder / "0.jpg").read_bytes(), "手机拍的照片"), ((folder / "1.jp2").read_bytes(), "另一种格式")])
    curate.main(["pack", str(folder), str(tmp_path / "small") + "/", "--resize", "60", "--workers", "0"])
    pairs = open_pairs(str(tmp_path / "small"), "train")
    assert [pairs.image(row).size for row in range(2)] == [(60, 90), (90, 60)]


def test_nothing_half_written_and_nothing_overwritten(tmp_path):
    source = write_set(tmp_path / "set")
    (tmp_path / "full").mkdir()
    with pytest.raises(DataError, match="already there"):
        curate.main(["pack", source, str(tmp_path / "full")])
    with pytest.raises(DataError, match="nowhere"):
        curate.main(["pack", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(DataError, match="words.txt: no such file; expected one word on each line"):
        curate.main(["filter", source, str(tmp_path / "out"), "--words", str(tmp_path / "words.txt"),
                     "--workers", "0"])
    with pytest.raises(DataError, match="'trian'"):
        curate.main(["filter", source, str(tmp_path / "out"), "--split", "trian", "--workers", "0"])
    shard = write_tar(tmp_path / "shards" / "000.tar", [("0.txt", b"a")])  # a pattern has a split train alone
    with pytest.raises(DataError, match="no split 'valid' in it; it has train"):
        curate.main(["filter", shard, str(tmp_path / "out"), "--split", "valid", "--workers", "0"])
    with pytest.raises(DataError, match="no files to rewrite"):
        curate.main(["pack", "scenes-zh", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, code, words", (
    (["check", "nowhere"], 1, "nowhere"), (["pack", "nowhere", "no-out"], 1, "nowhere"),
    (["filter", "x"], 2, "OUT"), ([], 2, "COMMAND")))
def test_wrong_commands_are_one_line(argv, code, words):
    found, said = typed("python -m tools.curate", *argv)
    assert found == code and words in said and "Traceback" not in said


def test_check_is_a_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        curate.main(["check", write_set(tmp_path / "set"), "--workers", "0"])
    said = capsys.readouterr().out
    assert caught.value.code == 1 and "damaged picture" in said and "7.jpg" in said
