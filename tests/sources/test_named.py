"""sources/named.py: data sets by name, from a local server and from an archive on the disk."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import VIT, built, official
from hub import NAME
from stand_ins import elevater, write_official, write_zip

from sources import named
from sources.classes import open_classes, read_classes
from sources.layouts import open_pairs, splits_of
from sources.named import at_hand
from sources.pairs import DataError
from tools import weights as command
from tools.measure import __main__ as measure
from weights import download, transfer
from weights.names import WeightsError

ELEVATER = f"/{named.RELEASE}/resolve/main/{named.ELEVATER}"
MUGE = f"/{named.RELEASE}/resolve/main/MUGE.zip"


@pytest.fixture
def cache(hub, tmp_path, monkeypatch) -> Path:
    """The server has MUGE and four data sets of classes -> the cache folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "cache"))
    for split in ("train", "valid"):
        folder = Path(write_official(tmp_path / "made", split))
    hub.files[MUGE] = write_zip({f"MUGE/{p.name}": p.read_bytes() for p in folder.iterdir()})
    hub.files[ELEVATER] = elevater(("mnist", "eurosat", "dtd", "gtsrb"), train=20)
    return tmp_path / "cache"


def test_pairs_by_name(cache, hub, tmp_path):
    assert splits_of("muge") == ["train", "valid"]
    pairs = open_pairs("MUGE", "valid")
    assert list(pairs.texts) == list(open_pairs(str(tmp_path / "made"), "valid").texts)
    assert [path for path, asked in hub.requests if asked] == ["/bytes" + MUGE]
    assert sorted(os.listdir(cache)) == ["MUGE.zip.lock", "muge", "muge.lock"]  # no second copy


def test_classes_by_name_fetch_their_own_pictures_to_test_on(cache, hub, monkeypatch):
    monkeypatch.setattr(transfer, "BLOCK", 5000)
    classes, paths, labels = open_classes("eurosat")
    assert labels.tolist() == list(range(10)) and len(classes.chinese) == 10
    assert {Path(path).relative_to(cache).parts[:2] for path in paths} == {("eurosat", "test")}
    assert sorted(os.listdir(cache / "eurosat")) == ["label.txt", "label_cn.txt", "test"]
    asked = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for _, one in hub.requests if one]
    assert sum(stop + 1 - start for start, stop in asked) < len(hub.files[ELEVATER]) / 3


def test_submissions_and_classify_by_name(cache, hub, tmp_path):
    """index.json lies in the folder that the name stands for."""
    torch.save(official(built(VIT).state_dict()), tmp_path / "clip.pt")
    common = ["--model", str(tmp_path / "clip.pt"), "--data", "mnist", "--device", "cpu"]
    at_hand("mnist")
    (cache / "mnist" / "index.json").write_text(json.dumps([*range(9, -1, -1)]), encoding="utf-8")
    for file in ("turned.json", "straight.json"):
        measure.main(["zeroshot", *common, "--labels", "mnist", "--submission", file])
        (cache / "mnist" / "index.json").unlink(missing_ok=True)
    turned, straight = (json.loads((tmp_path / file).read_text())["predictions"][0] for file in ("turned.json", "straight.json"))
    assert turned == straight[::-1] != straight
    measure.main(["classify", *common, "--out", "found.csv"])
    assert (tmp_path / "found.csv").read_text(encoding="utf-8-sig").count("\n") == 11


def test_a_set_by_name_has_its_own_measure_and_names(cache):
    theirs = [f"名{c}" for c in range(10)]
    at_hand("mnist")
    (cache / "mnist" / "label_cn.txt").write_text("\n".join(theirs), encoding="utf-8")
    classes, ours = open_classes("mnist")[0], read_classes("mnist")
    assert classes.chinese == theirs and classes.templates == ours.templates and classes.alone
    assert open_classes("mnist", "mnist")[0].chinese == ours.chinese


def test_sets_of_classes_and_mistyped_ones_are_no_pairs(cache):
    with pytest.raises(DataError, match="mnist: classes, not pairs; expected `python eval.py zeroshot --data mnist`"):
        open_pairs("mnist", "train")
    with pytest.raises(DataError, match="nosuch: no such folder"):
        open_pairs("nosuch,muge", "valid")


def test_a_path_comes_before_a_name(cache, hub, tmp_path):
    (tmp_path / "muge").mkdir()
    assert at_hand("muge") == "muge" and at_hand("elsewhere") == "elsewhere" and not hub.requests


def test_an_archive_that_lies_in_the_cache_is_used(cache, hub):
    cache.mkdir()
    (cache / named.ELEVATER).write_bytes(hub.files.pop(ELEVATER))
    assert len(open_classes("dtd")[1]) == 47 and not hub.requests


@pytest.mark.parametrize("seed", range(3))
def test_broken_connections_are_resumed(seed, cache, hub, monkeypatch):
    monkeypatch.setattr(transfer, "BLOCK", 3000)
    hub.cuts = [10**6, 10**6, 100, 2000, 10**6, 0, 10**6, 50] * 4
    assert len(open_classes("gtsrb")[1]) == 43 and len(open_classes("mnist")[1]) == 10


def test_what_came_before_a_kill_is_not_fetched_again(cache, hub, monkeypatch):
    monkeypatch.setattr(transfer, "BLOCK", 2000)
    left = []
    extract = named.unpack.__globals__["extract"]

    def until(archive, member, name, path, bar):
        if len(left) == 30:
            raise KeyboardInterrupt
        left.append(path)
        return extract(archive, member, name, path, bar)
    monkeypatch.setitem(named.unpack.__globals__, "extract", until)
    with pytest.raises(KeyboardInterrupt):
        at_hand("dtd")
    assert not (cache / "dtd").exists() and len([p for p in (cache / "dtd.tmp").rglob("*") if p.is_file()]) == 30
    first, left[:] = list(left), []
    assert at_hand("dtd") == str(cache / "dtd") and not set(first) & set(left)


def test_hosts_that_cannot_or_change_their_mind(cache, hub):
    hub.ranges = False
    with pytest.raises(DataError, match="its host sends no parts of files.*; or put ELEVATER_all.zip yourself at"):
        at_hand("mnist")
    hub.ranges, hub.down = True, ("huggingface",)
    with pytest.raises(DataError, match="nothing came in 2 tries .*503.*; what came is kept"):
        at_hand("mnist")
    with pytest.raises(WeightsError, match="503.*HF_ENDPOINT to a mirror"):
        at_hand("muge")
    hub.down = ()
    assert len(open_classes("mnist")[1]) == 10


def test_the_archive_is_replaced_while_it_is_read(cache, hub, monkeypatch):
    monkeypatch.setattr(transfer, "BLOCK", 1000)
    original = transfer.RemoteFile.read_on

    def other(self, position):
        hub.files[ELEVATER] += b"1"
        return original(self, position)
    monkeypatch.setattr(transfer.RemoteFile, "read_on", other)
    with pytest.raises(DataError, match="the file changed while it was read; repeat the command|.* and sends another part"):
        at_hand("mnist")


def test_a_data_set_that_the_archive_lacks(cache, hub):
    with pytest.raises(DataError, match="no archive for cifar-10; there are dtd, eurosatclip, gtsrb, mnist"):
        at_hand("cifar-10")


def test_archives_that_are_cut_or_wrong(cache, hub):
    hub.files[MUGE] = hub.files[MUGE][:-50]
    with pytest.raises(DataError, match="no whole zip archive"):
        at_hand("muge")
    hub.files[ELEVATER] = hub.files[ELEVATER][:-1000]
    with pytest.raises(DataError, match="no whole zip archive"):
        at_hand("mnist")
    assert not (cache / "muge").exists() and not (cache / "mnist").exists()


def test_a_full_disk(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr(named.filelock, "FileLock", lambda path: open("/dev/null"))
    with pytest.raises(DataError, match="mnist: No space left on device; make room .what came is kept."):
        at_hand("mnist")


def test_sizes_before_anything_is_fetched(cache, hub):
    sizes = named.to_fetch(["muge", "dtd", "coco-cn"])
    assert sizes["muge"] == len(hub.files[MUGE]) and 0 < sizes["dtd"] < len(hub.files[ELEVATER])
    assert sizes["coco-cn"] is None and named.to_fetch(["cifar-10"]) == {"cifar-10": None}
    at_hand("muge")
    assert named.to_fetch(["muge"]) == {"muge": 0}


def test_one_command_for_weights_and_data(cache, hub, tmp_path, capsys):
    command.main(["download", NAME, "muge", "mnist", "--to", str(tmp_path / "other"), "--from", "modelscope"])
    said = capsys.readouterr().out
    assert (tmp_path / "other" / "muge" / "valid_imgs.tsv").is_file() and not cache.exists()
    assert f"curate check {tmp_path / 'other' / 'muge'}" in said and "weights info" in said
    assert any("/api/v1/models/AI-ModelScope/" in path for path, _ in hub.requests)
    assert all("/datasets/" in path for path, _ in hub.requests if "/api/" not in path)
