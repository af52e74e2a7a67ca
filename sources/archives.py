"""
Zip archives into folders, safely: nothing is written outside, no link is made, and a folder gets its name
when all of it is there and its checksums are right.

Whoever made an archive may have been careless or hostile. Its list of members is read and judged as a whole
before the first byte is written; docs/data.md names what is refused.
"""

import io
import os
import re
import shutil
import stat
import unicodedata
import zipfile
import zlib

from tqdm import tqdm

from sources.pairs import DataError
from weights.transfer import Readable

RATIO, SMALL = 200, 1 << 20  # A member may grow 200 times, or to 1 MB: base64 grows 1.3, pictures 1.0 times.
UTF_8 = 0x800  # the flag of a member whose name is said to be UTF-8 (zip's specification, 4.4.4)
DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what they leave everywhere


class Section(Readable):
    """The bytes [first, first + size) of a file, such as an archive that lies in another."""

    def __init__(self, file, first: int, size: int):
        super().__init__(size)
        self.file, self.first = file, first

    def bytes_at(self, position: int, count: int) -> bytes:
        self.file.seek(self.first + position)
        return self.file.read(count)


def open_zip(file, name: str) -> zipfile.ZipFile:
    """DataError if it is no zip, or its end is missing."""
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(f"{name}: no whole zip archive ({error}); download it again") from None


def inside(outer: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> zipfile.ZipFile:
    """The archive that is a member of another. It is read where it lies, so it must be stored as it is."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise DataError(f"{name}: {member.filename} is compressed in it or encrypted; unpack it by hand")
    outer.fp.seek(member.header_offset)
    header = outer.fp.read(30)  # whose last four bytes are the lengths of name and extra field
    first = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(
        header[28:30], "little")
    section = Section(outer.fp, first, member.file_size)
    return open_zip(io.BufferedReader(section), f"{name}, {member.filename}")


def unpack(archive: zipfile.ZipFile, name: str, folder: str, wanted=lambda path: True):
    """The members of an archive, as far as wanted(path), as files in `folder`, which must not exist. A folder
    that holds all of them is left out. What an interrupted call has left in `folder`.tmp is used if its
    checksums are right. DataError with the member if anything about the archive is not as it should be."""
    members = safe_members(archive, name)
    tops = {path.split("/")[0] for path in members}
    if len(tops) == 1 and all("/" in path for path in members):
        members = {path.partition("/")[2]: member for path, member in members.items()}
    members = {path: member for path, member in members.items() if wanted(path)}
    if not members:
        raise DataError(f"{name}: nothing in it that is needed; expected the layout of docs/data.md")
    temporary, size = folder + ".tmp", sum(member.file_size for member in members.values())
    os.makedirs(temporary, exist_ok=True)
    here = {path for path, member in members.items() if is_there(os.path.join(temporary, path), member)}
    room, needed = shutil.disk_usage(temporary).free, size - sum(members[path].file_size for path in here)
    if needed > room:
        raise DataError(f"{folder}: {needed / 1e9:,.1f} GB are needed and {room / 1e9:,.1f} GB are free; "
                        "make room, or use another folder, by XDG_CACHE_HOME")
    with tqdm(total=size, initial=size - needed, unit="B", unit_scale=True,
              desc=f"unpacking {os.path.basename(folder)}") as bar:
        for path, member in sorted(members.items(), key=lambda item: item[1].header_offset):
            if path not in here:
                extract(archive, member, name, os.path.join(temporary, path), bar)
    for found, _, files in os.walk(temporary):  # of another version of the archive
        for file in files:
            path = os.path.join(found, file)
            if os.path.relpath(path, temporary).replace(os.sep, "/") not in members:
                os.remove(path)
    os.rename(temporary, folder)


def is_there(path: str, member: zipfile.ZipInfo) -> bool:
    """Whether the file at `path` is this member, which its length and CRC-32 tell."""
    if not os.path.isfile(path) or os.path.getsize(path) != member.file_size:
        return False
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(SMALL):
            crc = zlib.crc32(data, crc)
    return crc == member.CRC


def extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, path: str, bar):
    """One member into a file; zipfile compares its CRC-32."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with archive.open(member) as source, open(path, "wb") as target:
            while data := source.read(SMALL):
                target.write(data)
                bar.update(len(data))
            if target.tell() != member.file_size:
                raise zipfile.BadZipFile(f"{target.tell():,} bytes, expected {member.file_size:,}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, NotADirectoryError,
            IsADirectoryError, ValueError) as error:
        raise DataError(f"{name}: {member.filename!a} is broken ({error!a}); download it again") from None


def safe_members(archive: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by their paths, with / between the parts. DataError with the member and what is
    wrong, if any of them could write elsewhere, over another, or more than the archive's size tells."""
    members, files, folders, end, encoding = {}, {}, set(), 0, encoding_of(archive.infolist())
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        path, kind = path_of(member, encoding), stat.S_IFMT(member.external_attr >> 16)
        # on many disks a and A, or two forms of one letter, are one name
        parts = unicodedata.normalize("NFC", path).casefold().split("/")  # the last is "" for a folder
        faults = {
            "a path that leads elsewhere, or that not every system can write": not is_safe(path),
            "encrypted": member.flag_bits & 1,
            "a link or a device": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
            "neither stored nor deflated": member.compress_type not in (0, zipfile.ZIP_DEFLATED),
            f"more than {RATIO} times as large as in the archive":
                member.file_size > max(SMALL, RATIO * member.compress_size),
            "over the member before it": member.header_offset < end,
            "its name twice": "/".join(parts) in files}
        if fault := next((text for text, found in faults.items() if found), ""):
            raise DataError(f"{name}: {member.filename!a} is refused ({fault}); nothing of it was unpacked")
        end = member.header_offset + 30 + member.compress_size
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if parts[-1]:
            files["/".join(parts)] = member
            if path.split("/")[-1] not in DESKTOPS and parts[0] != "__macosx":
                members[path] = member
    sizes, packed = (sum(getattr(member, size) for member in archive.infolist())
                     for size in ("file_size", "compress_size"))
    if sizes > max(100 * SMALL, RATIO * packed):
        raise DataError(f"{name}: refused (its members grow over {RATIO} times); nothing was unpacked")
    if both := files.keys() & folders:
        raise DataError(f"{name}: {files[both.pop()].filename!a} is refused (it is a file and a folder); "
                        "nothing of it was unpacked")
    return members


def encoding_of(members: list[zipfile.ZipInfo]) -> str:
    """Of the names without that flag, which zipfile reads as cp437: most programs write UTF-8 nevertheless,
    and Chinese Windows writes GBK. One name that is not UTF-8 tells for all."""
    try:
        for member in members:
            if not member.flag_bits & UTF_8:
                member.orig_filename.encode("cp437").decode()
    except UnicodeDecodeError:
        return "gb18030"
    return "utf-8"


def path_of(member: zipfile.ZipInfo, encoding: str) -> str:
    """The member's path, in which bytes that are no text become what is_safe refuses."""
    if member.flag_bits & UTF_8:
        return member.orig_filename
    return member.orig_filename.encode("cp437").decode(encoding, errors="surrogateescape")


def is_safe(path: str) -> bool:
    """Whether each part of a path can only be the name of a file or folder: not empty, not dots alone, and
    without drives, backslashes, control characters and what is no text."""
    parts = path.removesuffix("/").split("/")
    return len(path) < 1000 and all(
        re.fullmatch(r"[^\0-\x1f\x7f:\\\ud800-\udfff]+", part) and part.strip(". ")
        and len(part.encode()) < 256 for part in parts)
