"""Tar shards, several sources as one, and every source through the same loader."""

import base64
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import write_folder, write_tar
from sources import order as order_of_training
from sources import pairs as pairs_module
from sources import shards
from sources.layouts import open_pairs
from sources.order import order, permutation
from sources.pairs import DataError, SourceChanged


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "CACHE", str(tmp_path / "cache"))


def png(number: int) -> bytes:
    """A picture that knows its number: the red of its first pixel."""
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def number_of(picture) -> int:
    if isinstance(picture, Image.Image):
        picture = torch.tensor(picture.getpixel((0, 0)))[:, None, None]
    red, green, _ = picture[:, 0, 0].tolist()
    return int(red) + 256 * int(green)


def members_of(numbers) -> list[tuple[str, bytes]]:
    """As img2dataset writes them: picture, caption and description of each key."""
    return [file for n in numbers for file in (
        (f"{n:09}.jpg", png(n)), (f"{n:09}.json", json.dumps({"caption": f"别的{n}"}).encode()),
        (f"{n:09}.txt", f"第{n}张\n".encode()))]


def write_shards(folder, count: int, shard: int, name: str = "{}.tar"):
    for k, start in enumerate(range(0, count, shard)):
        write_tar(folder / name.format(f"{k:06}"), members_of(range(start, min(start + shard, count))))


def says(action, *parts: str):
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize("form", (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
def test_a_pair_is_called_as_its_members(tmp_path, form):
    """The KEY; also one that needs an extended header, unless it is too long for a block."""
    keys = ["000000007", "a/b", "猫", "x" * 150, f"{'d' * 90}/{'f' * 60}", "last"]
    if form == tarfile.USTAR_FORMAT:
        keys.remove("x" * 150)  # which this format cannot hold
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as shard:
        for n, key in enumerate(keys):
            for ending, content in (("png", png(n)), ("txt", b"cat")):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    pairs = open_pairs(str(tmp_path / "0.tar"), "train")
    assert [pairs.image_id(row) for row in range(len(keys))] == keys


@pytest.mark.parametrize("pattern, expected", (
    ("a.tar", ["a.tar"]),
    ("s/{008..011}.tar", ["s/008.tar", "s/009.tar", "s/010.tar", "s/011.tar"]),
    ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ("{x}.tar", ["{x}.tar"]), ("{3..1}.tar", []),
))
def test_braces(pattern, expected):
    assert shards.expand_braces(pattern) == expected


def test_commas_between_sources_and_in_braces():
    assert shards.split_outside_braces("a,b/{x,y}.tar,scenes-zh") == ["a", "b/{x,y}.tar", "scenes-zh"]
    assert shards.split_outside_braces("a{") == ["a"] and shards.split_outside_braces("") == [""]


def test_which_shards_are_of_a_split(tmp_path):
    for name in ("000.tar", "001.tar", "valid-000.tar"):
        write_tar(tmp_path / name, members_of([1]))
    names = [os.path.basename(path) for path in shards.shards_of(str(tmp_path), "train")]
    assert names == ["000.tar", "001.tar"]
    assert shards.shards_of(str(tmp_path), "valid") == [str(tmp_path / "valid-000.tar")]
    assert shards.shards_of(str(tmp_path), "test") == []
    assert len(shards.shards_of(f"{tmp_path}/{{000..001}}.tar", "any")) == 2
    assert len(shards.shards_of(f"{tmp_path}/*.tar", "any")) == 3
    says(lambda: open_pairs(f"{tmp_path}/{{000..002}}.tar", "train"), "002.tar", "3")
    says(lambda: shards.shards_of("{0..99999999}.tar", "train"), "ten million")


# ------------------------------------------------------------------------------------------------------------
# contents


def test_shards_as_img2dataset_writes_them(tmp_path):
    write_shards(tmp_path / "set", 10, 4)
    pairs = open_pairs(str(tmp_path / "set"), "train")
    assert len(pairs) == pairs.image_count == 10
    assert pairs.texts == [f"第{n}张" for n in range(10)]  # the .txt, not the .json
    assert [number_of(pairs.image(n)) for n in range(10)] == list(range(10))
    assert pairs.picture(7) == png(7) and pairs.positives.tolist() == [[n, n] for n in range(10)]


def test_many_shards_are_scanned_by_several_processes(tmp_path):
    write_shards(tmp_path / "set", 20, 2)
    assert open_pairs(str(tmp_path / "set"), "train").texts == [f"第{n}张" for n in range(20)]


def test_captions_from_json_folders_and_other_endings(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", [
        ("x/1.webp", png(1)), ("y/1.png", png(2)), ("y/1.txt", "乙".encode()),
        ("x/1.json", '{"caption": "甲"}'.encode()), ("3.JPEG", png(3)), ("3.TXT", "丙".encode()),
        ("4.jpg", png(4)), ("5.txt", b"no picture"), ("6.jpg", png(6)), ("6.json", b'{"caption": null}'),
        ("7.jpg", png(7)), ("7.txt", b"\xff"), ("8.cls", b"0")])
    pairs = open_pairs(path, "train")
    assert [pairs.text(row) for row in range(3)] == ["甲", "乙", "丙"]
    assert [number_of(pairs.image(row)) for row in range(3)] == [1, 2, 3]
    assert "6 pictures, 6 captions, 5 pairs" in capsys.readouterr().out
    says(lambda: pairs.text(3), "a.tar at byte", "None")
    says(lambda: pairs.text(4), "a.tar at byte", "UTF-8")


def test_nothing_in_a_shard_is_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("geheim")
    link, hard, device = (tarfile.TarInfo(f"{n}.txt") for n in range(3))
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../secret.txt"
    device.type = tarfile.CHRTYPE
    path = write_tar(tmp_path / "set" / "a.tar", [
        link, hard, device, *((f"{n}.jpg", png(n)) for n in range(3)),
        ("../../9.jpg", png(9)), ("../../9.txt", "九".encode()), ("/etc/8.jpg", png(8)), ("/etc/8.txt", b"8")])
    before = sorted(tmp_path.rglob("*"))
    pairs = open_pairs(path, "train")
    assert pairs.texts == ["九", "8"]  # bytes in the file, whatever they are called
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in str(path)] == before


def test_a_shard_that_was_cut_off_gives_what_is_whole(tmp_path, capsys):
    path = tmp_path / "a.tar"
    write_tar(path, members_of(range(10)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    pairs = open_pairs(str(path), "train")
    assert 3 <= len(pairs) < 10
    assert [number_of(pairs.image(n)) for n in range(len(pairs))] == list(range(len(pairs)))
    assert "a.tar" in capsys.readouterr().out
    path.write_bytes(b"no tar at all" * 100)
    says(lambda: open_pairs(str(path), "train"), "a.tar", "no pair")


def test_a_pair_is_whole_even_if_the_shard_is_cut_right_behind_it(tmp_path, capsys):
    """Without the zeros that fill the last block, and without the end: the caption is there all the same."""
    path = tmp_path / "a.tar"
    write_tar(path, [("1.jpg", png(1)), ("1.txt", b"one")])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"one") + 3])
    pairs = open_pairs(str(path), "train")
    assert pairs.texts == ["one"] and "a.tar 1.txt: damaged shard" in capsys.readouterr().out


def test_members_and_what_they_are_in_their_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x/1.2.JPG", b"abc"), ("x/1.txt", b"d")])
    found = list(shards.members(path))
    assert [(name, member.offset_data, member.size) for name, member in found] == [
        ("x/1.2.JPG", 512, 3), ("x/1.txt", 1536, 1)]
    assert [shards.sample_of(name) for name in ("x/1.JPG", "x/1.txt", "1.json", "1.cls", "x/1.2.jpg")] == [
        ("x/1", "picture"), ("x/1", "txt"), ("/1", "json"), ("/1", ""), ("x/1", "")]
    (name, error), = shards.members(str(tmp_path / "gone.tar"))
    assert name == "" and isinstance(error, DataError) and error.kind == "unreadable file"


def test_the_index_follows_the_shards(tmp_path):
    write_shards(tmp_path / "set", 4, 4)
    pairs = open_pairs(str(tmp_path / "set"), "train")
    first = pairs.fingerprint()
    write_tar(tmp_path / "set" / "000000.tar", members_of(range(10, 16)))
    with pytest.raises(SourceChanged, match="000000.tar: changed during the run"):
        pairs.image(0)
    with pytest.raises(SourceChanged):  # and no run goes on by skipping pairs
        data.Stream(pairs, 0, 8, "none")[0]
    again = open_pairs(str(tmp_path / "set"), "train")
    assert len(again) == 6 and again.text(0) == "第10张" and again.fingerprint() != first


def test_pairs_to_come_are_announced_across_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "set", 10, 4)
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: told.append(args[1:3]), raising=False)
    open_pairs(str(tmp_path / "set"), "train").will_need(2, 9)
    assert len(told) == 3 and all(length > 0 for _, length in told)


# ------------------------------------------------------------------------------------------------------------
# the order of a large set


class Many(pairs_module.Pairs):
    """As many pairs as you like, in windows as small as you like."""

    def __init__(self, count: int, window: int):
        self.count, self.window = count, window

    def __len__(self) -> int:
        return self.count


@pytest.mark.parametrize("count", (100, 128, 1000, 1001, 1037))
def test_windows_hold_every_pair_once_an_epoch(count, monkeypatch):
    monkeypatch.setattr(order_of_training, "BLOCK", 8)
    epochs = [[order(Many(count, 64), 3, count * epoch + n) for n in range(count)] for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and epochs[0] != epochs[1]
    monkeypatch.setattr(order_of_training, "BLOCK", 16)  # another order, so the first depended on nothing else
    assert [order(Many(count, 64), 3, n) for n in range(count)] != epochs[0]


def test_a_window_reads_few_stretches_and_shuffles_them(monkeypatch):
    monkeypatch.setattr(order_of_training, "BLOCK", 50)
    many, told = Many(10_000, 500), []
    monkeypatch.setattr(many, "will_need", lambda start, stop: told.append((start, stop)))
    window = [order(many, 0, n) for n in range(500)]
    assert len({n // 50 for n in window}) == 10
    assert sorted(told) == [(n, n + 50) for n in sorted(window) if n % 50 == 0]  # of each once
    assert sum(abs(a - b) == 1 for a, b in zip(window, window[1:])) < 20


def test_any_position_of_200_million_pairs_is_found_at_once():
    many = Many(200_000_123, 2**16)
    seen = {order(many, 1, 7 * len(many) + n) for n in range(123_456_000, 123_460_000)}
    assert len(seen) == 4000 and all(0 <= n < len(many) for n in seen)


# ------------------------------------------------------------------------------------------------------------
# every source, through one loader


COUNT = 24


def official(folder):
    folder.mkdir()
    for split in ("train", "valid"):
        lines = [f"p{n}\t{base64.b64encode(png(n)).decode()}" for n in range(COUNT)]
        (folder / f"{split}_imgs.tsv").write_text("\n".join(lines), encoding="utf-8")
        lines = [json.dumps({"text_id": n, "text": f"第{n}张", "image_ids": [f"p{n}"]}) for n in range(COUNT)]
        (folder / f"{split}_texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def listed(folder, kind: str):
    folder.mkdir()
    for n in range(COUNT):
        (folder / f"{n}.png").write_bytes(png(n))
    for split in ("train", "valid"):
        head, lines = {
            "jsonl": ([], [json.dumps({"image": f"{n}.png", "text": f"第{n}张"}) for n in range(COUNT)]),
            "csv": (["image,text"], [f"{n}.png,第{n}张" for n in range(COUNT)]),
            "wukong": (["dir,caption", "gone.jpg,不见了"], [f"{n}.png,第{n}张" for n in range(COUNT)]),
        }[kind]
        ending = "jsonl" if kind == "jsonl" else "csv"
        (folder / f"{split}.{ending}").write_text("\n".join(head + lines), encoding="utf-8")
    return str(folder)


def tarred(folder):
    for split in ("train", "valid"):
        write_shards(folder, COUNT, 7, split + "-{}.tar")
    return str(folder)


def joined(folder):
    """The first half from shards, the second from a list."""
    for split in ("train", "valid"):
        write_shards(folder, COUNT // 2, 5, split + "-{}.tar")
    second = listed(folder / "second", "jsonl")
    for split in ("train", "valid"):
        path = folder / "second" / f"{split}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(lines[COUNT // 2:]), encoding="utf-8")
    return f"{folder},{second}"


SOURCES = {
    "official": official, "shards": tarred, "joined": joined,
    "jsonl": lambda folder: listed(folder, "jsonl"), "csv": lambda folder: listed(folder, "csv"),
    "wukong": lambda folder: listed(folder, "wukong")}


def load(source: str, steps: range, workers: int = 0, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """-> the numbers of the pairs of each step, as the pictures say; captions and keys must say the same."""
    stream = data.Stream(open_pairs(source, "train"), 5, 8, "none")
    texts = [f"第{n}张" for n in range(COUNT)]
    captions = {tuple(row): n for n, row in enumerate(data.tokenize(texts, 8).tolist())}
    result = []
    for batch in data.batches(stream, 6, steps, 8, workers, rank, world_size):
        result.append([number_of(picture) for picture in batch.pictures])
        assert result[-1] == [captions[tuple(row)] for row in batch.ids.tolist()] and not batch.problems
        assert result[-1] == batch.keys[:, 0].tolist()
    return result


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_every_pair_once_an_epoch(name, tmp_path):
    """Trained on, resumed, on two ranks, with four workers: the same numbers in the same order."""
    source = SOURCES[name](tmp_path / "set")
    whole = load(source, range(8))  # 48 samples, two epochs
    for epoch in (whole[:4], whole[4:]):
        assert sorted(sum(epoch, [])) == list(range(COUNT))
    assert whole[:4] != whole[4:]
    assert load(source, range(3, 8)) == whole[3:]
    ranks = [load(source, range(8), rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks)] == whole
    assert load(source, range(8), workers=4) == whole
    valid = open_pairs(source, "valid")
    assert valid.texts == [f"第{n}张" for n in range(COUNT)] == [valid.text(n) for n in range(COUNT)]
    assert [number_of(valid.image(n)) for n in range(COUNT)] == list(range(COUNT)) and len(valid) == COUNT
    assert valid.positives.tolist() == [[n, n] for n in range(COUNT)]
    assert valid.fingerprint() == open_pairs(source, "valid").fingerprint()


def test_joined_sources_number_their_pictures_apart(tmp_path):
    write_folder(tmp_path / "a", 5)
    pairs = open_pairs(f"{tmp_path / 'a'},scenes-zh,{tmp_path / 'a'}", "train")
    numbers = [pairs.image_number(i) for i in (0, 4, 5, 6, len(pairs) - 1)]
    assert len(pairs) == 1_000_010 and numbers == [0, 4, 5, 6, 1_000_009]
    assert np.array_equal(pairs.image(1_000_005), pairs.image(0))
    picture, caption = pairs.pair(7)
    assert caption == pairs.caption(7) and np.array_equal(picture, pairs.image(7))


def test_a_set_opens_in_another_process_by_its_name(tmp_path):
    import pickle
    for source in (official(tmp_path / "a"), tarred(tmp_path / "b")):
        pairs = open_pairs(source, "train")
        sent = pickle.dumps(pairs)
        assert len(sent) < 2000 and pickle.loads(sent).texts == pairs.texts


def test_a_jpeg_is_decoded_no_larger_than_needed_for_training(tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).resize((1000, 800), 3)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=95)
    small = pairs_module.decode(file.getvalue(), "here", 224)
    assert small.size == (500, 400)
    reference = np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC), dtype=float)
    seen = np.asarray(small.resize((224, 224), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(reference - seen).mean() < 2  # of 255
    assert pairs_module.decode(file.getvalue(), "here").size == (1000, 800)  # to measure: all of it


def test_workers_and_restarts_with_broken_pairs_in_a_shard(tmp_path):
    members = [(name, b"broken" if name == "000000003.jpg" else content)
               for name, content in members_of(range(COUNT))]
    source = write_tar(tmp_path / "a.tar", members)
    stream = data.Stream(open_pairs(source, "train"), 5, 8, "none")
    batches = [list(data.batches(stream, 6, range(4), 8, workers)) for workers in (0, 3)]
    assert all(torch.equal(a.pictures, b.pictures) and a.problems == b.problems for a, b in zip(*batches))
    problems = set(sum((batch.problems for batch in batches[0]), []))
    assert len(problems) == 1 and all("a.tar at byte" in told and "pair 3" in told for told in problems)


def test_drawn_scenes_come_in_the_same_order_too():
    """A million an epoch are too many to draw: their order is looked at whole, their samples at both ends."""
    pairs = open_pairs("scenes-zh", "train")
    stream, end = data.Stream(pairs, 5, 8, "none"), len(pairs) // 6
    assert sorted(permutation(len(pairs), 5, 0).tolist()) == list(range(1_000_000))

    def keys(steps: range, **options) -> list[list[int]]:
        return [batch.keys[:, 0].tolist() for batch in data.batches(stream, 6, steps, 8, **options)]

    whole = keys(range(end - 2, end + 2), workers=0)
    assert whole == [[stream.index(6 * step + i) for i in range(6)] for step in range(end - 2, end + 2)]
    assert keys(range(end, end + 2), workers=0) == whole[2:]
    assert keys(range(end - 2, end + 2), workers=4) == whole
    ranks = [keys(range(end - 2, end + 2), workers=0, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks)] == whole
    valid = open_pairs("scenes-zh", "valid")
    assert len(valid) == len(valid.texts) == valid.image_count == 1000
