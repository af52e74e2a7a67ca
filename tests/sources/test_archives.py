"""sources/archives.py: an honest archive, thirty hostile ones, and what an interrupted call leaves."""

import io
import os
import re
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from sources import archives
from sources.archives import inside, open_zip, unpack
from sources.pairs import DataError


def packed(*members, edit=None) -> bytes:
    """An archive of (name or ZipInfo, content) pairs; edit(bytes) -> other bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return edit(file.getvalue()) if edit else file.getvalue()


def unpacked(content: bytes, folder: Path, wanted=lambda path: True) -> dict[str, bytes]:
    with open_zip(io.BytesIO(content), "it.zip") as archive:
        unpack(archive, "it.zip", str(folder), wanted)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_small_archive(tmp_path):
    content = packed(("a.txt", b"one"), ("deep/b.txt", b"two" * 1000), ("deep/", b""))
    assert unpacked(content, tmp_path / "out") == {"a.txt": b"one", "deep/b.txt": b"two" * 1000}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_around_everything_and_what_desktops_leave_are_left_out(tmp_path):
    content = packed(("MUGE/", b""), ("MUGE/a/b.txt", b"1"), ("__MACOSX/MUGE/._b", b"x"), ("MUGE/.DS_Store", b"x"))
    assert unpacked(content, tmp_path / "out") == {"a/b.txt": b"1"}


def test_only_what_is_wanted(tmp_path):
    content = packed(("test/a", b"1"), ("train/a", b"2"), ("label.txt", b"3"))
    assert unpacked(content, tmp_path / "out", lambda path: not path.startswith("train/")) == {
        "test/a": b"1", "label.txt": b"3"}


def test_what_an_interrupted_call_has_left_is_used_if_it_is_right(tmp_path, monkeypatch):
    content = packed(*((f"{n}.txt", str(n).encode() * 100) for n in range(6)))
    left = tmp_path / "out.tmp"
    left.mkdir()
    (left / "0.txt").write_bytes(b"0" * 100)
    (left / "1.txt").write_bytes(b"1" * 50)  # cut
    (left / "2.txt").write_bytes(b"x" * 100)  # of the right length
    (left / "old.txt").write_bytes(b"of another version")
    read, extract = [], archives.extract
    monkeypatch.setattr(archives, "extract", lambda archive, member, *more: read.append(member.filename) or extract(
        archive, member, *more))
    assert unpacked(content, tmp_path / "out") == {f"{n}.txt": str(n).encode() * 100 for n in range(6)}
    assert read == [f"{n}.txt" for n in range(1, 6)]


def named(raw: bytes) -> bytes:
    """An archive whose one member has this name, byte by byte, without a word on its encoding."""
    return packed(("x" * len(raw), b"1"), edit=lambda data: data.replace(b"x" * len(raw), raw))


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "gb18030"])
def test_names_in_utf_8_and_in_gbk_without_a_mark(encoding, tmp_path):
    name = "红花/图片一.txt" if encoding != "gb18030" else "㐂/㐃一.txt"
    content = named(name.encode(encoding))
    assert unpacked(content, tmp_path / "out") == {name.split("/")[1]: b"1"}


def test_one_name_in_gbk_tells_for_all(tmp_path):
    """\xc3\xa8, 猫 in GBK, would be a letter in UTF-8, too."""
    content = packed(("xx/1.jpg", b"1"), ("yy/1.jpg", b"2"), edit=lambda data: data.replace(b"xx/", "猫/".encode(
        "gbk")).replace(b"yy/", "狗/".encode("gbk")))
    assert unpacked(content, tmp_path / "out") == {"猫/1.jpg": b"1", "狗/1.jpg": b"2"}


def special(kind: int, target: bytes = b"/etc/passwd") -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    return packed((info, target))


def central(field: int, form: str, value: int):
    """An edit of one number in the first entry of the list of members."""
    def edit(data: bytes) -> bytes:
        at = data.index(b"PK\1\2") + field
        return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]
    return edit


def twice_the_same_place(data: bytes) -> bytes:
    """The second member's header is said to be that of the first."""
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4) + 42
    return data[:second] + struct.pack("<I", 0) + data[second + 4 :]


A = ("a.txt", b"content of the first")
HOSTILE = {
    "absolute": packed(("/etc/cron.d/x", b"1")), "up": packed(("../x", b"1")), "up below": packed(("a/../../x", b"1")),
    "up at the end": packed(("a/..", b"1")), "here": packed(("a/./x", b"1")), "empty part": packed(("a//x", b"1")),
    "drive": packed(("C:/x", b"1")), "stream": packed(("a.txt:hidden", b"1")), "backslash": named(b"..\\x"),
    "null": named(b"a\0b"), "newline": named(b"a\nb"), "escape": named(b"a\x1b[2Jb"), "delete": named(b"a\x7fb"),
    "no encoding": named(b"\xff\xfe\xff"), "dots": packed((".../x", b"1")), "long part": packed(("x" * 300, b"1")),
    "long path": packed(("/".join(["xx"] * 400), b"1")),
    "link": special(stat.S_IFLNK), "device": special(stat.S_IFCHR), "pipe": special(stat.S_IFIFO),
    "socket": special(stat.S_IFSOCK), "bomb": packed(("zeros", bytes(30 << 20))),
    "a lie about the size": packed(A, edit=central(24, "<I", 400 << 20)),
    "a smaller size": packed(A, edit=central(24, "<I", 5)),
    "the same name": packed(("a", b"1"), ("b", b"2"), edit=lambda data: data.replace(b"b", b"a")),
    "a name in another case": packed(("a.txt", b"1"), ("A.TXT", b"2")),
    "another form of a letter": packed(("\u00e9", b"1"), ("e\u0301", b"2")),
    "file and folder": packed(("a", b"1"), ("a/b", b"2")), "wrong crc": packed(A, edit=central(16, "<I", 1)),
    "encrypted": packed(A, edit=central(8, "<H", 1)), "bzip2": packed(A, edit=central(10, "<H", 12)),
    "one over the other": packed(A, ("b.txt", b"content of another"), edit=twice_the_same_place),
    "cut": packed(A)[:-30], "cut in the middle": packed(A, ("b", b"2"))[:40], "empty": b"", "no zip": b"<html>" * 99,
    "a damaged stream": packed(A, edit=lambda data: data.replace(data[35:50], b"\xff" * 15)),
    "nothing in it": packed(), "only folders": packed(("a/", b"")),
    "a bomb of small ones": packed(*((str(n), bytes(1 << 20)) for n in range(110))),
    "a bomb that says it is empty": packed(*((str(n), b"1") for n in range(110)), edit=lambda data: re.sub(
        rb"(PK\x01\x02.{16}).{8}", lambda found: found[1] + struct.pack("<II", 0, 1 << 20), data, flags=re.DOTALL)),
    "a local name in no encoding": packed(("图片", b"1"), edit=lambda data: data[:30] + b"\xff" * 6 + data[36:]),
    "beyond the end": packed(A, edit=central(42, "<I", 9999)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives(kind, tmp_path):
    """Nothing is written outside, the folder does not appear, and one line says which member is at fault."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    with pytest.raises(DataError, match=r"^it\.zip: ") as caught:
        unpacked(HOSTILE[kind], place / "out")
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1500
    assert ("over the member before it" in message) == (kind == "one over the other")
    assert not (place / "out").exists()
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and place / "out.tmp" not in path.parents]
    assert outside == [] and not any(path.is_symlink() for path in tmp_path.rglob("*"))
    written = [path.stat().st_size for path in (place / "out.tmp").rglob("*") if path.is_file()]
    assert sum(written) < 1000  # not even the beginning of a bomb


def test_thirty_are_hostile():
    assert len(HOSTILE) >= 30


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: type("", (), {"free": 10}))
    with pytest.raises(DataError, match=r"out: 0.0 GB are needed and 0.0 GB are free; make room, or .*XDG_CACHE_HOME"):
        unpacked(packed(A), tmp_path / "out")


def test_an_archive_in_an_archive_is_read_where_it_lies(tmp_path):
    inner = packed(("test/0/a.png", b"1"), ("label.txt", b"cat"))
    path = tmp_path / "outer.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("all/first.zip", packed(("x", b"2")))
        outer.writestr("all/second.zip", inner)
        outer.writestr("all/third.zip", inner, zipfile.ZIP_DEFLATED)
    with open(path, "rb") as file, open_zip(file, "outer.zip") as outer:
        with inside(outer, outer.getinfo("all/second.zip"), "outer.zip") as archive:
            unpack(archive, "second.zip", str(tmp_path / "out"))
        with pytest.raises(DataError, match="outer.zip: all/third.zip is compressed in it or encrypted"):
            inside(outer, outer.getinfo("all/third.zip"), "outer.zip")
    assert (tmp_path / "out" / "test" / "0" / "a.png").read_bytes() == b"1"
