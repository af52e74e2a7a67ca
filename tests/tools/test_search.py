"""
tools/search: the index, the arithmetic of queries, the command.

By hand: three pictures of one colour each are encoded to unit features a, b and c. The query "a.png - b.png"
is (a - b) / |a - b|, so a's cosine with it is (1 - a.b) / |a - b|, b's is its negative.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, noise, shake
from PIL import Image

import model
from common import UserError, one_line_errors
from eval import encode_images, retrieval
from sources.layouts import open_pairs
from tools.search import __main__ as command
from eval import ensemble, sentence_features
from sources.classes import TEMPLATES, read_templates
from sources.pairs import DataError, date_taken
from tools.search.index import Index
from tools.search.query import Ranking, Search, day, nearest, terms

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return shake(model.ChineseCLIP(model.MODELS["ViT-tiny"])).eval()


@pytest.fixture
def photos(tmp_path):
    """Eight pictures of noise in a folder and one below it, with names of many scripts."""
    (folder := tmp_path / "photos" / "日本").mkdir(parents=True)
    names = ["猫.jpg", "d'og \"x\".png", "émoji😀.webp", " space .JPG", "日本/a.b.jpeg", "日本/-.gif", "日本/％.bmp",
             "日本/'; DROP TABLE files.tiff"]
    for seed, name in enumerate(names):
        noise(40 + seed, 30, seed).save(folder.parent / name, "JPEG" if name.lower().endswith("jpg") else None)
    return str(folder.parent)


def state(index: Index) -> dict[bytes, np.ndarray]:
    """Path -> feature of every picture."""
    rows = dict(index.reader.execute("SELECT path, row FROM files WHERE row IS NOT NULL").fetchall())
    return {path: index.features()[row].astype(np.float32) for path, row in rows.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.abs(one[path] - other[path]).max() < 2e-3 for path in one)


def grown(folder, clip, photos: str) -> tuple[Index, str]:
    index = Index(str(folder), clip, [os.fsencode(photos)])
    return index, index.update(clip)


# ------------------------------------------------------------------------------------------------------------
# the index


def test_features_are_those_of_eval(photos, tmp_path, clip):
    index, line = grown(tmp_path / "index", clip, photos)
    assert line == "8 pictures, 8 new or changed, 8 encoded, 0 gone"
    paths = sorted(state(index))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    expected = encode_images(clip, pictures.__getitem__, len(paths)).numpy()
    assert all(np.abs(state(index)[path] - row).max() < 1e-3 for path, row in zip(paths, expected))


def test_only_what_is_new_is_encoded(photos, tmp_path, clip):
    """A copy, a renamed and a touched picture have contents that are known; a changed one has not."""
    grown(tmp_path / "index", clip, photos)
    os.rename(f"{photos}/猫.jpg", f"{photos}/狗.jpg")
    shutil.copy(f"{photos}/日本/a.b.jpeg", f"{photos}/copy.jpeg")
    os.utime(f"{photos}/日本/-.gif", (1, 1))
    noise(50, 50, 99).save(f"{photos}/日本/％.bmp")
    os.remove(f"{photos}/ space .JPG")
    index, line = grown(tmp_path / "index", clip, photos)
    assert line == "8 pictures, 4 new or changed, 1 encoded, 2 gone"
    assert same(state(index), state(grown(tmp_path / "anew", clip, photos)[0]))
    assert grown(tmp_path / "index", clip, photos)[1] == "8 pictures, 0 new or changed, 0 encoded, 0 gone"


def test_another_model_has_another_index(photos, tmp_path, clip):
    index, _ = grown(tmp_path / "index", clip, photos)
    other = model.ChineseCLIP(model.MODELS["ViT-tiny"]).eval()
    assert grown(tmp_path / "index", other, photos)[1].startswith("8 pictures, 8 new")
    assert len(os.listdir(tmp_path / "index")) == 2 and len(index.features()) == 8


def test_bad_files_are_named_and_not_opened_again(photos, tmp_path, clip):
    (bad := tmp_path / "photos" / "bad").mkdir()
    (bad / "text.jpg").write_text("no picture")
    (bad / "empty.png").write_bytes(b"")
    noise(200, 8).save(bad / "icon.png")
    whole = (tmp_path / "photos" / "猫.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(whole[:-len(whole) // 2])
    with open(bad / "huge.jpg", "wb") as file:
        file.truncate(2**28 + 1)
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(bad / "bomb.png")
    os.mkfifo(bad / "pipe.jpg")  # to open it would wait for ever
    (bad / ".hidden.jpg").write_bytes(whole)
    (tmp_path / "photos" / ".thumbnails").mkdir()
    (tmp_path / "photos" / ".thumbnails" / "a.jpg").write_bytes(whole)
    (bad / "round").symlink_to("..")  # a loop
    (bad / "gone.jpg").symlink_to("nowhere")
    os.symlink(b"\xff.jpg", os.path.join(os.fsencode(bad), b"\xff\xfe.jpg"))
    with open(os.path.join(os.fsencode(bad), b"\xff.jpg"), "wb") as file:
        file.write(whole)  # a name that is no text, and a content that is known
    index, line = grown(tmp_path / "index", clip, photos)
    said = open(os.path.join(index.folder, "problems.txt"), encoding="utf-8").read()
    assert line.startswith("16 pictures, 16 new or changed, 8 encoded, 0 gone; 6 left out, ")
    for name, why in (("text.jpg", "none of JPEG"), ("empty.png", "none of"), ("icon.png", "200 x 8 pixels, an icon"),
                      ("cut.jpg", "truncated"), ("huge.jpg", "more than 256 MB"), ("bomb.png", "DecompressionBombError")):
        assert any(f"bad/{name}: " in row and why in row for row in said.splitlines()), (name, said)
    again = index.update(clip)
    assert again.startswith("16 pictures, 0 new") and "; 6 left out" in again
    paths = {os.path.basename(path) for path in state(index)}
    assert {b"\xff.jpg", b"\xff\xfe.jpg"} < paths and b"a.jpg" not in paths


def test_what_could_not_be_read_is_tried_again(photos, tmp_path, clip, monkeypatch):
    """A disk that stumbles is no fault of the picture."""
    def stumbling(path: str) -> bytes:
        raise DataError(f"{path}: cannot be read (Input/output error); put it back", "unreadable file")
    monkeypatch.setattr("tools.search.index.read_picture", stumbling)
    assert "0 encoded, 0 gone; 8 left out" in grown(tmp_path / "index", clip, photos)[1]
    monkeypatch.undo()
    assert grown(tmp_path / "index", clip, photos)[1] == "8 pictures, 8 new or changed, 8 encoded, 0 gone"


def test_a_photo_lies_as_its_camera_was_held(tmp_path, clip):
    """A picture that is stored sideways, with a note, has the features of the upright one."""
    picture = Image.linear_gradient("L").convert("RGB")
    picture.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    exif.get_ifd(0x8769)[36867] = "2024:05:06 07:08:09"
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    index, _ = grown(tmp_path / "index", clip, str(tmp_path))
    features = list(state(index).values())
    assert np.abs(features[0] - features[1]).max() < 1e-3
    with Image.open(tmp_path / "sideways.png") as image:
        assert date_taken(image) == day("2024-05-06", 0) + 7 * 3600 + 8 * 60 + 9
    files = index.files([os.fsencode(tmp_path)])
    dates = {os.path.basename(index.path(int(number))): date for number, _, date in files}
    assert dates[b"sideways.png"] < dates[b"upright.png"]


def indexing(folder, photos: str, weights: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tools.search", photos, "--model", weights, "--index", str(folder)],
                            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def many(folder, count: int, first: int = 0):
    for seed in range(first, first + count):
        noise(24, 20, seed).save(os.path.join(folder, f"{seed}.png"))


@pytest.fixture(scope="module")
def weights(clip, tmp_path_factory):
    model.save(clip, path := str(tmp_path_factory.mktemp("weights") / "it.safetensors"))
    return path


def test_two_processes_at_once(tmp_path, clip, weights):
    (photos := tmp_path / "photos").mkdir()
    many(photos, 300)
    both = [indexing(tmp_path / "index", str(photos), weights) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    index, line = grown(tmp_path / "index", clip, str(photos))
    assert line == "300 pictures, 0 new or changed, 0 encoded, 0 gone" and len(index.features()) == 300
    assert same(state(index), state(grown(tmp_path / "anew", clip, str(photos))[0]))


def kill_and_compare(tmp_path, clip, weights: str, kills: int, seed: int):
    """Kill the indexing at random moments while files come, go and change; at the end the index is that of a
    run that nobody disturbed."""
    rng = random.Random(seed)
    (photos := tmp_path / "photos").mkdir()
    many(photos, 300)
    for n in range(kills):
        many(photos, 40, 1000 + 40 * n)
        for name in rng.sample(os.listdir(photos), 30):
            os.remove(photos / name)
        for name in rng.sample(os.listdir(photos), 5):
            noise(30, 30, rng.randrange(10**6)).save(photos / name)
            os.rename(photos / name, photos / f"moved{n}-{name}")
        process = indexing(tmp_path / "index", str(photos), weights)
        time.sleep(rng.uniform(1.5, 5))
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT)))
        process.communicate()
    index, _ = grown(tmp_path / "index", clip, str(photos))
    assert same(state(index), state(grown(tmp_path / "anew", clip, str(photos))[0]))
    assert index.writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_kills_lose_nothing(tmp_path, clip, weights):
    """KILLS=200 python -m pytest tests/tools/test_search.py -k kills takes a quarter of an hour."""
    kill_and_compare(tmp_path, clip, weights, int(os.environ.get("KILLS", 2)), seed=0)


def test_a_full_disk_loses_nothing(tmp_path, clip):
    """Files of at most 20 kB stand for a disk on which the database or the features find no more room."""
    (photos := tmp_path / "photos").mkdir()
    many(photos, 300)
    index, limits = Index(str(tmp_path / "index"), clip, [os.fsencode(photos)]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="make room, wait for another process, or name another folder by --index"):
            index.update(clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert grown(tmp_path / "index", clip, str(photos))[1].endswith("300 encoded, 0 gone")


def test_a_damaged_index_says_what_to_do(photos, tmp_path, clip):
    index, _ = grown(tmp_path / "index", clip, photos)
    with open(index.features_path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="the index is damaged .*delete it, and it is built again"):
        index.features()
    with open(os.path.join(index.folder, "pictures.sqlite"), "wb") as file:
        file.write(b"no database" * 1000)
    with pytest.raises(UserError, match="the index is damaged .*delete it, and it is built again"):
        Index(str(tmp_path / "index"), clip, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the index cannot be used"):
        Index(str(tmp_path / "file"), clip, [])


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_hostile_files(tmp_path, clip):
    """Cut, renamed, empty, huge, and pictures with random bytes in them: none ends the run, and each one that
    holds no picture is named."""
    (folder := tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    originals = {}
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        noise(40, 30, len(originals)).save(folder / f"original.{kind}", "JPEG" if kind == "jpg" else None)
        originals[kind] = (folder / f"original.{kind}").read_bytes()
    for n in range(2000):
        kind, content = list(originals.items())[n % 6]
        content, other = bytearray(content), list(originals)[rng.integers(6)]
        match n % 5:
            case 0:
                content = content[:rng.integers(len(content))]
            case 1:
                for place in rng.integers(0, len(content), 20):
                    content[place] = rng.integers(256)
            case 2:
                kind = other  # renamed: what it holds counts
            case 3:
                content = rng.bytes(rng.integers(500))
            case 4:
                content[10:30] = b"\xff" * 20  # sizes of pictures
        (folder / f"{n}.{kind}").write_bytes(bytes(content))
    index, line = grown(tmp_path / "index", clip, str(folder))
    named = open(os.path.join(index.folder, "problems.txt"), encoding="utf-8").read().splitlines()
    kept = {os.path.basename(path) for path in state(index)}
    assert line.startswith("2,006 pictures, 2,006 new") and len(named) + len(kept) == 2006 and len(named) > 800
    assert all(f"{n}.{kind}".encode() not in kept for n in range(3, 2000, 5) for kind in originals)
    assert sum(name.split(b".")[0].isdigit() and int(name.split(b".")[0]) % 5 == 2 for name in kept) == 400


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere and read every folder")
def test_without_permission(photos, tmp_path, clip):
    index, _ = grown(tmp_path / "index", clip, photos)
    for mode in (0, 0o444):  # not even listed, or listed and not opened
        os.chmod(os.path.join(photos, "日本"), mode)
        line = index.update(clip)
        os.chmod(os.path.join(photos, "日本"), 0o755)
        assert line.startswith("4 pictures, 0 new or changed, 0 encoded, 0 gone; 1 left out") and len(state(index)) == 8
    os.chmod(index.folder, 0o555)
    with pytest.raises(UserError, match="the index cannot be used"):
        index.update(clip)
    os.chmod(index.folder, 0o755)


# ------------------------------------------------------------------------------------------------------------
# queries


@pytest.mark.parametrize("query, expected", [
    ("雪山下的湖", [(1, "雪山下的湖")]),
    ("沙滩 - 人", [(1, "沙滩"), (-1, "人")]),
    ("./a-b.jpg + 2*雪地 - 0.5 * 人", [(1, "./a-b.jpg"), (2, "雪地"), (-0.5, "人")]),
    ("- 人 ＋ 3×狗", [(-1, "人"), (3, "狗")]),
    ("T-shirt 2020-01-01 C++", [(1, "T-shirt 2020-01-01 C++")]),
    ("a + b+c - d e", [(1, "a"), (1, "b+c"), (-1, "d e")]),
    ("5*#12 -人", [(5, "#12 -人")]),
])
def test_terms(query, expected):
    assert terms(query) == expected


@pytest.mark.parametrize("query", ["", " ", "+", "猫 +", "猫 - - 狗", "2*", "- "])
def test_an_empty_term(query):
    with pytest.raises(UserError, match="a term is empty; expected words or pictures"):
        terms(query)


def test_a_long_query_is_read_at_once():
    started = time.process_time()
    assert len(terms("a" + " " * 100_000 + "b + " + "c " * 50_000)) == 2
    assert time.process_time() - started < 5  # a split by a slow pattern took minutes


def test_days():
    for text, after in (("2024", "2025-01-01"), ("2024-12", "2025-01-01"), ("2024-02-28", "2024-02-29")):
        assert day(text, 1) == day(after, 0)
    for text in ("24", "2024-13", "2024-2-30", "today", "2024-02-30"):
        with pytest.raises(UserError, match="expected a date such as"):
            day(text, 0)


def search_in(tmp_path, clip, folder, alike: float = 2.0) -> Search:
    index, _ = grown(tmp_path / "index", clip, str(folder))
    return Search(clip, index, alike, paths=True)


def names(ranking, count: int = 99) -> list[str]:
    return [os.path.basename(hit.path).decode() for hit in ranking.first(count)]


def test_sums_and_differences(tmp_path, clip):
    (folder := tmp_path / "photos").mkdir()
    for colour in COLOURS[:3]:
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
    search = search_in(tmp_path, clip, folder)
    a, b, c = (torch.from_numpy(state(search.index)[os.fsencode(folder / f"{name}.png")]) for name in COLOURS[:3])
    hits = search.ranking(f"{folder}/red.png - {folder}/green.png").first(3)
    found = {os.path.basename(hit.path).decode(): hit.score for hit in hits}
    length = (a - b).norm()
    expected = {"red.png": (a @ a - a @ b) / length, "blue.png": (a @ c - b @ c) / length,
                "green.png": (a @ b - b @ b) / length}
    for name, score in expected.items():
        assert found[name] == pytest.approx(score.item(), abs=3e-3)
    assert hits[0].path.endswith(b"red.png") and hits[-1].path.endswith(b"green.png")
    assert names(search.ranking(f"{folder}/blue.png"))[0] == "blue.png"
    number = {hit.path: hit.number for hit in hits}[os.fsencode(folder / "blue.png")]
    assert names(search.ranking(f"#{number}"))[0] == "blue.png"
    text, is_text = search.feature_of("红色")
    assert is_text and search.ranking("红色").by_text and not search.ranking(f"#{number}").by_text
    assert [hit.score for hit in search.ranking("红色").first(3)] == pytest.approx(
        sorted([(x @ text).item() for x in (a, b, c)], reverse=True), abs=1e-3)
    with pytest.raises(UserError, match="the terms cancel each other"):
        search.ranking("猫 - 猫")
    with pytest.raises(UserError, match="#99: there is no such picture any more"):
        search.ranking("#99")
    with pytest.raises(UserError, match="nothing.jpg: cannot be read"):
        search.ranking("./nothing.jpg")


def test_filters(photos, tmp_path, clip):
    for n, name in enumerate(sorted(os.listdir(f"{photos}/日本"))):
        stamp = day(f"2020-0{n + 1}-15", 0)
        os.utime(f"{photos}/日本/{name}", (stamp, stamp))
    search = search_in(tmp_path, clip, photos)
    ordered = sorted(os.listdir(f"{photos}/日本"))
    assert names(search.ranking(until="2020")) == ordered[::-1]  # without a query, the newest first
    assert names(search.ranking(since="2020-02", until="2020-03")) == ordered[1:3][::-1]
    assert sorted(names(search.ranking("猫", folder=f"{photos}/日本"))) == ordered
    assert sorted(names(search.ranking("猫", folder="日本"))) == ordered
    with pytest.raises(UserError, match="no such folder; expected one below the indexed ones"):
        search.ranking("猫", folder=f"{photos}/日")
    assert search.ranking("猫", folder=f"{photos}/日本", since="2020-04-15").total == 1
    os.remove(f"{photos}/日本/{ordered[0]}")  # gone at once, before the index has looked again
    assert ordered[0] not in names(search.ranking("猫", until="2020"))


def test_near_duplicates_are_one(tmp_path, clip):
    """Six copies of two pictures are two hits; with alike=2 they are six."""
    (folder := tmp_path / "photos").mkdir()
    for n, seed in enumerate((1, 2, 1, 1, 2, 1)):
        noise(40, 40, seed).save(folder / f"{n}.png")
    search = search_in(tmp_path, clip, folder, alike=0.999)
    hits = search.ranking("猫").first(10)
    assert sorted(1 + len(hit.alike) for hit in hits) == [2, 4]
    assert len({hit.number for hit in hits} | set(sum((hit.alike for hit in hits), []))) == 6
    search.alike = 2.0
    search.refresh()
    assert len(search.ranking("猫").first(10)) == 6


def test_many_near_duplicates_belong_to_the_right_one(tmp_path, clip):
    """200 features in the order of their cosine, each twice: every hit has its own twin, beyond the ring too."""
    search = Search.__new__(Search)
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(200, 64, generator=g), dim=1)
    search.features = rows.repeat_interleave(2, dim=0).half().numpy()
    search.files = np.array([(n, n, 0.0) for n in range(400)], [("number", "<i8"), ("row", "<i8"), ("date", "<f8")])
    search.alike, search.index = 0.999, type("All", (), {"path": lambda self, number: b"%d" % number})()
    hits = Ranking(search, nearest(search.features, rows[:1])[0], True, True).first(1000)
    assert len(hits) == 200 and all(hit.number // 2 == hit.alike[0] // 2 for hit in hits)


def test_best_words(tmp_path, clip):
    search = search_in(tmp_path, clip, make_colours(tmp_path))
    words = ("红", "绿", "蓝")
    values, best = search.best_word(words)
    prompts = ensemble(sentence_features(clip, list(words), read_templates(TEMPLATES)))
    scores = torch.from_numpy(search.features[search.files["row"]].astype(np.float32)) @ prompts.T
    assert best.tolist() == scores.argmax(dim=1).tolist() and torch.allclose(values, scores.max(dim=1).values, atol=1e-5)
    for c in range(3):
        assert search.ranking(words=words, word=c).total == int((best == c).sum())


def make_colours(tmp_path):
    (folder := tmp_path / "photos").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
    return folder


def test_recall_through_the_index_is_that_of_eval(tmp_path, clip):
    """The pictures as files, found by their captions: R@1, R@5 and R@10 are those of eval.py to 0.1 points."""
    pairs = open_pairs("scenes-zh-300", "valid")
    (folder := tmp_path / "photos").mkdir()
    count = 200
    for n in range(count):
        pairs.image(n).save(folder / f"{n}.png")
    search = search_in(tmp_path, clip, folder)
    place = {}
    for text, image in pairs.positives.tolist():
        if image < count:
            place[text] = [*names(search.ranking(pairs.text(text)), 10), f"{image}.png"].index(f"{image}.png")

    class Some:
        texts = [pairs.text(text) for text in place]
        image_count, image = count, staticmethod(pairs.image)
        positives = torch.tensor([[n, image] for n, image in enumerate(
            image for text, image in pairs.positives.tolist() if image < count)])
    expected = retrieval(clip, Some)["text_to_image"]
    for k in (1, 5, 10):
        assert 100 * np.mean([p < k for p in place.values()]) == pytest.approx(expected[f"R@{k}"], abs=0.1)


# ------------------------------------------------------------------------------------------------------------
# the command


def run(capsys, *argv) -> tuple[str, str]:
    command.main([*map(str, argv)])
    return capsys.readouterr()


def test_what_the_command_prints(photos, tmp_path, weights, capsys):
    flags = "--model", weights, "--index", tmp_path / "index"
    out, err = run(capsys, photos, "猫", *flags, "--top", 3)
    lines = out.splitlines()
    assert len(lines) == 3 and all(os.path.isfile(line.split(" ", 2)[-1].strip()) or "  and " in line for line in lines)
    assert "8 pictures, 8 new or changed, 8 encoded, 0 gone" in err
    out, err = run(capsys, photos, "猫", *flags, "--json", "--alike", 2)
    found = json.loads(out)
    assert len(found) == 8 and [one["cosine"] for one in found] == sorted((one["cosine"] for one in found), reverse=True)
    assert set(found[0]) == {"path", "cosine", "match", "date", "alike"} and "8 pictures, 0 new" in err
    out, _ = run(capsys, photos, "猫", *flags, "--paths", "--alike", 2, "--sheet", tmp_path / "sheet.png")
    assert out.splitlines() == [one["path"] for one in found]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 300 and sheet.width > 600
    out, _ = run(capsys, photos, *flags, "--like", f"{photos}/日本/-.gif", "--paths", "--top", 1)
    assert out == f"{photos}/日本/-.gif\n"
    assert run(capsys, photos, *flags)[0] == ""  # no query: only indexed


def test_precision_marks_by_calibration(tmp_path, weights, capsys):
    """The threshold is that of tools.measure calibrate on the same pairs."""
    (folder := tmp_path / "photos").mkdir()
    for n in range(20):
        open_pairs("scenes-zh-300", "valid").image(n).save(folder / f"{n}.png")
    flags = folder, "猫", "--model", weights, "--index", tmp_path / "index", "--json", "--alike", 2, "--top", 20
    out, err = run(capsys, *flags, "--precision", 0.5, "--calibrate-on", "scenes-zh-300")
    least = float(err.split("matches: from ")[1].split(" ")[0])
    for one in json.loads(out):
        assert one["match"] == (one["cosine"] >= least) or abs(one["cosine"] - least) < 1e-3


@pytest.mark.parametrize("argv, text", [
    (["{photos}/none", "猫"], "none: no such folder; folders come first, then what to look for, in quotes"),
    (["猫"], "猫: no such folder"),
    (["{photos}", " "], "the query is empty"),
    (["{photos}", "--top", "2", "猫", "--json", "--paths"], "not allowed with argument --json"),
    (["{photos}", "猫", "--top", "0"], "--top 0: expected at least 1"),
    (["{photos}", "猫", "--precision", "0.9"], "--precision and --calibrate-on need each other"),
    (["{photos}", "猫", "--precision", "90", "--calibrate-on", "x"], "--precision 90: expected a share, such as 0.9"),
    (["{photos}", "猫", "--sheet", "x.doc"], "--sheet x.doc: expected a name with .png or .jpg"),
    (["{photos}", "猫", "--folder", "none"], "none: no such folder; expected one below"),
    (["{photos}", "none.jpg"], "none.jpg: cannot be read"),
    (["{photos}", "猫", "--since", "x"], "x: expected a date such as 2024"),
    (["{photos}", "猫", "--until", "9999"], "9999: expected a date such as 2024"),
    (["{photos}", "--serve", "--port", "99999"], "--port 99999: expected 0 to 65535"),
    (["{photos}", "--like", "no.jpg"], "no.jpg: cannot be read"),
    (["{photos}", "猫 +"], "a term is empty"),
    (["{photos}", "猫", "--model", "none.pt"], "none.pt"),
])
def test_wrong_commands_are_one_line(argv, text, photos, tmp_path, weights, capsys):
    flags = [] if "--model" in argv else ["--model", weights]
    argv = [*(one.format(photos=photos) for one in argv), *flags, "--index", str(tmp_path / "index")]
    with pytest.raises(SystemExit) as end, one_line_errors():
        command.main(argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code in (1, 2) and last.startswith("error: ") and text in last
